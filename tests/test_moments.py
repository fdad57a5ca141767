from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from inputs import Foreign, each_backend, needs_native
from numpy.testing import assert_allclose
from torch import Tensor

from dyncim_core import CurriculumState, GatedFusion, backends
from dyncim_core import reference as ref
from dyncim_core.moments import FeatureMoments

WIDTHS = (5, 3)
SCALES = (1.0, 20.0)


def batch(size: int, seed: int, shift: float = 0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        scale * (torch.randn(size, width, generator=generator) + 4.0 + shift)
        for width, scale in zip(WIDTHS, SCALES, strict=True)
    ]


def trained(steps: int = 60, size: int = 32) -> FeatureMoments:
    moments = FeatureMoments(WIDTHS)
    for step in range(steps):
        moments.observe(batch(size, step), None)
    return moments


def averages(moments: FeatureMoments, m: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a modality, without the columns that fill it up."""
    mass, width = moments.mass[m], WIDTHS[m]
    return moments.total[m, :width] / mass, moments.scatter[m, :width, :width] / mass


def test_the_first_batch_is_taken_whole() -> None:
    moments = trained(steps=1)
    for m, x in enumerate(batch(32, 0)):
        mean, covariance = averages(moments, m)
        assert_allclose(mean, x.mean(dim=0), rtol=1e-4)
        assert_allclose(covariance, torch.cov(x.T, correction=0), rtol=1e-3, atol=1e-3)


def test_they_average_over_steps() -> None:
    """A large offset takes no digits from the covariance."""
    moments = FeatureMoments(WIDTHS)
    for step in range(400):
        moments.observe([x + 1e3 for x in batch(32, step)], None)
    for m, scale in enumerate(SCALES):
        mean, covariance = averages(moments, m)
        assert_allclose(mean, np.full(WIDTHS[m], 4 * scale + 1e3), rtol=1e-3)
        assert_allclose(covariance, scale**2 * np.eye(WIDTHS[m]), atol=0.1 * scale**2)


@each_backend
@pytest.mark.parametrize("size", [1, 16, 37])
def test_novelty_is_that_of_the_reference(backend: str, size: int) -> None:
    moments = trained()
    features = batch(size, 1000, shift=1.0)
    found = moments.novelty(features, backend)
    for m, x in enumerate(features):
        mean, covariance = averages(moments, m)
        assert_allclose(found[m], ref.novelty(x, mean, covariance), rtol=1e-4)


@each_backend
def test_novelty_of_what_has_no_distance_is_finite(backend: str) -> None:
    moments = trained()
    features = batch(8, 1000)
    expected = moments.novelty(features, backend)
    values = (math.nan, math.inf, -1e25, 3e38)
    for row, value in enumerate(values):
        features[0][row, 1] = value
    found = moments.novelty(features, backend)
    assert torch.equal(found[0, : len(values)], torch.full((len(values),), 1e30))
    assert torch.equal(found[0, len(values) :], expected[0, len(values) :])
    assert torch.equal(found[1], expected[1])


def test_novelty_is_one_before_anything_was_seen() -> None:
    moments = FeatureMoments(WIDTHS)
    assert torch.equal(moments.novelty(batch(4, 0)), torch.ones(2, 4))
    moments.observe(batch(4, 0), torch.tensor([[True] * 4, [False] * 4]))
    assert torch.equal(moments.novelty(batch(4, 0))[1], torch.ones(4))


def test_noise_is_novel_and_the_familiar_is_not() -> None:
    moments = trained()
    same = moments.novelty(batch(256, 1000))
    assert_allclose(same.mean(dim=1), [1.0, 1.0], rtol=0.1)
    generator = torch.Generator().manual_seed(1)
    noisy = [
        x + 4 * scale * torch.randn(x.shape, generator=generator)
        for x, scale in zip(batch(256, 1000), SCALES, strict=True)
    ]
    assert_allclose(moments.novelty(noisy).mean(dim=1), [17.0, 17.0], rtol=0.2)


def test_what_is_absent_or_not_finite_does_not_count() -> None:
    expected, actual = FeatureMoments(WIDTHS), FeatureMoments(WIDTHS)
    for step in range(3):
        features = batch(8, step)
        available = torch.ones(2, 8, dtype=torch.bool)
        available[0, 3] = False
        expected.observe(features, available)
        spoiled = [x.clone() for x in features]
        spoiled[0][3] = math.nan
        actual.observe(spoiled, None)  # found by itself
    for name, buffer in expected.named_buffers():
        assert_allclose(actual.get_buffer(name), buffer, err_msg=name)
    before = copy.deepcopy(actual.state_dict())
    for value in (math.inf, 1e38):
        actual.observe([torch.full((8, width), value) for width in WIDTHS], None)
    assert all(buffer.isfinite().all() for buffer in actual.buffers())
    assert_allclose(averages(actual, 0)[0], before["total"][0] / before["mass"][0], rtol=1e-5)


@pytest.mark.parametrize("width", [33, 64, 300])
def test_of_wide_features_some_are_watched(width: int) -> None:
    moments = FeatureMoments([width, 10])
    assert 16 < moments.total.shape[1] <= 32
    basis = torch.randn(4, width)  # features in a space of four directions

    def features(size: int) -> list[Tensor]:
        return [torch.randn(size, 4) @ basis, torch.randn(size, 10)]

    for _ in range(50):
        moments.observe(features(32), None)
    assert_allclose(moments.novelty(features(200)).mean(dim=1), [1.0, 1.0], rtol=0.2)
    beside = [torch.randn(200, width), torch.randn(200, 10)]
    assert moments.novelty(beside)[0].min() > 3


def test_sequences_count_by_their_mean() -> None:
    expected, actual = FeatureMoments(WIDTHS), FeatureMoments(WIDTHS)
    sequences = [torch.randn(8, 6, width) for width in WIDTHS]
    actual.observe(sequences, None)
    expected.observe([x.mean(dim=1) for x in sequences], None)
    for name, buffer in expected.named_buffers():
        assert_allclose(actual.get_buffer(name), buffer, err_msg=name)
    assert torch.equal(actual.novelty(sequences), expected.novelty([x.mean(1) for x in sequences]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_they_stay_in_float32(dtype: torch.dtype) -> None:
    fusion = GatedFusion(WIDTHS).to(dtype)
    fusion([x.to(dtype) for x in batch(8, 0)])
    assert fusion.moments is not None
    assert {buffer.dtype for buffer in fusion.moments.buffers()} == {torch.float32}


def learnt_fusion() -> GatedFusion:
    fusion = GatedFusion(WIDTHS, dropout=0.0)
    for step in range(60):
        fusion(batch(32, step), unimodal=[torch.zeros(32, 4)] * 2)
    return fusion


def test_inference_leaves_out_what_it_never_saw() -> None:
    fusion = learnt_fusion()
    audio, image = batch(16, 1000)
    image[:4] += 1000.0
    assert_allclose(copy.deepcopy(fusion)([audio, image]).gates, 0.5)  # in training, all counts
    fused, gates, _ = fusion.eval()([audio, image])
    assert (gates[:4, 1] < 1e-3).all()
    assert_allclose(gates[4:], 0.5)
    assert_allclose(fused[4:], torch.cat([audio, image], dim=1)[4:])
    assert torch.equal(fused[:, :5], audio)
    present = torch.ones(16, 2, dtype=torch.bool)
    present[2, 0] = present[3] = False
    gates = fusion([audio, image], present=present).gates
    assert gates[2].tolist() == [0.0, 1.0]  # nothing else is there
    assert gates[3].tolist() == [0.0, 0.0]


def test_a_shift_of_all_modalities_favours_none() -> None:
    fusion = learnt_fusion().eval()
    far = [1e6 * x for x in batch(1, 0)]
    novelty = fusion.moments.novelty(far)[:, 0] if fusion.moments is not None else torch.zeros(2)
    expected = ref.reliability_gates(-2 * ref.novelty_penalty(novelty)[:, None])
    assert_allclose(fusion(far).gates.T, expected, rtol=1e-3)
    assert (fusion(far).gates > 1e-3).all()


def test_inference_watches_but_does_not_learn() -> None:
    fusion = learnt_fusion().eval()
    before = copy.deepcopy(fusion.state_dict())
    fusion(batch(8, 7, shift=9.0))
    for name, value in fusion.state_dict().items():
        assert torch.equal(value, before[name]), name
    restored = GatedFusion(WIDTHS).eval()
    restored.load_state_dict(before)
    strange = batch(8, 7, shift=9.0)
    assert torch.equal(restored(strange).gates, fusion(strange).gates)


def test_it_can_be_left_off() -> None:
    fusion = GatedFusion(WIDTHS, novelty_slope=0.0)
    assert fusion.moments is None
    assert list(fusion.state_dict()) == ["skill", "logit_factor", "log_prior"]
    fusion(batch(8, 0))
    assert_allclose(fusion.eval()([1e6 * x for x in batch(8, 0)]).gates, 0.5)


def test_an_empty_batch_changes_nothing() -> None:
    fusion = learnt_fusion()
    before = copy.deepcopy(fusion.state_dict())
    fusion(batch(0, 0))
    for name, value in fusion.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert fusion.eval()(batch(0, 0)).fused.shape == (0, 8)


def test_autocast_takes_no_precision_from_it() -> None:
    plain, cast = learnt_fusion(), learnt_fusion()
    features = batch(32, 77, shift=1.0)
    plain(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast(features)
        gates = cast.eval()(features).gates
    for name, value in cast.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    assert torch.equal(gates, plain.eval()(features).gates)


def test_what_never_varied_is_not_novel() -> None:
    """Nor does it take the rest with it."""
    for constant in (0.0, 0.1, 1e-21, 1e6):
        fusion = GatedFusion([8, 8], dropout=0.0)
        for step in range(50):
            fusion([randn(32, 8, step), torch.full((32, 8), constant)])
        gates = fusion.eval()([randn(32, 8, 99), torch.full((32, 8), constant)]).gates
        assert_allclose(gates, 0.5, atol=0.05, err_msg=str(constant))


def randn(size: int, width: int, seed: int) -> Tensor:
    return torch.randn(size, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e20])
def test_gates_are_shares_whatever_the_features(value: float) -> None:
    fusion = learnt_fusion().eval()
    audio, image = batch(4, 5)
    audio[0] = value
    audio[1] = image[1] = value
    gates = fusion([audio, image]).gates
    assert_allclose(gates.sum(dim=1), 1.0, rtol=1e-6)
    assert_allclose(gates[0], [0.0, 1.0], atol=1e-6)
    assert_allclose(gates[1], 0.5)
    assert_allclose(gates[2:], 0.5, atol=0.2)


def test_the_other_modalities_do_not_matter() -> None:
    query = 5.0 * randn(16, 2, 1)
    found = []
    for others in ([], [32]):
        moments = FeatureMoments([2, *others])
        for step in range(60):
            moments.observe([randn(32, width, step) for width in (2, *others)], None)
        found.append(moments.novelty([query, *(randn(16, width, 2) for width in others)])[0])
    assert_allclose(found[0], found[1], rtol=1e-5)


def test_a_long_absence_changes_nothing() -> None:
    moments = trained()
    before = copy.deepcopy(moments.state_dict())
    absent = torch.tensor([[True] * 16, [False] * 16])
    for step in range(200):
        moments.observe(batch(16, step), absent)
    for name in before:
        assert torch.equal(moments.state_dict()[name][1], before[name][1]), name


def test_few_samples_tell_nothing() -> None:
    moments = FeatureMoments([32, 32])
    for step in range(7):
        moments.observe([randn(32, 32, step), randn(32, 32, step + 50)], None)
        novelty = moments.novelty([randn(16, 32, 200)] * 2)
        assert torch.equal(novelty, torch.ones(2, 16))
    for step in range(7, 12):
        moments.observe([randn(32, 32, step), randn(32, 32, step + 50)], None)
    assert moments.novelty([randn(64, 32, 200)] * 2).mean() < 1.5


def test_size_of_the_batches_does_not_matter() -> None:
    by_one, by_many = FeatureMoments([4]), FeatureMoments([4])
    x = randn(512, 4, 0)
    for row in x.split(1):
        by_one.observe([row], None)
    by_many.observe([x], None)
    for m in (by_one, by_many):
        assert_allclose(m.mass, 512 / 6400, rtol=0.1)
    query = 3.0 * randn(16, 4, 1)
    assert_allclose(by_one.novelty([query]), by_many.novelty([query]), rtol=0.1)


def test_a_checkpoint_cannot_change_the_dtype() -> None:
    fusion = learnt_fusion()
    half = {name: value.half() for name, value in fusion.state_dict().items()}
    restored = GatedFusion(WIDTHS)
    restored.load_state_dict(half, assign=True)
    assert restored.moments is not None
    assert {buffer.dtype for buffer in restored.moments.buffers()} == {torch.float32}
    restored(batch(8, 0))


@pytest.mark.skipif(backends()["native"] != "available", reason=backends()["native"])
def test_a_rejected_call_changes_nothing() -> None:
    state = CurriculumState(2)
    fusion = GatedFusion(WIDTHS, state=state)
    fusion(batch(8, 0))
    state.quality.fill_(0.5)
    state.skill.copy_(torch.tensor([0.9, 0.9, 0.1]))
    before = copy.deepcopy(fusion.state_dict())
    fusion.backend = "native"
    with pytest.raises(RuntimeError, match="backend: 'native' does not take"):
        fusion(batch(8, 0), unimodal=[torch.zeros(8, 4, dtype=torch.bfloat16)] * 2)
    for name, value in fusion.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_negated_views_are_read_as_they_are() -> None:
    z = torch.complex(randn(32, 8, 0), randn(32, 8, 1) + 3.0)
    moments = FeatureMoments([8])
    moments.observe([z.conj().imag], None)
    mean = moments.total / moments.mass
    assert_allclose(mean[0], -z.imag.mean(dim=0), rtol=1e-5)


@needs_native
@pytest.mark.parametrize("what", ["available", "mass", "total"])
@pytest.mark.parametrize("call", ["observe", "novelty"])
def test_c_watches_no_subclass_of_a_tensor(what: str, call: str) -> None:
    moments, available = FeatureMoments([2]), torch.ones(1, 3, dtype=torch.bool)
    if what == "available":
        available = available.as_subclass(Foreign)
        call = "observe"
    else:
        moments._buffers[what] = moments._buffers[what].as_subclass(Foreign)
    given = (available,) if call == "observe" else ()
    with pytest.raises(RuntimeError, match="'native' does not take a Foreign"):
        getattr(moments, call)([torch.ones(3, 2)], *given, backend="native")


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_sequences_of_any_dtype_count_by_their_mean(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(40, 7, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, expected = FeatureMoments([64]), FeatureMoments([64])
    found.observe([x], None, backend=backend)
    expected.observe([x.float().mean(1)], None, backend=backend)
    for name, value in expected.named_buffers():
        assert_allclose(found.get_buffer(name), value, rtol=1e-5, atol=1e-8, err_msg=name)
    assert_allclose(found.novelty([x], backend), expected.novelty([x.float().mean(1)], backend))
