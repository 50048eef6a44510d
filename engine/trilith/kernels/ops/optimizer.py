"""Optimizer updates over lists of flat arrays in one pass each, and the sum of squares of arrays. No gradient flows here.

There is no form for torch.compile: an update is called by the optimizer, between two steps of a model.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trilith.errors import KernelError
from trilith.kernels import library
from trilith.kernels.library import CPU, DTYPES, LIBRARY

ADAM, LION, SGD = 0, 1, 2
_MOMENTS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Update:
    """What an update depends on besides the arrays.

    `kind`: ADAM, LION or SGD. `values`, a float64 tensor (5,) that is read when the update runs: learning rate, factor of
    the gradients, Adam's 1 - beta1^t and sqrt(1 - beta2^t), and whether it is the first step. SGD's momentum is
    `betas[0]`. `decoupled`: decay acts on the weight and not through the gradient. `clears_gradients`: they are zero
    afterwards.
    """

    kind: int
    values: Tensor
    betas: tuple[float, float]
    weight_decay: float = 0.0
    eps: float = 0.0
    dampening: float = 0.0
    decoupled: bool = True
    nesterov: bool = False
    clears_gradients: bool = False


@dataclass(frozen=True)
class Arrays:
    """Parallel lists of contiguous 1-D tensors: masters, gradients, moments (as many lists as the kind has), copies."""

    weights: Sequence[Tensor]
    gradients: Sequence[Tensor]
    moments: Sequence[Sequence[Tensor]]
    copies: Sequence[Tensor] = ()


def is_native(arrays: Arrays, backend: str = "auto") -> bool:
    """Whether `update_arrays` takes the arrays; raises KernelError where `backend` demands it and it does not."""
    if backend in ("torch", "reference") or not arrays.weights:
        return False
    reason = _why_not(arrays)
    if reason and backend == "fused":
        raise KernelError(f"optimizer: backend 'fused': {reason}")
    return not reason


def _why_not(arrays: Arrays) -> str:
    if CPU is None:
        return library.MISSING
    lists = (arrays.weights, arrays.gradients, *arrays.moments, *([arrays.copies] if arrays.copies else []))
    found = [{x.dtype for x in tensors} for tensors in lists]
    if any(x.device.type != "cpu" for tensors in lists for x in tensors):
        return "arrays are not on the CPU"
    if any(len(dtypes) != 1 for dtypes in found):
        return f"arrays of one list have several dtypes: {found}"
    weight, gradient, *rest = (next(iter(dtypes)) for dtypes in found)
    moments, copies = rest[: len(arrays.moments)], rest[len(arrays.moments) :]
    wide = weight == torch.float64
    allowed = {torch.float64} if wide else {torch.float32, torch.bfloat16, torch.float16}
    if weight not in (torch.float32, torch.float64) or gradient not in allowed or not set(copies) <= allowed:
        return f"weights are {weight}, gradients {gradient}, copies {copies}: must be fp32 or fp64, and no wider"
    if not set(moments) <= ({torch.float64} if wide else set(_MOMENTS)) or len(set(moments)) > 1:
        return f"moments are {moments} beside {weight} weights: must be fp32 or bf16, fp64 beside fp64"
    if not all(x.is_contiguous() for tensors in lists for x in tensors):
        return "arrays are not contiguous"
    return ""


def update_arrays(arrays: Arrays, update: Update) -> None:
    """Update all arrays in place. Raises KernelError where lists are not parallel.

    Addresses are asked for each time: what is offloaded lies elsewhere in each step.
    """
    assert LIBRARY is not None
    lengths, num_moments = [x.numel() for x in arrays.weights], len(arrays.moments)
    lists = (arrays.weights, arrays.gradients, *arrays.moments, *([arrays.copies] if arrays.copies else []))
    if any([x.numel() for x in tensors] != lengths for tensors in lists):
        raise KernelError(f"optimizer: lists of {[len(x) for x in lists]} tensors: must be parallel, of equal sizes")
    step = LIBRARY.OptimizerStep(
        update.kind,
        DTYPES[arrays.weights[0].dtype],
        DTYPES[arrays.gradients[0].dtype],
        DTYPES[(arrays.moments[0] if num_moments else arrays.weights)[0].dtype],
        DTYPES[arrays.copies[0].dtype] if arrays.copies else 0,
        update.values.data_ptr(),
        update.weight_decay,
        *update.betas,
        update.eps,
        update.dampening,
        update.decoupled,
        update.nesterov,
        update.clears_gradients,
    )
    held = [array("Q", [x.data_ptr() for x in tensors]) for tensors in lists]
    sizes = array("q", lengths)
    weights, gradients, *rest = (addresses.buffer_info()[0] for addresses in held)
    moments = rest[:num_moments] + [0] * (2 - num_moments)
    copies = rest[num_moments] if arrays.copies else 0
    at = sizes.buffer_info()[0]
    CPU.optimizer_step(step, weights, gradients, *moments, copies, at, len(sizes), torch.get_num_threads())
    for tensors in (arrays.weights, *arrays.moments, arrays.copies):
        for x in tensors:
            torch.autograd.graph.increment_version(x)


def sum_of_squares(pieces: Sequence[Tensor]) -> float:
    """Sum of the squares of contiguous CPU tensors of one dtype, in fp64; infinities and NaN come through.

    The same bits for any number of threads.
    """
    if not pieces:
        return 0.0
    if not library.serves(*pieces) or not all(x.is_contiguous() for x in pieces):
        raise KernelError(f"sum_of_squares: {library.why_not(*pieces)}, contiguous")
    places, sizes = array("Q", [x.data_ptr() for x in pieces]), array("q", [x.numel() for x in pieces])
    at = places.buffer_info()[0], sizes.buffer_info()[0]
    return CPU.sum_of_squares(DTYPES[pieces[0].dtype], *at, len(pieces), torch.get_num_threads())
