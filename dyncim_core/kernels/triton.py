"""The kernels in Triton, for class indices and logits of up to 32 bits on a GPU.

Four launches a step, one of which only fills in zeros: ``_statistics`` reads the logits of
all heads once, whatever C is, ``_curriculum`` weighs the batch and updates the state, after
``_expect``, a fifth, has read the logits of the samples held out, where there are any;
``_gradients`` reads the logits again and writes the gradients. Nothing is read on the host,
so that nothing out of range is an error here: such a target makes its loss NaN, unless it is
held out, such an index is passed over.

eager.py holds the same formulas in PyTorch, reference.py in NumPy; tests compare all three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import log
from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from dyncim_core._units import own_share, per_log_classes
from dyncim_core.kernels.eager import (
    LARGEST_NLL,
    disturbance_rates,
    mix,
    novelty,
    observe,
    take_up,
    unmix,
)
from dyncim_core.kernels.interface import (
    HEARD,
    Buffers,
    Criterion,
    Curriculum,
    Gate,
    Gating,
    Kept,
    Learnt,
    Memory,
    Normaliser,
    Settings,
    Statistics,
    with_memory,
)
from dyncim_core.modality import (
    LEAST,
    LEAST_LOG_PROBABILITY,
    LEAST_LOSS,
    LEAST_QUALITY,
    MOST,
    PRIOR_OF_SKILL,
    PRIOR_OF_WEIGHT,
    SMALLEST_ERROR,
    SMALLEST_SKILL,
)
from dyncim_core.signals import (
    COMMON_ERROR,
    FULL_NOISE,
    LARGEST_LOG_WEIGHT,
    MIX,
    OF_ONE,
    SPREAD_FLOOR,
)

__all__ = [
    "curriculum",
    "gate",
    "gradients",
    "mix",
    "novelty",
    "observe",
    "statistics",
    "unmix",
]

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):  # the first to take tuples
    raise ImportError(f"expected triton >= 3.3, got {triton.__version__}")

_THREADS = 128  # of a program, at least
_MOST_LANES = 512  # threads that share a row
_UNROLLED = 8  # logits of a head that a thread has in hand
_TILE = 1024  # logits of a head whose gradient a program writes
_PLANE = 2048  # heads times samples that the curriculum has in hand
_OPTIONS = {"enable_fp_fusion": True}  # the default differs between versions

# A batch of another size compiles anew only where it changes the tile, which is a power of two.
_jit: Callable[[Callable[..., Any]], Any] = triton.jit(do_not_specialize=["batch"])


def statistics(
    logits: Sequence[Tensor], present: Tensor | None, criterion: Criterion
) -> Statistics:
    """What each head says about each sample."""
    logits, strides = _addressable(logits)
    (batch, classes), like = logits[0].shape, logits[0]
    shape = (len(logits), batch)
    found = Statistics(
        like.new_empty((4, *shape), dtype=torch.float32),
        like.new_empty(shape, dtype=torch.int64),
        like.new_empty((2, *shape), dtype=torch.float32),
    )
    tile = _tile(batch, classes)
    with torch.cuda.device(like.get_device()):
        _statistics[(triton.cdiv(batch, tile["group"]),)](
            logits,
            strides,
            None if present is None else present.contiguous(),
            _contiguous(criterion),
            found,
            batch,
            classes,
            smooth=bool(criterion.label_smoothing > 0),
            unrolled=max(1, min(_UNROLLED, 32 // len(logits))),
            **tile,
        )
    return found


def curriculum(
    logits: Sequence[Tensor],
    present: Tensor | None,
    criterion: Criterion,
    buffers: Buffers,
    memory: Memory | None,
    settings: Settings,
) -> Curriculum:
    """Weigh the samples by what the state knows; then take the batch into the state."""
    _check_kept(buffers, memory, len(buffers.seen), len(logits))
    found = statistics(logits, present, criterion)
    batch, classes = logits[0].shape
    joint = Curriculum(
        found.rows.new_empty(batch if settings.reduction == "none" else ()),
        found.rows.new_empty((len(logits), batch)),
        found.normaliser,
    )
    groups = len(buffers.log_class_average)
    heads = triton.next_power_of_2(len(buffers.seen))
    present = None if present is None else present.contiguous()
    criterion = _contiguous(criterion)
    if memory is not None:
        memory = memory._replace(rows=memory.rows.contiguous())
    below = round(settings.held_out * 2**32) if settings.held_out > 0.0 else None
    samples = 0.0 if memory is None else settings.held_out * len(memory.nll)
    expected = None
    with torch.cuda.device(found.rows.get_device()):
        if below is not None and memory is not None:
            expected = torch.empty_like(joint.coefficient)
            logits, strides = _addressable(logits)
            tile = _tile(batch, classes)
            _expect[(triton.cdiv(batch, tile["group"]),)](
                logits,
                strides,
                present,
                criterion,
                found.rows[1],
                memory.rows,
                below,
                buffers.logit_weight,
                buffers.quality,
                expected,
                batch,
                classes,
                **tile,
            )
        _curriculum[(1,)](
            found,
            expected,
            present,
            criterion,
            buffers,
            memory,
            0 if memory is None else len(memory.nll),
            joint,
            batch,
            classes,
            per_log_classes(classes),
            (settings.surprise_strength, settings.pacing_strength, settings.unimodal_strength),
            settings.label_noise,
            (settings.decay, settings.memory_decay, log(max(settings.decay, 1e-30))),
            buffers.class_seen.new_zeros((2, groups)),
            below,
            tuple(own_share(samples, prior) for prior in (PRIOR_OF_SKILL, PRIOR_OF_WEIGHT)),
            skip=settings.skip_nonfinite,
            reduction=settings.reduction,
            count=len(logits),
            known=len(buffers.seen),
            heads=heads,
            samples=_PLANE // heads,
            groups=groups,
            num_warps=8,
            **_OPTIONS,
        )
    return joint


def gradients(
    grad: Tensor,
    coefficient: Tensor | None,
    normaliser: Normaliser,
    logits: Sequence[Tensor],
    criterion: Criterion,
    guard: bool,
) -> list[Tensor]:
    """``d/d logits`` of ``sum(grad * coefficient * loss)``."""
    grad = grad.resolve_neg()
    logits, strides = _addressable(logits)
    batch, classes = logits[0].shape
    grads = tuple(x.new_empty((batch, classes)) for x in logits)
    block = min(triton.next_power_of_2(classes), _TILE)
    group = _TILE // block
    with torch.cuda.device(grad.get_device()):
        _gradients[(triton.cdiv(batch, group) * triton.cdiv(classes, block),)](
            logits,
            strides,
            grads,
            grad,
            # A scalar, [B] or [M + 1, B]: strides of 0 over what it lacks.
            ((0,) * (2 - grad.dim()) + grad.stride())[-2:],
            None if coefficient is None else coefficient.contiguous(),
            normaliser,
            _contiguous(criterion),
            batch,
            classes,
            smooth=bool(criterion.label_smoothing > 0),
            guard=guard,
            group=group,
            block=block,
            num_warps=_THREADS // 32,
            **_OPTIONS,
        )
    return list(grads)


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
    logits, strides = _addressable(logits)
    batch, classes = logits[0].shape
    take_up(learnt, kept)
    shape, like, skill = (len(logits), batch), kept.skill, kept.skill
    rates = None if chance is None else disturbance_rates(learnt, skill)
    found = Gating(
        like.new_empty(shape, dtype=torch.float32),
        like.new_empty(shape, dtype=torch.float32),
        like.new_empty(shape, dtype=torch.int64) if chance is not None and settings.swap else None,
    )
    tile = _tile(batch, classes)
    with torch.cuda.device(like.get_device()):
        _gate[(triton.cdiv(batch, tile["group"]),)](
            logits,
            strides,
            skill,
            kept.log_prior,
            None if available is None else available.contiguous(),
            None if chance is None else chance.contiguous(),
            rates,
            None if penalty is None else penalty.contiguous(),
            settings,
            found,
            batch,
            classes,
            unrolled=max(1, 12 // len(logits)),
            **tile,
        )
    return found


def _addressable(logits: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Logits with memory whose columns are next to each other, and the strides of their rows."""
    found = tuple(with_memory(x if x.stride(1) == 1 else x.contiguous()) for x in logits)
    return found, tuple(x.stride(0) for x in found)


def _contiguous(criterion: Criterion) -> Criterion:
    """The same in memory as it reads; hooks may have packed a saved target in another dtype."""
    weight = criterion.weight
    return criterion._replace(
        target=criterion.target.long().contiguous(),
        weight=None if weight is None else weight.resolve_neg().contiguous(),
    )


def _check_kept(buffers: Iterable[Tensor], memory: Memory | None, known: int, heads: int) -> None:
    """Refuse what is kept from step to step unless it lies in memory as the kernels take it."""
    if known < heads:
        raise ValueError(f"state: expected buffers of {heads} heads, got {known}")
    for x in (*buffers, *(memory or ())[1:]):
        if not x.is_contiguous():
            raise TypeError(f"state: expected contiguous buffers, got strides {x.stride()}")


def _tile(batch: int, classes: int) -> dict[str, Any]:
    """Rows of a program and threads that share one.

    Few share a row, as joining them costs, but enough for the batch to fill a GPU.
    """
    useful = triton.next_power_of_2(classes) // _UNROLLED
    enough = triton.next_power_of_2(2**16 // max(1, batch))
    lanes = max(1, min(useful, max(32, enough), _MOST_LANES))
    group = max(1, _THREADS // lanes)
    return {"group": group, "lanes": lanes, "num_warps": group * lanes // 32, **_OPTIONS}


_HEARD = tl.constexpr(HEARD)
# As plain PyTorch has them, where they are explained.
_LEAST_LOG_PROBABILITY = tl.constexpr(LEAST_LOG_PROBABILITY)
_LARGEST_NLL = tl.constexpr(LARGEST_NLL)
_SMALLEST_ERROR = tl.constexpr(SMALLEST_ERROR)
_SMALLEST_SKILL = tl.constexpr(SMALLEST_SKILL)
_LEAST = tl.constexpr(LEAST)
_MOST = tl.constexpr(MOST)
_LEAST_LOSS = tl.constexpr(LEAST_LOSS)
_LEAST_QUALITY = tl.constexpr(LEAST_QUALITY)
_OF_ONE = tl.constexpr(OF_ONE)
_COMMON_ERROR = tl.constexpr(COMMON_ERROR)
_FULL_NOISE = tl.constexpr(FULL_NOISE)
_SPREAD_FLOOR = tl.constexpr(SPREAD_FLOOR)
_LARGEST_LOG_WEIGHT = tl.constexpr(LARGEST_LOG_WEIGHT)
_MIX_BY = tl.constexpr(MIX[0])
_MIX_SHIFT = tl.constexpr(MIX[1])
_MIX_AGAIN_BY = tl.constexpr(MIX[2])
_UNITS = tl.constexpr(2.0**24)  # of a weight: e^-16, the least, is one at least
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # a first maximum from which no shift is NaN
_NOTHING = tl.constexpr(-110.0)  # exp of it is 0, and so is 0 log 0
_NAN_STAYS = tl.constexpr(tl.PropagateNan.ALL)


@_jit
def _has(present: tl.tensor, at: tl.tensor, inside: tl.tensor) -> tl.tensor:
    if present is not None:
        inside = inside & (tl.load(present + at, mask=inside, other=0) != 0)
    return inside


@_jit
def _shifted(total: tl.tensor, moment: tl.tensor, shift: tl.tensor) -> tl.tuple:
    """Sums of ``exp(d)`` and ``exp(d) d`` after every d moved by ``shift`` <= 0."""
    scale = tl.exp(shift)
    total *= scale
    return total, tl.where(scale > 0, scale * moment + shift * total, 0.0), scale


@_jit
def _rescaled(
    gap: tl.tensor, cross: tl.tensor, power: tl.tensor, a: tl.tensor, b: tl.tensor
) -> tl.tuple:
    """Sums of ``(u - v)^2``, ``u (u - v)`` and ``u^2`` after u was scaled by a and v by b.

    Where u and v are close, all that is added is small: no cancellation, unlike in the
    expansion of the square.
    """
    turn = a - b
    return (
        b * b * gap + 2 * b * turn * cross + turn * turn * power,
        a * (b * cross + turn * power),
        a * a * power,
    )


@_jit
def _statistics(
    logits: tl.tuple,
    strides: tl.tuple,
    present: tl.tensor,
    criterion: tl.tuple,
    found: tl.tuple,
    batch: tl.tensor,
    classes: tl.tensor,
    smooth: tl.constexpr,
    group: tl.constexpr,
    lanes: tl.constexpr,
    unrolled: tl.constexpr,
) -> None:
    """All heads of a group of rows: an online softmax in every lane, joined at the end."""
    count: tl.constexpr = len(logits)
    i = tl.program_id(0).to(tl.int64) * group + tl.arange(0, group)
    inside = i < batch
    lane = tl.arange(0, lanes)
    zero = tl.zeros([group, lanes], tl.float32)
    heaviness = tl.zeros([lanes], tl.float32)  # class weights so far
    heads: tl.tuple = ()
    for _h in tl.static_range(count):
        heads += ((zero + _LOWEST, zero.to(tl.int32), zero, zero, zero, zero, zero, zero),)
    for start in range(0, classes, lanes * unrolled):
        heavy: tl.tuple = ()
        before = heaviness
        if smooth:
            for k in tl.static_range(unrolled):
                column = start + k * lanes + lane
                w = (column < classes).to(tl.float32)
                if criterion.weight is not None:
                    w = tl.load(criterion.weight + column, mask=column < classes, other=0.0)
                heavy += (w.to(tl.float32),)
                heaviness += heavy[k]
        fused: tl.tuple = ()
        updated: tl.tuple = ()
        for h in tl.static_range(count):
            top, best, total, moment, tilt, gap, cross, power = heads[h]
            here = inside
            if h > 0:  # distances are to the fused head, present or not
                here = _has(present, h * batch + i, inside)
            xs: tl.tuple = ()
            peak = top
            for k in tl.static_range(unrolled):
                x = _columns(logits[h], strides[h], i, here, start + k * lanes, classes, lanes)
                best = tl.where(x > peak, start + k * lanes, best)
                peak = tl.where(x > peak, x, peak)
                xs += (x,)
            shift = top - peak
            total, moment, scale = _shifted(total, moment, shift)
            if smooth:
                tilt += tl.where(before > 0, before * shift, 0.0)
            if h == 0:
                fused_scale = scale
            else:
                gap, cross, power = _rescaled(gap, cross, power, scale, fused_scale)
            for k in tl.static_range(unrolled):
                d = xs[k] - peak
                if smooth:
                    exists = (start + k * lanes + lane < classes)[None, :]
                    tilt += tl.where(exists, heavy[k][None, :] * d, 0.0)
                d = tl.maximum(d, _NOTHING, propagate_nan=_NAN_STAYS)
                e = tl.exp(d)
                total += e
                moment += e * d
                if h == 0:
                    fused += (e,)
                else:
                    apart = e - fused[k]
                    gap += apart * apart
                    cross += e * apart
                    power += e * e
            updated += ((peak, best, total, moment, tilt, gap, cross, power),)
        heads = updated

    y = tl.load(criterion.target + i, mask=inside, other=criterion.ignore_index)
    kept = y != criterion.ignore_index
    known = kept & (y >= 0) & (y < classes)
    on_target = tl.full([group], 1.0, tl.float32)
    if criterion.weight is not None:
        on_target = tl.load(criterion.weight + y, mask=known, other=0.0).to(tl.float32)
    mass = on_target
    heaviest = tl.sum(heaviness, 0)
    if smooth:
        on_target *= 1.0 - criterion.label_smoothing
        mass = on_target + criterion.label_smoothing * heaviest / classes
    for h in tl.static_range(count):
        tops, best, total, moment, tilt, gap, cross, power = heads[h]
        top = tl.max(tops, 1)
        best = tl.min(tl.where(tops == top[:, None], best + lane[None, :], classes), 1)
        shift = tops - top[:, None]
        total, moment, scale = _shifted(total, moment, shift)
        total = tl.sum(total, 1)
        log_total = tl.log(total)
        x = tl.load(logits[h] + i * strides[h] + y, mask=known, other=float("nan"))
        nll = log_total - (x.to(tl.float32) - top)
        loss = nll * on_target
        if smooth:
            tilt += tl.where(heaviness > 0, heaviness * shift, 0.0)
            spread = (heaviest * log_total - tl.sum(tilt, 1)) / classes
            loss += criterion.label_smoothing * spread
        scale /= total[:, None]
        if h == 0:
            fused_scale = scale
        gap, cross, power = _rescaled(gap, cross, power, scale, fused_scale)
        gap = tl.sum(gap, 1)
        at = h * batch + i
        plane = count * batch
        here = _has(present, at, inside)
        entropy = tl.where(here, log_total - tl.sum(moment, 1) / total, 0.0)
        distance = tl.where(here, tl.sqrt(tl.where(gap < 0, 0.0, gap) / 2), 0.0)
        tl.store(found.rows + at, tl.where(here & kept, loss, 0.0), mask=inside)
        tl.store(found.rows + plane + at, tl.where(here & kept, nll, 0.0), mask=inside)
        tl.store(found.rows + 2 * plane + at, entropy, mask=inside)
        tl.store(found.rows + 3 * plane + at, distance, mask=inside)
        tl.store(found.prediction + at, best.to(tl.int64), mask=inside)
        tl.store(found.normaliser + at, top, mask=inside)
        tl.store(found.normaliser + plane + at, mass / total, mask=inside)


@_jit
def _gradients(
    logits: tl.tuple,
    strides: tl.tuple,
    grads: tl.tuple,
    grad: tl.tensor,
    grad_strides: tl.tuple,
    coefficient: tl.tensor,
    normaliser: tl.tensor,
    criterion: tl.tuple,
    batch: tl.tensor,
    classes: tl.tensor,
    smooth: tl.constexpr,
    guard: tl.constexpr,
    group: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """``g * (mass * softmax - truth)`` for a tile of every head."""
    count: tl.constexpr = len(logits)
    blocks = tl.cdiv(classes, block)
    i = (tl.program_id(0) // blocks).to(tl.int64) * group + tl.arange(0, group)
    column = tl.program_id(0) % blocks * block + tl.arange(0, block)
    inside, exists = i < batch, column < classes
    y = tl.load(criterion.target + i, mask=inside, other=criterion.ignore_index)
    kept = y != criterion.ignore_index
    on_target = tl.full([group], 1.0, tl.float32)
    everywhere = tl.full([block], 1.0, tl.float32)
    if criterion.weight is not None:
        known = kept & (y >= 0) & (y < classes)
        on_target = tl.load(criterion.weight + y, mask=known, other=0.0).to(tl.float32)
        everywhere = tl.load(criterion.weight + column, mask=exists, other=0.0).to(tl.float32)
    truth = tl.where(column[None, :] == y[:, None], on_target[:, None], 0.0)
    if smooth:
        truth *= 1.0 - criterion.label_smoothing
        truth += (everywhere * criterion.label_smoothing / classes)[None, :]
    for h in tl.static_range(count):
        g = tl.load(grad + h * grad_strides[0] + i * grad_strides[1], mask=kept, other=0.0)
        g = g.to(tl.float32)
        if coefficient is not None:
            g *= tl.load(coefficient + h * batch + i, mask=kept, other=0.0)
        live = inside
        if guard:  # neither the row nor its normaliser is read where there is no gradient
            live = g != 0
        top = tl.load(normaliser + h * batch + i, mask=live, other=0.0)
        scale = tl.load(normaliser + (count + h) * batch + i, mask=live, other=0.0)
        at = logits[h] + (i * strides[h])[:, None] + column[None, :]
        x = tl.load(at, mask=live[:, None] & exists[None, :], other=float("-inf"))
        share = tl.exp(x.to(tl.float32) - top[:, None]) * scale[:, None]
        at = grads[h] + (i * classes)[:, None] + column[None, :]
        tl.store(at, g[:, None] * (share - truth), mask=inside[:, None] & exists[None, :])


@_jit
def _expect(
    logits: tl.tuple,
    strides: tl.tuple,
    present: tl.tensor,
    criterion: tl.tuple,
    nll: tl.tensor,
    index: tl.tensor,
    below: tl.tensor,
    weight: tl.tensor,
    quality: tl.tensor,
    expected: tl.tensor,
    batch: tl.tensor,
    classes: tl.tensor,
    group: tl.constexpr,
    lanes: tl.constexpr,
) -> None:
    """What the pool of all heads expects of the log-likelihoods of samples held out.

    As ``dyncim_core.modality.expected_log_likelihood`` defines it: an online softmax in every
    lane, joined at the end. Log-probabilities come from the target's logit and NLL, which are
    finite.
    """
    count: tl.constexpr = len(logits)
    i = tl.program_id(0).to(tl.int64) * group + tl.arange(0, group)
    y = tl.load(criterion.target + i, mask=i < batch, other=criterion.ignore_index)
    held = (i < batch) & (y != criterion.ignore_index) & (y >= 0) & (y < classes)
    held = held & _is_held_out(tl.load(index + i, mask=held, other=0), below)
    if tl.max(held.to(tl.int32), 0) > 0:
        of_head = tl.load(weight).to(tl.float32)
        of_shared = (1.0 - tl.load(quality).to(tl.float32)) * of_head
        zero = tl.zeros([group, lanes], tl.float32)
        top, total = zero + _LOWEST, zero
        there: tl.tuple = ()
        anchors: tl.tuple = ()
        moments: tl.tuple = ()
        for h in tl.static_range(count):
            here = _has(present, h * batch + i, held)
            there += (here,)
            of_target = tl.load(logits[h] + i * strides[h] + y, mask=here, other=0.0)
            lost = tl.load(nll + h * batch + i, mask=here, other=0.0)
            anchors += ((of_target.to(tl.float32)[:, None], lost[:, None]),)
            moments += (zero,)
        for start in range(0, classes, lanes):
            pooled = zero
            logs: tl.tuple = ()
            for h in tl.static_range(count):
                x = _columns(logits[h], strides[h], i, there[h], start, classes, lanes)
                own = tl.minimum(x - anchors[h][0] - anchors[h][1], 0.0)
                logs += (tl.maximum(own, _LEAST_LOG_PROBABILITY),)
                # Of the head, those that fused logits hold of the modalities' taken off.
                w = of_head if h == 0 else tl.load(weight + h).to(tl.float32) - of_shared
                pooled += tl.where(there[h][:, None], w * logs[h], 0.0)
            peak = tl.maximum(top, pooled)
            scale = tl.exp(top - peak)
            exists = (start + tl.arange(0, lanes) < classes)[None, :]
            e = tl.where(exists, tl.exp(pooled - peak), 0.0)
            total = total * scale + e
            updated: tl.tuple = ()
            for h in tl.static_range(count):
                part = tl.where(exists & there[h][:, None], e * logs[h], 0.0)
                updated += (moments[h] * scale + part,)
            moments = updated
            top = peak
        scale = tl.exp(top - tl.max(top, 1)[:, None])
        total = tl.sum(total * scale, 1)
        for h in tl.static_range(count):
            found = tl.sum(moments[h] * scale, 1) / tl.where(total > 0, total, 1.0)
            tl.store(expected + h * batch + i, found, mask=there[h])


@_jit
def _curriculum(
    found: tl.tuple,
    expected: tl.tensor,
    present: tl.tensor,
    criterion: tl.tuple,
    buffers: tl.tuple,
    memory: tl.tuple,
    memory_size: tl.tensor,
    joint: tl.tuple,
    batch: tl.tensor,
    classes: tl.tensor,
    per_log: tl.tensor,
    strengths: tl.tuple,
    known_noise: tl.tensor,
    decays: tl.tuple,
    of_classes: tl.tensor,
    below: tl.tensor,
    own: tl.tuple,
    skip: tl.constexpr,
    reduction: tl.constexpr,
    count: tl.constexpr,
    known: tl.constexpr,
    heads: tl.constexpr,
    samples: tl.constexpr,
    groups: tl.constexpr,
) -> None:
    """Passes over the batch: its moments, its classes, its weights, and what comes of them."""
    # The state, but for what it keeps of each class, is read here, and written after a barrier.
    head = tl.arange(0, heads)
    seen = tl.load(buffers.seen + head, mask=head < known, other=0)
    log_quality = tl.load(buffers.log_quality + head, mask=head < known, other=0.0)
    log_quality = log_quality.to(tl.float32)
    averages: tl.tuple = ()
    for k in tl.static_range(_HEARD):
        average_at = buffers.held_out_averages + k * known + head
        averages += (tl.load(average_at, mask=head < known, other=0.0),)
    logit_weight = tl.load(buffers.logit_weight + head, mask=head < known, other=1.0)
    each = tl.arange(0, groups)
    smoothed = tl.load(buffers.class_seen + each, mask=each < classes, other=-1) + 1
    trained_on = tl.sum(smoothed, 0).to(tl.float32)
    skill = tl.load(buffers.skill + head, mask=head < known, other=0.0).to(tl.float32)
    able = tl.max(tl.where((head > 0) & (head < count), skill, 0.0), 0)
    asked_heads = (head == 0) | (2.0 * skill >= able)
    head_weight = tl.where(tl.max(skill, 0) > 0, tl.maximum(skill, _LEAST), 1.0)
    credible = tl.minimum(4.0 * tl.sum(tl.where(head == 0, head_weight, 0.0), 0), 1.0)
    head_weight *= head_weight
    usual = tl.where(seen > 0, -log_quality, float("inf"))
    noise = tl.load(buffers.label_noise).to(tl.float32)
    if known_noise is not None:
        noise, credible = known_noise, 1.0
    rho = strengths[0] * tl.minimum(tl.maximum(noise / _FULL_NOISE, 0.0), 1.0) * credible
    shared = 1.0 - tl.load(buffers.quality).to(tl.float32)
    kappa = strengths[1] * shared
    shares: tl.tuple = ()
    moved = 0.0
    for k in tl.static_range(3):
        shares += (tl.load(buffers.volatility + k).to(tl.float32),)
        moved += shares[k]

    zero = tl.zeros([samples], tl.float32)
    hearing: tl.tuple = (asked_heads, head_weight, usual)
    plane = tl.zeros([heads, samples], tl.float32)
    said: tl.tuple = (plane, plane, plane, plane, plane, plane, plane)
    number, mean, spread, nonfinite, contradicted, mass = zero, zero, zero, zero, zero, zero
    left_out = zero
    signals: tl.tuple = (zero, zero, zero)
    for start in range(0, batch, samples):
        i = start + tl.arange(0, samples)
        nll, here, kept, valid, held, heard, signal, difficulty, surprise, told = _signals(
            found,
            present,
            criterion,
            memory,
            below,
            shares,
            moved,
            hearing,
            i,
            head,
            count,
            batch,
            per_log,
        )
        summed: tl.tuple = ()
        for k in tl.static_range(3):
            summed += (signals[k] + tl.where(valid, signal[k], 0.0),)
        signals = summed
        number += valid.to(tl.float32)
        off = tl.where(valid, difficulty - mean, 0.0)
        mean += off / tl.maximum(number, 1.0)
        spread += off * tl.where(valid, difficulty - mean, 0.0)
        nonfinite += ((kept & (valid == 0)) | (held & (heard == 0))).to(tl.float32)

        y = tl.load(criterion.target + i, mask=i < batch, other=0)
        others = here & ((head > 0) & asked_heads)[:, None]
        at = head[:, None] * batch + i[None, :]
        prediction = tl.load(found.prediction + at, mask=here, other=0)
        fused = tl.load(found.prediction + i, mask=i < batch, other=0)
        differ = others & (prediction != fused[None, :])
        # As dyncim_core.signals.contradiction defines it.
        beyond = tl.where(fused != y, told[0], 0.0) - _COMMON_ERROR * told[1]
        beyond = tl.where(tl.sum(others.to(tl.int32), 0) > 1, beyond, _OF_ONE * beyond)
        agree = (tl.sum(differ.to(tl.int32), 0) == 0) & (tl.sum(others.to(tl.int32), 0) > 0)
        if below is not None:
            left_out += held.to(tl.float32)
            asked_here = here & heard[None, :]
            of_class = tl.load(buffers.class_seen + prediction % groups, mask=asked_here, other=-1)
            believed = tl.exp(_log_weight(rho * surprise, 0.0))[None, :]
            entropy = tl.load(found.rows + 2 * count * batch + at, mask=here, other=0.0)
            # As dyncim_core.modality.logit_slopes defines it.
            awaited = tl.load(expected + at, mask=asked_here, other=0.0)
            slope = tl.where(asked_here, nll + awaited, 0.0)
            of_others = tl.sum(tl.where((head > 0)[:, None], slope, 0.0), 0)[None, :]
            slope -= tl.where((head == 0)[:, None], shared * of_others, 0.0)
            doubted = tl.where(agree, beyond, 0.0)[None, :]
            alone = 1.0 - tl.exp(-tl.maximum(nll - entropy, 0.0))
            alone = tl.where(prediction != y[None, :], alone, 0.0)
            of_fused = tl.sum(tl.where((head == 0)[:, None], alone, 0.0), 0)
            contradicted += tl.where(valid, of_fused, 0.0)
            said = (
                said[0] + asked_here.to(tl.float32),
                said[1] + (asked_here & (prediction == y[None, :])).to(tl.float32),
                said[2] + (of_class + 1).to(tl.float32) / trained_on,
                said[3] + tl.where(asked_here, believed * nll, 0.0),
                said[4] + tl.where(asked_here, believed * slope, 0.0),
                said[5] + tl.where(asked_here, doubted, 0.0),
                said[6] + tl.where(asked_here, alone, 0.0),
            )
        else:
            contradicted += tl.where(valid & agree, beyond, 0.0)
        if skip:
            left_out += (kept & (valid == 0)).to(tl.float32)
        heavy = zero + 1.0
        if criterion.weight is not None:
            real = kept & (y >= 0) & (y < classes)
            heavy = tl.load(criterion.weight + y, mask=real, other=0.0).to(tl.float32)
        if skip:
            kept = valid
        mass += tl.where(kept, heavy, 0.0)
    counted = tl.sum(number, 0)
    some = tl.maximum(counted, 1.0)
    centre = tl.sum(number * mean, 0) / some
    spread += number * (mean - centre) * (mean - centre)
    kappa /= tl.maximum(tl.sqrt(tl.sum(spread, 0) / some), _SPREAD_FLOOR)

    for start in range(0, batch, samples):
        i = start + tl.arange(0, samples)
        _, _, _, valid, _, _, _, difficulty, surprise, _ = _signals(
            found,
            present,
            criterion,
            memory,
            below,
            shares,
            moved,
            hearing,
            i,
            head,
            count,
            batch,
            per_log,
        )
        group, average = _of_class(criterion.target, buffers.log_class_average, i, valid, groups)
        log_weight = _log_weight(rho * surprise, kappa * (difficulty - centre))
        # In whole numbers, whose sum does not depend on which thread comes first.
        units = (tl.exp(log_weight - average) * _UNITS + 0.5).to(tl.int64)
        # Of integers, and before a barrier: in any order, which a GPU need not enforce.
        tl.atomic_add(of_classes + group, 1, mask=valid, sem="relaxed")
        tl.atomic_add(of_classes + groups + group, units, mask=valid, sem="relaxed")
    tl.debug_barrier()  # after it, all is added up
    _level(buffers, of_classes, decays[2], groups)
    tl.debug_barrier()

    squares = zero
    numbers, weights, weighted = plane, plane, plane
    for start in range(0, batch, samples):
        i = start + tl.arange(0, samples)
        nll, here, _, valid, _, _, _, difficulty, surprise, _ = _signals(
            found,
            present,
            criterion,
            memory,
            below,
            shares,
            moved,
            hearing,
            i,
            head,
            count,
            batch,
            per_log,
        )
        _, average = _of_class(criterion.target, buffers.log_class_average, i, valid, groups)
        log_weight = _log_weight(rho * surprise, kappa * (difficulty - centre))
        weight = tl.exp(log_weight - average)
        weighed = here & valid[None, :]
        weight_here = tl.where(weighed, weight[None, :], 0.0)
        fused = tl.sum(tl.where((head == 0)[:, None], weight_here, 0.0), 0)
        squares += fused * fused
        numbers += weighed.to(tl.float32)
        weights += weight_here
        weighted += weight_here * tl.where(valid[None, :], nll, 0.0)
    squares = tl.sum(squares, 0)
    numbers = tl.sum(numbers, 1)
    weights = tl.sum(weights, 1)
    weighted = tl.sum(weighted, 1)

    # Averages start at their first value and stay where a batch has nothing to say.
    steps = tl.sum(tl.where(head == 0, seen, 0), 0)
    moves = tl.where(counted > 0, 1.0, 0.0)
    rate = (1.0 - decays[0]) * moves
    first_rate = tl.where(steps == 0, moves, rate)
    for k in tl.static_range(3):
        now = tl.sum(signals[k], 0) / some
        before = tl.load(buffers.signal_mean + k).to(tl.float32)
        change = tl.abs(now - before) / (tl.abs(before) + 1e-3)
        change = tl.where(steps == 0, 0.0, change)
        _average(buffers.volatility + k, change, tl.where(steps == 1, moves, rate))
        _average(buffers.signal_mean + k, now, first_rate)
    heard_mass, heard_nll = averages[0], averages[3]
    contradicted = tl.sum(contradicted, 0) / some
    if below is None:
        # Once any was held out, those trained on, known by heart, are not asked for it.
        doubt_rate = tl.where(tl.sum(tl.where(head == 0, averages[0], 0.0), 0) > 0, 0.0, rate)
        _average(buffers.label_noise, contradicted, doubt_rate)
    else:
        doubted = tl.load(buffers.doubted).to(tl.float32)
        doubted += first_rate * (contradicted - doubted)
        tl.store(buffers.doubted, doubted)
        skill, heard_mass, heard_nll = _listen(
            buffers,
            doubted,
            averages,
            logit_weight.to(tl.float32),
            said,
            tl.maximum(batch, 1),
            1.0 - decays[0],
            own,
            head,
            known,
        )
    fused = tl.sum(tl.where(head == 0, weights, 0.0), 0)
    share = fused * fused / tl.maximum(squares * counted, 1e-30)
    _average(buffers.effective_share, share, first_rate)
    tl.store(buffers.step, tl.load(buffers.step) + 1)
    nonfinite = tl.sum(nonfinite, 0).to(tl.int64)
    tl.store(buffers.nonfinite, tl.load(buffers.nonfinite) + nonfinite)
    class_weight = tl.full([groups], 1.0, tl.float32)
    if criterion.weight is not None:
        class_weight = tl.load(criterion.weight + each, mask=each < classes, other=1.0)
    unknown = (criterion.label_smoothing > 0) | (classes > groups)
    class_weight = tl.where(unknown, 0.0, class_weight.to(tl.float32))
    tl.store(buffers.class_weight + each, class_weight)

    weighted /= tl.where(weights > 0, weights, 1.0)
    # A batch moves it as far as it is weighed, or labels in doubt would count in small ones.
    rate = (1.0 - decays[0]) * tl.minimum(weights / tl.maximum(numbers, 1.0), 1.0)
    rate = tl.where(weights > 0, tl.where(seen == 0, 1.0, rate), 0.0)
    log_quality += rate * (-weighted - log_quality)
    seen += (weights > 0).to(tl.int64)
    fused = tl.sum(tl.where(head == 0, log_quality, 0.0), 0)
    log_quality = tl.where(seen > 0, log_quality, fused)
    quality = tl.minimum(tl.maximum(1.0 + log_quality * per_log, 0.0), 1.0)
    learnt = (per_log > 0) & (tl.sum(tl.where(head == 0, seen, 0), 0) > 0)
    quality = tl.where(learnt, quality, 0.0)
    tl.store(buffers.seen + head, seen, mask=head < known)
    tl.store(buffers.log_quality + head, log_quality, mask=head < known)
    tl.store(buffers.quality + head, quality, mask=head < known)

    factor = tl.full([heads], 1.0, tl.float32)
    if count > 1:
        ahead = _modality_coefficients(fused - log_quality, head, count)
        best = tl.max(tl.where(head < known, skill, 0.0), 0)
        of_fused = tl.sum(tl.where(head == 0, skill, 0.0), 0)
        part = tl.minimum(skill / tl.where(of_fused > 0, of_fused, 1.0), 1.0)
        part = tl.where(of_fused > 0, part, 1.0)
        part *= tl.where(best > 0, tl.minimum(3.0 * best, 1.0), 1.0)
        ahead *= tl.maximum(part * part, _LEAST_LOSS)
        lost = heard_nll / tl.where(heard_mass > 0, heard_mass, 1.0)
        held_out = tl.minimum(tl.maximum(1.0 - lost * per_log, 0.0), 1.0)
        held_out = tl.where(per_log > 0, held_out, 0.0)
        holds = tl.minimum((held_out + _LEAST_QUALITY) / (quality + _LEAST_QUALITY), 1.0)
        ahead *= tl.where(heard_mass > 0, holds * holds * holds * holds, 1.0)
        factor = tl.where(head == 0, 1.0, strengths[2] * ahead)
    if reduction == "mean":
        mass = tl.sum(mass, 0)
        # Of a batch left out as a whole, 0.
        factor /= tl.where(mass != 0, mass, tl.sum(left_out, 0))
    value = zero
    for start in range(0, batch, samples):
        i = start + tl.arange(0, samples)
        inside = i < batch
        nll, here, _, valid, _, heard, _, difficulty, surprise, _ = _signals(
            found,
            present,
            criterion,
            memory,
            below,
            shares,
            moved,
            hearing,
            i,
            head,
            count,
            batch,
            per_log,
        )
        _, average = _of_class(criterion.target, buffers.log_class_average, i, valid, groups)
        log_weight = _log_weight(rho * surprise, kappa * (difficulty - centre))
        weight = tl.exp(log_weight - average)
        weight = tl.where(valid, weight, 1.0)
        if memory is not None:
            row = tl.load(memory.rows + i, mask=inside, other=-1)
            exists = (row >= 0) & (row < memory_size)
            cell = row[None, :] * known + head[:, None]
            mask = here & ((valid | heard) & exists)[None, :]
            visits = tl.load(memory.visits + cell, mask=mask, other=0)
            old = tl.load(memory.nll + cell, mask=mask, other=0.0).to(tl.float32)
            kept = visits.to(tl.float32) / (visits + 1).to(tl.float32)  # the mean of all, at first
            averaged = nll + tl.minimum(kept, decays[1]) * (old - nll)
            tl.store(memory.nll + cell, averaged, mask=mask)
            tl.store(memory.visits + cell, visits + 1, mask=mask)
            tl.store(memory.weight + row, weight, mask=exists)
            if below is not None:
                weight = tl.where(_is_held_out(row, below), 0.0, weight)
        if skip:
            weight = tl.where(valid, weight, 0.0)
        at = head[:, None] * batch + i[None, :]
        c = tl.where(here, factor[:, None] * weight[None, :], 0.0)
        tl.store(joint.coefficient + at, c, mask=(head < count)[:, None] & inside[None, :])
        term = c * tl.load(found.rows + at, mask=here, other=0.0)
        if skip or below is not None:
            term = tl.where(c == 0, 0.0, term)
        if reduction == "none":
            tl.store(joint.value + i, tl.sum(term, 0), mask=inside)
        else:
            value += tl.sum(term, 0)
    if reduction != "none":
        tl.store(joint.value, tl.sum(value, 0))


@_jit
def _level(
    buffers: tl.tuple, of_classes: tl.tensor, log_decay: tl.tensor, groups: tl.constexpr
) -> None:
    """Take the batch into what is kept of each class."""
    group = tl.arange(0, groups)
    number = tl.load(of_classes + group).to(tl.float32)
    total = tl.load(of_classes + groups + group).to(tl.float32) / _UNITS
    mean = total / tl.maximum(number, 1.0)
    stays = tl.exp(number * log_decay)
    moves = tl.where(number > 0, tl.log(stays + (1.0 - stays) * mean), 0.0)
    tl.store(buffers.log_class_average + group, tl.load(buffers.log_class_average + group) + moves)
    seen = tl.load(buffers.class_seen + group)
    tl.store(buffers.class_seen + group, seen + number.to(tl.int64))


@_jit
def _log_weight(surprise: tl.tensor, harder: tl.tensor) -> tl.tensor:
    found = tl.minimum(-surprise - harder, _LARGEST_LOG_WEIGHT)
    return tl.maximum(found, -_LARGEST_LOG_WEIGHT)


@_jit
def _of_class(
    target: tl.tensor,
    log_average: tl.tensor,
    i: tl.tensor,
    valid: tl.tensor,
    groups: tl.constexpr,
) -> tl.tuple:
    """The group of a sample's class, and its average."""
    group = tl.load(target + i, mask=valid, other=0) % groups
    return group, tl.load(log_average + group, mask=valid, other=0.0)


@_jit
def _average(at: tl.tensor, value: tl.tensor, rate: tl.tensor) -> None:
    mean = tl.load(at).to(tl.float32)
    tl.store(at, mean + rate * (value - mean))


@_jit
def _listen(
    buffers: tl.tuple,
    doubted: tl.tensor,
    averages: tl.tuple,
    weight: tl.tensor,
    said: tl.tuple,
    batch: tl.tensor,
    rate: tl.tensor,
    own: tl.tuple,
    head: tl.tensor,
    known: tl.constexpr,
) -> tl.tuple:
    """Take in what heads say about samples that they were never trained on.

    Their skills, and the first average and that of their NLL.
    """
    seen = tl.sum(said[0], 1)
    some = tl.sum(tl.where(head == 0, seen, 0.0), 0) > 0
    # Of a modality that was not heard they stay, or they would fade to nothing.
    rate = tl.where(seen > 0, rate, 0.0)
    moved: tl.tuple = ()
    for k in tl.static_range(_HEARD):
        moved += (averages[k] + rate * (tl.sum(said[k], 1) / batch - averages[k]),)
        at = buffers.held_out_averages + k * known + head
        tl.store(at, moved[k], mask=head < known)
    mass, hits, chance, nll, slope, contradicted, alone = moved
    positive = tl.maximum(mass, 1e-30)
    error = tl.maximum(1.0 - chance / positive, _SMALLEST_ERROR)
    skill = tl.minimum((hits - chance) / positive / error, 1.0)
    skill = tl.where(skill > _SMALLEST_SKILL, skill, 0.0)
    fused = tl.sum(tl.where(head == 0, skill, 0.0), 0)
    # A modality never heard counts as equal to the fusion, which favours neither side.
    skill = tl.where(mass > 0, skill, fused)
    pool = tl.sum(tl.where(head < known, skill, 0.0), 0) / known
    skill = own[0] * skill + (1.0 - own[0]) * pool
    fused = tl.sum(tl.where(head == 0, skill, 0.0), 0)
    noise = tl.sum(tl.where(head == 0, contradicted / positive, 0.0), 0)
    # As dyncim_core.signals.seen_noise defines it.
    alone = tl.sum(tl.where(head == 0, alone / positive, 0.0), 0)
    by_heart = doubted * (1.0 - doubted / tl.where(alone > 0, alone, 1.0))
    best = tl.max(tl.where((head > 0) & (head < known), skill, 0.0), 0)
    ahead = tl.maximum(fused - best, 0.0) / tl.where(fused > 0, fused, 1.0)
    of_fused = tl.maximum(noise, by_heart * ahead * ahead * ahead)
    tells = (alone > 0) & ((fused > 0) | (best > 0)) & (known > 1)
    noise = tl.where(tells, of_fused, noise)
    noise = tl.where(some, noise, tl.load(buffers.label_noise))
    tl.store(buffers.label_noise, noise)
    # As dyncim_core.modality.logit_weights defines it.
    goal = own[1] * (weight - slope / positive) + (1.0 - own[1]) * skill
    goal = tl.minimum(tl.maximum(goal, _LEAST), _MOST)
    weight += rate * (goal - weight)
    of_fused = tl.sum(tl.where(head == 0, weight, 0.0), 0)
    weight = tl.where((mass > 0) | (some == 0), weight, of_fused)
    tl.store(buffers.logit_weight + head, weight, mask=head < known)
    tl.store(buffers.skill + head, skill, mask=head < known)
    return skill, mass, nll


@_jit
def _is_held_out(index: tl.tensor, below: tl.tensor) -> tl.tensor:
    """As ``dyncim_core.signals.held_out`` defines it, of an index."""
    bits = index * _MIX_BY
    bits = (bits ^ (bits >> _MIX_SHIFT)).to(tl.uint32) * _MIX_AGAIN_BY
    return bits.to(tl.int64) < below


@_jit
def _signals(
    found: tl.tuple,
    present: tl.tensor,
    criterion: tl.tuple,
    memory: tl.tuple,
    below: tl.tensor,
    shares: tl.tuple,
    moved: tl.tensor,
    hearing: tl.tuple,
    i: tl.tensor,
    head: tl.tensor,
    count: tl.constexpr,
    batch: tl.tensor,
    per_log: tl.tensor,
) -> tl.tuple:
    """What the statistics say about samples i, as ``dyncim_core.signals`` defines it."""
    at = head[:, None] * batch + i[None, :]
    here = _has(present, at, (head < count)[:, None] & (i < batch)[None, :])
    plane = count * batch
    nll = tl.load(found.rows + plane + at, mask=here, other=0.0)
    entropy = tl.load(found.rows + 2 * plane + at, mask=here, other=0.0)
    distance = tl.load(found.rows + 3 * plane + at, mask=here, other=0.0)
    y = tl.load(criterion.target + i, mask=i < batch, other=criterion.ignore_index)
    kept = y != criterion.ignore_index
    finite = tl.abs(nll + entropy) < float("inf")  # of each, since their sum could overflow
    valid = kept & (tl.min(finite.to(tl.int32), 0) > 0)
    nll = tl.minimum(nll, _LARGEST_NLL, propagate_nan=_NAN_STAYS)
    held = kept & (kept == 0)
    heard = held
    asked, head_weight, usual = hearing
    if below is not None:
        held = kept & _is_held_out(tl.load(memory.rows + i, mask=i < batch, other=0), below)
        heard = held & valid
        kept = kept & (held == 0)
        valid = valid & (held == 0)

    number = tl.maximum(tl.sum(here.to(tl.float32), 0), 1.0)
    others = tl.maximum(tl.sum((here & (head > 0)[:, None]).to(tl.float32), 0), 1.0)
    undecided = tl.sum(tl.where((head == 0)[:, None], entropy, 0.0), 0) * per_log
    signals = (
        1.0 - tl.exp(-tl.sum(nll, 0) / number),
        tl.sum(distance, 0) / others,
        tl.minimum(tl.maximum(undecided, 0.0), 1.0),
    )
    difficulty = tl.zeros(i.shape, tl.float32)
    for k in tl.static_range(3):
        difficulty += tl.where(moved > 0, shares[k] / moved, 1.0 / 3) * signals[k]
    excess = tl.maximum(nll - entropy, 0.0)
    asked_here = here & asked[:, None]
    told = (
        1.0 - tl.exp(-tl.min(tl.where(asked_here, excess, float("inf")), 0)),
        1.0 - per_log * tl.max(tl.where(asked_here, entropy, float("-inf")), 0),
    )
    mass = tl.sum(tl.where(here, head_weight[:, None], 0.0), 0)
    excess = tl.maximum(nll - tl.minimum(entropy, usual[:, None]), 0.0)
    surprise = tl.sum(head_weight[:, None] * excess, 0) / tl.where(mass > 0, mass, 1.0)
    return nll, here, kept, valid, held, heard, signals, difficulty, surprise, told


@_jit
def _modality_coefficients(ratio: tl.tensor, head: tl.tensor, count: tl.constexpr) -> tl.tensor:
    """As ``dyncim_core.modality`` defines them, from log ratios; head 0 gets anything."""
    modalities: tl.constexpr = count - 1
    is_modality = (head > 0) & (head < count)
    floored = tl.maximum(ratio, 9.995003e-4)  # log(1 + eps)
    inverse = tl.where(is_modality, -floored - tl.log(1.0 - tl.exp(-floored)), _LOWEST)
    top = tl.max(inverse, 0)
    log_hmir = -top - tl.log(tl.sum(tl.exp(inverse - top), 0) / modalities)
    # Infinite only where every ratio is far past the cap, and no balance matters.
    log_one_plus_hmir = tl.log(1.0 + tl.exp(log_hmir))
    log_gmr = tl.sum(tl.where(is_modality, ratio, 0.0), 0) / modalities
    kept = tl.exp(tl.minimum(log_one_plus_hmir - log_gmr, 0.0))
    balance = 1.0 - kept
    capped = tl.where(is_modality, tl.minimum(ratio, 1.0), _LOWEST)
    alpha = tl.exp(capped - tl.max(capped, 0))
    return kept + balance * modalities * alpha / tl.sum(alpha, 0)


@_jit
def _gate(
    logits: tl.tuple,
    strides: tl.tuple,
    skill: tl.tensor,
    prior: tl.tensor,
    available: tl.tensor,
    chance: tl.tensor,
    rates: tl.tensor,
    penalty: tl.tensor,
    settings: tl.tuple,
    found: tl.tuple,
    batch: tl.tensor,
    classes: tl.tensor,
    group: tl.constexpr,
    lanes: tl.constexpr,
    unrolled: tl.constexpr,
) -> None:
    """Two passes over a group of rows: the softmaxes, how they contradict each other."""
    count: tl.constexpr = len(logits)
    i = tl.program_id(0).to(tl.int64) * group + tl.arange(0, group)
    inside = i < batch
    number = tl.zeros([group], tl.int32)
    for m in tl.static_range(count):
        number += _has(available, m * batch + i, inside).to(tl.int32)

    best = tl.load(skill)
    for m in tl.static_range(count):
        best = tl.maximum(best, tl.load(skill + m))

    present: tl.tuple = ()
    rows: tl.tuple = ()
    weights: tl.tuple = ()
    number_left = tl.zeros([group], tl.int32)
    for m in tl.static_range(count):
        here = _has(available, m * batch + i, inside)
        row = i
        believed = tl.where(best > 0, tl.maximum(tl.load(skill + m), _LEAST), 1.0)
        if chance is not None:
            pick = tl.load(chance + i, mask=inside, other=0.0)
            event = tl.load(chance + batch + i, mask=inside, other=0.0)
            rate = tl.load(rates + m)
            chosen = ((pick * count).to(tl.int32) == m) & (number > 1)
            dropped = chosen & (event >= 1.0 - settings.dropout * rate)
            if found.source is not None:
                step = tl.load(chance + 2 * batch + i, mask=inside, other=0.0)
                other = (i + 1 + (step * (batch - 1)).to(tl.int64)) % batch
                swapped = chosen & here & (event < settings.swap * rate)
                row = tl.where(_has(available, m * batch + other, swapped), other, i)
                tl.store(found.source + m * batch + i, row, mask=inside)
            here = here & (dropped == 0)
        present += (here,)
        rows += (row,)
        weights += (tl.where(here, believed, 0.0),)
        number_left += here.to(tl.int32)

    reach = classes
    if count < 3:  # nobody is outvoted
        reach = 0
    zero = tl.zeros([group, lanes], tl.float32)
    softmaxes: tl.tuple = ()
    for _m in tl.static_range(count):
        softmaxes += ((zero + _LOWEST, zero),)
    for start in tl.range(0, reach, lanes, loop_unroll_factor=unrolled):
        updated: tl.tuple = ()
        for m in tl.static_range(count):
            top, total = softmaxes[m]
            x = _columns(logits[m], strides[m], rows[m], present[m], start, classes, lanes)
            x = _beyond(prior, x, start, classes, lanes)
            peak = tl.maximum(top, x)
            total = tl.exp(top - peak) * total + tl.exp(x - peak)
            updated += ((peak, total),)
        softmaxes = updated
    normalisers: tl.tuple = ()
    per_weight: tl.tuple = ()
    behind: tl.tuple = ()
    conflicts: tl.tuple = ()
    for m in tl.static_range(count):
        tops, total = softmaxes[m]
        top = tl.max(tops, 1)
        total = tl.sum(tl.exp(tops - top[:, None]) * total, 1)
        others = tl.zeros([group], tl.float32)
        squares = tl.zeros([group], tl.float32)
        for k in tl.static_range(count):
            if k != m:
                others += weights[k]
                squares += weights[k] * weights[k]
        normalisers += ((top, 1.0 / total),)
        per_weight += (1.0 / tl.where(others > 0, others, 1.0),)
        behind += (squares * per_weight[m],)
        conflicts += ((zero, zero),)
    for start in tl.range(0, reach, lanes, loop_unroll_factor=unrolled):
        shares: tl.tuple = ()
        for m in tl.static_range(count):
            top, scale = normalisers[m]
            x = _columns(logits[m], strides[m], rows[m], present[m], start, classes, lanes)
            x = _beyond(prior, x, start, classes, lanes)
            share = tl.exp(x - top[:, None]) * scale[:, None]
            shares += (tl.where(present[m][:, None], share, 0.0),)
        widened: tl.tuple = ()
        for m in tl.static_range(count):
            apart, surest = conflicts[m]
            consensus = zero
            for k in tl.static_range(count):
                if k != m:
                    consensus += weights[k][:, None] * shares[k]
            consensus *= per_weight[m][:, None]
            off = shares[m] - consensus
            widened += ((apart + off * off, tl.maximum(surest, consensus)),)
        conflicts = widened

    evidence: tl.tuple = ()
    top = tl.full([group], _LOWEST, tl.float32)
    for m in tl.static_range(count):
        apart, surest = conflicts[m]
        conflict = tl.sum(apart, 1) / 2 * tl.max(surest, 1)
        conflict = tl.where(conflict <= 1, conflict, 1.0) * behind[m]  # 1 where it is NaN
        conflict = tl.where(present[m] & (number_left > 2), conflict, 0.0)
        able = tl.minimum(2.0 * tl.load(skill + m) / tl.where(best > 0, best, 1.0), 1.0)
        conflict *= tl.where(best > 0, able * able, 1.0)
        evidence += (-settings.disagreement_slope * conflict,)
        top = tl.where(present[m], tl.maximum(top, evidence[m]), top)
    total = tl.zeros([group], tl.float32)
    for m in tl.static_range(count):
        total += tl.where(present[m], tl.exp(evidence[m] - top), 0.0)
    reweighed: tl.tuple = ()
    highest = tl.full([group], _LOWEST, tl.float32)
    for m in tl.static_range(count):
        kept = present[m] & (tl.exp(evidence[m] - top) / total >= settings.threshold)
        logit = evidence[m]
        if penalty is not None:
            logit -= tl.load(penalty + m * batch + i, mask=inside, other=0.0)
        reweighed += (tl.where(kept, logit, float("-inf")),)
        highest = tl.maximum(highest, reweighed[m])
    words: tl.tuple = ()
    whole = tl.zeros([group], tl.float32)
    for m in tl.static_range(count):
        words += (tl.exp(reweighed[m] - highest),)
        whole += words[m]
    for m in tl.static_range(count):
        at = m * batch + i
        tl.store(found.gates + at, words[m] / tl.where(whole > 0, whole, 1.0), mask=inside)
        tl.store(found.scale + at, words[m], mask=inside)  # the largest is 1


@_jit
def _columns(
    logits: tl.tensor,
    stride: tl.tensor,
    row: tl.tensor,
    here: tl.tensor,
    start: tl.tensor,
    classes: tl.tensor,
    lanes: tl.constexpr,
) -> tl.tensor:
    column = start + tl.arange(0, lanes)
    mask = here[:, None] & (column < classes)[None, :]
    at = logits + (row * stride)[:, None] + column[None, :]
    return tl.load(at, mask=mask, other=float("-inf")).to(tl.float32)


@_jit
def _beyond(
    prior: tl.tensor, x: tl.tensor, start: tl.tensor, classes: tl.tensor, lanes: tl.constexpr
) -> tl.tensor:
    """Logits less the prior of their classes, if there is one."""
    if prior is not None:
        column = start + tl.arange(0, lanes)
        x -= tl.load(prior + column, mask=column < classes, other=0.0)[None, :]
    return x
