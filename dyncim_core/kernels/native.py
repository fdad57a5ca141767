"""The kernels in C, for float32 logits on a CPU: hands addresses to ``_native.c``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from dyncim_core.kernels import _native, eager
from dyncim_core.kernels.interface import (
    GROUPS,
    HEARD,
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


_INTERFACE = 14  # raised, as in _native.c, when what a call passes, or a formula, changes
if getattr(_native, "INTERFACE", None) != _INTERFACE:
    raise ImportError("the C kernels were built for other sources; install the package again")

# Logits that pay for handing them to another thread.
_WORTH_A_THREAD = 2**19
# Logits whose gradients are made with the curriculum, while a cache holds them.
AHEAD = 2**22

_address = Tensor.data_ptr
_dtype = attrgetter("dtype")
_numel = Tensor.numel
_is_contiguous = Tensor.is_contiguous
_requires_grad = attrgetter("requires_grad")


def statistics(
    logits: Sequence[Tensor], present: Tensor | None, criterion: Criterion
) -> Statistics:
    """What each head says about each sample."""
    return Statistics(*_statistics(_Problem(logits, present, criterion)))


def curriculum(
    logits: Sequence[Tensor],
    present: Tensor | None,
    criterion: Criterion,
    buffers: Buffers,
    memory: Memory | None,
    settings: Settings,
) -> Curriculum:
    """Weigh the samples by what the state knows; then take the batch into the state.

    On one thread the gradients are made ahead, for an incoming one of 1, from the exponentials
    at hand.
    """
    _check_state(buffers, memory, len(logits))
    problem = _Problem(logits, present, criterion)
    heads, batch = len(logits), problem.batch
    empty = logits[0].new_empty  # sooner than _empty, and of the same dtype and device
    coefficient = empty(heads, batch)
    scalar = buffers.label_noise  # what is like it is made sooner than of shape ()
    value = empty(batch) if settings.reduction == "none" else torch.empty_like(scalar)
    rows_at = prediction_at = normaliser_at = 0
    ahead: tuple[Tensor, ...] | None = None
    normaliser: Normaliser
    if _parts(problem) > 1:
        rows, prediction, normaliser = _statistics(problem)
        rows_at, prediction_at = rows.data_ptr(), prediction.data_ptr()
    elif heads * batch * problem.classes <= AHEAD and all(map(_requires_grad, logits)):
        ahead = problem.empty()
        normaliser = [ahead]
    else:  # all in one call
        normaliser = _empty(heads, batch, dtype=torch.float64)
        normaliser_at = normaliser.data_ptr()
    remembered = None
    if memory is not None:
        memory = memory._replace(rows=memory.rows.contiguous())
        remembered = [memory.nll.shape[0], *map(_address, memory)]
    rejected = _native.curriculum(
        *problem.whole,
        rows_at,
        prediction_at,
        normaliser_at,
        buffers.seen.shape[0],
        [*map(_address, buffers)],
        remembered,
        settings,
        coefficient.data_ptr(),
        value.data_ptr(),
        None if ahead is None else [*map(_address, ahead)],
    )
    if rejected:
        raise _out_of_range(rejected, problem, memory)
    return Curriculum(value, coefficient, normaliser)


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
    # A scalar, [B] or [M + 1, B]: strides of 0 over what it lacks.
    head_stride, sample_stride = (0, 0, *grad.stride())[-2:]
    if isinstance(normaliser, list):
        try:
            ahead = normaliser.pop()
        except IndexError:  # taken before: made again below
            pass
        else:
            at = [*map(_address, ahead)]
            batch, classes = ahead[0].shape
            _native.scale(at, batch, classes, grad.data_ptr(), head_stride, sample_stride, guard)
            return [*ahead]
    logits, criterion = _as_they_were(logits, criterion)
    problem = _Problem(logits, None, criterion)
    coefficient = None if coefficient is None else coefficient.contiguous()
    grads = [*problem.empty()]
    arguments = (
        grad.data_ptr(),
        head_stride,
        sample_stride,
        0 if coefficient is None else coefficient.data_ptr(),
        normaliser.data_ptr() if isinstance(normaliser, Tensor) else 0,
        guard,
        [*map(_address, grads)],
    )
    if isinstance(normaliser, Tensor):
        held = grad, coefficient, normaliser, grads
        rejected = _in_parts(_native.gradients, problem, held, *arguments)
    else:  # made anew as before, of all samples at once
        rejected = _native.gradients(*problem.whole, *arguments)
    if rejected:
        raise _out_of_range(rejected, problem, None)
    return grads


def _as_they_were(
    logits: Sequence[Tensor], criterion: Criterion
) -> tuple[Sequence[Tensor], Criterion]:
    """What was saved for the backward, which hooks may have packed in another dtype."""
    target = criterion.target
    if any(x.dtype != torch.float32 for x in logits):
        logits = [x.float() for x in logits]
    if target.dtype != torch.int64:
        criterion = criterion._replace(target=target.long())
    shapes = {x.shape for x in logits}
    if len(shapes) != 1 or target.shape != logits[0].shape[:1]:
        found = [list(x.shape) for x in (*logits, target)]
        raise RuntimeError(f"logits: expected those of the forward and their target, got {found}")
    return logits, criterion


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
    problem = _Problem(logits, available, None)
    shape = len(problem.logits), problem.batch
    empty = logits[0].new_empty  # sooner than _empty, and of the same dtype and device
    gates, scale = empty(shape), empty(shape)
    source = None
    if penalty is not None:
        penalty = penalty.contiguous()
    if chance is not None and settings.swap:
        source = _empty(*shape, dtype=torch.int64)
    prior = kept.log_prior
    count = len(logits)
    _check_kept("fusion", kept[:2], (_FLOAT, _FLOAT), (count, count))
    if prior is not None:
        if prior.shape != _OF_GROUPS:
            raise ValueError(f"log_prior: expected shape [{GROUPS}], got {list(prior.shape)}")
        _check_kept("fusion", (prior,), (_FLOAT,), _OF_GROUPS)
    if learnt is not None:
        heads = 1 + count
        _check_kept("state", learnt, _LEARNT, (heads, heads, heads, GROUPS, GROUPS, heads))
    _in_parts(
        _native.gate,
        problem,
        (kept, learnt, source, chance, penalty, gates, scale),
        kept.skill.data_ptr(),
        kept.logit_factor.data_ptr(),
        0 if prior is None else prior.data_ptr(),
        None if learnt is None else [*map(_address, learnt)],
        0 if chance is None else chance.data_ptr(),
        0 if penalty is None else penalty.data_ptr(),
        0 if source is None else source.data_ptr(),
        settings,
        gates.data_ptr(),
        scale.data_ptr(),
    )
    return Gating(gates, scale, source)


def mix(
    streams: Sequence[Tensor],
    logits: Sequence[Tensor],
    scale: Tensor,
    logit_factor: Tensor,
    log_prior: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Streams, scaled and next to each other; logits less the prior, scaled and added up."""
    widths = [x.shape[-1] for x in streams]
    if _torch_spreads(sum(map(Tensor.numel, streams))):
        return eager.mix(streams, logits, scale, logit_factor, log_prior)
    fused = scale.new_empty((*streams[0].shape[:-1], sum(widths)))
    total = scale.new_empty(logits[0].shape) if logits else None
    streams, logits = [*map(_contiguous, streams)], [*map(_contiguous, logits)]
    _check_kept("logit_factor", (logit_factor,), (_FLOAT,), scale.shape[:1])
    if log_prior is not None:
        _check_kept("log_prior", (log_prior,), (_FLOAT,), log_prior.shape)
        if total is not None and log_prior.shape[0] < total.shape[1]:
            got = list(log_prior.shape)
            raise ValueError(f"log_prior: expected {total.shape[1]} classes or more, got {got}")
    _mix(streams, widths, fused, scale, logits, total, logit_factor, log_prior)
    return fused, total


def unmix(grad: Tensor, widths: Sequence[int], scale: Tensor) -> list[Tensor]:
    """Gradients of the streams from that of what ``mix`` made of them."""
    if _torch_spreads(grad.numel()):
        return eager.unmix(grad, widths, scale)
    found = [scale.new_empty((*grad.shape[:-1], width)) for width in widths]
    _mix(found, widths, _contiguous(grad), scale, backward=True)
    return found


def _contiguous(x: Tensor) -> Tensor:
    """The same in memory as it reads; asking whether it is comes cheaper than an operator."""
    return x if x.is_contiguous() and not x.is_neg() else x.resolve_neg().contiguous()


def _torch_spreads(numbers: int) -> bool:
    """Whether torch does better, which spreads so much over threads."""
    return numbers > _WORTH_A_THREAD and torch.get_num_threads() > 1


def _mix(
    streams: Sequence[Tensor],
    widths: Sequence[int],
    fused: Tensor,
    scale: Tensor,
    logits: Sequence[Tensor] = (),
    total: Tensor | None = None,
    logit_factor: Tensor | None = None,
    log_prior: Tensor | None = None,
    backward: bool = False,
) -> None:
    _native.mix(
        [*map(_address, streams)],
        [*map(_address, logits)],
        [*widths],
        scale.shape[1],
        1 if fused.dim() == 2 else fused.shape[1],
        0 if total is None else total.shape[1],
        fused.data_ptr(),
        0 if total is None else total.data_ptr(),
        scale.data_ptr(),
        0 if logit_factor is None else logit_factor.data_ptr(),
        0 if log_prior is None else log_prior.data_ptr(),
        backward,
    )


def observe(
    features: Sequence[Tensor],
    steps: Sequence[int],
    available: Tensor | None,
    moments: Moments,
    window: float,
) -> None:
    """Take features into their running moments."""
    if available is not None:
        available = available.contiguous()
    _native.observe(
        *_watched(features, steps, moments, window),
        0 if available is None else available.data_ptr(),
    )


def novelty(
    features: Sequence[Tensor], steps: Sequence[int], moments: Moments, window: float
) -> Tensor:
    """How far features lie from those seen in training, see ``gates.novelty``."""
    found = _empty(len(features), len(features[0]))
    _native.novelty(*_watched(features, steps, moments, window), found.data_ptr())
    return found


def _watched(
    features: Sequence[Tensor], steps: Sequence[int], moments: Moments, window: float
) -> tuple[Any, ...]:
    """What ``observe`` and ``novelty`` have in common."""
    count, width = len(features), moments.total.shape[-1]
    sizes = count, count * width, count * width * width
    _check_kept("moments", moments, (_FLOAT,) * 3, sizes)
    return (
        [*map(_address, features)],
        [(*x.shape, *x.stride(), step) for x, step in zip(features, steps, strict=True)],
        window,
        moments.total.shape[1],
        *map(_address, moments),
    )


def _check_kept(
    name: str, buffers: Sequence[Tensor], dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...]
) -> None:
    """Refuse what is kept from step to step unless it lies in memory as C takes it."""
    if (
        tuple(map(_dtype, buffers)) == dtypes
        and tuple(map(_numel, buffers)) == sizes
        and all(map(_is_contiguous, buffers))
    ):
        return
    for x, dtype, size in zip(buffers, dtypes, sizes, strict=True):
        if x.dtype != dtype or not x.is_contiguous():
            kind = str(dtype).removeprefix("torch.")
            got = f"{x.dtype} with strides {x.stride()}"
            raise TypeError(f"{name}: expected contiguous {kind} buffers, got {got}")
        if x.numel() != size:
            raise ValueError(f"{name}: expected buffers of length {size}, got {x.numel()}")


_FLOAT, _INT = torch.float32, torch.int64
_OF_GROUPS = (GROUPS,)
_LEARNT = (_FLOAT, _FLOAT, _FLOAT, _INT, _FLOAT, _FLOAT)
_OF_STATE = (
    *(_FLOAT, _FLOAT, _INT),  # log_quality, quality, seen
    *(_FLOAT,) * 5,  # signal_mean to effective_share
    *(_INT, _INT),  # step, nonfinite
    *(_FLOAT,) * 4,  # held_out_averages to log_class_average
    *(_INT, _FLOAT),  # class_seen, class_weight
)


@lru_cache
def _sizes_of_state(heads: int) -> tuple[int, ...]:
    each, groups = (heads,) * 3, (GROUPS,) * 3
    return (*each, 3, 3, 1, 1, 1, 1, 1, HEARD * heads, heads, heads, *groups)


def _check_state(buffers: Buffers, memory: Memory | None, heads: int) -> None:
    known = buffers.seen.shape[0]
    if known < heads:
        raise ValueError(f"state: expected buffers of {heads} heads, got {known}")
    _check_kept("state", buffers, _OF_STATE, _sizes_of_state(known))
    if memory is not None:
        samples = memory.nll.shape[0]
        sizes = samples * known, samples * known, samples
        _check_kept("state", memory[1:], (_FLOAT, torch.int32, _FLOAT), sizes)


class _Problem:
    """The arguments common to all calls; holds the tensors whose addresses they are.

    Attributes:
        whole: As ``_native.c`` takes them, to work on all samples.
    """

    __slots__ = ("batch", "classes", "ignore_index", "logits", "others", "target", "whole")

    def __init__(
        self, logits: Sequence[Tensor], present: Tensor | None, criterion: Criterion | None
    ) -> None:
        target, weight, ignore_index, smoothing = criterion or (None, None, 0, 0.0)
        self.batch, self.classes = batch, classes = logits[0].shape
        strides = [classes] * len(logits)
        if not all(map(_is_contiguous, logits)):
            logits = [x if x.stride(1) == 1 else x.contiguous() for x in logits]
            strides = [x.stride(0) for x in logits]
        if target is not None:
            target = target.contiguous()
        if present is not None:
            present = present.contiguous()
        if weight is not None:
            weight = _contiguous(weight.to(torch.float32))
        at = [*map(_address, logits)]
        if 0 in at and batch * classes:
            logits = [x.clone() for x in logits]
            at = [*map(_address, logits)]
        self.logits, self.target, self.others = logits, target, (present, weight)
        self.ignore_index = ignore_index
        self.whole = (
            at,
            strides,
            batch,
            classes,
            0,
            batch,
            0 if target is None else target.data_ptr(),
            0 if present is None else present.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            ignore_index,
            smoothing,
        )

    def empty(self) -> tuple[Tensor, ...]:
        """Room for the gradients."""
        batch, classes = self.batch, self.classes
        return tuple([x.new_empty(batch, classes) for x in self.logits])

    def part(self, start: int, stop: int) -> tuple[Any, ...]:
        """The same, to work on these samples."""
        return (*self.whole[:4], start, stop, *self.whole[6:])


def _statistics(problem: _Problem) -> tuple[Tensor, Tensor, Tensor]:
    shape = len(problem.logits), problem.batch
    rows = _empty(4, *shape)
    prediction = _empty(*shape, dtype=torch.int64)
    normaliser = _empty(*shape, dtype=torch.float64)
    found = rows, prediction, normaliser
    rejected = _in_parts(_native.statistics, problem, found, *map(_address, found))
    if rejected:
        raise _out_of_range(rejected, problem, None)
    return rows, prediction, normaliser


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for a kernel to write, whatever defaults of dtype and device are set."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _in_parts(
    call: Callable[..., str | None], problem: _Problem, held: object, *arguments: Any
) -> str | None:
    """The call, over parts of the batch side by side when there is work enough.

    ``held`` are the tensors behind the addresses in ``arguments``: an interrupt leaves this
    frame, not the threads at work on them.
    """
    batch, parts = problem.batch, _parts(problem)
    if parts == 1:
        return call(*problem.whole, *arguments)
    ends = [batch * k // parts for k in range(parts + 1)]

    def work(span: tuple[int, int], _held: object = (problem, held)) -> str | None:
        return call(*problem.part(*span), *arguments)

    spans, pool, calls = [*pairwise(ends)], _pool(torch.get_num_threads()), []
    try:
        for span in spans:
            calls.append(pool.submit(work, span))  # noqa: PERF401 (those that start are waited for)
    except RuntimeError as error:  # the main thread has ended, after which no other starts
        if "shutdown" not in str(error):
            raise
        rejected = [work(span) for span in spans[len(calls) :]]
    else:
        rejected = []
    rejected += [part.result() for part in calls]
    return next(filter(None, rejected), None)


def _parts(problem: _Problem) -> int:
    work = len(problem.logits) * problem.batch * problem.classes // _WORTH_A_THREAD
    return min(torch.get_num_threads(), problem.batch, work) if work > 1 else 1


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="dyncim_core")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _out_of_range(name: str, problem: _Problem, memory: Memory | None) -> IndexError:
    values = problem.target
    assert values is not None  # noqa: S101
    expected = f"class indices in [0, {problem.classes}) or ignore_index={problem.ignore_index}"
    if name == "index" and memory is not None:
        values, expected = memory.rows, f"sample indices in [0, {len(memory.nll)})"
    return IndexError(
        f"{name}: expected {expected}, got values from {int(values.min())} to {int(values.max())}"
    )
