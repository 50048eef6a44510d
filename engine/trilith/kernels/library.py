"""The native libraries of csrc/ (`trilith._kernels`, and `trilith._kernels_cuda` for CUDA), loaded once, and which inputs
their ops take.

They are loaded after torch, whose OpenMP runtime has a plain name: both then share one team of threads, and one setting of
their number. Where they were not built, everything runs on torch's own ops.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import MappingProxyType, ModuleType
from typing import Any

import torch  # before the library: see above
from torch import Tensor, nn

from trilith.errors import KernelError

# Codes of csrc/common/types.h.
DTYPES = MappingProxyType({torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3})


def _load(name: str, needs: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(name), ""
    except ImportError as problem:
        return None, f"{name} cannot be imported ({problem}): install with {needs}"


LIBRARY, MISSING = _load("trilith._kernels", "a C++17 compiler, ninja and pybind11")
# The ops for this processor's best instruction set, or None; Any, because each is a function of many numbers.
CPU: Any = None if LIBRARY is None else getattr(LIBRARY, LIBRARY.instruction_sets[0])
# The ops for CUDA devices, or None; without CUDA in torch no tensor is there for them.
CUDA: Any
CUDA, CUDA_MISSING = (
    _load("trilith._kernels_cuda", "nvcc") if torch.version.cuda else (None, "this torch was built without CUDA")
)


# The CUDA kernels compile, but have not run on a GPU yet: `auto` leaves them alone, `fused` takes them.
CUDA_HAS_RUN = False


def is_trusted(device: torch.device, backend: str) -> bool:
    """Whether `backend` may choose the kernels of this device."""
    return device.type != "cuda" or CUDA_HAS_RUN or backend == "fused"


@cache
def cuda_refusal(device: int) -> str:
    """Why the CUDA kernels do not run on the device of this number; empty if they do."""
    return CUDA_MISSING if CUDA is None else str(CUDA.why_not(device))


def refusal(device: torch.device) -> str:
    """Why there are no native kernels for a CPU or CUDA device; empty if there are."""
    if device.type == "cuda":
        return cuda_refusal(device.index)
    return "" if CPU is not None else MISSING or "the native library is switched off"


def serves(first: Tensor, *others: Tensor | None, on_cuda: bool = True) -> bool:
    """Whether the native ops take these tensors: of one floating-point dtype, on the CPU, or, `on_cuda` and not fp64, on
    one CUDA device."""
    dtype, device = first.dtype, first.device
    is_takeable = device.type == "cpu" or (on_cuda and device.type == "cuda" and dtype != torch.float64)
    if dtype not in DTYPES or not is_takeable or refusal(device):
        return False
    return all(other is None or (other.dtype == dtype and other.device == device) for other in others)


def takes(op: str, backend: str, first: Tensor, *others: Tensor | None, on_cuda: bool = True) -> bool:
    """Whether `op` runs natively for `backend`; raises KernelError where that is "fused" and it cannot.

    `on_cuda`: whether there is a CUDA kernel for it.
    """
    if backend in ("torch", "reference") or not is_trusted(first.device, backend):
        return False
    if serves(first, *others, on_cuda=on_cuda):
        return True
    if backend == "fused":
        raise KernelError(f"{op}: backend 'fused': {why_not(first, *others, on_cuda=on_cuda)}")
    return False


def why_not(first: Tensor, *others: Tensor | None, on_cuda: bool = True) -> str:
    """Why `serves` is False."""
    device = first.device
    if (device.type == "cpu" or (on_cuda and device.type == "cuda")) and refusal(device):
        return refusal(device)
    tensors = [first, *(other for other in others if other is not None)]
    described = ", ".join(f"{str(t.dtype).removeprefix('torch.')} on {t.device}" for t in tensors)
    cuda = " or, but for fp64, CUDA" if on_cuda else ""
    return f"the native op takes CPU{cuda} tensors of one floating-point dtype and device, not {described}"


def run(op: str, first: Tensor, *arguments: Any, scratch: tuple[int, ...] | None = None) -> None:
    """Call the native `op` for the device of `first`, where it has all its tensors.

    On CUDA it runs on the current stream, with the memory for partial results that it wants for the sizes `scratch`.
    """
    device = first.device
    if device.type == "cpu":
        getattr(CPU, op)(*arguments, torch.get_num_threads())
        return
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            run(op, first, *arguments, scratch=scratch)
        return
    if scratch is not None:
        num_bytes = getattr(CUDA, f"{op}_workspace")(*scratch)
        # Freed before the kernel has run, and given only to what runs on the same stream behind it.
        arguments += (torch.empty(num_bytes, dtype=torch.uint8, device=device).data_ptr(),)
    getattr(CUDA, op)(*arguments, torch.cuda.current_stream(device).cuda_stream)


def is_traced(x: Tensor) -> bool:
    """Whether `x` has no memory of its own to work on: under torch.compile, fake, meta, or another subclass."""
    return torch.compiler.is_compiling() or (type(x) is not Tensor and type(x) is not nn.Parameter) or x.is_meta


def address(x: Tensor | None) -> int:
    """Where the contiguous memory of `x` begins; 0 for None. The caller keeps `x` until the native call has returned."""
    return 0 if x is None else x.data_ptr()
