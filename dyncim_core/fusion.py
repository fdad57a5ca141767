"""Gated dynamic fusion: concatenation, each modality scaled by how reliable it looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from dyncim_core import _checks
from dyncim_core._buffers import KeepsDtype
from dyncim_core.gates import novelty_penalty
from dyncim_core.kernels import check_backend, eager, select
from dyncim_core.kernels.interface import GROUPS, Gate, Kept, Kernels, Learnt, with_memory
from dyncim_core.moments import FeatureMoments
from dyncim_core.state import CurriculumState

__all__ = ["FusionOutput", "GatedFusion"]


_IN_ORDER = torch.contiguous_format
_in_a_batch = torch._C._functorch.is_legacy_batchedtensor


class FusionOutput(NamedTuple):
    """Result of ``GatedFusion``.

    Attributes:
        fused: ``[B, sum D]`` or ``[B, T, sum D]``, in the features' dtype.
        gates: ``[B, M]``, float32, >= 0, sums to 1; 0 for absent modalities, and for a sample
            without any.
        logits: ``[B, C]``, float32, to add to the logits of a head over ``fused``: the sum of the
            unimodal logits less ``log_prior``, each times the scale of its features and its weight
            next to the fused head's (``relative_logit_weights``). In training with a state, all
            count ``1 - quality`` of the fused head in place of that weight, so that the head learns
            to do without them. Detached: unimodal heads learn from their own losses. ``None``
            without unimodal logits.
    """

    fused: Tensor
    gates: Tensor
    logits: Tensor | None


class GatedFusion(KeepsDtype):
    """Concatenates the features of the modalities, each scaled by how reliable it looks.

    The gate of a modality falls with how much the others, two at least and as far as they
    are sure and to be believed, contradict its own prediction, and in inference as soon as its
    features lie far from those seen in training: it works without labels. Features are scaled
    by their gate over the largest gate of the sample, so that equal gates give plain
    concatenation. Logits of modalities count as samples held out teach; features do not, and what
    tells little by itself is not contradicted, since it may tell what another means. In training,
    some modalities of some samples are dropped or swapped with another sample's: at most one
    modality of a sample, the less often the less it errs, the further fusion is ahead of its
    modalities, and the more some classes outnumber others. The paper (arXiv 2503.06456) names a
    gating-based dynamic fusion; this one is a definition chosen here.

    It has no parameters, and predictions enter the gate detached: the encoders are not
    trained to look reliable.

    Args:
        features: Width of each modality's features, by name or by position.
        state: The ``CurriculumState`` of the criterion. Its skills tell how far modalities are
            believed when they contradict each other, and which are dropped more; its logit
            weights what their logits count, and its fused quality how far those are withdrawn;
            its ``redundancy`` how much is dropped; the classes that it has seen, if at most 1024,
            are what predictions say beyond (``log_prior``), and uneven ones spare dropout
            (``evenness``). What was last seen in training is kept for inference, which needs no
            state. When ``None``, what a loaded checkpoint kept counts; a new one knows nothing, so
            that all modalities count alike and dropout acts in full.
        disagreement_slope: How sharply a gate falls with disagreement, >= 0; with 0
            nobody is outvoted. More helps where inputs do go wrong and there is data enough; where
            it is scarce, 0 is best on clean inputs.
        novelty_slope: How sharply, in inference, a gate falls with the ``novelty`` of its
            modality's features, >= 0; the training features are not watched when 0. Features
            of shape ``[B, T, D]`` are averaged over T for it.
        threshold: Share under which a gate is cut as redundant, in [0, 1 / M).
        swap: Share of the samples of a training batch, in [0, 1], that take one modality,
            picked at random, from another sample, at full ``redundancy`` and ``evenness``; less as
            far as the picked one errs less than the weakest. Worth 0.1 where inputs do get
            mixed up, at some cost on clean ones.
        dropout: Share that misses one modality, likewise; ``swap + dropout <= 1``.
        backend: "eager", "native" or "triton", see ``backends``; the fastest that takes
            the tensors when ``None``.

    Attributes:
        out_features: Width of ``fused``.
        modalities: Names of the modalities.
        skill: Buffer ``[M]`` in [0, 1], float32 whatever the model's dtype; 0 as long as
            nothing is known.
        logit_factor: Buffer ``[M]`` in [0, 2], what gated logits are multiplied by in inference
            (``relative_logit_weights``); 1 as long as nothing is known.
        log_prior: Buffer ``[1024]``, what is taken off the logits of the first so many classes
            before they are compared and added up; of more classes, nothing is.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A value is out of range, or the state was made for other modalities.
        RuntimeError: The backend asked for is not available.

    Example:
        >>> fusion = GatedFusion({"audio": 3, "image": 2}).eval()
        >>> features = {"audio": torch.ones(4, 3), "image": torch.ones(4, 2)}
        >>> fusion(features).fused.shape
        torch.Size([4, 5])
        >>> fusion = GatedFusion([3, 3, 3]).eval()
        >>> yes, no = torch.tensor([[9.0, 0.0]] * 4), torch.tensor([[0.0, 9.0]] * 4)
        >>> gates = fusion([torch.ones(4, 3)] * 3, unimodal=[yes, yes, no]).gates
        >>> [round(gate, 2) for gate in gates[0].tolist()]
        [0.46, 0.46, 0.08]
    """

    skill: Tensor
    logit_factor: Tensor
    log_prior: Tensor | None

    _at_first_1 = ("logit_factor",)

    def __init__(
        self,
        features: Mapping[str, int] | Sequence[int],
        *,
        state: CurriculumState | None = None,
        disagreement_slope: float = 2.0,
        novelty_slope: float = 2.0,
        threshold: float = 0.05,
        swap: float = 0.0,
        dropout: float = 0.5,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        widths = _checks.as_list("features", features, None)
        self.modalities = _checks.modality_names(
            list(features) if isinstance(features, Mapping) else len(widths), "features"
        )
        for name, width in zip(self.modalities, widths, strict=True):
            _checks.check_count(f"width of {name}", width)
        self.widths = tuple(widths)
        self.out_features = sum(widths)
        for name, slope in (
            ("disagreement_slope", disagreement_slope),
            ("novelty_slope", novelty_slope),
        ):
            _checks.check_range(name, slope, 0.0, float("inf"), high_excluded=True)
        _checks.check_range("threshold", threshold, 0.0, 1.0 / len(widths), high_excluded=True)
        _checks.check_range("swap", swap, 0.0, 1.0)
        _checks.check_range("dropout", dropout, 0.0, 1.0)
        _checks.check_range("swap + dropout", swap + dropout, 0.0, 1.0)
        self.disagreement_slope = disagreement_slope
        self.novelty_slope = novelty_slope
        self.threshold = threshold
        self.swap = swap
        self.dropout = dropout
        self.backend = check_backend(backend)
        # In a tuple, so that the loss's state is not saved and moved a second time.
        self._state: tuple[CurriculumState | None] = (None,)
        if state is not None:
            self.follow(state)
        self.register_buffer("skill", torch.zeros(len(widths), dtype=torch.float32))
        self.register_buffer("logit_factor", torch.ones(len(widths), dtype=torch.float32))
        self.register_buffer("log_prior", torch.zeros(GROUPS, dtype=torch.float32))
        self.moments = FeatureMoments(widths) if novelty_slope else None

    def follow(self, state: CurriculumState) -> None:
        """Read another ``state`` from now on.

        For a model that was copied without its criterion, whose copy reads a copy of the state
        that nobody writes to.

        Args:
            state: The criterion's.

        Raises:
            TypeError: It is not a ``CurriculumState``.
            ValueError: It was made for other modalities.

        Example:
            >>> import copy
            >>> state = CurriculumState(["audio", "image"])
            >>> fusion = GatedFusion({"audio": 3, "image": 2}, state=state)
            >>> copied = copy.deepcopy(fusion)
            >>> copied.follow(state)
        """
        _checks.check_instance("state", state, CurriculumState)
        state.settle_modalities(self.modalities)
        self._state = (state,)

    @override
    def forward(
        self,
        features: Mapping[str, Tensor] | Sequence[Tensor],
        *,
        unimodal: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
        present: Tensor | None = None,
    ) -> FusionOutput:
        """Fuse a batch.

        Args:
            features: Of each modality, ``[B, D_m]``, or ``[B, T, D_m]`` with T alike.
            unimodal: Each modality's own logits, ``[B, C]``. Without them nobody contradicts
                anybody.
            present: Bool ``[B, M]``; all when ``None``. Absent features may hold
                anything.

        Returns:
            ``FusionOutput``: fused features, gates and gated logits.

        Raises:
            TypeError: An argument is not a tensor of the dtype described.
            ValueError: Modalities, shapes or devices do not fit.
            RuntimeError: The backend asked for does not take the logits; or, in training, it
                is called again in the backward, as ``torch.utils.checkpoint`` does.
        """
        streams = _checks.as_list("features", features, self.modalities)
        _checks.check_features(streams, self.widths, self.modalities)
        batch, device = streams[0].shape[0], streams[0].device
        logits = None
        if unimodal is not None:
            logits = _checks.as_list("unimodal", unimodal, self.modalities)
            _checks.check_unimodal(logits, self.modalities, batch, device)
            logits = [x.detach() for x in logits]
        _checks.check_present(present, (batch, len(streams)), device)
        _checks.check_device("fusion", self.skill, device, of="features")
        self.keep_dtype()
        evidence = logits
        prior = self.log_prior
        if prior is not None and not (logits and logits[0].shape[1] <= len(prior)):
            prior = None
        if evidence is None:  # all agree
            evidence = [x.new_zeros((batch, 1), dtype=torch.float32) for x in streams]
        there = present
        if present is not None:
            there = present.t().clone(memory_format=_IN_ORDER)
        learnt = chance = penalty = None
        if self.training:
            _checks.check_first_pass("GatedFusion")
            learnt = self._learnt()
        kept = Kept(self.skill, self.logit_factor, prior)
        kernels = select(self.backend, evidence, others=(*kept, there, *(learnt or ())))
        # What was asked for is for the logits; C takes the features that it can.
        by = "eager" if kernels is eager else None
        if self.training:
            if self.swap or self.dropout:
                chance = torch.rand((3, batch), dtype=torch.float32, device=device)
        elif self.moments is not None:
            penalty = self.novelty_slope * novelty_penalty(self.moments.novelty(streams, by))

        gating = kernels.gate(
            evidence,
            kept,
            learnt,
            there,
            chance,
            penalty,
            Gate(self.disagreement_slope, self.threshold, self.swap, self.dropout),
        )
        if self.training and self.moments is not None:
            self.moments.observe(streams, there, by)
        rows = gating.source
        if rows is not None:
            streams = [x[row] for x, row in zip(streams, rows, strict=True)]
            logits = logits and [x[row] for x, row in zip(logits, rows, strict=True)]
        factor = self.logit_factor
        if learnt is not None:  # less and less, so that the head learns to do without
            factor = torch.ones_like(factor).sub_(learnt.quality[0])
        fused, total = _mixed(
            select(by, streams), streams, logits or (), gating.scale, factor, prior
        )
        return FusionOutput(fused, gating.gates.t().clone(memory_format=_IN_ORDER), total)

    def _learnt(self) -> Learnt | None:
        (state,) = self._state
        if state is None:
            return None
        _checks.check_device("state", state.skill, self.skill.device, of="fusion")
        state.keep_dtype()
        held = state._buffers  # where Module.__getattr__, which is slow, would find them
        learnt = [held[name] for name in Learnt._fields]
        if torch.compiler.is_compiling():
            return Learnt(*map(_as_it_is_now, learnt))
        return Learnt(*learnt)  # type: ignore[arg-type]

    @override
    def extra_repr(self) -> str:
        sizes = ", ".join(
            f"{name}: {width}" for name, width in zip(self.modalities, self.widths, strict=True)
        )
        return (
            f"{{{sizes}}}, disagreement_slope={self.disagreement_slope}, "
            f"novelty_slope={self.novelty_slope}, threshold={self.threshold}, "
            f"swap={self.swap}, dropout={self.dropout}"
        )


@torch.library.custom_op("dyncim_core::as_it_is_now", mutates_args=())
def _as_it_is_now(x: Tensor) -> Tensor:
    """A copy that a compiler must keep for the backward.

    It would read the state again there, where the loss has moved it on.
    """
    return x.clone()


_as_it_is_now.register_fake(torch.empty_like)


def _mixed(
    kernels: Kernels,
    streams: Sequence[Tensor],
    logits: Sequence[Tensor],
    scale: Tensor,
    logit_factor: Tensor,
    log_prior: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """``Kernels.mix``, differentiable for streams."""
    if kernels is eager:
        return eager.mix(streams, logits, scale, logit_factor, log_prior)
    found: tuple[Tensor, Tensor | None] = _apply_plainly(  # type: ignore[no-untyped-call]
        (kernels, logits, scale, logit_factor, log_prior), *streams
    )
    return found


class _Mixed(torch.autograd.Function):
    """``scale`` is this function's own: nobody changes it between forward and backward."""

    @staticmethod
    def forward(ctx: Any, known: tuple[Any, ...], *streams: Tensor) -> tuple[Tensor, Tensor | None]:
        kernels, logits, scale, logit_factor, log_prior = known
        ctx.known = kernels, [x.shape[-1] for x in streams], scale
        ctx.set_materialize_grads(False)
        fused, total = kernels.mix(streams, logits, scale, logit_factor, log_prior)
        if total is not None:
            ctx.mark_non_differentiable(total)
        return fused, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        kernels, widths, scale = ctx.known
        if grad is None:
            return (None,) * (1 + len(widths))
        # With create_graph=True; and gradients in a batch, is_grads_batched=True, have no address.
        if torch.is_grad_enabled() or _in_a_batch(grad):
            kernels = eager
        return (None, *kernels.unmix(with_memory(grad), widths, scale))


# Without what Function.apply does for functorch's transforms, which only plain PyTorch takes.
_apply_plainly = super(torch.autograd.Function, _Mixed).apply
