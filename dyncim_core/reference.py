"""The executable specification: every quantity in NumPy float64, in the order of the formulas.

Written for reading. It needs NumPy and nothing else, so that it can be copied, run
beside another framework, and trusted as the oracle of the tests. Names, argument order
and meaning are those of the PyTorch functions.

Statistics are head-major, ``[H, B]`` with ``H = M + 1``: head 0 is the fused prediction,
heads 1 to M the unimodal ones. ``present`` (bool, same shape, row 0 all true; all
present when ``None``) marks what a sample has. An absent entry may hold anything, NaN
included, and never reaches a result.

The paper (DynCIM, arXiv 2503.06456) names the quantities. The formulas are definitions
chosen here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "HeadStatistics",
    "augmentation_rates",
    "balance_factor",
    "contradiction",
    "difficulty",
    "disagreement",
    "doubt",
    "evenness",
    "expected_log_likelihood",
    "generalisation",
    "geometric_mean_ratio",
    "harmonic_mean_improvement_rate",
    "head_statistics",
    "held_out",
    "improvement_ratios",
    "input_suspicion",
    "label_suspicion",
    "log_prior",
    "log_weights",
    "logit_slopes",
    "logit_weights",
    "loss_shares",
    "modality_coefficients",
    "modality_weights",
    "noise_pressure",
    "novelty",
    "novelty_penalty",
    "pooled_skill",
    "prediction_consistency",
    "prediction_deviation",
    "prediction_stability",
    "quality",
    "redundancy",
    "relative_change",
    "relative_gates",
    "relative_logit_weights",
    "reliability_gates",
    "sample_weights",
    "seen_noise",
    "share_to_learn",
    "skill",
    "standing",
    "sureness",
    "surprise",
    "target_entropy",
    "trust",
    "volatility_weights",
    "witnesses",
]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

_SHRINKAGE = 1e-2  # share of the mean variance that every direction has at least


# What each head says about each sample.


class HeadStatistics(NamedTuple):
    """What each head says about each sample; every field is ``[H, B]``.

    Attributes:
        loss: Cross-entropy with class weights, smoothing and ``ignore_index``, >= 0.
        nll: Negative log-likelihood of the target in nats, >= 0, without weights and smoothing.
        entropy: Entropy of the predicted distribution in nats, in [0, log C].
        distance: ``||p_h - p_0||_2 / sqrt(2)`` to the fused prediction, in [0, 1].
        prediction: Most probable class, int64; anything where absent.
    """

    loss: Array
    nll: Array
    entropy: Array
    distance: Array
    prediction: NDArray[np.int64]


def head_statistics(
    logits: Sequence[ArrayLike],
    target: ArrayLike,
    *,
    present: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> HeadStatistics:
    """Loss, negative log-likelihood, entropy and distance to the fusion of every head.

    A class index y is the distribution t that puts everything on y. With smoothing e,
    ``t' = (1 - e) t + e / C``, and then ``loss = sum_c w_c t'_c (-log p_c)`` and
    ``nll = sum_c t_c (-log p_c)``, where ``0 * inf = 0``.

    Args:
        logits: H arrays ``[B, C]``, the fused head first.
        target: Class indices ``[B]``, or class probabilities ``[B, C]``.
        present: Bool ``[H, B]``; every statistic is 0 where absent.
        weight: Class weights ``[C]``, >= 0; all 1 when ``None``.
        ignore_index: Class index whose samples have loss and nll 0.
        label_smoothing: e, in [0, 1].

    Returns:
        A ``HeadStatistics``.

    Raises:
        IndexError: A class index is neither in [0, C) nor ``ignore_index``.

    Example:
        >>> certain, undecided = [[100.0, 0.0]], [[0.0, 0.0]]
        >>> statistics = head_statistics([certain, undecided], [0])
        >>> statistics.nll.round(4).tolist()
        [[0.0], [0.6931]]
        >>> statistics.distance.round(4).tolist()
        [[0.0], [0.5]]
    """
    heads = [np.asarray(head, dtype=np.float64) for head in logits]
    batch, classes = heads[0].shape
    mask = _mask(present, (len(heads), batch))
    class_weight = np.ones(classes) if weight is None else np.asarray(weight, dtype=np.float64)
    truth, counted = _truth(target, classes, ignore_index)
    smoothed = (1.0 - label_smoothing) * truth + label_smoothing / classes

    shape = (len(heads), batch)
    loss, nll, entropy, distance = (np.zeros(shape) for _ in range(4))
    statistics = HeadStatistics(loss, nll, entropy, distance, np.zeros(shape, dtype=np.int64))
    for h, head in enumerate(heads):
        surprisal = _surprisal(np.where(mask[h][:, None], head, 0.0))
        probs = np.exp(-surprisal)
        if h == 0:
            fused_probs = probs
        weighted = _expectation(class_weight * smoothed, surprisal)
        statistics.loss[h] = np.where(counted, weighted, 0.0)
        statistics.nll[h] = np.where(counted, _expectation(truth, surprisal), 0.0)
        statistics.entropy[h] = _expectation(probs, surprisal)
        statistics.distance[h] = np.linalg.norm(probs - fused_probs, axis=1) / np.sqrt(2.0)
        statistics.prediction[h] = surprisal.argmin(axis=1)
        for field in statistics[:4]:
            field[h] = np.where(mask[h], field[h], 0.0)
    return statistics


# The sample level.


def prediction_deviation(nll: ArrayLike, present: ArrayLike | None = None) -> Array:
    """One minus the geometric mean, over heads, of the probability given to the target.

    ``1 - exp(-mean_h nll_h)``. Definition chosen here; the paper names the quantity.

    Args:
        nll: ``[H, B]`` in nats, >= 0.
        present: Bool ``[H, B]``.

    Returns:
        ``[B]`` in [0, 1]; 0 when every head is certain of the target. The order of the
        heads does not matter, and it increases with each nll.

    Example:
        >>> prediction_deviation([[0.0], [2 * np.log(2.0)]]).tolist()
        [0.5]
    """
    return -np.expm1(-_mean_over_heads(nll, present))


def prediction_consistency(distance: ArrayLike, present: ArrayLike | None = None) -> Array:
    """Mean distance of the unimodal predictions from the fused one; large is inconsistent.

    ``mean_{h >= 1} distance_h``. Definition chosen here; the paper names the quantity.

    Args:
        distance: ``[H, B]`` in [0, 1]; row 0 is not read.
        present: Bool ``[H, B]``.

    Returns:
        ``[B]`` in [0, 1]; 0 for a sample without any modality.

    Example:
        >>> prediction_consistency([[0.0], [0.25], [0.75]]).tolist()
        [0.5]
    """
    unimodal = np.asarray(distance, dtype=np.float64)[1:]
    return _mean_over_heads(unimodal, None if present is None else np.asarray(present)[1:])


def prediction_stability(entropy: ArrayLike, num_classes: int) -> Array:
    """Entropy of the fused prediction as a share of its maximum; large is unstable.

    ``H_0 / log C``. Definition chosen here; the paper names the quantity.

    Args:
        entropy: ``[H, B]`` in nats; only row 0 is read.
        num_classes: C.

    Returns:
        ``[B]`` in [0, 1]: 0 for a certain fusion, 1 for a uniform one; 0 when C = 1.

    Example:
        >>> prediction_stability([[np.log(2.0)]], num_classes=4).tolist()
        [0.5]
    """
    return np.clip(_in_log_classes(np.asarray(entropy)[0], num_classes), 0.0, 1.0)


def target_entropy(target: ArrayLike) -> Array:
    """Entropy of targets of class probabilities: the least NLL that any prediction can have.

    ``-sum_c y_c log y_c`` over what is in (0, 1). Definition chosen here.

    Args:
        target: ``[B, C]``, each row of which sums to 1.

    Returns:
        ``[B]`` in [0, log C], in nats.

    Example:
        >>> target_entropy([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]).round(4).tolist()
        [0.6931, 0.0]
    """
    probs = np.asarray(target, dtype=np.float64)
    some = np.where((probs > 0.0) & (probs < 1.0), probs, 1.0)
    return np.asarray((some * -np.log(some)).sum(axis=1))


def share_to_learn(entropy: float, num_classes: int) -> float:
    """What targets leave to be learnt, as a share of what certain ones would.

    ``max(0.01, 1 - entropy / log C)``. Definition chosen here.

    Args:
        entropy: Mean of the targets' entropies, in nats.
        num_classes: Number of classes C.

    Returns:
        In [0.01, 1]; 1 when C = 1.

    Example:
        >>> share_to_learn(np.log(2.0), 4)
        0.5
    """
    if num_classes == 1:
        return 1.0
    return max(0.01, 1.0 - float(entropy) / float(np.log(num_classes)))


def surprise(
    nll: ArrayLike,
    entropy: ArrayLike,
    present: ArrayLike | None = None,
    head_weights: ArrayLike | None = None,
    usual: ArrayLike | None = None,
) -> Array:
    """Deviation beyond what the model's own uncertainty predicts.

    ``sum_h w_h max(0, nll_h - min(H_h, u_h)) / sum_h w_h``: the nll that a head expects is its
    entropy, ``E_{c ~ p}[-log p_c] = H(p)``, or what is usual. Definition chosen here.

    Args:
        nll: ``[H, B]`` in nats, >= 0.
        entropy: ``[H, B]`` in nats.
        present: Bool ``[H, B]``.
        head_weights: ``[H]``, > 0, the ``w``; 1 when ``None``.
        usual: ``[H]`` in nats, the ``u``; infinite when ``None``.

    Returns:
        ``[B]``, >= 0; 0 where no nll exceeds its entropy.

    Example:
        >>> surprise([[3 * np.log(2.0)]], [[np.log(2.0)]]).round(4).tolist()
        [1.3863]
    """
    expected = np.asarray(entropy, dtype=np.float64)
    if usual is not None:
        expected = np.minimum(expected, np.asarray(usual, dtype=np.float64)[:, None])
    excess = np.asarray(nll, dtype=np.float64) - expected
    weights = np.ones_like(excess)
    if head_weights is not None:
        weights *= np.asarray(head_weights, dtype=np.float64)[:, None]
    if present is not None:
        weights, excess = np.where(present, weights, 0.0), np.where(present, excess, 0.0)
    summed = (weights * np.maximum(excess, 0.0)).sum(axis=0)
    return np.asarray(summed / weights.sum(axis=0))


def relative_change(current: ArrayLike, previous: ArrayLike, eps: float = 1e-3) -> Array:
    """How far a quantity moved, as a share of what it was. Definition chosen here.

    ``|current - previous| / (|previous| + eps)``.

    Args:
        current: Any shape.
        previous: Same shape.
        eps: > 0.

    Returns:
        Same shape, >= 0; 0 where nothing moved.

    Example:
        >>> relative_change([0.75], [0.25], eps=0.25).tolist()
        [1.0]
    """
    now, before = np.asarray(current, dtype=np.float64), np.asarray(previous, dtype=np.float64)
    return np.asarray(np.abs(now - before) / (np.abs(before) + eps))


def volatility_weights(volatility: ArrayLike) -> Array:
    """Share of each signal in all volatility. Normalisation chosen here.

    ``v_k / sum_k v_k``. The paper weights the signals by volatility.

    Args:
        volatility: ``[K]``, >= 0.

    Returns:
        ``[K]``, >= 0, sums to 1; uniform when the sum is 0. A common scale does not matter.

    Example:
        >>> volatility_weights([3.0, 1.0]).tolist()
        [0.75, 0.25]
    """
    v = np.asarray(volatility, dtype=np.float64)
    return v / v.sum() if v.sum() > 0 else np.full(v.shape, 1.0 / v.size)


def difficulty(signals: ArrayLike, signal_weights: ArrayLike) -> Array:
    """Weighted mean of the signals of a sample, ``sum_k omega_k signals_k``.

    Definition chosen here; the paper names the signals.

    Args:
        signals: ``[K, B]`` in [0, 1].
        signal_weights: omega, ``[K]``, >= 0, sums to 1.

    Returns:
        ``[B]`` in [0, 1], between the smallest and the largest signal of the sample.

    Example:
        >>> difficulty([[0.0], [1.0]], [0.75, 0.25]).tolist()
        [0.25]
    """
    omega = np.asarray(signal_weights, dtype=np.float64)
    return np.asarray((omega[:, None] * np.asarray(signals, dtype=np.float64)).sum(axis=0))


def doubt(prediction: ArrayLike, nll: ArrayLike, entropy: ArrayLike, target: ArrayLike) -> Array:
    """How far each head by itself contradicts a target.

    ``(max_c t_c - t_k) (1 - exp(-max(0, nll_h - entropy_h)))`` of the class k that head h predicts;
    t is one-hot for a class. Definition chosen here.

    Args:
        prediction: Predicted classes, int ``[H, B]``.
        nll: Of the target, in nats, ``[H, B]``.
        entropy: Of the prediction, in nats, ``[H, B]``.
        target: Int ``[B]``, or class probabilities, ``[B, C]``.

    Returns:
        ``[H, B]`` in [0, 1].

    Example:
        >>> doubt([[1, 0]], np.log([[4.0, 4.0]]), [[0.0, 0.0]], [0, 0]).tolist()
        [[0.75, 0.0]]
    """
    classes, t = np.asarray(prediction), np.asarray(target)
    excess = np.asarray(nll, dtype=np.float64) - np.asarray(entropy, dtype=np.float64)
    surprised = 1.0 - np.exp(-np.maximum(excess, 0.0))
    if t.ndim == 1:
        return np.where(classes == t, 0.0, surprised)
    given = t[np.arange(len(t)), np.clip(classes, 0, t.shape[1] - 1)]
    return np.asarray(surprised * (t.max(axis=1) - given))


def sureness(entropy: ArrayLike, num_classes: int) -> Array:
    """How sure each head is of what it predicts, ``clamp(1 - entropy / log C, 0, 1)``.

    Definition chosen here.

    Args:
        entropy: In nats, ``[H, B]``.
        num_classes: C.

    Returns:
        ``[H, B]`` in [0, 1]; 1 when C = 1.

    Example:
        >>> sureness([[0.0, np.log(2.0)]], 4).tolist()
        [[1.0, 0.5]]
    """
    largest = np.log(num_classes) if num_classes > 1 else np.inf
    return np.clip(1.0 - np.asarray(entropy, dtype=np.float64) / largest, 0.0, 1.0)


def contradiction(
    prediction: ArrayLike,
    doubt: ArrayLike,
    sureness: ArrayLike,
    present: ArrayLike | None = None,
) -> Array:
    """How far all heads of a sample, two at least, contradict its target beyond common errors.

    ``min_h doubt_h - 0.07 min_h sureness_h`` where all predict one class, else 0; an eightieth of
    that of two heads. Definition chosen here.

    Args:
        prediction: Predicted classes, int ``[H, B]``.
        doubt: ``[H, B]`` in [0, 1].
        sureness: ``[H, B]`` in [0, 1].
        present: Bool ``[H, B]``.

    Returns:
        ``[B]`` in [-0.07, 1].

    Example:
        >>> prediction = [[1, 1, 0], [1, 1, 0], [1, 2, 0]]
        >>> sure = np.full((3, 3), 0.5)
        >>> contradiction(prediction, [[0.75, 0.75, 0.0]] * 3, sure).tolist()
        [0.715, 0.0, -0.035]
    """
    classes = np.asarray(prediction)
    mask = _mask(present, classes.shape)
    doubted, sure = np.asarray(doubt, dtype=np.float64), np.asarray(sureness, dtype=np.float64)
    result = np.zeros(classes.shape[1])
    for i in range(len(result)):
        votes = classes[mask[:, i], i]
        if len(votes) > 1 and len(set(votes)) == 1:
            beyond = doubted[mask[:, i], i].min() - 0.07 * sure[mask[:, i], i].min()
            result[i] = beyond * (1.0 if len(votes) > 2 else 0.0125)
    return result


def held_out(index: ArrayLike, share: float) -> Mask:
    """Which samples to keep out of training: whose hash is below ``share`` of 32 bits.

    Definition chosen here.

    Args:
        index: Whole numbers >= 0.
        share: In [0, 1].

    Returns:
        Bool, same shape.

    Example:
        >>> held_out(np.arange(6), share=0.25).tolist()
        [True, True, True, False, True, False]
    """
    bits = np.asarray(index, dtype=np.uint64) * np.uint64(0x3A805F)
    bits = (bits ^ (bits >> np.uint64(14))).astype(np.uint32) * np.uint32(0x5D5F7413)
    return np.asarray(bits < round(share * 2**32))


def seen_noise(
    contradicted: ArrayLike, trained: ArrayLike, held_out: ArrayLike, skill: ArrayLike
) -> Array:
    """Label noise, that all heads contradict or the fused one alone learns by heart.

    ``max(contradicted, c (1 - c / c') max(0, 1 - max_k s_k / s_0)^3)``. Definition chosen here.

    Args:
        contradicted: By all heads, of samples held out, in [-0.07, 1].
        trained: What the fused head doubts of those trained on, ``c`` in [0, 1].
        held_out: The same of those held out, ``c'``.
        skill: Of all heads, ``[M + 1]`` in [0, 1].

    Returns:
        In [-0.07, 1].

    Example:
        >>> seen_noise([0.0, 0.3], 0.1, 0.2, [0.5, 0.0]).round(4).tolist()
        [0.05, 0.3]
    """
    s, c = np.asarray(skill, dtype=np.float64), np.asarray(trained, dtype=np.float64)
    held, seen = np.asarray(held_out, dtype=np.float64), np.asarray(contradicted, dtype=np.float64)
    best = s[1:].max(initial=0.0)
    if len(s) == 1 or held == 0.0 or best == s[0] == 0.0:
        return seen
    ahead = max(0.0, 1.0 - best / s[0]) if s[0] > 0.0 else 0.0
    return np.asarray(np.fmax(seen, c * (1.0 - c / held) * ahead**3))


def noise_pressure(label_noise: ArrayLike, trust: ArrayLike = 1.0, full_at: float = 0.01) -> Array:
    """How much of the surprise weighting acts.

    ``clamp(label_noise / full_at, 0, 1) * min(1, 4 trust)``. Definition chosen here.

    Args:
        label_noise: Share of labels in doubt, in [-0.07, 1].
        trust: In the fused head, in [0, 1].
        full_at: Share from which the weighting acts in full, > 0.

    Returns:
        Same shape, in [0, 1].

    Example:
        >>> noise_pressure([-0.1, 0.0075, 0.3]).round(4).tolist()
        [0.0, 0.75, 1.0]
    """
    share = np.clip(np.asarray(label_noise, dtype=np.float64) / full_at, 0.0, 1.0)
    return np.asarray(share * np.minimum(1.0, 4.0 * np.asarray(trust, dtype=np.float64)))


def log_weights(
    surprise: ArrayLike,
    difficulty: ArrayLike,
    *,
    surprise_strength: float,
    pacing_strength: float,
    valid: ArrayLike | None = None,
) -> Array:
    """``-surprise_strength * surprise - pacing_strength * z(difficulty)`` in [-8, 8].

    Definition chosen here; the paper names a curriculum over samples.

    Args:
        surprise: ``[B]``, >= 0.
        difficulty: ``[B]`` in [0, 1].
        surprise_strength: >= 0.
        pacing_strength: >= 0.
        valid: Bool ``[B]``; the others get 0.

    Returns:
        ``[B]``.

    Example:
        >>> log_weights([1.0, 2.0], [0.5, 0.5], surprise_strength=1.0, pacing_strength=1.0).tolist()
        [-1.0, -2.0]
    """
    s = np.asarray(surprise, dtype=np.float64)
    d = np.asarray(difficulty, dtype=np.float64)
    mask = _mask(valid, s.shape)
    found = np.zeros(s.shape)
    if mask.any():
        z = (d[mask] - d[mask].mean()) / max(float(d[mask].std()), 1e-4)
        found[mask] = -surprise_strength * s[mask] - pacing_strength * z
    return np.clip(found, -8.0, 8.0)


def sample_weights(
    log_weights: ArrayLike,
    group: ArrayLike,
    log_average: ArrayLike,
    decay: float,
    valid: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """What each sample has over the running average of its class.

    Definition chosen here.

    Args:
        log_weights: ``[B]``.
        group: Class of each sample, or its remainder by K, ``[B]``.
        log_average: Logarithm of the average of each class so far, ``[K]``.
        decay: In [0, 1).
        valid: Bool ``[B]``; the others get 1.

    Returns:
        The weights, ``[B]``, and the averages that they are over,
        ``log(decay^n average + (1 - decay^n) mean)`` for a class with n samples, ``[K]``.

    Example:
        >>> own, group = np.log([2.0, 2.0, 0.5]), [0, 0, 1]
        >>> weights, log_average = sample_weights(own, group, [0.0, 0.0], decay=0.5)
        >>> weights.round(4).tolist(), np.exp(log_average).tolist()
        ([1.1429, 1.1429, 0.6667], [1.75, 0.75])
    """
    own, of = np.asarray(log_weights, dtype=np.float64), np.asarray(group)
    average = np.asarray(log_average, dtype=np.float64).copy()
    mask, weights = _mask(valid, own.shape), np.ones(own.shape)
    for k in np.unique(of[mask]):
        mine = mask & (of == k)
        kept = decay ** int(mine.sum())
        mean = np.exp(own[mine] - average[k]).mean()
        average[k] += np.log(kept + (1.0 - kept) * mean)
        weights[mine] = np.exp(own[mine] - average[k])
    return weights, average


# The modality level. ``log_quality`` is ``[..., M + 1]``, fused head first, with
# ``log q_h = -loss_h``. Everything but ``quality`` raises ValueError when M = 0.


def improvement_ratios(log_quality: ArrayLike) -> Array:
    """Quality of the fusion over that of each modality, ``r_m = exp(log q_0 - log q_m)``.

    Definition chosen here.

    Args:
        log_quality: ``[..., M + 1]``, any real values.

    Returns:
        ``[..., M]``, >= 0, infinite where it overflows. A common scale of all qualities
        does not matter.

    Raises:
        ValueError: There is no modality.

    Example:
        >>> improvement_ratios(np.log([0.8, 0.4, 0.8])).round(4).tolist()
        [2.0, 1.0]
    """
    return _exp(_log_ratios(log_quality))


def geometric_mean_ratio(log_quality: ArrayLike) -> Array:
    """Geometric mean of the improvement ratios (GMR): the global gain of the fusion.

    ``exp(mean_m log r_m)``. Definition chosen here; the paper names the quantity.

    Args:
        log_quality: ``[..., M + 1]``, any real values.

    Returns:
        ``[...]``, >= 0; 1 when the fusion equals the geometric mean of its modalities.
        The order of the modalities, a common scale of all qualities and a repetition of
        the set of modalities do not matter.

    Raises:
        ValueError: There is no modality.

    Example:
        >>> round(float(geometric_mean_ratio(np.log([0.8, 0.8, 0.2]))), 4)
        2.0
    """
    return _exp(_log_ratios(log_quality).mean(axis=-1))


def harmonic_mean_improvement_rate(log_quality: ArrayLike, eps: float = 1e-3) -> Array:
    """Harmonic mean of the improvement rates (HMIR): the local gain of the fusion.

    ``M / sum_m 1 / max(r_m - 1, eps)``. Definition chosen here; the paper names the
    quantity.

    Args:
        log_quality: ``[..., M + 1]``, any real values.
        eps: Floor of each rate, > 0.

    Returns:
        ``[...]``, at least the smallest floored rate and at most M times it; at most the
        geometric and the arithmetic mean of the floored rates. Infinite on overflow.

    Raises:
        ValueError: There is no modality.

    Example:
        >>> round(float(harmonic_mean_improvement_rate(np.log([0.8, 0.4, 0.2]))), 4)
        1.5
    """
    return _exp(_log_hmir(_log_ratios(log_quality), eps))


def balance_factor(log_quality: ArrayLike, eps: float = 1e-3) -> Array:
    """Share lambda of the modality-level objective, ``clip(1 - (1 + HMIR) / GMR, 0, 1)``.

    In log space, ``1 - exp(log(1 + HMIR) - log GMR)``. The paper names an adaptive
    balance; this definition is chosen here.

    Args:
        log_quality: ``[..., M + 1]``, any real values.
        eps: Floor of each improvement rate, > 0.

    Returns:
        ``[...]`` in [0, 1]: 0 when the modalities are balanced, towards 1 as one
        dominates. While every rate exceeds ``eps``, ``1 + HMIR <= GMR``, with equality
        only when all rates are equal.

    Raises:
        ValueError: There is no modality.

    Example:
        >>> round(float(balance_factor(np.log([0.8, 0.4, 0.05]))), 4)
        0.4918
    """
    log_ratios = _log_ratios(log_quality)
    log_gmr = log_ratios.mean(axis=-1)
    log_one_plus_hmir = np.logaddexp(0.0, _log_hmir(log_ratios, eps))
    return np.asarray(-np.expm1(np.minimum(log_one_plus_hmir - log_gmr, 0.0)))


def modality_weights(log_quality: ArrayLike, temperature: float = 1.0, cap: float = 1.0) -> Array:
    """Weight alpha of each modality's own loss: the further behind the fusion, the larger.

    ``softmax_m(min(log r_m, cap) / temperature)``. Definition chosen here.

    Args:
        log_quality: ``[..., M + 1]``, any real values.
        temperature: > 0; larger is more uniform.
        cap: Lag in nats from which the weight stops growing.

    Returns:
        ``[..., M]``, >= 0, sums to 1 over the modalities.

    Raises:
        ValueError: There is no modality.

    Example:
        >>> modality_weights(np.log([0.8, 0.8, 0.4])).round(4).tolist()
        [0.3333, 0.6667]
    """
    lag = np.minimum(_log_ratios(log_quality), cap) / temperature
    shares = np.exp(lag - lag.max(axis=-1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=-1, keepdims=True))


def modality_coefficients(log_quality: ArrayLike) -> Array:
    """Factor of a modality's loss before its share, ``(1 - lambda) + lambda * M * alpha_m``.

    Definition chosen here.

    Args:
        log_quality: ``[..., M + 1]``, any real values.

    Returns:
        ``[..., M]``, >= 0, mean 1 over the modalities; all 1 when they are balanced.

    Raises:
        ValueError: There is no modality.

    Example:
        >>> modality_coefficients(np.log([0.8, 0.4, 0.4])).round(4).tolist()
        [1.0, 1.0]
    """
    alpha = modality_weights(log_quality)
    share = balance_factor(log_quality)[..., None]
    return np.asarray((1.0 - share) + share * alpha.shape[-1] * alpha)


def quality(log_quality: ArrayLike, num_classes: int) -> Array:
    """What a head has learnt, ``clip(1 + log q / log C, 0, 1)``. Definition chosen here.

    Args:
        log_quality: Any shape, in nats.
        num_classes: C.

    Returns:
        Same shape, in [0, 1]: 0 is chance or worse, 1 is certain; 0 when C = 1.

    Example:
        >>> quality([-np.log(2.0), -9.0], num_classes=4).tolist()
        [0.5, 0.0]
    """
    log_q = np.asarray(log_quality, dtype=np.float64)
    if num_classes == 1:
        return np.zeros(log_q.shape)
    return np.clip(1.0 + _in_log_classes(log_q, num_classes), 0.0, 1.0)


def redundancy(
    log_quality: ArrayLike, fused_quality: ArrayLike, skill: ArrayLike | None = None
) -> Array:
    """What fusion has learnt that its modalities know on their own, ``quality_0 / (1 + HMIR)^4``.

    With skills, no more than the same of ``trust``, whose HMIR is that of its logarithms.
    Definition chosen here.

    Args:
        log_quality: ``[..., M + 1]``, fused head first.
        fused_quality: ``[...]`` in [0, 1].
        skill: ``[M + 1]`` in [0, 1].

    Returns:
        ``[...]`` in [0, 1].

    Example:
        >>> redundancy(np.log([0.8, 0.4, 0.4]), 0.9).round(3).tolist()
        0.056
        >>> redundancy(np.log([0.8, 0.4, 0.4]), 0.9, [0.8, 0.2, 0.2]).round(4).tolist()
        0.0031
    """
    share = np.asarray(fused_quality) / (1.0 + harmonic_mean_improvement_rate(log_quality)) ** 4
    if skill is not None:
        shown = trust(skill)
        of_shown = shown[0] / (1.0 + harmonic_mean_improvement_rate(np.log(shown))) ** 4
        share = np.minimum(share, of_shown)
    return np.asarray(share)


def skill(hit_rate: ArrayLike, chance: ArrayLike) -> Array:
    """What is left of the hits after those of chance, ``(h - c) / (1 - c)``.

    Definition chosen here.

    Args:
        hit_rate: Share of held-out samples whose target a head predicts, in [0, 1].
        chance: The same for targets drawn from the training set, in [0, 1].

    Returns:
        In [0, 1]; 0 for less than 1e-4.

    Example:
        >>> skill([0.25, 0.5, 1.0], chance=0.25).round(4).tolist()
        [0.0, 0.3333, 1.0]
    """
    h, c = np.asarray(hit_rate, dtype=np.float64), np.asarray(chance, dtype=np.float64)
    found = (h - c) / np.maximum(1.0 - c, 1e-3)
    return np.where(found > 1e-4, np.minimum(found, 1.0), 0.0)


def pooled_skill(skill: ArrayLike, samples: float) -> Array:
    """Skills of heads, the nearer to their mean the fewer samples they were found on.

    Definition chosen here.

    Args:
        skill: ``[M + 1]`` in [0, 1].
        samples: How many are held out, >= 0.

    Returns:
        ``(n s_h + 20 s) / (n + 20)`` of the mean ``s``.

    Example:
        >>> pooled_skill([0.8, 0.4], 20).round(4).tolist()
        [0.7, 0.5]
    """
    s = np.asarray(skill, dtype=np.float64)
    return np.asarray((samples * s + 20.0 * s.mean()) / (samples + 20.0))


def expected_log_likelihood(
    logits: ArrayLike, weight: ArrayLike, shared: float, present: ArrayLike | None = None
) -> Array:
    """What a pool of all heads expects the log-likelihood of the target to be under each.

    ``sum_c p[c] log p_h[c]`` under ``p ~ prod_h p_h^(w_h)``, with ``log p_0`` of the fused head
    less c times those of the modalities, each -100 at least. Definition chosen here.

    Args:
        logits: ``[M + 1, B, C]``, fused head first.
        weight: ``[M + 1]``, > 0.
        shared: What the fused logits hold of the modalities', ``c`` in [0, 1].
        present: Bool ``[M + 1, B]``; all when ``None``.

    Returns:
        ``[M + 1, B]``, in nats; 0 for an absent head.

    Example:
        >>> logits = np.log([[[0.9, 0.1]], [[0.5, 0.5]]])
        >>> expected_log_likelihood(logits, [1, 1], 0.0).round(4).tolist()
        [[-0.3251], [-0.6931]]
    """
    z, w = np.asarray(logits, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    heads, batch, _ = z.shape
    mask = np.ones((heads, batch), dtype=bool) if present is None else np.asarray(present)
    result = np.zeros((heads, batch))
    with np.errstate(invalid="ignore"):
        for i in range(batch):
            own = z[mask[:, i], i]
            log_probs = np.maximum(own - np.logaddexp.reduce(own, axis=1, keepdims=True), -100.0)
            log_probs[0] -= shared * log_probs[1:].sum(axis=0)
            pooled = w[mask[:, i]] @ log_probs
            pool = np.exp(pooled - pooled.max())
            result[mask[:, i], i] = log_probs @ pool / pool.sum()
    return result


def logit_slopes(
    nll: ArrayLike, expected: ArrayLike, shared: float, present: ArrayLike | None = None
) -> Array:
    """How the pool's NLL of each sample changes with the weight of each head.

    ``l_h + x_h``, ``l_0`` less c times those of the modalities. Definition chosen here.

    Args:
        nll: In nats, ``[M + 1, B]``, ``l``.
        expected: ``expected_log_likelihood``, ``[M + 1, B]``, ``x``.
        shared: What the fused logits hold of the modalities', ``c`` in [0, 1].
        present: Bool ``[M + 1, B]``; all when ``None``.

    Returns:
        ``[M + 1, B]``; 0 for an absent head.

    Example:
        >>> logit_slopes([[0.5], [1.5]], [[-0.4], [-0.7]], 0.5).round(4).tolist()
        [[-0.65], [0.8]]
    """
    lost, x = np.asarray(nll, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    here = np.ones(lost.shape, dtype=bool) if present is None else np.asarray(present)
    lost = np.where(here, lost, 0.0)
    lost[0] -= shared * lost[1:].sum(axis=0)
    return np.where(here, lost + x, 0.0)


def logit_weights(weight: ArrayLike, skill: ArrayLike, slope: ArrayLike, samples: float) -> Array:
    """What the weights of the heads' logits move towards.

    ``(n (w_h - g_h) + 10 s_h) / (n + 10)``, in [0.02, 2]. Definition chosen here.

    Args:
        weight: ``[M + 1]``.
        skill: ``[M + 1]`` in [0, 1].
        slope: Average ``logit_slopes`` of held-out samples, ``[M + 1]``, ``g``.
        samples: How many are held out, ``n``.

    Returns:
        ``[M + 1]``.

    Example:
        >>> logit_weights([1, 1], [0.9, 0.5], [0.0, 0.8], 20).round(4).tolist()
        [0.9667, 0.3]
    """
    w, s, g = (np.asarray(a, dtype=np.float64) for a in (weight, skill, slope))
    return np.clip((samples * (w - g) + 10.0 * s) / (samples + 10.0), 0.02, 2.0)


def relative_logit_weights(weight: ArrayLike) -> Array:
    """What the logits of each modality count next to the fused head's, ``min(2, w_m / w_0)``.

    Definition chosen here.

    Args:
        weight: ``[M + 1]``, > 0.

    Returns:
        ``[M]`` in [0, 2].

    Example:
        >>> relative_logit_weights([0.8, 0.4, 2.0]).tolist()
        [0.5, 2.0]
    """
    w = np.asarray(weight, dtype=np.float64)
    return np.asarray(np.minimum(2.0, w[1:] / w[0]))


def label_suspicion(nll: ArrayLike, visited: ArrayLike, trust: ArrayLike) -> Array:
    """How wrong labels look, ``sum_h t_h^8 nll_h / sum_h t_h^8`` over the heads that saw a sample.

    Definition chosen here.

    Args:
        nll: In nats, sample-major, ``[N, H]``.
        visited: Bool ``[N, H]``.
        trust: ``[H]`` in (0, 1].

    Returns:
        ``[N]``; -inf for a sample that no head saw.

    Example:
        >>> label_suspicion([[1.0, 3.0], [1.0, 3.0]], [[1, 1], [0, 0]], [1.0, 1.0]).tolist()
        [2.0, -inf]
    """
    result, mask = [], np.asarray(visited, dtype=bool)
    for losses, seen in zip(np.asarray(nll, dtype=np.float64), mask, strict=True):
        weight = np.asarray(trust, dtype=np.float64)[seen] ** 8
        result.append(np.average(losses[seen], weights=weight) if seen.any() else -np.inf)
    return np.array(result)


def input_suspicion(nll: ArrayLike, visited: ArrayLike, head: int) -> Array:
    """How wrong a modality looks, ``nll_m exp(-mean_k nll_k)`` over the others k that saw a sample.

    Definition chosen here.

    Args:
        nll: In nats, sample-major, ``[N, H]``.
        visited: Bool ``[N, H]``.
        head: That of the modality, in [1, H - 1].

    Returns:
        ``[N]``; -inf for a sample that the modality did not see, or no other.

    Example:
        >>> input_suspicion([[0.0, 2.0, 0.0], [0.0, 2.0, 0.0]], [[1, 1, 1], [1, 1, 0]], 1).tolist()
        [2.0, -inf]
    """
    result, mask = [], np.asarray(visited, dtype=bool)
    for losses, seen in zip(np.asarray(nll, dtype=np.float64), mask, strict=True):
        others = [k for k in range(1, len(losses)) if k != head and seen[k]]
        known = bool(seen[head]) and len(others) > 0
        result.append(losses[head] * np.exp(-losses[others].mean()) if known else -np.inf)
    return np.array(result)


def witnesses(skill: ArrayLike) -> Mask:
    """Heads that are asked whether a label looks wrong: the fused one, ``s_m >= max_k s_k / 2``.

    Definition chosen here.

    Args:
        skill: ``[M + 1]`` in [0, 1].

    Returns:
        Bool ``[M + 1]``.

    Example:
        >>> witnesses([0.8, 0.6, 0.3, 0.2]).tolist()
        [True, True, True, False]
    """
    s = np.asarray(skill, dtype=np.float64)
    return np.append(True, 2.0 * s[1:] >= s[1:].max(initial=0.0))


def trust(skill: ArrayLike) -> Array:
    """How far each head is to be believed, ``max(0.02, s_h)``.

    Definition chosen here.

    Args:
        skill: ``[H]`` in [0, 1].

    Returns:
        ``[H]`` in [0.02, 1]; all 1 when no skill is above 0.

    Example:
        >>> trust([0.8, 0.0]).tolist()
        [0.8, 0.02]
    """
    s = np.asarray(skill, dtype=np.float64)
    return np.maximum(0.02, s) if s.max() > 0 else np.ones_like(s)


def standing(skill: ArrayLike) -> Array:
    """How a modality compares with the best one, ``min(1, 2 s_m / max_k s_k)``.

    Definition chosen here.

    Args:
        skill: Of the modalities, ``[M]`` in [0, 1].

    Returns:
        ``[M]`` in [0, 1]; all 1 when no skill is above 0.

    Raises:
        ValueError: There is no modality.

    Example:
        >>> standing([0.9, 0.45, 0.225, 0.0]).round(4).tolist()
        [1.0, 1.0, 0.5, 0.0]
    """
    s = np.asarray(skill, dtype=np.float64)
    _require_modalities(s.size)
    return np.minimum(1.0, 2.0 * s / s.max()) if s.max() > 0 else np.ones_like(s)


def loss_shares(skill: ArrayLike) -> Array:
    """What a modality's own loss counts, ``max(0.1, (min(1, 3 max s) min(1, s_m / s_0))^2)``.

    Definition chosen here.

    Args:
        skill: ``[M + 1]`` in [0, 1].

    Returns:
        ``[M]`` in [0.1, 1]; all alike where ``s_0`` is 0, and all 1 where every skill is 0.

    Example:
        >>> loss_shares([0.8, 0.9, 0.4, 0.0]).round(4).tolist()
        [1.0, 0.25, 0.1]
        >>> loss_shares([0.2, 0.2, 0.1]).round(4).tolist()
        [0.36, 0.1]
    """
    s = np.asarray(skill, dtype=np.float64)
    _require_modalities(len(s) - 1)
    if not s.max() > 0:
        return np.ones(len(s) - 1)
    part = np.minimum(1.0, s[1:] / s[0]) if s[0] > 0 else np.ones(len(s) - 1)
    return np.asarray(np.maximum(0.1, (min(1.0, 3.0 * s.max()) * part) ** 2))


def generalisation(held_out_quality: ArrayLike, quality: ArrayLike) -> Array:
    """How far what is learnt holds for samples held out, ``min(1, (q' + 0.1) / (q + 0.1))^4``.

    Definition chosen here.

    Args:
        held_out_quality: Quality of a head on samples held out, in [0, 1].
        quality: On those trained on, same shape.

    Returns:
        In [0, 1].

    Example:
        >>> generalisation([0.9, 0.4, 0.0], [0.9, 0.9, 0.0]).round(4).tolist()
        [1.0, 0.0625, 1.0]
    """
    held, trained = (np.asarray(x, dtype=np.float64) for x in (held_out_quality, quality))
    return np.asarray(np.minimum(1.0, (held + 0.1) / (trained + 0.1)) ** 4)


def augmentation_rates(skill: ArrayLike, eps: float = 1e-3) -> Array:
    """How often to swap or drop each modality, ``(1 - s_m + eps) / (1 - min_k s_k + eps)``.

    Definition chosen here.

    Args:
        skill: ``[M]`` in [0, 1], of the modalities only.
        eps: > 0.

    Returns:
        ``[M]`` in (0, 1]; 1 for the modality with the least skill.

    Raises:
        ValueError: There is no modality.

    Example:
        >>> augmentation_rates([0.75, 0.25], eps=0.25).tolist()
        [0.5, 1.0]
    """
    s = np.asarray(skill, dtype=np.float64)
    _require_modalities(s.size)
    return np.asarray((1 - s + eps) / (1 - s.min() + eps))


# The gates. Modalities only, ``[M, B]``, and so is ``present``.


def disagreement(
    probs: ArrayLike, skill: ArrayLike | None = None, present: ArrayLike | None = None
) -> Array:
    """How much the others, as far as they are sure and to be believed, contradict each modality.

    ``standing_m^2 * max_c c_m[c] * ||p_m - c_m||_2^2 / 2 * sum_k t_k^2 / sum_k t_k`` with
    ``c_m = sum_k t_k p_k / sum_k t_k`` over the present ``k != m``, of which it takes two, and
    their trust t. Definition chosen here.

    Args:
        probs: Class probabilities, ``[M, B, C]``.
        skill: ``[M]`` in [0, 1]; all 0 when ``None``.
        present: Bool ``[M, B]``.

    Returns:
        ``[M, B]`` in [0, 1]; 0 where the modality is absent, or all others but one.

    Example:
        >>> disagreement([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]]).round(4).tolist()
        [[0.125], [0.125], [1.0]]
    """
    p = np.asarray(probs, dtype=np.float64)
    modalities, batch, _ = p.shape
    mask = _mask(present, (modalities, batch))
    p = np.where(mask[..., None], p, 0.0)
    skill = np.zeros(modalities) if skill is None else skill
    weight, able = np.where(mask, trust(skill)[:, None], 0.0), standing(skill) ** 2

    result = np.zeros((modalities, batch))
    for m in range(modalities):
        others = [k for k in range(modalities) if k != m]
        comparable = mask[m] & (mask[others].sum(axis=0) > 1)
        total = np.where(comparable, weight[others].sum(axis=0), 1.0)
        consensus = (weight[others, :, None] * p[others]).sum(axis=0) / total[:, None]
        believed = (weight[others] ** 2).sum(axis=0) / total
        squared = ((p[m] - consensus) ** 2).sum(axis=1) / 2.0
        apart = np.nan_to_num(squared * consensus.max(axis=1), nan=1.0)
        result[m] = np.where(comparable, apart * believed * able[m], 0.0)
    return result


def log_prior(class_mass: ArrayLike) -> Array:
    """What the classes' frequencies alone say of a sample, over the most frequent.

    Definition chosen here.

    Args:
        class_mass: ``[C]``, >= 0.

    Returns:
        ``[C]``, in nats, in [-30, 0]; 0 for a class of no mass, or none that is a number.

    Example:
        >>> np.exp(log_prior([6, 3, 0])).round(4).tolist()
        [1.0, 0.5, 1.0]
    """
    mass = np.asarray(class_mass, dtype=np.float64)
    known = (mass > 0) & np.isfinite(mass)
    share = np.where(known, mass, 0.0) / max(mass[known].max(initial=0.0), 1e-300)
    return np.log(np.where(known, np.maximum(share, np.exp(-30.0)), 1.0))


def evenness(class_mass: ArrayLike) -> Array:
    """How even the classes are that were seen, ``((sum_c n_c)^2 / (K sum_c n_c^2))^4``.

    K is the number of those with any mass. Definition chosen here.

    Args:
        class_mass: ``[C]``, >= 0.

    Returns:
        Scalar in (0, 1]; 1 where no class has any mass that is a number.

    Example:
        >>> evenness([5, 5, 0]).round(4).tolist(), evenness([9, 1]).round(4).tolist()
        (1.0, 0.1382)
    """
    mass = np.asarray(class_mass, dtype=np.float64)
    mass = mass[(mass > 0) & np.isfinite(mass)]
    if not mass.size:
        return np.asarray(1.0)
    share = mass / mass.max()
    return np.asarray((share.sum() ** 2 / (share.size * (share**2).sum())) ** 4)


def reliability_gates(
    logits: ArrayLike, present: ArrayLike | None = None, threshold: float = 0.0
) -> Array:
    """Share of each modality in a sample's fusion: softmax over the present modalities.

    Gates below ``threshold`` are cut as redundant and the rest renormalised. Definition
    chosen here; the paper names a gating that suppresses redundancy.

    Args:
        logits: ``[M, B]``.
        present: Bool ``[M, B]``.
        threshold: In [0, 1 / M), so that some gate always stays.

    Returns:
        ``[M, B]``, >= 0, sums to 1 over the modalities; all 0 for a sample without any.

    Example:
        >>> reliability_gates(np.log([[0.7], [0.2], [0.1]]), threshold=0.15).round(4).tolist()
        [[0.7778], [0.2222], [0.0]]
    """
    z = np.asarray(logits, dtype=np.float64)
    mask = _mask(present, z.shape)
    z = np.where(mask, z, -np.inf)
    top = np.where(mask.any(axis=0), z.max(axis=0), 0.0)
    gates = _shares(np.exp(z - top))
    return _shares(np.where(gates >= threshold, gates, 0.0))


def relative_gates(gates: ArrayLike) -> Array:
    """Gates over the largest of the sample, ``g_m / max_k g_k``.

    Args:
        gates: ``[M, B]``, >= 0.

    Returns:
        ``[M, B]`` in [0, 1]; all 0 for a sample whose gates are.

    Example:
        >>> relative_gates([[0.6, 0.0], [0.3, 0.0]]).tolist()
        [[1.0, 0.0], [0.5, 0.0]]
    """
    g = np.asarray(gates, dtype=np.float64)
    largest = g.max(axis=0)
    return np.asarray(g / np.where(largest > 0, largest, 1.0))


def novelty(features: ArrayLike, mean: ArrayLike, covariance: ArrayLike) -> Array:
    """How far features lie from those of the training data: 1 on average for those.

    ``(x - mu)^T (S + e I)^-1 (x - mu) / tr(S (S + e I)^-1)`` with ``e`` 1% of the mean
    variance. Definition chosen here.

    Args:
        features: ``[B, K]``.
        mean: ``[K]``.
        covariance: Positive semidefinite ``[K, K]``, not 0.

    Returns:
        ``[B]``, >= 0.

    Example:
        >>> novelty([[0.0, 3.0]], [0.0, 0.0], [[2.0, 0.0], [0.0, 0.5]]).round(4).tolist()
        [8.9169]
    """
    s = np.asarray(covariance, dtype=np.float64)
    deviation = np.asarray(features, dtype=np.float64) - np.asarray(mean, dtype=np.float64)
    added = _SHRINKAGE * np.trace(s) / len(s)
    precision = np.linalg.inv(s + added * np.eye(len(s)))
    squared = np.einsum("bi,ij,bj->b", deviation, precision, deviation)
    return np.asarray(squared / np.trace(s @ precision))


def novelty_penalty(novelty: ArrayLike, tolerance: float = 3.0) -> Array:
    """What novelty takes off the logit of a gate, ``max(0, log(novelty / tolerance))``.

    Definition chosen here.

    Args:
        novelty: Any shape, > 0.
        tolerance: > 0.

    Returns:
        Same shape, >= 0.

    Example:
        >>> novelty_penalty([1.0, 30.0]).round(4).tolist()
        [0.0, 2.3026]
    """
    return np.maximum(0.0, np.log(np.asarray(novelty, dtype=np.float64) / tolerance))


# Pieces of the formulas.


def _mask(present: ArrayLike | None, shape: tuple[int, ...]) -> Mask:
    return np.ones(shape, dtype=np.bool_) if present is None else np.asarray(present, dtype=bool)


def _truth(target: ArrayLike, classes: int, ignore_index: int) -> tuple[Array, Mask]:
    """The target as probabilities ``[B, C]``, and which samples count, ``[B]``."""
    t = np.asarray(target)
    if t.ndim == 2:
        return t.astype(np.float64), np.ones(len(t), dtype=np.bool_)
    counted = t != ignore_index
    index = np.where(counted, t, 0)
    if ((index < 0) | (index >= classes)).any():
        raise IndexError(
            f"target: expected class indices in [0, {classes}) or {ignore_index}, got {t.tolist()}"
        )
    return np.eye(classes)[index], counted


def _surprisal(logits: Array) -> Array:
    """``-log softmax`` over the last axis, >= 0; infinite where a logit is -inf."""
    z = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(np.log(np.exp(z).sum(axis=-1, keepdims=True)) - z)


def _expectation(weights: Array, surprisal: Array) -> Array:
    """``sum_c weights_c * surprisal_c`` with ``0 * inf = 0``."""
    return np.asarray((weights * np.where(weights != 0, surprisal, 0.0)).sum(axis=-1))


def _mean_over_heads(values: ArrayLike, present: ArrayLike | None) -> Array:
    """Mean over the present heads; 0 where there is none."""
    v = np.asarray(values, dtype=np.float64)
    mask = _mask(present, v.shape)
    return np.asarray(np.where(mask, v, 0.0).sum(axis=0) / np.maximum(mask.sum(axis=0), 1))


def _in_log_classes(nats: ArrayLike, num_classes: int) -> Array:
    """Nats as a share of the largest entropy, ``log C``; 0 when C = 1."""
    values = np.asarray(nats, dtype=np.float64)
    return np.zeros(values.shape) if num_classes == 1 else values / np.log(num_classes)


def _log_ratios(log_quality: ArrayLike) -> Array:
    """``log r_m = log q_0 - log q_m``, ``[..., M]``."""
    log_q = np.asarray(log_quality, dtype=np.float64)
    _require_modalities(log_q.shape[-1] - 1)
    return log_q[..., :1] - log_q[..., 1:]


def _log_hmir(log_ratios: Array, eps: float) -> Array:
    """``log M - log sum_m exp(-log rate_m)`` with ``rate_m = max(r_m - 1, eps)``."""
    # log(r - 1) = log r + log(1 - 1 / r); below the floor it is not read.
    above = np.maximum(log_ratios, np.log1p(eps))
    log_rates = above + np.log(-np.expm1(-above))
    return np.asarray(np.log(log_ratios.shape[-1]) - np.logaddexp.reduce(-log_rates, axis=-1))


def _exp(values: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(values))


def _shares(values: Array) -> Array:
    """Values divided by their sum over axis 0; 0 where the sum is 0."""
    total = values.sum(axis=0)
    return values / np.where(total > 0, total, 1.0)


def _require_modalities(count: int) -> None:
    if count < 1:
        raise ValueError("expected at least 1 modality after the fused head, got none")
