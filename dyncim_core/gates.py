"""Reliability gates: how much of each modality a sample's fusion should take.

Label-free, so that they work at inference. Layout is head-major without the fused
head, ``[M, B]``; ``present`` (bool, same shape) marks the modalities that a sample has.

The paper (arXiv 2503.06456) names a gating-based dynamic fusion that suppresses
redundancy. The formulas are definitions chosen here.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["disagreement", "reliability_gates"]

_QUALITY_FLOOR = 1e-3  # keeps the consensus defined when no modality has learnt anything


def disagreement(
    probs: Tensor, quality: Tensor | None = None, present: Tensor | None = None
) -> Tensor:
    """How much the others, as far as they are sure of something, contradict each modality.

    The consensus of modality m is the mean prediction of the other present modalities,
    each weighted by its quality; it takes two, since of two modalities that contradict
    each other nothing tells which is wrong. Half the squared Euclidean distance from it, so
    that the small differences between reliable modalities count for little, times the
    probability of its likeliest class: a consensus that is unsure contradicts nobody.
    Definition chosen here.

    Args:
        probs: Class probabilities, ``[M, B, C]``.
        quality: Of each modality, ``[M]``, >= 0; all alike when ``None``.
        present: Bool ``[M, B]``; all when ``None``.

    Returns:
        ``[M, B]`` in [0, 1]; 0 where the modality is absent, or all others but one.

    Example:
        >>> probs = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
        >>> disagreement(probs).squeeze(1)
        tensor([0.1250, 0.1250, 1.0000])
    """
    if present is None:
        present = torch.ones(probs.shape[:2], dtype=torch.bool, device=probs.device)
    if quality is None:
        quality = probs.new_ones(probs.shape[0])
    weight = torch.where(
        present, quality.to(probs.dtype).clamp_min(_QUALITY_FLOOR).unsqueeze(1), 0.0
    )
    weighted = weight.unsqueeze(-1) * torch.where(present.unsqueeze(-1), probs, 0.0)
    comparable = present & (present.sum(dim=0) > 2)
    weight_of_others = torch.where(comparable, _sum_of_others(weight), 1.0)
    consensus = _sum_of_others(weighted) / weight_of_others.unsqueeze(-1)
    squared = (probs - consensus).square().sum(dim=-1) / 2.0
    return torch.where(comparable, (squared * consensus.amax(dim=-1)).clamp_max(1.0), 0.0)


def reliability_gates(
    logits: Tensor, present: Tensor | None = None, threshold: float = 0.0
) -> Tensor:
    """Share of each modality in a sample's fusion.

    A softmax over the present modalities; gates below ``threshold`` are cut as
    redundant and the rest renormalised. Definition chosen here.

    Args:
        logits: ``[M, B]``.
        present: Bool ``[M, B]``; all when ``None``.
        threshold: Share under which a gate is cut, in [0, 1 / M).

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


def _sum_of_others(values: Tensor) -> Tensor:
    """Sum over the other modalities; the total minus the own would cancel."""
    sums = [torch.cat([values[:m], values[m + 1 :]]).sum(dim=0) for m in range(len(values))]
    return torch.stack(sums) if sums else values
