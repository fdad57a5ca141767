"""What several test modules feed to the building blocks, and the backends that can run here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dyncim_core import backends

CLASSES = 5
BACKENDS = [name for name in ("eager", "native") if backends()[name] == "available"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
needs_native = pytest.mark.skipif(backends()["native"] != "available", reason=backends()["native"])


class Foreign(Tensor):
    """Tensors that may have no address."""


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(
    size: int = 12, modalities: int = 2, seed: int = 0
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Fused logits, those of each modality, and a target."""
    fused, *others = (2 * randn(1 + modalities, size, CLASSES, seed=seed)).unbind()
    target = torch.randint(CLASSES, (size,), generator=torch.Generator().manual_seed(seed))
    leaves = [x.clone().requires_grad_() for x in (fused, *others)]
    return leaves[0], leaves[1:], target
