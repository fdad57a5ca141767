from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from strategies import (
    Array,
    Mask,
    arrays,
    batch_sizes,
    class_counts,
    gate_inputs,
    logits,
    presence,
    probabilities,
    reals,
    to_torch,
    upcast,
    with_nan,
)
from torch import Tensor

from dyncim_core import reference as ref
from dyncim_core.gates import (
    disagreement,
    evenness,
    log_prior,
    novelty,
    novelty_penalty,
    relative_gates,
    reliability_gates,
)

TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 5e-2,
    torch.float16: 5e-3,
}

all_dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


class Panel(NamedTuple):
    """Predictions ``[M, B, C]``, NaN where absent, skills ``[M]`` and the mask ``[M, B]``."""

    probs: Array
    skill: Array | None
    present: Mask | None


@st.composite
def panels(draw: st.DrawFn, min_modalities: int = 1) -> Panel:
    modalities, batch = draw(st.integers(min_modalities, 8)), draw(batch_sizes)
    present = draw(presence(modalities, batch))
    probs = with_nan(draw(probabilities(modalities, batch, draw(class_counts))), present)
    skill = draw(st.none() | arrays(modalities, st.sampled_from([0.0, 1.0]) | reals(0, 1)))
    return Panel(probs, skill, present)


def measured(case: Panel, dtype: torch.dtype = torch.float64) -> Tensor:
    return disagreement(*(to_torch(x, dtype) for x in case))


def thresholds(modalities: int) -> st.SearchStrategy[float]:
    """In [0, 1 / M), clear of the upper end, where rounding decides."""
    return st.just(0.0) | reals(0, 1).map(lambda share: 0.99 * share / modalities)


gate_cases = gate_inputs().flatmap(
    lambda case: st.tuples(st.just(case[0]), st.just(case[1]), thresholds(len(case[0])))
)


def gated(values: Array, present: Mask | None, threshold: float) -> Array:
    return reliability_gates(to_torch(values), to_torch(present), threshold).numpy()


# Agreement with the reference, in the values that the dtype holds.


@all_dtypes
@given(panels())
def test_disagreement_agrees_with_the_reference(dtype: torch.dtype, case: Panel) -> None:
    actual = measured(case, dtype)
    expected = ref.disagreement(*(upcast(to_torch(x, dtype)) for x in case))
    assert actual.dtype == dtype
    tolerance = TOLERANCES[dtype]
    assert_allclose(upcast(actual), expected, rtol=tolerance, atol=tolerance)


@all_dtypes
@given(gate_inputs())
def test_gates_agree_with_the_reference(
    dtype: torch.dtype, case: tuple[Array, Mask | None]
) -> None:
    values, present = to_torch(case[0], dtype), to_torch(case[1])
    actual = reliability_gates(values, present)
    expected = ref.reliability_gates(upcast(values), case[1])
    assert actual.dtype == dtype
    tolerance = TOLERANCES[dtype]
    assert_allclose(upcast(actual), expected, rtol=tolerance, atol=tolerance)


@given(gate_cases)
def test_cut_gates_agree_with_the_reference(case: tuple[Array, Mask | None, float]) -> None:
    uncut = ref.reliability_gates(*case[:2])
    if (np.abs(uncut - case[2]) < 1e-9).any():
        return  # rounding decides which side of the threshold it falls on
    assert_allclose(gated(*case), ref.reliability_gates(*case), rtol=1e-12, atol=1e-12)


# Disagreement.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(panels())
def test_disagreement_lies_in_the_unit_interval(dtype: torch.dtype, case: Panel) -> None:
    apart = measured(case, dtype)
    assert ((apart >= 0) & (apart <= 1)).all()


@given(panels())
def test_disagreement_needs_two(case: Panel) -> None:
    if case.present is None:
        comparable = np.full(case.probs.shape[:2], len(case.probs) > 1)
    else:
        comparable = case.present & (case.present.sum(axis=0) > 1)
    assert (measured(case).numpy()[~comparable] == 0).all()


@given(panels(), reals(-8, 8))
def test_disagreement_ignores_absent_entries(case: Panel, filler: float) -> None:
    if case.present is not None:
        filled = np.where(case.present[..., None], case.probs, filler)
        assert torch.equal(measured(case), measured(case._replace(probs=filled)))
    for i in range(case.probs.shape[1]):
        kept = slice(None) if case.present is None else case.present[:, i]
        if not len(case.probs[kept]):
            continue
        skill = None
        if case.skill is not None and case.skill.any():  # who is there may have none
            skill = np.maximum(case.skill, 0.02)[kept]
        alone = measured(Panel(case.probs[kept][:, [i]], skill, None))[:, 0]
        if skill is not None:  # they are still compared with those that are not there
            alone = np.asarray(alone) * (ref.standing(case.skill)[kept] / ref.standing(skill)) ** 2
        assert_allclose(alone, measured(case)[kept, i], rtol=1e-9, atol=1e-12)


@given(panels(), st.randoms(use_true_random=False))
def test_disagreement_follows_a_reordering(case: Panel, random: Any) -> None:
    order = list(range(len(case.probs)))
    random.shuffle(order)
    shuffled = Panel(*(None if x is None else x[order] for x in case))
    assert_allclose(measured(shuffled), measured(case)[order], rtol=1e-9, atol=1e-12)


@given(
    st.integers(1, 6).flatmap(lambda c: probabilities(2, c)),
    st.integers(2, 8).flatmap(lambda m: arrays(m, reals(0, 1))),
)
def test_modalities_that_agree_do_not_disagree(shared: Array, quality: Array) -> None:
    probs = np.broadcast_to(shared, (len(quality), *shared.shape))
    assert_allclose(measured(Panel(probs, quality, None)), np.zeros(probs.shape[:2]), atol=1e-9)


@given(panels(min_modalities=2), reals(0.25, 1))
def test_others_contradict_as_far_as_they_have_skill(case: Panel, scale: float) -> None:
    skill = np.ones(len(case.probs)) if case.skill is None else 0.1 + 0.9 * case.skill
    less = measured(case._replace(skill=scale * skill))
    whole = measured(case._replace(skill=skill))
    assert_allclose(less, scale * whole, rtol=1e-9, atol=1e-12)


@given(panels(), st.sampled_from([0.0, 1.0]))
def test_no_skill_known_is_all_the_skill(case: Panel, level: float) -> None:
    uniform = measured(case._replace(skill=np.full(len(case.probs), level)))
    assert_allclose(measured(case._replace(skill=None)), uniform, rtol=1e-9, atol=1e-12)


@given(st.integers(2, 6).flatmap(lambda c: probabilities(3, 3, c)), arrays(3, reals(0, 1)))
def test_two_modalities_outvote_nobody(probs: Array, skill: Array) -> None:
    assert not measured(Panel(probs[:2], skill[:2], None)).any()
    present = np.ones((3, 3), dtype=bool)
    present[1] = False
    assert not measured(Panel(probs, skill, present)).any()


@given(st.integers(2, 6).flatmap(lambda c: probabilities(2, 3, c)), arrays(3, reals(0, 1)))
def test_two_that_agree_are_a_consensus_as_far_as_they_have_skill(
    probs: Array, skill: Array
) -> None:
    both, odd = probs
    apart = measured(Panel(np.stack([both, both, odd]), skill, None))
    squared = np.square(both - odd).sum(axis=-1) / 2
    trust = ref.trust(skill)[:2]
    behind = (trust**2).sum() / trust.sum()
    behind *= ref.standing(skill)[2] ** 2
    assert_allclose(apart[2], squared * both.max(axis=-1) * behind, rtol=1e-9, atol=1e-12)


def test_the_better_modality_carries_the_consensus() -> None:
    """What the first and third hear from the others changes with skill, alone it would not."""
    probs = np.array([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
    apart = measured(Panel(probs, np.array([0.3, 0.9, 0.3]), None))
    able = (2 / 3) ** 2  # of the first and third
    expected = [0.0625 * 0.75 * 0.75 * able, 0.25 * 0.5 * 0.3, 0.75 * able]
    assert_allclose(apart[:, 0], expected, rtol=1e-12)
    alike = measured(Panel(probs, None, None))
    assert_allclose(alike[:, 0], [0.25 * 0.5, 0.25 * 0.5, 1.0], rtol=1e-12)


def test_what_tells_nothing_by_itself_is_not_contradicted() -> None:
    probs = np.array([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
    apart = measured(Panel(probs, np.array([0.8, 0.4, 0.0]), None))[:, 0]
    assert apart[2] == 0
    assert apart[0] > 0  # by one that has no say in it, and by one of no skill, a little
    weak = measured(Panel(probs, np.array([0.8, 0.4, 0.2]), None))[2, 0]
    assert_allclose(weak, 0.25 * measured(Panel(probs, np.array([0.8, 0.4, 0.4]), None))[2, 0])


def test_others_that_are_unsure_contradict_nobody_much() -> None:
    certain, unsure = np.array([[1.0, 0.0, 0.0, 0.0]]), np.full((1, 4), 0.25)
    towards_unsure = measured(Panel(np.stack([certain, unsure]), None, None))[0]
    towards_certain = measured(Panel(np.stack([unsure, certain]), None, None))[0]
    assert_allclose(towards_certain, 4 * towards_unsure, rtol=1e-12)


@all_dtypes
def test_one_good_modality_does_not_drown_the_consensus_of_the_rest(dtype: torch.dtype) -> None:
    """The first hears from two modalities at the floor, which agree with each other.

    Taking its own share out of the sum of all would leave rounding errors in their place.
    """
    probs = np.array([[[0.5, 0.5]], [[1.0, 0.0]], [[1.0, 0.0]]])
    apart = measured(Panel(probs, np.array([1.0, 0.0, 0.0]), None), dtype)
    assert_allclose(upcast(apart)[0, 0], 0.25 * 0.02, rtol=TOLERANCES[dtype])


# Gates.


@all_dtypes
@given(gate_cases)
def test_gates_are_shares(dtype: torch.dtype, case: tuple[Array, Mask | None, float]) -> None:
    values, present, threshold = case
    gates = reliability_gates(to_torch(values, dtype), to_torch(present), threshold)
    tolerance = TOLERANCES[dtype]
    assert ((gates >= 0) & (gates <= 1 + tolerance)).all()
    someone = np.ones(values.shape[1]) if present is None else present.any(axis=0)
    assert_allclose(upcast(gates).sum(axis=0), someone, atol=tolerance)
    if present is not None:
        assert (gates[~to_torch(present)] == 0).all()
        assert (gates[:, ~to_torch(present).any(dim=0)] == 0).all()


@given(gate_cases)
def test_gates_below_the_threshold_are_cut_and_the_rest_keep_their_ratios(
    case: tuple[Array, Mask | None, float],
) -> None:
    values, present, threshold = case
    uncut, cut = gated(values, present, 0.0), gated(*case)
    assert (cut[uncut < threshold] == 0).all()
    kept = (uncut >= threshold) & (uncut > 0)
    assert (cut[kept] >= uncut[kept] * (1 - 1e-12)).all()
    total = np.where(kept, uncut, 0.0).sum(axis=0)
    assert_allclose(cut * total, np.where(kept, uncut, 0.0), rtol=1e-12, atol=1e-300)


@given(gate_cases, reals(-100, 100))
def test_gates_ignore_absent_entries(case: tuple[Array, Mask | None, float], filler: float) -> None:
    values, present, threshold = case
    gates = gated(*case)
    if present is not None:
        assert (gated(np.where(present, values, filler), present, threshold) == gates).all()
    for i in range(values.shape[1]):
        kept = slice(None) if present is None else present[:, i]
        if len(values[kept]):
            alone = gated(values[kept][:, [i]], None, threshold)[:, 0]
            assert_allclose(alone, gates[kept, i], rtol=1e-12, atol=1e-15)


@given(gate_cases, st.randoms(use_true_random=False))
def test_gates_follow_a_reordering(case: tuple[Array, Mask | None, float], random: Any) -> None:
    values, present, threshold = case
    order = list(range(len(values)))
    random.shuffle(order)
    uncut = ref.reliability_gates(values, present)
    if (np.abs(uncut - threshold) < 1e-9).any():
        threshold = 0.0  # rounding decides which side of the threshold it falls on
    shuffled = gated(values[order], None if present is None else present[order], threshold)
    assert_allclose(shuffled, gated(values, present, threshold)[order], rtol=1e-12, atol=1e-300)


@given(gate_inputs(), reals(-100, 100))
def test_a_shift_of_all_logits_does_not_matter(
    case: tuple[Array, Mask | None], shift: float
) -> None:
    values, present = case
    assert_allclose(
        gated(values + shift, present, 0.0), gated(values, present, 0.0), rtol=1e-9, atol=1e-300
    )


@given(st.integers(2, 8).flatmap(lambda m: logits(m, 2)), reals(0.25, 4))
def test_a_raised_logit_takes_from_the_others(values: Array, step: float) -> None:
    raised = values.copy()
    raised[0] += step
    before, after = gated(values, None, 0.0), gated(raised, None, 0.0)
    assert (after[0] >= before[0]).all()
    assert (after[1:] <= before[1:]).all()
    shared = (before[0] > 1e-6) & (before[0] < 1 - 1e-6)
    assert (after[0] > before[0])[shared].all()


@given(gate_inputs())
def test_equal_logits_share_alike(case: tuple[Array, Mask | None]) -> None:
    values, present = case
    gates = gated(np.ones_like(values), present, 0.0)
    mask = np.ones_like(values, dtype=bool) if present is None else present
    assert_allclose(gates, mask / np.maximum(mask.sum(axis=0), 1), rtol=1e-12)


def test_a_cut_gate_goes_to_the_others() -> None:
    shares = torch.tensor([[0.6], [0.3], [0.1]], dtype=torch.float64).log()
    gates = reliability_gates(shares, threshold=0.2)
    assert_allclose(gates, [[2 / 3], [1 / 3], [0.0]], rtol=1e-12)
    # Without the first, the others are 3/4 and 1/4 and none is below the threshold.
    present = torch.tensor([[False], [True], [True]])
    gates = reliability_gates(shares, present, threshold=0.2)
    assert_allclose(gates, [[0.0], [0.75], [0.25]], rtol=1e-12)


def test_a_single_modality_has_everything() -> None:
    assert reliability_gates(torch.tensor([[-1e4, 0.0]]), threshold=0.9).tolist() == [[1.0, 1.0]]
    assert disagreement(torch.tensor([[[0.3, 0.7]]])).tolist() == [[0.0]]


@all_dtypes
@given(gate_inputs())
def test_relative_gates_leave_the_largest_whole(
    dtype: torch.dtype, case: tuple[Array, Mask | None]
) -> None:
    gates = reliability_gates(to_torch(case[0], dtype), to_torch(case[1]))
    scale = relative_gates(gates)
    tolerance = TOLERANCES[dtype]
    assert_allclose(
        upcast(scale), ref.relative_gates(upcast(gates)), rtol=tolerance, atol=tolerance
    )
    assert torch.equal(scale.amax(dim=0) == 1, gates.amax(dim=0) > 0)


@given(arrays(st.integers(1, 50), reals(0, 1e6)), st.sampled_from([torch.float32, torch.float64]))
def test_evenness_is_that_of_the_reference(counts: Array, dtype: torch.dtype) -> None:
    found = evenness(to_torch(counts, dtype))
    assert found.dtype == dtype
    assert_allclose(found, ref.evenness(upcast(to_torch(counts, dtype))), rtol=1e-4)
    assert 0.0 < found <= 1.0


@given(arrays(st.integers(1, 50), reals(0, 1e6)), reals(0.125, 1e3), st.randoms())
def test_evenness_is_of_shares_and_of_classes_that_were_seen(
    counts: Array, scale: float, random: Any
) -> None:
    shuffled = counts.copy()
    random.shuffle(shuffled)
    expected = ref.evenness(counts)
    for other in (
        scale * shuffled,
        np.append(counts, [0.0, np.nan, np.inf, -1.0]),
        np.repeat(counts, 3),
    ):
        assert_allclose(ref.evenness(other), expected, rtol=1e-9)
        assert_allclose(evenness(to_torch(other)), expected, rtol=1e-9)


@given(st.integers(1, 50), reals(0.5, 1e6), reals(1.125, 1e3))
def test_evenness_falls_as_one_class_outnumbers_the_others(
    classes: int, count: float, factor: float
) -> None:
    even = torch.full((classes + 1,), count, dtype=torch.float64)
    assert_allclose(evenness(even), 1.0, rtol=1e-12)
    some, more = even.clone(), even.clone()
    some[0] *= factor
    more[0] *= 2 * factor
    assert evenness(more) < evenness(some) < 1.0


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e20, 1e38])
def test_evenness_of_masses_of_any_size(scale: float) -> None:
    assert_allclose(evenness(torch.tensor([3.0, 1.0]) * scale), 0.4096, rtol=1e-5)


@pytest.mark.parametrize("mass", [[0, 0], [math.nan, math.inf], [-1, 0], [0, 7]], ids=str)
def test_a_single_class_or_none_is_even(mass: list[float]) -> None:
    assert evenness(torch.tensor(mass)) == 1.0
    assert ref.evenness(mass) == 1.0


@given(arrays(st.integers(1, 50), reals(0, 1e6)), st.sampled_from([torch.float32, torch.float64]))
def test_log_prior_is_that_of_the_reference(counts: Array, dtype: torch.dtype) -> None:
    prior = log_prior(to_torch(counts, dtype))
    assert_allclose(prior, ref.log_prior(upcast(to_torch(counts, dtype))), rtol=1e-5, atol=1e-6)
    known = torch.from_numpy(counts).to(dtype) > 0
    assert (prior[~known] == 0).all()
    assert prior.max() == 0
    order = np.argsort(counts, kind="stable")
    assert (prior[order.tolist()][known[order.tolist()]].diff() >= 0).all()


# Novelty.


class Cloud(NamedTuple):
    """Training features ``[N, K]``, some of whose directions may not vary, and others."""

    seen: Array
    others: Array

    def novelty(self, features: Array) -> Array:
        mean, covariance = moments(self.seen)
        found: Array = novelty(*map(to_torch, (features, mean, covariance))).numpy()
        return found


def moments(seen: Array) -> tuple[Array, Array]:
    centred = seen - seen.mean(axis=0)
    return seen.mean(axis=0), centred.T @ centred / len(seen)


@st.composite
def clouds(draw: st.DrawFn) -> Cloud:
    width, rank = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mixing = rng.standard_normal((rank, width)) * 10.0 ** rng.integers(-2, 3, (rank, 1))
    offset = rng.standard_normal(width)
    seen = rng.standard_normal((draw(st.integers(2, 30)), rank)) @ mixing + offset
    return Cloud(seen, 3 * rng.standard_normal((4, width)) * seen.std() + offset)


@given(clouds())
def test_novelty_agrees_with_the_reference(cloud: Cloud) -> None:
    mean, covariance = moments(cloud.seen)
    expected = ref.novelty(cloud.others, mean, covariance)
    assert_allclose(cloud.novelty(cloud.others), expected, rtol=1e-7)
    single = novelty(*(to_torch(x, torch.float32) for x in (cloud.others, mean, covariance)))
    assert_allclose(single, expected, rtol=1e-2, atol=1e-2)


@given(clouds())
def test_novelty_is_one_on_average_where_it_was_learnt(cloud: Cloud) -> None:
    assert_allclose(cloud.novelty(cloud.seen).mean(), 1.0, rtol=1e-7)


@given(clouds(), reals(0.125, 8), st.integers(0, 2**32 - 1))
def test_novelty_does_not_depend_on_origin_scale_and_axes(
    cloud: Cloud, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    width = cloud.seen.shape[1]
    rotation = np.linalg.qr(rng.standard_normal((width, width)))[0]
    shift = rng.standard_normal(width)
    moved = Cloud(*(scale * x @ rotation + shift for x in cloud))
    assert_allclose(moved.novelty(moved.others), cloud.novelty(cloud.others), rtol=1e-5)


@given(clouds(), reals(1, 100))
def test_novelty_grows_with_the_square_of_the_distance(cloud: Cloud, factor: float) -> None:
    mean = cloud.seen.mean(axis=0)
    further = mean + factor * (cloud.others - mean)
    assert_allclose(cloud.novelty(further), factor**2 * cloud.novelty(cloud.others), rtol=1e-6)


@given(clouds(), reals(0.0625, 128))
def test_a_direction_without_variance_counts_as_one_percent_of_the_mean(
    cloud: Cloud, step: float
) -> None:
    """The tighter the training features, the further out is the same step."""
    flat = np.concatenate([cloud.seen, np.zeros((len(cloud.seen), 1))], axis=1)
    mean, covariance = moments(flat)
    aside = np.append(mean[:-1], step)[None]
    width, variance = len(mean), np.trace(covariance) / len(mean)
    expected = step**2 / (0.01 * variance)
    share = np.trace(covariance @ np.linalg.inv(covariance + 0.01 * variance * np.eye(width)))
    assert_allclose(novelty(*map(to_torch, (aside, mean, covariance))), expected / share, rtol=1e-6)


@given(arrays(5, reals(0.0625, 2**20)), reals(0.5, 10))
def test_what_is_within_the_tolerance_costs_nothing(values: Array, tolerance: float) -> None:
    penalty = novelty_penalty(to_torch(values), tolerance).numpy()
    assert_allclose(penalty, ref.novelty_penalty(values, tolerance), rtol=1e-12, atol=1e-15)
    assert ((penalty > 0) == (values > tolerance)).all()
