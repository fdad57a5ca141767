"""What the features of each modality look like in training: buffers and what is asked of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from dyncim_core._buffers import KeepsDtype
from dyncim_core.kernels import select
from dyncim_core.kernels.interface import Moments

__all__ = ["FeatureMoments"]

# Of wider features every so many are watched: noise shows in a few dozen as in all.
_WIDTH = 32


class FeatureMoments(KeepsDtype):
    """Running mean and covariance of each modality's features.

    Samples without a modality, or with features that are not finite, do not count for it.

    Args:
        widths: Of the features of each modality.
        window: Samples that the running averages are over.

    Attributes:
        mass: Buffer ``[M]``, see ``Moments``.
        total: Buffer ``[M, K]``.
        scatter: Buffer ``[M, K, K]``.
    """

    mass: Tensor
    total: Tensor
    scatter: Tensor

    def __init__(self, widths: Sequence[int], window: float = 6400.0) -> None:
        super().__init__()
        self.window = window
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
        if len(features[0]) > 0:
            streams, steps = self._pooled(features)
            moments = self._moments()
            kernels = select(backend, streams, others=(available, *moments))
            kernels.observe(streams, steps, available, moments, self.window)

    @torch.no_grad()
    def novelty(self, features: Sequence[Tensor], backend: str | None = None) -> Tensor:
        """How far features lie from those seen in training, see ``gates.novelty``.

        Args:
            features: Of each modality, ``[B, D]`` or ``[B, T, D]``.
            backend: See ``backends``.

        Returns:
            ``[M, B]``, >= 0, finite; 1 for a modality of which too little was seen, or that
            never varied.
        """
        streams, steps = self._pooled(features)
        moments = self._moments()
        kernels = select(backend, streams, others=moments)
        return kernels.novelty(streams, steps, moments, self.window)

    def _moments(self) -> Moments:
        self.keep_dtype()
        return Moments(self.mass, self.total, self.scatter)

    def _pooled(self, features: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[int]]:
        """Of each modality ``[B, D]``, and which of its columns are watched."""
        if features[0].dim() == 2:
            return [x.float() for x in features], self.strides
        means = [x[..., ::s].float().mean(1) for x, s in zip(features, self.strides, strict=True)]
        return means, (1,) * len(means)

    @override
    def extra_repr(self) -> str:
        return f"width={self.total.shape[1]}, window={self.window:g}"
