"""What the features of each modality look like in training: buffers and what is asked of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from dyncim_core._buffers import KeepsDtype
from dyncim_core.gates import novelty
from dyncim_core.kernels import select
from dyncim_core.kernels.interface import Moments

__all__ = ["FeatureMoments"]

# Of wider features every so many are watched: noise shows in a few dozen as in all.
_WIDTH = 32
# A covariance of K features takes so many samples for each of them.
_SAMPLES_PER_FEATURE = 8
# Variance over mean square that float32 can tell from none.
_SMALLEST_VARIANCE = 1e-10
_MOST_NOVEL = 1e30


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
        self.watched = tuple(-(-w // s) for w, s in zip(widths, self.strides, strict=True))
        shape = (len(widths), max(self.watched))
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
            streams, steps = self._pooled(features)
            kernels = select(backend, streams)
            kernels.observe(streams, steps, available, self._moments(), self.window)

    @torch.no_grad()
    def novelty(self, features: Sequence[Tensor]) -> Tensor:
        """How far features lie from those seen in training, see ``gates.novelty``.

        Args:
            features: Of each modality, ``[B, D]`` or ``[B, T, D]``.

        Returns:
            ``[M, B]``, >= 0, finite; 1 for a modality of which too little was seen, or that
            never varied.
        """
        means, covariances = self._moments().mean(), self._moments().covariance()
        streams, steps = self._pooled(features)
        watched = [x[:, ::step] for x, step in zip(streams, steps, strict=True)]
        together = 1
        if len(set(self.watched)) == 1:  # as one, in a fraction of the operators
            together = len(watched)
        rows = []
        for m in range(0, len(watched), together):
            at, k = slice(m, m + together), self.watched[m]
            mean, covariance = means[at, :k], covariances[at, :k, :k]
            variance = covariance.diagonal(dim1=1, dim2=2).mean(dim=1)
            enough = self.mass[at] * self.window > _SAMPLES_PER_FEATURE * k
            smallest = _SMALLEST_VARIANCE * mean.square().mean(dim=1)
            known = enough & (variance > smallest + torch.finfo(torch.float32).tiny)
            found = novelty(torch.stack(watched[at]), mean, covariance)
            found = found.nan_to_num(_MOST_NOVEL).clamp_max(_MOST_NOVEL)
            rows.append(torch.where(known.unsqueeze(1), found, 1.0))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _moments(self) -> Moments:
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
