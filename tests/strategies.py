"""What the properties are tried on: small arrays, hard cases included.

Everything is NumPy float64; ``to_torch`` gives the tensor of a test's dtype, and
``upcast`` the float64 values that this tensor holds, for the reference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

IGNORE_INDEX = -100
HUGE = 1e4

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

batch_sizes = st.integers(1, 5)
class_counts = st.integers(1, 6)
modality_counts = st.integers(0, 8)


def reals(low: float, high: float) -> st.SearchStrategy[float]:
    """Floats in [low, high] that are exact in float32."""
    return st.floats(low, high, width=32, allow_subnormal=False)


def arrays(shape: int | tuple[int, ...], elements: Any) -> st.SearchStrategy[Array]:
    return hnp.arrays(np.float64, shape, elements=elements)


def logits(batch: int, classes: int) -> st.SearchStrategy[Array]:
    """``[B, C]``: of ordinary size, with ties, huge, or all equal."""
    shape = (batch, classes)
    return st.one_of(
        arrays(shape, reals(-8, 8)),
        arrays(shape, st.integers(-2, 2).map(float)),
        arrays(shape, st.sampled_from([-HUGE, -1.0, 0.0, 1.0, HUGE])),
        reals(-HUGE, HUGE).map(lambda value: np.full(shape, value)),
    )


def index_targets(batch: int, classes: int) -> st.SearchStrategy[NDArray[np.int64]]:
    """``[B]`` class indices, some of them ignored."""
    labels = st.integers(0, classes - 1) | st.just(IGNORE_INDEX)
    return hnp.arrays(np.int64, batch, elements=labels)


def soft_targets(batch: int, classes: int) -> st.SearchStrategy[Array]:
    """``[B, C]`` probabilities, with zeros and one-hot rows among them."""
    return arrays((batch, classes), st.integers(0, 4).map(float)).map(_as_shares)


def probabilities(*shape: int) -> st.SearchStrategy[Array]:
    """``[..., C]`` probabilities, with zeros and one-hot rows among them."""
    return st.one_of(arrays(shape, st.integers(0, 2).map(float)), arrays(shape, reals(0, 1))).map(
        _as_shares
    )


def presence(rows: int, batch: int) -> st.SearchStrategy[Mask | None]:
    """Bool ``[rows, B]`` or None; one sample may have nothing at all."""

    @st.composite
    def mask(draw: st.DrawFn) -> Mask:
        present = draw(hnp.arrays(np.bool_, (rows, batch)))
        if draw(st.booleans()):
            present[:, draw(st.integers(0, batch - 1))] = False
        return present

    return st.none() | mask()


def head_presence(heads: int, batch: int) -> st.SearchStrategy[Mask | None]:
    """``presence`` of every head, ``[H, B]``: the fused one is always there."""

    def with_fused(present: Mask | None) -> Mask | None:
        return None if present is None else np.vstack([np.ones((1, batch), np.bool_), present])

    return presence(heads - 1, batch).map(with_fused)


class Heads(NamedTuple):
    """Logits of every head ``[B, C]``, a target that fits them, and a mask ``[H, B]``."""

    logits: list[Array]
    target: NDArray[Any]
    present: Mask | None


@st.composite
def heads(draw: st.DrawFn) -> Heads:
    batch, classes = draw(batch_sizes), draw(class_counts)
    count = 1 + draw(modality_counts)
    target = draw(index_targets(batch, classes) | soft_targets(batch, classes))
    rows = [draw(logits(batch, classes)) for _ in range(count)]
    return Heads(rows, target, draw(head_presence(count, batch)))


class Statistics(NamedTuple):
    """Per-head statistics ``[H, B]``; absent entries hold NaN."""

    nll: Array
    entropy: Array
    distance: Array
    present: Mask | None
    num_classes: int


@st.composite
def statistics(draw: st.DrawFn) -> Statistics:
    batch, classes = draw(batch_sizes), draw(class_counts)
    shape = (1 + draw(modality_counts), batch)
    nll = draw(arrays(shape, reals(0, 8)) | arrays(shape, st.sampled_from([0.0, 1.0, 2 * HUGE])))
    entropy = draw(arrays(shape, reals(0, 1))) * np.log(classes)
    distance = draw(arrays(shape, reals(0, 1)))
    distance[0] = 0.0
    present = draw(head_presence(*shape))
    return Statistics(*(with_nan(x, present) for x in (nll, entropy, distance)), present, classes)


def with_nan(values: Array, present: Mask | None) -> Array:
    """The values with NaN where absent; ``present`` may lack the last axes of ``values``."""
    if present is None:
        return values
    missing_axes = (1,) * (values.ndim - present.ndim)
    return np.where(present.reshape(present.shape + missing_axes), values, np.nan)


@st.composite
def log_quality(
    draw: st.DrawFn, *, modalities: st.SearchStrategy[int] | None = None, extreme: bool = False
) -> Array:
    """``[M + 1]``, ``[B, M + 1]`` or ``[A, B, M + 1]``, fused head first, M >= 1 as drawn."""
    count = draw(st.integers(1, 8) if modalities is None else modalities)
    leading = draw(st.sampled_from([(), (3,), (2, 3)]))
    elements = st.sampled_from([-HUGE, -90.0, 0.0, 90.0, HUGE]) if extreme else reals(-4, 0)
    return draw(arrays((*leading, count + 1), elements))


@st.composite
def gate_inputs(draw: st.DrawFn) -> tuple[Array, Mask | None]:
    """Logits ``[M, B]``, with ties and huge ones, NaN where absent; and the mask."""
    values = draw(st.integers(1, 8).flatmap(lambda m: batch_sizes.flatmap(lambda b: logits(m, b))))
    present = draw(presence(*values.shape))
    return with_nan(values, present), present


def to_torch(values: ArrayLike | None, dtype: torch.dtype = torch.float64) -> Tensor | None:
    """A tensor: numbers in the given dtype, masks and indices as they are; None stays None."""
    if values is None:
        return None
    tensor = torch.tensor(np.asarray(values))
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def upcast(tensor: Tensor | None) -> NDArray[Any] | None:
    """The values a tensor holds, floating ones in float64; None stays None."""
    if tensor is None:
        return None
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


def _as_shares(values: Array) -> Array:
    total = values.sum(axis=-1, keepdims=True)
    uniform = np.full_like(values, 1.0 / values.shape[-1])
    return np.where(total > 0, values / np.where(total > 0, total, 1.0), uniform)
