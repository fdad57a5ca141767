"""Head statistics and their backward: the one operator on the hot path.

One pass over the logits of every head gives all that the curriculum needs. Only the
loss is differentiable; its backward is analytic and recomputes the softmax, so that
nothing of the size of the logits is kept between forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dyncim_core import _checks
from dyncim_core.backends import eager

__all__ = ["HeadStatistics", "head_statistics"]


class HeadStatistics(NamedTuple):
    """What each head says about each sample; every field is ``[M + 1, B]``.

    Attributes:
        loss: Per-sample cross-entropy with class weights, smoothing and ``ignore_index``;
            the one differentiable field.
        nll: Negative log-likelihood of the target in nats, without weights and smoothing.
        entropy: Entropy of the predicted distribution in nats.
        distance: ``||p_h - p_0||_2 / sqrt(2)`` to the fused prediction, in [0, 1].
        prediction: Most probable class, int64; anything where the head is absent.
    """

    loss: Tensor
    nll: Tensor
    entropy: Tensor
    distance: Tensor
    prediction: Tensor


def head_statistics(
    logits: Sequence[Tensor],
    target: Tensor,
    *,
    present: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    guard: bool = False,
) -> HeadStatistics:
    """Statistics of the fused head (first) and the unimodal heads, in one operator.

    Args:
        logits: One floating-point ``[B, C]`` tensor per head, the fused one first.
        target: Class indices, int64 ``[B]``, or class probabilities, ``[B, C]``.
        present: Heads that each sample has, bool ``[M + 1, B]``; all when ``None``.
            Absent entries give 0 (but for ``prediction``) and no gradient.
        weight: Class weights, ``[C]``, with the meaning of ``torch.nn.CrossEntropyLoss``.
        ignore_index: Class index to ignore; loss and nll are 0 there.
        label_smoothing: In [0, 1], with the meaning of ``torch.nn.CrossEntropyLoss``.
        guard: Rows of the loss that receive a gradient of 0 pass on exactly 0, even
            where the logits are not finite. Always on when ``present`` is given.

    Returns:
        A ``HeadStatistics``. Values are computed in float32, or in float64 when any
        head is float64.

    Raises:
        TypeError: An argument is not a tensor of the dtype described.
        ValueError: Shapes do not fit.
        IndexError: ``target`` is out of range (on CPU; a device assertion on a GPU).

    Example:
        >>> fused, audio = torch.zeros(2, 4), torch.zeros(2, 4)
        >>> head_statistics([fused, audio], torch.tensor([0, 3])).nll
        tensor([[1.3863, 1.3863],
                [1.3863, 1.3863]])
    """
    _checks.check_heads(logits, target)
    _checks.check_present(present, (len(logits), logits[0].shape[0]), logits[0].device)
    _checks.check_class_weight(weight, logits[0])
    return HeadStatistics(
        *torch.ops.dyncim_core.head_statistics(
            list(logits),
            target,
            present,
            weight,
            ignore_index,
            label_smoothing,
            guard or present is not None,
        )
    )


_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_OPTIONS = "Tensor? weight, int ignore_index, float label_smoothing, bool guard"


@torch.library.custom_op(
    "dyncim_core::head_statistics",
    mutates_args=(),
    schema=f"(Tensor[] logits, Tensor target, Tensor? present, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    logits: list[Tensor],
    target: Tensor,
    present: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    guard: bool,
) -> _Outputs:
    return eager.forward(logits, target, present, weight, ignore_index, label_smoothing)


@torch.library.custom_op(
    "dyncim_core::head_statistics_backward",
    mutates_args=(),
    schema=f"(Tensor grad_loss, Tensor[] logits, Tensor target, {_OPTIONS}) -> Tensor[]",
)
def _backward(
    grad_loss: Tensor,
    logits: list[Tensor],
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    guard: bool,
) -> list[Tensor]:
    return eager.backward(grad_loss, logits, target, weight, ignore_index, label_smoothing, guard)


@_forward.register_fake
def _(logits: list[Tensor], target: Tensor, *_: Any) -> _Outputs:
    dtype = eager.accumulation_dtype(logits)
    rows = logits[0].new_empty((len(logits), logits[0].shape[0]), dtype=dtype)
    loss, nll, entropy, distance = (torch.empty_like(rows) for _ in range(4))
    return loss, nll, entropy, distance, rows.to(torch.int64)


@_backward.register_fake
def _(grad_loss: Tensor, logits: list[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(head, memory_format=torch.contiguous_format) for head in logits]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, present, weight, *options = inputs
    ctx.save_for_backward(*logits, target, present, weight)
    ctx.options = options
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _loss_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    *logits, target, present, weight = ctx.saved_tensors
    if grad_loss is None:
        return ([None] * len(logits), *[None] * 6)
    if present is not None:
        grad_loss = torch.where(present, grad_loss, 0.0)
    grads = torch.ops.dyncim_core.head_statistics_backward(
        grad_loss, logits, target, weight, *ctx.options
    )
    return (grads, *[None] * 6)


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "the curriculum loss has no second derivative: its backward is analytic. "
        "Call backward without create_graph, or take the second derivative of the "
        "wrapped criterion instead"
    )


torch.library.register_autograd(
    "dyncim_core::head_statistics", _loss_backward, setup_context=_save_for_backward
)
torch.library.register_autograd("dyncim_core::head_statistics_backward", _no_second_derivative)
