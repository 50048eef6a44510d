"""The CUDA kernels on the processor (csrc/tests/device), in the place of the native ops of an instruction set."""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from csrc.build import KernelsUnavailable, build_emulated
from trilith.kernels.library import DTYPES

FOLDER = Path(__file__).resolve().parents[2] / "build" / "emulated"
_SLICE = 6
# Where, among an op's arguments, the sizes stand that its memory for partial results depends on.
_ROWS_AND_WIDTH = {"norm_backward": (10, 11), "activation_backward": (7, 8)}


@cache
def module() -> ModuleType | str:
    """The kernels, built once a session, or why they cannot be."""
    target = FOLDER / "_kernels_cuda.so"
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(FOLDER / "lock"):  # another worker of this session may build it, too
            build_emulated(target, FOLDER / "objects")
    except KernelsUnavailable as reason:
        return str(reason)
    spec = importlib.util.spec_from_file_location("_kernels_cuda", target)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


class Emulated:
    """Has the functions of csrc/cpu/ops.inc as attributes, and calls the CUDA kernels for them."""

    def __init__(self, kernels: ModuleType) -> None:
        self._kernels = kernels

    def __getattr__(self, name: str) -> Any:
        op = getattr(self._kernels, name)

        def call(*arguments: Any) -> None:
            given = list(arguments[:-1])  # the last is the number of threads
            if name in ("adam", "lion", "sgd"):
                self._update(op, given)
                return
            scratch = self._scratch(name, given)
            if scratch is not None:
                # As uninitialised memory may be.
                held = torch.full((getattr(self._kernels, f"{name}_workspace")(*scratch),), 0xFF, dtype=torch.uint8)
                given.append(held.data_ptr())
            op(*given, 0)

        return call

    def _scratch(self, name: str, given: list[Any]) -> tuple[int, ...] | None:
        if name == "attention_backward":
            sizes = given[1]
            return sizes.batch, sizes.num_heads, sizes.num_queries
        if name == "dropout_bias_backward":
            return given[7] * given[8], given[9]
        if name == "sum_of_squares":
            return ()
        places = _ROWS_AND_WIDTH.get(name)
        return None if places is None else tuple(given[place] for place in places)

    def _update(self, op: Any, given: list[Any]) -> None:
        """A CUDA optimizer is told the number of elements, and whether weights get a copy."""
        codes, (slices, multipliers, count, step), rest = given[:4], given[4:8], given[8:]
        table = (ctypes.c_int64 * (_SLICE * count)).from_address(slices)
        numel, has_weights = sum(table[_SLICE - 1 :: _SLICE]), table[4] != 0
        op(*codes[:3], codes[3] if has_weights else -1, slices, multipliers, count, numel, step, *rest, 0)


DTYPES_ON_CUDA = [dtype for dtype in DTYPES if dtype != torch.float64]


@dataclass(frozen=True)
class Device:
    """Where kernels run. `backend` is what chooses them there."""

    where: torch.device
    backend: str

    def put(self, x: Tensor) -> Tensor:
        return x.to(self.where)
