"""The native library of csrc/ (`trilith._kernels`), loaded once, and which inputs its ops take.

It is loaded after torch, whose OpenMP runtime has a plain name: both then share one team of threads, and one setting of
their number. Where it was not built, everything runs on torch's own ops.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType, ModuleType
from typing import Any

import torch  # before the library: see above
from torch import Tensor, nn

from trilith.errors import KernelError

# Codes of csrc/common/types.h.
DTYPES = MappingProxyType({torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3})


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("trilith._kernels"), ""
    except ImportError as problem:
        return (
            None,
            f"trilith._kernels cannot be imported ({problem}): install with a C++17 compiler, ninja and pybind11",
        )


LIBRARY, MISSING = _load()
# The ops for this processor's best instruction set, or None; Any, because each is a function of many numbers.
CPU: Any = None if LIBRARY is None else getattr(LIBRARY, LIBRARY.instruction_sets[0])


def serves(first: Tensor, *others: Tensor | None) -> bool:
    """Whether the native ops take these tensors: on the CPU, of one floating-point dtype."""
    dtype = first.dtype
    if CPU is None or dtype not in DTYPES or first.device.type != "cpu":
        return False
    return all(other is None or (other.dtype == dtype and other.device.type == "cpu") for other in others)


def takes(op: str, backend: str, first: Tensor, *others: Tensor | None) -> bool:
    """Whether `op` runs natively for `backend`; raises KernelError where that is "fused" and it cannot."""
    if backend in ("torch", "reference"):
        return False
    if serves(first, *others):
        return True
    if backend == "fused":
        raise KernelError(f"{op}: backend 'fused': {why_not(first, *others)}")
    return False


def why_not(first: Tensor, *others: Tensor | None) -> str:
    """Why `serves` is False."""
    if CPU is None:
        return MISSING
    tensors = [first, *(other for other in others if other is not None)]
    described = ", ".join(f"{str(t.dtype).removeprefix('torch.')} on {t.device}" for t in tensors)
    return f"the native op takes CPU tensors of one floating-point dtype, not {described}"


def is_traced(x: Tensor) -> bool:
    """Whether `x` has no memory of its own to work on: under torch.compile, fake, meta, or another subclass."""
    return torch.compiler.is_compiling() or (type(x) is not Tensor and type(x) is not nn.Parameter) or x.is_meta


def address(x: Tensor | None) -> int:
    """Where the contiguous memory of `x` begins; 0 for None. The caller keeps `x` until the native call has returned."""
    return 0 if x is None else x.data_ptr()
