"""The cases of ``benchmarks.overhead`` under pytest-benchmark: ``python -m pytest benchmarks``.

Wall-clock times on shared machines drift; compare the rows of one group of one run.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dyncim_core import backends

from . import cases
from .measure import compare, extra_memory, launches

SIZES = [(64, 6, 2), (64, 101, 3), (256, 1000, 2)]
by_size = pytest.mark.parametrize(("batch", "classes", "modalities"), SIZES)
Benchmark = Callable[[Callable[[], object]], object]


@by_size
@pytest.mark.parametrize("contestant", ["cross-entropies", "autograd", "eager", "native"])
@pytest.mark.benchmark(group="loss, forward and backward")
def test_loss(
    benchmark: Benchmark, contestant: str, batch: int, classes: int, modalities: int
) -> None:
    if contestant == "native" and backends()["native"] != "available":
        pytest.skip(backends()["native"])
    logits, target = cases.heads(batch, classes, modalities, "cpu")
    if contestant == "cross-entropies":
        step = cases.cross_entropies(logits, target)
    elif contestant == "autograd":
        step = cases.autograd(logits, target)
    else:
        step = cases.loss(logits, target, contestant)
    grads = step()
    benchmark(step)
    # On fresh noise no sample and no modality stands out: all are near the plain gradient.
    plain = cases.cross_entropies(logits, target)()
    for ours, theirs in zip(grads, plain, strict=True):
        assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.8


@by_size
@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.benchmark(group="head statistics")
def test_statistics(
    benchmark: Benchmark, backend: str, batch: int, classes: int, modalities: int
) -> None:
    if backends()[backend] != "available":
        pytest.skip(backends()[backend])
    logits, target = cases.heads(batch, classes, modalities, "cpu")
    benchmark(cases.statistics(logits, target, backend))


@by_size
@pytest.mark.parametrize("memory", [None, 10_000], ids=["state", "state and memory"])
@pytest.mark.benchmark(group="what the per-sample memory costs")
def test_memory(
    benchmark: Benchmark, memory: int | None, batch: int, classes: int, modalities: int
) -> None:
    logits, target = cases.heads(batch, classes, modalities, "cpu")
    benchmark(cases.loss(logits, target, None, samples=memory))


@by_size
@pytest.mark.parametrize("gated", [False, True], ids=["concatenation", "GatedFusion"])
@pytest.mark.benchmark(group="fusion, forward and backward")
def test_fusion(
    benchmark: Benchmark, gated: bool, batch: int, classes: int, modalities: int
) -> None:
    benchmark(cases.fusion(gated, batch, classes, modalities, 128, "cpu"))


def test_measures_tell_contestants_apart() -> None:
    logits, target = cases.heads(64, 1000, 2, "cpu")
    steps = {
        "plain": cases.cross_entropies(logits, target),
        "again": cases.cross_entropies(logits, target),
        "eager": cases.loss(logits, target, "eager"),
    }
    found = compare(steps, "cpu", seconds=0.3, rounds=5)
    assert found["plain"].ratio == 1.0
    assert launches(steps["plain"], "cpu") < launches(steps["eager"], "cpu")
    size = sum(x.numel() * x.element_size() for x in logits)
    share = extra_memory(steps["plain"], "cpu") / size
    assert 0.5 < share < 0.8  # the log-probabilities that cross-entropy keeps


def test_the_command_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.overhead", "--quick", "--out", str(tmp_path)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)  # noqa: S603
    assert "## bars" in done.stdout
    assert (tmp_path / "cpu.json").exists()
