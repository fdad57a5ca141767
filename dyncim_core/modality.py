"""The modality-level curriculum: how much fusion gains over each modality.

Everything takes ``log_quality``, ``[..., M + 1]`` with the fused head first:
``log q_h = -loss_h``, the log of the geometric mean probability that head h gives to
the targets. Ratios are formed in log space, so that no finite input overflows to NaN.

The paper (arXiv 2503.06456) names the Geometric Mean Ratio, the Harmonic Mean
Improvement Rate and their adaptive balance. The formulas are definitions chosen here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dyncim_core._units import own_share, per_log_classes

__all__ = [
    "augmentation_rates",
    "balance_factor",
    "expected_log_likelihood",
    "generalisation",
    "geometric_mean_ratio",
    "harmonic_mean_improvement_rate",
    "improvement_ratios",
    "logit_slopes",
    "logit_weights",
    "loss_shares",
    "modality_coefficients",
    "modality_weights",
    "pooled_skill",
    "quality",
    "redundancy",
    "relative_logit_weights",
    "skill",
    "standing",
    "trust",
    "witnesses",
]

LEAST = 0.02  # or what is silenced could never learn to be heard
MOST = 2.0  # weight of logits
# In the pool: of a class that is ruled out 0 times minus infinity would be no number, and what is
# less than this would outweigh in an average all that is heard for a thousand calls.
LEAST_LOG_PROBABILITY = -100.0
# What priors are worth, in samples.
PRIOR_OF_SKILL, PRIOR_OF_WEIGHT = 20.0, 10.0
LEAST_QUALITY = 0.1  # or the first little that is learnt would seem not to hold
LEAST_LOSS = 0.1  # or an encoder that fusion has not found a use for yet would never learn
SMALLEST_ERROR = 1e-3  # of chance; over less, rounding would look like skill
SMALLEST_SKILL = 1e-4  # what is less is rounding, and must not count as knowing something


def improvement_ratios(log_quality: Tensor) -> Tensor:
    """Quality of the fusion over that of each modality, ``r_m = q_0 / q_m``.

    Definition chosen here.

    Args:
        log_quality: ``[..., M + 1]``, fused head first; any real values.

    Returns:
        ``[..., M]``, >= 0 (0 or infinite where the ratio leaves the dtype's range).

    Raises:
        ValueError: There is no modality (M = 0).

    Example:
        >>> improvement_ratios(torch.tensor([0.8, 0.4, 0.8]).log())
        tensor([2., 1.])
    """
    return _log_ratios(log_quality).exp()


def geometric_mean_ratio(log_quality: Tensor) -> Tensor:
    """Geometric mean of the improvement ratios (GMR): the global gain of the fusion.

    1 when the fusion equals the geometric mean of its modalities; unchanged by the
    order of the modalities, by a common scale of all qualities, and by repeating the
    set of modalities. The paper names the quantity; this definition is chosen here.

    Args:
        log_quality: ``[..., M + 1]``, fused head first; any real values.

    Returns:
        ``[...]``, >= 0 (0 or infinite where it leaves the dtype's range).

    Raises:
        ValueError: There is no modality (M = 0).

    Example:
        >>> geometric_mean_ratio(torch.tensor([0.8, 0.4, 0.2]).log())
        tensor(2.8284)
    """
    return _log_ratios(log_quality).mean(dim=-1).exp()


def harmonic_mean_improvement_rate(log_quality: Tensor, eps: float = 1e-3) -> Tensor:
    """Harmonic mean of the improvement rates ``r_m - 1`` (HMIR): the local gain.

    Governed by the modality that fusion improves on least; rates are floored at
    ``eps``. At most the geometric and the arithmetic mean of the floored rates. The
    paper names the quantity; this definition is chosen here.

    Args:
        log_quality: ``[..., M + 1]``, fused head first; any real values.
        eps: Floor of each rate, > 0.

    Returns:
        ``[...]``, >= ``eps`` (infinite where it leaves the dtype's range).

    Raises:
        ValueError: There is no modality (M = 0).

    Example:
        >>> harmonic_mean_improvement_rate(torch.tensor([0.8, 0.4, 0.2]).log())
        tensor(1.5000)
    """
    return _log_hmir(_log_ratios(log_quality), eps).exp()


def balance_factor(log_quality: Tensor, eps: float = 1e-3) -> Tensor:
    """Share of the modality-level objective, ``clamp(1 - (1 + HMIR) / GMR, 0, 1)``.

    With every rate above ``eps``, ``1 + HMIR <= GMR`` with equality only when all rates
    are equal: 0 when the modalities are balanced, towards 1 as one dominates. The paper
    names an adaptive balance; this definition is chosen here.

    Args:
        log_quality: ``[..., M + 1]``, fused head first; any real values.
        eps: Floor of each improvement rate, > 0.

    Returns:
        ``[...]`` in [0, 1].

    Raises:
        ValueError: There is no modality (M = 0).

    Example:
        >>> balance_factor(torch.tensor([0.8, 0.4, 0.4]).log())
        tensor(0.)
        >>> balance_factor(torch.tensor([0.8, 0.4, 0.05]).log())
        tensor(0.4918)
    """
    return _balance_factor(_log_ratios(log_quality), eps)


def modality_weights(log_quality: Tensor, temperature: float = 1.0, cap: float = 1.0) -> Tensor:
    """Weight of each modality's own loss: the further behind the fusion, the larger.

    ``softmax_m(min(log r_m, cap) / temperature)``. Past ``cap`` nats of lag the weight
    stops growing, so that a modality with nothing to give does not take everything.
    Definition chosen here.

    Args:
        log_quality: ``[..., M + 1]``, fused head first; any real values.
        temperature: Of the softmax, > 0; larger is more uniform.
        cap: Lag in nats from which the weight is constant.

    Returns:
        ``[..., M]``, >= 0, sums to 1 over the modalities.

    Raises:
        ValueError: There is no modality (M = 0).

    Example:
        >>> modality_weights(torch.tensor([0.8, 0.8, 0.4]).log())
        tensor([0.3333, 0.6667])
    """
    return _weights(_log_ratios(log_quality), temperature, cap)


def modality_coefficients(log_quality: Tensor) -> Tensor:
    """Factor of each modality's loss, before ``loss_shares`` and ``generalisation``.

    ``(1 - lambda) + lambda * M * alpha_m`` with the balance factor and the modality
    weights: all 1 when the modalities are balanced. Definition chosen here.

    Args:
        log_quality: ``[..., M + 1]``, fused head first; any real values.

    Returns:
        ``[..., M]``, >= 0, mean 1 over the modalities.

    Raises:
        ValueError: There is no modality (M = 0).

    Example:
        >>> modality_coefficients(torch.tensor([0.8, 0.4, 0.4]).log())
        tensor([1., 1.])
    """
    log_ratios = _log_ratios(log_quality)
    modalities = log_ratios.shape[-1]
    ones = torch.ones_like(log_ratios)
    if modalities == 1:
        return ones
    alpha = _weights(log_ratios)
    share = _balance_factor(log_ratios).unsqueeze(-1)
    return torch.lerp(ones, modalities * alpha, share)


def quality(log_quality: Tensor, num_classes: int) -> Tensor:
    """What a head has learnt, ``clamp(1 - loss / log C, 0, 1)``: 0 is chance, 1 certain.

    Definition chosen here.

    Args:
        log_quality: ``-loss`` in nats, any shape.
        num_classes: Number of classes C.

    Returns:
        Same shape, in [0, 1]; 0 when C = 1.

    Example:
        >>> quality(torch.tensor([-math.log(2.0), -9.0]), num_classes=4)
        tensor([0.5000, 0.0000])
    """
    if num_classes == 1:
        return torch.zeros_like(log_quality)
    certain = log_quality.new_ones(())
    return certain.add(log_quality, alpha=per_log_classes(num_classes)).clamp(0.0, 1.0)


def redundancy(log_quality: Tensor, fused_quality: Tensor, skill: Tensor | None = None) -> Tensor:
    """Share of what fusion has learnt that its modalities know on their own.

    ``quality_0 / (1 + HMIR)^4``: 0 before anything is learnt, small while fusion is ahead of all
    its modalities, towards 1 as it improves on some modality by nothing. Modalities that know the
    training set by heart look as good as a fusion that understands it: where skills are known, at
    most the same of them, ``trust_0 / (1 + HMIR(log trust))^4``. Definition chosen here.

    Args:
        log_quality: ``[..., M + 1]``, fused head first; any real values.
        fused_quality: ``[...]`` in [0, 1], what the fusion has learnt, see ``quality``.
        skill: Of all heads, ``[M + 1]`` in [0, 1]; 0 for all as long as none is known.

    Returns:
        ``[...]`` in [0, 1].

    Raises:
        ValueError: There is no modality (M = 0).

    Example:
        >>> log_quality = torch.tensor([0.8, 0.4, 0.4]).log()
        >>> redundancy(log_quality, torch.tensor(0.9))
        tensor(0.0562)
        >>> redundancy(log_quality, torch.tensor(0.9), torch.tensor([0.8, 0.2, 0.2]))
        tensor(0.0031)
    """
    share = fused_quality / (1.0 + harmonic_mean_improvement_rate(log_quality)).square().square()
    if skill is None:
        return share
    shown = trust(skill)
    ahead = (1.0 + harmonic_mean_improvement_rate(shown.log())).square().square()
    return torch.minimum(share, shown[0] / ahead)


def skill(hit_rate: Tensor, chance: Tensor | float) -> Tensor:
    """What is left of the hits after those of chance: 0 is guessing, 1 always right.

    ``(h - c) / (1 - c)``. Of samples that were not trained on, it tells what generalises, which
    the quality of a head that knows its training set by heart does not. Definition chosen here.

    Args:
        hit_rate: Share of held-out samples whose target a head predicts, any shape in [0, 1].
        chance: The same for targets drawn from the training set, whatever the sample: the mean
            over those samples of how frequent the predicted class is, in [0, 1], same shape or a
            number; 1 / C when classes are balanced.

    Returns:
        Same shape, in [0, 1]; 0 for less than 1e-4.

    Example:
        >>> skill(torch.tensor([0.25, 0.5, 1.0]), chance=0.25)
        tensor([0.0000, 0.3333, 1.0000])
    """
    left = torch.as_tensor(1.0 - chance, dtype=hit_rate.dtype, device=hit_rate.device)
    found = (hit_rate - chance) / left.clamp_min(SMALLEST_ERROR)
    return F.threshold(found, SMALLEST_SKILL, 0.0).clamp_max(1.0)


def pooled_skill(skill: Tensor, samples: float) -> Tensor:
    """Skills of heads, pulled towards their mean when few samples are held out.

    ``(n s_h + 20 s) / (n + 20)`` of the mean ``s``: a handful of samples cannot tell a head that
    is good from one that is not. Definition chosen here.

    Args:
        skill: Of all heads, ``[M + 1]`` in [0, 1].
        samples: How many are held out, >= 0.

    Returns:
        Same shape, in [0, 1].

    Example:
        >>> pooled_skill(torch.tensor([0.8, 0.4]), samples=20)
        tensor([0.7000, 0.5000])
    """
    own = own_share(samples, PRIOR_OF_SKILL)
    return torch.lerp(skill.mean(dim=-1, keepdim=True), skill, own)


def expected_log_likelihood(
    logits: Tensor, weight: Tensor, shared: Tensor, present: Tensor | None = None
) -> Tensor:
    """What a pool of all heads expects the log-likelihood of the target to be under each.

    ``sum_c p[c] log p_h[c]`` under the pool ``p ~ prod_h p_h^(w_h)``. The derivative of the pool's
    log-likelihood by ``w_h`` is what head h gives to the target, less this: a head whose targets
    are likelier than the pool expects deserves more weight. The fused logits of training are those
    of a head plus c times the modalities', but for gates, dropout and prior: ``log p_0`` is what
    that head says by itself, theirs less c times the modalities'. -100 is the least of any. Genest
    and Zidek (Statistical Science 1986) review such logarithmic opinion pools.

    Args:
        logits: Of all heads, the fused one first, ``[M + 1, B, C]``.
        weight: Of each head, ``[M + 1]``, > 0.
        shared: What the fused logits hold of the modalities', ``c``, a scalar in [0, 1].
        present: Heads that each sample has, bool ``[M + 1, B]``; all when ``None``. Absent ones
            are not in the pool, whatever they hold.

    Returns:
        ``[M + 1, B]``, in nats; 0 for an absent head.

    Example:
        >>> logits = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]]).log()
        >>> expected_log_likelihood(logits, torch.ones(2), shared=torch.tensor(0.0))
        tensor([[-0.3251],
                [-0.6931]])
        >>> expected_log_likelihood(logits, torch.ones(2), shared=torch.tensor(1.0))
        tensor([[ 0.3681],
                [-0.6931]])
    """
    log_probs = logits.log_softmax(dim=2).clamp_min(LEAST_LOG_PROBABILITY)
    if present is not None:
        log_probs = torch.where(
            present.unsqueeze(2), log_probs, 0.0
        ).contiguous()  # what follows is in place
    _take_off(log_probs, shared, log_probs)
    pool = torch.einsum("h,hbc->bc", weight.to(log_probs.dtype), log_probs).softmax(dim=1)
    return torch.einsum("bc,hbc->hb", pool, log_probs)


def logit_slopes(
    nll: Tensor, expected: Tensor, shared: Tensor, present: Tensor | None = None
) -> Tensor:
    """How the pool's NLL of each sample changes with the weight of each head.

    ``l_h + x_h``, ``l_0`` of what the head says by itself: the NLL of the fused logits less c times
    the modalities'. Definition chosen here.

    Args:
        nll: Of the target under all heads, the fused one first, in nats, ``[M + 1, B]``, ``l``.
        expected: ``expected_log_likelihood`` of the same, ``[M + 1, B]``, ``x``.
        shared: What the fused logits hold of the modalities', ``c``, a scalar in [0, 1].
        present: Heads that each sample has, bool ``[M + 1, B]``; all when ``None``.

    Returns:
        ``[M + 1, B]``; of absent heads anything.

    Example:
        >>> nll, expected = torch.tensor([[0.5], [1.5]]), torch.tensor([[-0.4], [-0.7]])
        >>> logit_slopes(nll, expected, torch.tensor(0.5))
        tensor([[-0.6500],
                [ 0.8000]])
    """
    slopes = nll + expected
    _take_off(slopes, shared, nll if present is None else torch.where(present, nll, 0.0))
    return slopes


def _take_off(ours: Tensor, shared: Tensor, theirs: Tensor) -> None:
    """From the first row, so much of all others; in place, which autocast leaves as precise."""
    ours, theirs = ours.flatten(1), theirs.flatten(1)
    share = shared.detach().to(ours.dtype).expand(1, len(theirs) - 1)
    ours[:1].addmm_(share, theirs[1:].to(ours.dtype), alpha=-1.0)


def logit_weights(weight: Tensor, skill: Tensor, slope: Tensor, samples: float) -> Tensor:
    """What the weights move towards by which the logits of heads add up best on held-out samples.

    ``(n (w_h - g_h) + 10 s_h) / (n + 10)``, in [0.02, 2]: up the gradient of the pool's
    likelihood, and towards the skills as far as few samples are held out. Modalities
    that are surer than they are right, or of what fusion knows better, lose their weight. To learn
    on samples held out how predictors add up is stacking (Wolpert, Neural Networks 1992); this
    definition is chosen here.

    Args:
        weight: Of all heads so far, ``[M + 1]``.
        skill: Of all heads, ``[M + 1]`` in [0, 1], ``s``.
        slope: Average ``logit_slopes`` of held-out samples, ``[M + 1]``, ``g``.
        samples: How many are held out, ``n``, >= 0.

    Returns:
        ``[M + 1]`` in [0.02, 2].

    Example:
        >>> skill, slope = torch.tensor([0.9, 0.5]), torch.tensor([0.0, 0.8])
        >>> logit_weights(torch.ones(2), skill, slope, samples=20)
        tensor([0.9667, 0.3000])
    """
    goal = torch.lerp(skill, weight - slope, own_share(samples, PRIOR_OF_WEIGHT))
    return goal.clamp(LEAST, MOST)


def relative_logit_weights(weight: Tensor) -> Tensor:
    """What the logits of each modality count next to the fused head's, ``min(2, w_m / w_0)``.

    Only ratios count: whoever adds up logits has those of the fused head in full. Definition chosen
    here.

    Args:
        weight: Of all heads, ``[M + 1]``, > 0, see ``logit_weights``.

    Returns:
        ``[M]`` in [0, 2].

    Example:
        >>> relative_logit_weights(torch.tensor([0.8, 0.4, 2.0]))
        tensor([0.5000, 2.0000])
    """
    return (weight[1:] / weight[0]).clamp_max(MOST)


def witnesses(skill: Tensor) -> Tensor:
    """Heads that are asked whether a label looks wrong: the fused one and able modalities.

    A modality that has not half the skill of the best one has no say: it could agree with nobody,
    whatever the label. Definition chosen here.

    Args:
        skill: Of all heads, ``[M + 1]`` in [0, 1].

    Returns:
        Bool, same shape.

    Example:
        >>> witnesses(torch.tensor([0.8, 0.6, 0.3, 0.2]))
        tensor([ True,  True,  True, False])
    """
    if skill.shape[-1] == 1:
        return torch.ones_like(skill, dtype=torch.bool)
    asked = 2.0 * skill >= skill[..., 1:].amax(dim=-1, keepdim=True)
    asked[..., 0] = True
    return asked


def trust(skill: Tensor) -> Tensor:
    """How far each head is to be believed: its skill, 0.02 at least.

    Definition chosen here.

    Args:
        skill: Of any heads, one at least, ``[H]`` in [0, 1].

    Returns:
        ``[H]`` in [0.02, 1]; all 1 when no skill is above 0, as where nothing is held out.

    Example:
        >>> trust(torch.tensor([0.8, 0.0])), trust(torch.zeros(2))
        (tensor([0.8000, 0.0200]), tensor([1., 1.]))
    """
    known = skill.amax(dim=-1, keepdim=True) > 0.0
    return torch.where(known, skill.clamp_min(LEAST), 1.0)


def standing(skill: Tensor) -> Tensor:
    """How a modality compares with the best one, in full from half of its skill on.

    ``min(1, 2 s_m / max_k s_k)``: what is reliable in training need not be so elsewhere.
    Definition chosen here.

    Args:
        skill: Of the modalities (not the fused head), ``[M]`` in [0, 1].

    Returns:
        ``[M]`` in [0, 1]; all 1 when no skill is above 0.

    Raises:
        ValueError: There is no modality (M = 0).

    Example:
        >>> standing(torch.tensor([0.9, 0.45, 0.225, 0.0]))
        tensor([1.0000, 1.0000, 0.5000, 0.0000])
    """
    _check_modalities("skill", skill.shape[-1])
    best = skill.amax(dim=-1, keepdim=True)
    return (2.0 * skill / best).nan_to_num(nan=1.0).clamp_max(1.0)  # of best 0


def loss_shares(skill: Tensor) -> Tensor:
    """What each modality's own loss counts: less with less skill than the fusion has.

    ``max(0.1, (min(1, 3 max_h s_h) min(1, s_m / s_0))^2)``. An encoder is not to be trained for
    what its modality cannot tell on its own, but for what fusion makes of it, which does not show
    before some head has a skill of a third. Definition chosen here.

    Args:
        skill: Of all heads, ``[M + 1]`` in [0, 1].

    Returns:
        ``[M]`` in [0.1, 1]; all alike as long as the fused head has no skill, and all 1 as long
        as no head has any, as where nothing is held out.

    Raises:
        ValueError: There is no modality (M = 0).

    Example:
        >>> loss_shares(torch.tensor([0.8, 0.9, 0.4, 0.0]))
        tensor([1.0000, 0.2500, 0.1000])
        >>> loss_shares(torch.tensor([0.2, 0.2, 0.1]))
        tensor([0.3600, 0.1000])
    """
    _check_modalities("skill", skill.shape[-1] - 1, " after the fused head")
    best = skill.amax(dim=-1, keepdim=True)
    learnt = torch.where(best > 0.0, (3.0 * best).clamp_max(1.0), 1.0)
    share = (skill[..., 1:] / skill[..., :1]).nan_to_num(nan=1.0)  # of no skill, all
    return (learnt * share.clamp_max(1.0)).square().clamp_min(LEAST_LOSS)


def generalisation(held_out_quality: Tensor, quality: Tensor) -> Tensor:
    """How far what a head learns in training holds for samples that are held out.

    ``min(1, (q' + 0.1) / (q + 0.1))^4``. The loss of a modality that learns its training set by
    heart would go on to bend its encoder long after fusion has learnt what there is, the more so
    the less it tells. Wang, Tran and Feiszli (CVPR 2020) weigh losses by generalisation over
    overfitting; this definition is chosen here.

    Args:
        held_out_quality: ``quality`` of the average NLL of held-out samples, any shape in [0, 1];
            in a curriculum, each NLL counts as far as the label is believed.
        quality: That of training samples, same shape.

    Returns:
        Same shape, in [0, 1].

    Example:
        >>> generalisation(torch.tensor([0.9, 0.4, 0.0]), torch.tensor([0.9, 0.9, 0.0]))
        tensor([1.0000, 0.0625, 1.0000])
    """
    kept = (held_out_quality + LEAST_QUALITY) / (quality + LEAST_QUALITY)
    return kept.clamp_max(1.0).square().square()


def augmentation_rates(skill: Tensor, eps: float = 1e-3) -> Tensor:
    """How often to swap or drop each modality, relative to the one that errs most.

    ``(1 - s_m + eps) / (1 - min_k s_k + eps)``: a modality that is hardly ever wrong is left
    alone. Definition chosen here.

    Args:
        skill: Of the modalities (not the fused head), ``[M]`` in [0, 1].
        eps: Keeps the ratio defined where all are always right.

    Returns:
        ``[M]`` in (0, 1]; all 1 when no skill is above 0.

    Raises:
        ValueError: There is no modality (M = 0).

    Example:
        >>> augmentation_rates(torch.tensor([0.8, 0.2]), eps=0.0)
        tensor([0.2500, 1.0000])
    """
    _check_modalities("skill", skill.shape[-1])
    errors = 1.0 - skill + eps
    return errors / errors.amax(dim=-1, keepdim=True)


def _log_ratios(log_quality: Tensor) -> Tensor:
    _check_modalities("log_quality", log_quality.shape[-1] - 1, " after the fused head")
    return log_quality[..., :1] - log_quality[..., 1:]


def _log_hmir(log_ratios: Tensor, eps: float) -> Tensor:
    """Logarithm of M / sum_m 1 / max(exp(log_ratios) - 1, eps), for ratios of any size."""
    floored = -log_ratios.clamp_min(math.log1p(eps))
    log_inverse_rates = floored - (-torch.expm1(floored)).log()
    return math.log(log_ratios.shape[-1]) - log_inverse_rates.logsumexp(dim=-1)


def _balance_factor(log_ratios: Tensor, eps: float = 1e-3) -> Tensor:
    log_gmr = log_ratios.mean(dim=-1)
    log_one_plus_hmir = F.softplus(_log_hmir(log_ratios, eps))
    return torch.expm1((log_one_plus_hmir - log_gmr).clamp_max(0.0)).abs()


def _weights(log_ratios: Tensor, temperature: float = 1.0, cap: float = 1.0) -> Tensor:
    lag = log_ratios.clamp_max(cap)
    return (lag if temperature == 1.0 else lag / temperature).softmax(dim=-1)


def _check_modalities(name: str, count: int, where: str = "") -> None:
    if count < 1:
        raise ValueError(f"{name}: expected at least 1 modality{where}, got none")
