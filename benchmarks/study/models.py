"""The networks: the same encoders and heads for each method, and the fusions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from dyncim_core import (
    CurriculumState,
    GatedFusion,
    augmentation_rates,
    evenness,
    relative_gates,
)

WIDTH = 64  # of every modality's features


class Heads(NamedTuple):
    """Logits of the fusion and of each modality, and the features that they come from."""

    fused: Tensor
    unimodal: dict[str, Tensor]
    features: dict[str, Tensor]

    def all(self) -> list[Tensor]:
        """The logits, the fused first."""
        return [self.fused, *self.unimodal.values()]


Head = Callable[[int], nn.Module]  # logits from fused features of a width
Fusion = Callable[[tuple[str, ...], Head], nn.Module]


class Network(nn.Module):
    """An encoder and a head for each modality, and a fusion.

    Args:
        shapes: Shape of one sample of each modality: vectors get two linear layers,
            images a small convolutional network.
        num_classes: Number of classes.
        fusion: Makes the module that turns features, unimodal logits and the mask of
            present modalities into fused logits.
        hidden: Units of the hidden layer of the fused head; 0 for a linear one.
    """

    def __init__(
        self, shapes: dict[str, torch.Size], num_classes: int, fusion: Fusion, hidden: int = 0
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: _encoder(shape) for name, shape in shapes.items()})
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, num_classes) for name in shapes})
        self.fusion = fusion(tuple(shapes), partial(_head, num_classes=num_classes, hidden=hidden))

    def forward(self, inputs: dict[str, Tensor], present: Tensor | None = None) -> Heads:
        """Logits of a batch; ``present``, bool ``[B, M]``, is for the fusion."""
        features = {name: encode(inputs[name]) for name, encode in self.encoders.items()}
        unimodal = {name: head(features[name]) for name, head in self.heads.items()}
        return Heads(self.fusion(features, unimodal, present), unimodal, features)


class Specialists(Network):
    """A network for what has every modality, and one of its own for what lacks each."""

    def __init__(self, whole: Network, lacking: list[Network]) -> None:
        nn.Module.__init__(self)
        self.whole = whole
        self.lacking = nn.ModuleList(lacking)

    @override
    def forward(self, inputs: dict[str, Tensor], present: Tensor | None = None) -> Heads:
        """Heads of the first; fused logits of whichever was trained for what is present."""
        heads: Heads = self.whole(inputs)
        if present is None:
            return heads
        fused = heads.fused
        for m, (without, mask) in enumerate(self.each(len(present))):
            found = without(inputs, mask).fused
            fused = torch.where(present[:, m : m + 1], fused, found)
        return heads._replace(fused=fused)

    def each(self, size: int) -> Iterator[tuple[nn.Module, Tensor]]:
        """The networks for what lacks one modality, and their masks, bool ``[size, M]``."""
        for m, network in enumerate(self.lacking):
            yield network, torch.arange(len(self.lacking)).ne(m).expand(size, -1)


class Concatenation(nn.Module):
    """A head over the features of all; zeros for what is absent."""

    def __init__(self, modalities: tuple[str, ...], head: Head) -> None:
        super().__init__()
        self.head = head(WIDTH * len(modalities))

    def forward(
        self, features: dict[str, Tensor], unimodal: dict[str, Tensor], present: Tensor | None
    ) -> Tensor:
        """Fused logits."""
        streams = list(features.values())
        if present is not None:
            streams = [x * present[:, m : m + 1] for m, x in enumerate(streams)]
        fused: Tensor = self.head(torch.cat(streams, dim=1))
        return fused

    def parts(self, features: dict[str, Tensor]) -> list[Tensor]:
        """The logits of each modality alone: of a linear head, they sum to the fused ones."""
        if not isinstance(self.head, nn.Linear):
            streams = list(features.values())
            alone = torch.eye(len(streams)).repeat_interleave(WIDTH, dim=1)
            return [self.head(torch.cat(streams, dim=1) * mask) for mask in alone]
        weights = torch.split(self.head.weight, WIDTH, dim=1)
        bias = self.head.bias / len(features)
        return [x @ w.t() + bias for x, w in zip(features.values(), weights, strict=True)]


class MeanOfLogits(nn.Module):
    """Late fusion: the mean of the logits of the modalities that are present."""

    def __init__(self, modalities: tuple[str, ...], head: Head) -> None:
        super().__init__()

    def forward(
        self, features: dict[str, Tensor], unimodal: dict[str, Tensor], present: Tensor | None
    ) -> Tensor:
        """Fused logits."""
        logits = torch.stack(list(unimodal.values()), dim=1)
        if present is None:
            return logits.mean(dim=1)
        return (logits * present.unsqueeze(2)).sum(dim=1) / present.sum(dim=1, keepdim=True)


class MeanOfProbabilities(MeanOfLogits):
    """Late fusion by the sum rule: the mean of the probabilities, as logits."""

    @override
    def forward(
        self, features: dict[str, Tensor], unimodal: dict[str, Tensor], present: Tensor | None
    ) -> Tensor:
        """Fused logits."""
        chances = {name: logits.softmax(dim=1) for name, logits in unimodal.items()}
        tiny = torch.finfo(torch.float32).tiny
        return super().forward(features, chances, present).clamp_min(tiny).log()


class FamiliarLogits(nn.Module):
    """Late fusion: modalities whose features are unlike those of training count less.

    By their squared Mahalanobis distance, as ``GatedFusion`` does, which compares nothing else
    here.
    """

    def __init__(self, modalities: tuple[str, ...], head: Head) -> None:
        super().__init__()
        widths = dict.fromkeys(modalities, WIDTH)
        self.gates = GatedFusion(widths, disagreement_slope=0.0, dropout=0.0)

    def forward(
        self, features: dict[str, Tensor], unimodal: dict[str, Tensor], present: Tensor | None
    ) -> Tensor:
        """Fused logits."""
        seen = {name: x.detach() for name, x in features.items()}
        gates = self.gates(seen, unimodal=unimodal, present=present).gates
        logits = torch.stack(list(unimodal.values()), dim=1)
        fused: Tensor = (gates.unsqueeze(2) * logits).sum(dim=1)
        return fused


class OneModality(nn.Module):
    """No fusion: the logits of one modality; equal ones where it is absent."""

    def __init__(self, modalities: tuple[str, ...], head: Head, *, position: int = 0) -> None:
        super().__init__()
        self.position = position

    def forward(
        self, features: dict[str, Tensor], unimodal: dict[str, Tensor], present: Tensor | None
    ) -> Tensor:
        """The modality's logits."""
        logits = list(unimodal.values())[self.position]
        return logits if present is None else logits * present[:, self.position].unsqueeze(1)


class Gated(nn.Module):
    """``GatedFusion`` with a head, as in the toolkit's README."""

    def __init__(self, modalities: tuple[str, ...], head: Head, **options: Any) -> None:
        super().__init__()
        self.gates = GatedFusion(dict.fromkeys(modalities, WIDTH), **options)
        self.head = head(self.gates.out_features)

    def forward(
        self, features: dict[str, Tensor], unimodal: dict[str, Tensor], present: Tensor | None
    ) -> Tensor:
        """Fused logits."""
        fused, _, gated = self.gates(features, unimodal=unimodal, present=present)
        logits: Tensor = self.head(fused) + gated
        return logits


class LogitsThroughout(Gated):
    """``Gated`` whose head always learns with the gated logits, in full."""

    @override
    def forward(
        self, features: dict[str, Tensor], unimodal: dict[str, Tensor], present: Tensor | None
    ) -> Tensor:
        """Fused logits."""
        fused, gates, gated = self.gates(features, unimodal=unimodal, present=present)
        if self.training:
            gated = self.in_full(gates, unimodal).detach()
        logits: Tensor = self.head(fused) + gated
        return logits

    def in_full(self, gates: Tensor, unimodal: dict[str, Tensor]) -> Tensor:
        """Gated logits of training, none withdrawn yet, attached."""
        scale = relative_gates(gates.t()).unsqueeze(2)
        own = torch.stack(list(unimodal.values()))
        assert self.gates.log_prior is not None
        return (scale * (own - self.gates.log_prior[: own.shape[2]])).sum(dim=0)


class AttachedLogits(LogitsThroughout):
    """``Gated`` whose gated logits let the fused loss through."""

    def __init__(self, modalities: tuple[str, ...], head: Head, *, state: CurriculumState) -> None:
        super().__init__(modalities, head, state=state)
        self._state = (state,)  # in a tuple: the network's parameters and buffers are its own

    @override
    def forward(
        self, features: dict[str, Tensor], unimodal: dict[str, Tensor], present: Tensor | None
    ) -> Tensor:
        """Fused logits."""
        fused, gates, gated = self.gates(features, unimodal=unimodal, present=present)
        (state,) = self._state
        own = (1.0 - state.quality[0]) * self.in_full(gates, unimodal)
        logits: Tensor = self.head(fused) + gated + own - own.detach()
        return logits


class FeaturesAlone(Gated):
    """``Gated`` without gated logits."""

    @override
    def forward(
        self, features: dict[str, Tensor], unimodal: dict[str, Tensor], present: Tensor | None
    ) -> Tensor:
        """Fused logits."""
        fused: Tensor = self.gates(features, unimodal=unimodal, present=present).fused
        logits: Tensor = self.head(fused)
        return logits


class Overruled(Gated):
    """``Gated`` that reads ``value`` in one of the state's buffers, ``name``."""

    def __init__(
        self,
        modalities: tuple[str, ...],
        head: Head,
        *,
        state: CurriculumState,
        name: str,
        value: float,
    ) -> None:
        super().__init__(modalities, head, state=state)
        self.name, self.value = name, value
        self._state = (state,)  # in a tuple: the network's parameters and buffers are its own

    @override
    def forward(
        self, features: dict[str, Tensor], unimodal: dict[str, Tensor], present: Tensor | None
    ) -> Tensor:
        """Fused logits."""
        (state,) = self._state
        state.get_buffer(self.name).fill_(self.value)
        return super().forward(features, unimodal, present)


class Uncounted(Gated):
    """``Gated`` whose gates and gated logits take what is frequent for something told."""

    def __init__(self, modalities: tuple[str, ...], head: Head, *, state: CurriculumState) -> None:
        super().__init__(modalities, head, state=state)
        self.gates.log_prior = None


class GatedUnderShare(Gated):
    """``Gated`` whose dropout is done in front of the gates: at a ``share`` of the samples.

    As in the toolkit, the picked modality is missed the less often the less it errs, and the less
    even the classes are.
    """

    def __init__(
        self,
        modalities: tuple[str, ...],
        head: Head,
        *,
        state: CurriculumState,
        share: Callable[[CurriculumState], float | Tensor],
    ) -> None:
        super().__init__(modalities, head, state=state, dropout=0.0)
        self.share = share
        self._state = (state,)  # in a tuple: the network's parameters and buffers are its own

    @override
    def forward(
        self, features: dict[str, Tensor], unimodal: dict[str, Tensor], present: Tensor | None
    ) -> Tensor:
        """Fused logits."""
        if self.training:
            assert present is None  # in training, nothing else is absent
            present = self.draw(len(next(iter(features.values()))))
        return super().forward(features, unimodal, present)

    @torch.no_grad()
    def draw(self, size: int) -> Tensor:
        """Mask of what is present, bool ``[size, modalities]``."""
        (state,) = self._state
        rates = self.share(state) * augmentation_rates(state.skill[1:])
        rates = rates * evenness(state.class_seen * state.class_weight)
        pick, event, _ = torch.rand((3, size))  # as the toolkit does
        picked = torch.arange(len(rates)) == (pick * len(rates)).long().unsqueeze(1)
        present: Tensor = ~picked | (event.unsqueeze(1) < 1.0 - rates)
        return present


class AttentionPool(nn.Module):
    """The fusion layer of the package ``aecf``, with a head.

    As released (0.1.0): the entropy that its penalty is of comes detached, and the weights that its
    curriculum masks do not reach the output, so that it is plain attention.

    Attributes:
        penalty: The entropy penalty of the last batch, for the loss.
    """

    def __init__(self, modalities: tuple[str, ...], head: Head) -> None:
        super().__init__()
        from aecf import create_fusion_pool  # optional: pip install --no-deps aecf

        self.query, self.pool = create_fusion_pool(WIDTH, len(modalities))
        self.head = head(WIDTH)
        self.penalty = torch.zeros(())

    def forward(
        self, features: dict[str, Tensor], unimodal: dict[str, Tensor], present: Tensor | None
    ) -> Tensor:
        """Fused logits."""
        stack = torch.stack(list(features.values()), dim=1)
        pooled, info = self.pool(
            self.query.expand(len(stack), -1, -1),
            stack,
            key_padding_mask=None if present is None else ~present,
            return_info=True,
        )
        masking = self.pool.curriculum_masking
        assert masking is not None  # create_fusion_pool makes one
        self.penalty = masking.entropy_loss(info["entropy"])
        logits: Tensor = self.head(pooled.squeeze(1))
        return logits


def _head(width: int, *, num_classes: int, hidden: int) -> nn.Module:
    if not hidden:
        return nn.Linear(width, num_classes)
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))


def _encoder(shape: torch.Size) -> nn.Module:
    if len(shape) == 1:
        layers: list[nn.Module] = [nn.Linear(shape[0], 128), nn.ReLU(), nn.Linear(128, WIDTH)]
    else:
        layers = [nn.Unflatten(1, (1, shape[0]))]
        for before, after in ((1, 12), (12, 24), (24, 48)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        layers += [nn.Flatten(), nn.Linear(48 * math.prod(n // 8 for n in shape), WIDTH)]
    return nn.Sequential(*layers, nn.ReLU())
