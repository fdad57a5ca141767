"""The oracle against numbers worked out by hand, and against PyTorch's cross-entropy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from strategies import Heads, heads, reals, to_torch, with_nan

from dyncim_core import reference as ref

LN2 = 0.6931471805599453
LN10 = 2.302585092994046
MINUS_LN09 = 0.10536051565782630  # -log 0.9
ENTROPY_09 = 0.3250829733914482  # of (0.9, 0.1)
NAN = float("nan")

# The fused head gives (1/2, 1/2), the one modality (9/10, 1/10).
HALF = [[0.0, 0.0]]
NINE_TO_ONE = [[2 * 1.0986122886681098, 0.0]]


def test_head_statistics_of_an_index_target() -> None:
    out = ref.head_statistics([HALF, NINE_TO_ONE], [0])
    assert_allclose(out.loss, [[LN2], [MINUS_LN09]], rtol=1e-14)
    assert_allclose(out.nll, [[LN2], [MINUS_LN09]], rtol=1e-14)
    assert_allclose(out.entropy, [[LN2], [ENTROPY_09]], rtol=1e-14)
    assert_allclose(out.distance, [[0.0], [0.4]], rtol=1e-14)


def test_weight_and_smoothing_change_the_loss_alone() -> None:
    # 0.8 * 2 * (-log 0.9) + 0.2 / 2 * (2 * (-log 0.9) + 3 * log 10)
    out = ref.head_statistics([HALF, NINE_TO_ONE], [0], weight=[2.0, 3.0], label_smoothing=0.2)
    assert_allclose(out.loss[1], [0.8804244560823010], rtol=1e-14)
    assert_allclose(out.nll[1], [MINUS_LN09], rtol=1e-14)


def test_head_statistics_of_a_soft_target() -> None:
    # 1/4 * (-log 0.9) + 3/4 * log 10; smoothed by 0.2 the target is (0.3, 0.7).
    out = ref.head_statistics([HALF, NINE_TO_ONE], [[0.25, 0.75]])
    assert_allclose(out.nll, [[LN2], [1.7532789486599908]], rtol=1e-14)
    assert_allclose(out.loss, out.nll, rtol=0)
    out = ref.head_statistics(
        [HALF, NINE_TO_ONE], [[0.25, 0.75]], weight=[2.0, 3.0], label_smoothing=0.2
    )
    assert_allclose(out.loss[1], [4.898645004682192], rtol=1e-14)


def test_an_ignored_sample_keeps_its_entropy_and_distance() -> None:
    out = ref.head_statistics([HALF, NINE_TO_ONE], [7], ignore_index=7, label_smoothing=0.2)
    assert out.loss.tolist() == [[0.0], [0.0]]
    assert out.nll.tolist() == [[0.0], [0.0]]
    assert_allclose(out.entropy, [[LN2], [ENTROPY_09]], rtol=1e-14)
    assert_allclose(out.distance, [[0.0], [0.4]], rtol=1e-14)


def test_an_absent_head_gives_zeros_whatever_it_holds() -> None:
    out = ref.head_statistics([HALF, [[NAN, np.inf]]], [0], present=[[True], [False]])
    for field in out:
        assert field[1].tolist() == [0.0]
    assert_allclose(out.nll[0], [LN2], rtol=1e-14)


def test_probability_zero_costs_nothing_unless_it_was_the_target() -> None:
    impossible = [[0.0, -np.inf, 0.0]]
    out = ref.head_statistics([impossible], [[0.5, 0.0, 0.5]])
    assert_allclose([out.nll, out.entropy], [[[LN2]], [[LN2]]], rtol=1e-14)
    assert ref.head_statistics([impossible], [1]).nll.tolist() == [[np.inf]]


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_out_of_range_is_an_error(label: int) -> None:
    with pytest.raises(IndexError, match="class indices in"):
        ref.head_statistics([HALF], [label])


@given(heads(), st.sampled_from([0.0, 0.1, 1.0]), st.data())
def test_the_loss_is_the_cross_entropy_of_pytorch(
    case: Heads, smoothing: float, data: st.DataObject
) -> None:
    classes = case.logits[0].shape[1]
    weight = np.array(data.draw(st.lists(reals(0.125, 4), min_size=classes, max_size=classes)))
    out = ref.head_statistics(case.logits, case.target, weight=weight, label_smoothing=smoothing)
    for h, head in enumerate(case.logits):
        expected = torch.nn.functional.cross_entropy(
            to_torch(head),
            to_torch(case.target),
            weight=to_torch(weight),
            label_smoothing=smoothing,
            reduction="none",
        )
        assert_allclose(out.loss[h], expected.numpy(), rtol=1e-12, atol=1e-12)


@given(heads())
def test_head_statistics_stay_in_range(case: Heads) -> None:
    masks = [None] * len(case.logits) if case.present is None else list(case.present)
    rows = [with_nan(row, mask) for row, mask in zip(case.logits, masks, strict=True)]
    out = ref.head_statistics(rows, case.target, present=case.present)
    classes = rows[0].shape[1]
    assert (out.loss >= 0).all()
    assert (out.nll >= 0).all()
    assert ((out.entropy >= 0) & (out.entropy <= np.log(classes) + 1e-12)).all()
    assert ((out.distance >= 0) & (out.distance <= 1 + 1e-12)).all()
    assert (out.distance[0] == 0).all()


def test_prediction_deviation() -> None:
    # Probabilities 1/2, 1/4 and 1/8 have geometric mean 1/4.
    nll = [[LN2], [2 * LN2], [3 * LN2]]
    assert_allclose(ref.prediction_deviation(nll), [0.75], rtol=1e-14)
    # Without the last, sqrt(1/8).
    present = [[True], [True], [False]]
    assert_allclose(
        ref.prediction_deviation([[LN2], [2 * LN2], [NAN]], present), [0.6464466094067263]
    )
    # Small deviations keep their digits.
    assert_allclose(ref.prediction_deviation([[1e-20]]), [1e-20], rtol=1e-14)


def test_prediction_consistency() -> None:
    distance = [[0.0, 0.0, 0.0], [0.2, 0.6, NAN], [0.4, NAN, NAN]]
    present = [[True, True, True], [True, True, False], [True, False, False]]
    assert_allclose(ref.prediction_consistency(distance, present), [0.3, 0.6, 0.0], rtol=1e-14)
    assert ref.prediction_consistency([[0.0, 0.0]]).tolist() == [0.0, 0.0]


def test_prediction_stability() -> None:
    entropy = [[LN2, 2 * LN2, 5.0], [NAN, NAN, NAN]]
    assert_allclose(ref.prediction_stability(entropy, 4), [0.5, 1.0, 1.0], rtol=1e-14)
    assert ref.prediction_stability([[0.0]], 1).tolist() == [0.0]


def test_surprise() -> None:
    # Excess over two heads: (3 - 1) log 2 and 0, floored.
    nll, entropy = [[3 * LN2], [0.0]], [[LN2], [LN2]]
    assert_allclose(ref.surprise(nll, entropy), [LN2], rtol=1e-14)
    assert_allclose(
        ref.surprise([[3 * LN2], [NAN]], [[LN2], [NAN]], [[True], [False]]),
        [2 * LN2],
        rtol=1e-14,
    )
    # Entropy counts up to half of log 2, and in full.
    usual = [LN2 / 2, 9.0]
    assert_allclose(ref.surprise(nll, entropy, usual=usual), [1.25 * LN2], rtol=1e-14)
    # 2 log 2 of a weight of 1, 0 of one of 3.
    assert_allclose(ref.surprise(nll, entropy, None, [1.0, 3.0]), [LN2 / 2], rtol=1e-14)
    assert_allclose(
        ref.surprise(nll, entropy, [[True], [False]], [1.0, 3.0]), [2 * LN2], rtol=1e-14
    )


def test_relative_change() -> None:
    change = ref.relative_change([0.3, 0.1, -0.5], [0.2, 0.0, -0.25], eps=0.05)
    assert_allclose(change, [0.4, 2.0, 0.8333333333333334], rtol=1e-14)
    assert_allclose(ref.relative_change([1.0], [0.0]), [1000.0], rtol=1e-14)


def test_volatility_weights() -> None:
    assert ref.volatility_weights([1.0, 1.0, 6.0]).tolist() == [0.125, 0.125, 0.75]
    assert ref.volatility_weights([0.0, 0.0]).tolist() == [0.5, 0.5]


def test_difficulty() -> None:
    signals = [[0.0, 1.0], [1.0, 0.5], [0.5, 0.0]]
    assert ref.difficulty(signals, [0.5, 0.25, 0.25]).tolist() == [0.375, 0.625]


def contradicted(
    prediction: Any, nll: Any, entropy: Any, target: Any, present: Any = None
) -> ref.Array:
    sure = ref.sureness(entropy, 4)
    return ref.contradiction(prediction, ref.doubt(prediction, nll, entropy, target), sure, present)


def test_contradiction() -> None:
    # All agree on a wrong class; on the label; two of three; a lone dissenter is absent;
    # nobody but the fused head is present.
    prediction = [[1, 0, 1, 1, 1], [1, 0, 1, 1, 2], [1, 0, 2, 2, 2]]
    present = [[True] * 5, [True, True, True, True, False], [True, True, True, False, False]]
    # The least surprised is so by log 2 nats, the others by more, and the absent by nothing.
    nll = np.log([[4.0] * 5, [2.0] * 5, [8.0, 8.0, 8.0, 1.0, 1.0]])
    calm = np.zeros((3, 5))
    found = contradicted(prediction, nll, calm, [0, 0, 0, 0, 0], present)
    assert_allclose(found, [0.43, -0.07, 0.0, 0.43 / 80, 0.0], rtol=1e-14)
    assert_allclose(contradicted([[1], [1]], [[1.0], [2.0]], [[0.0], [0.0]], [1]), -0.07 / 80)
    assert contradicted([[1]], [[1.0]], [[0.0]], [0]).tolist() == [0]
    # As unsure as they are surprised; one of them knows half of what there is, one all.
    half = np.log(2.0)
    assert_allclose(contradicted([[1], [1]], [[half], [2.0]], [[half], [0.0]], [0]), -0.035 / 80)
    # Probabilities: by half of 0.6 - 0.3, by nothing, by nobody, who disagree.
    unsure = [[0.6, 0.3, 0.1]] * 3
    found = contradicted([[1, 0, 1], [1, 0, 2]], nll[:2, :3], calm[:2, :3], unsure)
    assert_allclose(found, [(0.15 - 0.07) / 80, -0.07 / 80, 0.0], rtol=1e-12)


def test_sureness() -> None:
    assert_allclose(ref.sureness(np.log([[1.0, 2.0, 4.0]]), 4), [[1.0, 0.5, 0.0]], atol=1e-15)
    assert ref.sureness([0.0], 1).tolist() == [1.0]


def test_doubt() -> None:
    # Surprised by log 4 and log 2 nats beyond what it expects; as unsure as it is, or more.
    nll, entropy = [[4.0, 4.0], [2.0, 1.0]], [[1.0, 2.0], [2.0, 2.0]]
    found = ref.doubt([[1, 1], [1, 1]], np.log(nll), np.log(entropy), [0, 0])
    assert_allclose(found, [[0.75, 0.5], [0.0, 0.0]], rtol=1e-14)
    assert not ref.doubt([[0, 0]], np.log(nll[:1]), np.log(entropy[:1]), [0, 0]).any()
    # Of probabilities, by 0.6 - 0.3, and by nothing.
    unsure = [[0.6, 0.3, 0.1]] * 2
    found = ref.doubt([[1, 0]], np.log(nll[:1]), np.log(entropy[:1]), unsure)
    assert_allclose(found, [[0.75 * 0.3, 0.0]], rtol=1e-14)


def test_seen_noise() -> None:
    # Of 0.4 held out: nothing left, a quarter, half, all, more; modalities tell nothing.
    found = [ref.seen_noise(0.05, c, 0.4, [0.8, 0.0, 0.0]) for c in (0.0, 0.1, 0.2, 0.4, 0.5)]
    assert_allclose(found, [0.05, 0.075, 0.1, 0.05, 0.05], rtol=1e-14)
    assert_allclose(ref.seen_noise(0.0, 0.2, 0.4, [0.8, 0.4, 0.1]), 0.1 / 8, rtol=1e-14)
    for skill in ([0.8, 0.1, 0.9], [0.0, 0.0], [0.8], [0.0, 0.3]):
        assert ref.seen_noise(0.05, 0.2, 0.4, skill) == 0.05
    # Nothing is seen: below 0, unless the fusion is asked, and answers 0.
    assert ref.seen_noise(-0.1, 0.0, 0.0, [0.8, 0.0]) == -0.1
    assert ref.seen_noise(-0.1, 0.2, 0.4, [0.0, 0.0]) == -0.1
    assert ref.seen_noise(-0.1, 0.0, 0.4, [0.8, 0.0]) == 0.0
    assert ref.seen_noise(-0.1, 0.2, 0.4, [0.0, 0.8]) == 0.0
    assert ref.seen_noise(0.5, 0.2, 0.4, [0.8, 0.0]) == 0.5
    assert ref.seen_noise(0.0, 0.0, 0.0, [0.8, 0.0]) == 0


def test_noise_pressure() -> None:
    assert_allclose(ref.noise_pressure([-1, 0.0, 0.0025, 0.01]), [0.0, 0.0, 0.25, 1.0], rtol=1e-14)
    assert_allclose(ref.noise_pressure(0.06, full_at=0.3), 0.2, rtol=1e-14)
    assert_allclose(
        ref.noise_pressure(0.005, [0.0, 0.1, 0.25, 1.0]), [0, 0.2, 0.5, 0.5], rtol=1e-14
    )


def test_log_weights_fall_with_surprise() -> None:
    found = ref.log_weights(
        [0.0, 1.0, NAN],
        [0.5, 0.5, NAN],
        surprise_strength=LN2,
        pacing_strength=1.0,
        valid=[True, True, False],
    )
    assert_allclose(found, [0.0, -LN2, 0.0], rtol=1e-14)


def test_log_weights_fall_with_standardised_difficulty() -> None:
    options = {"surprise_strength": 1.0, "pacing_strength": 2.0}
    assert_allclose(ref.log_weights([0.0, 0.0], [0.2, 0.8], **options), [2.0, -2.0], rtol=1e-13)
    # A deviation of 1e-5 counts as 1e-4: z is -0.1 and 0.1.
    found = ref.log_weights([0.0, 0.0], [0.5, 0.50002], **options)
    assert_allclose(found, [0.2, -0.2], rtol=1e-9)
    # The ease of a single sample among many does not grow without bound.
    many = np.r_[0.0, np.ones(99999)]
    assert ref.log_weights(0.0 * many, many, **options).max() == 8.0


def test_sample_weights_are_over_the_average_of_the_class() -> None:
    """Of the first class 2, then 2 * 1/2 + 3 * 1/2; of the second 1, then 1 * 1/2 + 4 * 1/2."""
    weights, average = ref.sample_weights(
        np.log([3.0, 3.0, 5.0, 4.0, 4.0]),
        [0, 0, 2, 1, 1],
        np.log([2.0, 1.0, 1.0]),
        decay=0.5**0.5,
        valid=[True, True, False, True, True],
    )
    assert_allclose(np.exp(average), [2.5, 2.5, 1.0], rtol=1e-13)
    assert_allclose(weights, [1.2, 1.2, 1.0, 1.6, 1.6], rtol=1e-13)


def test_sample_weights_of_a_hopeless_class_and_of_nothing_valid() -> None:
    assert ref.log_weights(
        [1e4, 0.0], [0.5, 0.5], surprise_strength=1.0, pacing_strength=1.0
    ).tolist() == [-8.0, 0.0]
    weights, average = ref.sample_weights([-8.0, -8.0], [0, 0], [0.0], decay=0.0)
    assert_allclose(weights, 1.0, rtol=1e-13)
    assert_allclose(average, -8.0, rtol=1e-13)
    weights, average = ref.sample_weights([NAN, NAN], [0, 0], [1.0], 0.9, valid=[False, False])
    assert weights.tolist() == [1.0, 1.0]
    assert average.tolist() == [1.0]


# Qualities 0.8, and 0.4 and 0.2: ratios 2 and 4, rates 1 and 3.
LOG_QUALITY = np.log([0.8, 0.4, 0.2])


def test_modality_quantities_of_ratios_2_and_4() -> None:
    assert_allclose(ref.improvement_ratios(LOG_QUALITY), [2.0, 4.0], rtol=1e-14)
    assert_allclose(ref.geometric_mean_ratio(LOG_QUALITY), 2.8284271247461903, rtol=1e-14)
    assert_allclose(ref.harmonic_mean_improvement_rate(LOG_QUALITY), 1.5, rtol=1e-14)
    # 1 - 2.5 / (2 sqrt 2)
    assert_allclose(ref.balance_factor(LOG_QUALITY), 0.11611652351681560, rtol=1e-12)
    # The lag of the second, log 4, is capped at 1: 2 / (2 + e) and e / (2 + e).
    assert_allclose(
        ref.modality_weights(LOG_QUALITY), [0.4238831152341709, 0.5761168847658291], rtol=1e-14
    )
    # Uncapped at temperature 2: sqrt 2 / (2 + sqrt 2) and 2 / (2 + sqrt 2).
    assert_allclose(
        ref.modality_weights(LOG_QUALITY, temperature=2.0, cap=10.0),
        [0.4142135623730951, 0.5857864376269049],
        rtol=1e-14,
    )
    assert_allclose(
        ref.modality_coefficients(LOG_QUALITY), [0.9823231439201237, 1.0176768560798763], rtol=1e-12
    )


def test_a_rate_below_the_floor() -> None:
    # Ratios 1/2 and 2: rates -1/2, floored at 1/4, and 1; 2 / (4 + 1).
    log_quality = np.log([0.4, 0.8, 0.2])
    assert_allclose(ref.harmonic_mean_improvement_rate(log_quality, eps=0.25), 0.4, rtol=1e-14)
    # GMR is 1, so 1 - 1.4 / 1 is cut to 0.
    assert float(ref.balance_factor(log_quality, eps=0.25)) == 0.0
    # With no gain at all the default floor is what remains.
    assert_allclose(ref.harmonic_mean_improvement_rate([-1.0, -1.0]), 1e-3, rtol=1e-12)


def test_a_modality_as_good_as_the_fusion_counts_at_the_default_floor() -> None:
    # Ratios 1 and 4: HMIR is 2 / (1000 + 1/3), and 1 - (1 + HMIR) / 2.
    log_quality = np.log([0.8, 0.8, 0.2])
    assert_allclose(ref.harmonic_mean_improvement_rate(log_quality), 0.0019993335554815, rtol=1e-12)
    assert_allclose(ref.balance_factor(log_quality), 0.49900033322225925, rtol=1e-12)


def test_overflow_is_infinite_but_leaves_the_balance_defined() -> None:
    log_quality = [0.0, -1e4, -1e4]
    assert ref.improvement_ratios(log_quality).tolist() == [np.inf, np.inf]
    assert float(ref.geometric_mean_ratio(log_quality)) == np.inf
    assert float(ref.harmonic_mean_improvement_rate(log_quality)) == np.inf
    assert float(ref.balance_factor(log_quality)) == 0.0
    assert ref.modality_weights([0.0, 1e4, 1e4]).tolist() == [0.5, 0.5]
    # One dominates: HMIR is governed by the rate 1, GMR by the ratio exp(1e4).
    assert float(ref.balance_factor([LN2, 0.0, -1e4])) == 1.0


def test_modality_quantities_of_a_batch() -> None:
    batch = [[LOG_QUALITY, LOG_QUALITY[::-1]]]
    assert ref.improvement_ratios(batch).shape == (1, 2, 2)
    assert_allclose(ref.geometric_mean_ratio(batch), [[2.8284271247461903, 0.3535533905932738]])
    assert ref.balance_factor(batch).shape == (1, 2)


def test_quality() -> None:
    assert_allclose(ref.quality([0.0, -LN2, -2 * LN2, -9.0], 4), [1.0, 0.5, 0.0, 0.0], rtol=1e-14)
    assert_allclose(ref.quality(-0.1 * LN10, 10), 0.9, rtol=1e-14)
    assert float(ref.quality(1.0, 10)) == 1.0
    assert ref.quality([-1.0, 0.0], 1).tolist() == [0.0, 0.0]


def test_augmentation_rates() -> None:
    rates = ref.augmentation_rates([0.9, 0.3, 0.7], eps=0.1)
    assert_allclose(rates, [0.25, 1.0, 0.5], rtol=1e-14)
    assert ref.augmentation_rates([0.0, 0.0]).tolist() == [1.0, 1.0]
    assert_allclose(ref.augmentation_rates([0.0, 1.0]), [1.0, 1e-3 / 1.001], rtol=1e-14)


def test_evenness() -> None:
    assert_allclose(ref.evenness([3, 1]), 0.4096, rtol=1e-14)
    assert_allclose(ref.evenness([2, 2, 0, 1]), (25 / 27) ** 4, rtol=1e-14)
    assert ref.evenness([4, 4]) == ref.evenness([0, 0]) == ref.evenness([np.inf, 7]) == 1.0


def test_trust() -> None:
    assert ref.trust([0.5, 0.01, 0.0]).tolist() == [0.5, 0.02, 0.02]
    assert ref.trust([0.0, 0.0]).tolist() == [1.0, 1.0]


def test_standing_and_generalisation() -> None:
    assert ref.standing([0.5, 0.25, 0.125, 0.0]).tolist() == [1.0, 1.0, 0.5, 0.0]
    assert ref.standing([0.0, 0.0]).tolist() == [1.0, 1.0]
    found = ref.generalisation([0.4, 0.9, 0.0, 0.2], [0.9, 0.4, 0.0, 0.5])
    assert_allclose(found, [1 / 16, 1.0, 1.0, 1 / 16], rtol=1e-14)


def test_disagreement() -> None:
    a, b, c = [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]
    # Against the consensus of the others, at skills 0.25, 0.75 and 0.25:
    # (1/8, 7/8), (3/4, 1/4) and (1/4, 3/4).
    skill = [0.25, 0.75, 0.25]
    out = ref.disagreement([[a], [b], [c]], skill)
    sure = [7 / 8, 3 / 4, 3 / 4]
    behind = [0.625, 0.25, 0.625]
    apart = [0.765625, 0.5625, 0.0625]
    able = [4 / 9, 1.0, 4 / 9]  # of twice the skill over the best, squared
    expected = [[w * x * y * z] for w, x, y, z in zip(able, apart, sure, behind, strict=True)]
    assert_allclose(out, expected, rtol=1e-14)
    # A second sample without the last modality, a third with the first alone: no consensus.
    probs = [[a, a, a], [b, b, b], [c, [NAN, NAN], [NAN, NAN]]]
    present = [[True, True, True], [True, True, False], [True, False, False]]
    out = ref.disagreement(probs, skill, present)
    expected = [[*row, 0.0, 0.0] for row in expected]
    assert_allclose(out, expected, rtol=1e-14)


def test_disagreement_floors_the_skills() -> None:
    # Skills 0 and 0 count as 0.02 each: the consensus is (1/2, 1/2).
    out = ref.disagreement([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]], [1.0, 0.0, 0.0])
    assert_allclose(out[0], [0.25 * 0.5 * 0.02], rtol=1e-14)
    # 0.02 against 0.06: (1/4, 3/4), with 0.05 behind it.
    out = ref.disagreement([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]], [1.0, 0.0, 0.06])
    assert_allclose(out[0], [0.5625 * 0.75 * 0.05], rtol=1e-13)


def test_reliability_gates() -> None:
    logits = np.log([[0.6], [0.3], [0.1]])
    assert_allclose(ref.reliability_gates(logits), [[0.6], [0.3], [0.1]], rtol=1e-14)
    # 0.6 and 0.3 of 0.9.
    cut = ref.reliability_gates(logits, threshold=0.2)
    assert_allclose(cut, [[0.6666666666666666], [0.3333333333333333], [0.0]], rtol=1e-14)
    # Without the first, 0.3 and 0.1 of 0.4; then nothing at all.
    hidden = [[NAN, NAN], [logits[1, 0], NAN], [logits[2, 0], NAN]]
    present = [[False, False], [True, False], [True, False]]
    gates = ref.reliability_gates(hidden, present)
    assert_allclose(gates, [[0.0, 0.0], [0.75, 0.0], [0.25, 0.0]], rtol=1e-14)
    assert ref.reliability_gates([[1e4], [-1e4]]).tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize(
    "name",
    [
        "balance_factor",
        "geometric_mean_ratio",
        "harmonic_mean_improvement_rate",
        "improvement_ratios",
        "modality_coefficients",
        "modality_weights",
    ],
)
def test_no_modality_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="modalit"):
        getattr(ref, name)([-0.5])
    with pytest.raises(ValueError, match="modalit"):
        ref.augmentation_rates([])
    assert_allclose(ref.quality([-LN2], 4), [0.5])


def test_it_needs_numpy_and_nothing_else() -> None:
    path = Path(ref.__file__)
    script = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("reference", {str(path)!r})
module = importlib.util.module_from_spec(spec)
sys.modules["reference"] = module
spec.loader.exec_module(module)
assert module.quality(0.0, 2) == 1.0
loaded = sorted(name for name in ("torch", "dyncim_core", "scipy") if name in sys.modules)
assert not loaded, loaded
assert "numpy" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_everything_public_is_listed_and_documented_with_an_example() -> None:
    for name in ref.__all__:
        if name != "HeadStatistics":
            assert ">>> " in (getattr(ref, name).__doc__ or ""), name
