"""What the public calls accept. Nothing here reads a value from a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "as_list",
    "check_choice",
    "check_class_weight",
    "check_count",
    "check_criterion",
    "check_device",
    "check_features",
    "check_first_pass",
    "check_heads",
    "check_index",
    "check_instance",
    "check_no_transform",
    "check_present",
    "check_range",
    "check_savable",
    "check_unimodal",
    "modality_names",
]


def check_criterion(target: Tensor, ignore_index: int, label_smoothing: float) -> None:
    """What cross-entropy takes; class probabilities leave no class to ignore."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a value in [0, 1], got {label_smoothing}")
    if target.is_floating_point() and ignore_index >= 0:
        raise ValueError(
            "target: expected class indices, since the criterion has "
            f"ignore_index={ignore_index}, got class probabilities"
        )


def check_range(
    name: str, value: float, low: float, high: float, *, high_excluded: bool = False
) -> None:
    """A real number in [low, high], or in [low, high) with ``high_excluded``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected an int or a float, got {type(value).__name__}")
    if not (low <= value < high if high_excluded else low <= value <= high):
        bracket = ")" if high_excluded else "]"
        raise ValueError(f"{name}: expected a value in [{low:g}, {high:g}{bracket}, got {value!r}")


def check_count(name: str, value: object) -> None:
    """A whole number >= 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def check_instance(name: str, value: object, kind: type) -> None:
    """An instance of ``kind``."""
    if not isinstance(value, kind):
        owner = isinstance(getattr(value, name, None), kind)
        hint = f"; pass its .{name}" if owner else ""
        raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}{hint}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """One of the given words."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {list(choices)}, got {value!r}")


def modality_names(
    modalities: int | Sequence[str], argument: str = "modalities"
) -> tuple[str, ...]:
    """Names, made up from positions where only a number is given."""
    if isinstance(modalities, (int, Integral)):
        check_count(argument, modalities)
        return tuple(str(m) for m in range(int(modalities)))
    ordered = isinstance(modalities, Sequence) and not isinstance(modalities, str)
    if not ordered or not all(isinstance(name, str) for name in modalities):
        raise TypeError(f"{argument}: expected a number or a sequence of names, got {modalities!r}")
    names = tuple(modalities)
    if not names:
        raise ValueError(f"{argument}: expected at least 1, got none")
    if "fused" in names:
        raise ValueError(
            f"{argument}: expected names other than that of the fused head, got 'fused'"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"{argument}: expected distinct names, got {list(names)}")
    return names


def check_features(features: Sequence[Tensor], widths: Sequence[int], names: Sequence[str]) -> None:
    """Features ``[B, D_m]`` or ``[B, T, D_m]``, alike but for the last size."""
    for feature, width, modality in zip(features, widths, names, strict=True):
        name = f"features of {_spoken(modality)}"
        _check_tensor(name, feature, "floating-point", torch.is_floating_point)
        if feature.dim() not in (2, 3):
            raise ValueError(f"{name}: expected shape [B, D] or [B, T, D], got {_shape(feature)}")
        _check_shape(name, feature, (*features[0].shape[:-1], width))
        check_device(name, feature, features[0].device, of=f"features of {_spoken(names[0])}")


def check_unimodal(
    logits: Sequence[Tensor], names: Sequence[str], batch: int, device: torch.device
) -> None:
    """One ``[B, C]`` tensor of logits per modality, alike in shape."""
    if _all_alike(logits) and logits[0].shape[0] == batch and logits[0].device == device:
        return  # this runs at every step: look for the culprit only then
    for head, modality in zip(logits, names, strict=True):
        name = f"unimodal logits of {_spoken(modality)}"
        _check_tensor(name, head, "floating-point", torch.is_floating_point)
        if head.dim() != 2 or head.shape[1] == 0:
            raise ValueError(f"{name}: expected shape [B, C] with C >= 1, got {_shape(head)}")
        _check_shape(name, head, (batch, logits[0].shape[1]))
        check_device(name, head, device, of="features")


def check_heads(
    heads: Sequence[Tensor], target: Tensor, modalities: Iterable[object] | None = None
) -> None:
    """Logits of every head ``[B, C]``, alike in shape and device; a target that fits them."""
    if not isinstance(heads, (list, tuple)):
        raise TypeError(
            f"logits: expected a list with one entry per head, got {type(heads).__name__}"
        )
    if not heads:
        raise ValueError("logits: expected at least one head, got none")
    if not _all_alike(heads):  # this runs at every step: look for the culprit only then
        for head, name in zip(heads, _head_names(heads, modalities), strict=True):
            _check_tensor(name, head, "floating-point", torch.is_floating_point)
            if head.dim() != 2 or head.shape[1] == 0:
                raise ValueError(f"{name}: expected shape [B, C] with C >= 1, got {_shape(head)}")
            if head.shape != heads[0].shape:
                raise ValueError(
                    f"{name}: expected the shape of the fused logits, {_shape(heads[0])}, "
                    f"got {_shape(head)}"
                )
            check_device(name, head, heads[0].device)
    _check_target(target, heads[0])


def check_first_pass(name: str) -> None:
    """No call from within a backward, where the state has moved on since the forward."""
    # What torch.utils.checkpoint asks itself; -1 outside of a backward.
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{name}: expected one call for each backward, got another from within it, as "
            "torch.utils.checkpoint does; leave it outside of what is checkpointed"
        )


def check_no_transform(heads: Sequence[Tensor]) -> None:
    """No logits with a forward-mode gradient, and no transform of ``torch.func`` around."""
    if torch.compiler.is_compiling():
        return
    if forward_ad._current_level >= 0:
        tangents = (forward_ad.unpack_dual(head).tangent for head in heads)  # type: ignore[no-untyped-call]
        if any(tangent is not None for tangent in tangents):
            raise RuntimeError(
                "logits: expected none with a forward-mode gradient, got a tangent; the loss has a "
                "backward alone"
            )
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "DynCIMLoss: expected no transform of torch.func in training, where it moves its "
            "state, got one; use autograd, or eval()"
        )


def check_savable(
    heads: Sequence[Tensor],
    target: Tensor,
    weight: Tensor | None,
    modalities: Iterable[object] | None,
) -> None:
    """Tensors that autograd can save for the backward."""
    tensors = (target, *heads) if weight is None else (target, *heads, weight)
    if torch.compiler.is_compiling() or True not in map(Tensor.is_inference, tensors):
        return
    names = ["target", *_head_names(heads, modalities), "weight"]
    for tensor, name in zip(tensors, names, strict=False):
        if tensor.is_inference():
            raise RuntimeError(
                f"{name}: expected a tensor that autograd can save, got one made in inference "
                "mode; pass its clone()"
            )


def check_class_weight(weight: Tensor | None, logits: Tensor) -> None:
    """Class weights ``[C]`` on the logits' device."""
    if weight is None:
        return
    _check_tensor("weight", weight, "floating-point", torch.is_floating_point)
    if weight.requires_grad:
        raise ValueError("weight: expected no requires_grad, got requires_grad=True")
    _check_shape("weight", weight, (logits.shape[1],))
    check_device("weight", weight, logits.device)


def check_present(present: Tensor | None, shape: tuple[int, int], device: torch.device) -> None:
    """A bool mask of the given shape."""
    if present is None:
        return
    _check_tensor("present", present, "bool", lambda x: x.dtype == torch.bool)
    _check_shape("present", present, shape)
    check_device("present", present, device)


def check_index(index: Tensor, num_samples: int | None, logits: Tensor) -> None:
    """Sample indices ``[B]`` for a memory that exists."""
    if num_samples is None:
        raise ValueError(
            "index: expected None without a per-sample memory, got a tensor; "
            "construct with num_samples= to keep one"
        )
    _check_tensor("index", index, "int64", lambda x: x.dtype == torch.int64)
    _check_shape("index", index, (logits.shape[0],))
    check_device("index", index, logits.device)


def as_list(
    name: str, values: Mapping[str, Any] | Sequence[Any], names: Sequence[str] | None
) -> list[Any]:
    """Values by name or by position, in the order of ``names``."""
    if not isinstance(values, (list, tuple)):  # asking for an abstract class takes longer
        if isinstance(values, Mapping):
            if names is not None and set(values) != set(names):
                raise ValueError(
                    f"{name}: expected the modalities {list(names)}, got {list(values)}"
                )
            return list(values.values()) if names is None else [values[key] for key in names]
        if not isinstance(values, Sequence):
            raise TypeError(
                f"{name}: expected a mapping or a sequence with one entry per modality, "
                f"got {type(values).__name__}"
            )
    if names is not None and len(values) != len(names):
        raise ValueError(
            f"{name}: expected {len(names)} modalities {list(names)}, got {len(values)}"
        )
    return list(values)


def _all_alike(heads: Sequence[Tensor]) -> bool:
    """Whether all are floating-point ``[B, C]`` tensors of one shape and device."""
    first = heads[0]
    if not (isinstance(first, Tensor) and first.is_floating_point()):
        return False
    shape, device = first.shape, first.device
    for head in heads[1:]:
        if not (
            isinstance(head, Tensor)
            and head.is_floating_point()
            and head.shape == shape
            and head.device == device
        ):
            return False
    return len(shape) == 2 and shape[1] > 0


def _head_names(heads: Sequence[Tensor], modalities: Iterable[object] | None) -> list[str]:
    """What messages call them; of the modalities, by position when ``None``."""
    if modalities is None:
        modalities = range(len(heads) - 1)
    return ["logits", *(f"unimodal logits of {_spoken(name)}" for name in modalities)]


def _spoken(name: object) -> str:
    """A modality's name, which may not be one yet; one made up from its position says so."""
    return f"modality {name}" if str(name).isdecimal() else str(name)


def _check_target(target: Tensor, logits: Tensor) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a tensor, got {type(target).__name__}")
    swapped = logits.shape[:1] if target.is_floating_point() else logits.shape
    if target.shape == swapped:  # right but for the dtype
        raise TypeError(
            "target: expected class indices [B], int64, or class probabilities [B, C], "
            f"floating-point, got {target.dtype} of shape {_shape(target)}"
        )
    if target.is_floating_point():
        _check_shape("target of class probabilities", target, tuple(logits.shape))
        if target.requires_grad:
            raise ValueError(
                "target: expected no requires_grad, since the curriculum gives the target "
                "no gradient; got requires_grad=True, so pass target.detach()"
            )
    elif target.dtype == torch.int64:
        if target.shape != logits.shape[:1]:
            _check_shape("target of class indices", target, (logits.shape[0],))
    else:
        raise TypeError(
            "target: expected int64 class indices or floating-point class probabilities, "
            f"got {target.dtype}"
        )
    check_device("target", target, logits.device)


def _check_tensor(name: str, value: Any, kind: str, is_kind: Callable[[Tensor], bool]) -> None:
    article = "an" if kind[0] in "aeiou" else "a"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected {article} {kind} tensor, got {type(value).__name__}")
    if not is_kind(value):
        raise TypeError(f"{name}: expected {article} {kind} tensor, got {value.dtype}")


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {_shape(value)}")


def check_device(name: str, value: Tensor, device: torch.device, of: str = "logits") -> None:
    """On the device of the ``of``."""
    if value.device != device:
        raise ValueError(f"{name}: expected device {device} of the {of}, got {value.device}")


def _shape(value: Tensor) -> list[int]:
    return list(value.shape)
