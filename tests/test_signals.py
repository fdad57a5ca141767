from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from strategies import (
    Array,
    Heads,
    Statistics,
    arrays,
    batch_sizes,
    class_counts,
    heads,
    reals,
    soft_targets,
    statistics,
    to_torch,
    upcast,
)
from torch import Tensor

from dyncim_core import reference as ref
from dyncim_core.signals import (
    contradiction,
    difficulty,
    doubt,
    held_out,
    log_weights,
    noise_pressure,
    prediction_consistency,
    prediction_deviation,
    prediction_stability,
    relative_change,
    sample_weights,
    seen_noise,
    share_to_learn,
    sureness,
    surprise,
    target_entropy,
    volatility_weights,
)

# Rounding of the result, and what a mean over up to nine heads may add.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 5e-2,
    torch.float16: 5e-3,
}
NAN = math.nan

all_dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
positives = reals(2**-10, 8)


def agree(actual: Tensor, expected: Array, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    assert not actual.isnan().any()
    tolerance = TOLERANCES[dtype]
    assert_allclose(upcast(actual), expected, rtol=tolerance, atol=tolerance)


def every_signal(case: Statistics, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    nll, entropy, distance, present = (to_torch(x, dtype) for x in case[:4])
    return [
        prediction_deviation(nll, present),
        prediction_consistency(distance, present),
        prediction_stability(entropy, case.num_classes),
        surprise(nll, entropy, present),
    ]


# Agreement with the reference, in the values that the dtype holds.


@all_dtypes
@given(statistics())
def test_signals_agree_with_the_reference(dtype: torch.dtype, case: Statistics) -> None:
    if dtype == torch.float16:  # whose largest number is 65504, and nine nlls are summed
        case = case._replace(nll=np.minimum(case.nll, 1e3))
    nll, entropy, distance, present = (upcast(to_torch(x, dtype)) for x in case[:4])
    classes = case.num_classes
    expected = [
        ref.prediction_deviation(nll, present),
        ref.prediction_consistency(distance, present),
        ref.prediction_stability(entropy, classes),
        ref.surprise(nll, entropy, present),
    ]
    for actual, oracle in zip(every_signal(case, dtype), expected, strict=True):
        assert actual.shape == (nll.shape[1],)
        agree(actual, oracle, dtype)


@all_dtypes
@given(statistics(), arrays(9, reals(2**-11, 1)), arrays(9, reals(0, 4) | st.just(np.inf)))
def test_surprise_by_what_heads_are_worth_agrees_with_the_reference(
    dtype: torch.dtype, case: Statistics, weights: Array, averages: Array
) -> None:
    if dtype == torch.float16:
        case = case._replace(nll=np.minimum(case.nll, 1e3))
    nll, entropy, present = (to_torch(x, dtype) for x in (case.nll, case.entropy, case.present))
    head_weights, usual = (to_torch(x[: len(nll)], dtype) for x in (weights, averages))
    expected = ref.surprise(
        upcast(nll), upcast(entropy), case.present, upcast(head_weights), upcast(usual)
    )
    agree(surprise(nll, entropy, present, head_weights, usual), expected, dtype)


@all_dtypes
@given(arrays((2, 3), reals(0, 8)), arrays((2, 3), reals(0, 8)), reals(2**-6, 1))
def test_relative_change_agrees_with_the_reference(
    dtype: torch.dtype, current: Array, previous: Array, eps: float
) -> None:
    now, before = to_torch(current, dtype), to_torch(previous, dtype)
    expected = ref.relative_change(upcast(now), upcast(before), eps)
    agree(relative_change(now, before, eps), expected, dtype)


@all_dtypes
@given(st.integers(1, 5).flatmap(lambda k: arrays(k, st.just(0.0) | positives)))
def test_volatility_weights_agree_with_the_reference(dtype: torch.dtype, values: Array) -> None:
    volatility = to_torch(values, dtype)
    agree(volatility_weights(volatility), ref.volatility_weights(upcast(volatility)), dtype)


@st.composite
def weighted_signals(draw: st.DrawFn) -> tuple[Array, Array]:
    count, batch = draw(st.integers(1, 5)), draw(batch_sizes)
    weights = ref.volatility_weights(draw(arrays(count, st.just(0.0) | positives)))
    return draw(arrays((count, batch), reals(0, 1))), weights


@all_dtypes
@given(weighted_signals())
def test_difficulty_agrees_with_the_reference(
    dtype: torch.dtype, case: tuple[Array, Array]
) -> None:
    signals, weights = (to_torch(x, dtype) for x in case)
    agree(difficulty(signals, weights), ref.difficulty(upcast(signals), upcast(weights)), dtype)


# Facts of the signals.


@given(heads())
def test_signals_of_any_logits_lie_in_the_unit_interval(case: Heads) -> None:
    out = ref.head_statistics(case.logits, case.target, present=case.present)
    sample = Statistics(out.nll, out.entropy, out.distance, case.present, case.logits[0].shape[1])
    for dtype in (torch.float32, torch.float64):
        *bounded, excess = every_signal(sample, dtype)
        for signal in bounded:
            assert ((signal >= 0) & (signal <= 1 + TOLERANCES[dtype])).all()
        assert ((excess >= 0) & excess.isfinite()).all()


@given(statistics(), reals(-100, 100))
def test_absent_entries_never_matter(case: Statistics, filler: float) -> None:
    """Each sample reads as it would alone, with the heads that it has."""
    batch = every_signal(case)
    if case.present is not None:
        filled = Statistics(
            *(np.where(case.present, x, filler) for x in case[:3]), case.present, case.num_classes
        )
        for with_nan, other in zip(batch, every_signal(filled), strict=True):
            assert torch.equal(with_nan, other)
    for i in range(case.nll.shape[1]):
        kept = slice(None) if case.present is None else case.present[:, i]
        alone = Statistics(*(x[kept][:, [i]] for x in case[:3]), None, case.num_classes)
        for in_batch, signal in zip(batch, every_signal(alone), strict=True):
            assert_allclose(signal[0], in_batch[i], rtol=1e-12, atol=1e-15)


@given(statistics(), st.randoms(use_true_random=False))
def test_the_order_of_the_modalities_does_not_matter(case: Statistics, random: Any) -> None:
    order = list(range(1, case.nll.shape[0]))
    random.shuffle(order)
    shuffled = [None if x is None else x[[0, *order]] for x in case[:4]]
    for before, after in zip(
        every_signal(case), every_signal(Statistics(*shuffled, case.num_classes)), strict=True
    ):
        assert_allclose(after, before, rtol=1e-12, atol=1e-15)


@given(st.integers(1, 9).flatmap(lambda h: arrays((h, 1), reals(0, 8))), reals(0.125, 8), st.data())
def test_deviation_grows_with_each_nll(nll: Array, step: float, data: st.DataObject) -> None:
    worse = nll.copy()
    worse[data.draw(st.integers(0, len(nll) - 1))] += step
    assert (prediction_deviation(to_torch(worse)) > prediction_deviation(to_torch(nll))).all()


@given(st.integers(1, 9), arrays(3, reals(0, 8)))
def test_deviation_of_heads_that_agree_is_that_of_one(count: int, nll: Array) -> None:
    signal = prediction_deviation(to_torch(np.tile(nll, (count, 1))))
    assert_allclose(signal, 1 - np.exp(-nll), rtol=1e-12, atol=1e-15)


@given(arrays((3, 2), reals(0, 8)), arrays((3, 2), reals(0, 8)))
def test_surprise_is_zero_up_to_the_expected_nll_and_grows_beyond(
    entropy: Array, excess: Array
) -> None:
    below = surprise(to_torch(entropy - excess), to_torch(entropy))
    assert (below == 0).all()
    above = surprise(to_torch(entropy + excess), to_torch(entropy))
    assert_allclose(above, excess.mean(axis=0), rtol=1e-12, atol=1e-12)


@given(statistics(), reals(2**-11, 1))
def test_surprise_is_a_mean_over_heads(case: Statistics, weight: float) -> None:
    """Of equal weights the plain one; of any, between the least and the most surprised head."""
    nll, entropy, present = (to_torch(x) for x in (case.nll, case.entropy, case.present))
    alike = surprise(nll, entropy, present, torch.full_like(nll[:, 0], weight))
    assert_allclose(alike, surprise(nll, entropy, present), rtol=1e-12)
    rising = torch.linspace(weight, 1.0, len(nll), dtype=nll.dtype)
    found = surprise(nll, entropy, present, rising)
    excess = (case.nll - case.entropy).clip(min=0.0)
    assert (found.numpy() <= np.nanmax(excess, axis=0) * (1 + 1e-12)).all()
    assert (found.numpy() >= np.nanmin(excess, axis=0) * (1 - 1e-12)).all()


@given(statistics(), arrays(9, reals(0, 4)))
def test_entropy_beyond_the_usual_explains_nothing(case: Statistics, averages: Array) -> None:
    nll, entropy, present = (to_torch(x) for x in (case.nll, case.entropy, case.present))
    usual = to_torch(averages[: len(nll)])
    found = surprise(nll, entropy, present, usual=usual)
    assert (found >= surprise(nll, entropy, present)).all()
    more_than_any = usual + 8.0 * np.log(case.num_classes)
    alike = surprise(nll, entropy, present, usual=more_than_any)
    assert torch.equal(alike, surprise(nll, entropy, present))


@given(st.floats(0.501, 0.999), st.floats(0.0, 8.0))
def test_a_constant_prediction_of_two_classes_does_not_feed_on_itself(p: float, rho: float) -> None:
    """Once its class's average has followed, the weighted gradient draws it back, however sure."""
    probs = torch.tensor([p, 1.0 - p]).double().repeat_interleave(32)
    entropy = torch.special.entr(probs[::32]).sum().expand(2, 64)
    own = log_weights(
        surprise(-probs.log().expand(2, -1), entropy),
        torch.zeros(64),
        surprise_strength=rho,
        pacing_strength=0.0,
    )
    average = torch.zeros(2).double()
    for _ in range(10):
        weights, average = sample_weights(own, torch.arange(64) // 32, average, decay=0.95)
    push = weights[0] * (1.0 - p) - weights[-1] * p
    assert push < 0.0


@given(statistics())
def test_one_class_leaves_nothing_undecided_or_surprising(case: Statistics) -> None:
    none = np.zeros_like(case.nll)  # of its NLL and entropy
    _, _, stability, excess = every_signal(case._replace(num_classes=1, nll=none, entropy=none))
    assert (stability == 0).all()
    assert (excess == 0).all()


@given(arrays(4, reals(-8, 8)), arrays(4, reals(-8, 8)))
def test_relative_change_is_zero_only_without_a_change(current: Array, previous: Array) -> None:
    now, before = to_torch(current), to_torch(previous)
    change = relative_change(now, before)
    assert ((change >= 0) & change.isfinite()).all()
    assert torch.equal(change == 0, now == before)
    assert torch.equal(change, relative_change(-now, -before))


@given(st.integers(1, 5).flatmap(lambda k: arrays(k, st.just(0.0) | positives)), reals(0.125, 8))
def test_volatility_weights_are_shares(values: Array, scale: float) -> None:
    volatility = to_torch(values)
    weights = volatility_weights(volatility)
    assert (weights >= 0).all()
    assert_allclose(weights.sum(), 1.0, rtol=1e-12)
    assert_allclose(volatility_weights(scale * volatility), weights, rtol=1e-12)
    assert torch.equal(weights[volatility.argsort()], weights.sort().values)


@given(weighted_signals())
def test_difficulty_lies_between_the_signals(case: tuple[Array, Array]) -> None:
    signals, weights = case
    out = difficulty(to_torch(signals), to_torch(weights)).numpy()
    assert (out >= signals.min(axis=0) - 1e-12).all()
    assert (out <= signals.max(axis=0) + 1e-12).all()


# Examples.


def test_deviation_keeps_the_digits_of_a_small_nll() -> None:
    tiny = torch.full((3, 1), 1e-12)
    assert_allclose(prediction_deviation(tiny), [1e-12], rtol=1e-6)


def test_certain_uniform_and_no_modality() -> None:
    entropy = torch.tensor([[0.0, math.log(5.0)]], dtype=torch.float64)
    assert_allclose(prediction_stability(entropy, 5), [0.0, 1.0], rtol=1e-12)
    rounded = torch.tensor([[-1e-7, math.log(5.0) + 1e-6]])
    assert prediction_stability(rounded, 5).tolist() == [0.0, 1.0]
    assert prediction_consistency(torch.zeros(1, 2)).tolist() == [0.0, 0.0]
    distance = torch.tensor([[0.0, 0.0], [0.5, NAN], [1.0, NAN]])
    present = torch.tensor([[True, True], [True, False], [True, False]])
    assert prediction_consistency(distance, present).tolist() == [0.75, 0.0]


def test_the_defaults_are_those_of_the_reference() -> None:
    near_zero, moved = torch.tensor([0.0], dtype=torch.float64), torch.tensor([1e-3]).double()
    assert_allclose(relative_change(moved, near_zero), [1.0], rtol=1e-6)
    assert_allclose(relative_change(moved, near_zero), ref.relative_change([1e-3], [0.0]), 1e-6)
    assert_allclose(noise_pressure(torch.tensor([0.005])), [0.5], rtol=1e-6)


def test_nothing_volatile_is_uniform() -> None:
    assert volatility_weights(torch.zeros(4)).tolist() == [0.25] * 4


@pytest.mark.parametrize("function", [prediction_deviation, prediction_consistency])
def test_a_mean_is_over_present_heads_only(function: Callable[..., Tensor]) -> None:
    values = torch.tensor([[0.0], [0.5], [1.0]], dtype=torch.float64)
    present = torch.tensor([[True], [True], [False]])
    assert_allclose(function(values, present), function(values[:2]), rtol=1e-12)
    assert function(values, present) < function(values)


# Sample weights.


@st.composite
def weighing(draw: st.DrawFn) -> tuple[Array, Array, Array, float, float]:
    batch = draw(st.integers(1, 8))
    surprised = draw(arrays(batch, reals(0, 8)) | arrays(batch, st.sampled_from([0.0, 1e4])))
    hard = draw(arrays(batch, reals(0, 1)) | arrays(batch, st.just(0.5)))
    valid = draw(arrays(batch, st.booleans())).astype(bool)
    return surprised, hard, valid, draw(reals(0, 8)), draw(reals(0, 2))


def weigh(case: tuple[Array, Array, Array, float, float]) -> Tensor:
    surprised, hard, valid, rho, kappa = case
    nan = np.where(valid, 0.0, NAN)
    return log_weights(
        to_torch(surprised + nan),
        to_torch(hard + nan),
        surprise_strength=rho,
        pacing_strength=kappa,
        valid=torch.from_numpy(valid),
    )


@given(weighing())
def test_log_weights_agree_with_the_reference(
    case: tuple[Array, Array, Array, float, float],
) -> None:
    surprised, hard, valid, rho, kappa = case
    expected = ref.log_weights(
        surprised, hard, surprise_strength=rho, pacing_strength=kappa, valid=valid
    )
    assert_allclose(weigh(case)[valid], expected[valid], rtol=1e-9, atol=1e-8)
    assert (abs(expected) <= 8.0).all()


@given(weighing())
def test_log_weights_in_float32_agree_with_the_reference(
    case: tuple[Array, Array, Array, float, float],
) -> None:
    """To what a spread of 1e-4 keeps of the digits."""
    surprised, hard, valid, rho, kappa = case
    arguments = [to_torch(np.minimum(surprised, 8.0), torch.float32), to_torch(hard, torch.float32)]
    strengths = {"surprise_strength": rho, "pacing_strength": kappa}
    actual = log_weights(*arguments, **strengths, valid=torch.from_numpy(valid))
    expected = ref.log_weights(*(upcast(x) for x in arguments), **strengths, valid=valid)
    assert actual.dtype == torch.float32
    assert_allclose(actual[valid], expected[valid], rtol=1e-4, atol=5e-3)


def test_what_is_far_easier_than_all_else_weighs_no_more_than_sums_can_hold() -> None:
    hard = torch.ones(100_000).scatter(0, torch.tensor([7]), 0.0)
    found = log_weights(torch.zeros(100_000), hard, surprise_strength=0.0, pacing_strength=2.0)
    assert found.max() == found[7] == 8.0


@given(arrays(6, reals(0, 8)), reals(2**-6, 1))
def test_more_surprise_never_weighs_more(surprised: Array, rho: float) -> None:
    found = log_weights(
        to_torch(surprised), torch.zeros(6).double(), surprise_strength=rho, pacing_strength=0.0
    )
    assert (np.diff(found.numpy()[np.argsort(surprised)]) <= 0.0).all()
    assert found[surprised.argmin()] > found[surprised.argmax()] or np.ptp(surprised) == 0.0


@given(arrays(6, reals(0, 1)), reals(2**-6, 2))
def test_pacing_favours_the_easy(hard: Array, kappa: float) -> None:
    found = log_weights(
        torch.zeros(6).double(), to_torch(hard), surprise_strength=0.0, pacing_strength=kappa
    )
    assert (np.diff(found.numpy()[np.argsort(hard)]) <= 1e-12).all()


@given(arrays(5, reals(0, 8)), arrays(5, reals(0, 1)))
def test_without_strength_all_weigh_one(surprised: Array, hard: Array) -> None:
    own = log_weights(
        to_torch(surprised), to_torch(hard), surprise_strength=0.0, pacing_strength=0.0
    )
    weights, average = sample_weights(own, torch.arange(5), torch.zeros(5).double(), 0.9)
    assert weights.tolist() == [1.0] * 5
    assert average.tolist() == [0.0] * 5


@st.composite
def classes_of(draw: st.DrawFn) -> tuple[Array, Array, Array, Array]:
    """Log weights, groups of classes, their averages and which samples are valid."""
    size = draw(st.integers(0, 12))
    own = draw(arrays(size, reals(-8, 8)) | arrays(size, st.sampled_from([-8.0, 0.0, 8.0])))
    group = draw(arrays(size, st.integers(0, 3))).astype(np.int64)
    average = draw(arrays(5, reals(-4, 4) | st.sampled_from([-8.0, 8.0])))
    return own, group, average, draw(arrays(size, st.booleans())).astype(bool)


@given(classes_of(), st.sampled_from([0.0, 0.5, 0.95]))
def test_sample_weights_agree_with_the_reference(
    case: tuple[Array, Array, Array, Array], decay: float
) -> None:
    own, group, average, valid = case
    spoilt = to_torch(np.where(valid, own, NAN))
    tensors = spoilt, torch.from_numpy(group), to_torch(average)
    weights, moved = sample_weights(*tensors, decay, torch.from_numpy(valid))
    expected, expected_average = ref.sample_weights(own, group, average, decay, valid)
    agree(weights, expected, torch.float64)
    assert_allclose(moved, expected_average, rtol=1e-9, atol=1e-12)
    assert moved[4] == average[4]
    assert (weights.numpy()[~valid] == 1.0).all()
    if valid.all():
        assert torch.equal(sample_weights(*tensors, decay)[0], weights)


@given(classes_of(), st.sampled_from([0.0, 0.5, 0.95]))
def test_no_sample_outweighs_its_class_by_far(
    case: tuple[Array, Array, Array, Array], decay: float
) -> None:
    """Whatever the average was, it takes in the sample before the sample is divided by it."""
    own, group, average, _ = case
    weights, _ = sample_weights(*(torch.from_numpy(x) for x in (own, group, average)), decay)
    for k in np.unique(group):
        n = (group == k).sum()
        assert weights[group == k].sum() <= 1.001 * n / (1 - decay**n)


@given(arrays(12, reals(0, 3)), st.integers(0, 100), st.sampled_from([1, 3, 12]))
def test_classes_weigh_what_they_are_frequent_in_batches_of_any_size(
    surprised: Array, seed: int, size: int
) -> None:
    """And samples what they do within their class."""
    rng = np.random.default_rng(seed)
    group, own = rng.integers(3, size=12), -surprised
    means = np.array([np.exp(own[group == k]).mean() if k in group else 1.0 for k in range(3)])
    average, weights = torch.from_numpy(np.log(means)), torch.zeros(12).double()
    for _ in range(60 // size):
        rows = rng.permutation(12)[:size]
        weights[rows], average = sample_weights(
            torch.from_numpy(own[rows]), torch.from_numpy(group[rows]), average, 0.998
        )
    seen = weights.numpy() > 0
    assert_allclose(weights[seen], (np.exp(own) / means[group])[seen], rtol=0.1)


@st.composite
def votes(draw: st.DrawFn) -> tuple[Array, Array, Array | None]:
    """Predictions, labels and which heads are present."""
    heads = draw(st.integers(1, 5))
    prediction, label = (draw(arrays(n, st.integers(0, 2))) for n in ((heads, 4), 4))
    present = draw(arrays((heads, 4), st.booleans()) | st.none())
    if present is not None:
        present = present.astype(bool)
        present[0] = True
    return prediction.astype(np.int64), label.astype(np.int64), present


CONTRADICTED_CLASSES = 3


def contradicted(
    prediction: Tensor, nll: Tensor, entropy: Tensor, target: Tensor, present: Tensor | None = None
) -> Tensor:
    sure = sureness(entropy, CONTRADICTED_CLASSES)
    return contradiction(prediction, doubt(prediction, nll, entropy, target), sure, present)


def ref_contradicted(
    prediction: Array, nll: Array, entropy: Array, target: Array, present: Array | None = None
) -> Array:
    sure = ref.sureness(entropy, CONTRADICTED_CLASSES)
    return ref.contradiction(prediction, ref.doubt(prediction, nll, entropy, target), sure, present)


@given(votes(), arrays((4, 3), reals(0, 1)), st.data())
def test_contradiction_agrees_with_the_reference(
    case: tuple[Array, Array, Array | None], likely: Array, data: st.DataObject
) -> None:
    prediction, label, present = case
    nll, entropy = (data.draw(arrays(prediction.shape, reals(0, n))) for n in (8, 1))
    certain, unsure = np.eye(3)[label], likely / (likely.sum(axis=1, keepdims=True) + 1e-300)
    for target in (label, certain, unsure):
        actual = contradicted(
            torch.from_numpy(prediction),
            to_torch(nll),
            to_torch(entropy),
            torch.from_numpy(target),
            None if present is None else torch.from_numpy(present),
        )
        expected = ref_contradicted(prediction, nll, entropy, target, present)
        assert_allclose(actual, expected, rtol=1e-12, atol=1e-15)
        assert ((actual >= -0.07) & (actual <= 1)).all()
        if target is not unsure:  # a class is one-hot
            alike = ref_contradicted(prediction, nll, entropy, label, present)
            assert_allclose(actual, alike, rtol=1e-12, atol=1e-15)


@given(
    arrays((4, 3), st.integers(0, 2)),
    arrays((4, 3), reals(0, 8)),
    arrays((4, 3), reals(0, 1)),
    arrays((3, 3), st.booleans()),
    st.randoms(),
)
def test_absent_votes_and_the_order_of_the_modalities_do_not_matter(
    votes: Array, excess: Array, entropies: Array, mask: Array, random: Any
) -> None:
    prediction, label = torch.from_numpy(votes).long(), torch.tensor([0, 1, 2])
    nll, calm = to_torch(excess), to_torch(entropies)
    present = torch.cat([torch.ones(1, 3, dtype=torch.bool), torch.from_numpy(mask).bool()])
    doubted = contradicted(prediction, nll, calm, label, present)
    garbage = torch.where(present, prediction, -1)
    spoilt = torch.where(present, nll, math.nan)
    spoilt_calm = torch.where(present, calm, math.nan)
    assert torch.equal(contradicted(garbage, spoilt, spoilt_calm, label, present), doubted)
    order = [0, *random.sample([1, 2, 3], 3)]
    again = contradicted(prediction[order], nll[order], calm[order], label, present[order])
    assert torch.equal(again, doubted)


@given(arrays((3, 4), reals(0, 8)), st.integers(0, 2), reals(0.125, 2))
def test_the_least_surprised_head_limits_the_contradiction(
    excess: Array, head: int, more: float
) -> None:
    prediction, label = torch.ones(3, 4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    calm = torch.zeros(3, 4, dtype=torch.float64)
    doubted = contradicted(prediction, to_torch(excess), calm, label)
    assert_allclose(doubted, 0.93 - np.exp(-excess.min(axis=0)), rtol=1e-12, atol=1e-15)
    excess[head] = np.maximum(excess[head], excess.min(axis=0) + more)
    others = np.delete(excess, head, axis=0).min(axis=0)
    raised = contradicted(prediction, to_torch(excess), calm, label)
    least = np.minimum(others, excess[head])
    assert_allclose(raised, 0.93 - np.exp(-least), rtol=1e-12, atol=1e-15)
    excess[head] = 0.0  # as unsure as it is surprised
    assert_allclose(contradicted(prediction, to_torch(excess), calm, label), -0.07, rtol=1e-12)


@given(arrays((3, 4), reals(0, 1)), st.integers(0, 2))
def test_the_least_sure_head_limits_what_all_may_be_wrong_about(
    entropies: Array, head: int
) -> None:
    prediction, label = torch.ones(3, 4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
    nothing = torch.zeros(3, 4, dtype=torch.float64)
    found = contradicted(prediction, nothing, to_torch(entropies), label)
    least = 1 - entropies.max(axis=0) / math.log(CONTRADICTED_CLASSES)
    assert_allclose(found, -0.07 * least, rtol=1e-12, atol=1e-15)
    entropies[head] = math.log(CONTRADICTED_CLASSES)  # that knows nothing
    unsure = contradicted(prediction, nothing, to_torch(entropies), label)
    assert_allclose(unsure, 0.0, atol=1e-15)
    dissenting = torch.arange(3).eq(head).long().unsqueeze(1) + prediction
    assert not contradicted(dissenting, nothing, nothing, label).any()


@given(arrays((2, 3), reals(0, 8)), st.integers(1, 6))
def test_sureness_agrees_with_the_reference(entropy: Array, classes: int) -> None:
    found = sureness(to_torch(entropy), classes)
    assert_allclose(found, ref.sureness(entropy, classes), rtol=1e-12, atol=1e-12)
    assert ((found >= 0) & (found <= 1)).all()
    assert torch.equal(sureness(torch.tensor([0.0, -1.0]), classes), torch.ones(2))
    if classes > 1:
        undecided = torch.tensor([math.log(classes)], dtype=torch.float64)
        assert_allclose(sureness(undecided, classes), 0.0, atol=1e-12)


def test_agreement_on_a_wrong_class_is_a_contradiction_and_nothing_else_is() -> None:
    # All wrong alike; all right; one dissents; the label is right only for the fused head.
    prediction = torch.tensor([[1, 0, 1, 0], [1, 0, 1, 1], [1, 0, 2, 1]])
    sure = torch.full((3, 4), 2.0).log(), torch.zeros(3, 4)
    doubted = contradicted(prediction, *sure, torch.tensor([0, 0, 0, 0]))
    assert_allclose(doubted, [0.5 - 0.07, -0.07, 0.0, 0.0], rtol=1e-6)


def test_one_head_alone_contradicts_nothing_and_one_modality_next_to_nothing() -> None:
    one, calm = torch.ones(1, 1), torch.zeros(1, 1)
    assert contradicted(torch.tensor([[1]]), one, calm, torch.tensor([0])).tolist() == [0]
    beyond = 1 - math.exp(-1) - 0.07
    for modalities, expected in ((1, 0.0125), (2, 1.0)):
        shape = 1 + modalities, 1
        found = torch.ones(shape).long(), torch.ones(shape), torch.zeros(shape), torch.tensor([0])
        assert_allclose(contradicted(*found), [expected * beyond], rtol=1e-6)
        present = torch.ones(shape, dtype=torch.bool)
        assert_allclose(contradicted(*found, present), contradicted(*found))
        present[-1] = False
        expected = 0.0125 if modalities == 2 else 0.0
        assert_allclose(contradicted(*found, present), [expected * beyond], rtol=1e-6)
    nothing = torch.tensor([[1], [1]]), torch.full((2, 1), math.nan), torch.zeros(2, 1)
    alone = torch.tensor([[True], [False]])
    assert contradicted(*nothing, torch.tensor([0]), alone).tolist() == [0]
    assert contradicted(*(x[:1] for x in nothing), torch.tensor([0])).tolist() == [0]


@given(votes(), arrays((4, 3), reals(0, 1)), reals(0, 8), st.data())
def test_doubt_is_what_goes_beyond_the_head_s_own_uncertainty(
    case: tuple[Array, Array, Array | None], likely: Array, more: float, data: st.DataObject
) -> None:
    prediction, label, _ = case
    nll, entropy = (data.draw(arrays(prediction.shape, reals(0, 8))) for _ in range(2))
    unsure = likely / (likely.sum(axis=1, keepdims=True) + 1e-300)
    for target in (label, unsure):
        given = torch.from_numpy(prediction), to_torch(nll), to_torch(entropy)
        found = doubt(*given, torch.from_numpy(target))
        assert_allclose(found, ref.doubt(prediction, nll, entropy, target), rtol=1e-12, atol=1e-15)
        assert ((found >= 0) & (found <= 1)).all()
        assert not found[torch.from_numpy(nll <= entropy)].any()
        raised = doubt(given[0], given[1] + more, given[2], torch.from_numpy(target))
        assert (raised >= found).all()
        absent = torch.full_like(given[0], -7)  # whatever the class of a head that is not there
        assert doubt(absent, *given[1:], torch.from_numpy(target)).isfinite().all()


@given(arrays(3, reals(-0.0625, 1)), reals(0, 1), reals(2**-6, 1))
def test_noise_pressure_agrees_with_the_reference(
    noise: Array, trust: float, full_at: float
) -> None:
    pressure = noise_pressure(to_torch(noise), trust, full_at)
    assert_allclose(pressure, ref.noise_pressure(noise, trust, full_at), rtol=1e-12)
    assert ((pressure >= 0) & (pressure <= 1)).all()
    assert torch.equal(noise_pressure(to_torch(noise), torch.tensor(trust), full_at), pressure)


@given(st.integers(0, 2**40), st.sampled_from([0.01, 0.05, 0.2, 0.5]))
def test_held_out_is_a_fair_share_of_any_stretch(start: int, share: float) -> None:
    index = np.arange(start, start + 20_000)
    held = held_out(torch.from_numpy(index), share).numpy()
    assert (held == ref.held_out(index, share)).all()
    for period in (1, 2, 10, 89, 987):  # classes in turn
        for first in range(0, period, 1 + period // 7):
            part = held[first::period]
            spread = (share * (1 - share) / len(part)) ** 0.5
            assert abs(part.mean() - share) < 6.5 * spread + 1e-9


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.3, 0.5])
def test_held_out_is_an_even_share_of_the_first_samples(share: float) -> None:
    """Nearer than chance leaves most hashes: it was chosen for that."""
    number = np.arange(1, 6001)
    held = held_out(torch.arange(6000), share).cumsum(dim=0).numpy()
    deviations = (held - share * number) / (number * share * (1 - share)) ** 0.5
    assert np.abs(deviations[99:]).max() < 1.4


def test_held_out_none_and_all() -> None:
    index = torch.arange(1000)
    assert not held_out(index, 0.0).any()
    assert held_out(index, 1.0).all()


@given(arrays(3, reals(0, 1)), arrays(3, reals(0, 1)))
def test_noise_is_what_all_heads_contradict_or_the_fusion_learns_by_heart(
    shares: Array, skills: Array
) -> None:
    shares[0] = 1.07 * shares[0] - 0.07
    contradicted, trained, held = to_torch(shares)
    skill = to_torch(skills)
    noise = seen_noise(contradicted, trained, held, skill)
    assert_allclose(noise, ref.seen_noise(*shares, skills), rtol=1e-12, atol=1e-15)
    assert contradicted <= noise <= max(contradicted, held / 4) + 1e-12
    repeated = torch.cat([skill, skill[:1]])  # a modality that knows as much
    assert seen_noise(contradicted, trained, held, repeated) <= max(contradicted, 0.0)
    alone = torch.tensor([1.0, 0.0]).double()
    half_left = seen_noise(contradicted, held / 2, held, alone)
    assert_allclose(half_left, max(contradicted, held / 4) if held else contradicted, rtol=1e-12)
    assert seen_noise(contradicted, held / 2, held, alone[:1]) == contradicted  # no modality
    for learnt in (held, 0.0 * held):  # nothing by heart, or all
        assert seen_noise(contradicted, learnt, held, alone) <= max(contradicted, 0.0)


@all_dtypes
@given(class_counts.flatmap(lambda c: soft_targets(4, c)))
def test_target_entropy_agrees_with_the_reference(dtype: torch.dtype, probs: Array) -> None:
    target = to_torch(probs, dtype)
    agree(target_entropy(target), ref.target_entropy(upcast(target)), dtype)


@given(st.integers(2, 6).flatmap(lambda c: st.tuples(soft_targets(4, c), soft_targets(4, c))))
def test_no_prediction_is_likelier_than_the_target_itself(both: tuple[Array, Array]) -> None:
    target, prediction = (to_torch(x) for x in both)
    nll = -torch.xlogy(target, prediction).sum(dim=1)
    own = target_entropy(target)
    assert (nll >= own - 1e-12).all()
    assert_allclose(-torch.xlogy(target, target).sum(dim=1), own, atol=1e-12)
    assert (own <= math.log(target.shape[1]) + 1e-12).all()


@given(reals(0, 3), st.integers(1, 20))
def test_the_share_to_learn_agrees_with_the_reference(entropy: float, classes: int) -> None:
    found = share_to_learn(torch.tensor(entropy, dtype=torch.float64), classes)
    assert_allclose(found, ref.share_to_learn(entropy, classes), rtol=1e-12)
    assert 0.01 <= found <= 1.0


def test_what_is_not_in_the_unit_interval_adds_nothing_to_a_target() -> None:
    found = target_entropy(torch.tensor([[1.2, -0.2, 0.0], [0.0, 0.0, 0.0], [1e37, 1.0, 0.0]]))
    assert_allclose(found, 0.0)
