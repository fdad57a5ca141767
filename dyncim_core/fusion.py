"""Gated dynamic fusion: concatenation, each modality scaled by how reliable it looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from dyncim_core import _checks
from dyncim_core.gates import disagreement, gate_logits, reliability_gates
from dyncim_core.modality import augmentation_rates
from dyncim_core.state import CurriculumState

__all__ = ["FusionOutput", "GatedFusion"]

_QUALITY_FLOOR = 0.1  # a modality that has learnt nothing yet still gets a say


class FusionOutput(NamedTuple):
    """Result of ``GatedFusion``.

    Attributes:
        fused: ``[B, sum D]`` or ``[B, T, sum D]``, in the features' dtype.
        gates: ``[B, M]``, float32, >= 0, sums to 1; 0 for absent modalities.
        logits: ``[B, C]``, float32, mean of the unimodal logits, weighted by the gates,
            to add to the logits of a head over ``fused``; ``None`` without unimodal
            logits.
    """

    fused: Tensor
    gates: Tensor
    logits: Tensor | None


class GatedFusion(nn.Module):
    """Concatenates the features of the modalities, each scaled by how reliable it looks.

    The gate of a modality falls with the entropy of its own prediction and with its
    disagreement with the others, so that it works without labels. Features are scaled
    by their gate over the largest gate of the sample, so that equal gates give plain
    concatenation. In training, some modalities of some samples are swapped with
    another sample's or dropped, to teach gate and head what an unreliable one looks
    like: at most one modality of a sample, and the more quality it has, the less often.
    The paper (arXiv 2503.06456) names
    a gating-based dynamic fusion; this one is a definition chosen here.

    It has ``M + 2`` parameters. Predictions enter the gate detached: the encoders are
    not trained to look reliable.

    Args:
        features: Width of each modality's features, by name or by position.
        state: The ``CurriculumState`` whose qualities set the prior of each gate and
            the rates of swap and dropout; the last ones seen in training are kept in
            ``quality`` for inference. All alike when ``None``.
        threshold: Share under which a gate is cut as redundant, in [0, 1 / M).
        swap: Share of the samples of a training batch, in [0, 1], that take one modality,
            picked at random, from another sample; less as far as the picked one has
            more quality than the weakest. Worth 0.1 where inputs do get mixed up, at
            some cost on clean ones.
        dropout: Share that misses one modality, likewise; ``swap + dropout <= 1``.

    Attributes:
        out_features: Width of ``fused``.
        modalities: Names of the modalities.
        quality: Buffer ``[M]`` in [0, 1].

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A value is out of range, or the state was made for other modalities.

    Example:
        >>> fusion = GatedFusion({"audio": 3, "image": 2}).eval()
        >>> features = {"audio": torch.ones(4, 3), "image": torch.ones(4, 2)}
        >>> fusion(features).fused.shape
        torch.Size([4, 5])
        >>> sure, unsure = torch.tensor([[9.0, 0.0]] * 4), torch.zeros(4, 2)
        >>> gates = fusion(features, unimodal={"audio": sure, "image": unsure}).gates
        >>> [round(gate, 2) for gate in gates[0].tolist()]
        [0.73, 0.27]
    """

    quality: Tensor

    def __init__(
        self,
        features: Mapping[str, int] | Sequence[int],
        *,
        state: CurriculumState | None = None,
        threshold: float = 0.05,
        swap: float = 0.0,
        dropout: float = 0.05,
    ) -> None:
        super().__init__()
        widths = _checks.as_list("features", features, None)
        self.modalities = _checks.modality_names(
            list(features) if isinstance(features, Mapping) else len(widths)
        )
        for name, width in zip(self.modalities, widths, strict=True):
            _checks.check_count(f"width of {name}", width)
        self.widths = tuple(widths)
        self.out_features = sum(widths)
        _checks.check_range("threshold", threshold, 0.0, 1.0 / len(widths), high_excluded=True)
        _checks.check_range("swap", swap, 0.0, 1.0)
        _checks.check_range("dropout", dropout, 0.0, 1.0)
        _checks.check_range("swap + dropout", swap + dropout, 0.0, 1.0)
        self.threshold = threshold
        self.swap = swap
        self.dropout = dropout
        if state is not None:
            state.settle_modalities(self.modalities)
        # In a tuple, so that the loss's state is not saved and moved a second time.
        self._state = (state,)
        self.bias = nn.Parameter(torch.zeros(len(widths)))
        self.entropy_slope = nn.Parameter(torch.tensor(1.0))
        self.disagreement_slope = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("quality", torch.zeros(len(widths)))

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
            unimodal: Each modality's own logits, ``[B, C]``. Without them the gates do
                not depend on the sample, but for ``present``.
            present: Bool ``[B, M]``; all when ``None``. Absent features may hold
                anything.

        Returns:
            ``FusionOutput``: fused features, gates and gated logits.

        Raises:
            TypeError: An argument is not a tensor of the dtype described.
            ValueError: Modalities, shapes or devices do not fit.
        """
        streams = _checks.as_list("features", features, self.modalities)
        _checks.check_features(streams, self.widths, self.modalities)
        batch, device = streams[0].shape[0], streams[0].device
        logits = None
        if unimodal is not None:
            logits = _checks.as_list("unimodal", unimodal, self.modalities)
            _checks.check_unimodal(logits, self.modalities, batch, device)
        _checks.check_present(present, (batch, len(streams)), device)
        available = None if present is None else present.t()

        if self.training:
            self._recall_quality()
            if self.swap or self.dropout:
                source, available = self._disturb(available, batch)
                streams = [x[rows] for x, rows in zip(streams, source, strict=True)]
                if logits is not None:
                    logits = [x[rows] for x, rows in zip(logits, source, strict=True)]
        gates = self._gates(logits, available, batch)
        # The most reliable modality passes whole: equal gates give plain concatenation.
        largest = gates.amax(dim=0)
        scale = gates / torch.where(largest > 0, largest, 1.0)
        scaled = []
        for m, stream in enumerate(streams):
            per_row = (batch,) + (1,) * (stream.dim() - 1)
            if available is not None:
                stream = torch.where(available[m].view(per_row), stream, 0.0)
            scaled.append(stream * scale[m].to(stream.dtype).view(per_row))
        consensus = None
        if logits is not None:
            parts = torch.stack(logits).float()
            if available is not None:
                parts = torch.where(available.unsqueeze(-1), parts, 0.0)
            consensus = (gates.unsqueeze(-1) * parts).sum(dim=0)
        return FusionOutput(torch.cat(scaled, dim=-1), gates.t(), consensus)

    def _gates(
        self, logits: Sequence[Tensor] | None, available: Tensor | None, batch: int
    ) -> Tensor:
        shape = (len(self.widths), batch)
        quality = self.quality.float()
        if logits is None:
            uncertainty = conflict = torch.zeros(shape, device=self.bias.device)
            num_classes = 1
        else:
            probs = torch.stack([x.detach().float() for x in logits]).softmax(dim=-1)
            if available is not None:
                probs = torch.where(available.unsqueeze(-1), probs, 0.0)
            uncertainty = torch.special.entr(probs).sum(dim=-1)
            conflict = disagreement(probs, quality, available)
            num_classes = probs.shape[-1]
        reliability = gate_logits(
            uncertainty,
            conflict,
            num_classes,
            bias=self.bias.float(),
            entropy_slope=self.entropy_slope.float(),
            disagreement_slope=self.disagreement_slope.float(),
            prior=quality.clamp_min(_QUALITY_FLOOR).log(),
        )
        return reliability_gates(reliability, available, self.threshold)

    @torch.no_grad()
    def _disturb(self, available: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
        """Row that each modality of each sample is taken from, and what remains present.

        At most one modality of a sample is disturbed, and never its only one.
        """
        modalities, device = len(self.widths), self.quality.device
        if available is None:
            available = torch.ones((modalities, batch), dtype=torch.bool, device=device)
        rates = augmentation_rates(self.quality.float()).unsqueeze(1)
        pick, event, step = torch.rand((3, batch), device=device)

        position = torch.arange(modalities, device=device).unsqueeze(1)
        chosen = (position == (pick * modalities).long()) & (available.sum(dim=0) > 1)
        own = torch.arange(batch, device=device)
        other = (own + 1 + (step * (batch - 1)).long()) % max(batch, 1)
        swapped = chosen & (event < self.swap * rates) & available & available[:, other]
        dropped = chosen & (event >= 1.0 - self.dropout * rates)
        return torch.where(swapped, other, own), available & ~dropped

    @torch.no_grad()
    def _recall_quality(self) -> None:
        (state,) = self._state
        if state is not None:
            _checks.check_device("state", state.quality, self.quality.device)
            self.quality.copy_(state.quality[1:])

    @override
    def extra_repr(self) -> str:
        sizes = ", ".join(
            f"{name}: {width}" for name, width in zip(self.modalities, self.widths, strict=True)
        )
        return f"{{{sizes}}}, threshold={self.threshold}, swap={self.swap}, dropout={self.dropout}"
