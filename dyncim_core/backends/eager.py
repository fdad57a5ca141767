"""Head statistics in plain PyTorch: every device, every floating dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["accumulation_dtype", "backward", "forward"]


def accumulation_dtype(logits: Sequence[Tensor]) -> torch.dtype:
    """float64 when any head is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


def forward(
    logits: Sequence[Tensor],
    target: Tensor,
    present: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, NLL, entropy, distance to head 0 and predicted class, each ``[M + 1, B]``."""
    dtype = accumulation_dtype(logits)
    truth = _truth(target, weight, ignore_index, label_smoothing, logits[0].shape[1], dtype)
    fused_probs = logits[0].to(dtype).softmax(dim=1)
    rows = []
    for h, head in enumerate(logits):
        log_probs = head.to(dtype).log_softmax(dim=1)
        probs = log_probs.exp() if h else fused_probs
        nll = truth.nll(log_probs)
        loss = truth.loss(log_probs, nll)
        prediction = log_probs.argmax(dim=1)
        # A class of probability 0 has log-probability -inf; 0 log 0 is 0.
        finite = log_probs.clamp_min_(torch.finfo(dtype).min)
        entropy = -(probs * finite).sum(dim=1)
        distance = torch.linalg.vector_norm(probs - fused_probs, dim=1) if h else loss.new_zeros(())
        distance = (distance / math.sqrt(2.0)).expand_as(nll)
        rows.append((loss, nll, entropy, distance, prediction))
    loss, nll, entropy, distance, prediction = (torch.stack(x) for x in zip(*rows, strict=True))
    if present is not None:
        loss, nll, entropy, distance = (
            torch.where(present, x, 0.0) for x in (loss, nll, entropy, distance)
        )
    return loss, nll, entropy, distance, prediction


def backward(
    grad_loss: Tensor,
    logits: Sequence[Tensor],
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    guard: bool,
) -> list[Tensor]:
    """Gradient for each head, ``coef * (mass * softmax - truth)``.

    With ``guard``, rows whose coefficient is 0 get exactly 0, whatever their logits hold.
    """
    dtype = accumulation_dtype(logits)
    truth = _truth(target, weight, ignore_index, label_smoothing, logits[0].shape[1], dtype)
    grads = []
    for head, coef in zip(logits, truth.without_ignored(grad_loss), strict=True):
        column = coef.unsqueeze(1)
        grad = head.to(dtype).softmax(dim=1).mul_(truth.mass(column))
        truth.subtract_from(grad, column)
        if guard:
            grad.masked_fill_(column == 0, 0.0)
        grads.append(grad.to(head.dtype))
    return grads


class _Indices:
    """Class indices ``[B]``: a one-hot truth, smoothed and weighted as cross-entropy does."""

    def __init__(
        self,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        num_classes: int,
    ) -> None:
        self.target, self.ignore_index = target, ignore_index
        self.kept = target != ignore_index
        self.index = torch.where(self.kept, target, 0).unsqueeze(1)
        self.weight = weight
        self.smoothing, self.num_classes = label_smoothing, num_classes
        self.on_target = 1.0 - label_smoothing

    def nll(self, log_probs: Tensor) -> Tensor:
        try:
            hit = log_probs.gather(1, self.index).squeeze(1)
        except (RuntimeError, IndexError) as error:  # only then is a look at the values due
            raise IndexError(
                f"target: expected class indices in [0, {self.num_classes}) or "
                f"ignore_index={self.ignore_index}, got values from "
                f"{int(self.target.min())} to {int(self.target.max())}"
            ) from error
        return torch.where(self.kept, -hit, 0.0)

    def loss(self, log_probs: Tensor, nll: Tensor) -> Tensor:
        loss = nll if self.weight is None else nll * self.weight[self.index.squeeze(1)]
        if self.smoothing:
            total = (
                log_probs.sum(dim=1)
                if self.weight is None
                else (log_probs * self.weight).sum(dim=1)
            )
            smooth = torch.where(self.kept, -total / self.num_classes, 0.0)
            loss = self.on_target * loss + self.smoothing * smooth
        return loss

    def without_ignored(self, grad_loss: Tensor) -> Tensor:
        return torch.where(self.kept, grad_loss, 0.0)

    def mass(self, coef: Tensor) -> Tensor:
        if self.weight is None:
            return coef
        smooth = self.smoothing * self.weight.mean()
        return coef * (self.on_target * self.weight[self.index] + smooth)

    def subtract_from(self, grad: Tensor, coef: Tensor) -> None:
        hit = coef if self.weight is None else coef * self.weight[self.index]
        grad.scatter_add_(1, self.index, -self.on_target * hit)
        if self.smoothing:
            smooth = coef if self.weight is None else coef * self.weight
            grad.sub_(smooth, alpha=self.smoothing / self.num_classes)


class _Probabilities:
    """Class probabilities ``[B, C]``, smoothed and weighted as cross-entropy does."""

    def __init__(self, target: Tensor, weight: Tensor | None, label_smoothing: float) -> None:
        self.target = target
        self.truth = target
        if label_smoothing:
            self.truth = (1.0 - label_smoothing) * target + label_smoothing / target.shape[1]
        if weight is not None:
            self.truth = self.truth * weight

    def nll(self, log_probs: Tensor) -> Tensor:
        return _expected_nll(self.target, log_probs)

    def loss(self, log_probs: Tensor, nll: Tensor) -> Tensor:
        return nll if self.truth is self.target else _expected_nll(self.truth, log_probs)

    def without_ignored(self, grad_loss: Tensor) -> Tensor:
        return grad_loss

    def mass(self, coef: Tensor) -> Tensor:
        return coef * self.truth.sum(dim=1, keepdim=True)

    def subtract_from(self, grad: Tensor, coef: Tensor) -> None:
        grad.addcmul_(self.truth, coef, value=-1.0)


def _truth(
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    num_classes: int,
    dtype: torch.dtype,
) -> _Indices | _Probabilities:
    weight = None if weight is None else weight.to(dtype)
    if target.is_floating_point():
        return _Probabilities(target.to(dtype), weight, label_smoothing)
    return _Indices(target, weight, ignore_index, label_smoothing, num_classes)


def _expected_nll(truth: Tensor, log_probs: Tensor) -> Tensor:
    return -torch.where(truth > 0, truth * log_probs, 0.0).sum(dim=1)
