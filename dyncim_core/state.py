"""What the curriculum remembers between steps: buffers, their update, and what to read off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from dyncim_core import _checks
from dyncim_core.modality import (
    balance_factor,
    geometric_mean_ratio,
    harmonic_mean_improvement_rate,
    modality_weights,
    quality,
)
from dyncim_core.signals import SIGNALS, relative_change, volatility_weights

__all__ = ["CurriculumState", "Recollection", "Suspects"]

# Buffers with one entry per head; with a memory, one row of them per sample.
_PER_HEAD = ("log_quality", "quality", "seen")
_PER_SAMPLE_AND_HEAD = ("memory_nll", "memory_visits")


class Recollection(NamedTuple):
    """Rows of the per-sample memory for one batch: average NLL and visits, ``[B, M + 1]``."""

    nll: Tensor
    visits: Tensor


class Suspects(NamedTuple):
    """Samples in order of suspicion.

    Attributes:
        indices: int64 ``[k]``, the most suspect first.
        scores: ``[k]``, in nats; ``-inf`` for samples that were never seen.
    """

    indices: Tensor
    scores: Tensor


class CurriculumState(nn.Module):
    """Running statistics of a curriculum, as buffers.

    ``DynCIMLoss`` owns one and is its only writer; ``GatedFusion`` and loggers read it.
    Every value is a tensor that stays in float32 (counters in int64) whatever the
    model's dtype, is saved by ``state_dict``, and is updated in place without reading
    anything on the host.

    Args:
        modalities: Names of the modalities, or their number. When ``None``, the first
            call with unimodal predictions, or a loaded checkpoint, settles it; give it
            when you compile or capture a graph.
        num_samples: Size of the training set, to keep the memory that ``suspects``
            ranks: ``8 M + 12`` bytes a sample.
        decay: Of the running averages over steps, in [0, 1).
        memory_decay: Of the running averages over visits to a sample, in [0, 1).

    Attributes:
        log_quality: ``[M + 1]``, minus the average NLL of each head, in nats.
        quality: ``[M + 1]`` in [0, 1], share of ``log C`` that each head has learnt.
        signal_mean: ``[3]`` in [0, 1], average of each sample-level signal.
        volatility: ``[3]``, average relative change of each signal.
        label_noise: Scalar in [0, 1], share of labels that the model doubts.
        effective_share: Scalar in (0, 1], share of a batch that weighting keeps effective.
        step: int64 scalar, number of updates.
        seen: int64 ``[M + 1]``, number of updates with each head.
        nonfinite: int64 scalar, samples left out because their statistics are not finite.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A value is out of range, or modality names repeat.

    Example:
        >>> state = CurriculumState(modalities=["audio", "image"])
        >>> state.log_quality
        tensor([0., 0., 0.])
        >>> state.summary()["quality/audio"]
        0.0
    """

    log_quality: Tensor
    quality: Tensor
    signal_mean: Tensor
    volatility: Tensor
    label_noise: Tensor
    effective_share: Tensor
    step: Tensor
    seen: Tensor
    nonfinite: Tensor
    memory_nll: Tensor
    memory_visits: Tensor
    memory_weight: Tensor

    def __init__(
        self,
        modalities: int | Sequence[str] | None = None,
        *,
        num_samples: int | None = None,
        decay: float = 0.95,
        memory_decay: float = 0.8,
    ) -> None:
        super().__init__()
        _checks.check_range("decay", decay, 0.0, 1.0, high_excluded=True)
        _checks.check_range("memory_decay", memory_decay, 0.0, 1.0, high_excluded=True)
        if num_samples is not None:
            _checks.check_count("num_samples", num_samples)
        self.decay = decay
        self.memory_decay = memory_decay
        self.num_samples = num_samples
        self.modalities = None if modalities is None else _checks.modality_names(modalities)

        heads = 1 + len(self.modalities or ())
        self.register_buffer("log_quality", torch.zeros(heads))
        self.register_buffer("quality", torch.zeros(heads))
        self.register_buffer("seen", torch.zeros(heads, dtype=torch.int64))
        self.register_buffer("signal_mean", torch.zeros(len(SIGNALS)))
        self.register_buffer("volatility", torch.zeros(len(SIGNALS)))
        self.register_buffer("label_noise", torch.zeros(()))
        self.register_buffer("effective_share", torch.ones(()))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("nonfinite", torch.zeros((), dtype=torch.int64))
        if num_samples is not None:
            self.register_buffer("memory_nll", torch.zeros(num_samples, heads))
            self.register_buffer(
                "memory_visits", torch.zeros(num_samples, heads, dtype=torch.int32)
            )
            self.register_buffer("memory_weight", torch.ones(num_samples))

    def settle_modalities(self, modalities: int | Sequence[str]) -> None:
        """Fix number and names of the modalities of a state that was made without.

        Args:
            modalities: Names, or their number.

        Raises:
            ValueError: They are settled already, as something else.
        """
        names = _checks.modality_names(modalities)
        if self.modalities is None:
            self.modalities = names
            for name in _PER_HEAD + (_PER_SAMPLE_AND_HEAD if self.num_samples else ()):
                fused = getattr(self, name)
                rest = fused.new_zeros((*fused.shape[:-1], len(names)))
                setattr(self, name, torch.cat([fused, rest], dim=-1))
        elif self.modalities != names:
            raise ValueError(
                f"modalities: expected {list(self.modalities)} as settled before, got {list(names)}"
            )

    def recall(self, index: Tensor) -> Recollection:
        """Rows of the memory, ``[B, M + 1]``, for int64 indices ``[B]``.

        Raises:
            IndexError: An index is out of range (on CPU; a device assertion on a GPU).
        """
        try:
            return Recollection(
                self.memory_nll.index_select(0, index), self.memory_visits.index_select(0, index)
            )
        except (RuntimeError, IndexError) as error:  # only then is a look at the values due
            raise IndexError(
                f"index: expected sample indices in [0, {self.num_samples}), got values from "
                f"{int(index.min())} to {int(index.max())}"
            ) from error

    @torch.no_grad()
    def update(
        self,
        nll: Tensor,
        signals: Tensor,
        contradicted: Tensor,
        weights: Tensor,
        valid: Tensor,
        num_classes: int,
        *,
        nonfinite: Tensor,
        present: Tensor | None = None,
        index: Tensor | None = None,
        recalled: Recollection | None = None,
    ) -> None:
        """Take one batch into the running averages and the memory. Called by ``DynCIMLoss``.

        Qualities are averaged with the sample weights, so that labels in doubt do not
        make a good modality look bad.

        Args:
            nll: ``[M + 1, B]``, or ``[1, B]`` of the fused head alone, in nats.
            signals: ``[3, B]`` in [0, 1], in the order of ``SIGNALS``.
            contradicted: Bool ``[B]``, samples whose label all heads contradict together.
            weights: Sample weights, ``[B]``, mean 1 over the valid samples.
            valid: Bool ``[B]``, samples to count; the others may hold anything.
            num_classes: Number of classes C.
            nonfinite: How many samples are left out because they are not finite, scalar.
            present: Bool, like ``nll``; all when ``None``.
            index: Position of each sample in the training set, int64 ``[B]`` without
                repeats; ``None`` leaves the memory alone.
            recalled: What ``recall`` gave for ``index``.
        """
        counted = valid.expand_as(nll) if present is None else valid & present
        if len(nll) < len(self.log_quality):  # a step without unimodal predictions
            absent = nll.new_zeros(len(self.log_quality) - len(nll), nll.shape[1])
            nll, counted = torch.cat([nll, absent]), torch.cat([counted, absent.bool()])
        count = valid.sum()
        first, moves = self.seen[0] == 0, count > 0

        weight = torch.where(counted, weights, 0.0)
        weight_of_head = weight.sum(dim=1)
        has_weight = weight_of_head > 0
        mean_nll = (weight * torch.where(counted, nll, 0.0)).sum(dim=1) / torch.where(
            has_weight, weight_of_head, 1.0
        )
        seen = self.seen + has_weight
        log_quality = self._average(self.log_quality, -mean_nll, self.seen == 0, has_weight)
        # A modality never seen counts as equal to the fusion, which favours neither side.
        log_quality = torch.where(seen > 0, log_quality, log_quality[0])

        signal = torch.where(valid, signals, 0.0).sum(dim=1) / count.clamp_min(1)
        signal_mean = self._average(self.signal_mean, signal, first, moves)
        # The first batch has nothing to have moved from.
        change = torch.where(first, 0.0, relative_change(signal, self.signal_mean))
        volatility = self._average(self.volatility, change, self.seen[0] == 1, moves)

        # Starts at 0, not at its first value: the doubt of an untrained model is worth nothing.
        doubt = (contradicted & valid).sum() / count.clamp_min(1)
        label_noise = self._average(self.label_noise, doubt, torch.zeros_like(first), moves)

        fused_weight = weight[0]
        share = fused_weight.sum().square() / (fused_weight.square().sum() * count).clamp_min(1e-12)
        effective_share = self._average(self.effective_share, share, first, moves)

        self.log_quality.copy_(log_quality)
        self.quality.copy_(quality(log_quality, num_classes))
        self.signal_mean.copy_(signal_mean)
        self.volatility.copy_(volatility)
        self.label_noise.copy_(label_noise)
        self.effective_share.copy_(effective_share)
        self.seen.copy_(seen)
        self.nonfinite.add_(nonfinite)
        self.step.add_(1)
        if index is not None and recalled is not None:
            self._remember(nll, weights, counted, index, recalled)

    def _remember(
        self, nll: Tensor, weights: Tensor, counted: Tensor, index: Tensor, recalled: Recollection
    ) -> None:
        current = nll.t().to(recalled.nll.dtype)
        averaged = torch.where(
            recalled.visits == 0, current, torch.lerp(current, recalled.nll, self.memory_decay)
        )
        self.memory_nll.index_copy_(0, index, torch.where(counted.t(), averaged, recalled.nll))
        self.memory_visits.index_copy_(0, index, recalled.visits + counted.t())
        self.memory_weight.index_copy_(0, index, weights.to(self.memory_weight.dtype))

    def suspects(self, k: int | None = None, *, modality: str | int | None = None) -> Suspects:
        """Rank training samples by how wrong they look, from the per-sample memory.

        Without ``modality``, the score is the average NLL of the fused head: the samples
        whose label the model cannot come to agree with. With one, it is how much that
        modality's NLL exceeds the mean of the other modalities': samples whose input of
        that modality, rather than the label, looks corrupted. Definition chosen here.

        Args:
            k: How many; all when ``None``.
            modality: Name or position of the modality to rank.

        Returns:
            ``Suspects`` with ``indices`` and ``scores``, ``[k]``, on the state's device.

        Raises:
            RuntimeError: There is no per-sample memory.
            ValueError: ``k`` is out of range, or ``modality`` is unknown or the only one.

        Example:
            >>> state = CurriculumState(1, num_samples=3)
            >>> _ = state.memory_nll.copy_(torch.tensor([[0.1, 0], [2.0, 0], [0.5, 0]]))
            >>> _ = state.memory_visits.fill_(1)
            >>> state.suspects(k=2).indices
            tensor([1, 2])
        """
        if self.num_samples is None:
            raise RuntimeError(
                "suspects: expected a per-sample memory, got none; construct with num_samples="
            )
        if k is None:
            k = self.num_samples
        if not isinstance(k, int) or not 1 <= k <= self.num_samples:
            raise ValueError(f"k: expected a whole number in [1, {self.num_samples}], got {k!r}")
        nll, visited = self.memory_nll, self.memory_visits > 0
        if modality is None:
            score, ranked = nll[:, 0], visited[:, 0]
        else:
            head = 1 + self._position(modality)
            others = visited[:, 1:].clone()
            others[:, head - 1] = False
            count = others.sum(dim=1)
            mean_of_others = torch.where(others, nll[:, 1:], 0.0).sum(dim=1) / count.clamp_min(1)
            score, ranked = nll[:, head] - mean_of_others, visited[:, head] & (count > 0)
        top = torch.where(ranked, score, -torch.inf).topk(k)
        return Suspects(top.indices, top.values)

    def summary(self) -> dict[str, float]:
        """What the curriculum sees now, for any logger; reads the device once.

        Returns:
            Floats by name: ``step``, ``nonfinite``, ``label_noise``, ``effective_share``,
            ``quality/fused``, and for each signal ``signal/NAME`` and
            ``signal_weight/NAME``; with modalities also ``gmr``, ``hmir``,
            ``balance_factor``, and for each ``quality/NAME`` and
            ``modality_weight/NAME``.

        Example:
            >>> CurriculumState().summary()["signal_weight/stability"]  # doctest: +ELLIPSIS
            0.333...
        """
        values: dict[str, Tensor] = {
            "step": self.step,
            "nonfinite": self.nonfinite,
            "label_noise": self.label_noise,
            "effective_share": self.effective_share,
        }
        signal_weights = volatility_weights(self.volatility)
        for k, name in enumerate(SIGNALS):
            values[f"signal/{name}"] = self.signal_mean[k]
            values[f"signal_weight/{name}"] = signal_weights[k]
        for head, name in enumerate(("fused", *(self.modalities or ()))):
            values[f"quality/{name}"] = self.quality[head]
        if self.modalities is not None:
            values["gmr"] = geometric_mean_ratio(self.log_quality)
            values["hmir"] = harmonic_mean_improvement_rate(self.log_quality)
            values["balance_factor"] = balance_factor(self.log_quality)
            alpha = modality_weights(self.log_quality)
            for m, name in enumerate(self.modalities):
                values[f"modality_weight/{name}"] = alpha[m]
        numbers = torch.stack([value.double() for value in values.values()]).tolist()
        return dict(zip(values, numbers, strict=True))

    def _average(self, mean: Tensor, value: Tensor, first: Tensor, moves: Tensor) -> Tensor:
        """Exponential average that starts at its first value, and stays where nothing moves."""
        value = value.to(mean.dtype)
        return torch.where(moves, torch.where(first, value, value.lerp(mean, self.decay)), mean)

    def _position(self, modality: str | int) -> int:
        names = self.modalities or ()
        if isinstance(modality, str) and modality in names:
            position = names.index(modality)
        elif isinstance(modality, int) and 0 <= modality < len(names):
            position = modality
        else:
            raise ValueError(f"modality: expected one of {list(names)}, got {modality!r}")
        if len(names) == 1:
            raise ValueError(
                "modality: expected another modality to compare with, got the only one"
            )
        return position

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Averages in half precision would stall: follow the device, keep the dtype.
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self

    @override
    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        saved = state_dict.get(f"{prefix}log_quality")
        if self.modalities is None and saved is not None and saved.numel() > 1:
            self.settle_modalities(saved.numel() - 1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @override
    def extra_repr(self) -> str:
        return f"modalities={self.modalities}, num_samples={self.num_samples}, decay={self.decay}"
