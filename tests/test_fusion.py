from __future__ import annotations

import copy
import io
import math
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from inputs import Foreign, each_backend, needs_native, randn
from numpy.testing import assert_allclose
from torch import Tensor, nn
from torch.nn import functional as F

from dyncim_core import CurriculumState, DynCIMLoss, GatedFusion, held_out, kernels, redundancy
from dyncim_core import reference as ref
from dyncim_core.kernels.interface import Gate, Kept

NAMES = ["audio", "image", "text"]
WIDTHS = {"audio": 3, "image": 5, "text": 2}
CLASSES = 4


def inputs(size: int = 9, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    features = {n: torch.randn(size, w, generator=generator) for n, w in WIDTHS.items()}
    unimodal = {n: 2 * torch.randn(size, CLASSES, generator=generator) for n in WIDTHS}
    return features, unimodal


def still(**options: Any) -> GatedFusion:
    return GatedFusion(WIDTHS, swap=0.0, dropout=0.0, **options)


def test_without_logits_it_is_plain_concatenation() -> None:
    features, _ = inputs()
    fused, gates, logits = still()(features)
    assert torch.equal(fused, torch.cat(list(features.values()), dim=1))
    assert_allclose(gates.detach(), torch.full((9, 3), 1 / 3), rtol=1e-6)
    assert logits is None


def test_gates_are_those_of_the_reference() -> None:
    fusion = still(threshold=0.1)
    fusion.skill.copy_(torch.tensor([0.5, 0.9, 0.3]))
    features, unimodal = inputs()
    present = torch.ones(9, 3, dtype=torch.bool)
    present[2, 0] = present[5, 1:] = present[7] = False
    fused, gates, logits = fusion(features, unimodal=unimodal, present=present)
    rows = [unimodal[name].double() for name in NAMES]
    probs = torch.stack(rows).softmax(dim=-1).numpy()
    mask = present.t().numpy()
    apart = ref.disagreement(probs, [0.5, 0.9, 0.3], mask)
    expected = ref.reliability_gates(-2.0 * apart, mask, 0.1)
    assert_allclose(gates.detach(), expected.T, rtol=1e-4, atol=1e-6)
    largest = gates.amax(dim=1, keepdim=True).clamp_min(1e-30)
    scale = (gates / largest).split(1, dim=1)
    pieces = [scale[m] * features[name] for m, name in enumerate(NAMES)]
    assert_allclose(fused.detach(), torch.cat(pieces, dim=1).detach(), rtol=1e-5, atol=1e-6)
    total = sum(scale[m] * unimodal[name] for m, name in enumerate(NAMES))
    assert logits is not None
    assert_allclose(logits, total, rtol=1e-4, atol=1e-5)


def test_absent_features_hold_anything() -> None:
    features, unimodal = inputs()
    present = torch.ones(9, 3, dtype=torch.bool)
    present[4, 1] = present[6] = False
    spoiled = {name: x.clone() for name, x in features.items()}
    spoiled_logits = {name: x.clone() for name, x in unimodal.items()}
    for values in (spoiled, spoiled_logits):
        values["image"][4] = math.nan
        for x in values.values():
            x[6] = math.nan
    fusion = still()
    actual = fusion(spoiled, unimodal=spoiled_logits, present=present)
    expected = fusion(features, unimodal=unimodal, present=present)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert actual.gates[4, 1] == 0
    assert actual.gates[6].tolist() == [0.0, 0.0, 0.0]
    assert actual.fused[6].abs().sum() == 0


def test_order_of_the_modalities_only_orders_the_columns() -> None:
    features, unimodal = inputs()
    order = ["text", "audio", "image"]
    fused, gates, _ = still()(features, unimodal=unimodal)
    other = GatedFusion({name: WIDTHS[name] for name in order}, swap=0.0, dropout=0.0)
    again, permuted, _ = other(features, unimodal=unimodal)
    assert_allclose(permuted.detach(), gates[:, [2, 0, 1]].detach(), rtol=1e-5)
    pieces = dict(zip(NAMES, fused.split(list(WIDTHS.values()), dim=1), strict=True))
    assert_allclose(
        again.detach(), torch.cat([pieces[n] for n in order], dim=1).detach(), rtol=1e-5
    )


def test_the_odd_one_out_is_cut() -> None:
    agreed = torch.tensor([[20.0, 0.0, 0.0, 0.0]])
    fusion = still(threshold=0.2, disagreement_slope=3.0)
    features = {name: torch.ones(1, width) for name, width in WIDTHS.items()}
    logits = {"audio": agreed, "image": agreed, "text": agreed.flip(1)}
    fused, gates, _ = fusion(features, unimodal=logits)
    assert_allclose(gates[0].detach(), [0.5, 0.5, 0.0], atol=1e-3)
    assert fused[0, -2:].tolist() == [0.0, 0.0]
    assert still(threshold=0.0)(features, unimodal=logits).gates[0, 2] > 0.05
    assert_allclose(still(disagreement_slope=0.0)(features, unimodal=logits).gates, 1 / 3)


@pytest.mark.parametrize("modalities", range(1, 9))
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("classes", [1, 3])
def test_any_number_of_modalities(modalities: int, size: int, classes: int) -> None:
    fusion = GatedFusion([2] * modalities, swap=0.5, dropout=0.5)
    features = [torch.randn(size, 2) for _ in range(modalities)]
    unimodal = [torch.randn(size, classes) for _ in range(modalities)]
    fused, gates, logits = fusion(features, unimodal=unimodal)
    assert fused.shape == (size, fusion.out_features)
    assert logits.shape == (size, classes)
    assert_allclose(gates.sum(dim=1).detach(), 1.0, rtol=1e-5)


def test_sequences_are_scaled_alike_over_time() -> None:
    features, unimodal = inputs()
    long = {name: x.unsqueeze(1).expand(-1, 7, -1) for name, x in features.items()}
    fusion = still()
    fused = fusion(long, unimodal=unimodal).fused
    expected = fusion(features, unimodal=unimodal).fused
    assert fused.shape == (9, 7, 10)
    assert torch.equal(fused, expected.unsqueeze(1).expand(-1, 7, -1))


def test_the_encoders_are_not_asked_to_look_reliable() -> None:
    features, unimodal = inputs()
    for x in (*features.values(), *unimodal.values()):
        x.requires_grad_()
    fusion = still()
    assert not list(fusion.parameters())
    fused = fusion(features, unimodal=unimodal).fused
    fused.square().sum().backward()
    assert all(x.grad is not None for x in features.values())
    assert all(x.grad is None for x in unimodal.values())


def rows_of(fusion: GatedFusion, size: int = 4000) -> tuple[Tensor, Tensor]:
    """Which row each modality came from, and the gates, in a training step."""
    torch.manual_seed(0)
    row = torch.arange(size, dtype=torch.float64).unsqueeze(1)
    features = [row + 1.0 for _ in fusion.widths]
    unimodal = [torch.zeros(size, 2) for _ in fusion.widths]
    with torch.no_grad():
        fused, gates, _ = fusion.train()(features, unimodal=unimodal)
    return fused - 1.0, gates


def test_swap_takes_one_modality_from_another_sample() -> None:
    origin, gates = rows_of(GatedFusion([1, 1, 1], swap=0.4, dropout=0.0))
    foreign = origin.round() != torch.arange(4000).unsqueeze(1)
    assert foreign.sum(dim=1).max() == 1
    assert_allclose(foreign.double().mean(dim=0), 0.4 / 3, atol=0.02)
    assert_allclose(gates, 1 / 3, rtol=1e-5)


def test_dropout_drops_one_modality() -> None:
    _, gates = rows_of(GatedFusion([1, 1, 1], swap=0.0, dropout=0.4))
    dropped = gates == 0
    assert dropped.sum(dim=1).max() == 1
    assert_allclose(dropped.double().mean(dim=0), 0.4 / 3, atol=0.02)
    assert_allclose(gates[dropped.any(dim=1)].amax(dim=1), 0.5, rtol=1e-5)


def test_the_better_modality_is_disturbed_less() -> None:
    state = CurriculumState(2)
    state.quality[0] = 0.9
    state.skill.copy_(torch.tensor([0.9, 0.85, 0.4]))
    state.log_quality.copy_(torch.tensor([-0.2, -0.2, -1.0]))  # fusion adds nothing to the first
    fusion = GatedFusion([1, 1], state=state, swap=0.0, dropout=0.8)
    dropped = rows_of(fusion)[1] == 0
    # Of the skills, 0.9 / 0.85 - 1 and 0.9 / 0.4 - 1 have the harmonic mean 0.1124.
    share = 0.9 / 1.1124**4
    assert_allclose(dropped.double().mean(dim=0), [0.4 * 0.25 * share, 0.4 * share], atol=0.02)


@pytest.mark.parametrize(("ahead", "learnt"), [(0.0, 0.9), (1.0, 0.9), (0.0, 0.1), (0.0, 0.0)])
def test_what_only_fusion_knows_is_not_dropped(ahead: float, learnt: float) -> None:
    state = CurriculumState(2)
    state.quality.fill_(learnt)
    state.log_quality.copy_(torch.tensor([-0.2, -0.2 - ahead, -0.2 - ahead]))
    dropped = rows_of(GatedFusion([1, 1], state=state, dropout=0.8))[1] == 0
    expected = 0.8 * learnt / max(math.exp(ahead), 1.001) ** 4  # the floor of a rate
    assert_allclose(dropped.any(dim=1).double().mean(), expected, atol=0.02)
    assert_allclose(redundancy(state.log_quality, state.quality[0]), expected / 0.8, rtol=2e-3)


@each_backend
@pytest.mark.parametrize("modalities", [2, 3])  # without and with a prior
@pytest.mark.parametrize(
    ("counts", "weight", "share"),
    [
        ([30, 10], [1.0, 1.0], 0.4096),
        ([30, 10], [1.0, 3.0], 1.0),  # as the criterion has them
        ([20, 20, 0, 10], [1.0] * 4, (25 / 27) ** 4),
        ([30, 10], [0.0, 0.0], 1.0),  # predictions do not follow the classes
        ([30, 10, 10, 10, 10], [1.0, 1.0, math.inf, math.nan, -1.0], 0.4096),
        ([30, 10], [1e36, 1e36], 0.4096),
        ([30, 10], [1e-37, 1e-37], 0.4096),
    ],
)
def test_where_classes_are_outnumbered_less_is_dropped(
    backend: str, modalities: int, counts: list[int], weight: list[float], share: float
) -> None:
    state = CurriculumState(modalities)
    state.quality.fill_(0.9)
    state.class_seen[: len(counts)] = torch.tensor(counts)
    state.class_weight[: len(weight)] = torch.tensor(weight)
    fusion = GatedFusion([1] * modalities, state=state, dropout=0.8, backend=backend)
    dropped = rows_of(fusion, size=20_000)[1] == 0
    assert_allclose(dropped.any(dim=1).double().mean(), 0.72 * share, atol=0.015)


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize(("classes", "even"), [(4, False), (1500, True)])
def test_more_classes_than_are_told_apart_count_as_even(
    backend: str | None, classes: int, even: bool
) -> None:
    """Of 1500, seen once each, 476 share a place with another."""
    criterion = DynCIMLoss(nn.CrossEntropyLoss(torch.ones(classes)), modalities=2, backend=backend)
    target = torch.arange(1500) % classes
    if classes == 4:
        target = target.clamp_max(1)  # a quarter of the one, the rest of the other
    heads = [torch.zeros(1500, classes, requires_grad=True) for _ in range(3)]
    criterion(heads[0], target, unimodal=heads[1:])
    state = criterion.state
    state.quality.fill_(0.9)
    fusion = GatedFusion([1, 1], state=state, dropout=0.8, backend=backend)
    dropped = rows_of(fusion, size=20_000)[1] == 0
    share = 1.0 if even else (1 / (2 * (0.25**2 + 0.75**2))) ** 4
    assert_allclose(dropped.any(dim=1).double().mean(), 0.72 * share, atol=0.015)
    assert state.class_weight.any() != even


def test_the_only_modality_is_never_disturbed() -> None:
    origin, gates = rows_of(GatedFusion([1], swap=0.5, dropout=0.5))
    assert torch.equal(origin[:, 0], torch.arange(4000).double())
    assert (gates == 1).all()
    fusion = GatedFusion([1, 1], swap=0.5, dropout=0.5)
    present = torch.tensor([[True, False]] * 50)
    features = [torch.arange(50.0).unsqueeze(1), torch.full((50, 1), math.nan)]
    fused = fusion(features, unimodal=[torch.zeros(50, 2)] * 2, present=present).fused
    assert torch.equal(fused[:, 0], torch.arange(50.0))


def test_evaluation_disturbs_nothing() -> None:
    features, unimodal = inputs()
    fusion = GatedFusion(WIDTHS, swap=0.5, dropout=0.5).eval()
    first = fusion(features, unimodal=unimodal)
    again = fusion(features, unimodal=unimodal)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_skills_are_read_in_training_and_kept_for_inference() -> None:
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=NAMES)
    fusion = GatedFusion(WIDTHS, state=criterion.state)
    criterion.state.skill.copy_(torch.tensor([0.9, 0.36, 0.6, 0.7]))
    criterion.state.logit_weight.copy_(torch.tensor([0.8, 0.2, 0.4, 1.9]))
    criterion.state.class_seen[:CLASSES] = torch.arange(CLASSES)
    criterion.state.class_weight.fill_(1.0)
    before = {k: v.clone() for k, v in criterion.state.state_dict().items()}
    features, unimodal = inputs()
    fusion(features, unimodal=unimodal)
    assert_allclose(fusion.skill, [0.36, 0.6, 0.7])
    assert_allclose(fusion.logit_factor, [0.25, 0.5, 2.0], rtol=1e-6)
    after = criterion.state.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    kept = {name.partition(".")[0] for name in fusion.state_dict()}
    assert kept == {"log_prior", "logit_factor", "moments", "skill"}
    alone = GatedFusion(WIDTHS).eval()
    alone.load_state_dict(fusion.state_dict())
    criterion.state.reset_parameters()
    expected = fusion.eval()(features, unimodal=unimodal)
    found = alone(features, unimodal=unimodal)
    assert torch.equal(found.gates, expected.gates)
    assert torch.equal(found.logits, expected.logits)


def test_a_state_without_modalities_takes_those_of_the_fusion() -> None:
    state = CurriculumState()
    GatedFusion(WIDTHS, state=state)
    assert state.modalities == tuple(NAMES)
    with pytest.raises(ValueError, match=r"modalities: expected \['audio', 'image', 'text'\]"):
        GatedFusion([1, 2], state=state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_features_keep_their_dtype(dtype: torch.dtype) -> None:
    features, unimodal = inputs()
    features = {name: x.to(dtype) for name, x in features.items()}
    unimodal = {name: (1e4 * x).to(dtype) for name, x in unimodal.items()}
    fused, gates, logits = still()(features, unimodal=unimodal)
    assert fused.dtype == dtype
    assert gates.dtype == logits.dtype == torch.float32
    assert gates.isfinite().all()


def test_autocast_computes_the_gates_in_float32() -> None:
    features, unimodal = inputs()
    fusion = still()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gates = fusion(features, unimodal=unimodal).gates
    assert torch.equal(gates, fusion(features, unimodal=unimodal).gates)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_break(training: bool) -> None:
    state = CurriculumState(NAMES)
    state.quality.fill_(0.5)
    state.class_seen[:CLASSES] = torch.tensor([9, 3, 2, 1])
    state.class_weight.fill_(1.0)
    fusion = GatedFusion(WIDTHS, state=state).train(training)
    features, unimodal = inputs()
    compiled = torch.compile(copy.deepcopy(fusion), fullgraph=True, backend="aot_eager")
    actual = compiled(features, unimodal=unimodal)
    if not training:
        expected = fusion(features, unimodal=unimodal)
        assert_allclose(actual.fused.detach(), expected.fused.detach(), rtol=1e-5)
        assert_allclose(actual.logits, expected.logits, rtol=1e-5)
    still = copy.deepcopy(fusion)
    still.dropout = 0.0
    compiled = torch.compile(copy.deepcopy(still), fullgraph=True, backend="aot_eager")
    found, expected = (f(features, unimodal=unimodal).logits for f in (compiled, still))
    assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert_allclose(actual.gates.sum(dim=1).detach(), 1.0, rtol=1e-5)


def test_the_fusion_of_inference_is_exported_saved_and_loaded_for_any_batch() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fusion = GatedFusion(WIDTHS)

        def forward(self, features: dict[str, Tensor], unimodal: dict[str, Tensor]) -> Any:
            fused, gates, logits = self.fusion(features, unimodal=unimodal)
            return fused, gates, logits

    model = Model()
    model(*inputs(64))  # of training, so that there is novelty
    model.eval()
    shapes = {name: {0: torch.export.Dim("batch", min=2)} for name in NAMES}
    exported = torch.export.export(
        model, inputs(4), dynamic_shapes={"features": shapes, "unimodal": shapes}
    )
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    expected = model(*inputs(7, seed=1))
    for program in (exported, torch.export.load(file)):
        for x, y in zip(program.module()(*inputs(7, seed=1)), expected, strict=True):
            assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_a_copy_follows_the_state_that_it_is_told_to() -> None:
    state = CurriculumState(NAMES)
    copied = copy.deepcopy(still(state=state))
    state.skill.copy_(torch.tensor([0.9, 0.8, 0.7, 0.0]))
    features, unimodal = inputs()
    copied(features, unimodal=unimodal)
    assert not copied.skill.any()
    copied.follow(state)
    copied(features, unimodal=unimodal)
    assert torch.equal(copied.skill, state.skill[1:])
    with pytest.raises(ValueError, match="modalities: expected"):
        copied.follow(CurriculumState(["a", "b"]))


FEATURES, UNIMODAL = inputs()


@pytest.mark.parametrize(
    ("features", "options", "error", "message"),
    [
        (list(FEATURES.values())[:2], {}, ValueError, r"features: expected 3 modalities"),
        ({"audio": FEATURES["audio"]}, {}, ValueError, r"features: expected the modalities"),
        (
            {**FEATURES, "text": torch.zeros(9, 4)},
            {},
            ValueError,
            r"features of text: expected shape \[9, 2\], got \[9, 4\]",
        ),
        (
            {**FEATURES, "text": torch.zeros(8, 2)},
            {},
            ValueError,
            r"features of text: expected shape \[9, 2\], got \[8, 2\]",
        ),
        (
            {**FEATURES, "audio": torch.zeros(3)},
            {},
            ValueError,
            r"features of audio: expected shape \[B, D\] or \[B, T, D\], got \[3\]",
        ),
        ({**FEATURES, "audio": 1}, {}, TypeError, r"features of audio: .*, got int"),
        (
            {**FEATURES, "audio": FEATURES["audio"].long()},
            {},
            TypeError,
            r"features of audio: expected a floating-point tensor, got torch.int64",
        ),
        (
            FEATURES,
            {"unimodal": {**UNIMODAL, "image": torch.zeros(9, 3)}},
            ValueError,
            r"unimodal logits of image: expected shape \[9, 4\], got \[9, 3\]",
        ),
        (
            FEATURES,
            {"unimodal": {**UNIMODAL, "image": torch.zeros(9)}},
            ValueError,
            r"unimodal logits of image: expected shape \[B, C\] with C >= 1, got \[9\]",
        ),
        (
            FEATURES,
            {"present": torch.ones(3, 9, dtype=torch.bool)},
            ValueError,
            r"present: expected shape \[9, 3\], got \[3, 9\]",
        ),
    ],
)
def test_errors_name_argument_expected_and_got(
    features: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        GatedFusion(WIDTHS)(features, **options)


@pytest.mark.parametrize(
    ("features", "options", "error", "message"),
    [
        ([], {}, ValueError, r"features: expected at least 1, got 0"),
        ([3, 0], {}, ValueError, r"width of 1: expected at least 1, got 0"),
        ({"audio": 2.5}, {}, TypeError, r"width of audio: expected a whole number, got float"),
        ([1], {"state": nn.Identity()}, TypeError, r"state: expected a Curr.*, got Identity"),
        (3, {}, TypeError, r"features: expected a mapping or a sequence.*, got int"),
        ([1, 1], {"threshold": 0.5}, ValueError, r"threshold: .*\[0, 0.5\), got 0.5"),
        ([1, 1], {"swap": 1.5}, ValueError, r"swap: expected a value in \[0, 1\], got 1.5"),
        ([1, 1], {"swap": 0.6, "dropout": 0.6}, ValueError, r"swap \+ dropout: .*got 1.2"),
    ],
)
def test_options_out_of_range(
    features: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        GatedFusion(features, **options)


def test_repr_tells_the_widths() -> None:
    assert "audio: 3, image: 5, text: 2" in repr(GatedFusion(WIDTHS))


def plainly(
    features: dict[str, Tensor], unimodal: dict[str, Tensor], gates: Tensor, present: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What fusion makes of given gates, as one would write it, for autograd."""
    scale = gates / gates.amax(dim=1, keepdim=True).clamp_min(1e-30)
    pieces, logits = [], []
    for m, name in enumerate(NAMES):
        x, y = features[name], unimodal[name]
        shape = (len(x), *(1,) * (x.dim() - 1))
        if present is not None:
            x = torch.where(present[:, m].view(shape), x, 0.0)
            y = torch.where(present[:, m, None], y, 0.0)
        pieces.append(x * scale[:, m].view(shape))
        logits.append(y * scale[:, m, None])
    return torch.cat(pieces, dim=-1), torch.stack(logits).sum(dim=0)


@each_backend
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("some_absent", [False, True])
def test_gradients_are_those_of_the_plain_formula(
    backend: str, sequence: bool, some_absent: bool
) -> None:
    features, unimodal = inputs()
    present = None
    if sequence:  # and none of them contiguous
        features = {n: torch.stack([x, 2 * x.flip(0)], dim=2).mT for n, x in features.items()}
    if some_absent:
        present = torch.ones(9, 3, dtype=torch.bool)
        present[4, 1] = present[6] = False
        for values in (features, unimodal):
            values["image"][4] = math.nan
            for x in values.values():
                x[6] = math.nan
    leaves = [x.requires_grad_() for x in features.values()]
    fused, gates, logits = still(backend=backend)(features, unimodal=unimodal, present=present)
    expected, total = plainly(features, unimodal, gates, present)
    assert_allclose(fused.detach(), expected.detach(), rtol=1e-5, atol=1e-7)
    assert_allclose(logits, total, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(fused.shape, generator=torch.Generator().manual_seed(1))
    grads, truth = (
        torch.autograd.grad(x, leaves, upstream, retain_graph=True) for x in (fused, expected)
    )
    for x, y in zip(grads, truth, strict=True):
        assert_allclose(x, y, rtol=1e-5, atol=1e-7)
    if some_absent:
        (grad,) = torch.autograd.grad(fused.sum(), leaves[1])
        assert grad[4].abs().sum() == grad[6].abs().sum() == 0.0


@each_backend
@pytest.mark.parametrize("training", [False, True])
def test_only_features_get_a_gradient(backend: str, training: bool) -> None:
    features, unimodal = inputs()
    for x in unimodal.values():
        x.requires_grad_()
    fusion = GatedFusion(WIDTHS, swap=0.4, backend=backend).train(training)
    assert not any(x.requires_grad for x in fusion(features, unimodal=unimodal))
    for x in features.values():
        x.requires_grad_()
    fused, gates, logits = fusion(features, unimodal=unimodal)
    assert fused.requires_grad
    assert not gates.requires_grad
    assert not logits.requires_grad


@each_backend
def test_a_gradient_has_a_gradient(backend: str) -> None:
    features, unimodal = inputs()
    fusion = still(backend=backend)
    leaf, found = features["image"].requires_grad_(), []
    outcome = fusion(features, unimodal=unimodal)
    for fused in (outcome.fused, plainly(features, unimodal, outcome.gates, None)[0]):
        (grad,) = torch.autograd.grad(fused.pow(3).sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), leaf)[0])
    assert found[0].abs().max() > 1.0
    assert_allclose(*found, rtol=1e-4)


@each_backend
def test_a_swapped_row_gets_the_gradient(backend: str) -> None:
    torch.manual_seed(0)
    fusion = GatedFusion([2, 3], swap=1.0, dropout=0.0, backend=backend)
    features = [torch.randn(50, width, requires_grad=True) for width in (2, 3)]
    unimodal = [x[:, :1].detach() for x in features]
    fused, gates, logits = fusion(features, unimodal=unimodal)
    assert_allclose(gates, 0.5)
    assert not torch.equal(fused, torch.cat(features, dim=1))
    assert torch.equal(logits, fused[:, :1] + fused[:, 2:3])  # logits are those of the same rows
    # Each row of the output is a row of the input: so are the sums of their gradients.
    fused.sum().backward()
    for x, total in zip(features, (100.0, 150.0), strict=True):
        assert x.grad is not None
        assert_allclose(x.grad.sum(), total, rtol=1e-5)
    counts = features[1].grad[:, 0]
    assert counts.max() > 1.0
    assert_allclose(fused[:, 2:].sum().detach(), (counts @ features[1]).sum().detach(), rtol=1e-4)


@each_backend
def test_gates_changed_in_place_change_no_gradient(backend: str) -> None:
    features, unimodal = inputs()
    leaf = features["text"].requires_grad_()
    for rows in (slice(None), slice(1)):
        some, others = ({n: x[rows] for n, x in of.items()} for of in (features, unimodal))
        fused, gates, _ = still(backend=backend)(some, unimodal=others)
        before = gates[:, 2:] / gates.amax(dim=1, keepdim=True)
        gates.zero_()
        (grad,) = torch.autograd.grad(fused.sum(), leaf)
        assert_allclose(grad[rows], before.expand(-1, 2), rtol=1e-5)


def test_autocast_keeps_the_dtype_of_features_and_gradients() -> None:
    features, unimodal = inputs()
    leaves = [x.bfloat16().requires_grad_() for x in features.values()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused, gates, logits = still()(leaves, unimodal=unimodal)
    assert fused.dtype == torch.bfloat16
    assert gates.dtype == logits.dtype == torch.float32
    expected = plainly(dict(zip(NAMES, leaves, strict=True)), unimodal, gates.bfloat16(), None)[0]
    for ours, theirs in zip(
        torch.autograd.grad(fused.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        assert ours.dtype == torch.bfloat16
        assert_allclose(ours.float(), theirs.float(), rtol=0.02)


def test_features_of_several_dtypes_are_joined_in_the_widest() -> None:
    features, unimodal = inputs()
    features["image"] = features["image"].bfloat16().requires_grad_()
    fused = still()(features, unimodal=unimodal).fused
    assert fused.dtype == torch.float32
    (grad,) = torch.autograd.grad(fused.sum(), features["image"])
    assert grad.dtype == torch.bfloat16


def test_compiled_gradients_are_those_of_the_kernels() -> None:
    features, unimodal = inputs()
    leaves = [x.requires_grad_() for x in features.values()]
    fusion = still().eval()
    compiled = torch.compile(copy.deepcopy(fusion), fullgraph=True, backend="aot_eager")
    found = []
    for call in (fusion, compiled):
        fused, _, logits = call(features, unimodal=unimodal)
        found.append((logits, *torch.autograd.grad(fused.square().sum(), leaves)))
    for ours, theirs in zip(*found, strict=True):
        assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@each_backend
def test_novelty_weighs_the_gates_that_no_cut_took(backend: str) -> None:
    fusion = still(backend=backend, threshold=0.2, disagreement_slope=3.0, novelty_slope=0.0)
    fusion.skill.copy_(torch.tensor([1.0, 0.5, 0.5]))
    features, unimodal = inputs(1)
    agreed = torch.tensor([[20.0, 0.0, 0.0, 0.0]])
    unimodal = {"audio": agreed, "image": agreed, "text": agreed.flip(1)}
    gates = fusion.eval()(features, unimodal=unimodal).gates
    rows = list(unimodal.values())
    probs = torch.stack(rows).double().softmax(dim=-1).numpy()
    evidence = -3.0 * ref.disagreement(probs, [1.0, 0.5, 0.5])
    assert ref.reliability_gates(evidence)[2] < 0.2  # which cuts the last
    evidence[2] = -math.inf
    assert_allclose(gates, ref.reliability_gates(evidence).T, rtol=1e-4)
    kernel = kernels.select(backend, rows)
    penalty = torch.tensor([[2.0], [0.0], [0.0]])
    settings = Gate(3.0, 0.2, 0.0, 0.0)
    kept = Kept(fusion.skill, fusion.logit_factor, None)
    found = kernel.gate(rows, kept, None, None, None, penalty, settings)
    expected = ref.reliability_gates(evidence - penalty.numpy())
    assert_allclose(found.gates, expected, rtol=1e-4)
    assert_allclose(found.scale, ref.relative_gates(expected), rtol=1e-4)


@each_backend
def test_skills_are_taken_up_before_they_count(backend: str) -> None:
    state = CurriculumState(NAMES)
    state.skill.copy_(torch.tensor([0.9, 0.8, 0.3, 0.0]))
    features, unimodal = inputs()
    fusion = GatedFusion(WIDTHS, state=state, dropout=0.0, threshold=0.0, backend=backend)
    _, gates, logits = fusion(features, unimodal=unimodal)
    assert torch.equal(fusion.skill, state.skill[1:])
    probs = torch.stack([x.double() for x in unimodal.values()]).softmax(dim=-1)
    apart = ref.disagreement(probs.detach().numpy(), [0.8, 0.3, 0.0])
    expected = ref.reliability_gates(-2.0 * apart)
    assert_allclose(gates, expected.T, rtol=1e-4, atol=1e-6)
    scale = ref.relative_gates(expected)
    total = sum(s[:, None] * x.numpy() for s, x in zip(scale, unimodal.values(), strict=True))
    assert_allclose(logits, total, rtol=1e-4, atol=1e-5)


@needs_native
def test_a_rejected_call_takes_up_nothing() -> None:
    state = CurriculumState(NAMES)
    state.logit_weight.copy_(torch.tensor([1.0, 0.5, 0.5, 0.5]))
    state.skill.fill_(0.5)
    fusion = GatedFusion(WIDTHS, state=state, backend="native")
    before = copy.deepcopy(fusion.state_dict())
    features, unimodal = inputs()
    random = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=r"'native' does not take logits of torch\.float64"):
        fusion(features, unimodal={name: x.double() for name, x in unimodal.items()})
    assert all(torch.equal(x, before[name]) for name, x in fusion.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@each_backend
def test_logits_count_by_their_weight(backend: str) -> None:
    state = CurriculumState(NAMES)
    features, unimodal = inputs()
    fusion = GatedFusion(WIDTHS, state=state, dropout=0.0, backend=backend)
    before, gates, logits = fusion(features, unimodal=unimodal)
    state.logit_weight.copy_(torch.tensor([0.8, 0.2, 0.8, 0.02]))
    fused, _, again = fusion(features, unimodal=unimodal)
    assert torch.equal(fused, before)
    assert torch.equal(again, logits)  # in training, where the head may make up for it, they do not
    scale = ref.relative_gates(gates.t().numpy()) * np.array([0.25, 1.0, 0.025])[:, None]
    total = sum(s[:, None] * x.numpy() for s, x in zip(scale, unimodal.values(), strict=True))
    state.reset_parameters()
    assert_allclose(fusion.eval()(features, unimodal=unimodal).logits, total, rtol=1e-4, atol=1e-5)
    fusion.reset_parameters()
    assert (fusion.logit_factor == 1.0).all()


def test_what_it_keeps_stays_in_float32() -> None:
    for module in (still().half(), still().double(), still().to(torch.bfloat16)):
        assert {x.dtype for x in module.buffers()} == {torch.float32}
    saved = {name: x.half() for name, x in still().state_dict().items()}
    fusion = still()
    fusion.load_state_dict(saved, assign=True)
    assert {x.dtype for x in fusion.buffers()} == {torch.float32}
    kept = [name for name, _ in fusion.named_buffers(recurse=False)]
    assert kept == ["skill", "logit_factor", "log_prior"]


def state_that_saw(counts: list[int], weight: list[float]) -> CurriculumState:
    state = CurriculumState(NAMES)
    state.class_seen[: len(counts)] = torch.tensor(counts)
    state.class_weight[: len(weight)] = torch.tensor(weight)
    return state


@each_backend
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("counts", "weight"),
    [
        ([97, 0, 7, 5], [1.0, 2.0, 3.0, 0.0]),
        ([97, 10**15, 0, 5], [1e-30, 1.0, math.inf, -1.0]),
        ([97, 3, 8, 5], [math.nan, 1.0, 1.0, math.inf]),
    ],
)
def test_what_is_frequent_is_no_contradiction(
    backend: str, training: bool, counts: list[int], weight: list[float]
) -> None:
    features, unimodal = inputs()
    with np.errstate(invalid="ignore"):
        prior = torch.from_numpy(ref.log_prior(np.multiply(counts, weight))).float()
    assert prior.isfinite().all()
    assert prior.any()
    fusion = still(backend=backend, state=state_that_saw(counts, weight))
    fusion(features, unimodal=unimodal)  # what was last seen in training is kept
    found = fusion.train(training)(
        features, unimodal={name: x + prior for name, x in unimodal.items()}
    )
    plain = still(backend=backend)
    plain(features, unimodal=unimodal)
    expected = plain.train(training)(features, unimodal=unimodal)
    assert_allclose(found.gates, expected.gates, rtol=1e-5)
    assert_allclose(found.fused, expected.fused, rtol=1e-5)
    assert found.logits is not None
    assert expected.logits is not None
    assert_allclose(found.logits, expected.logits, 1e-4, 1e-5)


def test_a_rare_class_is_not_outvoted_by_those_that_know_only_what_is_frequent() -> None:
    features = [torch.ones(1, 2)] * 3
    prior = torch.log(torch.tensor([[0.9, 0.05, 0.05]]))
    unimodal = [torch.tensor([[0.0, 0.0, 3.0]]), prior, prior + torch.tensor([[0.0, 0.0, 0.5]])]
    state = CurriculumState(3)
    fusion = GatedFusion([2] * 3, dropout=0.0, state=state)
    uninformed = fusion(features, unimodal=unimodal).gates
    state.class_seen[:3] = torch.tensor([900, 50, 50])
    state.class_weight.fill_(1.0)
    informed = fusion(features, unimodal=unimodal).gates
    assert uninformed[0, 0] < 0.2
    assert informed[0, 0] > 0.25


def test_the_frequency_of_the_classes_is_that_of_what_the_loss_trained_on() -> None:
    weight = torch.tensor([2.0, 1.0, 1.0, 1.0])
    criterion = DynCIMLoss(nn.CrossEntropyLoss(weight), modalities=NAMES)
    fusion = still(state=criterion.state)
    features, unimodal = inputs()
    target = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, -100])
    logits = torch.zeros(9, CLASSES, requires_grad=True)
    for _ in range(2):
        criterion(logits, target, unimodal=unimodal)
    fusion(features, unimodal=unimodal)
    assert fusion.log_prior is not None
    assert_allclose(fusion.log_prior[:CLASSES].exp(), [1.0, 0.2, 0.1, 1.0], rtol=1e-6)
    assert not fusion.log_prior[CLASSES:].any()
    untrained = still(state=criterion.state).eval()
    untrained(features, unimodal=unimodal)
    assert untrained.log_prior is not None
    assert not untrained.log_prior.any()
    criterion.criterion.weight = None
    criterion(logits, target, unimodal=unimodal)
    fusion(features, unimodal=unimodal)
    assert_allclose(fusion.log_prior[:CLASSES].exp(), [1.0, 0.4, 0.2, 1.0], rtol=1e-6)


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("kind", ["smoothing", "probabilities", "another criterion"])
def test_where_predictions_do_not_follow_the_frequency_of_the_classes_there_is_no_prior(
    kind: str, backend: str | None
) -> None:
    """Smoothed ones keep a floor; other criteria may weigh the classes as they like."""
    criterion = DynCIMLoss(
        nn.NLLLoss() if kind == "another criterion" else nn.CrossEntropyLoss(),
        modalities=NAMES,
        backend=backend,
    )
    fusion = still(state=criterion.state)
    features, unimodal = inputs()
    target = torch.arange(9) // 5
    logits = torch.zeros(9, CLASSES, requires_grad=True)
    if kind != "another criterion":
        criterion(logits, target, unimodal=unimodal)
        fusion(features, unimodal=unimodal)
        assert fusion.log_prior is not None
        assert fusion.log_prior.any()
    if kind == "smoothing":
        criterion.criterion.label_smoothing = 0.1
    probs = F.one_hot(target, CLASSES).float()
    criterion(logits, probs if kind == "probabilities" else target, unimodal=unimodal)
    fusion(features, unimodal=unimodal)
    assert criterion.state.class_seen.any()
    assert fusion.log_prior is not None
    assert not fusion.log_prior.any()


def test_more_classes_than_are_told_apart_have_no_prior() -> None:
    features, unimodal = [torch.ones(3, 2)] * 3, [*torch.randn(3, 3, 1025).unbind()]
    state = CurriculumState(3)
    state.class_seen.copy_(torch.arange(1024))
    state.class_weight.fill_(1.0)
    fusion = GatedFusion([2] * 3, dropout=0.0, state=state)
    expected = GatedFusion([2] * 3, dropout=0.0)(features, unimodal=unimodal)
    assert torch.equal(fusion(features, unimodal=unimodal).gates, expected.gates)
    expected = GatedFusion([2] * 3).eval()(features, unimodal=unimodal)
    assert torch.equal(fusion.eval()(features, unimodal=unimodal).logits, expected.logits)


@each_backend
def test_the_logits_of_two_modalities_are_without_what_is_frequent(backend: str) -> None:
    """The head has that; in training, it has them less and less."""
    state = CurriculumState(2)
    state.class_seen[:CLASSES] = torch.tensor([60, 20, 10, 10])
    state.class_weight.fill_(1.0)
    features, logits = [torch.ones(9, 2)] * 2, [randn(9, CLASSES, seed=s) for s in (1, 2)]
    fusion = GatedFusion([2, 2], state=state, dropout=0.0, novelty_slope=0.0, backend=backend)
    present = torch.ones(9, 2, dtype=torch.bool)
    present[3, 1] = False
    prior = torch.tensor([1.0, 1 / 3, 1 / 6, 1 / 6]).log()
    both = logits[0] - prior + (logits[1] - prior) * present[:, 1:]
    for quality in (0.0, 0.25, 1.0):
        state.quality[0] = quality
        found = fusion(features, unimodal=logits, present=present).logits
        assert_allclose(found, (1.0 - quality) * both, rtol=1e-5, atol=1e-6)
    for kind in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=kind, enabled=kind != torch.float32):
            found = fusion.eval()(features, unimodal=logits, present=present).logits
        assert found.dtype == torch.float32
        assert_allclose(found, both, rtol=1e-5, atol=1e-6)


@each_backend
def test_a_class_that_is_ruled_out_stays_so_where_a_gate_is_0(backend: str) -> None:
    fusion = GatedFusion([2, 2], dropout=1.0, backend=backend)
    features = [torch.randn(20, 2) for _ in range(2)]
    masked = torch.tensor([1.0, 2.0, -math.inf]).expand(20, 3)
    logits = fusion(features, unimodal=[masked, masked.clone()]).logits
    assert logits is not None
    assert_allclose(logits, masked)  # of the one that was not dropped


@each_backend
def test_logits_that_are_nan_leave_the_others_their_gates(backend: str) -> None:
    fusion = still(backend=backend).eval()
    features, unimodal = inputs()
    unimodal["audio"] = torch.full_like(unimodal["audio"], math.nan)
    gates = fusion(features, unimodal=unimodal).gates
    assert_allclose(gates.detach(), torch.full((9, 3), 1 / 3), rtol=1e-5)


@each_backend
def test_gradients_come_in_batches(backend: str) -> None:
    features, unimodal = inputs()
    leaf = features["audio"].requires_grad_()
    fusion = still(backend=backend).eval()
    fused = fusion(features, unimodal=unimodal).fused
    batch = torch.stack([torch.ones_like(fused), fused.detach()])
    (found,) = torch.autograd.grad(fused, leaf, batch, is_grads_batched=True, retain_graph=True)
    (once,) = torch.autograd.grad(fused, leaf, batch[0])
    assert_allclose(found[0], once)


@each_backend
def test_features_that_c_does_not_take_are_mixed_all_the_same(backend: str) -> None:
    fusion = GatedFusion([2, 2], backend=backend)
    negated = torch.randn(5, 2, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    features = [negated, torch.randn(5, 2)]
    fused = fusion.eval()(features).fused
    assert_allclose(fused, torch.cat(features, dim=1))
    fusion.train()(features)


@needs_native
@pytest.mark.parametrize("spoil", [torch.Tensor.half, lambda x: x.repeat(2)[::2]])
def test_c_refuses_buffers_that_do_not_lie_in_memory_as_it_takes_them(spoil: Any) -> None:
    features, unimodal = inputs()
    fusion = still(backend="native")
    fusion.skill.data = spoil(fusion.skill)
    with pytest.raises(TypeError, match="fusion: expected contiguous float32 buffers, got"):
        fusion(features, unimodal=unimodal)
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=NAMES, backend="native")
    criterion.state.skill.data = spoil(criterion.state.skill)
    logits, target = torch.randn(9, 4), torch.arange(9) % 4
    with pytest.raises(TypeError, match="state: expected contiguous float32 buffers, got"):
        criterion(logits, target, unimodal=unimodal)
    assert criterion.state.step == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cast_behind_its_back_is_undone(dtype: torch.dtype) -> None:
    """As FSDP's ``MixedPrecision`` casts the buffers of what it wraps."""
    features, unimodal = inputs()
    unimodal = {name: x.to(dtype) for name, x in unimodal.items()}
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=NAMES, num_samples=9)
    fusion = GatedFusion(WIDTHS, state=criterion.state)
    before = {name: x.dtype for m in (criterion, fusion) for name, x in m.named_buffers()}
    for buffer in (*criterion.buffers(), *fusion.buffers()):
        if buffer.is_floating_point():
            buffer.data = buffer.data.bfloat16()
    logits = torch.randn(9, 4, dtype=dtype)
    fusion(features, unimodal=unimodal)
    criterion(logits, torch.arange(9) % 4, unimodal=unimodal, index=torch.arange(9))
    fusion.eval()(features, unimodal=unimodal)
    after = {name: x.dtype for m in (criterion, fusion) for name, x in m.named_buffers()}
    assert after == before


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile takes a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("widths", [(3, 2), (3, 2, 2)])
def test_a_compiled_backward_does_not_read_the_state_that_the_loss_moved_on(
    widths: tuple[int, ...],
) -> None:
    torch.manual_seed(0)
    samples = torch.arange(400)
    out = held_out(samples, 0.05)
    index = torch.cat([samples[out][:6], samples[~out][:58]])
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=len(widths), num_samples=400)
    fusion = GatedFusion(widths, state=criterion.state, dropout=0.0, novelty_slope=0.0)
    encoders = nn.ModuleList([nn.Linear(4, width) for width in widths])
    heads, head = (
        nn.ModuleList([nn.Linear(width, 3) for width in widths]),
        nn.Linear(sum(widths), 3),
    )
    x, target = torch.randn(64, 4), torch.arange(64) % 3

    def model(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = [encoder(x) for encoder in encoders]
        unimodal = [own(feature) for own, feature in zip(heads, features, strict=True)]
        fused, _, gated = fusion(features, unimodal=unimodal)
        return head(fused) + gated, unimodal

    def gradient(call: Any) -> Tensor:
        state = criterion.state
        state.reset_parameters()
        skills = torch.tensor([0.8, 0.8, 0.02, 0.6])  # the second knows next to nothing
        state.skill.copy_(skills[: 1 + len(widths)])
        state.class_seen[:3] = torch.tensor([9, 1, 1])
        state.class_weight.fill_(1.0)
        logits, unimodal = call(x)
        criterion(logits, target, unimodal=unimodal, index=index)
        assert not 0.01 < state.skill[2] < 0.04
        return torch.autograd.grad(logits.sum(), [encoders[1].weight])[0]

    assert_allclose(gradient(torch.compile(model)), gradient(model), rtol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # torch's own, from 2.14 on
@pytest.mark.parametrize("backend", [None, "eager"])
def test_inference_can_be_traced(backend: str | None) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fusion = GatedFusion([6, 6, 6], backend=backend)
            self.heads = nn.ModuleList([nn.Linear(6, 5) for _ in range(3)])

        def forward(self, *features: Tensor) -> Tensor:
            unimodal = [head(x) for head, x in zip(self.heads, features, strict=True)]
            fused, _, logits = self.fusion(features, unimodal=unimodal)
            assert logits is not None
            return torch.cat([fused, logits], dim=1)

    model = Model()
    with torch.no_grad():
        model(*torch.randn(3, 300, 6))
        model.eval()
        traced = torch.jit.trace(model, [*torch.randn(3, 8, 6)], check_trace=False)
        other = [*torch.randn(3, 5, 6) * 4.0]
        assert_allclose(traced(*other), model(*other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disagreement_slope": math.inf}, r"disagreement_slope: .*\[0, inf\), got inf"),
        ({"novelty_slope": math.inf}, r"novelty_slope: .*\[0, inf\), got inf"),
        ({"swap": 0.5, "dropout": -0.1}, r"dropout: expected a value in \[0, 1\], got -0.1"),
        ({"backend": "cuda"}, r"backend: expected one of .*got 'cuda'"),
    ],
)
def test_options_of_a_fusion_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        GatedFusion([1, 1], **options)


@pytest.mark.parametrize(("who", "of"), [("fusion", "features"), ("state", "fusion")])
def test_a_fusion_on_another_device_is_told_apart(who: str, of: str) -> None:
    fusion = GatedFusion([2, 2], state=CurriculumState(2))
    if who == "state":
        fusion = fusion.to("meta")
    with pytest.raises(ValueError, match=f"^{who}: expected device meta of the {of}, got cpu"):
        fusion([torch.ones(3, 2, device="meta")] * 2)


def test_a_call_without_logits_keeps_the_prior() -> None:
    state = CurriculumState(3)
    fusion = GatedFusion([2, 2, 2], state=state)
    state.class_seen[:2] = torch.tensor([9, 1])
    state.class_weight[:2] = 1.0
    fusion([torch.ones(4, 2)] * 3)
    assert not fusion.log_prior.any()


@needs_native
def test_c_gates_features_of_any_dtype_without_logits() -> None:
    fusion = GatedFusion([2, 2], backend="native").eval()
    assert_allclose(fusion([torch.ones(3, 2).bfloat16()] * 2).gates, 0.5)


@needs_native
@pytest.mark.parametrize("what", ["skill", "log_prior", "present", "state"])
def test_c_gates_no_subclass_of_a_tensor_wherever_it_is(what: str) -> None:
    fusion = GatedFusion([2, 2, 2], state=CurriculumState(3), backend="native", novelty_slope=0.0)
    present = torch.ones(4, 3, dtype=torch.bool)
    if what == "present":
        present = present.as_subclass(Foreign)
    else:
        owner, name = (fusion._state[0], "quality") if what == "state" else (fusion, what)
        owner._buffers[name] = owner._buffers[name].as_subclass(Foreign)
    with pytest.raises(RuntimeError, match="'native' does not take a Foreign"):
        fusion([torch.ones(4, 2)] * 3, unimodal=[torch.zeros(4, 3)] * 3, present=present)


@needs_native
def test_a_fusion_asked_to_be_eager_calls_no_c(monkeypatch: pytest.MonkeyPatch) -> None:
    from dyncim_core.kernels import native

    for name in ("gate", "mix", "observe", "novelty"):
        monkeypatch.setattr(native, name, None)
    fusion = GatedFusion([2, 2], backend="eager")
    for mode in (True, False):
        assert_allclose(fusion.train(mode)([torch.ones(3, 2)] * 2).gates.sum(dim=1), 1.0)


def test_where_nothing_is_disturbed_no_random_numbers_are_drawn() -> None:
    before = torch.get_rng_state()
    GatedFusion([2, 2], swap=0.0, dropout=0.0)([torch.ones(3, 2)] * 2)
    assert torch.equal(torch.get_rng_state(), before)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_default_dtype_drops_as_many(backend: str, dtype: torch.dtype) -> None:
    fusion = GatedFusion([2, 2], swap=0.0, dropout=1.0, backend=backend)
    torch.set_default_dtype(dtype)
    try:
        gates = fusion([torch.ones(64, 2, dtype=torch.float32)] * 2).gates
    finally:
        torch.set_default_dtype(torch.float32)
    assert ((gates == 0).sum(dim=1) == 1).all()
    assert 10 < (gates[:, 0] == 0).sum() < 54


@each_backend
def test_a_fusion_does_not_watch_what_is_absent(backend: str) -> None:
    present = torch.ones(8, 2, dtype=torch.bool)
    present[:, 1] = False
    fusion = GatedFusion([2, 2], backend=backend)
    fusion([torch.ones(8, 2)] * 2, present=present)
    assert (fusion.moments.mass > 0).tolist() == [True, False]


def test_gates_lie_in_memory_as_they_read() -> None:
    assert GatedFusion([2, 2])([torch.ones(3, 2)] * 2).gates.is_contiguous()


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@each_backend
def test_features_may_get_no_gradient(backend: str) -> None:
    features = [torch.ones(3, 2, requires_grad=True) for _ in range(2)]
    fused = GatedFusion([2, 2], backend=backend)(features).fused
    grads = torch.autograd.grad(NoGradient.apply(fused).sum(), features, allow_unused=True)
    assert all(grad is None or not grad.any() for grad in grads)


def test_a_cast_of_a_fusion_of_two_is_undone() -> None:
    fusion = GatedFusion([2, 2])
    for buffer in fusion.buffers():
        buffer.data = buffer.data.bfloat16()
    fusion([torch.ones(3, 2)] * 2)
    assert {x.dtype for x in fusion.buffers()} == {torch.float32}


def test_a_move_may_be_that_of_a_module_alone() -> None:
    fusion = GatedFusion([2, 2]).to_empty(device="meta", recurse=False)
    assert fusion.skill.is_meta
    assert not fusion.moments.mass.is_meta


def test_a_move_with_a_cast_moves_alone() -> None:
    state = CurriculumState(2).to("meta", torch.bfloat16)
    assert state.skill.is_meta
    assert state.skill.dtype == torch.float32


def test_a_checkpoint_cannot_change_the_order_in_memory() -> None:
    state = CurriculumState(2)
    saved = {**state.state_dict(), "skill": torch.zeros(6)[::2]}
    state.load_state_dict(saved, assign=True)
    assert state.skill.is_contiguous()


@pytest.mark.parametrize(
    ("features", "unimodal", "message"),
    [
        ([torch.ones(3, 1, 4, 2)] * 2, None, r"features of modality 0: .*\[B, T, D\], got \[3, 1"),
        (
            [torch.ones(3, 2), torch.ones(3, 2, device="meta")],
            None,
            "features of modality 1: expected device cpu of the features of modality 0, got meta",
        ),
        (
            [torch.ones(3, 2)] * 2,
            [torch.zeros(2, 4)] * 2,
            r"unimodal logits of modality 0: expected shape \[3, 4\], got \[2, 4\]",
        ),
        (
            [torch.ones(3, 2)] * 2,
            [torch.zeros(3, 4, device="meta")] * 2,
            "unimodal logits of modality 0: expected device cpu of the features, got meta",
        ),
        (
            [torch.ones(3, 2)] * 2,
            [torch.zeros(3, 0)] * 2,
            r"unimodal logits of modality 0: expected shape \[B, C\] with C >= 1, got \[3, 0\]",
        ),
    ],
)
def test_what_does_not_fit_a_fusion_is_refused(features: Any, unimodal: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        GatedFusion([2, 2])(features, unimodal=unimodal)


@pytest.mark.parametrize(("bad", "got"), [(3, "int"), (torch.zeros(3, 4).long(), "torch.int64")])
def test_unimodal_logits_of_a_fusion_are_floating_point(bad: Any, got: str) -> None:
    message = f"unimodal logits of modality 0: expected a floating-point tensor, got {got}"
    with pytest.raises(TypeError, match=message):
        GatedFusion([2, 2])([torch.ones(3, 2)] * 2, unimodal=[bad, torch.zeros(3, 4)])


def test_features_of_several_dtypes_keep_their_values() -> None:
    features = [torch.arange(6.0).view(3, 2), torch.arange(6.0).view(3, 2).bfloat16()]
    fused = GatedFusion([2, 2]).eval()(features).fused
    assert torch.equal(fused, torch.cat(features, dim=1))


@each_backend
def test_nothing_is_swapped_with_what_is_absent(backend: str) -> None:
    present = torch.ones(64, 3, dtype=torch.bool)
    present[::2, 0] = False
    features = [torch.ones(64, 2) for _ in range(3)]
    features[0][::2] = math.nan
    fusion = GatedFusion([2] * 3, swap=1.0, dropout=0.0, backend=backend)
    assert fusion(features, present=present).fused.isfinite().all()
