"""Reliability gates: how much of each modality a sample's fusion should take.

Label-free, so that they work at inference. Layout is head-major without the fused
head, ``[M, B]``; ``present`` (bool, same shape) marks the modalities that a sample has.

The paper (arXiv 2503.06456) names a gating-based dynamic fusion that suppresses
redundancy. The formulas are definitions chosen here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dyncim_core.modality import standing, trust

__all__ = [
    "disagreement",
    "evenness",
    "log_prior",
    "novelty",
    "novelty_penalty",
    "relative_gates",
    "reliability_gates",
]

_SHRINKAGE = 1e-2  # share of the mean variance that every direction has at least


def disagreement(
    probs: Tensor, skill: Tensor | None = None, present: Tensor | None = None
) -> Tensor:
    """How much the others, as far as they are sure and to be believed, contradict each modality.

    The consensus of modality m is the mean prediction of the other present modalities,
    each weighted by its ``trust``; it takes two, since of two modalities that contradict
    each other nothing tells which is wrong. Half the squared Euclidean distance from it, so
    that the small differences between reliable modalities count for little, times the
    probability of its likeliest class and the weighted mean of the trust behind it: a
    consensus that is unsure, or of modalities that are often wrong, contradicts nobody. Times the
    square of the modality's own ``standing``: one that tells little by itself is contradicted
    whatever its input, which is no sign that something is wrong with it.
    Definition chosen here.

    Args:
        probs: Class probabilities, ``[M, B, C]``.
        skill: Of each modality, ``[M]`` in [0, 1]; all believed alike when ``None`` or 0.
        present: Bool ``[M, B]``; all when ``None``.

    Returns:
        ``[M, B]`` in [0, 1]; 0 where the modality is absent, or all others but one. A
        prediction that is NaN contradicts as far as can be, and is contradicted as far as its
        modality's standing lets it.

    Example:
        >>> probs = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
        >>> disagreement(probs).squeeze(1)
        tensor([0.1250, 0.1250, 1.0000])
    """
    if present is None:
        present = torch.ones(probs.shape[:2], dtype=torch.bool, device=probs.device)
    if skill is None:
        skill = probs.new_zeros(probs.shape[0])
    weight = torch.where(present, trust(skill.to(probs.dtype)).unsqueeze(1), 0.0)
    weighted = weight.unsqueeze(-1) * torch.where(present.unsqueeze(-1), probs, 0.0)
    comparable = present & (present.sum(dim=0) > 2)
    weight_of_others = torch.where(comparable, _sum_of_others(weight), 1.0)
    consensus = _sum_of_others(weighted) / weight_of_others.unsqueeze(-1)
    believed = _sum_of_others(weight.square()) / weight_of_others
    squared = (probs - consensus).square().sum(dim=-1) / 2.0
    apart = (squared * consensus.amax(dim=-1)).nan_to_num(1.0).clamp_max(1.0)
    able = standing(skill.to(probs.dtype)).square().unsqueeze(1)
    return torch.where(comparable, apart * believed * able, 0.0)


def log_prior(class_mass: Tensor) -> Tensor:
    """What the classes' frequencies alone say of a sample, over the most frequent.

    Taken off the logits, it leaves what an input says: modalities that know little predict what
    is frequent, and would outvote together one that recognises a rare class. Menon et al. (ICLR
    2021) adjust logits so; that only the disagreement is asked of such logits is chosen here.

    Args:
        class_mass: How often each class was trained on, times its class weight, ``[C]``, >= 0.

    Returns:
        ``[C]``, in nats, in [-30, 0]; 0 for a class of no mass, or none that is a number, of which
        it says nothing.

    Example:
        >>> log_prior(torch.tensor([6, 3, 0])).exp()
        tensor([1.0000, 0.5000, 1.0000])
    """
    known, mass = _known_mass(class_mass)
    return torch.where(known, (mass / mass.max()).log().clamp_min(-30.0), 0.0)


def evenness(class_mass: Tensor) -> Tensor:
    """How even the classes are that were seen, ``((sum_c n_c)^2 / (K sum_c n_c^2))^4``.

    The effective number of classes as a share of the K that have any mass, to the fourth power. A
    sample that misses a modality looks like one of a frequent class, so that dropout teaches a
    fusion to tell rare classes less well; it is done the less the more they are outnumbered.
    Definition chosen here.

    Args:
        class_mass: How often each class was trained on, times its class weight, ``[C]``, >= 0.

    Returns:
        Scalar in (0, 1]; 1 where no class has any mass that is a number.

    Example:
        >>> evenness(torch.tensor([5, 5, 0])), evenness(torch.tensor([9, 1]))
        (tensor(1.), tensor(0.1382))
    """
    known, mass = _known_mass(class_mass)
    share, number = torch.where(known, mass / mass.max(), 0.0), known.sum()
    mean, mean_square = share.sum() / number, share.square().sum() / number
    found: Tensor = mean.square() / mean_square
    return found.nan_to_num(1.0).clamp_max(1.0).square().square()


def reliability_gates(
    logits: Tensor, present: Tensor | None = None, threshold: float = 0.0
) -> Tensor:
    """Share of each modality in a sample's fusion.

    A softmax over the present modalities; gates below ``threshold`` are cut as
    redundant and the rest renormalised. Definition chosen here.

    Args:
        logits: ``[M, B]``.
        present: Bool ``[M, B]``; all when ``None``.
        threshold: Share under which a gate is cut, in [0, 1 / M); not checked, from 1 / M on it
            may cut all.

    Returns:
        ``[M, B]``, >= 0, sums to 1 over the modalities; all 0 for a sample without any.

    Example:
        >>> logits = torch.tensor([[0.7], [0.2], [0.1]]).log()
        >>> reliability_gates(logits, threshold=0.15).squeeze(1)
        tensor([0.7778, 0.2222, 0.0000])
    """
    lowest = torch.finfo(logits.dtype).min
    if present is not None:
        logits = torch.where(present, logits, lowest)
    gates = logits.softmax(dim=0)
    kept = gates >= threshold
    if present is not None:
        kept = kept & present
    gates = torch.where(kept, gates, 0.0)
    # Nothing to renormalise when every modality is absent: 0 / 1.
    total = gates.sum(dim=0)
    return gates / torch.where(total > 0, total, 1.0)


def relative_gates(gates: Tensor) -> Tensor:
    """Gates as shares of the sample's largest: what scales the features.

    The most reliable modality passes whole, and equal gates change nothing.

    Args:
        gates: ``[M, B]``, >= 0.

    Returns:
        ``[M, B]`` in [0, 1]; all 0 for a sample whose gates are.

    Example:
        >>> relative_gates(torch.tensor([[0.6], [0.3]])).squeeze(1)
        tensor([1.0000, 0.5000])
    """
    largest = gates.amax(dim=0)
    return gates / torch.where(largest > 0, largest, 1.0)


def novelty(features: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """How far features lie from those of the training data: 1 on average for those.

    The squared Mahalanobis distance over its mean on the training data. To every variance
    1% of the mean one is added, so that a direction in which nothing varied in training
    counts as that. Lee, Lee, Lee and Shin (NeurIPS 2018) tell inputs of another kind by
    their Mahalanobis distance; this definition is chosen here.

    Args:
        features: ``[..., B, K]``.
        mean: Of the training features, ``[..., K]``.
        covariance: Of the training features, positive semidefinite ``[..., K, K]``.

    Returns:
        ``[..., B]``, >= 0; unchanged when all is rotated or scaled alike. NaN where the
        covariance is 0, anything where it is not positive semidefinite.

    Example:
        >>> seen = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> covariance = seen.T @ seen / 4
        >>> round(float(novelty(seen, torch.zeros(2), covariance).mean()), 4)
        1.0
        >>> novelty(torch.tensor([[0.0, 2.0], [0.0, 3.0]]), torch.zeros(2), covariance)
        tensor([3.9631, 8.9169])
    """
    width = covariance.shape[-1]
    identity = torch.eye(width, dtype=covariance.dtype, device=covariance.device)
    added = _SHRINKAGE * covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    # Without a check for success, which would read the device.
    factor = torch.linalg.cholesky_ex(covariance + added[..., None, None] * identity).L
    columns = torch.cat([identity.expand_as(covariance), (features - mean.unsqueeze(-2)).mT], -1)
    # Solved for and not multiplied by, which autocast would do in half precision.
    whitened = torch.linalg.solve_triangular(factor, columns, upper=False)
    squared: Tensor = whitened.square().sum(dim=-2)
    expected = width - added * squared[..., :width].sum(dim=-1)
    return squared[..., width:] / expected.unsqueeze(-1)


def novelty_penalty(novelty: Tensor, tolerance: float = 3.0) -> Tensor:
    """What novelty takes off the logit of a gate, ``max(0, log(novelty / tolerance))``.

    Definition chosen here.

    Args:
        novelty: Any shape, >= 0.
        tolerance: Novelty up to which nothing is taken off, > 0; not checked.

    Returns:
        Same shape, >= 0.

    Example:
        >>> novelty_penalty(torch.tensor([1.0, 3.0, 30.0]))
        tensor([0.0000, 0.0000, 2.3026])
    """
    return (novelty / tolerance).log().clamp_min(0.0)


def _known_mass(class_mass: Tensor) -> tuple[Tensor, Tensor]:
    """Which classes have a mass that is a number, bool ``[C]``; and the mass, 0 elsewhere."""
    known = (class_mass > 0) & (class_mass < torch.inf)
    return known, torch.where(known, class_mass, 0)


def _sum_of_others(values: Tensor) -> Tensor:
    """Sum over the other modalities; the total minus the own would cancel."""
    sums = [torch.cat([values[:m], values[m + 1 :]]).sum(dim=0) for m in range(len(values))]
    return torch.stack(sums) if sums else values
