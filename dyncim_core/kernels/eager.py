"""The kernels in plain PyTorch, for every device and dtype; what ``torch.compile`` fuses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dyncim_core.gates import disagreement, reliability_gates
from dyncim_core.kernels.interface import (
    Buffers,
    Criterion,
    Curriculum,
    Gate,
    Gating,
    Memory,
    Normaliser,
    Settings,
    Statistics,
)
from dyncim_core.modality import augmentation_rates, modality_coefficients, quality
from dyncim_core.signals import (
    contradiction,
    difficulty,
    noise_pressure,
    prediction_consistency,
    prediction_deviation,
    prediction_stability,
    relative_change,
    sample_weights,
    surprise,
    volatility_weights,
)

__all__ = [
    "accumulation_dtype",
    "combine",
    "curriculum",
    "gate",
    "gradients",
    "recall",
    "statistics",
    "take_in",
    "weigh",
]

# Heads with fewer logits than this in all are stacked: one call for all costs less than a
# copy. Larger ones go in blocks of rows, on a CPU, whose temporaries stay in its cache.
_STACKED = 2**16
_BLOCK = 2**17


def accumulation_dtype(logits: Sequence[Tensor]) -> torch.dtype:
    """float64 when any head is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


@torch.no_grad()
def statistics(
    logits: Sequence[Tensor], present: Tensor | None, criterion: Criterion
) -> Statistics:
    """What each head says about each sample."""
    dtype = accumulation_dtype(logits)
    blocks = [
        _statistics([x[rows] for x in logits], _truth(criterion, rows, dtype), dtype)
        for rows in _row_blocks(logits)
    ]
    rows, prediction = blocks[0]
    if len(blocks) > 1:
        rows = torch.cat([block[0] for block in blocks], dim=2)
        prediction = torch.cat([block[1] for block in blocks], dim=1)
    if present is not None:
        rows = torch.where(present, rows, 0.0)
    return Statistics(rows, prediction, None)


def gradients(
    grad: Tensor,
    coefficient: Tensor | None,
    normaliser: Normaliser,
    logits: Sequence[Tensor],
    criterion: Criterion,
    guard: bool,
) -> list[Tensor]:
    """``coef * (mass * softmax - truth)`` for each head."""
    dtype = accumulation_dtype(logits)
    coefs = grad if coefficient is None else grad * coefficient
    blocks = [
        _gradients(
            coefs[:, rows], [x[rows] for x in logits], _truth(criterion, rows, dtype), dtype, guard
        )
        for rows in _row_blocks(logits)
    ]
    return [
        (parts[0] if len(parts) == 1 else torch.cat(parts)).to(head.dtype)
        for head, *parts in zip(logits, *blocks, strict=True)
    ]


@torch.no_grad()
def curriculum(
    logits: Sequence[Tensor],
    present: Tensor | None,
    criterion: Criterion,
    buffers: Buffers,
    memory: Memory | None,
    settings: Settings,
) -> Curriculum:
    """Weigh the samples by what the state knows; then take the batch into the state."""
    found = statistics(logits, present, criterion)
    coefficient = weigh(found, present, criterion, logits[0].shape[1], buffers, memory, settings)
    return Curriculum(combine(coefficient, found.rows[0], settings), coefficient, None)


def combine(coefficient: Tensor, loss: Tensor, settings: Settings) -> Tensor:
    """The joint objective: losses ``[M + 1, B]`` by their factors, summed as ``reduction`` says."""
    if settings.skip_nonfinite:
        loss = torch.where(coefficient == 0, 0.0, loss)
    joint = coefficient * loss
    return joint.sum(dim=0) if settings.reduction == "none" else joint.sum()


@torch.no_grad()
def weigh(
    found: Statistics,
    present: Tensor | None,
    criterion: Criterion,
    num_classes: int,
    buffers: Buffers,
    memory: Memory | None,
    settings: Settings,
) -> Tensor:
    """Factor of every head's loss in the joint objective, ``[M + 1, B]``; updates the buffers."""
    _, nll, entropy, distance = found.rows
    target = criterion.target
    if target.is_floating_point():
        label, kept = target.argmax(dim=1), torch.ones_like(target[:, 0], dtype=torch.bool)
    else:
        label, kept = target, target != criterion.ignore_index
    finite = (nll + entropy).sum(dim=0).isfinite()
    valid = kept & finite
    if memory is not None:
        recalled, visits = recall(memory)

    signals = torch.stack(
        [
            prediction_deviation(nll, present),
            prediction_consistency(distance, present),
            prediction_stability(entropy, num_classes),
        ]
    )
    noise = buffers.label_noise
    if settings.label_noise is not None:
        noise = torch.full_like(noise, settings.label_noise)
    weights = sample_weights(
        surprise(nll, entropy, num_classes, present),
        difficulty(signals, volatility_weights(buffers.volatility)),
        surprise_strength=settings.surprise_strength * noise_pressure(noise),
        pacing_strength=settings.pacing_strength * (1.0 - buffers.quality[0]),
        valid=valid,
    )

    counted = valid.expand_as(nll) if present is None else valid & present
    if len(nll) < len(buffers.seen):  # a step without unimodal predictions
        absent = nll.new_zeros(len(buffers.seen) - len(nll), nll.shape[1])
        nll, counted = torch.cat([nll, absent]), torch.cat([counted, absent.bool()])
    nll = torch.where(counted, nll, 0.0)
    take_in(
        nll,
        torch.where(valid, signals, 0.0),
        contradiction(found.prediction, label, present) & valid,
        torch.where(counted, weights, 0.0),
        valid.sum(),
        num_classes,
        buffers,
        settings.decay,
    )
    buffers.nonfinite.add_((kept & ~finite).sum())
    if memory is not None:
        current = nll.t().to(recalled.dtype)
        averaged = torch.where(
            visits == 0, current, torch.lerp(current, recalled, settings.memory_decay)
        )
        memory.nll.index_copy_(0, memory.rows, torch.where(counted.t(), averaged, recalled))
        memory.visits.index_copy_(0, memory.rows, visits + counted.t())
        memory.weight.index_copy_(0, memory.rows, weights.to(memory.weight.dtype))

    modalities = len(found.rows[0]) - 1
    if settings.skip_nonfinite:
        kept = valid
        weights = torch.where(kept, weights, 0.0)
    coefficient = weights.expand(1 + modalities, -1)
    if modalities:
        ahead = modality_coefficients(buffers.log_quality) * settings.unimodal_strength
        coefficient = torch.cat([torch.ones_like(ahead[:1]), ahead]).unsqueeze(1) * weights
    if settings.reduction == "mean":
        mass = kept
        if criterion.weight is not None and not target.is_floating_point():
            # the mean of cross-entropy is over class weights
            mass = torch.where(kept, criterion.weight[torch.where(kept, target, 0)], 0.0)
        coefficient = coefficient / mass.sum()
    return coefficient if present is None else torch.where(present, coefficient, 0.0)


def recall(memory: Memory) -> tuple[Tensor, Tensor]:
    """Average NLL and visits of the batch's samples, ``[B, M + 1]``.

    Raises:
        IndexError: An index is out of range (on CPU; a device assertion on a GPU).
    """
    index = memory.rows
    try:
        return memory.nll.index_select(0, index), memory.visits.index_select(0, index)
    except (RuntimeError, IndexError) as error:  # only then is a look at the values due
        raise IndexError(
            f"index: expected sample indices in [0, {len(memory.nll)}), got values from "
            f"{int(index.min())} to {int(index.max())}"
        ) from error


def take_in(
    nll: Tensor,
    signals: Tensor,
    contradicted: Tensor,
    weights: Tensor,
    count: Tensor,
    num_classes: int,
    buffers: Buffers,
    decay: float,
) -> None:
    """Take a batch into the running averages; what does not count is 0 in all of it.

    An average starts at its first value, and stays where a batch has nothing to say.
    Qualities are averaged with the sample weights, so that labels in doubt do not make a
    good modality look bad.
    """
    moves = count > 0
    some = count.clamp_min(1)
    seen = buffers.seen
    mass = weights.sum(dim=1)
    has_mass = mass > 0
    kind = buffers.log_quality.dtype
    steps = (1.0 - decay) * moves.to(kind)

    def rate(first: Tensor, moving: Tensor) -> Tensor:
        return torch.where(first, 1.0, 1.0 - decay) * moving

    signal = (signals.sum(dim=1) / some).to(kind)
    # The first batch has nothing to have moved from.
    change = torch.where(seen[0] == 0, 0.0, relative_change(signal, buffers.signal_mean))
    start = rate(seen[0] == 0, moves)
    fused = weights[0]
    share = mass[0].square() / (fused.square().sum() * count).clamp_min(1e-12)
    buffers.effective_share.lerp_(share.to(kind), start)
    buffers.signal_mean.lerp_(signal, start)
    buffers.volatility.lerp_(change, rate(seen[0] == 1, moves))
    # Starts at 0, not at its first value: the doubt of an untrained model is worth nothing.
    buffers.label_noise.lerp_((contradicted.sum() / some).to(kind), steps)

    mean_nll = (weights * nll).sum(dim=1) / torch.where(has_mass, mass, 1.0)
    log_quality = buffers.log_quality.lerp(-mean_nll.to(kind), rate(seen == 0, has_mass))
    buffers.seen.add_(has_mass)
    # A modality never seen counts as equal to the fusion, which favours neither side.
    buffers.log_quality.copy_(torch.where(seen > 0, log_quality, log_quality[0]))
    buffers.quality.copy_(quality(buffers.log_quality, num_classes))
    buffers.step.add_(1)


@torch.no_grad()
def gate(
    logits: Sequence[Tensor],
    quality: Tensor,
    available: Tensor | None,
    chance: Tensor | None,
    settings: Gate,
) -> Gating:
    """Gates of the modalities from their logits, some of them disturbed."""
    source = None
    if chance is not None:
        source, available = _disturb(quality, available, chance, settings)
        if settings.swap:
            logits = [x[rows] for x, rows in zip(logits, source, strict=True)]
        else:
            source = None
    probs = torch.stack([x.float() for x in logits]).softmax(dim=-1)
    conflict = disagreement(probs, quality, available)
    gates = reliability_gates(
        -settings.disagreement_slope * conflict, available, settings.threshold
    )
    # The most reliable modality passes whole: equal gates give plain concatenation.
    largest = gates.amax(dim=0)
    return Gating(gates, gates / torch.where(largest > 0, largest, 1.0), available, source)


def _disturb(
    quality: Tensor, available: Tensor | None, chance: Tensor, settings: Gate
) -> tuple[Tensor, Tensor]:
    """Row that each modality of each sample is taken from, and what remains present.

    At most one modality of a sample is disturbed, and never its only one.
    """
    modalities, batch, device = len(quality), chance.shape[1], chance.device
    if available is None:
        available = torch.ones((modalities, batch), dtype=torch.bool, device=device)
    rates = augmentation_rates(quality).unsqueeze(1)
    pick, event, step = chance
    position = torch.arange(modalities, device=device).unsqueeze(1)
    chosen = (position == (pick * modalities).long()) & (available.sum(dim=0) > 1)
    own = torch.arange(batch, device=device)
    other = (own + 1 + (step * (batch - 1)).long()) % max(batch, 1)
    swapped = chosen & (event < settings.swap * rates) & available & available[:, other]
    dropped = chosen & (event >= 1.0 - settings.dropout * rates)
    return torch.where(swapped, other, own), available & ~dropped


def _row_blocks(logits: Sequence[Tensor]) -> Iterator[slice]:
    """Rows that are worked on together."""
    head = logits[0]
    if torch.compiler.is_compiling() or head.device.type != "cpu":
        yield slice(None)  # a compiler and a GPU want whole tensors
        return
    step = max(1, _BLOCK // head.shape[1])
    for start in range(0, max(1, head.shape[0]), step):
        yield slice(start, start + step)


def _groups(logits: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Heads that are worked on together, ``[h, B, C]``."""
    small = len(logits) * logits[0].numel() <= _STACKED
    if small and not torch.compiler.is_compiling():
        yield torch.stack([x.to(dtype) for x in logits])
    else:
        for head in logits:
            yield head.to(dtype).unsqueeze(0)


def _statistics(
    logits: Sequence[Tensor], truth: _Indices | _Probabilities, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    fused: Tensor | None = None
    groups = []
    for group in _groups(logits, dtype):
        log_probs = group.log_softmax(dim=2)
        probs = log_probs.exp()
        nll = truth.nll(log_probs)
        loss = truth.loss(log_probs, nll)
        prediction = group.max(dim=2).indices  # faster than argmax
        # A class of probability 0 has log-probability -inf; 0 log 0 is 0.
        entropy = -log_probs.clamp_min_(torch.finfo(dtype).min).mul_(probs).sum(dim=2)
        distance = torch.zeros_like(nll)
        if fused is None:
            fused, others = probs[0], probs[1:]
        else:
            others = probs
        if len(others):
            apart = torch.linalg.vector_norm(others.sub_(fused), dim=2) / math.sqrt(2.0)
            distance[len(distance) - len(others) :] = apart
        groups.append((torch.stack([loss, nll, entropy, distance]), prediction))
    if len(groups) == 1:
        return groups[0]
    rows, predictions = zip(*groups, strict=True)
    return torch.cat(rows, dim=1), torch.cat(predictions)


def _gradients(
    coefs: Tensor,
    logits: Sequence[Tensor],
    truth: _Indices | _Probabilities,
    dtype: torch.dtype,
    guard: bool,
) -> list[Tensor]:
    grads: list[Tensor] = []
    coefs = truth.without_ignored(coefs)
    heads = 0
    for group in _groups(logits, dtype):
        columns = coefs[heads : heads + len(group)].unsqueeze(2)
        heads += len(group)
        grad = group.softmax(dim=2).mul_(truth.mass(columns))
        truth.subtract_from(grad, columns)
        if guard:
            grad.masked_fill_(columns == 0, 0.0)
        grads += grad.unbind()
    return grads


class _Indices:
    """Class indices ``[B]``: a one-hot truth, smoothed and weighted as cross-entropy does."""

    def __init__(self, criterion: Criterion, rows: slice, weight: Tensor | None) -> None:
        self.target = criterion.target[rows]
        self.ignore_index = criterion.ignore_index
        self.kept = self.target != criterion.ignore_index
        self.index = torch.where(self.kept, self.target, 0)
        self.weight = weight
        self.smoothing = criterion.label_smoothing
        self.on_target = 1.0 - criterion.label_smoothing

    def nll(self, log_probs: Tensor) -> Tensor:
        try:
            hit = log_probs.gather(2, self.index.expand(len(log_probs), -1).unsqueeze(2))
        except (RuntimeError, IndexError) as error:  # only then is a look at the values due
            raise IndexError(
                f"target: expected class indices in [0, {log_probs.shape[2]}) or "
                f"ignore_index={self.ignore_index}, got values from "
                f"{int(self.target.min())} to {int(self.target.max())}"
            ) from error
        return torch.where(self.kept, -hit.squeeze(2), 0.0)

    def loss(self, log_probs: Tensor, nll: Tensor) -> Tensor:
        loss = nll if self.weight is None else nll * self.weight[self.index]
        if self.smoothing:
            total = (
                log_probs.sum(dim=2)
                if self.weight is None
                else (log_probs * self.weight).sum(dim=2)
            )
            smooth = torch.where(self.kept, -total / log_probs.shape[2], 0.0)
            loss = self.on_target * loss + self.smoothing * smooth
        return loss

    def without_ignored(self, coefs: Tensor) -> Tensor:
        return torch.where(self.kept, coefs, 0.0)

    def mass(self, coefs: Tensor) -> Tensor:
        if self.weight is None:
            return coefs
        smooth = self.smoothing * self.weight.mean()
        return coefs * (self.on_target * self.weight[self.index] + smooth).unsqueeze(1)

    def subtract_from(self, grad: Tensor, coefs: Tensor) -> None:
        hit = coefs if self.weight is None else coefs * self.weight[self.index].unsqueeze(1)
        index = self.index.expand(len(grad), -1).unsqueeze(2)
        grad.scatter_add_(2, index, -self.on_target * hit)
        if self.smoothing:
            smooth = coefs if self.weight is None else coefs * self.weight
            grad.sub_(smooth, alpha=self.smoothing / grad.shape[2])


class _Probabilities:
    """Class probabilities ``[B, C]``, smoothed and weighted as cross-entropy does."""

    def __init__(
        self, criterion: Criterion, rows: slice, weight: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.target = criterion.target[rows].to(dtype)
        self.truth = self.target
        if criterion.label_smoothing:
            smooth = criterion.label_smoothing
            self.truth = (1.0 - smooth) * self.target + smooth / self.target.shape[1]
        if weight is not None:
            self.truth = self.truth * weight

    def nll(self, log_probs: Tensor) -> Tensor:
        return _expected_nll(self.target, log_probs)

    def loss(self, log_probs: Tensor, nll: Tensor) -> Tensor:
        return nll if self.truth is self.target else _expected_nll(self.truth, log_probs)

    def without_ignored(self, coefs: Tensor) -> Tensor:
        return coefs

    def mass(self, coefs: Tensor) -> Tensor:
        return coefs * self.truth.sum(dim=1, keepdim=True)

    def subtract_from(self, grad: Tensor, coefs: Tensor) -> None:
        grad.addcmul_(self.truth, coefs, value=-1.0)


def _truth(criterion: Criterion, rows: slice, dtype: torch.dtype) -> _Indices | _Probabilities:
    weight = None if criterion.weight is None else criterion.weight.to(dtype)
    if torch.is_floating_point(criterion.target):
        return _Probabilities(criterion, rows, weight, dtype)
    return _Indices(criterion, rows, weight)


def _expected_nll(truth: Tensor, log_probs: Tensor) -> Tensor:
    return -torch.where(truth > 0, truth * log_probs, 0.0).sum(dim=2)
