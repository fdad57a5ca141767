"""The joint objective: validation, wiring and reduction around a wrapped criterion."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeGuard, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from dyncim_core import _checks
from dyncim_core.heads import differentiable
from dyncim_core.kernels import check_backend, eager, select
from dyncim_core.kernels.interface import Buffers, Criterion, Kernels, Memory, Settings
from dyncim_core.signals import held_out
from dyncim_core.state import CurriculumState

__all__ = ["DynCIMLoss"]

Reduction = Literal["mean", "sum", "none"]

_ENOUGH_TO_HOLD_OUT = 120  # samples of which one in twenty tell something


class DynCIMLoss(nn.Module):
    """Wraps a criterion with a sample-level and a modality-level curriculum.

    Per sample, ``w_i * (loss[0, i] + gamma * sum_m c_m * loss[m, i])``, where head 0 is
    the fused prediction and heads 1 to M the unimodal ones. The sample weights ``w``
    (mean 1 in the long run) are small for labels that confident heads contradict, as far as the run
    itself shows label noise, favour easy samples while the model is incompetent, and leave
    classes as frequent as they are.
    The modality coefficients ``c`` favour modalities that lag behind the fusion; those with little
    skill on held-out samples count less, and all of them until some head has a skill of a third.
    Both are detached. The paper (arXiv 2503.06456) names these parts; the formulas are
    definitions chosen here.

    The curriculum acts, and its state moves, in training mode with gradients enabled;
    otherwise the call returns exactly what the criterion returns for the fused logits,
    so that validation losses compare.

    Args:
        criterion: ``torch.nn.CrossEntropyLoss``, which takes the fused path, or any
            callable ``(logits, target) -> loss`` over ``[B, C]`` logits that gives one
            loss per sample, ``[B]``, once its ``reduction`` (if it has one) is "none": a copy
            of a module is called, for each head. It sees samples that are held out or masked as
            well, whose losses do not count.
        modalities: Names or number of the modalities, see ``CurriculumState``.
        num_samples: Size of the training set, to keep the per-sample memory that
            ``state.suspects`` ranks; then pass ``index=``.
        state: A ``CurriculumState`` to use instead of a new one made from
            ``modalities`` and ``num_samples``.
        surprise_strength: Strength of the weighting by surprise at full label noise, >= 0, per
            nat. Above 1, predictions run to certainty where classes overlap. Of noise that the run
            shows, it acts in part as long as the fused head's ``trust`` is below 0.25.
        label_noise: Share of wrong labels in [0, 1], where it is known; the weighting acts in
            full from 0.01 on. When ``None``, it is estimated (``state.label_noise``): how far all
            able heads contradict labels together, beyond the errors they share. Once samples are
            held out, only those are asked. With one able modality an eightieth counts, so that much
            noise acts in part. What the fused head alone doubts counts as far as it learns it by
            heart and knows more than any modality (``seen_noise``).
        held_out: Share of the training set, in [0, 0.5], that is not trained on, so that its
            labels are judged by heads that cannot know them by heart. When ``None``, 0.05, or 0 of
            fewer than 120 samples, of which so few tell next to nothing. It takes a per-sample
            memory and, in a call, ``index=``, which tells the samples apart, and unimodal logits;
            in other calls, and with 0, everything is trained on, and is judged as well until
            something is held out. Of class probabilities the likeliest, or the first of several, is
            to be predicted. The loss of what is held out is 0, as is that of a batch of nothing
            else.
        pacing_strength: Strength of the easy-first pacing at zero competence, >= 0.
        unimodal_strength: Share gamma of the unimodal losses, >= 0.
        nonfinite: "propagate" leaves non-finite logits to the criterion; "skip" drops
            the samples whose NLL or entropy they make so, their gradient included (a class
            ruled out by minus infinity does not, whose loss label smoothing makes infinite all
            the same). Neither lets them into the state.
        reduction: "mean" (over samples, or over class weights as cross-entropy does),
            "sum" or "none"; the criterion's own when ``None``.
        backend: "eager", "native" or "triton", see ``backends``; the fastest that takes
            the tensors when ``None``.

    Attributes:
        criterion: The wrapped criterion.
        state: The ``CurriculumState``.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A value is out of range; both ``state`` and what it is made from are
            given; or ``held_out``, without a memory of samples to hold out.
        RuntimeError: The backend asked for is not available.

    Example:
        >>> criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=["audio", "image"])
        >>> fused, audio, image = torch.zeros(3, 8, 4, requires_grad=True).unbind()
        >>> target = torch.arange(8) % 4
        >>> loss = criterion(fused, target, unimodal={"audio": audio, "image": image})
        >>> loss
        tensor(4.1589, grad_fn=<_ObjectiveBackward>)
        >>> criterion.eval()(fused, target)
        tensor(1.3863, grad_fn=<NllLossBackward0>)
    """

    def __init__(
        self,
        criterion: Callable[[Tensor, Tensor], Tensor],
        *,
        modalities: int | Sequence[str] | None = None,
        num_samples: int | None = None,
        state: CurriculumState | None = None,
        surprise_strength: float = 2.0,
        label_noise: float | None = None,
        held_out: float | None = None,
        pacing_strength: float = 0.2,
        unimodal_strength: float = 1.0,
        nonfinite: Literal["propagate", "skip"] = "propagate",
        reduction: Reduction | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(criterion, type):
            raise TypeError(f"criterion: expected an instance, got the class {criterion.__name__}")
        if not callable(criterion):
            raise TypeError(f"criterion: expected a callable, got {type(criterion).__name__}")
        if state is None:
            state = CurriculumState(modalities, num_samples=num_samples)
        elif modalities is not None or num_samples is not None:
            raise ValueError(
                "state: expected it alone, got modalities= or num_samples= as well; "
                "they belong to the CurriculumState"
            )
        _checks.check_instance("state", state, CurriculumState)
        for name, strength in (
            ("surprise_strength", surprise_strength),
            ("pacing_strength", pacing_strength),
            ("unimodal_strength", unimodal_strength),
        ):
            _checks.check_range(name, strength, 0.0, float("inf"), high_excluded=True)
        if reduction is None:
            reduction = cast(Reduction, getattr(criterion, "reduction", "mean"))
        _checks.check_choice("nonfinite", nonfinite, ("propagate", "skip"))
        _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.criterion = criterion
        self.state = state
        if label_noise is not None:
            _checks.check_range("label_noise", label_noise, 0.0, 1.0)
        if held_out is None:
            held_out = 0.05 if (state.num_samples or 0) >= _ENOUGH_TO_HOLD_OUT else 0.0
        _checks.check_range("held_out", held_out, 0.0, 0.5)
        if held_out > 0.0 and state.num_samples is None:
            raise ValueError(
                f"held_out: expected 0 without a per-sample memory, got {held_out}; num_samples=, "
                "here or of the state that is given, keeps one"
            )
        self.held_out = held_out
        self.surprise_strength = surprise_strength
        self.label_noise = label_noise
        self.pacing_strength = pacing_strength
        self.unimodal_strength = unimodal_strength
        self.nonfinite = nonfinite
        self.reduction: Reduction = reduction
        self.backend = check_backend(backend)

    @override
    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        unimodal: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
        present: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """The joint objective of a batch.

        Args:
            logits: Fused logits, floating-point ``[B, C]``.
            target: Class indices, int64 ``[B]``, or probabilities, ``[B, C]``, rows of which sum
                to 1, as the criterion takes them.
            unimodal: Logits of each modality, ``[B, C]``, by name or by position; turns
                the modality level on.
            present: Modalities that each sample has, bool ``[B, M]``; all when
                ``None``. Logits of absent ones may hold anything and get no gradient.
            index: Position of each sample in the training set, int64 ``[B]``, to feed the
                per-sample memory and to hold some of them out; a warning tells of a call without it
                where there is a memory. That of a position repeated in a call is left undefined.

        Returns:
            A scalar, or ``[B]`` under reduction "none", in float32 (float64 for float64
            logits); in what the criterion gives where it is the plain criterion.

        Raises:
            TypeError: An argument is not a tensor of the dtype described.
            ValueError: Shapes, devices or modalities do not fit.
            IndexError: ``target`` or ``index`` is out of range (on CPU; on a GPU a device
                assertion, or from Triton's kernels a loss of NaN and a memory left as it was).
            RuntimeError: The backend asked for does not take the tensors; or, in training, logits
                have a forward-mode gradient, a transform of ``torch.func`` is around, or it is
                called again in the backward, as ``torch.utils.checkpoint`` does.
        """
        # Where Module.__getattr__, which is slow, would find them.
        state = cast(CurriculumState, self._modules["state"])
        criterion = self._modules.get("criterion")  # or None, if it is a function
        heads, names = [logits], state.modalities
        called: Iterable[object] | None = ()  # in messages
        if unimodal is not None:
            names = state.names_of(unimodal)
            heads += _checks.as_list("unimodal", unimodal, names)
            called = unimodal if names is None and isinstance(unimodal, Mapping) else names
        _checks.check_heads(heads, target, called)
        if present is not None:
            if unimodal is None:
                kind = type(present).__name__
                raise ValueError(f"present: expected None without unimodal logits, got {kind}")
            _checks.check_present(present, (logits.shape[0], len(heads) - 1), logits.device)
        if index is not None:
            _checks.check_index(index, state.num_samples, logits)
        averages = state.averages()
        _checks.check_device("state", averages.step, logits.device)
        read = None
        if _is_cross_entropy(criterion):
            weight = _class_weight(criterion)
            _checks.check_class_weight(weight, logits)
            # Numbers of NumPy are none to a compiler of kernels.
            ignored, smoothing = int(criterion.ignore_index), float(criterion.label_smoothing)
            _checks.check_criterion(target, ignored, smoothing)
            read = Criterion(target, weight, ignored, smoothing)
        else:
            _checks.check_criterion(target, self._ignore_index(), 0.0)
        if not (self.training and torch.is_grad_enabled()):
            return self._plain(logits, target)
        _checks.check_first_pass("DynCIMLoss")
        _checks.check_no_transform(heads)
        _checks.check_savable(heads, target, None if read is None else read.weight, called)

        if index is None and state.num_samples is not None:
            _warn_of_no_index()
        if present is not None:
            present = torch.cat([present.new_ones(1, len(logits)), present.t()])
        weight = None if read is None else read.weight
        kernels = select(self.backend, heads, target, (present, index, weight, *averages))
        if unimodal is not None and names is None:  # this call gives them their names
            self._settle(unimodal, kernels, heads, target, index)
            averages = state.averages()
        memory = None if index is None else state.memory(index)
        remembers = memory is not None and unimodal is not None
        settings = self._settings(state, self.held_out if remembers else 0.0)
        if read is None:
            return self._generic(heads, target, present, kernels, averages, memory, settings)
        plain = self._is_neutral() and unimodal is None
        if plain:  # the state moves, without a gradient
            heads = [logits.detach()]
        value = self._plain(logits, target) if plain else None  # first, since it may be rejected
        joint = kernels.curriculum(heads, present, read, averages, memory, settings)
        if value is not None:
            return value
        # What is masked, skipped or held out has no gradient, whatever it holds.
        guard = present is not None or settings.skip_nonfinite or settings.held_out > 0.0
        return differentiable(
            joint.value, joint.coefficient, joint.normaliser, kernels, read, guard, heads
        )

    def _generic(
        self,
        heads: Sequence[Tensor],
        target: Tensor,
        present: Tensor | None,
        kernels: Kernels,
        averages: Buffers,
        memory: Memory | None,
        settings: Settings,
    ) -> Tensor:
        """The joint objective of any criterion that gives one loss per sample."""
        neutral = self._is_neutral() and len(heads) == 1
        value = self._plain(heads[0], target) if neutral else None  # first, as it may be rejected
        weight = _mean_weight(self.criterion)
        _checks.check_class_weight(weight, heads[0])
        criterion = Criterion(target, weight, ignore_index=self._ignore_index())
        found = kernels.statistics(heads, present, criterion)
        classes, usable, expected = heads[0].shape[1], present, None
        shared = eager.shared_by(averages)
        if settings.skip_nonfinite or settings.held_out > 0.0:
            finite = (found.rows[1] + found.rows[2]).isfinite()
            if memory is not None and settings.held_out > 0.0:
                expected = eager.expect(heads, present, criterion, averages.logit_weight, shared)
                trained = ~held_out(memory.rows, settings.held_out)
                heads = [torch.where(trained.unsqueeze(1), x, x.detach()) for x in heads]
                finite = finite if settings.skip_nonfinite else finite | trained
            usable = finite if present is None else finite & present
            if target.is_floating_point():
                target = torch.where(finite.all(dim=0).unsqueeze(1), target, 1.0 / classes)
        if usable is not None:  # for rows left out a logit that is not 0, as over a norm 0 is NaN
            filling = torch.arange(classes, device=target.device) == 0
            heads = [
                torch.where(rows.unsqueeze(1), x, filling.to(x.dtype))
                for rows, x in zip(usable, heads, strict=True)
            ]
        losses = [] if neutral else [self._per_sample(x, target) for x in heads]
        if usable is not None:
            losses = [torch.where(rows, x, 0.0) for rows, x in zip(usable, losses, strict=True)]
        coefficient = eager.weigh(
            found, present, criterion, classes, averages, memory, settings, shared, expected
        )
        if value is not None:
            return value
        return eager.combine(coefficient, torch.stack(losses), settings)

    def _settle(
        self,
        unimodal: Mapping[str, Tensor] | Sequence[Tensor],
        kernels: Kernels,
        heads: Sequence[Tensor],
        target: Tensor,
        index: Tensor | None,
    ) -> None:
        """Take the modalities from the first call, unless that call is to be rejected."""
        if not _is_cross_entropy(self.criterion):
            self._per_sample(heads[0].detach(), target)
        kernels.statistics(heads, None, Criterion(target, ignore_index=self._ignore_index()))
        if index is not None:
            eager.recall(self.state.memory(index))
        self.state.settle_modalities(
            list(unimodal) if isinstance(unimodal, Mapping) else len(unimodal)
        )

    def _settings(self, state: CurriculumState, share: float) -> Settings:
        return Settings(
            self.surprise_strength,
            self.label_noise,
            self.pacing_strength,
            self.unimodal_strength,
            self.nonfinite == "skip",
            state.decay,
            state.memory_decay,
            self.reduction,
            share,
        )

    def _is_neutral(self) -> bool:
        """Whether the fused loss is the criterion's, bit for bit."""
        weighs = self.surprise_strength or self.pacing_strength
        return not weighs and self.nonfinite == "propagate"

    def _ignore_index(self) -> int:
        ignore_index: int | None = getattr(self.criterion, "ignore_index", None)
        return -100 if ignore_index is None else ignore_index

    def _plain(self, logits: Tensor, target: Tensor) -> Tensor:
        """Exactly what the criterion returns, under this reduction."""
        if getattr(self.criterion, "reduction", None) == self.reduction:
            return self.criterion(logits, target)
        return self._reduce(self._per_sample(logits, target), target, self._kept(target))

    def _per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        loss: Tensor
        criterion: Any = self.criterion
        reduction = getattr(criterion, "reduction", "none")
        if reduction == "none":
            loss = criterion(logits, target)
        elif torch.compiler.is_compiling():  # which takes no copies of modules
            criterion.reduction = "none"
            loss = criterion(logits, target)
            criterion.reduction = reduction
        else:  # a copy of now: another thread may be calling the criterion itself
            criterion = copy.copy(getattr(criterion, "_orig_mod", criterion))
            criterion.reduction = "none"
            loss = criterion(logits, target)
        shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        if shape != list(logits.shape[:1]):
            raise ValueError(
                f"criterion: expected one loss per sample, shape {list(logits.shape[:1])}, got "
                f"{shape}; if it reduces, give one that does not, such as "
                'functools.partial(criterion, reduction="none"), and reduction="mean" to DynCIMLoss'
            )
        return loss

    def _kept(self, target: Tensor) -> Tensor:
        """Samples that the criterion does not ignore, bool ``[B]``."""
        if target.is_floating_point():
            return torch.ones(target.shape[0], dtype=torch.bool, device=target.device)
        return target != self._ignore_index()

    def _reduce(self, losses: Tensor, target: Tensor, kept: Tensor) -> Tensor:
        if self.reduction == "none":
            return losses
        if self.reduction == "sum":
            return losses.sum()
        mass, weight = kept, _mean_weight(self.criterion)
        if weight is not None and not target.is_floating_point():
            mass = torch.where(kept, weight[torch.where(kept, target, 0)], 0.0)
        return losses.sum() / mass.sum()

    @override
    def extra_repr(self) -> str:
        return (
            f"surprise_strength={self.surprise_strength}, label_noise={self.label_noise}, "
            f"pacing_strength={self.pacing_strength}, "
            f"unimodal_strength={self.unimodal_strength}, "
            f"held_out={self.held_out}, nonfinite={self.nonfinite!r}, reduction={self.reduction!r}"
        )


def _warn_of_no_index() -> None:
    """Once, under Python's default filter: a column dropped on the way would go unnoticed."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            "index: expected the samples' positions, since num_samples= keeps a memory of each, "
            "got None; nothing is held out of such a call and suspects() learns nothing from it",
            stacklevel=1,
        )


def _mean_weight(criterion: object) -> Tensor | None:
    """Class weights that the criterion's mean is over, as cross-entropy's is."""
    if isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss)):
        return criterion.weight
    return None


def _class_weight(criterion: nn.CrossEntropyLoss) -> Tensor | None:
    if "weight" in criterion._buffers:  # where Module.__getattr__, which is slow, would find it
        return criterion._buffers["weight"]
    return criterion.weight


def _is_cross_entropy(criterion: object) -> TypeGuard[nn.CrossEntropyLoss]:
    """Whether the analytic path computes what this criterion does."""
    return (
        isinstance(criterion, nn.CrossEntropyLoss)
        and type(criterion).forward is nn.CrossEntropyLoss.forward
    )
