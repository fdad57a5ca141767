from __future__ import annotations

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
from dyncim_core.gates import disagreement, reliability_gates

TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 5e-2,
    torch.float16: 5e-3,
}

all_dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


class Panel(NamedTuple):
    """Predictions ``[M, B, C]``, NaN where absent, qualities ``[M]`` and the mask ``[M, B]``."""

    probs: Array
    quality: Array | None
    present: Mask | None


@st.composite
def panels(draw: st.DrawFn, min_modalities: int = 1) -> Panel:
    modalities, batch = draw(st.integers(min_modalities, 8)), draw(batch_sizes)
    present = draw(presence(modalities, batch))
    probs = with_nan(draw(probabilities(modalities, batch, draw(class_counts))), present)
    quality = draw(st.none() | arrays(modalities, st.sampled_from([0.0, 1.0]) | reals(0, 1)))
    return Panel(probs, quality, present)


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
        weights = None if case.quality is None else case.quality[kept]
        alone = measured(Panel(case.probs[kept][:, [i]], weights, None))
        assert_allclose(alone[:, 0], measured(case)[kept, i], rtol=1e-9, atol=1e-12)


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
def test_the_scale_of_the_qualities_does_not_matter(case: Panel, scale: float) -> None:
    quality = 0.5 * np.ones(len(case.probs)) if case.quality is None else 0.01 + case.quality
    same = measured(case._replace(quality=scale * quality))
    assert_allclose(same, measured(case._replace(quality=quality)), rtol=1e-9, atol=1e-12)


@given(panels(), reals(2**-7, 1))
def test_no_quality_is_any_uniform_quality(case: Panel, level: float) -> None:
    uniform = measured(case._replace(quality=np.full(len(case.probs), level)))
    assert_allclose(measured(case._replace(quality=None)), uniform, rtol=1e-9, atol=1e-12)


@given(st.integers(2, 6).flatmap(lambda c: probabilities(3, 3, c)), arrays(3, reals(0, 1)))
def test_two_modalities_outvote_nobody(probs: Array, quality: Array) -> None:
    assert not measured(Panel(probs[:2], quality[:2], None)).any()
    present = np.ones((3, 3), dtype=bool)
    present[1] = False
    assert not measured(Panel(probs, quality, present)).any()


@given(st.integers(2, 6).flatmap(lambda c: probabilities(2, 3, c)), arrays(3, reals(0, 1)))
def test_two_that_agree_are_a_consensus_at_any_quality(probs: Array, quality: Array) -> None:
    both, odd = probs
    apart = measured(Panel(np.stack([both, both, odd]), quality, None))
    squared = np.square(both - odd).sum(axis=-1) / 2
    assert_allclose(apart[2], squared * both.max(axis=-1), rtol=1e-9, atol=1e-12)


def test_the_better_modality_carries_the_consensus() -> None:
    """What the first and third hear from the others changes with quality, alone it would not."""
    probs = np.array([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
    apart = measured(Panel(probs, np.array([1.0, 3.0, 1.0]), None))
    assert_allclose(apart[:, 0], [0.0625 * 0.75, 0.25 * 0.5, 1.0], rtol=1e-12)
    alike = measured(Panel(probs, None, None))
    assert_allclose(alike[:, 0], [0.25 * 0.5, 0.25 * 0.5, 1.0], rtol=1e-12)


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
    assert_allclose(upcast(apart)[0, 0], 0.25, rtol=TOLERANCES[dtype])


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
