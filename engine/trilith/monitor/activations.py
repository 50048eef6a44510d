"""Bytes that autograd keeps alive between forward and backward, counted while a step runs."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor


class _Kept:
    """One saved tensor; its death is the release of one reference to its storage."""

    __slots__ = ("_meter", "_pointer", "tensor")

    def __init__(self, meter: ActivationMeter, tensor: Tensor) -> None:
        self.tensor, self._meter = tensor, meter
        self._pointer = meter.add(tensor)

    def __del__(self) -> None:
        self._meter.drop(self._pointer)


class ActivationMeter:
    """Context manager; `peak_bytes` is the largest sum of distinct storages saved for backward at one time.

    Storages in `excluded` (parameters) do not count. Views of one storage count once, whole.
    """

    def __init__(self, excluded: Iterable[Tensor] = ()) -> None:
        self._excluded = {_identity(tensor) for tensor in excluded}
        self._references: dict[int, tuple[int, int]] = {}
        self._live_bytes = 0
        self.peak_bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> ActivationMeter:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    @property
    def live_bytes(self) -> int:
        """Bytes that are held now."""
        return self._live_bytes

    def track(self, tensor: Tensor) -> object:
        """Count a tensor that is held outside of autograd, for as long as the returned object lives."""
        return _Kept(self, tensor.detach())

    def add(self, tensor: Tensor) -> int:
        """Count a reference to the tensor's storage; returns the storage's identity (0: not counted)."""
        pointer, num_bytes = _identity(tensor), tensor.untyped_storage().nbytes()
        if num_bytes == 0 or pointer in self._excluded:
            return 0
        count, num_bytes = self._references.get(pointer, (0, num_bytes))
        self._references[pointer] = (count + 1, num_bytes)
        if count == 0:
            self._live_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        return pointer

    def drop(self, pointer: int) -> None:
        """Release a reference that `add` counted."""
        if pointer == 0:
            return
        count, num_bytes = self._references[pointer]
        if count == 1:
            del self._references[pointer]
            self._live_bytes -= num_bytes
        else:
            self._references[pointer] = (count - 1, num_bytes)

    def _pack(self, tensor: Tensor) -> _Kept:
        # Detached: an output that kept its graph, which keeps what is packed here, would never be released.
        return _Kept(self, tensor.detach())

    @staticmethod
    def _unpack(kept: _Kept) -> Tensor:
        return kept.tensor


def _identity(tensor: Tensor) -> int:
    """What all views of a storage share, also while the storage is empty (weights that are gathered when needed)."""
    return tensor.untyped_storage()._cdata
