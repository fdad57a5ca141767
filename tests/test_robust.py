"""What a training loop may do to the loss without asking: defaults, threads, transforms."""

from __future__ import annotations

import gc
import math
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from inputs import each_backend
from numpy.testing import assert_allclose
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dyncim_core import (
    CurriculumState,
    DynCIMLoss,
    GatedFusion,
    head_statistics,
    held_out,
)
from dyncim_core import reference as ref


def heads(batch: int = 8, classes: int = 5, count: int = 3) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = [
        torch.randn(batch, classes, generator=generator).requires_grad_() for _ in range(count)
    ]
    return logits, torch.arange(batch) % classes


def loss_of(logits: list[Tensor], target: Tensor, **options: Any) -> Tensor:
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=len(logits) - 1, **options)
    loss: Tensor = criterion(logits[0], target, unimodal=logits[1:])
    return loss


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_empty_batch_passes(backend: str, reduction: str) -> None:
    logits, target = heads(batch=0)
    loss = loss_of(logits, target, backend=backend, reduction=reduction)
    for _ in range(2):
        grads = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
        assert [tuple(x.shape) for x in grads] == [(0, 5)] * 3
    head_statistics(logits, target, backend=backend).loss.sum().backward()


@each_backend
def test_class_weights_of_another_length_are_refused(backend: str) -> None:
    logits, target = heads()
    criterion = DynCIMLoss(nn.CrossEntropyLoss(weight=torch.ones(2)), modalities=2, backend=backend)
    with pytest.raises(ValueError, match=r"weight: expected shape \[5\], got \[2\]"):
        criterion(logits[0], target, unimodal=logits[1:])
    assert criterion.state.step == 0


@each_backend
@pytest.mark.parametrize("classes", range(2, 12))
def test_hits_of_chance_are_no_skill_whatever_they_round_to(backend: str, classes: int) -> None:
    state = CurriculumState(2, num_samples=200)
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), state=state, held_out=0.5, backend=backend)
    fusion = GatedFusion([2, 2], state=state, dropout=0.0, backend=backend)
    held = held_out(torch.arange(200), 0.5)
    index = torch.cat([held.nonzero()[:classes], (~held).nonzero()[:classes]]).squeeze(1)
    target = torch.arange(classes).repeat(2)
    guess = torch.zeros(2 * classes, classes)
    guess[:, 0] = 1.0  # right once among all classes
    for _ in range(5):
        criterion(guess, target, unimodal=[guess, guess], index=index)
        assert (state.held_out_averages[1] > 0).all()
        assert (state.skill == 0).all()
    gates = fusion([guess[:, :1].expand(-1, 2)] * 2, unimodal=[guess, guess]).gates
    assert_allclose(gates, 0.5)


@each_backend
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", ["loss", "fusion"])
def test_a_second_forward_by_a_checkpoint_is_refused(
    backend: str, reentrant: bool, inside: str
) -> None:
    logits, target = heads()
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, backend=backend)
    fusion = GatedFusion([5, 5], state=criterion.state, backend=backend)

    def block(*x: Tensor) -> Tensor:
        if inside == "loss":
            loss: Tensor = criterion(x[0], target, unimodal=x[1:])
            return loss
        return fusion(x[1:], unimodal=x[1:]).fused.square().sum()

    both = nn.ModuleList([criterion, fusion])
    loss = checkpoint(block, *logits, use_reentrant=reentrant)
    before = {name: x.clone() for name, x in both.state_dict().items()}
    with pytest.raises(RuntimeError, match="expected one call for each backward"):
        loss.backward()
    assert all(torch.equal(x, before[name]) for name, x in both.state_dict().items())
    both.eval()  # when nothing moves
    checkpoint(block, *logits, use_reentrant=reentrant).backward()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_default_dtype_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    logits, target = heads()
    features = [torch.ones(8, 2)] * 3
    expected = loss_of(logits, target, backend=backend)
    gates = GatedFusion([2, 2, 2], backend=backend).eval()(features, unimodal=logits).gates
    torch.set_default_dtype(dtype)
    try:
        actual = loss_of(logits, target, backend=backend)
        again = GatedFusion([2, 2, 2], backend=backend).eval()(features, unimodal=logits).gates
        training = GatedFusion([2, 2, 2], backend=backend)(features, unimodal=logits).gates
        grads = [torch.autograd.grad(x, logits) for x in (actual, expected)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert actual.dtype == training.dtype == torch.float32
    assert torch.equal(actual, expected)
    assert torch.equal(again, gates)
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_a_default_dtype_changes_nothing_of_a_memory(dtype: torch.dtype, soft: bool) -> None:
    logits, target = heads()
    truth = F.one_hot(target, 5).float() if soft else target
    found = []
    for default in (torch.float32, dtype):
        criterion = DynCIMLoss(
            nn.CrossEntropyLoss(), modalities=2, num_samples=8, held_out=0.3, backend="eager"
        )
        torch.set_default_dtype(default)
        try:
            for _ in range(2):
                criterion(logits[0], truth, unimodal=logits[1:], index=torch.arange(8))
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(dict(criterion.state.named_buffers()))
    for name, x in found[0].items():
        assert torch.equal(found[1][name], x), name


def test_state_of_another_dtype_is_taken_as_float32() -> None:
    state = CurriculumState(2, num_samples=4)
    saved = {
        name: x.half() if x.is_floating_point() else x for name, x in state.state_dict().items()
    }
    dtypes = {name: x.dtype for name, x in state.named_buffers()}
    state.load_state_dict(saved, assign=True)
    assert {name: x.dtype for name, x in state.named_buffers()} == dtypes


@each_backend
def test_gradients_of_heads_change_alone(backend: str) -> None:
    logits, target = heads()
    first, second, _ = torch.autograd.grad(loss_of(logits, target, backend=backend), logits)
    weight = torch.ones(8, 5, requires_grad=True)
    product = (weight * first).sum()
    second.mul_(2)
    product.backward()
    assert torch.equal(weight.grad, first)
    first.mul_(weight)  # with grad mode on


@each_backend
def test_backward_from_several_threads_is_that_of_one(backend: str) -> None:
    logits, target = heads(batch=4, classes=300)
    expected = torch.autograd.grad(loss_of(logits, target, backend=backend), logits)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(40):
                loss = loss_of(logits, target, backend=backend)
                calls = [
                    pool.submit(torch.autograd.grad, loss, logits, retain_graph=True)
                    for _ in range(4)
                ]
                for call in calls:
                    for actual, wanted in zip(call.result(), expected, strict=True):
                        assert_allclose(actual, wanted, rtol=1e-4, atol=1e-7)
    finally:
        sys.setswitchinterval(interval)


def test_a_backward_lets_go_of_the_target() -> None:
    logits, _ = heads()
    target = torch.full((8, 5), 0.2)
    held = weakref.ref(target)
    loss = loss_of(logits, target)
    loss.backward()
    del target
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("criterion", [lambda x, y: x.sum(), nn.CrossEntropyLoss(torch.ones(2))])
def test_a_rejected_first_call_settles_nothing(criterion: Any) -> None:
    logits, target = heads()
    loss = DynCIMLoss(criterion)
    with pytest.raises(ValueError, match="expected"):
        loss(logits[0], target, unimodal=logits[1:])
    assert loss.state.modalities is None
    assert loss.state.step == 0


@pytest.mark.parametrize("position", [0, 1, 2])
def test_inference_tensors_are_refused_before_anything_moves(position: int) -> None:
    logits, target = heads(count=2)
    given = [target, *logits]
    with torch.inference_mode():
        given[position] = given[position].clone()
    name = ("target", "logits", "unimodal logits of modality 0")[position]
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=1)
    with pytest.raises(RuntimeError, match=f"^{name}: expected .* inference mode"):
        criterion(given[1], given[0], unimodal=given[2:])
    assert criterion.state.step == 0


def test_statistics_and_gates_under_a_function_transform() -> None:
    logits, _ = heads(count=3)
    rows = [x.detach().expand(2, -1, -1) for x in logits]
    features = [torch.ones(8, 2)] * 3
    fusion = GatedFusion([2, 2, 2]).eval()
    expected = fusion(features, unimodal=[x.detach() for x in logits]).gates

    def gates(*unimodal: Tensor) -> Tensor:
        return fusion(features, unimodal=unimodal).gates

    for actual in torch.func.vmap(gates)(*rows):
        assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


@each_backend
def test_an_incoming_gradient_may_have_no_memory(backend: str) -> None:
    """As the zeros that the backward of ``torch.sgn`` gives."""
    logits, target = heads()
    fused = GatedFusion([5, 5], backend=backend)(logits[:2]).fused
    found = head_statistics(logits, target, backend=backend).loss
    for value in (loss_of(logits, target, backend=backend), fused, found):
        for grad in torch.autograd.grad(value.sgn().sum(), logits, allow_unused=True):
            assert grad is None or not grad.any()


@each_backend
def test_signals_that_stand_still_have_no_volatility(backend: str) -> None:
    logits, target = heads(batch=60, classes=3)
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, backend=backend)
    for _ in range(4):
        criterion(logits[0], target, unimodal=logits[1:])
    assert not criterion.state.volatility.any()


@each_backend
@pytest.mark.parametrize("classes", [3, 5, 100])
def test_a_batch_of_one_has_weight_1(backend: str, classes: int) -> None:
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), pacing_strength=3.0, backend=backend)
    criterion(torch.zeros(1, classes, requires_grad=True), torch.tensor([1]))
    assert not criterion.state.log_class_average.any()


@each_backend
def test_what_is_absent_has_no_gradient_where_no_class_has_weight(backend: str) -> None:
    logits, target = heads(batch=4)
    weight = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    criterion = DynCIMLoss(nn.CrossEntropyLoss(weight), modalities=2, backend=backend)
    present = torch.tensor([[True, False]] * 4)
    criterion(logits[0], target, unimodal=logits[1:], present=present).backward()
    assert not logits[2].grad.any()


@each_backend
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_the_mean_of_nothing_is_that_of_cross_entropy(
    backend: str, masked: bool, nonfinite: Any
) -> None:
    logits, _ = heads(batch=4)
    target = torch.full((4,), -100)
    present = torch.tensor([[True, False]] * 4) if masked else None
    criterion = DynCIMLoss(
        nn.CrossEntropyLoss(), modalities=2, nonfinite=nonfinite, backend=backend
    )
    assert criterion(logits[0], target, unimodal=logits[1:], present=present).isnan()
    assert F.cross_entropy(logits[0], target).isnan()


@each_backend
def test_what_is_there_counts_alike_with_and_without_a_mask(backend: str) -> None:
    found = []
    for present in (None, torch.ones(4, 1, dtype=torch.bool)):
        logits, target = heads(batch=4, count=2)
        with torch.no_grad():
            logits[1][1, 1] = -torch.inf
        criterion = DynCIMLoss(
            nn.CrossEntropyLoss(), modalities=1, unimodal_strength=0.0, backend=backend
        )
        found.append(criterion(logits[0], target, unimodal=logits[1:], present=present))
    assert_allclose(*(x.detach() for x in found), equal_nan=True)


@each_backend
def test_weights_of_logits_outlast_absurd_ones(backend: str) -> None:
    """Several held-out samples whose log-likelihoods are finite, and the sum of them is not."""
    index = torch.arange(200)[held_out(torch.arange(200), 0.5)][:6]
    criterion = DynCIMLoss(
        nn.CrossEntropyLoss(), modalities=1, num_samples=200, held_out=0.5, backend=backend
    )
    fused, own = torch.tensor([[0.0, -3e38]] * 6), torch.tensor([[-3e38, 0.0]] * 6)
    target = torch.zeros(6, dtype=torch.int64)
    for _ in range(3):
        heads = [x.clone().requires_grad_() for x in (fused, own)]
        criterion(heads[0], target, unimodal=heads[1:], index=index)
    state = criterion.state
    assert state.nonfinite == 0
    assert state.held_out_averages.isfinite().all()
    assert ((state.logit_weight >= 0.02) & (state.logit_weight <= 2.0)).all()


@each_backend
def test_a_modality_never_heard_of_has_the_weight_of_the_fusion(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    criterion = DynCIMLoss(
        nn.CrossEntropyLoss(), modalities=2, num_samples=120, held_out=0.3, backend=backend
    )
    present = torch.tensor([[True, False]]).expand(120, 2)
    target = torch.randint(4, (120,), generator=generator)
    for _ in range(30):
        sure = torch.tensor([9.0, 0.1, 9.0]).view(3, 1, 1)
        heads = [*(sure * torch.randn(3, 120, 4, generator=generator)).requires_grad_().unbind()]
        criterion(heads[0], target, unimodal=heads[1:], index=torch.arange(120), present=present)
    fused, heard, never = criterion.state.logit_weight.tolist()
    assert fused < 0.5
    assert heard > fused
    assert never == fused


@each_backend
def test_the_memory_of_what_is_hopeless_is_bounded(backend: str) -> None:
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), num_samples=1, held_out=0.0, backend=backend)
    logits = torch.tensor([[1e31, 0.0]], requires_grad=True)
    criterion(logits, torch.tensor([1]), index=torch.tensor([0]))
    assert_allclose(criterion.state.memory_nll, 1e30, rtol=1e-6)


@each_backend
def test_qualities_far_apart_leave_the_farthest_a_coefficient(backend: str) -> None:
    log_quality = [-440.0, -400.0, -642.0]
    criterion = DynCIMLoss(
        nn.CrossEntropyLoss(reduction="sum"), modalities=2, pacing_strength=0.0, backend=backend
    )
    criterion.state.log_quality.copy_(torch.tensor(log_quality))
    criterion.state.seen.fill_(10**6)
    criterion.state.decay = 1.0 - 1e-12  # so that they stay
    logits = [torch.zeros(1, 2, requires_grad=True) for _ in range(3)]
    criterion(logits[0], torch.tensor([0]), unimodal=logits[1:]).backward()
    found = [float(x.grad[0, 1] / logits[0].grad[0, 1]) for x in logits[1:]]
    assert_allclose(found, ref.modality_coefficients(log_quality), rtol=1e-4)


def test_the_mass_of_class_weights_in_half_precision_does_not_overflow() -> None:
    target = torch.arange(4096) % 10
    logits = torch.zeros(4096, 10, dtype=torch.float16, requires_grad=True)
    criterion = DynCIMLoss(nn.CrossEntropyLoss(torch.full((10,), 20.0))).half()
    loss = criterion(logits, target)
    loss.backward()
    assert_allclose(loss.detach(), math.log(10.0), rtol=1e-3)
    assert logits.grad.any()


def test_class_probabilities_may_be_below_0_as_those_of_cross_entropy() -> None:
    target, logits = torch.tensor([[1.2, -0.2, 0.0]]), torch.randn(1, 3)
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), surprise_strength=0.0, pacing_strength=0.0)
    leaf = logits.clone().requires_grad_()
    # With a modality it is not handed to the criterion.
    loss = criterion(leaf, target, unimodal=[torch.zeros(1, 3)])
    expected = F.cross_entropy(logits, target) + F.cross_entropy(torch.zeros(1, 3), target)
    assert_allclose(loss.detach(), expected, rtol=1e-5)


@each_backend
def test_a_negated_incoming_gradient_keeps_its_sign(backend: str) -> None:
    logits, target = heads()
    loss = loss_of(logits, target, backend=backend)
    plain = torch.autograd.grad(loss, logits, torch.tensor(-1.0), retain_graph=True)
    negated = torch.autograd.grad(loss, logits, torch._neg_view(torch.tensor(1.0)))
    for x, y in zip(plain, negated, strict=True):
        assert_allclose(x, y, rtol=1e-6, atol=1e-8)


@each_backend
@pytest.mark.parametrize("far", [700.0, 800.0, 1e4])
def test_a_fusion_far_behind_its_modality_gives_a_finite_loss(backend: str, far: float) -> None:
    fused, alone = torch.zeros(2, 3), torch.zeros(2, 3, requires_grad=True)
    fused[:, 0] = far
    fused.requires_grad_()
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=1, backend=backend)
    for _ in range(2):
        loss = criterion(fused, torch.tensor([1, 2]), unimodal=[alone])
        loss.backward()
        assert_allclose(loss.item(), far + torch.tensor(3.0).log().item(), rtol=1e-5)
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (fused, alone))


@each_backend
@pytest.mark.parametrize("surprise", [60.0, 75.0, 95.0, 3000.0])
def test_a_modality_of_next_to_weightless_samples_is_as_bad_as_it_is(
    backend: str, surprise: float
) -> None:
    fused = torch.zeros(2, 3)
    fused[1, 0] = surprise
    unimodal = [fused.clone() for _ in range(2)]
    fused.requires_grad_()
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, label_noise=1.0, backend=backend)
    present = torch.tensor([[True, False], [True, True]])
    criterion(fused, torch.tensor([0, 1]), unimodal=unimodal, present=present)
    assert criterion.state.seen.tolist() == [1, 1, 1]
    assert_allclose(criterion.state.log_quality[2], -surprise, rtol=1e-5)


@each_backend
def test_logits_that_overflow_only_in_a_sum_are_finite(backend: str) -> None:
    logits = torch.zeros(2, 3)
    logits[0, 0] = 2e38
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, backend=backend)
    criterion(logits.requires_grad_(), torch.tensor([1, 1]), unimodal=[logits.detach()] * 2)
    assert criterion.state.nonfinite == 0
    assert all(buffer.isfinite().all() for buffer in criterion.state.buffers())


@each_backend
def test_features_whose_squares_overflow_in_a_sum_leave_finite_moments(backend: str) -> None:
    large = torch.full((512, 2), 9e17)
    large[256:] *= -1.0
    large[:, 1] = 0.0
    fusion = GatedFusion([2, 2], backend=backend, dropout=0.0)
    fusion([large, torch.randn(512, 2)])
    assert all(buffer.isfinite().all() for buffer in fusion.moments.buffers())


@each_backend
@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (nn.CrossEntropyLoss(torch.ones(5, dtype=torch.float64)), "expected scalar type"),
        (nn.CrossEntropyLoss(label_smoothing=1.5), r"label_smoothing: .*\[0, 1\], got 1.5"),
    ],
)
def test_what_the_criterion_rejects_moves_no_state(
    backend: str, criterion: nn.Module, message: str
) -> None:
    logits, target = heads(count=1)
    loss = DynCIMLoss(
        criterion, surprise_strength=0.0, pacing_strength=0.0, num_samples=8, backend=backend
    )
    with pytest.raises((RuntimeError, ValueError), match=message):
        loss(logits[0], target, index=torch.arange(8))
    assert loss.state.step == 0
    assert not loss.state.memory_visits.any()


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_of_nothing_but_held_out_samples_is_not_trained_on(
    backend: str, reduction: Any, weighted: bool
) -> None:
    logits, target = heads(batch=2)
    index = held_out(torch.arange(8), 0.3).nonzero().squeeze(1)[:2]
    criterion = DynCIMLoss(
        nn.CrossEntropyLoss(weight=torch.full((5,), 0.5) if weighted else None),
        modalities=2,
        num_samples=8,
        held_out=0.3,
        reduction=reduction,
        backend=backend,
    )
    loss = criterion(logits[0], target, unimodal=logits[1:], index=index)
    assert not loss.any()
    assert not any(grad.any() for grad in torch.autograd.grad(loss.sum(), logits))
    assert not criterion.state.seen.any()
    assert criterion.state.held_out_averages[0].all()
    rest = (~held_out(torch.arange(8), 0.3)).nonzero().squeeze(1)[:2]
    assert (criterion(logits[0], target, unimodal=logits[1:], index=rest) > 0.0).all()


@each_backend
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.95])
def test_a_rare_class_that_all_heads_deny_keeps_its_weight(backend: str, decay: float) -> None:
    """Or it would never be learnt, and be denied the more."""
    state = CurriculumState(2, num_samples=60, decay=decay)
    criterion = DynCIMLoss(
        nn.CrossEntropyLoss(), state=state, label_noise=1.0, held_out=0.0, backend=backend
    )
    index = torch.arange(60)
    target = (index % 10 == 0).long()
    logits = (torch.tensor([2.2, 0.0]) + 0.1 * torch.randn(60, 2)).requires_grad_()
    for _ in range(200):
        criterion(logits, target, unimodal=[logits.detach()] * 2, index=index)
    assert_allclose(state.memory_weight[target == 1].mean(), 1.0, rtol=1e-3)
    assert_allclose(state.memory_weight[target == 0].mean(), 1.0, rtol=1e-3)
    assert not state.log_class_average[2:].any()


@each_backend
def test_who_always_predicts_the_most_frequent_class_has_next_to_no_skill(backend: str) -> None:
    """However frequent that is; who recognises half of the others has about half."""
    index = torch.arange(400)
    target = (index % 10 == 0).long()
    constant = torch.tensor([2.0, 0.0]).expand(400, 2)
    informed = 4.0 * F.one_hot(torch.where(index % 20 == 0, 0, target), 2).float()
    state = CurriculumState(["constant", "informed"], num_samples=400)
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), state=state, held_out=0.2, backend=backend)
    generator = torch.Generator().manual_seed(0)
    skills = []
    for rows in [r for _ in range(9) for r in torch.randperm(400, generator=generator).split(16)]:
        fused = informed[rows].requires_grad_()
        others = [constant[rows], informed[rows]]
        criterion(fused, target[rows], unimodal=others, index=index[rows])
        skills.append(state.skill.clone())
    assert state.class_seen[:2].tolist() == [
        9 * int((target[~held_out(index, 0.2)] == c).sum()) for c in (0, 1)
    ]
    _, of_constant, of_informed = torch.stack(skills[50:]).mean(dim=0)
    assert of_constant < 0.15 < 0.35 < of_informed < 0.8


@each_backend
def test_a_weight_means_the_same_in_a_batch_of_any_size(backend: str) -> None:
    """Of a sample alone, too: a wrong label counts next to nothing, nor does quality fall."""
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(20)
    target = index % 2
    logits = 3.0 * F.one_hot((target + (index < 4)) % 2, 2).float()
    logits[:, 0] += 0.1 * (index % 7 - 3)
    weights, quality = {}, {}
    for size in (20, 5, 1):
        state = CurriculumState(2, num_samples=20, decay=0.99)
        criterion = DynCIMLoss(
            nn.CrossEntropyLoss(),
            state=state,
            label_noise=0.2,
            held_out=0.0,
            pacing_strength=0.0,
            backend=backend,
        )
        for _ in range(60):
            for rows in torch.randperm(20, generator=generator).split(size):
                x = logits[rows].requires_grad_()
                criterion(x, target[rows], unimodal=[x, x], index=index[rows])
        weights[size], quality[size] = state.memory_weight.clone(), state.quality.clone()
    assert weights[20][:4].max() < 0.15 < 0.85 < weights[20][4:].min()
    for size in (5, 1):
        assert_allclose(weights[size], weights[20], rtol=0.05)
        assert_allclose(quality[size], quality[20], atol=0.05)


@each_backend
def test_a_class_that_all_heads_rule_out_comes_back(backend: str) -> None:
    """However sure they are, as after a divergence; and nothing outweighs its batch by far."""
    state = CurriculumState(2, num_samples=100, decay=0.9)
    criterion = DynCIMLoss(
        nn.CrossEntropyLoss(), state=state, label_noise=1.0, held_out=0.0, backend=backend
    )
    index = torch.arange(100)
    target = index % 2
    logits = torch.tensor([0.0, 1000.0]).repeat(100, 1).requires_grad_()
    for _ in range(30):
        criterion(logits, target, unimodal=[logits.detach()] * 2, index=index)
    assert_allclose(state.memory_weight, 1.0, rtol=1e-3)
    assert -8.01 < state.log_class_average[0] < -7.9
    learnt = torch.zeros(100, 2).requires_grad_()
    criterion(learnt, target, unimodal=[learnt.detach()] * 2, index=index)
    assert state.memory_weight.max() < 1.001 / (1 - 0.9**50)


def test_class_probabilities_are_levelled_by_their_likeliest_class() -> None:
    states = []
    logits, target = heads(batch=30)
    for soft in (False, True):
        criterion = DynCIMLoss(
            nn.CrossEntropyLoss(), modalities=2, label_noise=1.0, backend="eager", held_out=0.0
        )
        truth = F.one_hot(target, 5).float() if soft else target
        for _ in range(3):
            criterion(logits[0], truth, unimodal=logits[1:])
        states.append(criterion.state)
    assert states[0].log_class_average[:5].abs().min() > 0.0
    assert_allclose(states[1].log_class_average, states[0].log_class_average, rtol=1e-5, atol=1e-6)


@each_backend
def test_a_modality_that_is_not_heard_for_long_keeps_its_skill(backend: str) -> None:
    """Averages of nothing would fade to the smallest numbers, whose ratio is anything."""
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, num_samples=128, backend=backend)
    index, target = torch.arange(64), torch.arange(64) % 4
    assert held_out(index, 0.05).any()
    logits = torch.eye(4)[target].requires_grad_()
    weak = torch.eye(4)[torch.where(index < 32, target, 0)]
    both, one = torch.ones(64, 2, dtype=torch.bool), torch.tensor([True, False]).expand(64, 2)
    criterion(logits, target, unimodal=[logits.detach(), weak], index=index, present=both)
    before = criterion.state.skill.clone()
    assert 0 < before[2] < 1
    for _ in range(2200):
        criterion(logits, target, unimodal=[logits.detach(), weak], index=index, present=one)
    assert torch.equal(criterion.state.skill[2], before[2])


def test_a_compiled_loss_takes_no_negative_index() -> None:
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=1, num_samples=8, held_out=0.05)
    compiled = torch.compile(criterion, backend="aot_eager")
    logits, target = heads(count=2)
    with pytest.raises((IndexError, RuntimeError), match=r"index|out of"):
        compiled(logits[0], target, unimodal=logits[1:], index=torch.arange(8) - 1)
    assert not criterion.state.memory_visits.any()


@each_backend
@pytest.mark.parametrize("make", [torch.ones, partial(torch.ones, requires_grad=True)])
def test_a_class_weight_that_autograd_cannot_take_moves_no_state(
    backend: str, make: Callable[[int], Tensor]
) -> None:
    logits, target = heads(count=2)
    with torch.inference_mode(make is torch.ones):
        weight = make(logits[0].shape[1])
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=1, backend=backend)
    criterion.criterion.weight = weight  # type: ignore[union-attr]
    with pytest.raises((RuntimeError, ValueError), match="weight: expected"):
        criterion(logits[0], target, unimodal=logits[1:])
    assert criterion.state.step == 0


@each_backend
@pytest.mark.parametrize("modalities", [8, 9])
def test_a_fusion_takes_as_many_modalities_as_its_kernels(backend: str, modalities: int) -> None:
    state = CurriculumState(modalities)
    state.logit_weight.copy_(torch.linspace(0.9, 0.1, 1 + modalities))
    fusion = GatedFusion([2] * modalities, state=state, dropout=0.0, backend=backend)
    features = [torch.randn(4, 2) for _ in range(modalities)]
    gates = fusion(features, unimodal=[torch.zeros(4, 3)] * modalities).gates
    assert_allclose(gates, 1 / modalities, rtol=1e-5)
    assert_allclose(fusion.logit_factor, ref.relative_logit_weights(state.logit_weight), rtol=1e-5)


@each_backend
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # torch's own, from 2.14 on
def test_a_forward_mode_gradient_is_refused_before_the_state_moves(
    backend: str, plain: bool
) -> None:
    logits, target = heads(count=2)
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=1, backend=backend)
    if plain:
        criterion.eval()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits[0], torch.ones_like(logits[0]))
        if plain:
            found = criterion(dual, target)
            assert forward_ad.unpack_dual(found).tangent is not None
        else:
            with pytest.raises(RuntimeError, match=r"logits: .*forward-mode"):
                criterion(dual, target, unimodal=logits[1:])
            criterion(logits[0], target, unimodal=logits[1:])
    assert criterion.state.step == (0 if plain else 1)


@each_backend
def test_label_noise_is_what_all_able_modalities_contradict(backend: str) -> None:
    """One that knows nothing agrees with nobody, whatever the label: it is not asked.

    One that is able alone shows an eightieth of it; where none is, all must agree.
    """
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(1000)
    target = index % 4
    wrong = torch.rand(1000, generator=generator) < 0.3
    given = torch.where(wrong, (target + 1) % 4, target)
    right = 6.0 * F.one_hot(target, 4).float()
    guess, other = 6.0 * F.one_hot(torch.randint(4, (2, 1000), generator=generator), 4).float()
    found = []
    for others in ([right, right, guess], [right, guess], [guess, other]):
        state = CurriculumState(len(others), num_samples=1000)
        criterion = DynCIMLoss(nn.CrossEntropyLoss(), state=state, backend=backend)
        for _ in range(3):
            for rows in torch.randperm(1000, generator=generator).split(100):
                fused = right[rows].requires_grad_()
                unimodal = [x[rows] for x in others]
                criterion(fused, given[rows], unimodal=unimodal, index=index[rows])
        found.append(float(state.label_noise))
    assert found[0] > 0.2
    assert 0.2 < 40 * found[1] < 0.4
    assert found[2] < 0.1


@each_backend
def test_label_noise_is_what_the_fusion_learns_by_heart_where_only_it_knows(backend: str) -> None:
    """Half of the labels are wrong, of which the fusion has learnt none, half or all.

    Where a modality knows most of what it does, and dissents from no more, that is no noise.
    """
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(1000)
    held = held_out(index, 0.2)
    target = index % 4
    wrong = index // 4 % 2 == 0
    wrong[held] = torch.arange(int(held.sum())) % 2 == 0  # half of both
    given = torch.where(wrong, (target + 1) % 4, target)
    right, learnt = (8.0 * F.one_hot(x, 4).float() for x in (target, given))
    guess, other = 8.0 * F.one_hot(torch.randint(4, (2, 1000), generator=generator), 4).float()
    rival = torch.where((index % 4 == 3).unsqueeze(1), guess, right)
    found = {}
    for by_heart in (0.0, 0.5, 1.0):
        for known, others in (("nothing", [guess, other]), ("most", [rival, guess])):
            state = CurriculumState(2, num_samples=1000)
            criterion = DynCIMLoss(
                nn.CrossEntropyLoss(), state=state, held_out=0.2, backend=backend
            )
            mine = ~held & (torch.rand(1000, generator=generator) < by_heart)
            says = torch.where(mine.unsqueeze(1), learnt, right)
            for _ in range(6):
                for rows in torch.randperm(1000, generator=generator).split(100):
                    fused = says[rows].requires_grad_()
                    unimodal = [x[rows] for x in others]
                    criterion(fused, given[rows], unimodal=unimodal, index=index[rows])
            found[by_heart, known] = float(state.label_noise)
    assert found[0.5, "nothing"] > 0.06  # beyond 0.01, from which it acts in full
    assert found[0.0, "nothing"] < 0.03  # not 0: those held out of late differ a little
    assert found[1.0, "nothing"] < 0.03
    assert all(found[share, "most"] < 0.03 for share in (0.0, 0.5, 1.0))


@each_backend
def test_noise_that_is_given_counts_whatever_the_fusion_has_learnt(backend: str) -> None:
    labels = torch.arange(40) % 4
    logits = 2.0 * F.one_hot(labels, 4).float()
    logits[:20] = logits[:20].roll(1, dims=1)  # contradicts the first half
    index = torch.arange(40)
    kept = {}
    for given in (0.3, None):
        for skill in (0.9, 0.05):
            criterion = DynCIMLoss(
                nn.CrossEntropyLoss(),
                modalities=2,
                num_samples=40,
                label_noise=given,
                held_out=0.0,
                pacing_strength=0.0,
                backend=backend,
            )
            criterion.state.skill.fill_(skill)
            criterion.state.label_noise.fill_(0.3)
            heads = [logits.clone().requires_grad_() for _ in range(3)]
            criterion(heads[0], labels, unimodal=heads[1:], index=index)
            weights = criterion.state.memory(index).weight
            kept[given, skill] = float(weights[:20].mean() / weights[20:].mean())
    assert kept[None, 0.9] < 0.3
    assert_allclose([kept[0.3, 0.05], kept[0.3, 0.9]], kept[None, 0.9], rtol=1e-5)
    assert_allclose(kept[None, 0.05], kept[None, 0.9] ** 0.2, rtol=1e-4)


def test_wrong_labels_of_two_classes_are_not_learnt() -> None:
    """Two classes share out a doubt of few nats, which must be enough to keep them out."""
    torch.manual_seed(0)
    target = torch.randint(2, (500,))
    wrong = torch.rand(500) < 0.3
    given = torch.where(wrong, 1 - target, target)
    inputs = torch.randn(2, 500, 40)
    inputs[:, :, :10] += target.unsqueeze(1) - 0.5
    encoders = [nn.Sequential(nn.Linear(40, 64), nn.ReLU()) for _ in inputs]
    heads = [nn.Linear(128, 2), nn.Linear(64, 2), nn.Linear(64, 2)]
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, num_samples=500, label_noise=0.3)
    parameters = nn.ModuleList([*encoders, *heads]).parameters()
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for _ in range(30):
        for rows in torch.randperm(500).split(50):
            features = [encode(x[rows]) for encode, x in zip(encoders, inputs, strict=True)]
            parts = [torch.cat(features, 1), *features]
            fused, *unimodal = (head(x) for head, x in zip(heads, parts, strict=True))
            loss = criterion(fused, given[rows], unimodal=unimodal, index=rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        features = [encode(x) for encode, x in zip(encoders, inputs, strict=True)]
        fused = heads[0](torch.cat(features, 1))
    weight = criterion.state.memory(torch.arange(500)).weight
    assert weight[wrong].mean() < 0.5 * weight[~wrong].mean()
    assert (fused.argmax(1) == target).float().mean() > 0.85


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_of_which_everything_is_skipped_has_no_loss(backend: str, reduction: str) -> None:
    logits, target = heads(count=3)
    bad = torch.full_like(logits[1], torch.nan).requires_grad_()
    criterion = DynCIMLoss(
        nn.CrossEntropyLoss(reduction=reduction), modalities=2, nonfinite="skip", backend=backend
    )
    loss = criterion(logits[0], target, unimodal=[bad, logits[2]])
    gradients = torch.autograd.grad(loss, [logits[0], bad, logits[2]])
    assert loss == 0.0
    assert not any(x.any() for x in gradients)
    assert criterion.state.nonfinite == len(target)


@pytest.mark.parametrize(
    "criterion", [nn.CrossEntropyLoss(), partial(F.cross_entropy, reduction="none")]
)
def test_a_function_transform_is_refused_in_training_alone(criterion: Any) -> None:
    logits, target = heads(count=1)
    loss = DynCIMLoss(criterion, reduction="mean")
    with pytest.raises(RuntimeError, match=r"DynCIMLoss: expected no transform of torch.func"):
        torch.func.grad(lambda x: loss(x, target))(logits[0].detach())
    assert loss.state.step == 0
    found = torch.func.grad(lambda x: loss.eval()(x, target))(logits[0].detach())
    (expected,) = torch.autograd.grad(F.cross_entropy(logits[0], target), logits)
    assert_allclose(found, expected, rtol=1e-5)


@each_backend
def test_what_tells_nothing_by_itself_is_not_silenced(backend: str) -> None:
    """A signal under noise, and the noise alone: neither silenced nor taken for wrong labels."""
    torch.manual_seed(0)
    size, classes = 2000, 3
    label, noise = torch.randint(classes, (2 * size,)), 3.0 * torch.randn(2 * size, 8)
    inputs = {"signal": torch.randn(classes, 8)[label] + noise, "reference": noise}
    heads = nn.ModuleDict({name: nn.Linear(16, classes) for name in inputs})
    encoders = nn.ModuleDict({name: nn.Sequential(nn.Linear(8, 16), nn.ReLU()) for name in inputs})
    head = nn.Linear(32, classes)
    criterion = DynCIMLoss(
        nn.CrossEntropyLoss(), modalities=list(inputs), num_samples=size, backend=backend
    )
    fusion = GatedFusion(dict.fromkeys(inputs, 16), state=criterion.state, backend=backend)

    def predict(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = {name: encoders[name](x[rows]) for name, x in inputs.items()}
        unimodal = {name: heads[name](x) for name, x in features.items()}
        fused, _, gated = fusion(features, unimodal=unimodal)
        return head(fused) + gated, unimodal

    learnt = nn.ModuleList([heads, encoders, head])
    optimizer = torch.optim.Adam(learnt.parameters(), lr=3e-3)
    for _ in range(15):
        for index in torch.randperm(size).split(50):
            logits, unimodal = predict(index)
            optimizer.zero_grad()
            criterion(logits, label[index], unimodal=unimodal, index=index).backward()
            optimizer.step()
    fusion.eval()
    rows = torch.arange(size, 2 * size)
    right = predict(rows)[0].argmax(dim=1) == label[rows]
    assert right.float().mean() > 0.9
    assert criterion.state.label_noise < 0.02
    assert criterion.state.skill[2] < 0.25 * criterion.state.skill[1]  # by itself next to nothing


@pytest.mark.parametrize("seed", [0, 2])
def test_weights_of_logits_do_not_follow_what_training_does_by_them(seed: int) -> None:
    """Classes that overlap: weights that moved gated logits in training ended at their bounds."""
    torch.manual_seed(seed)
    names, size = ["a", "b", "c"], 8000
    target = torch.randint(2, (size,))
    inputs = {name: torch.randn(2, 12)[target] + 6 * torch.randn(size, 12) for name in names}
    criterion = DynCIMLoss(
        nn.CrossEntropyLoss(), modalities=names, num_samples=size, label_noise=0.0
    )
    fusion = GatedFusion(dict.fromkeys(names, 32), state=criterion.state)
    encoders = nn.ModuleDict(
        {n: nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32)) for n in names}
    )
    heads, head = nn.ModuleDict({n: nn.Linear(32, 2) for n in names}), nn.Linear(96, 2)
    learnt = [p for module in (encoders, heads, head) for p in module.parameters()]
    optimizer = torch.optim.Adam(learnt, 2e-3)
    for index in torch.randperm(size).split(64):
        features = {n: encoders[n](x[index]) for n, x in inputs.items()}
        unimodal = {n: heads[n](x) for n, x in features.items()}
        fused, _, gated = fusion(features, unimodal=unimodal)
        loss = criterion(head(fused) + gated, target[index], unimodal=unimodal, index=index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = criterion.state
    assert state.quality[0] > 0.1
    assert state.logit_weight[0] > 0.2
    assert (fusion.logit_factor < 2.0).any()


@each_backend
def test_a_class_masked_in_all_heads_does_not_settle_their_weights(backend: str) -> None:
    """What is taken off the fused logits would make of a class ruled out the likeliest."""
    generator = torch.Generator().manual_seed(0)
    criterion = DynCIMLoss(
        nn.CrossEntropyLoss(), modalities=3, num_samples=200, held_out=0.5, backend=backend
    )
    criterion.state.logit_weight.copy_(torch.tensor([1.0, 0.1, 0.1, 0.1]))
    target = torch.randint(3, (200,), generator=generator)
    for step in range(200):
        heads = torch.randn(4, 200, 4, generator=generator)
        heads[:, :, :3] += torch.nn.functional.one_hot(target, 3)
        heads[:, :, 3] = -torch.inf
        fused, *others = heads.requires_grad_().unbind()
        criterion(fused, target, unimodal=others, index=torch.arange(200))
        if step == 0:
            assert criterion.state.held_out_averages[4].abs().max() < 100.0
    weight = criterion.state.logit_weight
    assert ((weight > 0.1) & (weight < 1.9)).all()
