from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from strategies import Array, arrays, head_presence, log_quality, reals, to_torch, upcast
from torch import Tensor
from torch.nn import functional as F

from dyncim_core import modality
from dyncim_core import reference as ref
from dyncim_core.modality import (
    augmentation_rates,
    balance_factor,
    expected_log_likelihood,
    generalisation,
    geometric_mean_ratio,
    harmonic_mean_improvement_rate,
    improvement_ratios,
    logit_slopes,
    logit_weights,
    loss_shares,
    modality_coefficients,
    modality_weights,
    pooled_skill,
    quality,
    redundancy,
    relative_logit_weights,
    skill,
    standing,
    trust,
    witnesses,
)

SCALARS = [geometric_mean_ratio, harmonic_mean_improvement_rate, balance_factor]
VECTORS = [improvement_ratios, modality_weights, modality_coefficients]
BOUNDED = [balance_factor, modality_weights, modality_coefficients]

# Relative to the size of the log-qualities, since the logs are what gets rounded.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}

all_dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
EPS = 1e-3


def named(functions: list[Callable[..., Tensor]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("function", functions, ids=lambda f: f.__name__)


@st.composite
def gains(draw: st.DrawFn) -> Array:
    """``[M + 1]`` where the fusion is clearly better than every modality."""
    lags = draw(st.lists(reals(0.125, 3), min_size=1, max_size=8))
    fused = draw(reals(-2, 0))
    return np.array([fused, *(fused - lag for lag in lags)])


def rates(values: Array) -> Array:
    return np.maximum(np.exp(values[..., :1] - values[..., 1:]) - 1, EPS)


def bumped(values: Array, head: int, step: float) -> Tensor:
    changed = values.copy()
    changed[..., head] += step
    return to_torch(changed)


# Agreement with the reference, in the values that the dtype holds.


@all_dtypes
@named(SCALARS + VECTORS)
@given(log_quality())
def test_agrees_with_the_reference(
    dtype: torch.dtype, function: Callable[..., Tensor], values: Array
) -> None:
    log_q = to_torch(values, dtype)
    actual = function(log_q)
    expected = getattr(ref, function.__name__)(upcast(log_q))
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    tolerance = TOLERANCES[dtype] * max(1.0, np.abs(values).max())
    assert_allclose(upcast(actual), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@named(BOUNDED)
@given(log_quality(extreme=True))
def test_bounded_quantities_agree_with_the_reference_at_extremes(
    dtype: torch.dtype, function: Callable[..., Tensor], values: Array
) -> None:
    log_q = to_torch(values, dtype)
    # These values are whole numbers, but their mean over the modalities is rounded.
    tolerance = 10 * torch.finfo(dtype).eps * max(1.0, np.abs(values).max())
    expected = getattr(ref, function.__name__)(upcast(log_q))
    assert_allclose(upcast(function(log_q)), expected, rtol=tolerance, atol=tolerance)


@given(log_quality(), reals(0.25, 4), reals(0, 4))
def test_the_options_of_the_weights_agree_with_the_reference(
    values: Array, temperature: float, cap: float
) -> None:
    actual = modality_weights(to_torch(values), temperature=temperature, cap=cap)
    expected = ref.modality_weights(values, temperature=temperature, cap=cap)
    assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@named([harmonic_mean_improvement_rate, balance_factor])
@given(log_quality(), reals(2**-10, 1))
def test_the_floor_agrees_with_the_reference(
    function: Callable[..., Tensor], values: Array, eps: float
) -> None:
    expected = getattr(ref, function.__name__)(values, eps=eps)
    assert_allclose(function(to_torch(values), eps=eps), expected, rtol=1e-12, atol=1e-12)


@given(arrays((2, 3), reals(-8, 1)), st.integers(1, 6))
def test_quality_agrees_with_the_reference(values: Array, classes: int) -> None:
    expected = ref.quality(values, classes)
    assert_allclose(quality(to_torch(values), classes), expected, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 8).flatmap(lambda m: arrays(m, reals(0, 1))), reals(2**-10, 1))
def test_augmentation_rates_agree_with_the_reference(values: Array, eps: float) -> None:
    expected = ref.augmentation_rates(values, eps)
    assert_allclose(augmentation_rates(to_torch(values), eps), expected, rtol=1e-12)


# Extremes.


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@given(log_quality(extreme=True))
def test_no_finite_input_gives_nan(dtype: torch.dtype, values: Array) -> None:
    log_q = to_torch(values, dtype)
    for function in SCALARS + VECTORS:
        assert not function(log_q).isnan().any(), function.__name__
    assert (improvement_ratios(log_q) >= 0).all()
    assert (geometric_mean_ratio(log_q) >= 0).all()
    assert (harmonic_mean_improvement_rate(log_q) > 0).all()
    share, alpha = balance_factor(log_q), modality_weights(log_q)
    assert ((share >= 0) & (share <= 1)).all()
    assert ((alpha >= 0) & (alpha <= 1)).all()
    assert (modality_coefficients(log_q) >= 0).all()
    assert ((quality(log_q, 3) >= 0) & (quality(log_q, 3) <= 1)).all()


def test_overflow_is_infinite_and_balanced() -> None:
    log_q = torch.tensor([0.0, -1e4, -1e4])
    assert improvement_ratios(log_q).tolist() == [math.inf, math.inf]
    assert geometric_mean_ratio(log_q) == math.inf
    assert balance_factor(log_q) == 0.0
    assert modality_coefficients(log_q).tolist() == [1.0, 1.0]


# What none of the quantities may depend on.


@named(SCALARS + VECTORS)
@given(log_quality(), st.randoms(use_true_random=False))
def test_modalities_may_be_reordered(
    function: Callable[..., Tensor], values: Array, random: Any
) -> None:
    order = list(range(values.shape[-1] - 1))
    random.shuffle(order)
    shuffled = function(to_torch(values[..., [0, *(m + 1 for m in order)]]))
    original = function(to_torch(values))
    expected = original if function in SCALARS else original[..., order]
    assert_allclose(shuffled, expected, rtol=1e-12, atol=1e-12)


@named(SCALARS + VECTORS)
@given(log_quality(), reals(-8, 8))
def test_qualities_may_be_scaled_alike(
    function: Callable[..., Tensor], values: Array, shift: float
) -> None:
    assert_allclose(
        function(to_torch(values + shift)), function(to_torch(values)), rtol=1e-11, atol=1e-12
    )


@named([*SCALARS, modality_coefficients])
@given(log_quality(), st.integers(2, 4))
def test_the_set_of_modalities_may_be_repeated(
    function: Callable[..., Tensor], values: Array, times: int
) -> None:
    repeated = np.concatenate([values[..., :1]] + [values[..., 1:]] * times, axis=-1)
    once = function(to_torch(values))
    expected = once if function in SCALARS else torch.cat([once] * times, dim=-1)
    assert_allclose(function(to_torch(repeated)), expected, rtol=1e-12, atol=1e-12)


@named(SCALARS + VECTORS)
@given(arrays((2, 3, 4), reals(-4, 0)))
def test_leading_dimensions_are_a_batch(function: Callable[..., Tensor], values: Array) -> None:
    whole = function(to_torch(values))
    for i, j in np.ndindex(2, 3):
        assert_allclose(whole[i, j], function(to_torch(values[i, j])), rtol=1e-12, atol=1e-15)


# Facts of each quantity.


@given(st.lists(reals(-8, 0), min_size=1, max_size=8))
def test_gmr_is_one_when_the_fusion_is_the_geometric_mean(unimodal: list[float]) -> None:
    values = torch.tensor([sum(unimodal) / len(unimodal), *unimodal], dtype=torch.float64)
    assert_allclose(geometric_mean_ratio(values), 1.0, rtol=1e-12)


@given(log_quality(), reals(0.125, 2), st.data())
def test_gmr_grows_with_the_fusion_and_falls_with_each_modality(
    values: Array, step: float, data: st.DataObject
) -> None:
    gmr = geometric_mean_ratio(to_torch(values))
    assert (geometric_mean_ratio(bumped(values, 0, step)) > gmr).all()
    head = data.draw(st.integers(1, values.shape[-1] - 1))
    assert (geometric_mean_ratio(bumped(values, head, step)) < gmr).all()


@given(log_quality(), reals(0.125, 2), st.data())
def test_hmir_grows_with_the_fusion_and_falls_with_each_modality(
    values: Array, step: float, data: st.DataObject
) -> None:
    """Weakly, since a rate at its floor does not move."""
    hmir = harmonic_mean_improvement_rate(to_torch(values))
    head = data.draw(st.integers(1, values.shape[-1] - 1))
    slack = 1e-12 * (1 + hmir)
    assert (harmonic_mean_improvement_rate(bumped(values, 0, step)) >= hmir - slack).all()
    assert (harmonic_mean_improvement_rate(bumped(values, head, step)) <= hmir + slack).all()


@given(gains(), reals(0.125, 2), st.data())
def test_hmir_moves_with_every_rate_above_the_floor(
    values: Array, step: float, data: st.DataObject
) -> None:
    hmir = harmonic_mean_improvement_rate(to_torch(values))
    head = data.draw(st.integers(1, len(values) - 1))
    assert harmonic_mean_improvement_rate(bumped(values, 0, step)) > hmir
    assert harmonic_mean_improvement_rate(bumped(values, head, -step)) > hmir


@given(log_quality())
def test_hmir_is_the_least_of_the_three_means(values: Array) -> None:
    hmir = harmonic_mean_improvement_rate(to_torch(values)).numpy()
    floored = rates(values)
    geometric = np.exp(np.log(floored).mean(axis=-1))
    assert (hmir <= geometric * (1 + 1e-12)).all()
    assert (geometric <= floored.mean(axis=-1) * (1 + 1e-12)).all()
    # Governed by the least improved modality.
    least, count = floored.min(axis=-1), floored.shape[-1]
    assert (hmir >= least * (1 - 1e-12)).all()
    assert (hmir <= count * least * (1 + 1e-12)).all()


@given(gains())
def test_one_plus_hmir_is_at_most_gmr(values: Array) -> None:
    hmir = harmonic_mean_improvement_rate(to_torch(values)).item()
    gmr = geometric_mean_ratio(to_torch(values)).item()
    assert 1 + hmir <= gmr * (1 + 1e-12)
    assume(np.ptp(values[1:]) > 0.0625)
    assert 1 + hmir < gmr * (1 - 1e-5)


@given(reals(0.125, 3), st.integers(1, 8))
def test_one_plus_hmir_is_gmr_when_all_rates_are_equal(lag: float, count: int) -> None:
    values = torch.tensor([0.0] + [-lag] * count, dtype=torch.float64)
    assert_allclose(
        1 + harmonic_mean_improvement_rate(values), geometric_mean_ratio(values), rtol=1e-12
    )
    assert_allclose(balance_factor(values), 0.0, atol=1e-12)
    assert_allclose(modality_coefficients(values), np.ones(count), rtol=1e-12)


@given(log_quality())
def test_balance_lies_in_the_unit_interval(values: Array) -> None:
    share = balance_factor(to_torch(values))
    assert ((share >= 0) & (share <= 1)).all()


@given(gains())
def test_imbalance_is_seen(values: Array) -> None:
    assume(np.ptp(values[1:]) > 0.0625)
    assert balance_factor(to_torch(values)) > 1e-5


@given(gains(), reals(0.5, 4))
def test_balance_grows_as_the_weakest_modality_falls_behind(values: Array, step: float) -> None:
    weakest = 1 + int(values[1:].argmin())
    assume(len(values) > 2)
    assert balance_factor(bumped(values, weakest, -step)) > balance_factor(to_torch(values))


@given(log_quality(), reals(0.25, 4))
def test_weights_sum_to_one(values: Array, temperature: float) -> None:
    alpha = modality_weights(to_torch(values), temperature)
    assert (alpha > 0).all()
    assert_allclose(alpha.sum(dim=-1), np.ones(values.shape[:-1]), rtol=1e-12)


@given(log_quality(), reals(0, 2))
def test_weights_follow_the_lag_up_to_the_cap(values: Array, cap: float) -> None:
    """Of two modalities the one further behind has more, until both are past the cap."""
    alpha = modality_weights(to_torch(values), cap=cap).numpy()
    lag = values[..., :1] - values[..., 1:]
    ahead, behind = lag[..., :, None], lag[..., None, :]
    gap = alpha[..., None, :] - alpha[..., :, None]
    assert (gap[(behind >= ahead)] >= -1e-15).all()
    assert (gap[(behind > ahead + 1e-3) & (ahead < cap - 1e-3)] > 0).all()
    assert (np.abs(gap[(behind >= cap) & (ahead >= cap)]) <= 1e-15).all()


@given(gains(), reals(1.0, 8), st.data())
def test_a_modality_past_the_cap_gains_nothing_by_falling_further(
    values: Array, step: float, data: st.DataObject
) -> None:
    head = data.draw(st.integers(1, len(values) - 1))
    capped = bumped(values, head, -1.0)
    further = bumped(values, head, -1.0 - step)
    assert_allclose(modality_weights(further), modality_weights(capped), rtol=1e-12)


@given(gains(), reals(0.25, 2))
def test_a_larger_temperature_is_more_uniform(values: Array, temperature: float) -> None:
    sharp = modality_weights(to_torch(values), temperature)
    soft = modality_weights(to_torch(values), 2 * temperature)
    assert soft.max() <= sharp.max() + 1e-12
    assume(np.ptp(np.minimum(values[0] - values[1:], 1.0)) > 0.0625)
    assert soft.max() < sharp.max()


@given(log_quality())
def test_coefficients_have_mean_one(values: Array) -> None:
    coefficients = modality_coefficients(to_torch(values))
    assert (coefficients >= 0).all()
    assert_allclose(coefficients.mean(dim=-1), np.ones(values.shape[:-1]), rtol=1e-12)


@given(log_quality())
def test_coefficients_order_the_modalities_as_the_weights_do(values: Array) -> None:
    alpha = modality_weights(to_torch(values)).numpy()
    coefficients = modality_coefficients(to_torch(values)).numpy()
    larger = alpha[..., :, None] > alpha[..., None, :]
    assert (coefficients[..., :, None] - coefficients[..., None, :])[larger].min(
        initial=0
    ) >= -1e-12


@given(arrays(4, reals(-8, 2)), st.integers(2, 6), reals(0, 2))
def test_quality_grows_from_chance_to_certainty(values: Array, classes: int, step: float) -> None:
    chance = -math.log(classes)
    before, after = (quality(to_torch(x), classes).numpy() for x in (values, values + step))
    assert ((before >= 0) & (before <= 1)).all()
    assert (after >= before).all()
    assert (before[values <= chance - 1e-9] == 0).all()
    assert (before[values >= 0] == 1).all()
    assert ((before > 0) == (values > chance))[np.abs(values - chance) > 1e-9].all()


@given(arrays((2, 3), reals(-8, 2)))
def test_one_class_teaches_nothing(values: Array) -> None:
    assert torch.equal(quality(to_torch(values), 1), torch.zeros(2, 3, dtype=torch.float64))


@given(log_quality(), st.data())
def test_redundancy_is_the_share_of_what_is_learnt_that_needs_no_fusion(
    values: Array, data: st.DataObject
) -> None:
    learnt = data.draw(arrays(values.shape[:-1], reals(0, 1)))
    share = redundancy(to_torch(values), to_torch(learnt))
    assert_allclose(share, ref.redundancy(values, learnt), rtol=1e-12, atol=1e-300)
    assert (share >= 0).all()
    assert (share <= to_torch(learnt)).all()
    assert not redundancy(to_torch(values), to_torch(0.0 * learnt)).any()
    values[..., 1:] = values[..., :1]  # fusion adds nothing
    full = redundancy(to_torch(values), to_torch(learnt))
    assert_allclose(full, learnt / (1.0 + EPS) ** 4, rtol=1e-12, atol=1e-300)


@given(log_quality(), st.data())
def test_what_is_known_by_heart_is_not_redundant(values: Array, data: st.DataObject) -> None:
    learnt = data.draw(arrays(values.shape[:-1], reals(0, 1)))
    shown = data.draw(arrays(values.shape[-1:], reals(0, 1)))
    trained = redundancy(to_torch(values), to_torch(learnt))
    share = redundancy(to_torch(values), to_torch(learnt), to_torch(shown))
    assert_allclose(share, ref.redundancy(values, learnt, shown), rtol=1e-12, atol=1e-300)
    assert (share <= trained).all()
    unknown = redundancy(to_torch(values), to_torch(learnt), to_torch(0.0 * shown))
    assert_allclose(unknown, trained.clamp_max((1.0 + EPS) ** -4), rtol=1e-12)
    # Whatever the training set says: fusion alone has skill, so that nothing is redundant.
    alone = torch.zeros(shown.shape, dtype=torch.float64)
    alone[0] = 1.0
    assert (redundancy(to_torch(values), to_torch(learnt), alone) <= 0.02 + 1e-12).all()


@given(gains(), reals(0.125, 2))
def test_redundancy_falls_as_the_fusion_gets_ahead(values: Array, step: float) -> None:
    ahead = values.copy()
    ahead[0] += step
    before, after = (redundancy(to_torch(x), torch.tensor(0.5).double()) for x in (values, ahead))
    assert after < before


@given(st.integers(1, 8).flatmap(lambda m: arrays(m, reals(0, 1))))
def test_the_weakest_modality_is_augmented_in_full_and_others_less(values: Array) -> None:
    augmented = augmentation_rates(to_torch(values)).numpy()
    assert ((augmented > 0) & (augmented <= 1)).all()
    assert (augmented[values == values.min()] == 1).all()
    order = values.argsort()
    assert (np.diff(augmented[order]) <= 0).all()


# Examples.


def test_two_modalities_at_ratios_two_and_four() -> None:
    log_q = torch.tensor([0.8, 0.4, 0.2], dtype=torch.float64).log()
    assert_allclose(geometric_mean_ratio(log_q), 2.8284271247461903, rtol=1e-12)
    assert_allclose(harmonic_mean_improvement_rate(log_q), 1.5, rtol=1e-12)
    assert_allclose(balance_factor(log_q), 0.1161165235168156, rtol=1e-12)
    assert_allclose(modality_weights(log_q), [0.4238831152341709, 0.5761168847658291], rtol=1e-12)


def test_one_dominating_modality_is_all_imbalance() -> None:
    assert balance_factor(torch.tensor([0.5, 0.0, -1e4])) == 1.0


@pytest.mark.parametrize("name", [f.__name__ for f in SCALARS + VECTORS])
def test_no_modality_is_an_error(name: str) -> None:
    for shape in [(1,), (3, 1)]:
        with pytest.raises(ValueError, match="modalit"):
            getattr(modality, name)(torch.zeros(shape))


def test_no_modality_to_augment_is_an_error() -> None:
    with pytest.raises(ValueError, match="modalit"):
        augmentation_rates(torch.zeros(0))


def test_quality_needs_no_modality() -> None:
    assert quality(torch.tensor([-math.log(2.0)]), 4).tolist() == [0.5]


@given(arrays(4, reals(0, 1)), reals(0, 1))
def test_skill_is_what_chance_does_not_explain(hits: Array, chance: float) -> None:
    found = skill(to_torch(hits), chance).numpy()
    assert_allclose(found, ref.skill(hits, chance), rtol=1e-9, atol=1e-12)
    assert_allclose(skill(to_torch(hits), to_torch(np.full(4, chance))), found, rtol=1e-12)
    assert ((found >= 0) & (found <= 1)).all()
    assert (found[hits <= chance] == 0).all()
    if chance < 0.99:
        assert_allclose(skill(torch.ones(1), chance), 1.0)


@given(st.integers(1, 4).flatmap(lambda h: arrays((h, 3, 5), reals(-9, 9))), reals(0, 1), st.data())
def test_what_a_pool_expects_is_the_slope_of_its_likelihood(
    logits: Array, shared: float, data: Any
) -> None:
    """The target's log-likelihood under a head, less what is expected, by the head's weight."""
    heads, batch = logits.shape[:2]
    weight = data.draw(arrays(heads, reals(0.03125, 2)))
    mask = data.draw(head_presence(heads, batch))
    if mask is not None:
        logits = np.where(mask[..., None], logits, np.nan)
    present = None if mask is None else torch.from_numpy(mask)
    w, part = to_torch(weight).requires_grad_(), to_torch(shared)
    found = expected_log_likelihood(to_torch(logits), w, part, present).detach()
    wanted = ref.expected_log_likelihood(logits, weight, shared, mask)
    assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)

    log_probs = to_torch(logits).log_softmax(dim=2)
    if present is not None:
        assert (found[~present] == 0).all()
        log_probs = torch.where(present.unsqueeze(2), log_probs, 0.0)
    target = torch.arange(batch)
    nll = -log_probs[:, target, target]
    slopes = logit_slopes(nll, found, part, present)
    if present is not None:
        slopes = torch.where(present, slopes, 0.0)
    wanted = ref.logit_slopes(nll.numpy(), wanted, shared, mask)
    assert_allclose(slopes, wanted, rtol=1e-9, atol=1e-9)
    head = log_probs[0] - part * log_probs[1:].sum(dim=0)
    pooled = torch.einsum("h,hbc->bc", w, torch.cat([head.unsqueeze(0), log_probs[1:]]))
    (slope,) = torch.autograd.grad(F.cross_entropy(pooled, target, reduction="sum"), w)
    assert_allclose(slopes.sum(dim=1), slope, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_pool_takes_any_layout(order: tuple[int, int, int], masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    back = [order.index(k) for k in range(3)]
    logits = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    logits = logits.permute(order).contiguous().permute(back)
    present = None
    if masked:  # as a user's mask [B, M + 1], transposed
        present = torch.tensor([[True, k % 2 == 0, k < 2] for k in range(4)]).t()
    weight, shared = torch.tensor([1.0, 0.4, 0.7]), torch.tensor(0.6)
    mask = None if present is None else present.numpy()
    found = expected_log_likelihood(logits, weight, shared, present)
    wanted = ref.expected_log_likelihood(logits.numpy(), weight, float(shared), mask)
    assert_allclose(found, wanted, rtol=1e-6)
    slopes = logit_slopes(logits[..., 0].abs(), found, shared, present)
    wanted = ref.logit_slopes(logits[..., 0].abs().numpy(), wanted, float(shared), mask)
    if present is not None:
        slopes = torch.where(present, slopes, 0.0)
    assert_allclose(slopes, wanted, rtol=1e-6, atol=1e-12)


def test_a_pool_takes_classes_ruled_out() -> None:
    logits = torch.tensor([[[0.0, 0.0, -math.inf]], [[0.0, -math.inf, 0.0]]])
    for found, none in (
        (ref.expected_log_likelihood, np.zeros(())),
        (expected_log_likelihood, torch.zeros(())),
    ):
        assert_allclose(found(logits, torch.ones(2), none), [[-math.log(2)]] * 2, rtol=1e-6)
        apart = found(torch.stack([logits[0, :, 1:], logits[1, :, 1:]]), torch.ones(2), none)
        assert_allclose(apart, [[-50.0]] * 2, rtol=1e-6)  # no class is left
        large = found(torch.tensor([[[3e38, 0.0]]] * 3), torch.full((3,), 2.0), none)
        assert_array_equal(np.asarray(large, dtype=np.float32), [[0.0]] * 3)


@given(
    arrays(4, reals(0.03125, 2)),
    arrays(4, reals(0, 1)),
    arrays(4, reals(0, 9)),
    arrays(4, reals(0, 9)),
    reals(0, 1e4),
)
def test_logits_weigh_what_the_samples_held_out_say(
    weight: Array, skills: Array, nll: Array, lost: Array, samples: float
) -> None:
    arguments = [to_torch(x) for x in (weight, skills, nll - lost)]
    found = logit_weights(*arguments, samples).numpy()
    goal = ref.logit_weights(weight, skills, nll - lost, samples)
    assert_allclose(found, goal, rtol=1e-9, atol=1e-12)
    assert ((found >= 0.02) & (found <= 2.0)).all()
    assert_allclose(logit_weights(*arguments, 0.0), np.maximum(skills, 0.02))  # nobody to ask
    # No less than the skill, or than before, where labels are likelier than expected.
    assert (found >= np.minimum(skills, weight) - 1e-9)[nll <= lost].all()
    assert (found <= np.maximum(skills, weight) + 1e-9)[nll >= lost].all()


def test_the_weights_of_logits_find_the_best_pool() -> None:
    """One head tells all, a second repeats it three times too sure, a third knows nothing."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 5, generator=generator)
    target = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)
    noise = 3.0 * torch.randn(20_000, 5, generator=generator)
    heads = torch.stack([logits, 3.0 * logits, noise])
    nll = -heads.log_softmax(dim=2)[:, torch.arange(20_000), target].mean(dim=1)
    weight, skills = torch.ones(3), torch.tensor([0.5, 0.5, 0.0])
    for _ in range(400):
        expected = expected_log_likelihood(heads, weight, torch.zeros(())).mean(dim=1)
        weight.lerp_(logit_weights(weight, skills, nll + expected, 20_000), 0.05)
    assert_allclose(weight[0] + 3.0 * weight[1], 1.0, atol=0.05)  # together as sure as they may be
    assert weight[2] < 0.03


@given(arrays(5, reals(0.03125, 2)))
def test_logits_of_modalities_count_next_to_the_fused_ones(weight: Array) -> None:
    found = relative_logit_weights(to_torch(weight)).numpy()
    assert_allclose(found, ref.relative_logit_weights(weight), rtol=1e-12)
    assert ((found > 0) & (found <= 2)).all()
    assert_allclose(relative_logit_weights(to_torch(0.5 * weight)), found, rtol=1e-12)


def test_where_there_is_one_class_there_is_no_skill() -> None:
    assert skill(torch.ones(2), 1.0).tolist() == [0.0, 0.0]
    assert_allclose(skill(torch.ones(1).double(), 1.0 - 5e-4), 0.5, rtol=1e-9)  # a rare miss
    with torch.device("meta"):
        assert skill(torch.ones(1, device="cpu"), 0.25).item() == 1.0


@given(st.integers(1, 6).flatmap(lambda m: arrays(m, st.just(0.0) | reals(0, 1))))
def test_trust_is_the_skill_or_whole_where_none_is_known(skills: Array) -> None:
    found = trust(to_torch(skills)).numpy()
    assert_allclose(found, ref.trust(skills), rtol=1e-12)
    assert found.min() >= 0.02
    assert (found[skills > 0.02] == skills[skills > 0.02]).all()
    assert skills.any() or (found == 1).all()


@given(
    st.integers(1, 6).flatmap(lambda m: arrays(m, st.just(0.0) | reals(0, 1))),
    st.sampled_from([0.0, 3.0, 20.0, 1e6]),
)
def test_skills_are_pooled_the_less_the_more_samples_there_are(
    skills: Array, samples: float
) -> None:
    found = pooled_skill(to_torch(skills), samples).numpy()
    assert_allclose(found, ref.pooled_skill(skills, samples), rtol=1e-12, atol=1e-15)
    assert_allclose(found.mean(), skills.mean(), rtol=1e-9, atol=1e-12)
    own = {0.0: 0.0, 3.0: 3.0 / 23.0, 20.0: 0.5, 1e6: 1e6 / (1e6 + 20)}[samples]
    assert_allclose(np.ptp(found), own * np.ptp(skills), rtol=1e-9, atol=1e-12)
    assert (np.diff(found[np.argsort(skills)]) >= -1e-15).all()  # never less for more skill


@given(st.integers(1, 6).flatmap(lambda h: arrays(h, st.just(0.0) | reals(0, 1))))
def test_witnesses_are_the_fused_head_and_able_modalities(skills: Array) -> None:
    found = witnesses(to_torch(skills)).numpy()
    assert (found == ref.witnesses(skills)).all()
    assert found[0]
    if len(skills) > 1:
        assert found[1:].any()
        assert found[1:][skills[1:] >= 0.501 * skills[1:].max()].all()
        assert not found[1:][skills[1:] < 0.499 * skills[1:].max()].any()


@given(arrays((4,), reals(0, 1)), st.sampled_from([1.0, 0.3, 0.05]), st.booleans())
def test_losses_count_as_far_as_modalities_know_what_fusion_does(
    skills: Array, scale: float, hopeless: bool
) -> None:
    skills *= scale
    if hopeless:
        skills[0] = 0.0
    found = loss_shares(to_torch(skills)).numpy()
    assert_allclose(found, ref.loss_shares(skills), rtol=1e-12)
    assert found.min() >= 0.1
    assert (np.diff(found[np.argsort(skills[1:])]) >= 0).all()  # never less for more skill
    best = skills.max()
    full = 1.0 if best == 0 else max(0.1, min(1.0, 3 * best) ** 2)
    assert_allclose(found[skills[1:] >= skills[0]], full, rtol=1e-12)
    if skills[0] > 1e-3:
        assert (found[skills[1:] == 0] == 0.1).all()
        if best > 0.667:  # half of it is still a third
            assert_allclose(loss_shares(to_torch(0.5 * skills)), found, rtol=1e-9)


def test_losses_count_little_before_any_head_has_learnt_much() -> None:
    skills = (0.0, 1e-3, 0.1, 0.2, 0.3, 0.334)
    for shares in (ref.loss_shares, loss_shares):
        found = [shares(torch.full((3,), skill))[0] for skill in skills]
        assert_allclose(found, [1, 0.1, 0.1, 0.36, 0.81, 1], rtol=1e-6)
        assert_allclose(shares(torch.tensor([0.2, 0.2, 0.9])), [1, 1])  # whichever head it is


def test_loss_shares_need_a_modality() -> None:
    for shares in (ref.loss_shares, loss_shares):
        with pytest.raises(ValueError, match="at least 1 modality"):
            shares(torch.ones(1))


@given(arrays((4,), reals(0, 1)), reals(0.125, 1))
def test_modalities_compare_with_the_best_one(skills: Array, scale: float) -> None:
    found = standing(to_torch(skills)).numpy()
    assert_allclose(found, ref.standing(skills), rtol=1e-12)
    assert (found[2 * skills >= skills.max()] == 1).all()
    assert ((found >= 0) & (found <= 1)).all()
    assert (np.diff(found[np.argsort(skills)]) >= 0).all()
    if skills.max() > 1e-3:
        assert (found[skills == 0] == 0).all()
        assert_allclose(standing(to_torch(scale * skills)), found, rtol=1e-9)


def test_standing_needs_a_modality() -> None:
    for found in (ref.standing, standing):
        with pytest.raises(ValueError, match="at least 1 modality"):
            found(torch.ones(0))


@given(arrays((2, 5), reals(0, 1)))
def test_what_is_learnt_counts_as_far_as_it_holds(qualities: Array) -> None:
    held_out, trained = qualities
    found = generalisation(to_torch(held_out), to_torch(trained)).numpy()
    assert_allclose(found, ref.generalisation(held_out, trained), rtol=1e-12)
    assert (found[held_out >= trained] == 1).all()
    assert (found[held_out < trained - 1e-9] < 1).all()
    better = generalisation(to_torch(np.minimum(1, held_out + 0.1)), to_torch(trained)).numpy()
    assert (better >= found).all()
    by_heart = generalisation(torch.zeros(1), torch.ones(1))
    assert_allclose(by_heart, (0.1 / 1.1) ** 4, rtol=1e-6)
