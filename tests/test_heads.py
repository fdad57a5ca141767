from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import CLASSES, Foreign, batch, each_backend, needs_native
from numpy.testing import assert_allclose
from strategies import Array, Heads, arrays, heads, reals, to_torch, upcast, with_nan
from torch import Tensor, nn
from torch.nn import functional as F

from dyncim_core import DynCIMLoss, head_statistics
from dyncim_core import reference as ref
from dyncim_core.kernels import eager

TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
all_dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
FIELDS = ("loss", "nll", "entropy", "distance")


class Criterion:
    """The arguments of cross-entropy, as torch and as NumPy take them."""

    def __init__(self, weight: Array | None, label_smoothing: float) -> None:
        self.weight, self.label_smoothing = weight, label_smoothing

    def torch(self) -> dict[str, Any]:
        weight = None if self.weight is None else torch.from_numpy(self.weight)
        return {"weight": weight, "label_smoothing": self.label_smoothing}

    def numpy(self) -> dict[str, Any]:
        return {"weight": self.weight, "label_smoothing": self.label_smoothing}


@st.composite
def problems(draw: st.DrawFn) -> tuple[Heads, Criterion]:
    case = draw(heads())
    classes = case.logits[0].shape[1]
    weight = draw(st.none() | arrays(classes, reals(0.25, 4)))
    return case, Criterion(weight, draw(st.sampled_from([0.0, 0.1, 1.0])))


def leaves(case: Heads, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.from_numpy(x).to(dtype).requires_grad_() for x in case.logits]


def truth(case: Heads, dtype: torch.dtype = torch.float64) -> Tensor:
    target = torch.from_numpy(case.target)
    return target.to(dtype) if target.is_floating_point() else target


def cross_entropies(logits: list[Tensor], target: Tensor, criterion: Criterion) -> Tensor:
    return torch.stack(
        [F.cross_entropy(x, target, reduction="none", **criterion.torch()) for x in logits]
    )


@all_dtypes
@given(problem=problems())
def test_statistics_agree_with_the_reference(
    problem: tuple[Heads, Criterion], dtype: torch.dtype
) -> None:
    case, criterion = problem
    rows = [
        with_nan(x, None if case.present is None else case.present[h])
        for h, x in enumerate(case.logits)
    ]
    logits = [to_torch(x, dtype) for x in rows]
    actual = head_statistics(
        logits, truth(case), present=to_torch(case.present), **criterion.torch()
    )
    expected = ref.head_statistics(
        [upcast(x) for x in logits], case.target, present=case.present, **criterion.numpy()
    )
    tolerance = TOLERANCES[dtype]
    for name in FIELDS:
        value = getattr(actual, name)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        scale = max(1.0, float(np.abs(getattr(expected, name)).max(initial=0.0)))
        assert_allclose(
            value.detach(), getattr(expected, name), rtol=tolerance, atol=tolerance * scale
        )


@given(heads())
def test_prediction_is_a_most_probable_class(case: Heads) -> None:
    prediction = head_statistics(leaves(case), truth(case)).prediction
    for h, logits in enumerate(case.logits):
        chosen = np.take_along_axis(logits, prediction[h].numpy()[:, None], axis=1)[:, 0]
        assert_allclose(chosen, logits.max(axis=1))


@given(problems())
def test_loss_and_gradient_are_those_of_cross_entropy(problem: tuple[Heads, Criterion]) -> None:
    case, criterion = problem
    ours, theirs = leaves(case), leaves(case)
    loss = head_statistics(ours, truth(case), **criterion.torch()).loss
    expected = cross_entropies(theirs, truth(case), criterion)
    assert_allclose(loss.detach(), expected.detach(), rtol=1e-12, atol=1e-10)
    coef = torch.linspace(0.5, 2.0, loss.numel(), dtype=torch.float64).view_as(loss)
    actual = torch.autograd.grad((coef * loss).sum(), ours, retain_graph=True)
    again = torch.autograd.grad((coef * loss).sum(), ours)
    for grad, second, true in zip(
        actual, again, torch.autograd.grad((coef * expected).sum(), theirs), strict=True
    ):
        assert_allclose(grad, true, rtol=1e-9, atol=1e-10)
        assert torch.equal(grad, second)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradient_against_finite_differences(soft: bool, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [
        torch.randn(3, 4, dtype=torch.float64, generator=generator).requires_grad_()
        for _ in range(3)
    ]
    target = torch.tensor([0, -100, 3])
    if soft:
        target = torch.rand(3, 4, dtype=torch.float64, generator=generator).softmax(dim=1)
    weight = torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64)
    present = torch.tensor([[True] * 3, [True, False, True], [False, True, True]])

    def loss(*heads: Tensor) -> Tensor:
        return head_statistics(
            heads, target, present=present, weight=weight, label_smoothing=smoothing
        ).loss

    assert torch.autograd.gradcheck(loss, logits)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_gradient_stays_exact_at_fifty_thousand_classes(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    single = (scale * torch.randn(2, 50257, generator=generator)).requires_grad_()
    double = single.detach().double().requires_grad_()
    target = torch.tensor([7, 50256])
    head_statistics([single], target).loss.sum().backward()
    head_statistics([double], target).loss.sum().backward()
    assert single.grad is not None
    assert double.grad is not None
    error = (single.grad - double.grad).norm() / double.grad.norm()
    assert error < 2e-6


def test_low_precision_gradients_are_those_of_float32_rounded() -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(2)).bfloat16()
    low, high = logits.clone().requires_grad_(), logits.float().requires_grad_()
    target = torch.arange(4)
    head_statistics([low], target).loss.sum().backward()
    head_statistics([high], target).loss.sum().backward()
    assert low.grad is not None
    assert high.grad is not None
    assert torch.equal(low.grad, high.grad.bfloat16())


def test_rows_without_coefficient_get_no_gradient_even_from_nan() -> None:
    logits = torch.full((2, 3), math.nan)
    logits[1] = 1.0
    logits.requires_grad_()
    loss = head_statistics([logits], torch.tensor([0, 1]), guard=True).loss
    torch.where(torch.tensor([False, True]), loss, 0.0).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == [0.0, 0.0, 0.0]
    assert logits.grad[1].abs().sum() > 0


def test_without_the_guard_nan_logits_show() -> None:
    """As they do in cross-entropy: the guard is a choice."""
    logits = torch.full((1, 3), math.nan, requires_grad=True)
    (0.0 * head_statistics([logits], torch.tensor([0])).loss.nan_to_num()).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isnan().all()


@given(heads())
def test_absent_heads_get_no_gradient_whatever_they_hold(case: Heads) -> None:
    if case.present is None:
        return
    rows = [
        torch.from_numpy(with_nan(x, p)).requires_grad_()
        for x, p in zip(case.logits, case.present, strict=True)
    ]
    filled = leaves(case)
    present = to_torch(case.present)
    for logits in (rows, filled):
        head_statistics(logits, truth(case), present=present).loss.sum().backward()
    for row, other, here in zip(rows, filled, present, strict=True):
        assert row.grad is not None
        assert (row.grad[~here] == 0).all()
        assert torch.equal(row.grad, other.grad)


def test_only_the_loss_is_differentiable() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    statistics = head_statistics([logits], torch.tensor([0, 1]))
    assert statistics.loss.requires_grad
    assert not any(field.requires_grad for field in statistics[1:])


def test_a_head_that_needs_no_gradient_gets_none() -> None:
    fused, other = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3)
    head_statistics([fused, other], torch.tensor([0, 1])).loss.sum().backward()
    assert fused.grad is not None
    assert other.grad is None


def test_masked_classes_have_no_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    statistics = head_statistics([logits, logits], torch.tensor([0]))
    assert_allclose(statistics.entropy, math.log(2.0) * np.ones((2, 1)), rtol=1e-6)
    assert_allclose(statistics.nll, math.log(2.0) * np.ones((2, 1)), rtol=1e-6)


def test_a_batch_of_ignored_samples_has_no_loss_and_no_gradient() -> None:
    logits = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
    target = torch.tensor([7, 7])
    statistics = head_statistics(logits, target, ignore_index=7, label_smoothing=0.1)
    assert (statistics.loss == 0).all()
    assert (statistics.nll == 0).all()
    assert (statistics.entropy > 0).all()
    statistics.loss.sum().backward()
    assert all(x.grad is not None and (x.grad == 0).all() for x in logits)


def test_the_fused_head_alone() -> None:
    statistics = head_statistics([torch.tensor([[0.0, 0.0]])], torch.tensor([1]))
    assert_allclose(statistics.nll, [[math.log(2.0)]], rtol=1e-6)
    assert statistics.distance.tolist() == [[0.0]]


def test_one_class_is_certain() -> None:
    logits = [torch.tensor([[value], [-value]], requires_grad=True) for value in (0.0, 1e4)]
    statistics = head_statistics(logits, torch.tensor([0, 0]), label_smoothing=0.1)
    assert all((field == 0).all() for field in statistics)
    statistics.loss.sum().backward()
    assert all(x.grad is not None and x.grad.abs().max() < 1e-6 for x in logits)


def test_empty_batch() -> None:
    statistics = head_statistics([torch.zeros(0, 3)] * 2, torch.zeros(0, dtype=torch.int64))
    assert all(field.shape == (2, 0) for field in statistics)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("kept", [0, 2**30])
@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("classes", [3, 20, 100])
def test_sizes_that_are_worked_on_differently_agree(
    monkeypatch: pytest.MonkeyPatch, classes: int, rows: int, kept: int, soft: bool
) -> None:
    """In blocks of rows, filled up, with the softmax kept or not, and as large batches are."""
    monkeypatch.setattr(eager, "_BLOCK", 2 * rows * classes)
    monkeypatch.setattr(eager, "_KEPT", kept)
    monkeypatch.setattr(eager, "_MANY_LOGITS", 1)
    generator = torch.Generator().manual_seed(classes)
    logits = [torch.randn(7, classes, generator=generator).double().round() for _ in range(2)]
    target = torch.arange(7) % 3
    target[4] = -100
    if soft:
        target = torch.rand(7, classes, generator=generator).double()
    else:
        logits[0][:, -1] = -math.inf
    smoothing = 0.1 if soft else 0.0
    for x in logits:
        x.requires_grad_()
    found = head_statistics(logits, target, label_smoothing=smoothing, backend="eager")
    expected = ref.head_statistics(
        [x.detach().numpy() for x in logits], target.numpy(), label_smoothing=smoothing
    )
    for name in FIELDS:
        assert_allclose(getattr(found, name).detach(), getattr(expected, name), atol=1e-12)
    assert torch.equal(found.prediction, torch.stack([x.argmax(dim=1) for x in logits]))

    grads = torch.autograd.grad(found.loss.sum(), logits, retain_graph=True)
    plain = [F.cross_entropy(x, target, label_smoothing=smoothing, reduction="sum") for x in logits]
    for grad, truth in zip(grads, torch.autograd.grad(sum(plain), logits), strict=True):
        assert_allclose(grad, truth, atol=1e-12)
    again = torch.autograd.grad(found.loss.sum(), logits)
    assert all(torch.equal(x, y) for x, y in zip(grads, again, strict=True))


def test_the_first_of_equal_classes_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_MANY_LOGITS", 1)
    logits = torch.zeros(3, 40)
    logits[1, [7, 30]] = 1.0
    logits[2] = -math.inf
    found = head_statistics([logits], torch.zeros(3, dtype=torch.int64), backend="eager")
    assert found.prediction.tolist() == [[0, 7, 0]]


def test_strides_do_not_matter() -> None:
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
    view = logits.t()[::2]
    target = torch.arange(4)
    actual = head_statistics([view], target)
    assert torch.equal(actual.loss, head_statistics([view.contiguous()], target).loss)
    assert not view.is_contiguous()
    dense = view.contiguous().requires_grad_()
    strided = view.detach().requires_grad_()
    for leaf in (dense, strided):
        head_statistics([leaf], target).loss.sum().backward()
    assert strided.grad is not None
    assert torch.equal(strided.grad, dense.grad)


def test_no_second_derivative() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    loss = head_statistics([logits], torch.tensor([0, 1])).loss.sum()
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


PRESENT = torch.tensor([[True] * 3, [True, False, True]])
SOFT = torch.full((3, 4), 0.25)


@pytest.mark.parametrize(
    ("target", "present"),
    [(torch.tensor([0, 1, -100]), PRESENT), (SOFT, None)],
    ids=["index", "soft"],
)
def test_compiles_without_a_break(target: Tensor, present: Tensor | None) -> None:
    def loss(a: Tensor, b: Tensor, target: Tensor) -> Tensor:
        return head_statistics([a, b], target, present=present, backend="eager").loss.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, b = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    assert torch.equal(compiled(a, b, target), loss(a, b, target))
    expected = torch.autograd.grad(loss(a, b, target), (a, b))
    actual = torch.autograd.grad(compiled(a, b, target), (a, b))
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


GOOD = torch.zeros(2, 3)
INDEX = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("logits", "target", "options", "error", "message"),
    [
        ([], INDEX, {}, ValueError, r"logits: expected at least one head, got none"),
        ([[0.0]], INDEX, {}, TypeError, r"logits: expected a floating-point tensor, got list"),
        ([GOOD.long()], INDEX, {}, TypeError, r"logits: .*floating-point tensor, got torch.int64"),
        ([GOOD[0]], INDEX, {}, ValueError, r"logits: expected shape \[B, C\].*got \[3\]"),
        (
            [GOOD, GOOD[:, :2]],
            INDEX,
            {},
            ValueError,
            r"unimodal logits of modality 0: expected the shape.*\[2, 3\], got \[2, 2\]",
        ),
        (
            [GOOD, GOOD.long()],
            INDEX,
            {},
            TypeError,
            r"unimodal logits of modality 0: expected a floating-point tensor, got torch.int64",
        ),
        (
            [GOOD, GOOD.to("meta")],
            INDEX,
            {},
            ValueError,
            r"unimodal logits of modality 0: expected device cpu of the logits, got meta",
        ),
        ([GOOD[:, :0]], INDEX, {}, ValueError, r"logits: expected shape .*C >= 1, got \[2, 0\]"),
        ([GOOD], [0, 1], {}, TypeError, r"target: expected a tensor, got list"),
        ([GOOD], INDEX.int(), {}, TypeError, r"target: expected int64.*got torch.int32"),
        ([GOOD], INDEX[:1], {}, ValueError, r"target of class indices: .*\[2\], got \[1\]"),
        ([GOOD], GOOD[:, :2], {}, ValueError, r"target of class probabilities: .*\[2, 3\]"),
        (
            [GOOD],
            GOOD.clone().requires_grad_(),
            {},
            ValueError,
            r"target: expected no requires_grad.*target.detach\(\)",
        ),
        ([GOOD], INDEX.to("meta"), {}, ValueError, r"target: expected device cpu.*got meta"),
        (
            [GOOD],
            INDEX,
            {"label_smoothing": 2.0},
            ValueError,
            r"label_smoothing: .*\[0, 1\], got 2",
        ),
        (
            [GOOD],
            GOOD,
            {"ignore_index": 0},
            ValueError,
            r"target: expected class indices, since .*ignore_index=0, got class probabilities",
        ),
        (
            [GOOD],
            INDEX,
            {"present": GOOD},
            TypeError,
            r"present: expected a bool tensor, got torch.float32",
        ),
        (
            [GOOD],
            INDEX,
            {"present": [[True, True]]},
            TypeError,
            r"present: expected a bool tensor, got list",
        ),
        (
            [GOOD],
            INDEX,
            {"present": torch.ones(1, 2, dtype=torch.bool, device="meta")},
            ValueError,
            r"present: expected device cpu of the logits, got meta",
        ),
        (
            [GOOD],
            INDEX,
            {"present": torch.ones(2, 2, dtype=torch.bool)},
            ValueError,
            r"present: expected shape \[1, 2\], got \[2, 2\]",
        ),
        ([GOOD], INDEX, {"weight": torch.ones(4)}, ValueError, r"weight: .*\[3\], got \[4\]"),
        (
            [GOOD],
            INDEX,
            {"weight": torch.ones(3, dtype=torch.int64)},
            TypeError,
            r"weight: expected a floating-point tensor, got torch.int64",
        ),
        (
            [GOOD],
            INDEX,
            {"weight": [1.0, 1.0, 1.0]},
            TypeError,
            r"weight: expected a floating-point tensor, got list",
        ),
        (
            [GOOD],
            INDEX,
            {"weight": torch.ones(3, device="meta")},
            ValueError,
            r"weight: expected device cpu of the logits, got meta",
        ),
        (
            [GOOD],
            torch.tensor([0, 3]),
            {},
            IndexError,
            r"target: expected class indices in \[0, 3\) or ignore_index=-100, got .* 0 to 3",
        ),
        (
            [GOOD],
            torch.tensor([-1, 2]),
            {"ignore_index": 9},
            IndexError,
            r"target: expected class indices in \[0, 3\) or ignore_index=9, got .* -1 to 2",
        ),
    ],
)
def test_errors_name_argument_expected_and_got(
    logits: Any, target: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        head_statistics(logits, target, **options)


@needs_native
@pytest.mark.parametrize("what", ["present", "weight"])
def test_statistics_in_c_take_no_subclass_of_a_tensor(what: str) -> None:
    fused, _, target = batch()
    given = {"present": torch.ones(1, 12, dtype=torch.bool), "weight": torch.ones(CLASSES)}
    given[what] = given[what].as_subclass(Foreign)
    with pytest.raises(RuntimeError, match="'native' does not take a Foreign"):
        head_statistics([fused], target, backend="native", **given)


@each_backend
def test_a_loss_of_statistics_changes_in_place(backend: str) -> None:
    fused, _, target = batch()
    loss = head_statistics([fused], target, backend=backend).loss
    loss.mul_(2.0)
    (grad,) = torch.autograd.grad(loss.sum(), fused)
    (expected,) = torch.autograd.grad(2 * F.cross_entropy(fused, target, reduction="sum"), fused)
    assert_allclose(grad, expected, rtol=1e-4, atol=1e-6)


@each_backend
def test_gradients_with_a_graph_change_in_place(backend: str) -> None:
    fused, _, target = batch()
    loss = DynCIMLoss(nn.CrossEntropyLoss(), backend=backend)(fused, target)
    (plain,) = torch.autograd.grad(loss, fused, retain_graph=True)
    (grad,) = torch.autograd.grad(loss, fused, create_graph=True)
    grad.mul_(2.0)
    assert_allclose(grad.detach(), 2.0 * plain)


def test_statistics_take_a_list_of_heads() -> None:
    with pytest.raises(TypeError, match="logits: expected a list with one entry per head, got Ten"):
        head_statistics(torch.zeros(2, 3, 4), torch.zeros(3).long())  # type: ignore[arg-type]


def test_statistics_are_refused_to_a_function_transform_that_would_get_no_gradient() -> None:
    fused, _, target = batch()
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: head_statistics([x], target).loss.sum())(fused.detach())


def test_a_class_ruled_out_that_has_no_probability_costs_nothing() -> None:
    logits, target = torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([[0.5, 0.5, 0.0]])
    found = head_statistics([logits], target)
    assert_allclose(found.nll, [[math.log(2.0)]], rtol=1e-6)
    assert_allclose(found.loss, found.nll)


def test_statistics_are_as_exact_as_any_head() -> None:
    fused, others, target = batch()
    found = head_statistics([fused, others[0].double()], target)
    assert found.nll.dtype == torch.float64
