"""The kernels in plain PyTorch, for every device and dtype; what ``torch.compile`` fuses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dyncim_core.gates import (
    disagreement,
    evenness,
    log_prior,
    relative_gates,
    reliability_gates,
)
from dyncim_core.gates import novelty as mahalanobis_novelty
from dyncim_core.kernels.interface import (
    Buffers,
    Criterion,
    Curriculum,
    Gate,
    Gating,
    Kept,
    Learnt,
    Memory,
    Moments,
    Normaliser,
    Settings,
    Statistics,
)
from dyncim_core.modality import (
    augmentation_rates,
    expected_log_likelihood,
    generalisation,
    logit_slopes,
    logit_weights,
    loss_shares,
    modality_coefficients,
    pooled_skill,
    quality,
    redundancy,
    relative_logit_weights,
    skill,
    trust,
    witnesses,
)
from dyncim_core.signals import (
    contradiction,
    difficulty,
    doubt,
    held_out,
    log_weights,
    noise_pressure,
    prediction_consistency,
    prediction_deviation,
    prediction_stability,
    relative_change,
    sample_weights,
    seen_noise,
    share_to_learn,
    sureness,
    surprise,
    target_entropy,
    volatility_weights,
)

__all__ = [
    "combine",
    "curriculum",
    "disturbance_rates",
    "expect",
    "gate",
    "generalised",
    "gradients",
    "mix",
    "novelty",
    "observe",
    "recall",
    "shared_by",
    "statistics",
    "take_in",
    "take_up",
    "unmix",
    "weigh",
]

# Logits of all heads up to which the softmax is kept for the gradient, as cross-entropy
# keeps its own; from there on memory counts more than computing it again.
_KEPT = 2**22
# Logits that are worked on together on a CPU, so that temporaries stay in its cache.
_BLOCK = 2**19
# From here on, fewer passes pay for more operators.
_MANY_LOGITS = 2**15
# Over the last dimension, torch vectorises the largest of 32 or more only.
_VECTORISED = 32
_FEW_CLASSES = 16
# Squares of anything smaller are finite, and so are their averages.
_LARGEST_NORM = 1e18
# Sums of anything smaller over heads and samples are finite.
LARGEST_NLL = 1e30
_LOG2_E = math.log2(math.e)
# A covariance of K features takes so many samples for each of them.
_SAMPLES_PER_FEATURE = 8
# Variance over mean square that float32 can tell from none.
_SMALLEST_VARIANCE = 1e-10
_MOST_NOVEL = 1e30


def _accumulation_dtype(logits: Sequence[Tensor]) -> torch.dtype:
    """float64 when any head is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


@torch.no_grad()
def statistics(
    logits: Sequence[Tensor], present: Tensor | None, criterion: Criterion
) -> Statistics:
    """What each head says about each sample."""
    dtype = _accumulation_dtype(logits)
    blocks = list(_blocks(logits, criterion))
    heads, (batch, classes), width = len(logits), logits[0].shape, _width(logits)
    keep = _together(logits) and heads * batch * classes <= _KEPT
    copy = softmax = kept = None
    if keep:
        with torch.inference_mode(False):  # it becomes the gradient
            kept = logits[0].new_empty((heads, batch, width), dtype=dtype)
    if len(blocks) > 1 or width > classes:
        # Room for all blocks in turn: new memory costs more than the arithmetic on it.
        copy = logits[0].new_empty((heads, len(blocks[0][1][0]), width), dtype=dtype)
        softmax = torch.empty_like(copy) if kept is None else None
    found = []
    for at, parts, known in blocks:
        if len(blocks) > 1:
            copy, softmax = (None if x is None else x[:, : len(parts[0])] for x in (copy, softmax))
        if kept is not None:
            softmax = kept if len(blocks) == 1 else kept[:, at]
        found.append(_statistics(parts, _truth(known, dtype), dtype, copy, softmax))
    rows, prediction = found[0]
    if len(found) > 1:
        rows = torch.cat([part[0] for part in found], dim=2)
        prediction = torch.cat([part[1] for part in found], dim=1)
    if present is not None:
        rows = torch.where(present, rows, 0.0)
    return Statistics(rows, prediction, None if kept is None else [(kept,)])


@torch.no_grad()
def gradients(
    grad: Tensor,
    coefficient: Tensor | None,
    normaliser: Normaliser,
    logits: Sequence[Tensor],
    criterion: Criterion,
    guard: bool,
) -> list[Tensor]:
    """``coef * (mass * softmax - truth)`` for each head.

    ``normaliser`` holds the softmax, where it was kept: the gradient is made in its memory,
    and a second backward computes it again.
    """
    dtype = _accumulation_dtype(logits)
    coefs = grad if coefficient is None else grad * coefficient
    if isinstance(normaliser, list):
        try:
            (probs,) = normaliser.pop()
        except IndexError:
            again = statistics(logits, None, criterion).normaliser
            return gradients(grad, coefficient, again, logits, criterion, guard)
        probs = probs[..., : logits[0].shape[1]]
        parts = _gradient(probs, coefs, _truth(criterion, dtype), guard)
        # Of one memory, each with a version of its own, so that one can change alone.
        return [x.to(head.dtype).contiguous().data for x, head in zip(parts, logits, strict=True)]
    grads = []
    for head, coef in zip(logits, coefs.expand(len(logits), len(logits[0])), strict=True):
        found = torch.empty_like(head, dtype=dtype)
        for at, (part,), known in _blocks([head], criterion):
            x = found[at].copy_(part)
            _softmax(x, x.amax(dim=1, keepdim=True), x)
            _gradient(x, coef[at], _truth(known, dtype), guard)
        grads.append(found.to(head.dtype))
    return grads


def curriculum(
    logits: Sequence[Tensor],
    present: Tensor | None,
    criterion: Criterion,
    buffers: Buffers,
    memory: Memory | None,
    settings: Settings,
) -> Curriculum:
    """Weigh the samples by what the state knows; then take the batch into the state."""
    # Only the value meets autograd again, and small operators cost a fifth less without it.
    mode = torch.no_grad if torch.compiler.is_compiling() else torch.inference_mode
    with mode():
        found = statistics(logits, present, criterion)
        classes, shared, expected = logits[0].shape[1], shared_by(buffers), None
        if settings.held_out > 0.0:
            expected = expect(logits, present, criterion, buffers.logit_weight, shared)
        coefficient = weigh(
            found, present, criterion, classes, buffers, memory, settings, shared, expected
        )
        keep_weight(criterion, classes, buffers.class_weight)
    with torch.no_grad():
        value = combine(coefficient, found.rows[0], settings)
    return Curriculum(value, coefficient, found.normaliser)


@torch.no_grad()
def expect(
    logits: Sequence[Tensor],
    present: Tensor | None,
    criterion: Criterion,
    weight: Tensor,
    shared: Tensor,
) -> Tensor:
    """``expected_log_likelihood`` of all heads, ``[M + 1, B]``."""
    dtype, found = _accumulation_dtype(logits), []
    with torch.autocast(logits[0].device.type, enabled=False):  # or sums were in half precision
        for at, parts, _ in _blocks(logits, criterion):
            mask = None if present is None else present[:, at]
            every = torch.stack([x.to(dtype) for x in parts])
            found.append(expected_log_likelihood(every, weight, shared, mask))
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def shared_by(buffers: Buffers) -> Tensor:
    """What fused logits hold of gated ones in training, as ``GatedFusion`` adds them."""
    return 1.0 - buffers.quality[0]


def keep_weight(criterion: Criterion, num_classes: int, kept: Tensor) -> None:
    """Keep what classes weigh, or 0 where predictions do not follow how frequent they are.

    0 as well with more classes than are told apart, whose frequency nobody knows.
    """
    follows = not (criterion.label_smoothing or criterion.target.is_floating_point())
    known = follows and num_classes <= len(kept)
    kept.fill_(float(known))
    if known and criterion.weight is not None:
        kept[:num_classes].copy_(criterion.weight)


def combine(coefficient: Tensor, loss: Tensor, settings: Settings) -> Tensor:
    """The joint objective: losses ``[M + 1, B]`` by their factors, summed as ``reduction`` says."""
    if settings.skip_nonfinite or settings.held_out > 0.0:
        loss = loss.masked_fill(coefficient == 0, 0.0)
    joint = coefficient * loss
    return joint.sum(dim=0) if settings.reduction == "none" else joint.sum()


class _Roles(NamedTuple):
    """What part each sample of a batch plays, bool ``[B]``; of bools, ``a > b`` is a and not b."""

    counts: Tensor  # its target is not ignored
    finite: Tensor  # and so are its statistics
    held: Tensor | None  # not trained on, if it counts, so that heads can be asked about it
    trained: Tensor  # in the loss
    weighed: Tensor  # in the loss, and finite: what the state learns from


def _roles(
    found: Statistics, criterion: Criterion, memory: Memory | None, settings: Settings
) -> _Roles:
    target = criterion.target
    if target.is_floating_point():
        counts = torch.ones_like(target[:, 0], dtype=torch.bool)
    else:
        counts = target != criterion.ignore_index
    largest = found.rows[1:3].amax(dim=(0, 1))  # or NaN; a sum could overflow
    finite = counts & (largest - largest == 0)  # in fewer operators than isfinite
    if memory is None or settings.held_out == 0.0:
        return _Roles(counts, finite, None, counts, finite)
    held = held_out(memory.rows, settings.held_out)
    return _Roles(counts, finite, held, counts > held, finite > held)


@torch.no_grad()
def weigh(
    found: Statistics,
    present: Tensor | None,
    criterion: Criterion,
    num_classes: int,
    buffers: Buffers,
    memory: Memory | None,
    settings: Settings,
    shared: Tensor,
    expected: Tensor | None = None,
) -> Tensor:
    """Factor of every head's loss in the joint objective, ``[M + 1, B]``; updates the buffers.

    ``expected`` log-likelihoods of all heads are for samples held out; ``shared`` is what the fused
    logits hold of gated ones.
    """
    target = criterion.target
    counts, finite, held, trained, weighed = _roles(found, criterion, memory, settings)
    number, count = trained.sum(), weighed.sum()
    # A sample left out is 0 in all that follows, whatever it holds.
    nll, entropy, distance = torch.where(finite, found.rows[1:], 0.0)
    nll = lost = nll.clamp_max(LARGEST_NLL)
    heads = len(nll)
    slopes = None if expected is None else logit_slopes(nll, expected, shared, present)
    usual = -buffers.log_quality[:heads]
    if target.is_floating_point():
        target = torch.where(finite.unsqueeze(1), target, 0.0).to(nll.dtype)
        own = target_entropy(target)
        some = torch.where(count > 0, weighed, finite)
        mean = torch.where(some, own, 0.0).sum() / some.sum().clamp_min(1)
        share = share_to_learn(mean, num_classes)
        nll, entropy = (nll - own).clamp_min(0.0), entropy - own
        lost, usual = (nll / share).clamp_max(LARGEST_NLL), usual * share.to(usual.dtype)
    if memory is not None:
        if torch.compiler.is_compiling():  # where a negative index counts from the end
            rows = torch.where(memory.rows < 0, len(memory.nll), memory.rows)
            memory = Memory(rows, memory.nll, memory.visits, memory.weight)
        recalled, visits = recall(memory)

    signals = torch.stack(
        [
            prediction_deviation(nll, present),
            prediction_consistency(distance, present),
            prediction_stability(entropy, num_classes),
        ]
    )
    shown = trust(buffers.skill[:heads])
    usual = torch.where(buffers.seen[:heads] > 0, usual, torch.inf)
    if settings.label_noise is None:
        pressure = noise_pressure(buffers.label_noise, shown[0])
    else:
        pressure = noise_pressure(torch.full_like(buffers.label_noise, settings.label_noise))
    log_weight = log_weights(
        surprise(nll, entropy, present, shown.square(), usual),
        difficulty(signals, volatility_weights(buffers.volatility)),
        surprise_strength=settings.surprise_strength * pressure,
        pacing_strength=settings.pacing_strength * shared,
        valid=weighed,
    )
    # Of class probabilities, the likeliest.
    classes = target.argmax(dim=1) if target.is_floating_point() else target
    group, average = classes % len(buffers.log_class_average), buffers.log_class_average
    weights, moved = sample_weights(log_weight, group, average, settings.decay, weighed)
    average.copy_(moved)

    asked = present
    if held is not None:  # else nobody has shown any skill, or the answer is not taken
        asked = witnesses(buffers.skill).unsqueeze(1)
        asked = asked.expand_as(nll) if present is None else asked & present
    own_doubt = doubt(found.prediction, nll, entropy, target)
    sure = sureness(entropy, num_classes)
    by_all = contradiction(found.prediction, own_doubt, sure, asked)
    doubted = by_all if held is None else own_doubt[0]  # of samples trained on
    remembered = finite.expand_as(nll) if present is None else finite & present
    counted = remembered
    if held is not None:
        counted = weighed.expand_as(nll) if present is None else weighed & present
        heard = remembered & held
        right = found.prediction == classes
        chance = frequency(found.prediction, num_classes, buffers)
        believed = log_weight.exp()  # of those held out, for their surprise alone
        assert slopes is not None  # noqa: S101
        said = right, chance, lost, slopes, by_all, own_doubt
    buffers.class_seen.index_add_(0, group, weighed.to(buffers.class_seen.dtype))
    if len(nll) < len(buffers.seen):  # a step without unimodal predictions
        absent = lost.new_zeros(len(buffers.seen) - len(lost), lost.shape[1])
        lost, counted = torch.cat([lost, absent]), torch.cat([counted, absent.bool()])
        remembered = counted
    each = weighed.to(signals.dtype)
    take_in(
        lost,
        (signals * each).sum(dim=1),
        (doubted * each).sum(),
        torch.where(counted, weights, 0.0),
        count,
        num_classes,
        buffers,
        settings.decay,
        held is not None,
    )
    if held is not None and len(held):
        assert memory is not None  # noqa: S101
        samples = settings.held_out * len(memory.nll)
        listen(heard, said, believed, samples, buffers, settings.decay)
    buffers.nonfinite.add_((counts ^ finite).sum())
    if memory is not None:
        remember(memory, recalled, visits, lost, remembered, settings.memory_decay)
        memory.weight.index_copy_(0, memory.rows, weights.to(memory.weight.dtype))

    modalities = found.rows.shape[1] - 1
    if settings.skip_nonfinite:
        trained, number = weighed, count
        weights = torch.where(trained, weights, 0.0)
    elif held is not None:
        weights = torch.where(held, 0.0, weights)
    if settings.reduction == "mean":
        mass = number
        if criterion.weight is not None and not target.is_floating_point():
            # the mean of cross-entropy is over class weights
            of_sample = criterion.weight.to(weights.dtype)[torch.where(trained, target, 0)]
            mass = torch.where(trained, of_sample, 0.0).sum()
        if settings.skip_nonfinite or held is not None:  # of a batch left out as a whole, 0
            if mass is number:
                mass = torch.maximum(number, counts.any())
            else:
                mass = torch.where(mass != 0, mass, (counts ^ trained).sum())
        weights = weights / mass
    if modalities:
        ahead = modality_coefficients(buffers.log_quality) * loss_shares(buffers.skill)
        ahead = ahead * generalised(buffers, num_classes)[1:]
        if settings.unimodal_strength != 1.0:
            ahead = ahead * settings.unimodal_strength
        coefficient = torch.outer(F.pad(ahead, (1, 0), value=1.0), weights)
    else:
        coefficient = weights.unsqueeze(0)
    return coefficient if present is None else torch.where(present, coefficient, 0.0)


def generalised(buffers: Buffers, num_classes: int) -> Tensor:
    """How far what each head learns holds for samples held out, ``[M + 1]``; 1 without any.

    Whose NLL counts as far as their label is believed, so that wrong ones do not look like samples
    that heads have learnt by heart.
    """
    mass, nll = buffers.held_out_averages[0], buffers.held_out_averages[3]
    held_out_quality = quality(-nll / mass, num_classes)
    return torch.where(mass > 0.0, generalisation(held_out_quality, buffers.quality), 1.0)


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


def remember(
    memory: Memory, recalled: Tensor, visits: Tensor, nll: Tensor, counted: Tensor, decay: float
) -> None:
    """Average the NLL, ``[M + 1, B]``, of what counts into the memory of the batch's samples."""
    current = nll.t().to(recalled.dtype)
    number = visits.to(recalled.dtype) + 1.0
    rate = number.reciprocal().clamp_min(1.0 - decay)  # at first, the mean of all visits
    averaged = recalled.lerp(current, rate)
    memory.nll.index_copy_(0, memory.rows, torch.where(counted.t(), averaged, recalled))
    memory.visits.index_copy_(0, memory.rows, visits + counted.t())


def frequency(prediction: Tensor, num_classes: int, buffers: Buffers) -> Tensor:
    """How frequent the predicted classes are among all samples trained on, each once more."""
    kind, groups = buffers.skill.dtype, min(num_classes, len(buffers.class_seen))
    if groups < num_classes:
        prediction = prediction % groups
    smoothed = buffers.class_seen[:groups] + 1
    return smoothed[prediction].to(kind) / smoothed.sum().to(kind)


def listen(
    heard: Tensor,
    said: Sequence[Tensor],
    believed: Tensor,
    samples: float,
    buffers: Buffers,
    decay: float,
) -> None:
    """Take in what heads say about samples that they were never trained on.

    ``heard``, ``[M + 1, B]``, tells which of them a head sees; ``said``, each ``[M + 1, B]`` or
    ``[B]``, whether it is right and how often it would be by chance, its NLL and the slope of the
    pool's, which count as far as the label is ``believed``, ``[B]``, and how far the label
    is contradicted, by all heads and by each; ``samples``, how many there are in all.
    """
    kind = buffers.skill.dtype
    rows = torch.stack([heard, *(x.expand_as(heard) for x in said)])
    rows[3:5].mul_(believed)
    shares = torch.where(heard, rows, 0.0).mean(dim=2, dtype=kind)
    some = shares[0].sign()  # 0 where nothing is heard, of a modality or at all
    rate = some * (1.0 - decay)
    averages = buffers.held_out_averages.lerp_(shares, rate)
    mass = averages[0]
    means = averages[1:] / mass.clamp_min(torch.finfo(kind).tiny)
    hit_rate, chance, _, slope, by_all, own = means.unbind()
    # A modality never heard counts as equal to the fusion, which favours neither side.
    ever, known = mass > 0.0, skill(hit_rate, chance)
    known = pooled_skill(torch.where(ever, known, known[0]), samples)
    buffers.skill.lerp_(known, some[0])
    weight = buffers.logit_weight
    moved = weight.lerp(logit_weights(weight, buffers.skill, slope, samples), rate)
    torch.where(ever, moved, moved[0], out=weight)
    noise = seen_noise(by_all[0], buffers.doubted, own[0], known)
    buffers.label_noise.lerp_(noise, some[0])


def take_in(
    nll: Tensor,
    signals: Tensor,
    doubted: Tensor,
    weights: Tensor,
    count: Tensor,
    num_classes: int,
    buffers: Buffers,
    decay: float,
    holds_out: bool,
) -> None:
    """Take a batch into the running averages; what does not count is 0 in all of it.

    ``signals``, ``[3]``, and ``doubted`` are sums over the samples: how far all heads contradict
    the labels, or, where samples are held out, of whom that is asked, the fused one. An average
    starts at its first value, and stays where a batch has nothing to say. Qualities are averaged
    with the sample weights, so that labels in doubt do not make a good modality look bad.
    """
    kind, seen = buffers.log_quality.dtype, buffers.seen
    some = count.clamp_min(1)
    mass = weights.sum(dim=1)
    has_mass, first = mass > 0, seen == 0
    rate = (has_mass.to(kind) * (1.0 - decay)).masked_fill_(first & has_mass, 1.0)
    start = rate[0]
    steps = start.clamp_max(1.0 - decay)

    signal = (signals / some).to(kind)
    # The first batch has nothing to have moved from, the second nothing to average with.
    change = torch.where(first[0], 0.0, relative_change(signal, buffers.signal_mean))
    buffers.volatility.lerp_(change, torch.where(seen[0] == 1, start > 0, steps))
    buffers.signal_mean.lerp_(signal, start)
    fused = weights[0]
    tiny = torch.finfo(mass.dtype).tiny
    share = mass[0].square() / (some * fused.dot(fused)).clamp_min(tiny)
    buffers.effective_share.lerp_(share.to(kind), start)
    mean_doubt = (doubted / some).to(kind)
    if holds_out:
        buffers.doubted.lerp_(mean_doubt, start)
    else:
        # Starts at 0, not at its first value: the doubt of an untrained model is worth nothing.
        # Once any sample was held out, those trained on, known by heart, are not asked for it.
        heard = buffers.held_out_averages[0, 0] > 0.0
        buffers.label_noise.lerp_(mean_doubt, torch.where(heard, 0.0, steps))

    mean_nll = (weights * nll).sum(dim=1) / mass.clamp_min(tiny)
    # A batch moves it as far as it is weighed, or labels in doubt would count in small ones.
    weighed = (mass / (weights > 0).sum(dim=1).clamp_min(1)).clamp_max(1.0).to(kind)
    moves = torch.where(first, rate, rate * weighed)
    log_quality = buffers.log_quality.lerp(-mean_nll.to(kind), moves)
    seen.add_(has_mass)
    # A modality never seen counts as equal to the fusion, which favours neither side.
    buffers.log_quality.copy_(torch.where(seen > 0, log_quality, log_quality[0]))
    known = quality(buffers.log_quality, num_classes)
    buffers.quality.copy_(torch.where(seen[0] > 0, known, 0.0))
    buffers.step.add_(1)


@torch.no_grad()
def gate(
    logits: Sequence[Tensor],
    kept: Kept,
    learnt: Learnt | None,
    available: Tensor | None,
    chance: Tensor | None,
    penalty: Tensor | None,
    settings: Gate,
) -> Gating:
    """Gates of the modalities from their logits."""
    take_up(learnt, kept)
    skill, prior = kept.skill, kept.log_prior
    source = None
    if chance is not None:
        rates = disturbance_rates(learnt, skill).unsqueeze(1)
        source, available = _disturb(chance, rates, available, settings)
        if settings.swap:
            logits = [x[rows] for x, rows in zip(logits, source, strict=True)]
        else:
            source = None
    if len(logits) > 2:
        evident = torch.stack([x.float() for x in logits])
        if prior is not None:
            evident = evident - prior[: evident.shape[2]]
        conflict = disagreement(evident.softmax(dim=-1), skill, available)
    else:  # nobody is outvoted
        conflict = skill.new_zeros((len(logits), logits[0].shape[0]))
    evidence = -settings.disagreement_slope * conflict
    uncut = reliability_gates(evidence, available, settings.threshold) > 0
    if penalty is not None:
        evidence = evidence - penalty
    gates = reliability_gates(evidence, uncut)
    return Gating(gates, relative_gates(gates), source)


def take_up(learnt: Learnt | None, kept: Kept) -> None:
    """Keep what the state knows now, if there is one; called under ``no_grad``.

    Once more in here, and torch could not load an exported program again.
    """
    if learnt is None:
        return
    kept.skill.copy_(learnt.skill[1:])
    kept.logit_factor.copy_(relative_logit_weights(learnt.logit_weight))
    if kept.log_prior is not None:
        kept.log_prior.copy_(log_prior(_class_mass(learnt)))


def disturbance_rates(learnt: Learnt | None, skill: Tensor) -> Tensor:
    """How often a modality is hit if picked, ``[M]``, as a share of swap and dropout."""
    rates = augmentation_rates(skill)
    if learnt is None:
        return rates
    share = redundancy(learnt.log_quality, learnt.quality[0], learnt.skill)
    return share * evenness(_class_mass(learnt)) * rates


def _class_mass(learnt: Learnt) -> Tensor:
    return learnt.class_seen * learnt.class_weight


def _disturb(
    chance: Tensor, rates: Tensor, available: Tensor | None, settings: Gate
) -> tuple[Tensor, Tensor]:
    """Row that each modality of each sample is taken from, and what remains present.

    At most one modality of a sample is disturbed, and never its only one.
    """
    modalities, batch, device = len(rates), chance.shape[1], chance.device
    if available is None:
        available = torch.ones((modalities, batch), dtype=torch.bool, device=device)
    pick, event, step = chance
    position = torch.arange(modalities, device=device).unsqueeze(1)
    chosen = (position == (pick * modalities).long()) & (available.sum(dim=0) > 1)
    own = torch.arange(batch, device=device)
    other = (own + 1 + (step * (batch - 1)).long()) % max(batch, 1)
    swapped = chosen & (event < settings.swap * rates) & available & available[:, other]
    dropped = chosen & (event >= 1.0 - settings.dropout * rates)
    return torch.where(swapped, other, own), available & ~dropped


def _together(logits: Sequence[Tensor]) -> bool:
    """Whether to work on all heads in one call, rather than leave that to a compiler."""
    if torch.compiler.is_compiling():
        return False
    return logits[0].device.type == "cpu" or len(logits) * logits[0].numel() <= _KEPT


def _width(logits: Sequence[Tensor]) -> int:
    """Number of classes, or what to fill them up to."""
    classes = logits[0].shape[1]
    if torch.compiler.is_compiling() or logits[0].device.type != "cpu":
        return classes
    many = len(logits) * logits[0].numel() >= _MANY_LOGITS
    return _VECTORISED if many and _FEW_CLASSES < classes < _VECTORISED else classes


def _blocks(
    logits: Sequence[Tensor], criterion: Criterion
) -> Iterator[tuple[slice, Sequence[Tensor], Criterion]]:
    """Rows that are worked on together."""
    batch, classes = logits[0].shape
    # a compiler and a GPU want whole tensors
    if torch.compiler.is_compiling() or logits[0].device.type != "cpu":
        step = batch
    else:
        step = max(1, _BLOCK // (len(logits) * classes))
    if step >= batch:
        yield slice(None), logits, criterion
        return
    for start in range(0, batch, step):
        at = slice(start, start + step)
        yield at, [x[at] for x in logits], criterion._replace(target=criterion.target[at])


def _statistics(
    logits: Sequence[Tensor],
    truth: _Indices | _Probabilities,
    dtype: torch.dtype,
    copy: Tensor | None,
    softmax: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Rows and predictions; with room for a copy and the softmax, if any."""
    if _together(logits):
        heads, classes = [x.to(dtype) for x in logits], logits[0].shape[1]
        if copy is None:
            copy = torch.stack(heads)
        else:
            torch.stack(heads, out=copy[..., :classes])
            copy[..., classes:] = -math.inf
        return _group_statistics(copy, classes, truth, None, softmax)[:2]
    fused: Tensor | None = None
    rows, predictions = [], []
    for head in logits:
        group = head.to(dtype, copy=True).unsqueeze(0)
        found, prediction, probs = _group_statistics(group, group.shape[2], truth, fused, None)
        rows.append(found)
        predictions.append(prediction)
        fused = probs if fused is None else fused
    return torch.cat(rows, dim=1), torch.cat(predictions)


def _group_statistics(
    group: Tensor,
    classes: int,
    truth: _Indices | _Probabilities,
    fused: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, predictions and the softmax, ``[h, B, C]``; overwrites the group."""
    top, prediction = _largest(group, classes, out)
    shifted, total, probs = _softmax(group, top, out)
    log_total = total.squeeze(2).log()
    own = shifted if classes == group.shape[2] else shifted[..., :classes]
    nll = truth.nll(own, log_total)
    loss = truth.loss(own, log_total, nll)
    # A class of probability 0 is shifted by -inf; 0 log 0 is 0. A row of NaN stays one.
    if torch.compiler.is_compiling():  # where nansum is slow
        shifted = shifted.clamp_min(torch.finfo(shifted.dtype).min)
        entropy = log_total - (shifted * probs).sum(dim=2)
    else:
        entropy = log_total - shifted.mul_(probs).nansum(dim=2)
    apart = torch.sub(probs, probs[:1] if fused is None else fused, out=shifted)
    distance = torch.linalg.vector_norm(apart, dim=2) / math.sqrt(2.0)
    return torch.stack([loss, nll, entropy, distance]), prediction, probs


def _many(logits: Tensor) -> bool:
    """Whether fewer passes over them on a CPU pay for more operators."""
    if torch.compiler.is_compiling() or logits.device.type != "cpu":
        return False
    return logits.numel() >= _MANY_LOGITS


def _largest(logits: Tensor, classes: int, work: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest logit of each row, with its dimension, and its first place."""
    width = logits.shape[2]
    if width < _VECTORISED or not _many(logits):
        top, place = logits.max(dim=2, keepdim=True)
        return top, place.squeeze(2)
    # Both in one call are not vectorised. Of a row of NaN the place is the last.
    top = logits.amax(dim=2, keepdim=True)
    last = classes - 1
    from_end = torch.arange(last, last - width, -1, dtype=logits.dtype)
    hits = torch.eq(logits, top, out=torch.empty_like(logits) if work is None else work)
    return top, (last - hits.mul_(from_end).amax(dim=2)).long()


def _softmax(
    logits: Tensor, top: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits less the largest of their row, in place; the sum of their exponentials; softmax."""
    shifted = logits.sub_(top)
    # Not torch's softmax, slow over few classes, nor over many logits its exp, slow on some CPUs.
    if _many(logits):
        probs = torch.mul(shifted, _LOG2_E, out=out).exp2_()
    else:
        probs = torch.exp(shifted, out=out)
    total = probs.sum(dim=-1, keepdim=True)
    return shifted, total, probs.mul_(total.reciprocal())


def _gradient(
    probs: Tensor, coefs: Tensor, truth: _Indices | _Probabilities, guard: bool
) -> Tensor:
    """The gradient, in place of the softmax."""
    columns = truth.without_ignored(coefs).unsqueeze(-1)
    grad = probs.mul_(truth.mass(columns))
    truth.subtract_from(grad, columns)
    if guard:
        grad.masked_fill_(columns == 0, 0.0)
    return grad


class _Indices:
    """Class indices ``[B]``: a one-hot truth, smoothed and weighted as cross-entropy does."""

    def __init__(self, criterion: Criterion, weight: Tensor | None) -> None:
        self.target = criterion.target
        self.ignore_index = criterion.ignore_index
        self.kept = self.target != criterion.ignore_index
        self.index = torch.where(self.kept, self.target, 0)
        self.weight = weight
        self.smoothing = criterion.label_smoothing
        self.on_target = 1.0 - criterion.label_smoothing

    def nll(self, shifted: Tensor, log_total: Tensor) -> Tensor:
        try:
            hit = shifted.gather(2, self.index.expand(len(shifted), -1).unsqueeze(2))
        except (RuntimeError, IndexError) as error:  # only then is a look at the values due
            raise IndexError(
                f"target: expected class indices in [0, {shifted.shape[2]}) or "
                f"ignore_index={self.ignore_index}, got values from "
                f"{int(self.target.min())} to {int(self.target.max())}"
            ) from error
        return torch.where(self.kept, log_total - hit.squeeze(2), 0.0)

    def loss(self, shifted: Tensor, log_total: Tensor, nll: Tensor) -> Tensor:
        loss = nll if self.weight is None else nll * self.weight[self.index]
        if self.smoothing:
            log_probs = shifted - log_total.unsqueeze(2)
            if self.weight is not None:
                log_probs *= self.weight
            smooth = torch.where(self.kept, -log_probs.mean(dim=2), 0.0)
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
        index = self.index.unsqueeze(1).expand(hit.shape)
        grad.scatter_add_(-1, index, -self.on_target * hit)
        if self.smoothing:
            smooth = coefs if self.weight is None else coefs * self.weight
            grad.sub_(smooth, alpha=self.smoothing / grad.shape[-1])


class _Probabilities:
    """Class probabilities ``[B, C]``, smoothed and weighted as cross-entropy does."""

    def __init__(self, criterion: Criterion, weight: Tensor | None, dtype: torch.dtype) -> None:
        self.target = criterion.target.to(dtype)
        self.truth = self.target
        if criterion.label_smoothing:
            smooth = criterion.label_smoothing
            self.truth = (1.0 - smooth) * self.target + smooth / self.target.shape[1]
        if weight is not None:
            self.truth = self.truth * weight

    def nll(self, shifted: Tensor, log_total: Tensor) -> Tensor:
        return _expected_nll(self.target, shifted - log_total.unsqueeze(2))

    def loss(self, shifted: Tensor, log_total: Tensor, nll: Tensor) -> Tensor:
        if self.truth is self.target:
            return nll
        return _expected_nll(self.truth, shifted - log_total.unsqueeze(2))

    def without_ignored(self, coefs: Tensor) -> Tensor:
        return coefs

    def mass(self, coefs: Tensor) -> Tensor:
        return coefs * self.truth.sum(dim=1, keepdim=True)

    def subtract_from(self, grad: Tensor, coefs: Tensor) -> None:
        grad.addcmul_(self.truth, coefs, value=-1.0)


def _truth(criterion: Criterion, dtype: torch.dtype) -> _Indices | _Probabilities:
    weight = None if criterion.weight is None else criterion.weight.to(dtype)
    if torch.is_floating_point(criterion.target):
        return _Probabilities(criterion, weight, dtype)
    return _Indices(criterion, weight)


def _expected_nll(truth: Tensor, log_probs: Tensor) -> Tensor:
    return -torch.where(truth != 0, truth * log_probs, 0.0).sum(dim=2)


def mix(
    streams: Sequence[Tensor],
    logits: Sequence[Tensor],
    scale: Tensor,
    logit_factor: Tensor,
    log_prior: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Streams, scaled and next to each other; logits less the prior, scaled and added up."""
    fused = torch.cat(_scaled(streams, scale), dim=-1)
    if not logits:
        return fused, None
    scale = scale * logit_factor.unsqueeze(1)
    total = reduce(torch.add, _scaled([x.float() for x in logits], scale))
    if log_prior is None:
        return fused, total
    whole = scale.sum(dim=0).unsqueeze(1)
    return fused, torch.addcmul(total, whole, log_prior[: total.shape[1]], value=-1.0)


def unmix(grad: Tensor, widths: Sequence[int], scale: Tensor) -> list[Tensor]:
    """Gradients of the streams from that of what ``mix`` made of them."""
    return _scaled(grad.split_with_sizes(list(widths), dim=-1), scale)


def _scaled(streams: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    """Each modality's ``[B, ...]`` times its factor ``[M, B]``; for a factor of 0 exactly 0."""
    scale = scale.view(*scale.shape, *(1,) * (streams[0].dim() - 1))
    return [
        torch.where(there, x, 0.0) * factor.to(x.dtype)
        for x, factor, there in zip(streams, scale, scale != 0, strict=True)
    ]


def observe(
    features: Sequence[Tensor],
    steps: Sequence[int],
    available: Tensor | None,
    moments: Moments,
    window: float,
) -> None:
    """Take features into their running moments.

    Samples that lack the modality, or whose features are not finite, do not count.
    """
    width = moments.total.shape[1]
    features = [x[:, ::step] for x, step in zip(features, steps, strict=True)]
    x = torch.stack([F.pad(x, (0, width - x.shape[1])) for x in features])
    counts = torch.linalg.vector_norm(x, dim=-1) < _LARGEST_NORM
    if available is not None:
        counts &= available
    x = torch.where(counts.unsqueeze(-1), x, 0.0)
    counted = counts.to(x.dtype)
    number = counted.sum(dim=1)
    rate, some = number / (number + window), number.clamp_min(1.0).unsqueeze(1)
    moments.mass.add_((1.0 - moments.mass) * rate)
    rate = rate.unsqueeze(1)
    moments.total.lerp_(x.sum(dim=1) / some, rate)
    x = torch.addcmul(x, counted.unsqueeze(-1), moments.mean().unsqueeze(1), value=-1.0)
    x = x * (rate / some).sqrt().unsqueeze(2)
    # In place, which autocast leaves in float32.
    moments.scatter.mul_(1.0 - rate.unsqueeze(2)).baddbmm_(x.mT, x)


def novelty(
    features: Sequence[Tensor], steps: Sequence[int], moments: Moments, window: float
) -> Tensor:
    """How far features lie from those seen in training, see ``gates.novelty``.

    Called under ``no_grad``, which is not repeated here, as in ``take_up``.
    """
    means, covariances = moments.mean(), moments.covariance()
    watched = [x[..., ::step] for x, step in zip(features, steps, strict=True)]
    together = 1
    if len({x.shape[1] for x in watched}) == 1:  # as one, in a fraction of the operators
        together = len(watched)
    rows = []
    for m in range(0, len(watched), together):
        at, k = slice(m, m + together), watched[m].shape[1]
        mean, covariance = means[at, :k], covariances[at, :k, :k]
        variance = covariance.diagonal(dim1=1, dim2=2).mean(dim=1)
        enough = moments.mass[at] * window > _SAMPLES_PER_FEATURE * k
        smallest = _SMALLEST_VARIANCE * mean.square().mean(dim=1)
        known = enough & (variance > smallest + torch.finfo(torch.float32).tiny)
        found = mahalanobis_novelty(torch.stack(watched[at]), mean, covariance)
        found = found.nan_to_num(_MOST_NOVEL).clamp_max(_MOST_NOVEL)
        rows.append(torch.where(known.unsqueeze(1), found, 1.0))
    return rows[0] if len(rows) == 1 else torch.cat(rows)
