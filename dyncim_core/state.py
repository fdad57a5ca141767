"""What the curriculum remembers between steps: buffers, their update, and what to read off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from dyncim_core import _checks
from dyncim_core._buffers import KeepsDtype
from dyncim_core.audit import input_suspicion, label_suspicion
from dyncim_core.kernels.interface import GROUPS, HEARD, Buffers, Memory
from dyncim_core.modality import (
    balance_factor,
    geometric_mean_ratio,
    harmonic_mean_improvement_rate,
    modality_weights,
    redundancy,
    trust,
)
from dyncim_core.signals import SIGNALS, volatility_weights

__all__ = ["CurriculumState", "Suspects"]

# Buffers with one entry per head; with a memory, one row of them per sample.
_PER_HEAD = (
    "log_quality",
    "quality",
    "seen",
    "skill",
    "logit_weight",
    "held_out_averages",
)
_PER_SAMPLE_AND_HEAD = ("memory_nll", "memory_visits")


class Suspects(NamedTuple):
    """Samples in order of suspicion.

    Attributes:
        indices: int64 ``[k]``, the most suspect first.
        scores: ``[k]``, in nats; ``-inf``, and last, for samples that were never seen, or of which
            the modality asked for was not, or no other.
    """

    indices: Tensor
    scores: Tensor


class CurriculumState(KeepsDtype):
    """Running statistics of a curriculum, as buffers.

    ``DynCIMLoss`` owns one and writes it; ``GatedFusion`` and loggers read it.
    Every value is a tensor that stays in float32 (counters in int64 or int32) whatever the
    model's dtype, is saved by ``state_dict``, and is updated in place without reading
    anything on the host.

    Args:
        modalities: Names of the modalities, or their number. When ``None``, the first
            call with unimodal predictions, or a loaded checkpoint, settles it; give it
            when you compile, capture a graph, average weights, load into a model in use, or
            order the modalities anew: a checkpoint does not hold their names.
        num_samples: Size of the training set, to keep the memory that ``suspects``
            ranks: ``8 M + 12`` bytes a sample.
        decay: Of the running averages over steps, in [0, 1); what logits count moves as fast, and
            swings below 0.9.
        memory_decay: Of the running averages over visits to a sample, in [0, 1); until there are
            ``1 / (1 - memory_decay)`` of them, the mean of all. What looked wrong while a model was
            learning looks so for long, even if it is known by heart in the end.

    Attributes:
        modalities: Names of the modalities, or ``None``.
        num_samples, decay, memory_decay: As given.
        log_quality: ``[M + 1]``, minus the average NLL of each head, each sample by its weight, in
            nats; of class probabilities what the NLL has beyond their own entropy
            (``target_entropy``), over what they leave to be learnt (``share_to_learn``).
        quality: ``[M + 1]`` in [0, 1], share of ``log C`` that each head has learnt.
        signal_mean: ``[3]`` in [0, 1], average of each sample-level signal.
        volatility: ``[3]``, average relative change of each signal.
        label_noise: Scalar in [-0.07, 1], how far all heads contradict the labels, on average,
            beyond what they err about together (``contradiction``); 0 or less where nothing is
            seen. Once there were any, of samples held out, by able heads alone (``witnesses``), an
            eightieth where that is one modality, or what the fused head alone sees, if that is more
            (``seen_noise``); before, of those trained on.
        doubted: Scalar in [0, 1], how far the fused head by itself contradicts the labels of
            samples trained on (``doubt``), on average, in calls that may hold samples out.
        skill: ``[M + 1]`` in [0, 1], what each head predicts beyond chance of the samples
            held out of training; 0 as long as there were none.
        logit_weight: ``[M + 1]`` in [0.02, 2], by what the logits of the head that ``GatedFusion``
            feeds and of all modalities add up best on samples held out, each as far as its label
            is believed (``logit_weights``); 1 as long as there were none, and then the fused
            head's for a modality that none had yet.
        held_out_averages: ``[7, M + 1]``, averages over samples held out, from which ``skill``,
            ``logit_weight``, ``label_noise`` and ``generalisation`` follow.
        log_class_average: ``[1024]``, logarithm of what the weights of each class's samples are
            divided by, so that a class counts as often as it occurs; that of class c at
            ``c % 1024``.
        class_seen: int64 ``[1024]``, samples of each class trained on so far, in the same places.
        class_weight: ``[1024]``, weights that ``nn.CrossEntropyLoss`` gives the classes, 1 without;
            0 with more classes than that, and with label smoothing, for class probabilities and of
            any other criterion, whose predictions do not follow how frequent the classes are.
        effective_share: Scalar in (0, 1], share of a batch that weighting keeps effective.
        step: int64 scalar, number of updates.
        seen: int64 ``[M + 1]``, number of updates with each head.
        memory_nll, memory_visits, memory_weight: With ``num_samples``, of each sample and head,
            ``[N, M + 1]``, the average NLL in nats, as in ``log_quality``, and how often it was
            seen (int32); and the last weight of each sample, ``[N]``.
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
    doubted: Tensor
    skill: Tensor
    logit_weight: Tensor
    log_class_average: Tensor
    class_seen: Tensor
    class_weight: Tensor
    held_out_averages: Tensor
    effective_share: Tensor
    step: Tensor
    seen: Tensor
    nonfinite: Tensor
    memory_nll: Tensor
    memory_visits: Tensor
    memory_weight: Tensor

    _at_first_1 = ("effective_share", "memory_weight", "logit_weight")

    def __init__(
        self,
        modalities: int | Sequence[str] | None = None,
        *,
        num_samples: int | None = None,
        decay: float = 0.95,
        memory_decay: float = 0.95,
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
        self._numbered = False  # settled by a checkpoint, which does not know their names

        heads = 1 + len(self.modalities or ())
        self.register_buffer("log_quality", torch.zeros(heads, dtype=torch.float32))
        self.register_buffer("quality", torch.zeros(heads, dtype=torch.float32))
        self.register_buffer("seen", torch.zeros(heads, dtype=torch.int64))
        self.register_buffer("signal_mean", torch.zeros(len(SIGNALS), dtype=torch.float32))
        self.register_buffer("volatility", torch.zeros(len(SIGNALS), dtype=torch.float32))
        self.register_buffer("label_noise", torch.zeros((), dtype=torch.float32))
        self.register_buffer("doubted", torch.zeros((), dtype=torch.float32))
        self.register_buffer("skill", torch.zeros(heads, dtype=torch.float32))
        self.register_buffer("held_out_averages", torch.zeros(HEARD, heads, dtype=torch.float32))
        self.register_buffer("logit_weight", torch.zeros(heads, dtype=torch.float32))
        self.register_buffer("log_class_average", torch.zeros(GROUPS, dtype=torch.float32))
        self.register_buffer("class_seen", torch.zeros(GROUPS, dtype=torch.int64))
        self.register_buffer("class_weight", torch.zeros(GROUPS, dtype=torch.float32))
        self.register_buffer("effective_share", torch.zeros((), dtype=torch.float32))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("nonfinite", torch.zeros((), dtype=torch.int64))
        if num_samples is not None:
            self.register_buffer("memory_nll", torch.zeros(num_samples, heads, dtype=torch.float32))
            self.register_buffer(
                "memory_visits", torch.zeros(num_samples, heads, dtype=torch.int32)
            )
            self.register_buffer("memory_weight", torch.zeros(num_samples, dtype=torch.float32))
        self.reset_parameters()

    def settle_modalities(self, modalities: int | Sequence[str]) -> None:
        """Fix number and names of the modalities of a state that was made without.

        Args:
            modalities: Names, or their number.

        Raises:
            TypeError: They are neither a number nor a sequence of names.
            ValueError: They are settled already, as something else.
        """
        names = _checks.modality_names(modalities)
        if self.modalities is None:
            self.modalities = names
            for name in _PER_HEAD + (_PER_SAMPLE_AND_HEAD if self.num_samples else ()):
                fused = getattr(self, name)
                shape = (*fused.shape[:-1], len(names))
                rest = fused.new_full(shape, name in self._at_first_1)
                setattr(self, name, torch.cat([fused, rest], dim=-1))
        elif self._numbered and len(names) == len(self.modalities):
            self.modalities = names
        elif self.modalities != names:
            raise ValueError(
                f"modalities: expected {list(self.modalities)} as settled before, got "
                f"{list(names)}; name them alike where the state is made"
            )
        self._numbered = False

    def _unsettle(self) -> None:
        self.modalities, self._numbered = None, False
        for name in _PER_HEAD + (_PER_SAMPLE_AND_HEAD if self.num_samples else ()):
            setattr(self, name, getattr(self, name)[..., :1].clone())

    def names_of(self, values: Mapping[str, object] | Sequence[object]) -> tuple[str, ...] | None:
        """The modalities that values by name or by position must be of; any when ``None``."""
        names = self.modalities
        if self._numbered and isinstance(values, Mapping) and len(values) == len(names or ()):
            return None
        return names

    def averages(self) -> Buffers:
        """The running averages, for the kernels that update them in place."""
        self.keep_dtype()
        held = self._buffers
        return Buffers(*[held[name] for name in Buffers._fields])  # type: ignore[arg-type]

    def memory(self, index: Tensor) -> Memory:
        """The per-sample memory, for the kernels that update its rows ``index`` in place."""
        return Memory(index, self.memory_nll, self.memory_visits, self.memory_weight)

    def suspects(self, k: int | None = None, *, modality: str | int | None = None) -> Suspects:
        """Rank training samples by how wrong they look, from the per-sample memory.

        Without ``modality``, by ``label_suspicion``: samples whose label the model cannot come to
        agree with. Those held out are ranked as well. With one, by ``input_suspicion``: samples
        whose input of that modality, rather than the label, looks corrupted.

        Args:
            k: How many; all when ``None``.
            modality: Name or position of the modality to rank.

        Returns:
            ``Suspects`` with ``indices`` and ``scores``, ``[k]``, on the state's device.

        Raises:
            RuntimeError: There is no per-sample memory, or nothing in it.
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
        if isinstance(k, bool) or not isinstance(k, Integral) or not 1 <= k <= self.num_samples:
            raise ValueError(f"k: expected a whole number in [1, {self.num_samples}], got {k!r}")
        position = None if modality is None else self._position(modality)
        nll, visited = self.memory_nll, self.memory_visits > 0
        if not visited.any():
            raise RuntimeError(
                "suspects: expected samples that were trained on, got none; pass index= to the loss"
            )
        if position is None:
            score = label_suspicion(nll, visited, trust(self.skill))
        else:
            score = input_suspicion(nll, visited, 1 + position)
        top = score.topk(int(k))
        return Suspects(top.indices, top.values)

    @property
    def temperature(self) -> Tensor:
        """What to divide logits by where probabilities matter, a scalar in [0.5, 50].

        ``1 / logit_weight[0]``: by ``logit_weight`` the logits of all heads add up to the likeliest
        predictions of samples held out; ``GatedFusion`` takes the ratios to the fused head's, 2 at
        most, and this is the scale that those leave open. It is for the sum of the fused head's
        logits and the gated ones in inference, and means nothing where those are not added. It
        moves no prediction, and is 1 as long as no sample was held out. Labels that look wrong
        count little for it. To scale logits by what was not trained on is temperature scaling (Guo
        et al., ICML 2017); this definition is chosen here.

        Example:
            >>> state = CurriculumState(modalities=["audio", "image"])
            >>> state.temperature
            tensor(1.)
        """
        return self.logit_weight[0].reciprocal()

    def summary(self) -> dict[str, float]:
        """What the curriculum sees now, for any logger; reads the device once.

        Returns:
            Floats by name: ``step``, ``nonfinite``, ``label_noise`` (0 for less),
            ``effective_share``,
            ``temperature``, ``quality/fused``, ``skill/fused``, ``logit_weight/fused``, and for
            each signal ``signal/NAME`` and ``signal_weight/NAME``; with modalities also ``gmr``,
            ``hmir``, ``balance_factor``, ``redundancy``, and for each ``quality/NAME``,
            ``skill/NAME``, ``logit_weight/NAME`` and ``modality_weight/NAME``.

        Example:
            >>> CurriculumState().summary()["signal_weight/stability"]  # doctest: +ELLIPSIS
            0.333...
        """
        values: dict[str, Tensor] = {
            "step": self.step,
            "nonfinite": self.nonfinite,
            "label_noise": self.label_noise.clamp_min(0.0),
            "effective_share": self.effective_share,
            "temperature": self.temperature,
        }
        signal_weights = volatility_weights(self.volatility)
        for k, name in enumerate(SIGNALS):
            values[f"signal/{name}"] = self.signal_mean[k]
            values[f"signal_weight/{name}"] = signal_weights[k]
        for head, name in enumerate(("fused", *(self.modalities or ()))):
            values[f"quality/{name}"] = self.quality[head]
            values[f"skill/{name}"] = self.skill[head]
            values[f"logit_weight/{name}"] = self.logit_weight[head]
        if self.modalities is not None:
            values["gmr"] = geometric_mean_ratio(self.log_quality)
            values["hmir"] = harmonic_mean_improvement_rate(self.log_quality)
            values["balance_factor"] = balance_factor(self.log_quality)
            values["redundancy"] = redundancy(self.log_quality, self.quality[0], self.skill)
            alpha = modality_weights(self.log_quality)
            for m, name in enumerate(self.modalities):
                values[f"modality_weight/{name}"] = alpha[m]
        numbers = torch.stack([value.double() for value in values.values()]).tolist()
        return dict(zip(values, numbers, strict=True))

    def _position(self, modality: str | int) -> int:
        names = self.modalities or ()
        if isinstance(modality, str) and modality in names:
            position = names.index(modality)
        elif (
            isinstance(modality, Integral)
            and not isinstance(modality, bool)
            and 0 <= modality < len(names)
        ):
            position = int(modality)
        else:
            raise ValueError(
                f"modality: expected one of {list(names)}, got {modality!r}; a position is in "
                f"[0, {len(names)})"
            )
        if len(names) == 1:
            raise ValueError(
                "modality: expected another modality to compare with, got the only one"
            )
        return position

    @override
    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        saved = state_dict.get(f"{prefix}log_quality")
        if saved is not None and saved.numel() != len(self.log_quality):
            if self._numbered:  # by another checkpoint, perhaps one that did not fit
                self._unsettle()
            if self.modalities is None and saved.numel() > 1:
                self.settle_modalities(saved.numel() - 1)
                self._numbered = True
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @override
    def extra_repr(self) -> str:
        return f"modalities={self.modalities}, num_samples={self.num_samples}, decay={self.decay}"
