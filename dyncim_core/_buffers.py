"""Buffers that average over many steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

__all__ = ["KeepsDtype"]


class KeepsDtype(nn.Module):
    """A module whose buffers follow the model's device, but not its dtype.

    Averages in half precision would stall, and kernels take their addresses.
    """

    _at_first_1: tuple[str, ...] = ()  # names of those that do not start at 0

    def reset_parameters(self) -> None:
        """Forget everything: what ``to_empty`` takes after a start on the meta device."""
        for module in self.modules():
            if isinstance(module, KeepsDtype):
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        buffer.fill_(name in module._at_first_1)

    def keep_dtype(self) -> None:
        """Undo a cast that was not asked of the module, as of FSDP's ``MixedPrecision``.

        It casts all buffers or none; one alone is a mistake, which kernels refuse.
        """
        if next(iter(self._buffers.values())).dtype is torch.float32:  # type: ignore[union-attr]
            return
        kept = {k: x for k, x in self._buffers.items() if x is not None and x.is_floating_point()}
        if all(x.dtype is not torch.float32 for x in kept.values()):
            self._buffers.update({name: x.float() for name, x in kept.items()})

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self

    @override
    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        dtypes = {name: buffer.dtype for name, buffer in self.named_buffers(recurse=False)}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name, dtype in dtypes.items():  # with assign=True, it brings its own
            self._buffers[name] = self.get_buffer(name).to(dtype).contiguous()
