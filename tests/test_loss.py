from __future__ import annotations

import copy
import math
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from inputs import CLASSES, Foreign, batch, needs_native, randn
from numpy.testing import assert_allclose
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from dyncim_core import CurriculumState, DynCIMLoss, GatedFusion, held_out, sureness
from dyncim_core import reference as ref

PLAIN: dict[str, Any] = {"surprise_strength": 0.0, "pacing_strength": 0.0}


class Other(nn.CrossEntropyLoss):
    """A cross-entropy of its own, which takes the path of any criterion."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return 2.0 * super().forward(logits, target)


def buffers(criterion: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in criterion.state_dict().items()}


def unchanged(criterion: nn.Module, before: dict[str, Tensor]) -> bool:
    after = criterion.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


def train(criterion: DynCIMLoss, steps: int = 6, **options: Any) -> None:
    if criterion.state.num_samples is not None:
        options.setdefault("index", torch.arange(12))
    for seed in range(steps):
        fused, others, target = batch(seed=seed)
        criterion(fused, target, unimodal=others, **options)


CRITERIA: dict[str, dict[str, Any]] = {
    "plain": {},
    "class weights": {"weight": torch.tensor([0.5, 1.0, 2.0, 1.0, 0.25])},
    "smoothing": {"label_smoothing": 0.1},
    "ignore": {"ignore_index": 2},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "all": {
        "weight": torch.tensor([0.5, 1.0, 2.0, 1.0, 0.25]),
        "label_smoothing": 0.2,
        "ignore_index": 1,
        "reduction": "sum",
    },
}


def without_ignored(options: dict[str, Any]) -> dict[str, Any]:
    """Cross-entropy takes no ``ignore_index`` with class probabilities."""
    return {name: value for name, value in options.items() if name != "ignore_index"}


@pytest.mark.parametrize("options", CRITERIA.values(), ids=CRITERIA)
@pytest.mark.parametrize("soft", [False, True])
def test_without_strength_it_is_the_criterion_bit_for_bit(
    options: dict[str, Any], soft: bool
) -> None:
    criterion = nn.CrossEntropyLoss(**without_ignored(options) if soft else options)
    ours, _, target = batch()
    if soft:
        target = randn(12, CLASSES, seed=1).softmax(dim=1)
    theirs = ours.detach().clone().requires_grad_()
    wrapped = DynCIMLoss(criterion, **PLAIN)
    loss, expected = wrapped(ours, target), criterion(theirs, target)
    assert torch.equal(loss, expected)
    loss.sum().backward()
    expected.sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert wrapped.state.step == 1  # the state still watches


@pytest.mark.parametrize("options", CRITERIA.values(), ids=CRITERIA)
@pytest.mark.parametrize("soft", [False, True])
def test_without_strength_heads_add_up(options: dict[str, Any], soft: bool) -> None:
    """Balanced heads of equal quality: coefficients are 1, so the losses just add."""
    criterion = nn.CrossEntropyLoss(**without_ignored(options) if soft else options)
    logits = randn(12, CLASSES).double()
    target = torch.arange(12) % CLASSES
    if soft:
        target = randn(12, CLASSES, seed=1).double().softmax(dim=1)
    if criterion.weight is not None:
        criterion = criterion.double()
    wrapped = DynCIMLoss(criterion, **PLAIN)
    loss = wrapped(logits, target, unimodal=[logits, logits])
    assert_allclose(loss, 3.0 * criterion(logits, target), rtol=1e-6)


def weights_by_hand(
    fused: Tensor, others: list[Tensor], target: Tensor, state: CurriculumState, noise: float
) -> tuple[ref.HeadStatistics, np.ndarray]:
    """Statistics and weights of a batch in NumPy, from what the state held before it."""
    logits = [x.detach().double().numpy() for x in (fused, *others)]
    heads = ref.head_statistics(logits, target.numpy())
    signals = np.stack(
        [
            ref.prediction_deviation(heads.nll),
            ref.prediction_consistency(heads.distance),
            ref.prediction_stability(heads.entropy, CLASSES),
        ]
    )
    shown = ref.trust(state.skill)
    usual = np.where(state.seen > 0, -state.log_quality, np.inf)
    own = ref.log_weights(
        ref.surprise(heads.nll, heads.entropy, None, shown**2, usual),
        ref.difficulty(signals, ref.volatility_weights(state.volatility)),
        surprise_strength=2.0 * float(ref.noise_pressure(noise, shown[0])),
        pacing_strength=0.2 * (1.0 - float(state.quality[0])),
    )
    weights, _ = ref.sample_weights(own, target, state.log_class_average, state.decay)
    return heads, weights


def by_hand(
    fused: Tensor, others: list[Tensor], target: Tensor, state: CurriculumState, noise: float
) -> float:
    """The joint objective of a batch in NumPy, from what the state held before it."""
    heads, weights = weights_by_hand(fused, others, target, state, noise)
    mean = -(weights * heads.nll).sum(axis=1) / weights.sum()
    log_quality = mean
    if state.step > 0:
        rate = 0.05 * min(1.0, weights.mean())
        log_quality = (1.0 - rate) * state.log_quality.numpy() + rate * mean
    coefficients = np.concatenate([[1.0], ref.modality_coefficients(log_quality)])
    return float((weights * (coefficients[:, None] * heads.loss).sum(axis=0)).mean())


@pytest.mark.parametrize("noise", [None, 0.1])
def test_joint_objective_is_the_one_worked_out_in_numpy(noise: float | None) -> None:
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), label_noise=noise)
    for seed in range(8):
        fused, others, target = batch(seed=seed)
        before = copy.deepcopy(criterion.state)
        loss = criterion(fused, target, unimodal=others)
        known = float(before.label_noise) if noise is None else noise
        assert_allclose(loss.item(), by_hand(fused, others, target, before, known), rtol=1e-5)
    assert noise is not None or 0 < criterion.state.label_noise < 1


def test_weights_are_detached() -> None:
    """The gradient is that of the losses with constant weights."""
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), label_noise=0.3, reduction="none")
    fused, others, target = batch()
    train(criterion)
    before = copy.deepcopy(criterion.state)
    losses = criterion(fused, target, unimodal=others)
    losses.sum().backward()
    rows = torch.stack([F.cross_entropy(x, target, reduction="none") for x in (fused, *others)])
    gradients = torch.autograd.grad(rows[0].sum(), fused)[0]
    ratio = (fused.grad / gradients)[:, 0]
    assert_allclose(fused.grad, ratio.unsqueeze(1) * gradients, rtol=1e-4, atol=1e-6)
    _, expected = weights_by_hand(fused, others, target, before, 0.3)
    assert_allclose(ratio, expected, rtol=1e-4)


@pytest.mark.parametrize("given", ["mapping", "sequence"])
def test_modalities_by_name_or_by_position(given: str) -> None:
    fused, others, target = batch()
    named = DynCIMLoss(nn.CrossEntropyLoss(), modalities=["audio", "image"])
    loss = named(fused, target, unimodal={"image": others[1], "audio": others[0]})
    unimodal = dict(zip(("a", "b"), others, strict=True)) if given == "mapping" else others
    assert torch.equal(loss, DynCIMLoss(nn.CrossEntropyLoss())(fused, target, unimodal=unimodal))


@pytest.mark.parametrize("modalities", [1, 2, 8])
@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_any_number_of_modalities_samples_and_classes(
    modalities: int, size: int, classes: int
) -> None:
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), label_noise=0.2)
    logits = randn(1 + modalities, size, classes).requires_grad_()
    target = torch.arange(size) % classes
    for _ in range(3):
        loss = criterion(logits[0], target, unimodal=list(logits[1:]))
        assert loss.isfinite()
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.isfinite().all()
    assert all(math.isfinite(value) for value in criterion.state.summary().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_extreme_logits_stay_finite_in_every_dtype(dtype: torch.dtype) -> None:
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), label_noise=0.5)
    logits = (1e4 * torch.tensor([[[1.0, -1.0], [0.0, 0.0], [-1.0, 1.0]]] * 3)).to(dtype)
    logits.requires_grad_()
    for _ in range(3):
        loss = criterion(logits[0], torch.tensor([1, 0, 1]), unimodal=[logits[1], logits[2]])
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.isfinite()
    assert grad.dtype == dtype
    assert grad.isfinite().all()
    assert criterion.state.log_quality.isfinite().all()


def test_absent_modalities_hold_anything_and_get_nothing() -> None:
    fused, others, target = batch()
    present = torch.ones(12, 2, dtype=torch.bool)
    present[3, 0] = present[4] = False  # sample 4 has none
    spoiled = [x.detach().clone() for x in others]
    spoiled[0][3] = spoiled[0][4] = spoiled[1][4] = math.nan
    spoiled = [x.requires_grad_() for x in spoiled]
    clean, dirty = (DynCIMLoss(nn.CrossEntropyLoss(), label_noise=0.3) for _ in range(2))
    expected = clean(fused, target, unimodal=others, present=present)
    loss = dirty(fused, target, unimodal=spoiled, present=present)
    assert torch.equal(loss, expected)
    loss.backward()
    for head, column in zip(spoiled, present.t(), strict=True):
        assert (head.grad[~column] == 0).all()
        assert (head.grad[column] != 0).any()
    assert unchanged(dirty, buffers(clean))


@pytest.mark.filterwarnings("ignore:index")
def test_everything_ignored() -> None:
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, num_samples=120)
    fused, others, _ = batch()
    train(criterion, index=None)
    before = buffers(criterion)
    target = torch.full((12,), -100)
    loss = criterion(fused, target, unimodal=others, index=torch.arange(12))
    assert loss.isnan()  # as the mean of cross-entropy over nothing
    after = criterion.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"state.step"}


def test_nonfinite_samples_never_reach_the_state() -> None:
    fused, others, target = batch()
    keep = torch.arange(12) != 5
    clean = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2)
    clean(fused[keep], target[keep], unimodal=[x[keep] for x in others])
    spoiled = others[0].detach().clone()
    spoiled[5, 0] = math.inf
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2)
    loss = criterion(fused, target, unimodal=[spoiled, others[1]])
    assert not loss.isfinite()  # the criterion's own behaviour
    assert criterion.state.nonfinite == 1
    for name, value in clean.state.named_buffers():
        if name != "nonfinite":
            assert_allclose(criterion.state.get_buffer(name), value, rtol=1e-5, err_msg=name)


def square(logits: Tensor, target: Tensor) -> Tensor:
    """A criterion without parameters or reduction."""
    return (logits.softmax(dim=1) - F.one_hot(target, logits.shape[1])).square().sum(dim=1)


class Focal(nn.Module):
    """A criterion of the usual third-party make."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction
        self.gamma = 2.0

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        nll = F.cross_entropy(logits, target, reduction="none")
        loss = (1 - (-nll).exp()) ** self.gamma * nll
        return loss if self.reduction == "none" else getattr(loss, self.reduction)()


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), square, Focal(), Focal("sum")])
def test_nonfinite_samples_are_skipped_on_request(criterion: Any) -> None:
    fused, others, target = batch()
    keep = torch.arange(12) != 5
    wrapped = DynCIMLoss(criterion, nonfinite="skip", label_noise=0.3)
    spoiled = [x.detach().clone() for x in (fused, *others)]
    spoiled[0][5] = math.nan
    spoiled[1][5, 1] = math.inf
    for leaf in spoiled:
        leaf.requires_grad_()
    loss = wrapped(spoiled[0], target, unimodal=spoiled[1:])
    loss.backward()
    expected = DynCIMLoss(criterion, nonfinite="skip", label_noise=0.3)(
        fused[keep], target[keep], unimodal=[x[keep] for x in others]
    )
    if wrapped.reduction == "mean":
        assert_allclose(loss.item(), expected.item(), rtol=1e-5)
    for leaf in spoiled:
        assert leaf.grad.isfinite().all()
        assert (leaf.grad[5] == 0).all()
        assert (leaf.grad[keep] != 0).any()


@pytest.mark.parametrize("criterion", [square, Focal(), Focal("sum"), Focal("none")])
def test_any_criterion(criterion: Any) -> None:
    fused, _, target = batch()
    reduction = getattr(criterion, "reduction", "mean")
    plain = criterion(fused, target)
    if criterion is square:
        plain = plain.mean()
    wrapped = DynCIMLoss(criterion, **PLAIN)
    assert wrapped.reduction == reduction
    assert torch.equal(wrapped(fused, target), plain)
    joint = wrapped(fused, target, unimodal=[fused, fused])
    assert_allclose(joint.detach(), 3 * plain.detach(), rtol=1e-5)
    joint.sum().backward()
    assert fused.grad.abs().sum() > 0


def test_reduction_overrides_the_criterion() -> None:
    fused, _, target = batch()
    weights = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.25])
    criterion = nn.CrossEntropyLoss(weight=weights, ignore_index=0)
    for reduction in ("mean", "sum", "none"):
        loss = DynCIMLoss(criterion, reduction=reduction, **PLAIN)(fused, target)
        expected = F.cross_entropy(fused, target, weights, ignore_index=0, reduction=reduction)
        assert_allclose(loss.detach(), expected.detach(), rtol=1e-5)


def test_parameters_of_the_criterion_move_with_it() -> None:
    criterion = nn.CrossEntropyLoss(weight=torch.ones(CLASSES))
    wrapped = copy.deepcopy(DynCIMLoss(criterion)).double()
    assert wrapped.criterion.weight.dtype == torch.float64
    assert wrapped.state.log_quality.dtype == torch.float32


@pytest.mark.parametrize("unimodal", [False, True])
def test_a_criterion_changed_later_is_followed(unimodal: bool) -> None:
    fused, others, target = batch()
    focal = Focal()
    given = {"unimodal": others} if unimodal else {}
    wrapped = DynCIMLoss(focal, reduction="sum", unimodal_strength=0.0, **PLAIN)
    for gamma in (2.0, 0.0):
        focal.gamma = gamma
        expected = 12 * focal(fused, target)
        assert_allclose(wrapped(fused, target, **given).detach(), expected.detach(), rtol=1e-5)
    wrapped.criterion = nn.CrossEntropyLoss()
    assert_allclose(wrapped(fused, target, **given).detach(), expected.detach(), rtol=1e-5)


def test_strengths_changed_later_count() -> None:
    fused, _, target = batch()
    plain = F.cross_entropy(fused, target)
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), **PLAIN)
    assert torch.equal(criterion(fused, target), plain)
    criterion.pacing_strength = 0.5
    paced = criterion(fused, target)
    assert not torch.equal(paced, plain)
    criterion.pacing_strength = 0.0
    assert torch.equal(criterion(fused, target), plain)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_criterion_keeps_its_reduction_while_it_is_called(compiled: bool) -> None:
    fused, others, target = batch()
    criterion, seen = Focal(), []
    called = torch.compile(criterion, backend="eager") if compiled else criterion
    criterion.register_forward_hook(lambda *_: seen.append(criterion.reduction))
    DynCIMLoss(called)(fused, target, unimodal=others)
    assert len(seen) >= 3
    assert set(seen) == {"mean"}
    assert criterion.reduction == "mean"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_compiled_it_calls_any_criterion_without_its_reduction(reduction: str) -> None:
    fused, others, target = batch()
    given = {"unimodal": others, "index": torch.arange(12)}
    whole = DynCIMLoss(Focal(reduction), modalities=2, num_samples=12, held_out=0.4)
    compiled = torch.compile(copy.deepcopy(whole), fullgraph=True, backend="aot_eager")
    loss = compiled(fused, target, **given)
    expected = whole(fused, target, **given)
    assert_allclose(loss.detach(), expected.detach(), rtol=1e-5)
    grads = [torch.autograd.grad(x, fused)[0] for x in (loss, expected)]
    assert not grads[0][held_out(given["index"], 0.4)].any()
    assert_allclose(grads[0], grads[1], rtol=1e-5, atol=1e-7)
    assert compiled.criterion.reduction == reduction


class Subclass(nn.CrossEntropyLoss):
    """One that may compute anything: nobody can tell from outside."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return super().forward(logits, target)


@pytest.mark.parametrize("ignore_index", [0, 255])
@pytest.mark.parametrize("options", [{}, PLAIN], ids=["weighted", "plain"])
def test_any_criterion_may_ignore_an_index(ignore_index: int, options: dict[str, float]) -> None:
    fused, others, target = batch()
    target[:4] = ignore_index
    found = []
    for make in (nn.CrossEntropyLoss, Subclass):
        criterion = DynCIMLoss(make(ignore_index=ignore_index), **options)
        train(criterion, 2)
        found.append(criterion(fused, target, unimodal=others).detach())
        found[-1] = torch.stack([found[-1], criterion(fused, target).detach()])
    assert_allclose(*found, rtol=1e-5)


def test_no_index_to_ignore_is_the_usual_one() -> None:
    fused, others, target = batch()
    focal = Focal()
    expected = DynCIMLoss(focal)(fused, target, unimodal=others)
    focal.ignore_index = None
    assert torch.equal(DynCIMLoss(focal)(fused, target, unimodal=others), expected)


def test_the_curriculum_rests_in_evaluation_and_without_gradients() -> None:
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2)
    fused, others, target = batch()
    train(criterion)
    before = buffers(criterion)
    expected = F.cross_entropy(fused, target)
    with torch.no_grad():
        assert torch.equal(criterion(fused, target, unimodal=others), expected)
    assert torch.equal(criterion.eval()(fused, target, unimodal=others), expected)
    assert unchanged(criterion, before)
    assert not torch.equal(criterion.train()(fused, target, unimodal=others), expected)
    assert not unchanged(criterion, before)


def test_label_noise_turns_the_surprise_on() -> None:
    """A share of labels that both modalities contradict weighs next to nothing."""
    target = torch.arange(40) % CLASSES
    logits = 8.0 * F.one_hot(target, CLASSES).float()
    wrong = torch.arange(40) < 12
    labels = torch.where(wrong, (target + 1) % CLASSES, target)
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), num_samples=40, modalities=2, held_out=0.0)
    for _ in range(60):
        criterion(
            logits.requires_grad_(), labels, unimodal=[logits, logits], index=torch.arange(40)
        )
    assert_allclose(criterion.state.label_noise, 0.3 - 0.07, atol=0.03)
    weights = criterion.state.memory_weight
    assert weights[wrong].max() < 1e-3
    for label in range(CLASSES):  # what is taken from them goes to others of their class
        assert_allclose(weights[labels == label].mean(), 1.0, rtol=1e-2)
    assert set(criterion.state.suspects(12).indices.tolist()) == set(range(12))


def test_kernels_get_numbers_that_compilers_know(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    kernels = types.SimpleNamespace(curriculum=lambda *arguments: given.extend(arguments))
    monkeypatch.setattr("dyncim_core.loss.select", lambda *arguments: kernels)
    criterion = DynCIMLoss(
        nn.CrossEntropyLoss(ignore_index=np.int64(-1), label_smoothing=np.float64(0.1))
    )
    with pytest.raises(AttributeError):  # there are no kernels
        criterion(torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1]))
    assert [type(x) for x in given[2][2:]] == [int, float]
    assert given[2][2:] == (-1, 0.1)


def test_a_head_without_skill_makes_no_label_look_wrong() -> None:
    """Only the second modality contradicts the first half of the labels, and is sure of it."""
    labels = torch.arange(40) % CLASSES
    agreeing = 8.0 * F.one_hot(labels, CLASSES).float()
    contradicting = torch.where(
        torch.arange(40).unsqueeze(1) < 20, agreeing.roll(1, dims=1), agreeing
    )
    kept = []
    for skill in (0.9, 0.0):
        criterion = DynCIMLoss(
            nn.CrossEntropyLoss(),
            num_samples=40,
            modalities=2,
            label_noise=0.3,
            held_out=0.0,
            pacing_strength=0.0,
        )
        criterion.state.skill.copy_(torch.tensor([0.9, 0.9, skill]))
        heads = [x.clone().requires_grad_() for x in (agreeing, agreeing, contradicting)]
        criterion(heads[0], labels, unimodal=heads[1:], index=torch.arange(40))
        weights = criterion.state.memory_weight
        kept.append(float(weights[:20].mean() / weights[20:].mean()))
    assert kept[0] < 0.05
    assert kept[1] > 0.99


def contradicted_task(size: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that are right, labels of which a quarter are wrong, and which are."""
    truth = torch.arange(size) % CLASSES
    wrong = torch.arange(size) % 4 == 1
    labels = torch.where(wrong, (truth + 1) % CLASSES, truth)
    return 8.0 * F.one_hot(truth, CLASSES).float(), labels, wrong


@pytest.mark.parametrize("options", [{}, {"label_noise": 0.3}, {"surprise_strength": 0.0}], ids=str)
def test_what_is_held_out_is_not_trained_on_and_tells_of_label_noise(
    options: dict[str, float],
) -> None:
    logits, labels, wrong = contradicted_task()
    index = torch.arange(1000)
    held = held_out(index, 0.1)
    criterion = DynCIMLoss(
        nn.CrossEntropyLoss(), num_samples=1000, modalities=2, held_out=0.1, **options
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        rows = torch.randperm(1000, generator=generator)[:50]
        heads = [logits[rows].requires_grad_() for _ in range(3)]
        criterion(heads[0], labels[rows], unimodal=heads[1:], index=index[rows]).backward()
        for head in heads:
            assert head.grad is not None
            assert torch.equal(head.grad.any(dim=1), ~held[rows])
    state = criterion.state
    share = wrong[held].float().mean()
    assert_allclose(state.label_noise, share - 0.07, atol=0.1)
    assert_allclose(state.skill, [1 - share * CLASSES / (CLASSES - 1)] * 3, atol=0.15)
    assert (state.memory_visits > 0).all()  # they can be suspects all the same
    nll = F.cross_entropy(logits, labels, reduction="none").unsqueeze(1).expand(-1, 3)
    assert_allclose(state.memory_nll, nll, rtol=1e-4)
    found = state.suspects(int(wrong.sum())).indices
    assert wrong[found].all()


def test_what_is_learnt_by_heart_does_not_hide_label_noise() -> None:
    """Heads agree with every label that they were trained on."""
    logits, labels, _ = contradicted_task()
    index = torch.arange(1000)
    by_heart = 8.0 * F.one_hot(labels, CLASSES).float()
    logits = torch.where(held_out(index, 0.05).unsqueeze(1), logits, by_heart).requires_grad_()
    noise = []
    for share in (0.05, 0.0):
        criterion = DynCIMLoss(
            nn.CrossEntropyLoss(), num_samples=1000, modalities=2, held_out=share
        )
        for _ in range(60):
            criterion(logits, labels, unimodal=[logits] * 2, index=index)
        noise.append(float(criterion.state.label_noise))
    assert noise[0] > 0.1
    assert noise[1] < 2e-2


def test_of_few_samples_none_are_held_out_unless_asked_for() -> None:
    fused, others, target = batch()
    held = int(held_out(torch.arange(12), 0.05).sum())
    assert held
    for samples, share, expected in ((119, None, 0), (120, None, held), (119, 0.05, held)):
        criterion = DynCIMLoss(
            nn.CrossEntropyLoss(),
            modalities=2,
            num_samples=samples,
            held_out=share,
            reduction="none",
        )
        losses = criterion(fused, target, unimodal=others, index=torch.arange(12))
        assert (losses == 0).sum() == expected


@pytest.mark.filterwarnings("ignore:index")
def test_everything_is_trained_on_where_nothing_can_be_held_out() -> None:
    fused, others, target = batch()
    index = torch.arange(12)
    calls: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {"unimodal": others}),  # which sample is which is not told
        ({}, {"index": index}),
        ({"held_out": 0.0}, {"index": index, "unimodal": others}),
    ]
    for options, arguments in calls:
        criterion = DynCIMLoss(
            nn.CrossEntropyLoss(), modalities=2, num_samples=120, reduction="none", **options
        )
        assert (criterion(fused, target, **arguments) > 0).all(), (options, arguments)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", CRITERIA.values(), ids=CRITERIA)
def test_whatever_form_a_loss_takes_what_is_held_out_tells_the_same(
    options: dict[str, Any], masked: bool
) -> None:
    """Of classes, of probabilities that are certain of them, and to a criterion of its own."""
    options = without_ignored(options)
    index, found = torch.arange(40), []
    for make, soft in (
        (nn.CrossEntropyLoss, False),
        (nn.CrossEntropyLoss, True),
        (Subclass, False),
        (Subclass, True),
    ):
        criterion = DynCIMLoss(make(**options), modalities=2, num_samples=40, held_out=0.3)
        losses = []
        for seed in range(4):
            fused, others, target = batch(size=40, seed=seed)
            heads = [fused, *((3.0 * fused + x).detach().requires_grad_() for x in others)]
            labels = F.one_hot(target, CLASSES).float() if soft else target
            present = randn(40, 2, seed=seed) > -0.5 if masked else None
            if present is not None:
                heads[2].data[~present[:, 1]] = math.nan
            given = {"unimodal": heads[1:], "index": index, "present": present}
            loss = criterion(fused, labels, **given).sum()
            losses += [loss.detach(), *torch.autograd.grad(loss, heads)]
            assert not losses[-1][held_out(index, 0.3)].any()
        found.append((losses, buffers(criterion.state)))
    (_, usual), *_ = found
    assert usual["held_out_averages"].all()
    # The mean of probabilities is over samples, of classes over their weights.
    alike = [0, 2] if "weight" in options else [0, 1, 2, 3]
    for k in alike[1:]:
        for x, expected in zip(found[k][0], found[0][0], strict=True):
            assert_allclose(x, expected, rtol=1e-4, atol=1e-6)
    for _, kept in found[1:]:
        for name, value in kept.items():
            if name != "class_weight":  # how frequent classes are is left to cross-entropy
                assert_allclose(value, usual[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_of_probabilities_the_likeliest_class_is_to_be_predicted() -> None:
    """And heads lose what their log-likelihood lacks to the most that one can have."""
    index = torch.arange(40)
    held = held_out(index, 0.3)
    fused, others, _ = batch(size=40)
    probs = randn(40, CLASSES, seed=5).softmax(dim=1)
    criterion = DynCIMLoss(
        nn.CrossEntropyLoss(), modalities=2, num_samples=40, held_out=0.3, label_noise=0.0
    )
    criterion(fused, probs, unimodal=others, index=index)
    mass, hits, _, nll, slope, *_ = criterion.state.held_out_averages
    heads = torch.stack([x.detach() for x in (fused, *others)])
    right = (heads.argmax(dim=2) == probs.argmax(dim=1))[:, held].float().mean(dim=1)
    likely = (probs * heads.log_softmax(dim=2)).sum(dim=2)[:, held].mean(dim=1)
    best = -ref.target_entropy(probs[held]).mean()
    expected = ref.expected_log_likelihood(heads[:, held], np.ones(3), shared=1.0).mean(axis=1)
    assert_allclose(hits / mass, right, rtol=1e-5)
    share = ref.share_to_learn(ref.target_entropy(probs[~held]).mean(), CLASSES)
    assert_allclose(nll / mass, (best - likely) / share, rtol=1e-4)
    likely[0] -= likely[1:].sum()  # the fused logits hold all of the others', at first
    assert_allclose(slope / mass, expected - likely.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [nn.CrossEntropyLoss, Subclass])
def test_who_is_as_unsure_as_its_targets_has_learnt_them(make: Any) -> None:
    probs = randn(40, CLASSES, seed=5).softmax(dim=1)
    unsure, index = probs.log().requires_grad_(), torch.arange(40)
    wrong = [unsure.detach(), unsure.detach().roll(1, dims=0)]
    criterion = DynCIMLoss(make(), modalities=2, num_samples=40, held_out=0.0, label_noise=1.0)
    for _ in range(2):
        criterion(unsure, probs, unimodal=[unsure.detach()] * 2, index=index)
    state = criterion.state
    assert_allclose(state.quality, 1.0, atol=1e-5)
    assert_allclose(state.signal_mean, 0.0, atol=1e-5)
    assert_allclose(state.memory_nll, 0.0, atol=1e-5)
    assert_allclose(state.memory_weight, 1.0, atol=0.02)
    criterion(unsure, probs, unimodal=wrong, index=index)
    beyond = F.kl_div(wrong[1], probs, reduction="none").sum(dim=1)
    share = 1.0 - ref.target_entropy(probs).mean() / math.log(CLASSES)
    assert_allclose(state.memory_nll[:, 2], beyond / share / 3.0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unsure", [0.1, 0.5, 0.9])
def test_who_tells_nothing_has_learnt_nothing_of_unsure_targets_either(unsure: float) -> None:
    classes = torch.arange(40) % CLASSES
    probs = (1.0 - unsure) * F.one_hot(classes, CLASSES) + unsure / CLASSES
    logits = torch.zeros(40, CLASSES, requires_grad=True)
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, num_samples=40, held_out=0.3)
    criterion(logits, probs, unimodal=[logits] * 2, index=torch.arange(40))
    state = criterion.state
    assert_allclose(state.log_quality, -math.log(CLASSES), rtol=1e-4)
    assert_allclose(state.quality, 0.0, atol=1e-4)
    assert state.summary()["redundancy"] < 1e-3
    mass, _, _, nll, *_ = state.held_out_averages
    assert_allclose(nll / mass, math.log(CLASSES), rtol=1e-4)


def test_what_probabilities_lack_to_1_is_nothing_learnt_beyond_all() -> None:
    probs, index = 0.1 * randn(40, CLASSES, seed=5).softmax(dim=1), torch.arange(40)
    fused, others, _ = batch(size=40)
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, num_samples=40, held_out=0.3)
    criterion(fused, probs, unimodal=others, index=index)
    state = criterion.state
    for signal in (state.signal_mean, state.quality):
        assert ((signal >= 0.0) & (signal <= 1.0)).all()
    assert (state.log_quality <= 0.0).all()
    assert (state.memory_nll >= 0.0).all()


@pytest.mark.parametrize("held", [0.0, 0.3])
@pytest.mark.parametrize("make", [nn.CrossEntropyLoss, Subclass])
def test_a_target_that_is_no_number_does_not_get_into_the_state(make: Any, held: float) -> None:
    index = torch.arange(40)
    criterion = DynCIMLoss(
        make(), modalities=2, num_samples=40, held_out=held, nonfinite="skip", label_noise=None
    )
    for step in range(3):
        target = torch.arange(40) % CLASSES
        probs = F.one_hot(target, CLASSES).float()
        if step == 0:
            probs[:2] = math.nan
        seeming = 3.0 * F.one_hot((target + 1) % CLASSES, CLASSES)
        heads = [(seeming + randn(40, CLASSES, seed=h)).requires_grad_() for h in range(3)]
        loss = criterion(heads[0], probs, unimodal=heads[1:], index=index)
        loss.backward()
        assert loss.isfinite()
        assert all(x.isfinite().all() for x in criterion.state.buffers())
        if step:
            assert all(x.grad.isfinite().all() for x in heads)
    assert criterion.state.nonfinite == 2


class Cosine(nn.Module):
    """Of no value at logits of 0, and with a parameter."""

    reduction = "none"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        angle = logits / logits.norm(dim=1, keepdim=True)
        return F.cross_entropy(self.scale * angle, target, reduction="none")


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("spoilt", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_what_is_left_out_gives_a_criterion_of_its_own_no_gradient(
    soft: bool, spoilt: bool, skip: bool
) -> None:
    """Held out, masked or, of all where those are skipped, else of held out ones, no number."""
    fused, others, target = batch(size=40)
    if soft:
        target = randn(40, CLASSES, seed=7).softmax(dim=1)
    index, present = torch.arange(40), randn(40, 2, seed=6) > -0.5
    out = held_out(index, 0.3)
    others[1].data[~present[:, 1]] = math.nan
    if spoilt:
        bad = torch.arange(40) % 2 == 0
        bad &= ~out if skip else out
        fused.data[bad] = math.nan
        if soft:
            target[bad] = math.nan
        out |= bad
    options: dict[str, Any] = {"reduction": "sum", "nonfinite": "skip" if skip else "propagate"}
    criterion = DynCIMLoss(Cosine(), modalities=2, num_samples=40, held_out=0.3, **options, **PLAIN)
    criterion(fused, target, unimodal=others, index=index, present=present).backward()
    rest = DynCIMLoss(Cosine(), modalities=2, **options, **PLAIN)
    for name in ("skill", "held_out_averages"):
        rest.state.get_buffer(name).copy_(criterion.state.get_buffer(name))
    unimodal = [x[~out] for x in others]
    rest(fused[~out], target[~out], unimodal=unimodal, present=present[~out]).backward()
    assert criterion.criterion.scale.grad.isfinite()
    assert_allclose(criterion.criterion.scale.grad, rest.criterion.scale.grad, rtol=1e-4)
    for x in (fused, *others):
        assert x.grad.isfinite().all()


class Standardised(nn.Module):
    """Each loss depends on all rows."""

    reduction = "none"

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        apart = (logits - logits.mean(dim=0)) / logits.std(dim=0)
        return F.cross_entropy(apart, target, reduction="none")


def test_what_is_held_out_is_not_trained_on_through_other_rows_either() -> None:
    fused, others, target = batch(size=40)
    index = torch.arange(40)
    criterion = DynCIMLoss(
        Standardised(), modalities=2, num_samples=40, held_out=0.3, reduction="mean"
    )
    criterion(fused, target, unimodal=others, index=index).backward()
    for x in (fused, *others):
        assert torch.equal(x.grad.any(dim=1), ~held_out(index, 0.3))


@pytest.mark.parametrize("make", [nn.CrossEntropyLoss, Subclass])
def test_what_is_no_number_is_left_to_the_criterion_but_for_what_is_held_out(make: Any) -> None:
    index = torch.arange(40)
    held = held_out(index, 0.3)
    for bad in (held, ~held):
        fused, others, target = batch(size=40)
        fused.data[bad.nonzero()[0]] = math.nan
        criterion = DynCIMLoss(make(), modalities=2, num_samples=40, held_out=0.3)
        loss = criterion(fused, target, unimodal=others, index=index)
        assert loss.isfinite() == bad[held].all()


def test_absurd_logits_cost_no_more_of_unsure_targets() -> None:
    probs = 0.001 * F.one_hot(torch.arange(40) % CLASSES, CLASSES) + 0.999 / CLASSES
    fused, others, _ = batch(size=40)
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, num_samples=40, held_out=0.3)
    heads = [3e37 * x for x in (fused, *others)]
    criterion(heads[0], probs, unimodal=heads[1:], index=torch.arange(40))
    assert criterion.state.memory_nll.max() == 1e30
    assert all(x.isfinite().all() for x in criterion.state.buffers())


@pytest.mark.parametrize("ignored", [-1, 255])
def test_what_is_ignored_is_not_asked_about(ignored: int) -> None:
    fused, others, target = batch()
    criterion = DynCIMLoss(
        nn.CrossEntropyLoss(ignore_index=ignored), modalities=2, num_samples=120, held_out=0.3
    )
    target = torch.where(torch.arange(12) < 3, ignored, target)
    assert criterion(fused, target, unimodal=others, index=torch.arange(12)).isfinite()


def test_a_wrong_label_held_out_is_rejected_before_anything_moves() -> None:
    fused, others, target = batch()
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, num_samples=120)
    before = buffers(criterion)
    target[0] = 77  # held out, as the first sample always is
    with pytest.raises(IndexError, match="target"):
        criterion(fused, target, unimodal=others, index=torch.arange(12))
    assert unchanged(criterion, before)


def test_an_empty_batch_says_nothing_of_label_noise() -> None:
    fused, others, target = batch()
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, num_samples=120)
    for rows in (12, 0, 12):
        heads = [x[:rows] for x in (fused, *others)]
        index = torch.arange(rows)
        loss = criterion(heads[0], target[:rows], unimodal=heads[1:], index=index)
    assert loss.isfinite()
    assert all(value.isfinite().all() for value in criterion.state.buffers())


@pytest.mark.parametrize("skip", [False, True])
def test_what_is_held_out_cannot_hurt(skip: bool) -> None:
    """Not finite in a sample held out, or in all others."""
    nonfinite: Any = "skip" if skip else "propagate"
    for bad in (slice(0, 1), slice(1, 12)) if skip else (slice(0, 1),):
        fused, others, target = batch()
        spoiled = fused.detach().clone()
        spoiled[bad] = math.nan
        spoiled.requires_grad_()
        criterion = DynCIMLoss(
            nn.CrossEntropyLoss(), modalities=2, num_samples=120, nonfinite=nonfinite
        )
        loss = criterion(spoiled, target, unimodal=others, index=torch.arange(12))
        loss.backward()
        assert loss.isfinite()
        assert spoiled.grad is not None
        assert spoiled.grad.isfinite().all()
        assert criterion.state.nonfinite == len(spoiled[bad])


@pytest.mark.parametrize("options", CRITERIA.values(), ids=CRITERIA)
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["classes", "probabilities", "another criterion"])
def test_the_rest_is_trained_on_as_without_what_is_held_out(
    options: dict[str, Any], nonfinite: Any, masked: bool, kind: str
) -> None:
    """Whose logits may hold anything."""
    fused, others, target = batch(size=40)
    index = torch.arange(40)
    held = held_out(index, 0.3)
    if kind == "probabilities":
        options, target = without_ignored(options), randn(40, CLASSES, seed=1).softmax(dim=1)
    else:
        held &= target != options.get("ignore_index", -100)
    make = Subclass if kind == "another criterion" else nn.CrossEntropyLoss
    present = randn(40, 2) > -0.5 if masked else None
    whole, part = (
        DynCIMLoss(
            make(**options), modalities=2, num_samples=40, nonfinite=nonfinite, held_out=share
        )
        for share in (0.3, 0.0)
    )
    heads = [fused, *others]
    kept = [x.detach()[~held].requires_grad_() for x in heads]
    for head, value in zip(heads, (math.nan, math.inf, 1e30), strict=True):
        head.data[held.nonzero()[:2]] = value
    loss = whole(fused, target, unimodal=others, index=index, present=present)
    for name in ("skill", "held_out_averages"):  # which the others tell of
        part.state.get_buffer(name).copy_(whole.state.get_buffer(name))
    expected = part(
        kept[0],
        target[~held],
        unimodal=kept[1:],
        index=index[~held],
        present=None if present is None else present[~held],
    )
    grads, expected_grads = (
        torch.autograd.grad(x.sum(), leaves) for x, leaves in ((loss, heads), (expected, kept))
    )
    if loss.dim():
        assert not loss[held].any()
        loss = loss[~held]
    assert_allclose(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    for grad, rest in zip(grads, expected_grads, strict=True):
        assert not grad[held].any()
        assert_allclose(grad[~held], rest, rtol=1e-4, atol=1e-6)
    assert (whole.state.memory_weight[held] == 1.0).all()
    assert whole.state.held_out_averages[0, 0] > 0.0
    assert whole.state.nonfinite > 0
    after = dict(part.state.named_buffers())
    of_held_out = (
        "held_out_averages",
        "doubted",
        "skill",
        "logit_weight",
        "label_noise",
        "nonfinite",
    )
    for name, value in whole.state.named_buffers():
        if name.startswith("memory"):
            assert_allclose(value[~held], after[name][~held], rtol=1e-5, atol=1e-6)
        elif name not in of_held_out:
            assert_allclose(value, after[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.filterwarnings("ignore:index")
def test_label_noise_follows_what_was_held_out_alone_once_anything_was() -> None:
    logits, labels, wrong = contradicted_task(120)
    index, state = torch.arange(120), CurriculumState(2, num_samples=120)
    others = [logits, logits]
    logits.requires_grad_()
    criterion, whole = (
        DynCIMLoss(nn.CrossEntropyLoss(), state=state, held_out=share) for share in (0.05, 0.0)
    )
    calls: list[Callable[[], Tensor]] = [
        lambda: criterion(logits, labels, unimodal=others),
        lambda: criterion(logits, labels, index=index),
        lambda: whole(logits, labels, unimodal=others, index=index),
    ]
    noise = []
    for call in calls:  # nothing is held out yet; a head alone contradicts nothing
        noise.append(float(state.label_noise))
        call()
    noise.append(float(state.label_noise))
    assert noise[0] < noise[1] > noise[2] < noise[3]
    before = state.label_noise.clone()
    held = held_out(index, 0.05)
    rest = [x[~held] for x in (logits, labels, index)]
    # Held out are some of each batch, of this one none: who knows by heart is not asked.
    criterion(rest[0], rest[1], unimodal=[rest[0]] * 2, index=rest[2])
    assert torch.equal(state.label_noise, before)
    calls[0]()
    assert state.label_noise > before
    criterion(logits, labels, unimodal=others, index=index)
    assert state.held_out_averages[0, 0] > 0.0
    chances = logits.detach()[0].softmax(dim=0)
    entropy = torch.special.entr(chances).sum()
    doubted = 1.0 - torch.exp(entropy) * chances.min()
    assert_allclose(
        state.label_noise,
        doubted * wrong[held].float().mean() - 0.07 * sureness(entropy, CLASSES),
        rtol=1e-3,  # the heads are next to certain
    )
    before = state.label_noise.clone()
    for call in calls:
        call()
        assert torch.equal(state.label_noise, before)


@pytest.mark.parametrize("spoil", ["target", "index"])
def test_a_rejected_call_changes_nothing_of_what_was_heard(spoil: str) -> None:
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, num_samples=100, held_out=0.3)
    train(criterion, index=torch.arange(12))
    before = buffers(criterion)
    fused, others, target = batch(seed=9)
    given = {"target": target, "index": torch.arange(12)}
    held = held_out(given["index"], 0.3)
    given[spoil][held.nonzero()[-1]] = 10**6
    with pytest.raises(IndexError, match=f"{spoil}: expected .* to 1000000"):
        criterion(fused, given["target"], unimodal=others, index=given["index"])
    assert unchanged(criterion, before)


def test_sharp_heads_can_doubt() -> None:
    """Their quality is 0, as wrong labels cost them more than guessing would."""
    logits, labels, wrong = contradicted_task()
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), num_samples=1000, modalities=2)
    heads = [(3.0 * logits).requires_grad_() for _ in range(3)]
    for _ in range(80):
        criterion(heads[0], labels, unimodal=heads[1:], index=torch.arange(1000))
    share = wrong[held_out(torch.arange(1000), 0.05)].float().mean()
    assert_allclose(criterion.state.label_noise, share - 0.07, atol=0.08)
    assert criterion.state.quality[0] > 0.5  # without the labels in doubt


def test_a_batch_is_never_held_out_whole() -> None:
    """As far as the criterion ignores nothing of it anyway."""
    fused, others, target = batch()
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, num_samples=120, held_out=0.05)
    first = [x[:1] for x in (fused, *others)]
    loss = criterion(first[0], target[:1], unimodal=first[1:], index=torch.tensor([0]))
    assert loss.isfinite()
    ignored = target[:3].clone()
    ignored[1:] = -100
    heads = [x[:3] for x in (fused, *others)]
    loss = criterion(heads[0], ignored, unimodal=heads[1:], index=torch.tensor([0, 1, 3]))
    assert loss.isfinite()


def test_one_head_alone_doubts_no_label_unless_told() -> None:
    fused, _, target = batch()
    silent, told = (
        DynCIMLoss(nn.CrossEntropyLoss()),
        DynCIMLoss(nn.CrossEntropyLoss(), label_noise=0.3),
    )
    for _ in range(5):
        alone, doubted = silent(fused, target), told(fused, target)
    assert silent.state.label_noise == 0
    assert doubted < alone


def test_a_step_without_unimodal_logits_leaves_the_modalities_alone() -> None:
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, num_samples=120)
    fused, others, target = batch()
    criterion(fused, target, unimodal=others, index=torch.arange(12))
    before = copy.deepcopy(criterion.state)
    criterion(fused, target, index=torch.arange(12)).backward()
    state = criterion.state
    assert state.seen.tolist() == [2, 1, 1]
    assert torch.equal(state.log_quality[1:], before.log_quality[1:])
    assert torch.equal(state.memory_nll[:, 1:], before.memory_nll[:, 1:])


def test_second_backward_and_accumulation() -> None:
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2)
    fused, others, target = batch()
    loss = criterion(fused, target, unimodal=others)
    first = torch.autograd.grad(loss, fused, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, fused)[0])


def test_grad_scaling_scales_the_gradient() -> None:
    fused, others, target = batch()
    loss = DynCIMLoss(nn.CrossEntropyLoss())(fused, target, unimodal=others)
    (plain,) = torch.autograd.grad(loss, fused, retain_graph=True)
    (scaled,) = torch.autograd.grad(1024.0 * loss, fused)
    assert_allclose(scaled, 1024.0 * plain, rtol=1e-6)


def test_autocast_keeps_the_curriculum_in_float32() -> None:
    fused, others, target = batch()
    plain, cast = (
        DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, backend="eager") for _ in range(2)
    )
    low = [x.detach().bfloat16().requires_grad_() for x in (fused, *others)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cast(low[0], target, unimodal=low[1:])
    high = [x.detach().float() for x in low]
    expected = plain(high[0], target, unimodal=high[1:])
    assert loss.dtype == torch.float32
    assert_allclose(loss.item(), expected.item(), rtol=1e-6)
    assert unchanged(cast, buffers(plain))


@pytest.mark.parametrize(
    "options", [{}, {"held_out": 0.4}, {"held_out": 0.4, "nonfinite": "skip"}, PLAIN], ids=str
)
@pytest.mark.parametrize("soft", [False, True])
def test_compiles_without_a_break(options: dict[str, Any], soft: bool) -> None:
    eager, traced = (
        DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, num_samples=120, **options)
        for _ in range(2)
    )

    def step(criterion: DynCIMLoss, fused: Tensor, a: Tensor, b: Tensor, target: Tensor) -> Tensor:
        return criterion(fused, target, unimodal=[a, b], index=torch.arange(12))

    compiled = torch.compile(lambda *args: step(traced, *args), fullgraph=True, backend="aot_eager")
    for seed in range(3):
        fused, others, target = batch(seed=seed)
        if soft:
            target = randn(12, CLASSES, seed=seed).softmax(dim=1)
        expected = step(eager, fused, *others, target)
        loss = compiled(fused, *others, target)
        assert_allclose(loss.item(), expected.item(), rtol=1e-6)
        grads = [torch.autograd.grad(x, fused)[0] for x in (loss, expected)]
        assert_allclose(grads[0], grads[1], rtol=1e-5, atol=1e-7)
    for name, value in eager.state.named_buffers():
        assert_allclose(traced.state.get_buffer(name), value, rtol=1e-5, atol=1e-7, err_msg=name)


FUSED, OTHERS, TARGET = batch()
CASES: dict[str, tuple[Callable[[DynCIMLoss], Any], type[Exception], str]] = {
    "one head too few": (
        lambda c: c(FUSED, TARGET, unimodal=OTHERS[:1]),
        ValueError,
        r"unimodal: expected 2 modalities \['a', 'b'\], got 1",
    ),
    "another name": (
        lambda c: c(FUSED, TARGET, unimodal={"a": OTHERS[0], "x": OTHERS[1]}),
        ValueError,
        r"unimodal: expected the modalities \['a', 'b'\], got \['a', 'x'\]",
    ),
    "a tensor for a list": (
        lambda c: c(FUSED, TARGET, unimodal=OTHERS[0]),
        TypeError,
        r"unimodal: expected a mapping or a sequence.*, got Tensor",
    ),
    "present without modalities": (
        lambda c: c(FUSED, TARGET, present=torch.ones(12, 2, dtype=torch.bool)),
        ValueError,
        "present: expected None without unimodal logits, got Tensor",
    ),
    "present without modalities or samples": (
        lambda c: c(FUSED[:0], TARGET[:0], present=torch.ones(0, 2, dtype=torch.bool)),
        ValueError,
        "present: expected None without unimodal logits, got Tensor",
    ),
    "unimodal logits of another shape": (
        lambda c: c(FUSED, TARGET, unimodal={"b": OTHERS[0][:, :3], "a": OTHERS[1]}),
        ValueError,
        r"unimodal logits of b: expected the shape of the fused logits, \[12, 5\], got \[12, 3\]",
    ),
    "index of another length": (
        lambda c: c(FUSED, TARGET, unimodal=OTHERS, index=torch.arange(3)),
        ValueError,
        r"index: expected shape \[12\], got \[3\]",
    ),
    "index of another dtype": (
        lambda c: c(FUSED, TARGET, unimodal=OTHERS, index=torch.arange(12.0)),
        TypeError,
        r"index: expected an int64 tensor, got torch.float32",
    ),
    "index out of range": (
        lambda c: c(FUSED, TARGET, unimodal=OTHERS, index=torch.arange(12) + 110),
        IndexError,
        r"index: expected sample indices in \[0, 120\), got values from 110 to 121",
    ),
    "target out of range": (
        lambda c: c(FUSED, TARGET + 2, unimodal=OTHERS, index=torch.arange(12)),
        IndexError,
        r"target: expected class indices in \[0, 5\)",
    ),
    "logits on another device": (
        lambda c: c(FUSED.to("meta"), TARGET.to("meta")),
        ValueError,
        r"state: expected device meta of the logits, got cpu",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), CASES.values(), ids=CASES)
def test_a_rejected_call_says_why_and_changes_nothing(
    call: Callable[[DynCIMLoss], Any], error: type[Exception], message: str
) -> None:
    state = CurriculumState(["a", "b"], num_samples=120)
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), state=state)
    train(criterion)
    before = buffers(criterion)
    with pytest.raises(error, match=message):
        call(criterion)
    assert unchanged(criterion, before)


def test_a_training_call_without_the_positions_that_a_memory_takes_warns() -> None:
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, num_samples=120)
    before = buffers(criterion)
    with pytest.warns(UserWarning, match=r"index: expected the samples' positions.*got None"):
        criterion(FUSED, TARGET, unimodal=OTHERS)
    assert criterion.state.step == 1
    unvisited = criterion.state.memory_visits
    assert torch.equal(unvisited, before["state.memory_visits"])
    criterion(FUSED, TARGET, unimodal=OTHERS, index=torch.arange(12))  # any warning is an error
    criterion.eval()(FUSED, TARGET)
    DynCIMLoss(nn.CrossEntropyLoss(), modalities=2)(FUSED, TARGET, unimodal=OTHERS)


def test_a_rejected_first_call_settles_nothing() -> None:
    criterion = DynCIMLoss(nn.CrossEntropyLoss())
    before = buffers(criterion)
    with pytest.raises(IndexError, match="target"):
        criterion(FUSED, TARGET + 2, unimodal=OTHERS)
    assert criterion.state.modalities is None
    assert unchanged(criterion, before)


def test_modalities_that_have_no_names_yet_are_told_apart_in_messages() -> None:
    criterion = DynCIMLoss(nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"^unimodal logits of modality 7: expected the shape"):
        criterion(FUSED, TARGET, unimodal={4: FUSED, 7: FUSED[:, :3]})  # type: ignore[dict-item]


def test_class_probabilities_cannot_be_ignored() -> None:
    criterion = DynCIMLoss(nn.CrossEntropyLoss(ignore_index=2))
    with pytest.raises(ValueError, match=r"target: expected class indices.*ignore_index=2"):
        criterion(FUSED, FUSED.detach().softmax(dim=1))
    assert criterion.state.step == 0


def test_index_needs_a_memory() -> None:
    with pytest.raises(ValueError, match=r"index: expected None.*num_samples="):
        DynCIMLoss(nn.CrossEntropyLoss())(FUSED, TARGET, index=torch.arange(12))


def test_a_criterion_must_give_one_loss_per_sample() -> None:
    wrapped = DynCIMLoss(lambda logits, target: F.cross_entropy(logits, target))
    message = r"criterion: expected one loss per sample, shape \[12\], got \[\]; if it reduces"
    with pytest.raises(ValueError, match=message):
        wrapped(FUSED, TARGET, unimodal=OTHERS)
    with pytest.raises(ValueError, match=r"shape \[12\], got float; if it reduces"):
        DynCIMLoss(lambda logits, target: 0.5)(FUSED, TARGET)  # type: ignore[arg-type, return-value]


def test_options_may_be_numbers_of_numpy() -> None:
    options = {"held_out": np.float32(0.25), "pacing_strength": np.float64(0.5)}
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, num_samples=120, **options)
    loss = criterion(FUSED, TARGET, unimodal=OTHERS, index=torch.arange(12))
    plain = {name: float(value) for name, value in options.items()}
    other = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, num_samples=120, **plain)
    assert torch.equal(loss, other(FUSED, TARGET, unimodal=OTHERS, index=torch.arange(12)))


def test_a_first_call_that_is_rejected_names_the_modality() -> None:
    criterion = DynCIMLoss(nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"unimodal logits of audio: expected the shape"):
        criterion(FUSED, TARGET, unimodal={"audio": OTHERS[0][:, :3]})
    assert criterion.state.modalities is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"surprise_strength": -1.0}, ValueError, r"surprise_strength: .*\[0, inf\), got -1.0"),
        ({"pacing_strength": math.nan}, ValueError, r"pacing_strength: .*got nan"),
        ({"unimodal_strength": "1"}, TypeError, r"unimodal_strength: expected an int.*got str"),
        ({"label_noise": 2}, ValueError, r"label_noise: expected a value in \[0, 1\], got 2"),
        ({"nonfinite": "drop"}, ValueError, r"nonfinite: .*'skip'\], got 'drop'"),
        ({"reduction": "batchmean"}, ValueError, r"reduction: .*got 'batchmean'"),
        ({"state": CurriculumState(), "modalities": 2}, ValueError, r"state: expected it alone"),
        ({"modalities": ["a", "a"]}, ValueError, r"modalities: expected distinct names"),
        ({"modalities": []}, ValueError, r"modalities: expected at least 1, got none"),
        ({"modalities": "audio"}, TypeError, r"modalities: expected a number or a sequence"),
        ({"modalities": {"a", "b"}}, TypeError, r"modalities: expected a number or a sequence"),
        ({"modalities": 2.0}, TypeError, r"modalities: expected a number .* got 2.0"),
        ({"state": "x"}, TypeError, r"state: expected a CurriculumState, got str"),
        (
            {"state": DynCIMLoss(nn.CrossEntropyLoss())},
            TypeError,
            r"state: expected a CurriculumState, got DynCIMLoss; pass its \.state$",
        ),
        ({"held_out": 0.1}, ValueError, r"held_out: expected 0 without .*num_samples=, here or"),
        ({"modalities": 0}, ValueError, r"modalities: expected at least 1, got 0"),
        ({"num_samples": 0}, ValueError, r"num_samples: expected at least 1, got 0"),
        ({"num_samples": 1.5}, TypeError, r"num_samples: expected a whole number, got float"),
    ],
)
def test_options_out_of_range(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        DynCIMLoss(nn.CrossEntropyLoss(), **options)


def test_not_a_criterion() -> None:
    with pytest.raises(TypeError, match="criterion: expected a callable, got str"):
        DynCIMLoss("cross_entropy")
    with pytest.raises(TypeError, match="criterion: expected an instance, got the class Cross"):
        DynCIMLoss(nn.CrossEntropyLoss)


def test_repr_tells_the_options() -> None:
    text = repr(DynCIMLoss(nn.CrossEntropyLoss(), modalities=["a"], label_noise=0.2))
    assert "label_noise=0.2" in text
    assert "modalities=('a',)" in text


def test_a_target_changed_in_place_is_noticed() -> None:
    fused, others, target = batch()
    loss = DynCIMLoss(nn.CrossEntropyLoss())(fused, target, unimodal=others)
    target.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("head", [0, 1])
def test_logits_changed_in_place_are_noticed(head: int) -> None:
    leaves, target = [randn(12, CLASSES, seed=k).requires_grad_() for k in range(2)], batch()[2]
    logits = [2 * x for x in leaves]
    loss = DynCIMLoss(nn.CrossEntropyLoss())(logits[0], target, unimodal=logits[1:])
    logits[head].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_is_freed_by_its_backward() -> None:
    fused, others, target = batch()
    loss = DynCIMLoss(nn.CrossEntropyLoss())(fused, target, unimodal=others)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_head_that_needs_no_gradient_gets_none() -> None:
    fused, others, target = batch()
    grads = []
    for needs in (True, False):
        others[1].requires_grad_(needs)
        loss = DynCIMLoss(nn.CrossEntropyLoss())(fused, target, unimodal=others)
        grads.append(torch.autograd.grad(loss, [fused, others[0]], retain_graph=True))
    loss.backward()
    assert others[1].grad is None
    for x, y in zip(*grads, strict=True):
        assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_no_second_derivative() -> None:
    fused, others, target = batch()
    loss = DynCIMLoss(nn.CrossEntropyLoss())(fused, target, unimodal=others)
    (grad,) = torch.autograd.grad(loss, fused, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


def test_gradients_accumulate_over_losses() -> None:
    """Each backward adds to what the one before left; none writes into it."""
    fused, others, target = batch()
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2)
    total = torch.zeros_like(fused)
    for factor in (1.0, 0.5, 1.0):
        loss = factor * criterion(fused, target, unimodal=others)
        total += torch.autograd.grad(loss, fused, retain_graph=True)[0]
        loss.backward()
    assert_allclose(fused.grad, total, rtol=1e-6, atol=1e-8)


def test_batch_sizes_do_not_compile_anew() -> None:
    """The second size makes the batch symbolic; from then on nothing is compiled."""
    state = CurriculumState(2, num_samples=120)
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), state=state)
    fusion = GatedFusion([3, 3], state=state)
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def step(a: Tensor, b: Tensor, target: Tensor, index: Tensor) -> Tensor:
        fused, _, logits = fusion([a, b], unimodal=[a, b])
        return criterion(fused[:, :3] + logits, target, unimodal=[a, b], index=index)

    for size in (8, 12, 16, 20, 24):
        a, b = (randn(size, 3, seed=k).requires_grad_() for k in range(2))
        step(a, b, torch.arange(size) % 3, torch.arange(size)).backward()
    assert counter.frame_count <= 2
    assert state.step == 5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("training", [True, False])
def test_symbolic_sizes_compile_to_the_same(training: bool) -> None:
    """Of ``dynamic=True``, torch's decompositions take forms that static sizes never see."""
    found = []
    for dynamic in (False, True):
        state = CurriculumState(2, num_samples=120)
        criterion = DynCIMLoss(nn.CrossEntropyLoss(), state=state, held_out=0.4)
        fusion = GatedFusion([3, 3], state=state, dropout=0.0)

        def step(
            a: Tensor,
            b: Tensor,
            target: Tensor,
            index: Tensor,
            criterion: DynCIMLoss = criterion,
            fusion: GatedFusion = fusion,
        ) -> Tensor:
            fused, _, logits = fusion([a, b], unimodal=[a, b])
            return criterion(fused[:, :3] + logits, target, unimodal=[a, b], index=index)

        # All of inductor but what writes code.
        backend = "aot_eager_decomp_partition"
        call = torch.compile(step, dynamic=True, fullgraph=True, backend=backend)
        for size in (24, 20, 16):
            target, index = torch.arange(size) % 3, torch.arange(size)
            shift = 2.0 * F.one_hot(target, 3)
            a, b = (shift + randn(size, 3, seed=k) for k in range(2))
            for part in (criterion, fusion):
                part.train(training or size > 16)
            loss = (call if dynamic else step)(a.requires_grad_(), b, target, index)
            (grad,) = torch.autograd.grad(loss, a)
            kept = [x.clone() for x in (*state.buffers(), *fusion.buffers())]
            found.append((loss.detach(), grad, *kept))
    assert state.label_noise != 0.0
    for plain, symbolic in zip(found[:3], found[3:], strict=True):
        for x, y in zip(plain, symbolic, strict=True):
            assert_allclose(y, x, rtol=1e-5, atol=1e-6)


class Smooth(nn.CrossEntropyLoss):
    """A cross-entropy with a forward of its own, which takes the path of any criterion."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return super().forward(logits, target)


@pytest.mark.parametrize("make", [nn.NLLLoss, Smooth])
def test_the_mean_of_any_cross_entropy_is_over_class_weights(make: Any) -> None:
    weight = torch.tensor([0.1, 1.0, 10.0, 0.5, 2.0])
    fused, others, target = batch(size=30)
    logits = [x.detach().log_softmax(dim=1).requires_grad_() for x in (fused, *others)]
    found, expected = (
        DynCIMLoss(criterion, **PLAIN)(logits[0], target, unimodal=logits[1:])
        for criterion in (make(weight=weight), nn.CrossEntropyLoss(weight=weight))
    )
    assert_allclose(found.item(), expected.item(), rtol=1e-5)
    wrapped = DynCIMLoss(make(weight=weight), **PLAIN)
    assert_allclose(wrapped(logits[0], target).item(), wrapped.eval()(logits[0], target).item())


def test_a_criterion_that_decides_alone_is_called_once() -> None:
    calls = []

    def criterion(logits: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        return F.cross_entropy(logits, target, reduction="none")

    fused, _, target = batch()
    DynCIMLoss(criterion, **PLAIN)(fused, target)
    assert len(calls) == 1


@pytest.mark.parametrize("target", [torch.zeros(9, 3, dtype=torch.int64), torch.zeros(9)])
def test_a_target_of_the_other_dtype_is_told_apart(target: Tensor) -> None:
    message = rf"target: expected .*int64, or .*floating-point, got {target.dtype} of shape"
    with pytest.raises(TypeError, match=message):
        DynCIMLoss(nn.CrossEntropyLoss())(torch.zeros(9, 3, requires_grad=True), target)


def test_no_more_than_half_is_held_out() -> None:
    with pytest.raises(ValueError, match=r"held_out: expected a value in \[0, 0.5\], got 0.6"):
        DynCIMLoss(nn.CrossEntropyLoss(), num_samples=10, held_out=0.6)


@pytest.mark.parametrize(
    ("present", "unimodal", "error", "message"),
    [
        ([True], False, ValueError, "present: expected None without unimodal logits, got list"),
        (torch.ones(12, 3, dtype=torch.bool), True, ValueError, r"present: .*\[12, 2\], got"),
        (torch.ones(12, 2), True, TypeError, "present: expected a bool tensor, got torch.float32"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(
    present: Any, unimodal: bool, error: type[Exception], message: str
) -> None:
    fused, others, target = batch()
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2)
    with pytest.raises(error, match=message):
        criterion(fused, target, unimodal=others if unimodal else None, present=present)
    assert criterion.state.step == 0


def test_labels_may_be_smoothed_in_full() -> None:
    fused, _, target = batch()
    criterion = nn.CrossEntropyLoss(label_smoothing=1.0)
    loss = DynCIMLoss(criterion, **PLAIN)(fused, target, unimodal=[fused])
    assert_allclose(loss.item(), 2 * criterion(fused, target).item(), rtol=1e-5)


def test_a_negative_smoothing_is_refused() -> None:
    fused, others, target = batch()
    criterion = DynCIMLoss(nn.CrossEntropyLoss(label_smoothing=-0.1), modalities=2)
    with pytest.raises(ValueError, match=r"label_smoothing: expected .* got -0.1"):
        criterion(fused, target, unimodal=others)


@needs_native
@pytest.mark.parametrize("what", ["present", "index", "weight", "state"])
def test_c_takes_no_subclass_of_a_tensor_wherever_it_is(what: str) -> None:
    fused, others, target = batch()
    given = {"present": torch.ones(12, 2, dtype=torch.bool), "index": torch.arange(12)}
    criterion = DynCIMLoss(
        nn.CrossEntropyLoss(torch.ones(CLASSES)), modalities=2, num_samples=12, backend="native"
    )
    if what in given:
        given[what] = given[what].as_subclass(Foreign)
    else:
        owner, name = (
            (criterion.criterion, what) if what == "weight" else (criterion.state, "skill")
        )
        owner._buffers[name] = owner._buffers[name].as_subclass(Foreign)
    with pytest.raises(RuntimeError, match="'native' does not take a Foreign"):
        criterion(fused, target, unimodal=others, **given)


def test_class_weights_of_any_criterion_are_checked() -> None:
    fused, others, target = batch()
    criterion = DynCIMLoss(nn.NLLLoss(torch.ones(2)), modalities=2)
    with pytest.raises(ValueError, match=r"weight: expected shape \[5\], got \[2\]"):
        criterion(fused, target, unimodal=others)


@pytest.mark.parametrize("case", ["ruled out", "ignored"])
def test_any_criterion_is_spared_what_it_cannot_take(case: str) -> None:
    fused, others, target = batch()
    values = fused.detach().clone()
    if case == "ruled out":
        values[3, target[3]] = -math.inf  # an infinite loss of a finite entropy
    else:
        target[3], values[3] = 4, math.nan  # a loss of 0 of no entropy
    values.requires_grad_()
    criterion: Any = Other(ignore_index=4)
    if case == "ruled out":
        criterion = lambda x, y: F.cross_entropy(x, y, reduction="none").square()  # noqa: E731
    loss = DynCIMLoss(criterion, nonfinite="skip")(values, target, unimodal=others)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, values)[0].isfinite().all()


def test_any_criterion_is_spared_what_is_absent_where_it_skips() -> None:
    fused, others, target = batch()
    present = torch.ones(12, 2, dtype=torch.bool)
    present[3, 0] = False
    others[0].data[3] = math.nan
    loss = DynCIMLoss(Other(), nonfinite="skip")(fused, target, unimodal=others, present=present)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, others[0])[0].isfinite().all()


def test_a_criterion_that_is_infinite_at_0_may_have_absent_modalities() -> None:
    fused, others, target = batch()
    present = torch.ones(12, 2, dtype=torch.bool)
    present[3, 0] = False
    loss = DynCIMLoss(lambda x, _: 1.0 / x.square().sum(dim=1))(
        fused, target, unimodal=others, present=present
    )
    assert loss.isfinite()
    assert all(x.isfinite().all() for x in torch.autograd.grad(loss, [fused, *others]))


def test_a_first_call_may_have_ignored_samples() -> None:
    fused, others, target = batch()
    target[0] = 255
    criterion = DynCIMLoss(nn.CrossEntropyLoss(ignore_index=255))
    assert criterion(fused, target, unimodal=others).isfinite()


def test_a_first_call_of_a_wrong_index_settles_nothing() -> None:
    fused, others, target = batch()
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), num_samples=4)
    with pytest.raises(IndexError, match=r"index: expected sample indices in \[0, 4\)"):
        criterion(fused, target, unimodal=others, index=torch.arange(12))
    assert criterion.state.modalities is None


@pytest.mark.parametrize("make", [nn.CrossEntropyLoss, Other])
def test_without_strength_it_skips_all_the_same(make: Any) -> None:
    fused, _, target = batch()
    fused.data[3] = math.nan
    assert DynCIMLoss(make(), nonfinite="skip", **PLAIN)(fused, target).isfinite()


def test_class_probabilities_cannot_be_ignored_at_0_either() -> None:
    fused, others, _ = batch()
    criterion = DynCIMLoss(nn.CrossEntropyLoss(ignore_index=0), modalities=2)
    with pytest.raises(ValueError, match=r"target: expected class indices.*ignore_index=0"):
        criterion(fused, fused.detach().softmax(dim=1), unimodal=others)


def test_a_criterion_that_gives_a_column_is_refused() -> None:
    fused, others, target = batch()
    wrapped = DynCIMLoss(lambda x, y: F.cross_entropy(x, y, reduction="none").unsqueeze(1))
    with pytest.raises(ValueError, match=r"criterion: expected .* \[12\], got \[12, 1\]"):
        wrapped(fused, target, unimodal=others)


@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 1.0, 2.0, 1.0, 0.25])])
def test_the_mean_over_class_probabilities_overrides_a_sum(weight: Tensor | None) -> None:
    fused, _, _ = batch()
    soft = torch.eye(CLASSES)[torch.arange(12) % CLASSES]
    criterion = DynCIMLoss(nn.CrossEntropyLoss(weight, reduction="sum"), reduction="mean")
    expected = F.cross_entropy(fused, soft, weight)
    assert_allclose(criterion.eval()(fused, soft).item(), expected.item(), rtol=1e-5)


def test_the_mean_over_class_weights_overrides_a_sum_where_some_are_ignored() -> None:
    fused, _, target = batch()
    target[0], weight = -100, torch.tensor([0.5, 1.0, 2.0, 1.0, 0.25])
    criterion = DynCIMLoss(nn.CrossEntropyLoss(weight, reduction="sum"), reduction="mean")
    expected = F.cross_entropy(fused, target, weight)
    assert_allclose(criterion.eval()(fused, target).item(), expected.item(), rtol=1e-5)


def test_a_cross_entropy_of_its_own_is_called() -> None:
    fused, _, target = batch()
    loss = DynCIMLoss(Other(), **PLAIN)(fused, target, unimodal=[fused])
    assert_allclose(loss.item(), 4 * F.cross_entropy(fused, target).item(), rtol=1e-5)


def test_repr_tells_what_is_held_out_and_disturbed() -> None:
    assert "held_out=0.2" in repr(DynCIMLoss(nn.CrossEntropyLoss(), num_samples=9, held_out=0.2))
    assert "swap=0.1, dropout=0.2" in repr(GatedFusion([1], swap=0.1, dropout=0.2))


def test_numbers_of_a_checkpoint_give_way_to_names_after_a_call_by_position() -> None:
    fused, others, target = batch()
    criterion = DynCIMLoss(nn.CrossEntropyLoss())
    criterion.state.load_state_dict(CurriculumState(2).state_dict())
    criterion(fused, target, unimodal=others)
    criterion(fused, target, unimodal=dict(zip("ab", others, strict=True)))
    assert criterion.state.modalities == ("a", "b")


def test_a_loss_alone_undoes_a_cast_behind_its_back() -> None:
    fused, others, target = batch()
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2)
    before = {name: x.dtype for name, x in criterion.named_buffers()}
    for buffer in criterion.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.bfloat16()
    criterion(fused, target, unimodal=others)
    assert {name: x.dtype for name, x in criterion.named_buffers()} == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DynCIMLoss(nn.CrossEntropyLoss(), label_noise=True),
            "label_noise: expected an int",
        ),
        (lambda: CurriculumState(True), "modalities: expected a whole number, got bool"),
        (lambda: CurriculumState(2, num_samples=True), "num_samples: expected a whole number"),
        (lambda: CurriculumState([1, 2]), "modalities: expected a number or a sequence of names"),
    ],
)
def test_options_of_another_type_are_refused(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}"):
        make()


def test_an_index_on_another_device_is_refused() -> None:
    fused, others, target = batch()
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, num_samples=12)
    with pytest.raises(ValueError, match="index: expected device cpu of the logits, got meta"):
        criterion(fused, target, unimodal=others, index=torch.arange(12, device="meta"))


def test_a_modality_too_many_is_refused() -> None:
    fused, others, target = batch(modalities=3)
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=["a", "b"])
    with pytest.raises(
        ValueError, match=r"expected the modalities \['a', 'b'\], got \['a', 'b', 'c"
    ):
        criterion(fused, target, unimodal=dict(zip("abc", others, strict=True)))
