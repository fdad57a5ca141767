"""The cases of ``benchmarks.overhead`` under pytest-benchmark: ``python -m pytest benchmarks``.

Compare the rows of one group of one run: ``--benchmark-group-by=group,param:batch``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dyncim_core import CurriculumState, backends

from . import cases, overhead
from .measure import compare, extra_memory, launches

SIZES = [(64, 6, 2), (64, 101, 3), (256, 1000, 2)]
by_size = pytest.mark.parametrize(("batch", "classes", "modalities"), SIZES)
Benchmark = Callable[[Callable[[], object]], Any]


def _alike(ours: Tensor, theirs: Tensor) -> float:
    return float(F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0))


@by_size
@pytest.mark.parametrize("contestant", ["cross-entropies", "autograd", "eager", "native"])
@pytest.mark.benchmark(group="loss, forward and backward")
def test_loss(
    benchmark: Benchmark, contestant: str, batch: int, classes: int, modalities: int
) -> None:
    if contestant == "native" and backends()["native"] != "available":
        pytest.skip(backends()["native"])
    logits, target = cases.heads(batch, classes, modalities, "cpu")
    state = CurriculumState(modalities)
    if contestant == "cross-entropies":
        step = cases.cross_entropies(logits, target)
    elif contestant == "autograd":
        step = cases.autograd(logits, target)
    else:
        step = cases.loss(logits, target, contestant, state)
    grads = step()
    if contestant in ("eager", "native"):
        assert state.step == 1
        assert (state.log_quality < 0).all()
        expected = cases.loss(logits, target, "eager")()
        torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-8)
    # On fresh noise no sample and no modality stands out: all are near the plain gradient.
    plain = cases.cross_entropies(logits, target)()
    assert all(_alike(*pair) > 0.8 for pair in zip(grads, plain, strict=True))
    benchmark(step)


@by_size
@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.benchmark(group="head statistics")
def test_statistics(
    benchmark: Benchmark, backend: str, batch: int, classes: int, modalities: int
) -> None:
    if backends()[backend] != "available":
        pytest.skip(backends()[backend])
    logits, target = cases.heads(batch, classes, modalities, "cpu")
    found = benchmark(cases.statistics(logits, target, backend))
    torch.testing.assert_close(found.nll[0], F.cross_entropy(logits[0], target, reduction="none"))


@by_size
@pytest.mark.parametrize("samples", [None, 10_000], ids=["averages", "averages and memory"])
@pytest.mark.benchmark(group="what the per-sample memory costs")
def test_memory(
    benchmark: Benchmark, samples: int | None, batch: int, classes: int, modalities: int
) -> None:
    logits, target = cases.heads(batch, classes, modalities, "cpu")
    state = CurriculumState(modalities, num_samples=samples)
    benchmark(cases.loss(logits, target, None, state))
    if samples is not None:
        assert (state.memory_visits[:batch] == state.step).all()
        assert not state.memory_visits[batch:].any()


@by_size
@pytest.mark.parametrize("gated", [False, True], ids=["concatenation", "GatedFusion"])
@pytest.mark.benchmark(group="fusion, forward and backward")
def test_fusion(
    benchmark: Benchmark, gated: bool, batch: int, classes: int, modalities: int
) -> None:
    size = (batch, classes, modalities, 128, "cpu")
    grads = benchmark(cases.fusion(gated, *size))
    assert len(grads) == modalities + 2  # each modality's features, and the head's parameters
    assert all(grad.isfinite().all() and grad.any() for grad in grads)


@by_size
@pytest.mark.parametrize("gated", [False, True], ids=["concatenation", "GatedFusion"])
@pytest.mark.benchmark(group="fusion, inference")
def test_inference(
    benchmark: Benchmark, gated: bool, batch: int, classes: int, modalities: int
) -> None:
    (logits,) = benchmark(cases.fusion(gated, batch, classes, modalities, 128, "cpu", trains=False))
    assert logits.shape == (batch, classes)
    assert not logits.requires_grad


@pytest.mark.parametrize("contestant", ["cross-entropies", "DynCIMLoss"])
def test_losses_after_linear_heads(contestant: str) -> None:
    size = (64, 101, 2, 32, "cpu")
    grads, plain = (cases.from_features(x, *size)() for x in (contestant, "cross-entropies"))
    assert all(_alike(*pair) > 0.8 for pair in zip(grads, plain, strict=True))


# One batch of random labels over and over: known by heart but for those in doubt, it swings later.
@pytest.mark.parametrize(("curriculum", "steps"), [(False, 30), (True, 20)])
def test_training_steps_train(curriculum: bool, steps: int) -> None:
    shapes = [(1, 64, 32), (1, 16, 16)]
    step = cases.training_step(curriculum, cases.digit_encoder, shapes, 16, 4, "cpu", lr=0.05)
    first, *_, last = [float(step()[0]) for _ in range(steps)]
    assert last < 0.8 * first


def test_measures_tell_contestants_apart() -> None:
    logits, target = cases.heads(64, 1000, 2, "cpu")
    steps = {
        "plain": cases.cross_entropies(logits, target),
        "eager": cases.loss(logits, target, "eager"),
    }
    found = compare(steps, "cpu", seconds=0.1)
    assert found["plain"].ratio == 1.0
    assert found["eager"].low <= found["eager"].ratio <= found["eager"].high
    assert launches(steps["plain"], "cpu") < launches(steps["eager"], "cpu")
    size = sum(x.numel() * x.element_size() for x in logits)
    share = extra_memory(steps["plain"], "cpu") / size
    assert 0.5 < share < 0.8  # the log-probabilities that cross-entropy keeps


def test_a_bar_holds_the_cells_that_it_concerns() -> None:
    rows = [
        {"batch": 64, "classes": c, "modalities": 2, "native": {"ratio": ratio}}
        for c, ratio in ((6, 0.95), (101, 0.9), (1000, 0.61))
    ]
    found = {row["bar"]: row for row in overhead.verdicts({"loss": rows}, "cpu")}
    assert found["cpu: C kernel, C <= 101"]["met"] == "1 of 2"
    assert found["cpu: C kernel, C <= 101"]["worst"] == 0.95
    assert found["cpu: C kernel, C >= 1000"]["met"] == "0 of 1"
    assert found["cpu: GatedFusion"]["met"] == "unmeasured"
    assert found["cuda: Triton, C >= 4096"]["met"] == "unmeasured"


@pytest.mark.parametrize("build", [overhead.bandwidth_steps, overhead.peer_steps])
def test_tables_for_a_gpu_time_every_contestant(
    build: Callable[[overhead.Cell, str], overhead.Steps],
) -> None:
    cell = overhead.Cell(64, 101)
    (row,) = overhead.timed("table", [cell], build, "cpu", seconds=0.02)
    steps = build(cell, "cpu")
    assert len(steps) > 1
    assert all(row[name]["us"] > 0 for name in steps)


def test_growth_is_the_exponent_of_each_size() -> None:
    rows = [
        {"batch": b, "classes": c, "modalities": m}
        | {"native": {"us": 3.0 * b * c**1.5 * (1 + m) ** 0.5}}
        for b in (64, 256)
        for c in (6, 101, 1000)
        for m in (1, 8)
    ]
    (found,) = overhead.growth(rows)
    assert found == pytest.approx(
        {"contestant": "native", "batch": 1.0, "classes": 1.5, "heads": 0.5, "steepest": 1.5}
    )


def test_the_command_measures_prints_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = overhead.QUICK._replace(seconds=0.05, training=[overhead.DIGITS])
    monkeypatch.setattr(overhead, "QUICK", plan)
    threads = torch.get_num_threads()
    overhead.main(["--quick", "--device", "cpu", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "cpu.json").read_text())
    overhead.main(["--again", "--device", "cpu", "--out", str(tmp_path)])
    assert capsys.readouterr().out == printed
    assert json.loads((tmp_path / "cpu.json").read_text()) == found
    assert (tmp_path / "overhead-cpu.png").stat().st_size > 10_000
    assert {"loss", "fusion", "inference", "training", "resources", "bars"} <= found.keys()
    assert "## bars" in printed
    assert "| 256 | 1000 | 2 |" in printed
    for table in ("loss", "fusion", "training"):
        assert len(found[table]) == len(getattr(plan, table))
