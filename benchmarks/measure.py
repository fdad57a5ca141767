"""Ratios that hold on a noisy machine, memory, and launches."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from .cases import Step

_TURN = 0.01  # seconds


@dataclass
class Timing:
    """Median microseconds of a step, and its ratio to the baseline with quartiles."""

    us: float
    ratio: float
    low: float
    high: float


def compare(steps: Mapping[str, Step], device: str, seconds: float) -> dict[str, Timing]:
    """Time the contestants in turn, round after round; the first is the baseline.

    A ratio is the median of those within a round, so that a slow minute hits all alike. Turns
    are as short as a clock allows, one call of a slow step, for as many rounds as there is time
    for: fifteen long ones left several percent of noise.
    """
    once = {}
    for name, step in steps.items():
        _time(step, 2, device)  # warm up, compile
        once[name] = _time(step, 2, device)
    calls = {name: max(1, int(_TURN / elapsed)) for name, elapsed in once.items()}
    rounds = max(5, int(seconds / sum(calls[name] * once[name] for name in steps)))
    names = list(steps)
    times = np.empty((rounds, len(names)))
    for k in range(rounds):
        for j in np.roll(np.arange(len(names)), k):
            times[k, j] = _time(steps[names[j]], calls[names[j]], device)
    ratios = times / times[:, :1]
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75), axis=0)
    us = 1e6 * np.median(times, axis=0)
    return {
        name: Timing(float(us[j]), float(middle[j]), float(low[j]), float(high[j]))
        for j, name in enumerate(names)
    }


def _time(step: Step, calls: int, device: str) -> float:
    _wait(device)
    started = time.perf_counter()
    for _ in range(calls):
        step()
    _wait(device)
    return (time.perf_counter() - started) / calls


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def launches(step: Step, device: str) -> int:
    """Operators that run in a step (CPU), or kernels that it launches (CUDA)."""
    step()
    activities = [ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as seen:
        step()
        _wait(device)
    if device == "cuda":
        kernels = (e for e in seen.key_averages() if e.device_type.name == "CUDA")
        return sum(event.count for event in kernels)  # without the calls that launch them
    return sum(event.name.startswith("aten::") and not event.cpu_parent for event in seen.events())


def extra_memory(step: Step, device: str) -> int:
    """Peak bytes that a step holds beyond the gradients that it returns.

    On a CPU, what torch allocates: of the C kernels' see ``native_scratch``.
    """
    step()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = step()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            result = step()
        held = np.cumsum([e.nbytes() for e in seen.profiler.kineto_results.events() if _memory(e)])
        peak = int(held.max(initial=0))
    return max(0, peak - sum(x.numel() * x.element_size() for x in result))


def native_scratch(batch: int, classes: int, heads: int, holds_out: bool) -> int:
    """Bytes that the C kernels allocate on one thread, unseen by torch.

    What weighs the samples, a row of the pool where some are held out, and where the gradients
    are not made ahead two heads' softmaxes of a few rows: those are freed before the gradients
    are allocated, so that they do not add to the peak while they are smaller than it.
    """
    from dyncim_core.kernels import native  # where there is a compiler

    weighing = batch * (3 * 4 + 4) + 4 * classes * holds_out
    if heads * batch * classes <= native.AHEAD:
        return weighing
    return weighing + 2 * 4 * max(classes, 2**13)


def _memory(event: Any) -> bool:
    return bool(event.name() == "[memory]")
