"""Which kernels compute a call: plain PyTorch, Triton on a GPU, or C on a CPU.

The choice is made for each call from where its tensors are, unless ``backend=`` of a building
block, or ``DYNCIM_BACKEND`` in the environment when it is made, has made it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Sequence
from functools import cache
from types import ModuleType
from typing import cast

import torch
from torch import Tensor, nn

from dyncim_core.kernels import eager
from dyncim_core.kernels.interface import Kernels

__all__ = ["BACKENDS", "backends", "check_backend", "select"]

BACKENDS = ("eager", "native", "triton")
_VARIABLE = "DYNCIM_BACKEND"


def backends() -> dict[str, str]:
    """Which backends can run here, and why another can not.

    Returns:
        For each backend "available", or the reason why it is not. Of those that are, a
        call on a CPU takes "native" (C), one on a GPU "triton", and "eager" (plain
        PyTorch) takes what these two do not: float64, on a CPU half precision and more than
        nine heads, class probabilities, tensor subclasses, negated views, transforms of
        ``torch.func``, and everything that is traced: under ``torch.compile``, which fuses it
        itself, ``torch.export`` and ``torch.jit.trace``.

    Example:
        >>> backends()["eager"]
        'available'
    """
    return {name: _load(name)[1] for name in BACKENDS}


def check_backend(name: str | None) -> str | None:
    """The backend asked for by argument or environment, if any.

    Raises:
        ValueError: There is no backend of that name.
        RuntimeError: It is not available here.
    """
    if torch.compiler.is_compiling():
        return None  # eager, whatever is asked for
    source = "backend"
    if name is None:
        name, source = os.environ.get(_VARIABLE) or None, _VARIABLE
    if name is None:
        return None
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {list(BACKENDS)}, got {name!r}")
    module, reason = _load(name)
    if module is None:
        raise RuntimeError(f"{source}: {name!r} is not available: {reason}")
    return name


def select(
    asked: str | None,
    logits: Sequence[Tensor],
    target: Tensor | None = None,
    others: Iterable[Tensor | None] = (),
) -> Kernels:
    """The kernels for a call: those asked for, or the fastest that take its tensors.

    ``others`` is what else they read or write.

    Raises:
        RuntimeError: The backend asked for cannot take them.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing():  # which follow it
        return eager
    name = asked or _fastest(logits[0])
    module = _load(name)[0]
    if module is None or name == "eager":
        return eager
    reason = _unsuited(name, logits, target, others)
    if reason is None:
        return cast(Kernels, module)
    if asked is None:
        return eager
    raise RuntimeError(
        f"backend: {asked!r} does not take {reason}; leave backend=None and {_VARIABLE} unset"
    )


def _fastest(logits: Tensor) -> str:
    """The backend made for a tensor's device, whose type's name takes longer to ask for."""
    if logits.is_cpu:
        return "native"
    return "triton" if logits.is_cuda else "eager"


_DTYPES = {
    "native": {torch.float32},
    "triton": {torch.float32, torch.bfloat16, torch.float16},
}
_MAX_HEADS = 9
_PLAIN = frozenset((Tensor, nn.Parameter))


def _unsuited(
    name: str,
    logits: Sequence[Tensor],
    target: Tensor | None,
    others: Iterable[Tensor | None],
) -> str | None:
    """What keeps these tensors from a backend."""
    if torch._C._are_functorch_transforms_active():
        return "tensors under a function transform, which have no address"
    dtypes = _DTYPES[name]
    kinds = {*map(type, logits), type(target), *map(type, others)} - _PLAIN - {type(None)}
    if kinds:
        return f"a {min(kind.__name__ for kind in kinds)}"
    for head in logits:
        if head.dtype not in dtypes:
            return f"logits of {head.dtype}"
        if head.is_neg():
            return "a negated view, whose memory holds other values"
    if name != _fastest(logits[0]):
        return f"device {logits[0].device}"
    if target is not None and target.dtype != torch.int64:
        return "class probabilities"
    if len(logits) > _MAX_HEADS:
        return f"more than {_MAX_HEADS} heads"
    return None


@cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    if name == "triton" and not torch.cuda.is_available():
        return None, "there is no GPU that torch can use"
    try:
        module = importlib.import_module(f"dyncim_core.kernels.{name}")
        if name == "triton":
            _check_launch()
    except ImportError as error:
        return None, str(error)
    except Exception as error:  # whatever keeps Triton from a launch
        return None, f"Triton cannot launch here: {error}"
    return module, "available"


def _check_launch() -> None:
    """Ask for what Triton needs of a machine, which would show at the first step only."""
    devices = range(0 if torch.version.hip else torch.cuda.device_count())
    if any(torch.cuda.get_device_capability(device) < (7, 0) for device in devices):
        raise ImportError("a GPU is older than those that Triton compiles for")
    # It builds what launches kernels, with a C compiler and Python's headers.
    _ = importlib.import_module("triton.runtime").driver.active.utils
