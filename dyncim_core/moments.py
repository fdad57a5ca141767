"""What the features of each modality look like in training: buffers and what is asked of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from dyncim_core._buffers import Float32Buffers
from dyncim_core.gates import novelty
from dyncim_core.kernels import select
from dyncim_core.kernels.interface import Moments

__all__ = ["FeatureMoments"]

# Of wider features every so many are watched: noise shows in a few dozen as in all.
_WIDTH = 32


class FeatureMoments(Float32Buffers):
    """Running mean and covariance of each modality's features.

    Samples without a modality, or with features that are not finite, do not count for it.

    Args:
        widths: Of the features of each modality.
        decay: Of the running averages over steps.

    Attributes:
        mass: Buffer ``[M]``, see ``Moments``.
        total: Buffer ``[M, K]``.
        scatter: Buffer ``[M, K, K]``.
    """

    mass: Tensor
    total: Tensor
    scatter: Tensor

    def __init__(self, widths: Sequence[int], decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.strides = tuple(-(-width // _WIDTH) for width in widths)
        watched = [-(-w // s) for w, s in zip(widths, self.strides, strict=True)]
        shape = (len(widths), max(watched))
        self.register_buffer("mass", torch.zeros(shape[0], dtype=torch.float32))
        self.register_buffer("total", torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("scatter", torch.zeros((*shape, shape[1]), dtype=torch.float32))

    @torch.no_grad()
    def observe(
        self, features: Sequence[Tensor], available: Tensor | None, backend: str | None = None
    ) -> None:
        """Take a batch into the averages.

        Args:
            features: Of each modality, ``[B, D]`` or ``[B, T, D]``.
            available: Bool ``[M, B]``; all when ``None``.
            backend: See ``backends``.
        """
        if len(features[0]):
            watched = self._watched(features)
            select(backend, watched).observe(watched, available, self._moments(), self.decay)

    @torch.no_grad()
    def novelty(self, features: Sequence[Tensor]) -> Tensor:
        """How far features lie from those seen in training, see ``gates.novelty``.

        Args:
            features: Of each modality, ``[B, D]`` or ``[B, T, D]``.

        Returns:
            ``[M, B]``, >= 0; 1 for a modality that was never seen.
        """
        moments = self._moments()
        width = moments.total.shape[1]
        x = torch.stack([F.pad(x, (0, width - x.shape[1])) for x in self._watched(features)])
        found = novelty(x, moments.mean(), moments.covariance())
        return torch.where(self.mass.unsqueeze(1) > 0, found, 1.0)

    def _moments(self) -> Moments:
        return Moments(self.mass, self.total, self.scatter)

    def _watched(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Of each modality ``[B, k]``, at most K wide."""
        watched = []
        for x, stride in zip(features, self.strides, strict=True):
            over_time = x.mean(dim=1) if x.dim() == 3 else x
            watched.append(over_time[:, ::stride].float())
        return watched

    @override
    def extra_repr(self) -> str:
        return f"width={self.total.shape[1]}, decay={self.decay}"
