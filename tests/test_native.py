"""C against plain PyTorch at the edges: what is not finite, nothing at all, ties and bounds."""

from __future__ import annotations

import bisect
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from inputs import randn
from numpy.testing import assert_allclose
from torch import Tensor, nn

from dyncim_core import CurriculumState, DynCIMLoss, held_out
from dyncim_core.kernels import eager
from dyncim_core.kernels.interface import HEARD, Criterion, Gate, Kept, Learnt, Moments, Settings


@pytest.fixture
def native() -> ModuleType:
    return pytest.importorskip("dyncim_core.kernels.native")


PLAIN = Settings(4.0, None, 0.2, 0.5, False, 0.9, 0.8, "mean")


def assert_alike(
    native: ModuleType,
    logits: list[Tensor],
    criterion: Criterion,
    settings: Settings = PLAIN,
    present: Tensor | None = None,
    index: Tensor | None = None,
    grad: Tensor | None = None,
    steps: int = 1,
    rtol: float = 1e-4,
    atol: float = 1e-6,
    **known: Any,
) -> CurriculumState:
    """Takes steps in C and in PyTorch; what is found and kept must be alike. The state in C."""
    kept = []
    for backend in (native, eager):
        state = CurriculumState(max(1, len(logits) - 1), num_samples=200)
        for name, x in known.items():
            getattr(state, name).copy_(torch.as_tensor(x))
        memory = None if index is None else state.memory(index)
        found: list[Tensor] = []
        for _ in range(steps):
            leaves = [x.clone().requires_grad_() for x in logits]
            joint = backend.curriculum(
                leaves, present, criterion, state.averages(), memory, settings
            )
            found += [joint.value, joint.coefficient]
            if grad is not None:
                guard = present is not None or settings.skip_nonfinite or settings.held_out > 0.0
                found += backend.gradients(
                    grad, joint.coefficient, joint.normaliser, leaves, criterion, guard
                )
        kept.append((state, found))
    (ours, mine), (theirs, others) = kept
    for x, y in zip(mine, others, strict=True):
        assert_allclose(x.detach(), y.detach(), rtol=rtol, atol=atol)
    for (name, x), (_, y) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=name)
    return ours


@pytest.mark.parametrize("masked", [False, True])
def test_an_incoming_gradient_of_0_meets_logits_of_nan(native: ModuleType, masked: bool) -> None:
    logits = [randn(4, 5, seed=s) for s in range(2)]
    logits[0][1:3] = math.nan
    criterion, settings = Criterion(torch.tensor([0, 1, -100, 3])), PLAIN._replace(reduction="none")
    present = torch.ones(2, 4, dtype=torch.bool) if masked else None
    grad = torch.tensor([1.0, 0.0, 1.0, 2.0])
    assert_alike(native, logits, criterion, settings, present, grad=grad)


def test_the_share_held_out_ends_where_it_says(native: ModuleType) -> None:
    index = torch.arange(8)
    logits, criterion = [torch.zeros(8, 2)] * 2, Criterion(torch.zeros_like(index))
    for i in range(8):
        first = bisect.bisect_left(
            range(2**32), True, key=lambda n: bool(held_out(index[i], n / 2**32))
        )
        for below in (first - 1, first):
            state, share = CurriculumState(1, num_samples=8), below / 2**32
            settings = PLAIN._replace(reduction="sum", held_out=share)
            joint = native.curriculum(
                logits, None, criterion, state.averages(), state.memory(index), settings
            )
            assert torch.equal(joint.coefficient[0] == 0.0, held_out(index, share))


@pytest.mark.parametrize("noise", [None, 0.1])
@pytest.mark.parametrize(
    "skill",
    [[0.1, 0.9, 0.2, 0.1], [0.9, 0.3, 0.2, 0.1], [0.1, 0.75, 0.375, 0.3], [0.05, 0.1, 0.1, 0.1]],
)
def test_who_is_asked_depends_on_skill(
    native: ModuleType, skill: list[float], noise: float | None
) -> None:
    logits = [2.0 * randn(60, 2, seed=s) for s in range(4)]
    criterion, index = Criterion(torch.arange(60) % 2), torch.arange(60)
    settings = PLAIN._replace(label_noise=noise, held_out=0.5)
    state = assert_alike(native, logits, criterion, settings, index=index, skill=skill)
    assert state.held_out_averages[5, 0] > 0.0


@pytest.mark.parametrize("seen", [(10**6, 0), (499_974, 500_024)])
def test_next_to_no_skill_is_none(native: ModuleType, seen: tuple[int, int]) -> None:
    index = torch.arange(200)[held_out(torch.arange(200), 0.5)][:40]
    logits = [torch.tensor([[1.0, 0.0]]).repeat(40, 1)] * 2
    target = torch.zeros(40, dtype=torch.int64)
    if seen[1]:
        target[::2] = 1
    known = torch.zeros(1024, dtype=torch.int64)
    known[:2] = torch.tensor(seen)
    settings = PLAIN._replace(held_out=0.5)
    state = assert_alike(
        native, logits, Criterion(target), settings, index=index, atol=1e-4, class_seen=known
    )
    assert (state.skill == 0.0).all() if seen[1] else (state.skill < 0.01).all()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", ["ignored", "worthless", "held"])
def test_a_mean_over_nothing(native: ModuleType, kind: str, skip: bool) -> None:
    logits = [randn(6, 3, seed=s) for s in range(2)]
    logits[0][:3] = math.nan
    target = torch.tensor([0, 1, 2, 0, 1, -1])
    weight = torch.zeros(3) if kind == "worthless" else None
    present = torch.ones(2, 6, dtype=torch.bool)
    present[1, 2:4] = False
    settings, index = PLAIN._replace(skip_nonfinite=skip), None
    if kind == "ignored":
        target[:] = -1
    if kind == "held":
        index = torch.arange(200)[held_out(torch.arange(200), 0.5)][:6]
        settings = settings._replace(held_out=0.5)
    criterion = Criterion(target, weight, -1)
    assert_alike(native, logits, criterion, settings, present, index, torch.tensor(1.0))


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("batch", [5, 24])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_largest_loss_is_bounded(
    native: ModuleType, batch: int, share: float, noise: float
) -> None:
    logits = [randn(batch, 2, seed=s) for s in range(3)]
    for x in logits:
        x[: batch // 2 + 1, 0] = -2e38
    criterion, settings = (
        Criterion(torch.zeros(batch, dtype=torch.int64)),
        PLAIN._replace(held_out=share),
    )
    index = torch.arange(batch)
    assert_alike(
        native, logits, criterion, settings, index=index, label_noise=noise, skill=[0.9] * 3
    )


@pytest.mark.parametrize(("scale", "strength"), [(5e-4, 0.5), (1.0, 100.0)])
def test_pacing_is_bounded(native: ModuleType, scale: float, strength: float) -> None:
    logits = [scale * randn(64, 4, seed=s) for s in range(2)]
    settings = PLAIN._replace(surprise_strength=0.0, pacing_strength=strength)
    assert_alike(
        native,
        logits,
        Criterion(torch.zeros(64, dtype=torch.int64)),
        settings,
        rtol=2e-2,
        atol=1e-3,
    )


def test_the_weights_of_all_classes_that_are_told_apart_are_known(native: ModuleType) -> None:
    logits, weight = [randn(4, 1024, seed=s) for s in range(2)], randn(1024).abs()
    state = assert_alike(native, logits, Criterion(torch.tensor([0, 5, 1022, 1023]), weight))
    assert torch.equal(state.class_weight, weight)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("swap", "dropout"), [(0.9, 0.0), (0.0, 0.5), (0.5, 0.5)])
def test_disturbed_gates_are_those_of_eager(
    native: ModuleType, swap: float, dropout: float, masked: bool
) -> None:
    batch, modalities = 64, 4
    generator = torch.Generator().manual_seed(0)
    logits = [3.0 * randn(batch, 5, seed=s) for s in range(modalities)]
    chance = torch.rand(3, batch, generator=generator)
    chance[0, 0] = 1.0 - 2**-24  # the last modality
    chance[1, 1::4] = 1.0 - dropout  # just dropped
    chance[2, 2::4] = 1.0 - 2**-24  # the sample before
    present = torch.rand(modalities, batch, generator=generator) < 0.7 if masked else None
    found = []
    for backend in (native, eager):
        settings, kept = Gate(1.5, 0.05, swap, dropout), kept_of(modalities, skill=0.5)
        found.append(backend.gate(logits, kept, None, present, chance, None, settings))
    ours, theirs = found
    if swap:
        assert torch.equal(ours.source, theirs.source)
        assert (ours.source != torch.arange(batch)).any()
    assert_allclose(ours.gates, theirs.gates, rtol=1e-4, atol=1e-5)


def kept_of(modalities: int, skill: float, prior: Tensor | None = None) -> Kept:
    return Kept(torch.full((modalities,), skill), torch.ones(modalities), prior)


def learnt(modalities: int, **known: Any) -> Learnt:
    quality = torch.linspace(0.9, 0.5, 1 + modalities)
    found = Learnt(
        quality.log(),
        quality,
        torch.linspace(0.9, 0.3, 1 + modalities),
        torch.full((1024,), 3),
        torch.ones(1024),
        torch.linspace(1.0, 0.4, 1 + modalities),
    )
    return found._replace(**known)


@pytest.mark.parametrize(
    "known",
    [
        {},
        {"log_quality": torch.tensor([0.9, 0.2, 0.3, 0.4]).log()},
        {"skill": torch.tensor([0.9, 0.1, 0.05, 0.2])},
        {"skill": torch.tensor([0.95, 1.0, 1.0, 0.999])},
        {"skill": torch.tensor([0.9, 0.0, 0.0, 0.0])},
        {"skill": torch.tensor([0.0, 0.3, 0.1, 0.0])},
        {"skill": torch.zeros(4)},
        {"class_seen": torch.zeros(1024, dtype=torch.int64)},
        {"class_weight": torch.tensor([math.inf, 1.0, -1.0, math.nan]).repeat(256)},
        {"class_seen": 10 ** torch.arange(16).repeat(64)},
    ],
    ids=[
        "plain",
        "redundant",
        "unskilled",
        "skilled",
        "together",
        "apart",
        "ignorant",
        "unseen",
        "odd weights",
        "rare",
    ],
)
def test_what_is_learnt_disturbs_as_in_eager(native: ModuleType, known: dict[str, Tensor]) -> None:
    batch, modalities = 256, 3
    logits = [3.0 * randn(batch, 8, seed=s) for s in range(modalities)]
    chance = torch.rand(3, batch, generator=torch.Generator().manual_seed(0))
    chance[1] = chance[1].pow(3.0)  # near the swaps that are rare
    found = []
    for backend in (native, eager):
        kept = kept_of(modalities, 0.0, torch.zeros(1024))
        args = learnt(modalities, **known), None, chance, None, Gate(1.5, 0.05, 0.5, 0.5)
        found.append((*backend.gate(logits, kept, *args), *kept))
    for ours, theirs in zip(*found, strict=True):
        assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_novelty_has_bounds(native: ModuleType) -> None:
    zeros = [torch.zeros(1), torch.zeros(1, 3), torch.zeros(1, 3, 3)]
    asked = [torch.tensor([[math.nan] * 3, [1e30] * 3, [math.inf] * 3, [1.0] * 3])]
    for offset in (0.0, 1.0, 1e4, 1e6):
        moments = Moments(*(x.clone() for x in zeros))
        if offset:
            known = 0.03 * randn(400, 3) + offset
            eager.observe([known], [1], None, moments, 6400.0)
        ours, theirs = (b.novelty(asked, [1], moments, 6400.0) for b in (native, eager))
        assert_allclose(ours, theirs, rtol=1e-3)
    ours, theirs = Moments(*zeros), Moments(*(x.clone() for x in zeros))
    for backend, moments in ((native, ours), (eager, theirs)):
        backend.observe([torch.tensor([[5e17] * 3, [1e18] * 3])], [1], None, moments, 1.0)
    for x, y in zip(ours, theirs, strict=True):
        assert_allclose(x, y, rtol=1e-4)


@pytest.mark.parametrize("classes", [3, 8, 13, 40])
def test_nan_stays_wherever_it_is(native: ModuleType, classes: int) -> None:
    logits = randn(classes, classes)
    logits.fill_diagonal_(math.nan)
    criterion = Criterion(torch.zeros(classes, dtype=torch.int64))
    ours, theirs = (b.statistics([logits], None, criterion) for b in (native, eager))
    assert ours.rows[:3].isnan().all()
    assert theirs.rows[:3].isnan().all()
    assert ((ours.prediction >= 0) & (ours.prediction < classes)).all()
    args = [logits.clone() for _ in range(2)], criterion, False
    (grad, _) = native.gradients(
        torch.ones(2, classes),
        None,
        native.statistics(*args[:1], None, criterion).normaliser,
        *args,
    )
    assert grad.isnan().all()


@pytest.mark.parametrize("there", [False, True])
def test_a_gate_bears_what_is_not_finite(native: ModuleType, there: bool) -> None:
    logits = [randn(8, 5, seed=s) for s in range(4)]
    logits[0][::2, 1] = math.nan
    logits[1][5:, 4] = math.inf
    present = torch.ones(4, 8, dtype=torch.bool)
    present[0, 1::2] = there  # after a sample that has it
    found = [
        b.gate(logits, kept_of(4, skill=0.5), None, present, None, None, Gate(1.5, 0.05, 0, 0))
        for b in (native, eager)
    ]
    for ours, theirs in zip(found[0][:2], found[1][:2], strict=True):
        assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_logits_without_a_say_may_be_infinite(native: ModuleType) -> None:
    logits = [randn(3, 4, seed=s) for s in range(3)]
    logits[2][1] = -math.inf
    scale = torch.ones(3, 3)
    scale[2, 1] = 0.0
    ours, theirs = (
        b.mix([x.clone() for x in logits], logits, scale, torch.ones(3), None)
        for b in (native, eager)
    )
    assert_allclose(ours[1], theirs[1], rtol=1e-5)


def test_smoothing_sums_many_classes_exactly(native: ModuleType) -> None:
    logits = randn(4, 200_000) - 5.0
    criterion = Criterion(torch.arange(4), label_smoothing=0.5)
    found = native.statistics([logits], None, criterion).rows[0]
    truth = eager.statistics([logits.double()], None, criterion).rows[0]
    assert_allclose(found, truth, rtol=3e-7)


def test_a_loss_that_counts_nothing_is_not_skipped(native: ModuleType) -> None:
    logits = [randn(8, 3, seed=s) for s in range(2)]
    logits[1][2] = math.nan
    settings = PLAIN._replace(unimodal_strength=0.0)
    assert_alike(native, logits, Criterion(torch.arange(8) % 3), settings)


def test_what_is_too_much_is_refused(native: ModuleType) -> None:
    many, target = [torch.zeros(2, 3)] * 10, torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="too many heads"):
        native.statistics(many, None, Criterion(target))
    with pytest.raises(ValueError, match="too many modalities"):
        native.mix(many, [], torch.ones(10, 2), torch.ones(10), None)
    with pytest.raises(ValueError, match=r"log_prior: expected 3 classes or more, got \[2\]"):
        native.mix(many[:2], many[:2], torch.ones(2, 2), torch.ones(2), torch.zeros(2))
    for features, width in ((many, 3), ([torch.zeros(2, 33)], 33), ([torch.zeros(2, 3)], 2)):
        shape = len(features), width
        moments = Moments(torch.zeros(shape[0]), torch.zeros(shape), torch.zeros(*shape, width))
        for step in (1, 0):
            with pytest.raises(ValueError, match="too many features"):
                native.observe(features, [step] * len(features), None, moments, 1.0)
    with pytest.raises(TypeError, match="expected 8 arguments, got 1"):
        native._native.observe(1)


def test_a_negative_index_is_refused(native: ModuleType) -> None:
    state, index = CurriculumState(1, num_samples=5), torch.tensor([0, -1])
    logits, criterion = [torch.zeros(2, 3)] * 2, Criterion(torch.tensor([0, 1]))
    with pytest.raises(IndexError, match="index: expected sample indices"):
        native.curriculum(logits, None, criterion, state.averages(), state.memory(index), PLAIN)


def test_classes_of_another_task_are_no_chance(native: ModuleType) -> None:
    index = torch.arange(200)[held_out(torch.arange(200), 0.5)][:20]
    logits = [randn(20, 3, seed=s) for s in range(3)]
    seen = torch.zeros(1024, dtype=torch.int64)
    seen[0], seen[7] = 100, 1000
    settings = PLAIN._replace(held_out=0.5)
    assert_alike(
        native, logits, Criterion(torch.arange(20) % 3), settings, index=index, class_seen=seen
    )


def test_class_weights_may_be_a_negated_view(native: ModuleType) -> None:
    logits, target, weight = [randn(6, 3)], torch.arange(6) % 3, torch.tensor([0.5, 1.0, 2.0])
    found = [
        native.statistics(logits, None, Criterion(target, w)).rows
        for w in (weight, torch._neg_view(-weight))
    ]
    assert_allclose(found[1], found[0])


def test_the_processor_is_used_as_far_as_torch_may_use_it(native: ModuleType) -> None:
    folder = Path(native._native.__file__).parent

    def chosen(asked: str | None) -> str:
        others = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
        ran = subprocess.run(
            [sys.executable, "-c", "import _native; print(_native.CAPABILITY)"],
            cwd=folder,  # where it is found without torch
            env=others if asked is None else {**others, "ATEN_CPU_CAPABILITY": asked},
            capture_output=True,
            text=True,
            check=True,
        )
        return ran.stdout.strip()

    names = ["default", "avx2", "avx512"]
    most = names.index(chosen(None))
    assert [chosen(name) for name in names] == [names[min(k, most)] for k in range(3)]
    assert {chosen(name) for name in ("", "AVX2", "avx")} == {names[most]}


@pytest.mark.parametrize("expanded", [False, True])
def test_an_incoming_gradient_may_tell_heads_apart(native: ModuleType, expanded: bool) -> None:
    logits, criterion = [randn(6, 3, seed=s) for s in range(3)], Criterion(torch.arange(6) % 3)
    # The first entry alone would say that there is nothing to scale.
    grad = torch.tensor([[1.0], [2.0], [-3.0]])
    grad = grad.expand(3, 6) if expanded else grad * torch.linspace(1.0, 2.0, 6)
    assert_alike(native, logits, criterion, grad=grad)


def test_nobody_is_better_than_always_right(native: ModuleType) -> None:
    """Whatever a saved state claims to have heard: more hits here than samples."""
    index = torch.arange(200)[held_out(torch.arange(200), 0.5)][:20]
    logits = [torch.eye(3)[torch.arange(20) % 3]] * 2
    heard = torch.tensor([0.5, 0.6, 0.2, *[0.0] * (HEARD - 3)]).unsqueeze(1).expand(HEARD, 2)
    settings = PLAIN._replace(held_out=0.5)
    state = assert_alike(
        native,
        logits,
        Criterion(torch.arange(20) % 3),
        settings,
        index=index,
        held_out_averages=heard,
    )
    assert (state.skill == 1.0).all()


def test_kept_buffers_of_another_length_are_refused(native: ModuleType) -> None:
    """C would write past their end."""
    logits, gate = [randn(4, 3, seed=s) for s in range(3)], Gate(2.0, 0.05, 0.0, 0.0)
    whole = kept_of(3, skill=0.5)
    for short in (whole._replace(skill=torch.ones(2)), whole._replace(logit_factor=torch.ones(2))):
        with pytest.raises(ValueError, match="fusion: expected buffers of length 3, got"):
            native.gate(logits, short, learnt(3), None, None, None, gate)


def test_counters_of_another_dtype_are_refused(native: ModuleType) -> None:
    """Of as many bytes or not: C would take what is not there, or one number for another."""
    logits, criterion = [randn(4, 3, seed=s) for s in range(2)], Criterion(torch.arange(4) % 3)
    for name in ("seen", "step", "nonfinite", "class_seen"):
        for dtype, kind in ((torch.float32, "int64"), (torch.int32, "int64")):
            state = CurriculumState(1)
            setattr(state, name, state.get_buffer(name).to(dtype))
            with pytest.raises(TypeError, match=f"state: expected contiguous {kind} buffers, got"):
                native.curriculum(logits, None, criterion, state.averages(), None, PLAIN)
    learnt_of = learnt(3)._replace(class_seen=torch.zeros(1024, dtype=torch.int32))
    three = [randn(4, 3, seed=s) for s in range(3)]
    with pytest.raises(TypeError, match="state: expected contiguous int64 buffers"):
        native.gate(
            three, kept_of(3, skill=0.5), learnt_of, None, None, None, Gate(2.0, 0.05, 0.0, 0.0)
        )


def test_a_state_of_another_size_is_refused(native: ModuleType) -> None:
    logits, criterion = [randn(4, 3, seed=s) for s in range(3)], Criterion(torch.arange(4) % 3)
    averages = CurriculumState().averages()
    with pytest.raises(ValueError, match="state: expected buffers of 3 heads, got 1"):
        native.curriculum(logits, None, criterion, averages, None, PLAIN)
    state, index = CurriculumState(2, num_samples=4), torch.arange(4)
    state.memory_nll = torch.cat([state.memory_nll] * 2)
    with pytest.raises(ValueError, match="state: expected buffers of length 24, got 12"):
        native.curriculum(logits, None, criterion, state.averages(), state.memory(index), PLAIN)
    state = CurriculumState(2)
    state.class_seen = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="state: expected buffers of length 1024, got 3"):
        native.curriculum(logits, None, criterion, state.averages(), None, PLAIN)
    longer = kept_of(3, skill=0.5)._replace(log_prior=torch.zeros(4096))
    with pytest.raises(ValueError, match=r"log_prior: expected shape \[1024\], got \[4096\]"):
        native.gate(logits, longer, None, None, None, None, Gate(2.0, 0.05, 0.0, 0.0))
    moments = Moments(torch.zeros(3), torch.zeros(3, 2), torch.zeros(3, 2, 2))
    features = [torch.zeros(4, 2)] * 3
    for short in (moments._replace(mass=torch.zeros(1)), moments._replace(scatter=torch.zeros(4))):
        with pytest.raises(ValueError, match="moments: expected buffers of length"):
            native.observe(features, [1] * 3, None, short, 100.0)
    averages, other = CurriculumState(2).averages(), PLAIN._replace(reduction=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="reduction: expected a string"):
        native.curriculum(logits, None, criterion, averages, None, other)


def test_what_hooks_pack_is_unpacked(native: ModuleType) -> None:
    """Logits saved in half of the memory, as hooks of the user's may."""
    found = []
    for hooks in (False, True):
        # Where one head needs no gradient, none are made ahead.
        leaves = [randn(8, 4).requires_grad_(), randn(8, 4, seed=1)]
        criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=1, backend="native")
        pack = torch.bfloat16 if hooks else torch.float32
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, pack=pack: x.to(pack) if x.is_floating_point() else x, lambda x: x
        ):
            loss = criterion(leaves[0], torch.arange(8) % 4, unimodal=leaves[1:])
        loss.backward()
        found.append(leaves[0].grad)
    assert_allclose(*found, atol=2e-3)


def test_logits_that_grew_since_the_forward_are_refused(native: ModuleType) -> None:
    leaves = [randn(8, 4).requires_grad_(), randn(8, 4, seed=1)]
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=1, backend="native")
    loss = criterion(leaves[0], torch.arange(8) % 4, unimodal=leaves[1:])
    leaves[1].data = randn(9, 4)
    with pytest.raises(RuntimeError, match="logits: expected those of the forward"):
        loss.backward()


def test_large_batches_outlast_the_pool(
    native: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the main thread has ended no thread starts: what is left is done in this one."""
    logits, criterion = [randn(40, 4, seed=s) for s in range(3)], Criterion(torch.arange(40) % 4)
    whole = native.statistics(logits, None, criterion).rows
    monkeypatch.setattr(native, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    ended = ThreadPoolExecutor(3)
    ended.shutdown()
    monkeypatch.setattr(native, "_pool", lambda threads: ended)
    assert torch.equal(native.statistics(logits, None, criterion).rows, whole)


def test_logits_without_memory_are_zeros(native: ModuleType) -> None:
    criterion = Criterion(torch.arange(8) % 4)
    nothing = torch._efficientzerotensor((8, 4))  # type: ignore[attr-defined]
    found = [
        native.statistics([x, randn(8, 4)], None, criterion).rows
        for x in (nothing, torch.zeros(8, 4))
    ]
    assert torch.equal(*found)


def test_any_byte_but_0_is_true(native: ModuleType) -> None:
    logits, criterion = [randn(8, 4, seed=s) for s in range(2)], Criterion(torch.arange(8) % 4)
    all_bits = torch.full((2, 8), 255, dtype=torch.uint8).view(torch.bool)
    found = []
    for present in (all_bits, torch.ones(2, 8, dtype=torch.bool)):
        state = CurriculumState(1)
        joint = native.curriculum(logits, present, criterion, state.averages(), None, PLAIN)
        found.append(torch.cat([joint.value.view(1), state.signal_mean]))
    assert torch.equal(*found)
