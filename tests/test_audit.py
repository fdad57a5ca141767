"""The audit: agreement with the reference, and what suspicion may depend on."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from strategies import Array, Mask, arrays, reals, to_torch
from torch import Tensor

from dyncim_core import input_suspicion, label_suspicion
from dyncim_core import reference as ref

SAMPLES = 5


@st.composite
def memories(draw: st.DrawFn, least_heads: int = 1) -> tuple[Array, Mask, Array]:
    heads = draw(st.integers(least_heads, 5))
    nll = draw(arrays((SAMPLES, heads), reals(0, 16)))
    visited = draw(arrays((SAMPLES, heads), st.sampled_from([0.0, 1.0]))).astype(bool)
    return nll, visited, draw(arrays(heads, reals(2**-5, 1)))


def tensors(case: tuple[Array, Mask, Array]) -> tuple[Tensor, Tensor, Tensor]:
    nll, visited, trust = case
    return to_torch(nll), torch.from_numpy(visited), to_torch(trust)


@given(memories())
def test_label_suspicion_agrees_with_the_reference(case: tuple[Array, Mask, Array]) -> None:
    found = label_suspicion(*tensors(case))
    assert_allclose(found, ref.label_suspicion(*case), rtol=1e-12, atol=1e-15)
    nll, visited, _ = case
    seen = visited.any(axis=1)
    assert (found[~seen] == -math.inf).all()
    low = np.where(visited, nll, np.inf).min(axis=1)
    high = np.where(visited, nll, -np.inf).max(axis=1)
    assert ((found.numpy() >= low - 1e-9) & (found.numpy() <= high + 1e-9))[seen].all()


@given(memories(least_heads=2), st.data())
def test_input_suspicion_agrees_with_the_reference(
    case: tuple[Array, Mask, Array], data: st.DataObject
) -> None:
    nll, visited, _ = case
    head = data.draw(st.integers(1, nll.shape[1] - 1))
    found = input_suspicion(to_torch(nll), torch.from_numpy(visited), head)
    assert_allclose(found, ref.input_suspicion(nll, visited, head), rtol=1e-12, atol=1e-15)
    others = np.delete(visited[:, 1:], head - 1, axis=1).any(axis=1)
    assert ((found == -math.inf).numpy() == ~(visited[:, head] & others)).all()


@given(memories(least_heads=2), st.data())
def test_what_was_not_seen_reaches_no_suspicion(
    case: tuple[Array, Mask, Array], data: st.DataObject
) -> None:
    nll, visited, trust = tensors(case)
    head = data.draw(st.integers(1, nll.shape[1] - 1))
    other = torch.where(visited, nll, 99.0)
    assert torch.equal(label_suspicion(nll, visited, trust), label_suspicion(other, visited, trust))
    assert torch.equal(input_suspicion(nll, visited, head), input_suspicion(other, visited, head))


@given(memories(least_heads=3), reals(0.125, 4), st.data())
def test_suspicion_rises_with_the_nll_of_whom_it_asks(
    case: tuple[Array, Mask, Array], more: float, data: st.DataObject
) -> None:
    nll, _, trust = tensors(case)
    seen = torch.ones(nll.shape, dtype=torch.bool)
    head = data.draw(st.integers(1, nll.shape[1] - 1))
    raised = nll.clone()
    raised[:, head] += more
    label, before = (label_suspicion(x, seen, trust) for x in (raised, nll))
    share = trust[head] ** 8 / (trust**8).sum()
    assert_allclose(label - before, (share * more).expand(SAMPLES), rtol=1e-9, atol=1e-12)
    assert (input_suspicion(raised, seen, head) > input_suspicion(nll, seen, head)).all()
    another = 1 + head % (nll.shape[1] - 1)
    found, before = (input_suspicion(x, seen, another) for x in (raised, nll))
    assert (found <= before).all()


def test_a_head_counts_by_the_eighth_power_of_its_trust() -> None:
    nll: NDArray[np.float64] = np.array([[1.0, 0.0], [0.0, 1.0]])
    found = label_suspicion(to_torch(nll), torch.ones(2, 2, dtype=torch.bool), to_torch([1.0, 0.5]))
    assert_allclose(found, [256 / 257, 1 / 257], rtol=1e-12)
