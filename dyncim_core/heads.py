"""Statistics of every head, and the one place where they become differentiable.

One pass over the logits of every head gives all that the curriculum needs. Only losses
are differentiable; their backward is analytic. It recomputes the softmax, or makes the
gradient in the memory where a kernel kept it: in no case is there more of the size of large
logits than logits and gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dyncim_core import _checks
from dyncim_core.kernels import check_backend, eager, select
from dyncim_core.kernels.interface import Criterion, Kernels, Normaliser, with_memory

__all__ = ["HeadStatistics", "differentiable", "head_statistics"]


class HeadStatistics(NamedTuple):
    """What each head says about each sample; every field is ``[M + 1, B]``.

    All but ``prediction`` are float32, or float64 when any head is.

    Attributes:
        loss: Per-sample cross-entropy with class weights, smoothing and ``ignore_index``, >= 0;
            the one differentiable field.
        nll: Negative log-likelihood of the target in nats, >= 0, without weights and smoothing.
        entropy: Entropy of the predicted distribution in nats, in [0, log C].
        distance: ``||p_h - p_0||_2 / sqrt(2)`` to the fused prediction, in [0, 1].
        prediction: Most probable class, int64 in [0, C); anything where the head is absent.
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
    backend: str | None = None,
) -> HeadStatistics:
    """Statistics of the fused head (first) and the unimodal heads.

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
        backend: "eager", "native" or "triton", see ``backends``; the fastest that takes
            the tensors when ``None``.

    Returns:
        A ``HeadStatistics``. Values are computed in float32, or in float64 when any
        head is float64.

    Raises:
        TypeError: An argument is not a tensor of the dtype described.
        ValueError: Shapes do not fit, ``label_smoothing`` is out of range, or class probabilities
            meet an ``ignore_index`` >= 0.
        IndexError: ``target`` is out of range (on CPU; on a GPU a device assertion, or a
            loss of NaN from Triton's kernels).
        RuntimeError: The backend asked for is not available or does not take the tensors.

    Example:
        >>> fused, audio = torch.zeros(2, 4), torch.zeros(2, 4)
        >>> head_statistics([fused, audio], torch.tensor([0, 3])).nll
        tensor([[1.3863, 1.3863],
                [1.3863, 1.3863]])
    """
    _checks.check_heads(logits, target)
    _checks.check_present(present, (len(logits), logits[0].shape[0]), logits[0].device)
    _checks.check_class_weight(weight, logits[0])
    _checks.check_criterion(target, ignore_index, label_smoothing)
    kernels = select(check_backend(backend), logits, target, (present, weight))
    criterion = Criterion(target, weight, int(ignore_index), float(label_smoothing))
    found = kernels.statistics(logits, present, criterion)
    loss, nll, entropy, distance = found.rows
    present_or_all = None if present is None else present.to(loss.dtype)
    loss = differentiable(
        loss.clone(),
        present_or_all,
        found.normaliser,
        kernels,
        criterion,
        guard or present is not None,
        logits,
    )
    return HeadStatistics(loss, nll, entropy, distance, found.prediction)


def differentiable(
    value: Tensor,
    coefficient: Tensor | None,
    normaliser: Normaliser,
    kernels: Kernels,
    criterion: Criterion,
    guard: bool,
    logits: Sequence[Tensor],
) -> Tensor:
    """``value``, computed without autograd as a sum of ``coefficient * loss``, with its gradient.

    Args:
        value: ``[M + 1, B]``, its sum over heads ``[B]``, or over all, scalar; a tensor of its
            own, which becomes the result.
        coefficient: Factor of every loss in it, ``[M + 1, B]``; all 1 when ``None``.
        normaliser: What the kernels gave for their gradient.
        kernels: Those that computed ``value``.
        criterion: What they computed it with.
        guard: Rows of factor 0 pass on exactly 0, whatever their logits hold.
        logits: One ``[B, C]`` tensor per head.
    """
    apply = _Objective.apply if kernels is eager else _apply_plainly
    result: Tensor = apply(  # type: ignore[no-untyped-call]
        (value, coefficient, normaliser, kernels, guard, criterion), *logits
    )
    return result


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, known: tuple[Any, ...], *logits: Tensor) -> Tensor:
        value: Tensor
        value, *ctx.known, (target, weight, *ctx.options) = known
        ctx.save_for_backward(target, weight, *logits)  # a change in place is noticed
        # Fresh from a kernel, and hidden from autograd in a tuple: only a trace takes a copy.
        return value.clone() if torch.compiler.is_compiling() else value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        coefficient, normaliser, kernels, guard = ctx.known
        target, weight, *logits = ctx.saved_tensors
        criterion = Criterion(target, weight, *ctx.options)
        if kernels is not eager:
            grad = with_memory(grad)
        grads = kernels.gradients(grad, coefficient, normaliser, logits, criterion, guard)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            grads = _OnceOnly.apply(*logits, *grads)  # type: ignore[no-untyped-call]
        return (None, *grads)


# Without what Function.apply does for functorch's transforms, which takes longer than the rest:
# their tensors have no address, so that only the kernels in plain PyTorch take them.
_apply_plainly = super(torch.autograd.Function, _Objective).apply


class _OnceOnly(torch.autograd.Function):
    """Gradients that know their logits, only to refuse a second derivative aloud."""

    @staticmethod
    def forward(ctx: Any, *logits_and_grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in logits_and_grads[len(logits_and_grads) // 2 :])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            "the curriculum loss has no second derivative: its backward is analytic. "
            "Call backward without create_graph, or take the second derivative of the "
            "wrapped criterion instead"
        )
