"""Cost of a step next to what it replaces: ``pytest benchmarks``.

Wall-clock times on shared machines drift; compare the rows of one group of one run.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyncim_core import DynCIMLoss, GatedFusion

SIZES = [(64, 6, 2), (64, 101, 3), (256, 1000, 2)]
by_size = pytest.mark.parametrize(("batch", "classes", "modalities"), SIZES)
Benchmark = Callable[[Callable[[], object]], object]


def problem(batch: int, classes: int, modalities: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = [
        torch.randn(batch, classes, generator=generator).requires_grad_()
        for _ in range(1 + modalities)
    ]
    return heads, torch.randint(classes, (batch,), generator=generator)


@by_size
@pytest.mark.benchmark(group="loss, forward and backward")
def test_cross_entropies(benchmark: Benchmark, batch: int, classes: int, modalities: int) -> None:
    heads, target = problem(batch, classes, modalities)

    def step() -> tuple[Tensor, ...]:
        losses = torch.stack([F.cross_entropy(head, target) for head in heads])
        return torch.autograd.grad(losses.sum(), heads)

    benchmark(step)


@by_size
@pytest.mark.benchmark(group="loss, forward and backward")
def test_dyncim_loss(benchmark: Benchmark, batch: int, classes: int, modalities: int) -> None:
    heads, target = problem(batch, classes, modalities)
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=modalities)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(criterion(heads[0], target, unimodal=heads[1:]), heads)

    benchmark(step)
    assert criterion.state.step > 0


@by_size
@pytest.mark.benchmark(group="fusion, forward and backward")
@pytest.mark.parametrize("gated", [False, True], ids=["concatenation", "GatedFusion"])
def test_fusion(
    benchmark: Benchmark, gated: bool, batch: int, classes: int, modalities: int
) -> None:
    logits, _ = problem(batch, classes, modalities)
    features = [torch.randn(batch, 128, requires_grad=True) for _ in range(modalities)]
    fusion = GatedFusion([128] * modalities)
    head = nn.Linear(fusion.out_features, classes)

    def fuse() -> Tensor:
        if not gated:
            return torch.cat(features, dim=1)
        fused: Tensor = fusion(features, unimodal=logits[1:]).fused
        return fused

    def step() -> tuple[Tensor, ...]:
        fused = fuse()
        return torch.autograd.grad(head(fused).sum(), features)

    benchmark(step)
