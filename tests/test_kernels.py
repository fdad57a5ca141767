"""Backends agree with each other, and a call takes the one it should."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import batch, each_backend, needs_native, randn
from numpy.testing import assert_allclose
from specification import CASES, SKILLS, SOFT_CASES, run, run_at_skills
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import dyncim_core
from dyncim_core import (
    CurriculumState,
    DynCIMLoss,
    GatedFusion,
    head_statistics,
    held_out,
    kernels,
)
from dyncim_core.kernels import eager
from dyncim_core.kernels.interface import (
    Criterion,
    Gate,
    Kept,
    Learnt,
    Moments,
    Settings,
)

native_status = kernels.backends()["native"]
FIELDS = ("loss", "nll", "entropy", "distance")


@pytest.fixture
def native() -> ModuleType:
    if native_status != "available":
        pytest.skip(native_status)
    from dyncim_core.kernels import native

    return native


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Float32 heads, with what cross-entropy may be told, and a mask."""
    heads = draw(st.integers(1, 9))
    batch = draw(st.sampled_from([0, 1, 2, 7, 33]))
    classes = draw(st.sampled_from([1, 2, 5, 15, 16, 17, 31, 100, 513, 1040]))
    seed = draw(st.integers(0, 10**6))
    scale = draw(st.sampled_from([0.1, 3.0, 60.0]))
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(heads, batch, classes, generator=generator)
    if draw(st.booleans()) and classes > 1:  # a class that a mask has ruled out
        logits[..., 0] = -math.inf
    target = torch.randint(1 if classes > 1 else 0, classes, (batch,), generator=generator)
    ignore_index = draw(st.sampled_from([-100, -1]))
    target[torch.rand(batch, generator=generator) < 0.2] = ignore_index
    weight = None
    if draw(st.booleans()):
        weight = torch.rand(classes, generator=generator) + 0.1
    present = None
    if draw(st.booleans()):
        present = torch.rand(heads, batch, generator=generator) < 0.7
        present[0] = True
        logits[~present] = math.nan
    smoothing = 0.0 if logits.isinf().any() else draw(st.sampled_from([0.0, 0.1]))
    return {
        "logits": list(logits.unbind()),
        "present": present,
        "criterion": Criterion(target, weight, ignore_index, smoothing),
    }


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    scale = max(1.0, float(expected.double().nan_to_num().abs().max())) if expected.numel() else 1.0
    assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * scale)


@needs_native
@given(problem=problems())
def test_native_statistics_and_gradients_are_those_of_eager(problem: dict[str, Any]) -> None:
    from dyncim_core.kernels import native

    ours, theirs = native.statistics(**problem), eager.statistics(**problem)
    close(ours.rows, theirs.rows)
    present = problem["present"]
    everywhere = torch.ones_like(ours.prediction, dtype=torch.bool)
    seen = everywhere if present is None else present
    # Where two classes tie within rounding, either is right.
    chosen, best = (
        torch.stack([x.gather(1, p.unsqueeze(1)).squeeze(1) for x, p in zip(*pair, strict=True)])
        for pair in ((problem["logits"], s.prediction) for s in (ours, theirs))
    )
    assert torch.equal(chosen[seen], best[seen])

    coefficient = torch.where(seen, torch.rand(seen.shape) + 0.5, 0.0)
    args = problem["logits"], problem["criterion"], present is not None
    for grad in (torch.tensor(2.0), torch.rand(seen.shape[1]), torch.rand(seen.shape)):
        actual = native.gradients(grad, coefficient, ours.normaliser, *args)
        expected = eager.gradients(grad, coefficient, None, *args)
        for x, y in zip(actual, expected, strict=True):
            close(x, y)


@needs_native
@pytest.mark.parametrize("classes", [1, 2, 5, 8, 13, 31, 600])
def test_native_predicts_the_first_of_equal_logits_and_rules_out_what_is_far_below(
    classes: int,
) -> None:
    from dyncim_core.kernels import native

    logits = torch.randint(3, (64, classes)).float()
    target = torch.randint(classes, (64,))
    first = torch.from_numpy(logits.numpy().argmax(axis=1))
    assert torch.equal(native.statistics([logits], None, Criterion(target)).prediction[0], first)
    logits[:, 1::2] -= 100.0
    normaliser = native.statistics([logits], None, Criterion(target)).normaliser
    args = None, normaliser, [logits], Criterion(target), False
    (grads,) = native.gradients(torch.tensor(1.0), *args)
    column = torch.arange(classes)
    far = column.remainder(2).eq(1) & (target.unsqueeze(1) != column)
    assert (grads[far] == 0.0).all()
    assert (grads[:, 2::2] != 0.0).all()


@needs_native
@given(
    problem=problems(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    skip=st.booleans(),
    noise=st.sampled_from([None, 0.4]),
    share=st.sampled_from([0.0, 0.3]),
    corrupt=st.booleans(),
    strided=st.booleans(),
)
def test_native_curriculum_is_that_of_eager(
    problem: dict[str, Any],
    reduction: Any,
    skip: bool,
    noise: float | None,
    share: float,
    corrupt: bool,
    strided: bool,
) -> None:
    from dyncim_core.kernels import native

    logits = problem["logits"]
    batch, modalities = len(logits[0]), len(logits) - 1
    if corrupt:
        logits[0][:1] = math.nan
    share = share if modalities else 0.0
    settings = Settings(4.0, noise, 0.2, 0.5, skip, 0.9, 0.8, reduction, share)

    def scaled(x: Tensor, scale: float) -> Tensor:
        return F.pad(scale * x, (0, 3))[:, : x.shape[1]] if strided else scale * x

    def run(backend: Any, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
        state = CurriculumState(modalities or 1, num_samples=50)
        generator = torch.Generator().manual_seed(1)
        found = []
        for scale in (1.0, 1.5, 0.7):  # or volatilities would be those of rounding
            index = torch.randperm(50, generator=generator)[:batch]
            joint = backend.curriculum(
                **{**problem, "logits": [scaled(x.to(dtype), scale) for x in logits]},
                buffers=state.averages(),
                memory=state.memory(index),
                settings=settings,
            )
            found += [joint.value, joint.coefficient]
        return found, dict(state.named_buffers())

    ours, mine = run(native, torch.float32)
    theirs, others = run(eager, torch.float32)
    truths, true = run(eager, torch.float64)
    # Standardising amplifies rounding: nobody has to be nearer to the truth than eager is.
    for actual, plain, truth in zip(ours, theirs, truths, strict=True):
        assert_no_further(actual, plain, truth)
    for name in true:
        assert_no_further(mine[name], others[name], true[name])


def assert_no_further(actual: Tensor, plain: Tensor, truth: Tensor) -> None:
    assert torch.equal(actual.isnan(), truth.isnan())
    if not truth.numel():
        return
    actual, plain, truth = (x.double().nan_to_num() for x in (actual, plain, truth))
    scale = 1.0 + truth.abs()
    allowed = 3.0 * ((plain - truth).abs() / scale).max() + 1e-4
    assert ((actual - truth).abs() / scale).max() <= allowed


@needs_native
@given(
    problem=problems(),
    swap=st.sampled_from([0.0, 0.4]),
    dropout=st.sampled_from([0.0, 0.4]),
    slope=st.sampled_from([0.0, 1.5]),
    disturbed=st.booleans(),
    novel=st.booleans(),
    prior=st.booleans(),
    skill=st.sampled_from([None, 0.0, 0.6]),
)
def test_native_gates_are_those_of_eager(
    problem: dict[str, Any],
    swap: float,
    dropout: float,
    slope: float,
    disturbed: bool,
    novel: bool,
    prior: bool,
    skill: float | None,
) -> None:
    from dyncim_core.kernels import native

    logits, present = problem["logits"], problem["present"]
    modalities, batch = len(logits), len(logits[0])
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(3, batch, generator=generator) if disturbed else None
    penalty = 9.0 * torch.rand(batch, modalities, generator=generator).t() if novel else None
    learnt = None
    if skill is not None:
        quality = torch.linspace(0.9, 0.1, 1 + modalities)
        learnt = Learnt(
            quality.log() * (1.0 if novel else 0.1),
            quality,
            skill * torch.linspace(1.0, 0.0 if novel else 0.8, 1 + modalities),
            torch.randint(3, (1024,), generator=generator) ** (9 if novel else 1) + (not novel),
            torch.rand(1024, generator=generator).sub(0.1).relu() if novel else torch.ones(1024),
            torch.rand(1 + modalities, generator=generator),
        )
    settings = Gate(slope, 0.05, swap, dropout)
    prior = prior and logits[0].shape[1] <= 1024
    log_prior = -9.0 * torch.rand(1024, generator=generator) if prior else None
    kept = Kept(torch.linspace(0.0, 0.9, modalities), torch.ones(modalities), log_prior)
    ours, theirs = kept, copy.deepcopy(kept)
    actual, expected = (
        backend.gate(logits, own, learnt, present, chance, penalty, settings)
        for backend, own in ((native, ours), (eager, theirs))
    )
    assert torch.equal(ours.skill, theirs.skill)
    assert_allclose(ours.logit_factor, theirs.logit_factor, rtol=1e-6)
    if prior:
        assert_allclose(ours.log_prior, theirs.log_prior, rtol=1e-5, atol=1e-6)
    assert actual.source is expected.source is None or torch.equal(actual.source, expected.source)
    assert_allclose(actual.gates, expected.gates, rtol=1e-4, atol=1e-5)
    assert_allclose(actual.scale, expected.scale, rtol=1e-4, atol=1e-5)
    if modalities > 1 and batch == 33 and present is None and disturbed and not novel:
        if dropout:  # some are dropped
            assert (expected.gates == 0).any()
        if swap:
            assert (expected.source != torch.arange(33)).any()


@needs_native
@given(
    widths=st.lists(st.integers(1, 32), min_size=1, max_size=9),
    batch=st.sampled_from([0, 1, 7]),
    steps=st.sampled_from([None, 1, 3]),
    classes=st.sampled_from([None, 1, 5]),
    masked=st.booleans(),
)
def test_native_mixes_as_eager_does(
    widths: list[int],
    batch: int,
    steps: int | None,
    classes: int | None,
    masked: bool,
) -> None:
    from dyncim_core.kernels import native

    shape, modalities = (batch, *(() if steps is None else (steps,))), len(widths)
    streams = [randn(*shape, 2 * width, seed=k)[..., ::2] for k, width in enumerate(widths)]
    logits = [randn(batch, classes, seed=k) for k in range(modalities)] if classes else []
    scale = randn(modalities, batch).abs()
    if masked and batch:
        scale[0, 0] = 0.0
        streams[0][0] = math.nan
        if logits:
            logits[0][0] = -math.inf
    grad = randn(*shape, 2 * sum(widths))[..., ::2]
    logit_factor = torch.linspace(0.0, 1.0, modalities)
    prior = -randn(9).abs() if masked else None
    actual, expected = (
        (*b.mix(streams, logits, scale, logit_factor, prior), *b.unmix(grad, widths, scale))
        for b in (native, eager)
    )
    assert len(actual) == len(expected) == 2 + modalities
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours is theirs is None or ours.shape == theirs.shape
        if ours is not None:
            assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@needs_native
def test_what_torch_spreads_over_threads_is_left_to_it(
    native: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = torch.ones(2, 3)
    monkeypatch.setattr(native, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(native, "_mix", None)
    streams = [randn(3, 4), randn(3, 5)]
    fused, _ = native.mix(streams, [], scale, torch.ones(2), None)
    assert torch.equal(fused, torch.cat(streams, dim=1))
    found = native.unmix(fused, (4, 5), scale)
    assert all(torch.equal(x, y) for x, y in zip(found, streams, strict=True))


@needs_native
@given(
    widths=st.lists(st.integers(1, 32), min_size=1, max_size=9),
    batch=st.sampled_from([1, 2, 7, 65]),
    masked=st.booleans(),
    spoilt=st.sampled_from([None, math.nan, math.inf, 1e30]),
    seed=st.integers(0, 10**6),
)
def test_native_moments_are_those_of_eager(
    widths: list[int], batch: int, masked: bool, spoilt: float | None, seed: int
) -> None:
    from dyncim_core.kernels import native

    shape = len(widths), max(widths)
    zeros = [torch.zeros(shape[:1]), torch.zeros(shape), torch.zeros(*shape, shape[1])]
    ours, theirs = Moments(*zeros), Moments(*(x.clone() for x in zeros))
    for step in range(3):
        features = [randn(batch, 2 * width, seed=seed + step + k) for k, width in enumerate(widths)]
        steps = [2] * len(widths)
        features[-1] = features[-1].T.contiguous().T[:, ::2] - 3.0
        steps[-1] = 1
        if spoilt is not None:
            features[0][:1, 0] = spoilt
        available = randn(batch, len(widths), seed=seed).t() > -1.0 if masked else None
        native.observe(features, steps, available, ours, 0.9)
        eager.observe(features, steps, available, theirs, 0.9)
    for name, actual, expected in zip(Moments._fields, ours, theirs, strict=True):
        assert_allclose(actual, expected, rtol=1e-4, atol=1e-5, err_msg=name)


@needs_native
@given(
    widths=st.lists(st.integers(1, 32), min_size=1, max_size=9),
    batch=st.sampled_from([0, 1, 15, 16, 65]),
    seen=st.sampled_from([1, 100, 400]),
    flat=st.booleans(),
    offset=st.sampled_from([0.0, 100.0]),
    seed=st.integers(0, 10**6),
)
def test_native_novelty_is_that_of_eager(
    widths: list[int], batch: int, seen: int, flat: bool, offset: float, seed: int
) -> None:
    from dyncim_core.kernels import native

    shape = len(widths), max(widths)
    moments = Moments(torch.zeros(shape[0]), torch.zeros(shape), torch.zeros(*shape, shape[1]))
    known = [randn(seen, width, seed=seed + k) + offset for k, width in enumerate(widths)]
    if flat:  # some directions, or the whole, never vary
        known[0][:, : 1 + widths[0] // 2] = offset
    steps = [2] * len(widths)
    eager.observe(known, [1] * len(widths), None, moments, 6400.0)
    asked = [3 * randn(batch, 2 * width - 1, seed=seed - k - 1) for k, width in enumerate(widths)]
    asked[-1] = asked[-1].T.contiguous().T[:, ::2] + offset
    steps[-1] = 1
    found = native.novelty(asked, steps, moments, 6400.0)
    assert_allclose(found, eager.novelty(asked, steps, moments, 6400.0), rtol=1e-3)


@needs_native
@pytest.mark.parametrize("classes", [1000, 50257])
def test_gradients_are_exact_to_rounding(native: ModuleType, classes: int) -> None:
    for scale in (1.0, 30.0):
        logits = [scale * randn(3, classes, seed=s) for s in range(2)]
        criterion = Criterion(torch.tensor([0, 5, classes - 1]))
        found = native.statistics(logits, None, criterion)
        one = torch.ones(2, 3)
        grads = native.gradients(one, None, found.normaliser, logits, criterion, False)
        double = eager.gradients(
            one.double(), None, None, [x.double() for x in logits], criterion, False
        )
        for grad, truth in zip(grads, double, strict=True):
            assert (grad - truth).norm() / truth.norm() < 1e-6


@needs_native
def test_work_is_shared_between_threads(
    native: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = [randn(50, 40, seed=s) for s in range(3)]
    criterion = Criterion(torch.arange(50) % 40)
    alone = native.statistics(logits, None, criterion)
    monkeypatch.setattr(native, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = native.statistics(logits, None, criterion)
    assert torch.equal(alone.rows, together.rows)
    grad = torch.ones(())
    state = CurriculumState(2)
    settings = Settings(4.0, None, 0.2, 0.5, False, 0.9, 0.8, "mean")
    joint = native.curriculum(logits, None, criterion, state.averages(), None, settings)
    grads = native.gradients(grad, joint.coefficient, joint.normaliser, logits, criterion, False)
    expected = eager.gradients(grad, joint.coefficient, None, logits, criterion, False)
    for x, y in zip(grads, expected, strict=True):
        close(x, y)
    with pytest.raises(IndexError, match=r"target: expected class indices in \[0, 40\).* to 99"):
        native.statistics(logits, None, Criterion(torch.full((50,), 99)))
    kept = [Kept(torch.zeros(3), torch.zeros(3), torch.zeros(1024)) for _ in range(2)]
    learnt = Learnt(
        torch.zeros(4),
        torch.ones(4),
        torch.rand(4),
        state.class_seen,
        torch.rand(1024),
        torch.rand(4),
    )
    settings = Gate(2.0, 0.05, 0.0, 0.0)
    gates, expected = (
        kernels.gate(logits, own, learnt, None, None, None, settings)
        for kernels, own in zip((native, eager), kept, strict=True)
    )
    close(gates.gates, expected.gates)
    assert all(x.any() for x in kept[0])
    for x, y in zip(*kept, strict=True):
        close(x, y)


@needs_native
def test_a_prior_of_another_length_is_refused() -> None:
    fusion = GatedFusion([1, 1, 1], state=CurriculumState(3), backend="native")
    fusion.log_prior = torch.zeros(2)
    features, unimodal = [torch.ones(4, 1)] * 3, [torch.randn(4, 2)] * 3
    with pytest.raises(ValueError, match=r"log_prior: expected shape \[1024\], got \[2\]"):
        fusion(features, unimodal=unimodal)


def objective(
    problem: dict[str, Any], state: CurriculumState, needs: list[bool], **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """Of a DynCIMLoss in C, and its logits."""
    criterion = problem["criterion"]
    wrapped = nn.CrossEntropyLoss(
        criterion.weight,
        ignore_index=criterion.ignore_index,
        label_smoothing=criterion.label_smoothing,
    )
    logits = [
        x.clone().requires_grad_(need) for x, need in zip(problem["logits"], needs, strict=True)
    ]
    present = None if problem["present"] is None else problem["present"][1:].t()
    loss = DynCIMLoss(wrapped, state=state, backend="native", **options)
    others = logits[1:] or None
    return loss(logits[0], criterion.target, unimodal=others, present=present), logits


@needs_native
@given(
    problem=problems(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    skip=st.booleans(),
    incoming=st.sampled_from([1.0, -0.3, 0.0]),
)
def test_gradients_made_ahead_are_those_of_a_second_backward_and_of_kept_logits(
    problem: dict[str, Any], reduction: Any, skip: bool, incoming: float
) -> None:
    modalities = len(problem["logits"]) - 1
    options = {"nonfinite": "skip" if skip else "propagate", "reduction": reduction}
    states = [CurriculumState(modalities or 1) for _ in range(2)]
    loss, logits = objective(problem, states[0], [True] * (1 + modalities), **options)
    # Made from the logits when the gradient is known, since one head needs none.
    later, others = objective(problem, states[1], [True] + [False] * modalities, **options)
    assert_no_further(loss.detach(), later.detach(), later.detach())
    grad = torch.linspace(1.0, 2.0, loss.numel()).view_as(loss) * incoming
    first = torch.autograd.grad(loss, logits, grad, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(loss, logits, grad)
    for x, y, z in zip(first, second, kept, strict=True):
        assert x.data_ptr() != y.data_ptr() or not x.numel()
        assert_allclose(x, y, rtol=0, atol=0)
        assert_allclose(x, z, rtol=0, atol=0)
    (expected,) = torch.autograd.grad(later, others[:1], grad)
    close(first[0], expected)


@needs_native
def test_gradients_made_ahead_are_handed_out_once(native: ModuleType) -> None:
    logits = [randn(6, 5, seed=s).requires_grad_() for s in range(2)]
    target = torch.arange(6) % 5
    state, settings = CurriculumState(1), Settings(4.0, None, 0.2, 0.5, False, 0.9, 0.8, "mean")
    criterion = Criterion(target)
    joint = native.curriculum(logits, None, criterion, state.averages(), None, settings)
    assert isinstance(joint.normaliser, list)
    ahead = [x.data_ptr() for x in joint.normaliser[0]]
    args = joint.coefficient, joint.normaliser, logits, criterion, False
    first, second = (native.gradients(torch.tensor(g), *args) for g in (1.0, 2.0))
    assert [x.data_ptr() for x in first] == ahead
    assert not set(ahead) & {x.data_ptr() for x in second}
    for x, y in zip(first, second, strict=True):
        assert torch.equal(2 * x, y)
    logits[1].requires_grad_(False)
    joint = native.curriculum(logits, None, criterion, state.averages(), None, settings)
    assert isinstance(joint.normaliser, Tensor)


@needs_native
@pytest.mark.parametrize("classes", [15, 16, 1000, 50257])
def test_gradients_made_ahead_are_exact_to_rounding(classes: int) -> None:
    for scale in (1.0, 30.0):
        single = [(scale * randn(4, classes, seed=s)).requires_grad_() for s in range(2)]
        double = [x.detach().double().requires_grad_() for x in single]
        target = torch.tensor([0, 5, classes - 1, 7])
        # Standardising amplifies rounding; without, every factor is 1 / 4.
        loss = DynCIMLoss(nn.CrossEntropyLoss(), modalities=1, pacing_strength=0.0)
        loss(single[0], target, unimodal=single[1:]).backward()
        for x, y in zip(single, double, strict=True):
            nn.CrossEntropyLoss()(y, target).backward()
            assert x.grad is not None
            assert y.grad is not None
            assert (x.grad - y.grad).norm() / y.grad.norm() < 2e-6


@needs_native
def test_strides_do_not_matter(native: ModuleType) -> None:
    whole = randn(6, 40)
    views = [whole[:, :10], whole[:, 10:20], whole.t()[:6, :].t()[:, :6], whole[::2]]
    for view in views:
        criterion = Criterion(torch.arange(len(view)) % view.shape[1])
        ours = native.statistics([view], None, criterion)
        assert torch.equal(ours.rows, native.statistics([view.contiguous()], None, criterion).rows)
        (grad,) = native.gradients(torch.ones(()), None, ours.normaliser, [view], criterion, False)
        (expected,) = eager.gradients(torch.ones(1, 1), None, None, [view], criterion, False)
        close(grad, expected)


@needs_native
def test_strides_of_the_mask_do_not_matter(native: ModuleType) -> None:
    present = torch.tensor([[True, True], [True, False], [True, True]]).t()
    assert not present.is_contiguous()
    grads = []
    for mask in (present, present.contiguous()):
        logits = [randn(3, 4, seed=s).requires_grad_() for s in range(2)]
        found = head_statistics(logits, torch.arange(3), present=mask, backend="native")
        grads.append(torch.autograd.grad(found.loss.sum(), logits))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@needs_native
def test_a_rejected_call_leaves_the_state_alone(native: ModuleType) -> None:
    state = CurriculumState(1, num_samples=5)
    before = {name: x.clone() for name, x in state.named_buffers()}
    settings = Settings(4.0, None, 0.2, 0.5, False, 0.9, 0.8, "mean")
    logits = [randn(2, 3, seed=s) for s in range(2)]
    good = torch.tensor([0, 1])
    for target, index, name in ((good, good + 4, "index"), (good + 2, good, "target")):
        with pytest.raises(IndexError, match=f"{name}: expected .* got values from"):
            native.curriculum(
                logits, None, Criterion(target), state.averages(), state.memory(index), settings
            )
    assert all(torch.equal(before[name], x) for name, x in state.named_buffers())


@needs_native
@pytest.mark.parametrize("ahead", [True, False])
def test_labels_that_change_before_the_backward_are_checked_again(
    native: ModuleType, ahead: bool
) -> None:
    """Autograd does not notice a change through memory that a tensor shares."""
    labels = np.array([1, 0, 2, 0])
    leaf = randn(4, 3).requires_grad_()
    if ahead:  # kept, unless a head wants no gradient
        criterion = DynCIMLoss(nn.CrossEntropyLoss(), backend="native")
        loss = criterion(leaf, torch.from_numpy(labels), unimodal=[randn(4, 3)])
    else:
        found = head_statistics([leaf, leaf], torch.from_numpy(labels), backend="native")
        loss = found.loss.sum()
    labels[:] = 10**9
    with pytest.raises(IndexError, match="target: expected class indices in"):
        loss.backward()


def test_native_holds_out_what_the_hash_says(native: ModuleType) -> None:
    state, index = CurriculumState(1, num_samples=2**18), torch.arange(2**18)
    settings = Settings(4.0, None, 0.2, 0.5, False, 0.9, 0.8, "sum", 0.05)
    logits, criterion = [torch.zeros(2**18, 2)] * 2, Criterion(torch.zeros_like(index))
    for _ in range(2):
        joint = native.curriculum(
            logits, None, criterion, state.averages(), state.memory(index), settings
        )
        assert torch.equal(joint.coefficient == 0.0, held_out(index, 0.05).expand(2, -1))
        index = index.flip(0)


class Operators(TorchDispatchMode):
    """Counts the operators that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("backend", "more"), [("eager", 70), ("native", 0)])
def test_holding_out_takes_few_operators(
    backend: str, more: int, request: pytest.FixtureRequest
) -> None:
    if backend == "native":
        request.getfixturevalue("native")
    found = []
    for share in (0.0, 0.3):
        criterion = DynCIMLoss(
            nn.CrossEntropyLoss(), modalities=2, num_samples=9, held_out=share, backend=backend
        )
        heads = [randn(9, 4, seed=s).requires_grad_() for s in range(3)]
        with Operators() as seen:
            loss = criterion(
                heads[0], torch.arange(9) % 4, unimodal=heads[1:], index=torch.arange(9)
            )
            loss.backward()
        found.append(seen.count)
    assert found[0] <= found[1] <= found[0] + more


def test_backends_are_told_apart_with_their_reasons() -> None:
    status = dyncim_core.backends()
    assert list(status) == ["eager", "native", "triton"]
    assert status["eager"] == "available"
    if not torch.cuda.is_available():
        assert "GPU" in status["triton"]


def test_c_kernels_of_other_sources_are_not_called() -> None:
    """Which would read what is not there: an editable install keeps them when its sources move."""
    program = """
import sys, types
sys.modules["dyncim_core.kernels._native"] = types.ModuleType("_native")
import dyncim_core
print(dyncim_core.backends()["native"])
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "install the package again" in ran.stdout


class Subclass(Tensor):
    """What may have no memory of its own, as a ``DTensor``."""


LOGITS, TARGET = [torch.zeros(2, 3)], torch.tensor([0, 1])


@needs_native
def test_a_call_takes_the_kernels_that_fit_its_tensors(native: ModuleType) -> None:
    assert kernels.select(None, LOGITS, TARGET) is native
    assert kernels.select("eager", LOGITS, TARGET) is eager
    for logits, target in (
        ([LOGITS[0].double()], TARGET),
        ([LOGITS[0].bfloat16()], TARGET),
        (LOGITS, torch.zeros(2, 3)),
        (LOGITS * 10, TARGET),
        ([LOGITS[0].to("meta")], TARGET),
    ):
        assert kernels.select(None, logits, target) is eager
    with FakeTensorMode():
        assert kernels.select(None, [torch.zeros(2, 3)], TARGET) is eager
    assert kernels.select(None, LOGITS, TARGET, (None, nn.Parameter(torch.ones(3)))) is native
    assert kernels.select(None, LOGITS, TARGET.as_subclass(Subclass)) is eager
    assert kernels.select(None, LOGITS, TARGET, (None, TARGET.as_subclass(Subclass))) is eager


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (([LOGITS[0].double()], TARGET), "logits of torch.float64"),
        ((LOGITS, torch.zeros(2, 3)), "class probabilities"),
        ((LOGITS * 10, TARGET), "more than 9 heads"),
        (([LOGITS[0].to("meta")], TARGET), "device meta"),
        ((LOGITS, TARGET.as_subclass(Subclass)), "a Subclass"),
        ((LOGITS, TARGET, [TARGET.as_subclass(Subclass)]), "a Subclass"),
    ],
)
@needs_native
def test_a_backend_asked_for_must_fit(tensors: Any, reason: str) -> None:
    with pytest.raises(RuntimeError, match=f"'native' does not take {reason}"):
        kernels.select("native", *tensors)


def test_an_unknown_or_unavailable_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"backend: expected one of .*got 'cuda'"):
        DynCIMLoss(nn.CrossEntropyLoss(), backend="cuda")
    monkeypatch.setenv("DYNCIM_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"DYNCIM_BACKEND: expected one of .*got 'fast'"):
        head_statistics(LOGITS, TARGET)
    if not torch.cuda.is_available():
        monkeypatch.setenv("DYNCIM_BACKEND", "triton")
        with pytest.raises(RuntimeError, match=r"DYNCIM_BACKEND: 'triton' is not available: .*GPU"):
            DynCIMLoss(nn.CrossEntropyLoss())


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNCIM_BACKEND", "eager")
    assert DynCIMLoss(nn.CrossEntropyLoss()).backend == "eager"
    assert DynCIMLoss(nn.CrossEntropyLoss(), backend="eager").backend == "eager"


def test_without_the_extension_everything_runs() -> None:
    """As on a machine without a compiler."""
    code = (
        "import sys, torch; sys.modules['dyncim_core.kernels._native'] = None\n"
        "import dyncim_core\n"
        "assert dyncim_core.backends()['native'] != 'available'\n"
        "loss = dyncim_core.DynCIMLoss(torch.nn.CrossEntropyLoss(), modalities=1)\n"
        "x = torch.zeros(2, 3, requires_grad=True)\n"
        "loss(x, torch.tensor([0, 1]), unimodal=[x]).backward()\n"
        "assert x.grad.abs().sum() > 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
def test_threads_are_made_anew_after_a_fork() -> None:
    code = (
        "import os, torch\n"
        "from dyncim_core.kernels import native\n"
        "from dyncim_core.kernels.interface import Criterion\n"
        "native._WORTH_A_THREAD = 1\n"
        "torch.set_num_threads(2)\n"
        "run = lambda: native.statistics([torch.zeros(8, 4)], None, "
        "Criterion(torch.zeros(8, dtype=torch.int64)))\n"
        "run()\n"
        "pid = os.fork()\n"
        "run()\n"
        "if pid == 0: os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_the_specification_has_runs_whose_noise_the_fusion_alone_sees() -> None:
    cpu, seen = torch.device("cpu"), 0
    for options in (options for options in CASES.values() if "alone" in options):
        found = {name: x for name, _, x in run(eager, cpu, **options)}
        for step in range(6):
            mass, *_, by_all, _ = found[f"held_out_averages {step}"][:, 0]
            seen += mass > 0 and found[f"label_noise {step}"] > 1.1 * by_all / mass
    assert seen >= 9


def test_class_probabilities_may_be_more_precise_than_logits() -> None:
    losses = []
    for dtype in (torch.float32, torch.float64):
        criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, backend="eager")
        target = randn(9, 4).softmax(dim=1).to(dtype)
        losses.append(criterion(randn(9, 4), target, unimodal=[randn(9, 4), randn(9, 4, seed=1)]))
    assert_allclose(losses[1].float(), losses[0], rtol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "native", "native, shared"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_run_is_that_of_the_specification(
    backend: str,
    options: dict[str, Any],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = eager if backend == "eager" else request.getfixturevalue("native")
    if backend == "native, shared":
        monkeypatch.setattr(module, "_WORTH_A_THREAD", 1)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for name, actual, expected in run(module, torch.device("cpu"), **options):
        assert_allclose(actual, expected, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("options", SOFT_CASES.values(), ids=SOFT_CASES)
def test_a_run_over_class_probabilities_is_that_of_the_specification(
    options: dict[str, Any],
) -> None:
    for name, actual, expected in run(eager, torch.device("cpu"), soft=True, **options):
        assert_allclose(actual, expected, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("skills", SKILLS, ids=str)
def test_losses_count_by_skill(
    backend: str, skills: list[float], request: pytest.FixtureRequest
) -> None:
    module = eager if backend == "eager" else request.getfixturevalue("native")
    found, expected = run_at_skills(module, torch.device("cpu"), skills)
    assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_losses_count_as_far_as_what_is_learnt_holds(
    backend: str, request: pytest.FixtureRequest
) -> None:
    module = eager if backend == "eager" else request.getfixturevalue("native")
    lost = [0.5, 0.3, 0.6, 0.9, 5.0, math.nan]
    found, expected = run_at_skills(module, torch.device("cpu"), [0.9] * 6, lost)
    assert expected[0] == expected[4] == 1
    assert (np.diff(expected[:4]) < 0).all()
    assert_allclose(found, expected, rtol=1e-5)


@each_backend
def test_nothing_trained_is_nothing_learnt(backend: str) -> None:
    """As after a first call whose samples are all held out."""
    criterion = DynCIMLoss(
        nn.CrossEntropyLoss(), modalities=2, num_samples=4, held_out=0.5, backend=backend
    )
    index = torch.arange(4)[held_out(torch.arange(4), 0.5)][:1]
    assert len(index) == 1
    heads = [randn(1, 3, seed=s).requires_grad_() for s in range(3)]
    criterion(heads[0], torch.zeros(1, dtype=torch.long), unimodal=heads[1:], index=index)
    assert not criterion.state.seen.any()
    assert not criterion.state.quality.any()


def test_an_empty_variable_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNCIM_BACKEND", "")
    assert DynCIMLoss(nn.CrossEntropyLoss()).backend is None


@needs_native
@pytest.mark.parametrize(
    ("owner", "name", "message"),
    [
        ("state", "memory_nll", "state"),
        ("state", "memory_weight", "state"),
        ("fusion", "log_prior", "fusion"),
        ("fusion", "logit_factor", "fusion"),
        ("moments", "total", "moments"),
        ("learnt", "quality", "state"),
    ],
)
def test_c_refuses_any_buffer_of_another_dtype(owner: str, name: str, message: str) -> None:
    fused, others, target = batch(modalities=3)
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=3, num_samples=12, backend="native")
    state = CurriculumState(3)
    fusion = GatedFusion([2, 2, 2], state=state, backend="native", dropout=0.0)
    owners = {
        "state": criterion.state,
        "fusion": fusion,
        "moments": fusion.moments,
        "learnt": state,
    }
    buffer = owners[owner].get_buffer(name)
    buffer.data = buffer.data.half()

    def call() -> object:
        if owner == "state":
            return criterion(fused, target, unimodal=others, index=torch.arange(12))
        return fusion([torch.ones(12, 2)] * 3, unimodal=others)

    with pytest.raises(TypeError, match=f"^{message}: expected contiguous float32 buffers"):
        call()


@each_backend
def test_strides_of_the_index_do_not_matter(backend: str) -> None:
    fused, others, target = batch()
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, num_samples=24, backend=backend)
    criterion(fused, target, unimodal=others, index=torch.arange(24)[::2])
    assert (criterion.state.memory_visits[:, 0] == torch.tensor([1, 0] * 12)).all()


@each_backend
@pytest.mark.parametrize("ahead", [True, False])
def test_rows_that_nobody_asks_for_get_no_gradient_where_there_is_a_mask(
    backend: str, ahead: bool
) -> None:
    fused, others, target = batch()
    fused.data[3] = math.nan
    criterion = DynCIMLoss(nn.CrossEntropyLoss(reduction="none"), modalities=2, backend=backend)
    present = torch.ones(12, 2, dtype=torch.bool)
    loss = criterion(fused, target, unimodal=others, present=present)[torch.arange(12) != 3].sum()
    if not ahead:
        torch.autograd.grad(loss, fused, retain_graph=True)
    (grad,) = torch.autograd.grad(loss, fused)
    assert not grad[3].any()
    assert grad[4:].all()


@each_backend
def test_a_negated_gradient_of_a_fusion_keeps_its_sign(backend: str) -> None:
    features = [torch.ones(3, 2, requires_grad=True) for _ in range(2)]
    fused = GatedFusion([2, 2], dropout=0.0, backend=backend)(features).fused
    for x in torch.autograd.grad(fused, features, torch._neg_view(torch.ones(3, 4))):
        assert_allclose(x, -1.0)


@each_backend
def test_strides_of_the_target_do_not_matter(backend: str) -> None:
    fused, others, target = batch()
    column = torch.stack([target, torch.full_like(target, 77)], dim=1)[:, 0]
    found = [
        DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, backend=backend)(fused, y, unimodal=others)
        for y in (target, column)
    ]
    assert torch.equal(*found)


@each_backend
@pytest.mark.parametrize("make", [lambda w: w.repeat_interleave(2)[::2], Tensor.double])
def test_strides_and_dtype_of_class_weights_do_not_matter(backend: str, make: Any) -> None:
    fused, others, target = batch()
    weight = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.25])
    found = [
        DynCIMLoss(nn.CrossEntropyLoss(w), modalities=2, backend=backend)(
            fused, target, unimodal=others
        )
        for w in (weight, make(weight))
    ]
    assert_allclose(found[1].item(), found[0].item(), rtol=1e-6)


@needs_native
def test_a_default_device_changes_nothing() -> None:
    fused, others, target = batch()
    with torch.device("cpu"):
        expected = head_statistics([fused, *others], target, backend="native").loss
    with torch.device("meta"):
        found = head_statistics([fused, *others], target, backend="native").loss
    assert torch.equal(found, expected)


def test_a_wrong_label_in_another_thread_is_refused(
    native: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_WORTH_A_THREAD", 1)
    fused, others, target = batch()
    target[-1] = 77
    torch.set_num_threads(2)
    try:
        with pytest.raises(IndexError, match=r"target: expected class indices .* to 77"):
            head_statistics([fused, *others], target, backend="native")
    finally:
        torch.set_num_threads(1)


def test_gradients_made_anew_are_of_all_samples_at_once(
    native: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C makes them of the whole batch, so that threads would write the same ones."""
    fused, others, target = batch()
    loss = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2)(fused, target, unimodal=others)
    expected = torch.autograd.grad(loss, [fused, *others], retain_graph=True)
    monkeypatch.setattr(native, "_in_parts", None)
    found = torch.autograd.grad(loss, [fused, *others])
    for grad, other in zip(found, expected, strict=True):
        assert_allclose(grad, other, rtol=1e-6)


@pytest.mark.parametrize(
    ("capability", "failure", "reason"),
    [
        ((6, 1), None, "a GPU is older than those that Triton compiles for"),
        ((9, 0), RuntimeError("no C compiler"), "Triton cannot launch here: no C compiler"),
        ((9, 0), ImportError("no triton"), "no triton"),
        ((9, 0), None, "available"),
    ],
)
def test_triton_is_taken_only_where_it_can_launch(
    capability: tuple[int, int],
    failure: Exception | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def import_module(name: str) -> Any:
        if failure is not None:
            raise failure
        utils = SimpleNamespace(utils=None)
        return SimpleNamespace(name=name, driver=SimpleNamespace(active=utils))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr("importlib.import_module", import_module)
    module, found = kernels._load.__wrapped__("triton")
    assert found == reason
    assert (module is None) == (reason != "available")
