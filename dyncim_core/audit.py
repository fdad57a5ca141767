"""The audit: how wrong each training sample looks, from the memory of its NLL.

The memory is sample-major, ``[N, M + 1]``: head 0 is the fused prediction, heads 1 to M the
unimodal ones; ``visited`` (bool, same shape) marks what was seen in training. What was not may hold
anything finite, and never reaches a result.

The formulas are definitions chosen here.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["input_suspicion", "label_suspicion"]


def label_suspicion(nll: Tensor, visited: Tensor, trust: Tensor) -> Tensor:
    """How wrong the label of each sample looks.

    ``sum_h t_h^8 nll_h / sum_h t_h^8`` over the heads that saw it: the label is one that the model
    cannot come to agree with, even if a weak modality has learnt it by heart.

    Args:
        nll: Average NLL of each sample under each head, in nats, ``[N, M + 1]``.
        visited: Bool, same shape.
        trust: In each head, ``[M + 1]`` in (0, 1], ``t``, see the function of that name.

    Returns:
        ``[N]``, >= 0; -inf for a sample that no head saw.

    Example:
        >>> nll = torch.tensor([[0.1, 0.2], [2.0, 0.1], [9.0, 9.0]])
        >>> visited = torch.tensor([[True, True], [True, True], [False, False]])
        >>> label_suspicion(nll, visited, torch.tensor([1.0, 0.5]))
        tensor([0.1004, 1.9926,   -inf])
    """
    weight = torch.where(visited, trust.pow(8), 0.0)
    score = (weight * nll).sum(dim=1) / weight.sum(dim=1)
    return torch.where(visited.any(dim=1), score, -torch.inf)


def input_suspicion(nll: Tensor, visited: Tensor, head: int) -> Tensor:
    """How wrong a modality of each sample looks, rather than the label.

    ``nll_m exp(-mean_k nll_k)`` over the other modalities k that saw it: large where one modality
    cannot come to agree with a label that the others think likely.

    Args:
        nll: Average NLL of each sample under each head, in nats, ``[N, M + 1]``.
        visited: Bool, same shape.
        head: That of the modality, in [1, M].

    Returns:
        ``[N]``, >= 0; -inf for a sample that the modality did not see, or no other.

    Example:
        >>> nll = torch.tensor([[0.1, 3.0, 0.1], [2.0, 3.0, 3.0]])
        >>> input_suspicion(nll, torch.ones(2, 3, dtype=torch.bool), head=1)
        tensor([2.7145, 0.1494])
    """
    others = visited[:, 1:].clone()
    others[:, head - 1] = False
    count = others.sum(dim=1)
    mean = torch.where(others, nll[:, 1:], 0.0).sum(dim=1) / count
    score = nll[:, head] * torch.exp(-mean)
    return torch.where(visited[:, head] & (count > 0), score, -torch.inf)
