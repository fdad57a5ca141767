"""The sample-level curriculum: what each sample's predictions say about it.

Statistics are head-major, ``[M + 1, B]``: head 0 is the fused prediction, heads 1 to M
the unimodal ones. ``present`` (bool, same shape, row 0 all true) marks the heads that a
sample has; every mean over heads skips the others, whatever their entries hold.

The paper (arXiv 2503.06456) names prediction deviation, consistency and stability and
weights each by how volatile it is. The formulas are definitions chosen here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dyncim_core._units import per_log_classes

__all__ = [
    "SIGNALS",
    "contradiction",
    "difficulty",
    "doubt",
    "held_out",
    "log_weights",
    "noise_pressure",
    "prediction_consistency",
    "prediction_deviation",
    "prediction_stability",
    "relative_change",
    "sample_weights",
    "seen_noise",
    "share_to_learn",
    "sureness",
    "surprise",
    "target_entropy",
    "volatility_weights",
]

SIGNALS = ("deviation", "consistency", "stability")

_32_BITS = 2**32 - 1
# Of four thousand tried, that of which the number held out of the first 100 to 6,000 samples is
# never far off, for shares of 0.05 to 0.5.
MIX = (0x3A805F, 14, 0x5D5F7413)
# Differences in difficulty below float32 rounding are no differences.
SPREAD_FLOOR = 1e-4
# Of what certain targets leave to be learnt.
_LEAST_TO_LEARN = 0.01
# What a contradiction counts that only one modality bears out.
OF_ONE = 0.0125
# Of what all heads are sure of together, what they may be wrong about together.
COMMON_ERROR = 0.07
# Label noise from which the weighting acts in full.
FULL_NOISE = 0.01
# Nats of a weight, either way. A label that is e^-8 of the others is as good as left out; and a
# class of nothing but such labels comes back as its average follows.
LARGEST_LOG_WEIGHT = 8.0


def prediction_deviation(nll: Tensor, present: Tensor | None = None) -> Tensor:
    """One minus the geometric mean, over heads, of the probability given to the target.

    Definition chosen here; the paper names the quantity.

    Args:
        nll: Negative log-likelihood of the target, ``[M + 1, B]``, in nats, >= 0.
        present: Heads that each sample has, bool ``[M + 1, B]``; all when ``None``.

    Returns:
        ``[B]`` in [0, 1]: 0 when every head is certain of the target.

    Example:
        >>> half = torch.tensor([[0.5], [0.5]])
        >>> prediction_deviation(-half.log())
        tensor([0.5000])
    """
    return torch.expm1(-_mean_over_heads(nll, present)).abs()


def prediction_consistency(distance: Tensor, present: Tensor | None = None) -> Tensor:
    """Mean distance of the unimodal predictions from the fused one: 0 when they agree.

    Definition chosen here; the paper names the quantity. It is used as a discrepancy,
    so large means inconsistent.

    Args:
        distance: ``||p_h - p_0||_2 / sqrt(2)``, ``[M + 1, B]``, row 0 zero.
        present: Heads that each sample has, bool ``[M + 1, B]``; all when ``None``.

    Returns:
        ``[B]`` in [0, 1]; 0 for a sample without any modality.

    Example:
        >>> prediction_consistency(torch.tensor([[0.0], [0.2], [0.4]]))
        tensor([0.3000])
    """
    if distance.shape[0] == 1:
        return torch.zeros_like(distance[0])
    return _mean_over_heads(distance[1:], None if present is None else present[1:])


def prediction_stability(entropy: Tensor, num_classes: int) -> Tensor:
    """Entropy of the fused prediction as a share of its maximum: 0 when decided.

    Definition chosen here; the paper names the quantity. It is used as an instability,
    so large means undecided.

    Args:
        entropy: Entropy of every head, ``[M + 1, B]``, in nats.
        num_classes: Number of classes C.

    Returns:
        ``[B]`` in [0, 1]; 0 when C = 1.

    Example:
        >>> prediction_stability(torch.tensor([[0.6931]]), num_classes=4)
        tensor([0.5000])
    """
    return (entropy[0] * per_log_classes(num_classes)).clamp(0.0, 1.0)


def target_entropy(target: Tensor) -> Tensor:
    """Entropy of targets of class probabilities: the least NLL that any prediction can have.

    ``-sum_c y_c log y_c``. What a head has still to learn is what its NLL has beyond it; with it
    taken off both NLL and entropy, a target that is unsure itself is neither difficult nor
    suspect where a head is just as unsure. Definition chosen here.

    Args:
        target: ``[B, C]``, each row of which sums to 1; what is outside of [0, 1] adds nothing.

    Returns:
        ``[B]`` in [0, log C], in nats.

    Example:
        >>> target_entropy(torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]))
        tensor([0.6931, 0.0000])
    """
    entropies: Tensor = torch.special.entr(target.clamp(0.0, 1.0))
    return entropies.sum(dim=1)


def share_to_learn(entropy: Tensor, num_classes: int) -> Tensor:
    """What targets leave to be learnt, as a share of what certain ones would.

    ``1 - entropy / log C``, 0.01 at least: a head that tells nothing loses ``log C`` to certain
    targets, but only this share of it beyond the entropy of others. ``DynCIMLoss`` divides what
    heads lose by it, so that 0 and ``log C`` mean the same of either, unless targets are within a
    hundredth of telling nothing. It takes the mean of the samples that a call trains on: of few
    whose entropies are far apart, that is rough. Definition chosen here.

    Args:
        entropy: Mean ``target_entropy``, a scalar in [0, log C], in nats.
        num_classes: Number of classes C.

    Returns:
        A scalar in [0.01, 1]; 1 when C = 1.

    Example:
        >>> share_to_learn(torch.tensor(0.6931), num_classes=4)
        tensor(0.5000)
    """
    return (1.0 - entropy * per_log_classes(num_classes)).clamp_min(_LEAST_TO_LEARN)


def surprise(
    nll: Tensor,
    entropy: Tensor,
    present: Tensor | None = None,
    head_weights: Tensor | None = None,
    usual: Tensor | None = None,
) -> Tensor:
    """Deviation beyond what the model's own uncertainty predicts.

    A calibrated head expects a negative log-likelihood equal to its entropy, since
    ``E_{c ~ p}[-log p_c] = H(p)``. The excess is large when confident heads contradict
    the target, as they do when the target is wrong. ``DynCIMLoss`` weights heads by the square
    of their ``trust``, since one that predicts little of what it was not trained on is surprised
    by right labels as well; and bounds the entropy by the NLL that is usual by now, since a head
    that has learnt its task is unsure of labels that it learns by heart. Definition chosen here.

    Args:
        nll: Negative log-likelihood of the target, ``[M + 1, B]``, in nats.
        entropy: Entropy of every head, ``[M + 1, B]``, in nats.
        present: Heads that each sample has, bool ``[M + 1, B]``; all when ``None``.
        head_weights: Weight of each head in the mean, ``[M + 1]``, > 0; alike when ``None``.
        usual: Average NLL of each head, ``[M + 1]``, in nats, that its entropy counts up to; in
            full when ``None``.

    Returns:
        ``[B]``, >= 0, in nats.

    Example:
        >>> p = torch.tensor([0.9, 0.1])
        >>> entropy = torch.special.entr(p).sum().expand(1, 2)
        >>> surprise(-p.log().unsqueeze(0), entropy)
        tensor([0.0000, 1.9775])
    """
    if usual is not None:
        entropy = torch.minimum(entropy, usual.to(entropy.dtype).unsqueeze(1))
    return _mean_over_heads((nll - entropy).clamp_min(0.0), present, head_weights)


def relative_change(current: Tensor, previous: Tensor, eps: float = 1e-3) -> Tensor:
    """How far a quantity moved, as a share of what it was. Definition chosen here.

    Args:
        current: Any shape, >= 0.
        previous: Same shape, >= 0.
        eps: Added to the denominator, so that a quantity near 0 does not explode.

    Returns:
        ``|current - previous| / (|previous| + eps)``, same shape, >= 0.

    Example:
        >>> relative_change(torch.tensor([0.3]), torch.tensor([0.2]), eps=0.0)
        tensor([0.5000])
    """
    return (current - previous).abs() / (previous.abs() + eps)


def volatility_weights(volatility: Tensor) -> Tensor:
    """Weight of each signal: its share of all volatility, so that what moves counts most.

    The paper weights the signals by volatility; this normalisation is chosen here.

    Args:
        volatility: ``[K]``, >= 0.

    Returns:
        ``[K]``, >= 0, sums to 1; uniform when nothing moves.

    Example:
        >>> volatility_weights(torch.tensor([3.0, 1.0]))
        tensor([0.7500, 0.2500])
    """
    shares = volatility / volatility.sum()
    return shares.nan_to_num(1.0 / volatility.numel())  # 0 / 0


def difficulty(signals: Tensor, signal_weights: Tensor) -> Tensor:
    """Weighted mean of the signals of a sample. Definition chosen here.

    Args:
        signals: ``[K, B]`` in [0, 1].
        signal_weights: ``[K]``, >= 0, sums to 1.

    Returns:
        ``[B]`` in [0, 1].

    Example:
        >>> difficulty(torch.tensor([[0.2], [0.6]]), torch.tensor([0.5, 0.5]))
        tensor([0.4000])
    """
    return (signal_weights.unsqueeze(1) * signals).sum(dim=0)


def doubt(prediction: Tensor, nll: Tensor, entropy: Tensor, target: Tensor) -> Tensor:
    """How far each head by itself contradicts a sample's target.

    ``1 - exp(-max(0, nll_h - entropy_h))`` where it predicts another class, else 0: as far as it is
    surprised. A target of class probabilities, which may be unsure itself, is contradicted by as
    much of that as it prefers its likeliest class to the predicted one. Definition chosen here.

    Args:
        prediction: Predicted class of every head, int64 ``[M + 1, B]``; of absent ones anything.
        nll: Of the target under every head, in nats, ``[M + 1, B]``.
        entropy: Of every head's prediction, in nats, ``[M + 1, B]``.
        target: Class of each sample, int64 ``[B]``, or class probabilities, ``[B, C]``.

    Returns:
        ``[M + 1, B]`` in [0, 1].

    Example:
        >>> nll, entropy = torch.tensor([[2.3, 2.3]]), torch.tensor([[0.3, 0.3]])
        >>> doubt(torch.tensor([[1, 0]]), nll, entropy, torch.tensor([0, 0]))
        tensor([[0.8647, 0.0000]])
    """
    surprised = torch.expm1((entropy - nll).clamp_max(0.0)).abs()
    if not target.is_floating_point():
        return surprised.masked_fill(prediction == target, 0.0)
    known = prediction.t().clamp(0, target.shape[1] - 1)  # whatever absent heads predict
    return surprised * (target.amax(dim=1) - target.gather(1, known).t())


def sureness(entropy: Tensor, num_classes: int) -> Tensor:
    """How sure each head is of what it predicts: ``clamp(1 - entropy / log C, 0, 1)``.

    Definition chosen here.

    Args:
        entropy: Of every head's prediction, in nats, ``[M + 1, B]``; of class probabilities less
            their own.
        num_classes: Number of classes C.

    Returns:
        Same shape, in [0, 1]; 1 when C = 1.

    Example:
        >>> sureness(torch.tensor([[0.6931, 0.0]]), num_classes=4)
        tensor([[0.5000, 1.0000]])
    """
    return torch.rsub(entropy, 1.0, alpha=per_log_classes(num_classes)).clamp(0.0, 1.0)


def contradiction(
    prediction: Tensor, doubt: Tensor, sureness: Tensor, present: Tensor | None = None
) -> Tensor:
    """How far all heads of a sample together contradict its target, beyond errors in common.

    The least ``doubt`` of any head, less 0.07 of the least ``sureness``, where all predict the same
    class, else 0; an eightieth of that where the fused head and one modality are all.

    A hard sample confuses some heads, in different ways, or leaves some unsure; a wrong label
    has all of them sure of another class. The share of such samples is what the run itself
    shows of label noise. But modalities that share something err about it together: only what goes
    beyond a fourteenth of all that they are sure of together is taken for wrong labels. One
    modality alone is next to no evidence: what it does not know of its label, another one that
    tells nothing by itself may explain, and a fusion repeats the first until it has learnt to put
    the two together. The fused head alone agrees with nobody: 0 for a sample without any modality.
    Definition chosen here.

    Args:
        prediction: Predicted class of every head, int64 ``[M + 1, B]``.
        doubt: As the function of that name gives it, ``[M + 1, B]`` in [0, 1].
        sureness: As the function of that name gives it, ``[M + 1, B]`` in [0, 1].
        present: Heads that each sample has, bool ``[M + 1, B]``; all when ``None``.

    Returns:
        ``[B]`` in [-0.07, 1]; below 0 for what all are sure of and bear out.

    Example:
        >>> prediction = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 2, 0]])
        >>> doubted, sure = torch.tensor([[0.9, 0.9, 0.0]] * 3), torch.full((3, 3), 0.5)
        >>> contradiction(prediction, doubted, sure)
        tensor([ 0.8650,  0.0000, -0.0350])
    """
    both = torch.stack([doubt, sureness])
    agree = torch.where(prediction[1:] == prediction[0], 1, -len(prediction))
    if present is not None:
        agree, both = agree * present[1:], torch.where(present, both, 1.0)
    least, modalities = both.amin(dim=1), agree.sum(dim=0)  # below 0 where one dissents
    beyond = torch.sub(least[0], least[1], alpha=COMMON_ERROR)
    of_one = torch.where(modalities == 1, OF_ONE * beyond, 0.0)
    return torch.where(modalities > 1, beyond, of_one)


def held_out(index: Tensor, share: float) -> Tensor:
    """Which samples to keep out of training, to hear what heads that never saw them say.

    The same ones whatever the order, the epoch and the process: those whose index, its bits
    mixed, lies below ``share`` of 32 bits. Definition chosen here.

    Args:
        index: Position in the training set, int64 of any shape, >= 0.
        share: Of the training set, in [0, 1]; not checked.

    Returns:
        Bool, same shape.

    Example:
        >>> held_out(torch.arange(8), share=0.25)
        tensor([ True,  True,  True, False,  True, False, False, False])
    """
    bits = index * MIX[0]
    bits = (bits ^ (bits >> MIX[1])) * MIX[2]  # whose low 32 bits are right past 2^63 as well
    return (bits & _32_BITS) < round(share * 2**32)


def seen_noise(contradicted: Tensor, trained: Tensor, held_out: Tensor, skill: Tensor) -> Tensor:
    """Label noise that samples held out show: to all able heads, or to the fused one alone.

    ``max(contradicted, c (1 - c / c') max(0, 1 - max_k s_k / s_0)^3)``, over modalities k.
    What a fusion doubts of samples held out, and no less of those that it is trained on, it may
    just not have learnt yet. What it doubts less and less of the latter alone, it learns by heart;
    once nothing of that is left there is nothing to see, as on clean data whose classes do not
    overlap, which is hardly doubted while it is learnt. And a fusion is a witness of its own only
    as far as it knows more than any modality, or it may repeat one that does not know better;
    cubed, since skills found on few samples are rough. Definition chosen here.

    Args:
        contradicted: ``contradiction``, averaged over samples held out, a scalar in [-0.07, 1].
        trained: ``doubt`` of the fused head, averaged over samples trained on, ``c``, a scalar in
            [0, 1].
        held_out: The same over samples held out, ``c'``.
        skill: Of all heads, ``[M + 1]`` in [0, 1].

    Returns:
        A scalar in [-0.07, 1], below 0 where nothing is seen; ``contradicted`` without a modality
        (M = 0).

    Example:
        >>> trained, held_out = torch.tensor(0.1), torch.tensor(0.2)
        >>> seen_noise(torch.tensor(0.01), trained, held_out, torch.tensor([0.5, 0.0]))
        tensor(0.0500)
        >>> seen_noise(torch.tensor(0.01), trained, held_out, torch.tensor([0.5, 0.5]))
        tensor(0.0100)
    """
    if skill.shape[-1] == 1:
        return contradicted
    ahead = torch.rsub(skill[1:].amax() / skill[0], 1.0)
    by_heart = torch.addcdiv(trained, trained.square(), held_out, value=-1.0)  # c (1 - c / c')
    return torch.fmax(contradicted, by_heart * ahead.clamp_min(0.0).pow(3))  # of 0 / 0, the former


def noise_pressure(
    label_noise: Tensor, trust: Tensor | float = 1.0, full_at: float = FULL_NOISE
) -> Tensor:
    """How much of the surprise weighting to apply: none on clean data, all on noisy data.

    As long as the fusion predicts little of what it was not trained on, wrong labels and such as
    it has not learnt yet surprise it alike, and less is applied. Definition chosen here.

    Args:
        label_noise: Mean ``contradiction``, in [-0.07, 1].
        trust: In the fused head, in [0, 1]; a number or a tensor that broadcasts.
        full_at: Share from which the weighting acts in full, > 0.

    Returns:
        Same shape, in [0, 1]: ``clamp(label_noise / full_at, 0, 1) * min(1, 4 * trust)``.

    Example:
        >>> noise_pressure(torch.tensor([-0.01, 0.005, 0.3]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    credible = (4.0 * trust).clamp_max(1.0) if isinstance(trust, Tensor) else min(4.0 * trust, 1.0)
    return (label_noise / full_at).clamp(0.0, 1.0) * credible


def log_weights(
    surprise: Tensor,
    difficulty: Tensor,
    *,
    surprise_strength: Tensor | float,
    pacing_strength: Tensor | float,
    valid: Tensor | None = None,
) -> Tensor:
    """Logarithm of the weight of each sample, before ``sample_weights`` levels the classes.

    ``-surprise_strength * surprise - pacing_strength * z(difficulty)`` in [-8, 8]: less for
    surprising labels, and easy samples first; ``z`` standardises over the valid samples. The
    paper names a curriculum that reweights samples; this definition is chosen here.

    Args:
        surprise: ``[B]``, >= 0.
        difficulty: ``[B]`` in [0, 1].
        surprise_strength: Scalar, >= 0.
        pacing_strength: Scalar, >= 0; falls to 0 as the model becomes competent.
        valid: Bool ``[B]``, samples to weigh; all when ``None``. What the others get means
            nothing.

    Returns:
        ``[B]`` in [-8, 8].

    Example:
        >>> log_weights(torch.tensor([0.0, 0.0, 2.0]), torch.tensor([0.5, 0.5, 0.5]),
        ...             surprise_strength=2.0, pacing_strength=0.5)
        tensor([-0., -0., -4.])
    """
    if valid is None:
        valid = torch.ones_like(surprise, dtype=torch.bool)
    z = _standardised(difficulty, valid)
    found: Tensor = -surprise_strength * surprise - pacing_strength * z
    return found.clamp(-LARGEST_LOG_WEIGHT, LARGEST_LOG_WEIGHT)


def sample_weights(
    log_weights: Tensor,
    group: Tensor,
    log_average: Tensor,
    decay: float,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weight of each sample: what it has over what those of its class have on average.

    Samples compete with those of their own class: a class that is rare surprises all heads
    until it is learnt, and would not be if that took its weight away. The average runs over
    all calls, this one included, so that a weight means the same in a batch of any size, and
    those of n samples of a class are at most ``n / (1 - decay^n)`` together. Definition chosen
    here.

    Args:
        log_weights: As the function of that name gives them, ``[B]``.
        group: Class of each sample, or its remainder by K, int64 ``[B]`` in [0, K).
        log_average: Logarithm of the running average of each class, ``[K]``.
        decay: Of the average, for each sample of a class, in [0, 1).
        valid: Bool ``[B]``, samples to weigh; all when ``None``. The others get 1, whatever
            they hold.

    Returns:
        The weights, ``[B]``, > 0, with mean 1 over the samples of a class in the long run; and the
        average that they are over, ``log(decay^n average + (1 - decay^n) mean)`` for a class
        with n samples, ``[K]``.

    Example:
        >>> own, group = torch.tensor([2.0, 2.0, 0.5]).log(), torch.tensor([0, 0, 1])
        >>> weights, log_average = sample_weights(own, group, torch.zeros(2), decay=0.5)
        >>> weights, log_average.exp()
        (tensor([1.1429, 1.1429, 0.6667]), tensor([1.7500, 0.7500]))
    """
    before = log_average.index_select(0, group)
    ahead = (log_weights - before).exp()
    counted = torch.ones_like(ahead)
    if valid is not None:
        ahead, counted = torch.where(valid, ahead, 0.0), valid.to(ahead.dtype)
    sums = ahead.new_zeros((2, len(log_average)))
    number, total = sums.index_add_(1, group, torch.stack([counted, ahead]))
    kept: Tensor = decay**number
    moves = (total / number.clamp_min(1.0)).lerp(kept.new_ones(()), kept)
    average = log_average + moves.log()
    weights = (log_weights - average.index_select(0, group)).exp()
    return weights if valid is None else torch.where(valid, weights, 1.0), average


def _mean_over_heads(
    values: Tensor, present: Tensor | None, weights: Tensor | None = None
) -> Tensor:
    if weights is not None:
        weights = weights.to(values.dtype).unsqueeze(1).expand_as(values)
        if present is not None:
            weights, values = torch.where(present, weights, 0.0), torch.where(present, values, 0.0)
        return (weights * values).sum(dim=0) / weights.sum(dim=0)
    if present is None:
        return values.mean(dim=0)
    count = present.sum(dim=0).clamp_min(1)
    return torch.where(present, values, 0.0).sum(dim=0) / count


def _standardised(values: Tensor, valid: Tensor) -> Tensor:
    count = valid.sum(dtype=values.dtype).clamp_min(1.0)
    values = torch.where(valid, values, 0.0)
    centred = torch.where(valid, values - values.sum() / count, 0.0)
    return centred / (centred.dot(centred) / count).sqrt().clamp_min(SPREAD_FLOOR)
