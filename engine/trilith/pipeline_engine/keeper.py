"""What forwards of a user's layers leave behind, kept so that forwards can be undone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class StateKeeper:
    """Torch's random generators and the buffers of modules (running statistics, counters): a `stepping.base.Keeper`.

    What a layer keeps elsewhere, in attributes that are no buffers or with other generators, is not seen.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        self._modules, self._device = tuple(modules), device
        self._buffers: list[tuple[nn.Module, str, Tensor | None, Tensor | None]] = []
        self._generators: tuple[Tensor, Tensor | None] | None = None

    def save(self) -> None:
        """Remember everything as it is now."""
        self._buffers = [
            (owner, name, buffer, None if buffer is None else buffer.clone())
            for module in self._modules
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
        ]
        on_device = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        self._generators = (torch.get_rng_state(), on_device)

    def restore(self) -> None:
        """Make everything what it was at `save`; buffers are the same tensors again, with the same values."""
        assert self._generators is not None, "save comes first"
        on_cpu, on_device = self._generators
        torch.set_rng_state(on_cpu)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, self._device)
        with torch.no_grad():
            for owner, name, buffer, before in self._buffers:
                if buffer is not None and before is not None:
                    buffer.copy_(before)
                owner._buffers[name] = buffer
        self._buffers, self._generators = [], None
