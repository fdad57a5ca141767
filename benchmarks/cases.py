"""What is timed: a step of each contestant, ready to call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyncim_core import (
    CurriculumState,
    DynCIMLoss,
    GatedFusion,
    difficulty,
    head_statistics,
    log_weights,
    modality_coefficients,
    prediction_consistency,
    prediction_deviation,
    prediction_stability,
    sample_weights,
    surprise,
    volatility_weights,
)

Step = Callable[[], Sequence[Tensor]]


def heads(batch: int, classes: int, modalities: int, device: str) -> tuple[list[Tensor], Tensor]:
    """Logits of the fused head and of each modality, and a target."""
    generator = torch.Generator().manual_seed(0)
    logits = [
        torch.randn(batch, classes, generator=generator).to(device).requires_grad_()
        for _ in range(1 + modalities)
    ]
    return logits, torch.randint(classes, (batch,), generator=generator).to(device)


def cross_entropies(logits: list[Tensor], target: Tensor, compiled: bool = False) -> Step:
    """What the loss replaces: one cross-entropy for each head, added up."""

    def forward(*heads: Tensor) -> Tensor:
        return _sum_of_losses(heads, target)

    call = torch.compile(forward, fullgraph=True) if compiled else forward
    return lambda: torch.autograd.grad(call(*logits), logits)


def _sum_of_losses(heads: Sequence[Tensor], target: Tensor) -> Tensor:
    loss = F.cross_entropy(heads[0], target)
    for head in heads[1:]:
        loss = loss + F.cross_entropy(head, target)
    return loss


def autograd(logits: list[Tensor], target: Tensor) -> Step:
    """The same curriculum as one would write it first, left to autograd; no state."""
    classes = logits[0].shape[1]

    def step() -> Sequence[Tensor]:
        log_probs = torch.stack([x.log_softmax(dim=1) for x in logits])
        probs = log_probs.exp()
        nll = -log_probs.gather(2, target.expand(len(logits), -1).unsqueeze(2)).squeeze(2)
        with torch.no_grad():
            entropy = -(probs * log_probs).sum(dim=2)
            distance = (probs - probs[0]).norm(dim=2) / 2**0.5
            signals = torch.stack(
                [
                    prediction_deviation(nll),
                    prediction_consistency(distance),
                    prediction_stability(entropy, classes),
                ]
            )
            log_weight = log_weights(
                surprise(nll, entropy),
                difficulty(signals, volatility_weights(torch.ones_like(signals[:, 0]))),
                surprise_strength=1.0,
                pacing_strength=0.2,
            )
            even = log_weight.new_zeros(classes)
            weights, _ = sample_weights(log_weight, target, even, decay=0.95)
            factors = torch.cat([nll.new_ones(1), modality_coefficients(-nll.mean(dim=1))])
        loss = (weights * factors.unsqueeze(1) * nll).sum() / len(target)
        return torch.autograd.grad(loss, logits)

    return step


def statistics(logits: list[Tensor], target: Tensor, backend: str | None) -> Step:
    """Head statistics alone."""
    return lambda: head_statistics(logits, target, backend=backend)


def loss(
    logits: list[Tensor],
    target: Tensor,
    backend: str | None,
    state: CurriculumState | None = None,
    compiled: bool = False,
) -> Step:
    """``DynCIMLoss``, its state included; also the memory of a state that has one."""
    state = state or CurriculumState(len(logits) - 1)
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), state=state, backend=backend)
    criterion.to(target.device)
    index = torch.arange(len(target), device=target.device) if state.num_samples else None

    def forward(*heads: Tensor) -> Tensor:
        joint: Tensor = criterion(heads[0], target, unimodal=list(heads[1:]), index=index)
        return joint

    call = torch.compile(forward, fullgraph=True) if compiled else forward
    return lambda: torch.autograd.grad(call(*logits), logits)


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *logits: Tensor) -> Tensor:
        ctx.save_for_backward(*logits)
        return logits[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


@cache
def _registered_nothing() -> Callable[[list[Tensor]], Tensor]:
    @torch.library.custom_op("dyncim_benchmarks::nothing", mutates_args=())
    def nothing(logits: list[Tensor]) -> Tensor:
        return logits[0].new_empty(())

    def save(ctx: Any, inputs: tuple[list[Tensor]], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[0])

    def backward(ctx: Any, grad: Tensor) -> list[Tensor]:
        return list(map(torch.empty_like, ctx.saved_tensors))

    nothing.register_fake(lambda logits: logits[0].new_empty(()))
    nothing.register_autograd(backward, setup_context=save)
    return nothing


def dispatched(logits: list[Tensor], registered: bool) -> Step:
    """Forward and backward of a step that computes nothing: what it costs to be one.

    An autograd function, as the loss is, or an operator registered with its autograd rule.
    """
    if registered:
        operator = _registered_nothing()
        return lambda: torch.autograd.grad(operator(logits), logits)
    return lambda: torch.autograd.grad(_Nothing.apply(*logits), logits)  # type: ignore[no-untyped-call]


def captured(step: Step) -> Step:
    """The same step, recorded as a CUDA graph and replayed."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Sequence[Tensor]:
        graph.replay()
        return result

    return replay


def copies(logits: list[Tensor]) -> Step:
    """One read and one write of every logit."""
    return lambda: [x.detach().clone() for x in logits]


def from_features(
    contestant: str, batch: int, classes: int, modalities: int, width: int, device: str
) -> Step:
    """A linear head for the fusion and each modality, and their losses.

    Public kernels fuse the two without a curriculum: liger_kernel and cut_cross_entropy.
    """
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # all that the latter takes
    features, weights = (
        [
            (torch.randn(rows, width, generator=generator) / width**0.5)
            .to(device, dtype)
            .requires_grad_()
            for _ in range(1 + modalities)
        ]
        for rows in (batch, classes)
    )
    target = torch.randint(classes, (batch,), generator=generator).to(device)

    joint = _joint(contestant, modalities, device)
    return lambda: torch.autograd.grad(joint(features, weights, target), [*features, *weights])


def _joint(
    contestant: str, modalities: int, device: str
) -> Callable[[list[Tensor], list[Tensor], Tensor], Tensor]:
    if contestant == "liger_kernel":
        liger = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
        return lambda xs, ws, target: sum(map(liger, ws, xs, repeat(target)))
    if contestant == "cut_cross_entropy":
        cut = import_module("cut_cross_entropy").linear_cross_entropy
        return lambda xs, ws, target: sum(map(cut, xs, ws, repeat(target)))
    if contestant == "cross-entropies":
        return lambda xs, ws, target: _sum_of_losses(list(map(F.linear, xs, ws)), target)
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=modalities).to(device)

    def joint(features: list[Tensor], weights: list[Tensor], target: Tensor) -> Tensor:
        fused, *unimodal = map(F.linear, features, weights)
        found: Tensor = criterion(fused, target, unimodal=unimodal)
        return found

    return joint


def fusion(
    gated: bool,
    batch: int,
    classes: int,
    modalities: int,
    width: int,
    device: str,
    trains: bool = True,
) -> Step:
    """Concatenation and a linear head, or ``GatedFusion`` in front of it; or these in inference."""
    features = [
        torch.randn(batch, width, device=device, requires_grad=True) for _ in range(modalities)
    ]
    unimodal = heads(batch, classes, modalities, device)[0][1:]
    head = nn.Linear(width * modalities, classes, device=device)
    fuse = GatedFusion([width] * modalities).to(device)
    leaves = [*features, *head.parameters()]

    def forward() -> Tensor:
        logits: Tensor
        if not gated:
            logits = head(torch.cat(features, dim=1))
            return logits
        fused, _, gated_logits = fuse(features, unimodal=unimodal)
        logits = head(fused) + gated_logits
        return logits

    if trains:
        return lambda: torch.autograd.grad(forward().sum(), leaves)
    for _ in range(512 // batch + 1):  # enough to tell what is new
        fuse([torch.randn_like(x) for x in features])
    fuse.eval()
    return lambda: [_without_gradients(forward)]


@torch.no_grad()
def _without_gradients(forward: Callable[[], Tensor]) -> Tensor:
    return forward()


class _Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.skip = nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def residual_encoder(channels: int) -> nn.Sequential:
    """Eighteen layers and eleven million parameters, as ResNet-18."""
    blocks: list[nn.Module] = [nn.Conv2d(channels, 64, 7, 2, 3, bias=False), nn.MaxPool2d(2)]
    width_in = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [_Block(width_in, width, stride), _Block(width, width, 1)]
        width_in = width
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def digit_encoder(channels: int) -> nn.Sequential:
    """Three convolutions, as for a spoken digit's spectrogram."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d((4, 2)), nn.Flatten()),
    )


def training_step(
    curriculum: bool,
    encoder: Callable[[int], nn.Sequential],
    shapes: Sequence[tuple[int, int, int]],
    batch: int,
    classes: int,
    device: str,
    lr: float = 1e-3,
) -> Step:
    """A whole step: encoders, heads, loss, backward and SGD."""
    torch.manual_seed(0)
    inputs = [torch.randn(batch, *shape, device=device) for shape in shapes]
    target = torch.randint(classes, (batch,), device=device)
    encoders = nn.ModuleList(encoder(shape[0]) for shape in shapes).to(device)
    width = 512
    unimodal_heads = nn.ModuleList(nn.Linear(width, classes) for _ in shapes).to(device)
    head = nn.Linear(width * len(shapes), classes, device=device)
    parameters = [p for m in (encoders, unimodal_heads, head) for p in m.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=len(shapes)).to(device)
    fuse = GatedFusion([width] * len(shapes), state=criterion.state).to(device)

    def step() -> Sequence[Tensor]:
        features = [encode(x) for encode, x in zip(encoders, inputs, strict=True)]
        unimodal = [h(x) for h, x in zip(unimodal_heads, features, strict=True)]
        if curriculum:
            fused, _, gated = fuse(features, unimodal=unimodal)
            joint = criterion(head(fused) + gated, target, unimodal=unimodal)
        else:
            joint = _sum_of_losses([head(torch.cat(features, dim=1)), *unimodal], target)
        optimizer.zero_grad()
        joint.backward()
        optimizer.step()
        return [joint.detach()]

    return step
