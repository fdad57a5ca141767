"""What the features of each modality look like in training: buffers and their update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from dyncim_core._buffers import Float32Buffers
from dyncim_core.gates import novelty

__all__ = ["FeatureMoments"]

# Of wider features every so many are watched: noise shows in a few dozen as in all.
_WIDTH = 32
# Squares of anything smaller are finite, and so are their averages.
_LARGEST_NORM = 1e18


class FeatureMoments(Float32Buffers):
    """Running mean and covariance of each modality's features.

    Samples without a modality, or with features that are not finite, do not count for it.
    All averages start at 0, ``mass`` with them, by which they are then divided.

    Args:
        widths: Of the features of each modality.
        decay: Of the running averages over steps.

    Attributes:
        mass: ``[M]`` in [0, 1], average share of a batch's samples that counted.
        total: ``[M, K]``, average of the features.
        scatter: ``[M, K, K]``, average outer product of the deviation from the mean so far.
    """

    mass: Tensor
    total: Tensor
    scatter: Tensor

    def __init__(self, widths: Sequence[int], decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.strides = tuple(-(-width // _WIDTH) for width in widths)
        self.width = max(-(-w // s) for w, s in zip(widths, self.strides, strict=True))
        shape = (len(widths), self.width)
        self.register_buffer("mass", torch.zeros(shape[0], dtype=torch.float32))
        self.register_buffer("total", torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("scatter", torch.zeros((*shape, self.width), dtype=torch.float32))

    @torch.no_grad()
    def observe(self, features: Sequence[Tensor], available: Tensor | None) -> None:
        """Take a batch into the averages.

        Args:
            features: Of each modality, ``[B, D]`` or ``[B, T, D]``.
            available: Bool ``[M, B]``; all when ``None``.
        """
        x = self._sketch(features)
        if not x.shape[1]:
            return
        counts = torch.linalg.vector_norm(x, dim=-1) < _LARGEST_NORM
        if available is not None:
            counts &= available
        rate = 1.0 - self.decay
        x = torch.where(counts.unsqueeze(-1), x, 0.0)
        counts = counts.float()
        self.mass.lerp_(counts.mean(dim=1), rate)
        self.total.lerp_(x.mean(dim=1), rate)
        x = torch.addcmul(x, counts.unsqueeze(-1), self._mean().unsqueeze(1), value=-1.0)
        self.scatter.baddbmm_(x.mT, x, beta=self.decay, alpha=rate / x.shape[1])

    @torch.no_grad()
    def novelty(self, features: Sequence[Tensor]) -> Tensor:
        """How far features lie from those seen in training, see ``gates.novelty``.

        Args:
            features: Of each modality, ``[B, D]`` or ``[B, T, D]``.

        Returns:
            ``[M, B]``, >= 0; 1 for a modality that was never seen.
        """
        covariance = self.scatter / self._positive_mass().unsqueeze(-1)
        found = novelty(self._sketch(features), self._mean(), covariance)
        return torch.where(self.mass.unsqueeze(1) > 0, found, 1.0)

    def _mean(self) -> Tensor:
        return self.total / self._positive_mass()

    def _positive_mass(self) -> Tensor:
        return self.mass.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)

    def _sketch(self, features: Sequence[Tensor]) -> Tensor:
        """What is watched of the features, filled up with zeros: ``[M, B, K]``."""
        sketches = []
        for x, stride in zip(features, self.strides, strict=True):
            if x.dim() == 3:
                x = x.mean(dim=1)
            if stride > 1:
                x = x[:, ::stride]
            x = x.float()
            lacking = self.width - x.shape[1]
            sketches.append(F.pad(x, (0, lacking)) if lacking else x)
        return torch.stack(sketches)

    @override
    def extra_repr(self) -> str:
        return f"width={self.width}, decay={self.decay}"
