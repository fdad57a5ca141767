"""What every kernel takes and gives: plain tuples of tensors and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "GROUPS",
    "HEARD",
    "Buffers",
    "Criterion",
    "Curriculum",
    "Gate",
    "Gating",
    "Kept",
    "Kernels",
    "Learnt",
    "Memory",
    "Moments",
    "Normaliser",
    "Settings",
    "Statistics",
    "with_memory",
]


# Rows of ``Buffers.held_out_averages``.
HEARD = 7
# Classes that are told apart; more of them share.
GROUPS = 1024

# What kernels save for their gradients, if anything: normalisers of the softmaxes; or what the
# gradients are made in, which the first backward takes out of its box for good.
Normaliser = Tensor | list[tuple[Tensor, ...]] | None


def with_memory(grad: Tensor) -> Tensor:
    """A gradient that has an address, which the zeros that autograd makes for free lack."""
    return grad.clone() if grad._is_zerotensor() else grad


class Criterion(NamedTuple):
    """The target and how cross-entropy is to read it."""

    target: Tensor  # class indices, int64 [B], or class probabilities, [B, C]
    weight: Tensor | None = None  # [C]
    ignore_index: int = -100
    label_smoothing: float = 0.0


class Statistics(NamedTuple):
    """``rows`` are loss, nll, entropy and distance, ``[4, M + 1, B]``; ``prediction`` is int64.

    ``normaliser`` is what the same kernel wants back for the gradient, if anything.
    """

    rows: Tensor
    prediction: Tensor
    normaliser: Normaliser


class Buffers(NamedTuple):
    """The running averages of a ``CurriculumState``, updated in place.

    ``held_out_averages`` ``[HEARD, M + 1]`` start at 0 and are over all samples of a batch, of what
    is 0 but for those held out that a head sees. Their rows:

    0. 1, so that the others over it are means;
    1. whether the head predicts the label;
    2. how often it would by chance;
    3. its NLL, in nats, as far as the label is believed; of class probabilities, as in
       ``log_quality`` and the memory, beyond their own entropy, over ``share_to_learn``;
    4. the derivative of the pool's NLL by the weight of its logits (``logit_slopes``), in nats, as
       far as the label is believed;
    5. how far all heads together contradict the label;
    6. how far the head by itself does.

    ``skill`` and ``logit_weight``, ``[M + 1]``, follow from them, and so does ``label_noise`` from
    the first sample held out on. ``doubted`` is row 6 of the fused head for samples trained on.

    Of class c, at ``c % K``: ``log_class_average`` ``[K]``, what levels the weights of the classes;
    ``class_seen`` ``[K]``, the samples trained on; ``class_weight`` ``[K]``, the criterion's
    weights of the classes, 1 without, and 0 where predictions do not follow how frequent classes
    are, as with label smoothing, class probabilities or more classes than K.
    """

    log_quality: Tensor
    quality: Tensor
    seen: Tensor
    signal_mean: Tensor
    volatility: Tensor
    label_noise: Tensor
    doubted: Tensor
    effective_share: Tensor
    step: Tensor
    nonfinite: Tensor
    held_out_averages: Tensor
    skill: Tensor
    logit_weight: Tensor
    log_class_average: Tensor
    class_seen: Tensor
    class_weight: Tensor


class Memory(NamedTuple):
    """Rows of the per-sample memory, updated in place."""

    rows: Tensor
    nll: Tensor
    visits: Tensor
    weight: Tensor


class Settings(NamedTuple):
    """Constants of a ``DynCIMLoss`` and its state.

    ``held_out`` is the share of the samples to keep out of training, told apart by the rows of
    the memory: the call then has a memory and all heads.
    """

    surprise_strength: float
    label_noise: float | None
    pacing_strength: float
    unimodal_strength: float
    skip_nonfinite: bool
    decay: float
    memory_decay: float
    reduction: Literal["mean", "sum", "none"]
    held_out: float = 0.0


class Curriculum(NamedTuple):
    """The joint objective of a batch and what its gradient takes.

    ``value`` is a scalar, or ``[B]`` under reduction "none"; ``coefficient`` is the factor
    of every head's loss in it, ``[M + 1, B]``.
    """

    value: Tensor
    coefficient: Tensor
    normaliser: Normaliser


class Gate(NamedTuple):
    """Constants of a ``GatedFusion``."""

    disagreement_slope: float
    threshold: float
    swap: float
    dropout: float


class Learnt(NamedTuple):
    """What a ``CurriculumState`` has of each head, ``[M + 1]``, and of each class, ``[K]``."""

    log_quality: Tensor
    quality: Tensor
    skill: Tensor
    class_seen: Tensor
    class_weight: Tensor
    logit_weight: Tensor


class Kept(NamedTuple):
    """What a ``GatedFusion`` keeps of what its state has learnt, updated in place.

    ``skill`` ``[M]``; ``logit_factor`` ``[M]``, see ``relative_logit_weights``; ``log_prior``
    ``[GROUPS]``, if there is one.
    """

    skill: Tensor
    logit_factor: Tensor
    log_prior: Tensor | None


class Gating(NamedTuple):
    """What each modality contributes to each sample, ``[M, B]``.

    ``scale`` is the gate over the sample's largest; ``source`` the row that a modality is taken
    from, ``None`` unless modalities are swapped.
    """

    gates: Tensor
    scale: Tensor
    source: Tensor | None


class Moments(NamedTuple):
    """Running moments of the features, updated in place.

    Averages that start at 0, over as many samples as a window holds: ``mass`` ``[M]``, of 1;
    ``total`` ``[M, K]``, of the features; ``scatter`` ``[M, K, K]``, of the outer product of
    their deviation from the mean so far.
    """

    mass: Tensor
    total: Tensor
    scatter: Tensor

    def mean(self) -> Tensor:
        """Of the features, ``[M, K]``; 0 where none was seen."""
        return self.total / self._positive_mass()

    def covariance(self) -> Tensor:
        """Of the features, ``[M, K, K]``; 0 where none was seen."""
        return self.scatter / self._positive_mass().unsqueeze(2)

    def _positive_mass(self) -> Tensor:
        return self.mass.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)


class Kernels(Protocol):
    """A backend. All of them agree to rounding; none reads a value of a GPU on the host."""

    def statistics(
        self, logits: Sequence[Tensor], present: Tensor | None, criterion: Criterion
    ) -> Statistics:
        """What each head says about each sample."""

    def curriculum(
        self,
        logits: Sequence[Tensor],
        present: Tensor | None,
        criterion: Criterion,
        buffers: Buffers,
        memory: Memory | None,
        settings: Settings,
    ) -> Curriculum:
        """Weigh the samples by what the state knows; then take the batch into the state.

        Samples held out have value and coefficient 0, and tell of skill, of what logits count
        and of label noise. A batch of nothing else has value 0.
        """

    def gradients(
        self,
        grad: Tensor,
        coefficient: Tensor | None,
        normaliser: Normaliser,
        logits: Sequence[Tensor],
        criterion: Criterion,
        guard: bool,
    ) -> list[Tensor]:
        """``d/d logits`` of ``sum(grad * coefficient * loss)``.

        With ``guard``, rows of factor 0 get exactly 0.
        """

    def gate(
        self,
        logits: Sequence[Tensor],
        kept: Kept,
        learnt: Learnt | None,
        available: Tensor | None,
        chance: Tensor | None,
        penalty: Tensor | None,
        settings: Gate,
    ) -> Gating:
        """Gates of the modalities from their logits.

        What is ``kept`` takes up what is ``learnt`` first; the prior comes off the logits of the
        first K classes before they are compared, which takes three modalities. ``chance``, uniform
        in [0, 1), ``[3, B]``, swaps or drops one modality of some samples; ``penalty``, ``[M, B]``,
        comes off the gates' logits.
        """

    def mix(
        self,
        streams: Sequence[Tensor],
        logits: Sequence[Tensor],
        scale: Tensor,
        logit_factor: Tensor,
        log_prior: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Streams, scaled and next to each other; logits less the prior, scaled and added up.

        Streams are ``[B, D]`` or ``[B, T, D]``, logits ``[B, C]``, factors ``[M, B]``, those of
        logits times ``logit_factor``, ``[M]``. Where one is 0, so is what it scales, whatever that
        holds.
        """

    def unmix(self, grad: Tensor, widths: Sequence[int], scale: Tensor) -> list[Tensor]:
        """Gradients of the streams from that of what ``mix`` made of them."""

    def observe(
        self,
        features: Sequence[Tensor],
        steps: Sequence[int],
        available: Tensor | None,
        moments: Moments,
        window: float,
    ) -> None:
        """Take every so many features of each modality, at most K of ``[B, D]``, into moments."""

    def novelty(
        self, features: Sequence[Tensor], steps: Sequence[int], moments: Moments, window: float
    ) -> Tensor:
        """How far such features lie from those seen in training, ``[M, B]``, finite.

        1 for a modality of which too little was seen, or that never varied.
        """
