"""Optimizer steps over slices of flat buffers, each in one pass, and the sum of squares that gradients are clipped by.

A call takes parallel lists of contiguous tensors, of one dtype each: `parameters` (fp32 or fp64), their `gradients` (any
floating-point dtype), states (fp32 or bf16; fp64 beside fp64), and `weights`: nothing, or for each parameter a tensor that
gets its new value, rounded. `multipliers` (n, 2) float64: of learning rate and weight decay. `step` (6,) float64 is what
changes from step to step: learning rate, clip factor, loss scale, 1 - beta1^t, 1 - beta2^t, and 1 in the very first step.
Gradients are divided by the loss scale and multiplied by the clip factor as they are read; they keep their values, or
become zero with `zeroes_gradients`. Updates do not depend on how a list is cut, on threads or on the processor.

All tensors of a call lie on the CPU, or on one CUDA device, where parameters are fp32; `multipliers` and `step` lie
with them, or on the CPU, from where they are copied. Addresses and multipliers are copied to a device once.

`backend` "reference" is plain torch; otherwise ops run natively, or raise KernelError where they cannot. Callers that have
torch's own optimizers to fall back on ask `is_native` first.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from trilith.errors import KernelError
from trilith.kernels import library, optimizer_reference
from trilith.kernels.library import DTYPES
from trilith.kernels.ops.library_form import define

STEP_VALUES = 6
_MASTERS = (torch.float32, torch.float64)


def is_native(
    parameter: Tensor,
    gradient: Tensor,
    states: Sequence[Tensor] = (),
    weight: Tensor | None = None,
    backend: str = "auto",
) -> bool:
    """Whether an optimizer with this `backend` is to run natively on tensors like these.

    Raises KernelError where the backend is "fused" and it cannot.
    """
    if backend in ("torch", "reference") or not library.is_trusted(parameter.device, backend):
        return False
    reason = _refusal(parameter, gradient, states, weight)
    if reason and backend == "fused":
        raise KernelError(f"optimizer: backend 'fused': {reason}")
    return not reason


def step_values(
    lr: float, *, grad_scale: float = 1.0, step: int = 1, betas: tuple[float, float] | None = None
) -> Tensor:
    """The array `step` for step number `step` (from 1 on), its gradients divided by `grad_scale`, infinity included.

    Without `betas` moments are not corrected for their start at zero.
    """
    first, second = (1.0, 1.0) if betas is None else (1.0 - betas[0] ** step, 1.0 - betas[1] ** step)
    return torch.tensor([lr, 1.0, grad_scale, first, second, float(step == 1)], dtype=torch.float64)


def adam(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    weights: Sequence[Tensor],
    multipliers: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    is_decoupled: bool = True,
    zeroes_gradients: bool = False,
    backend: str = "auto",
) -> None:
    """Adam, or AdamW where the decay `is_decoupled`, in place."""
    lists = (parameters, gradients, exp_avgs, exp_avg_sqs, weights)
    rest = (multipliers, step, beta1, beta2, eps, weight_decay, is_decoupled, zeroes_gradients)
    _step((optimizer_reference.adam, adam_op, _adam), backend, lists, rest)


def lion(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    weights: Sequence[Tensor],
    multipliers: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    zeroes_gradients: bool = False,
    backend: str = "auto",
) -> None:
    """Lion, in place: `beta1` is of the direction, `beta2` of the momentum that is kept."""
    lists = (parameters, gradients, exp_avgs, weights)
    rest = (multipliers, step, beta1, beta2, weight_decay, zeroes_gradients)
    _step((optimizer_reference.lion, lion_op, _lion), backend, lists, rest)


def sgd(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    weights: Sequence[Tensor],
    multipliers: Tensor,
    step: Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    is_nesterov: bool = False,
    zeroes_gradients: bool = False,
    backend: str = "auto",
) -> None:
    """SGD in torch's form, in place. `momentum_buffers` are empty where `momentum` is 0; they start as first gradients."""
    lists = (parameters, gradients, momentum_buffers, weights)
    rest = (multipliers, step, momentum, dampening, weight_decay, is_nesterov, zeroes_gradients)
    _step((optimizer_reference.sgd, sgd_op, _sgd), backend, lists, rest)


def sum_of_squares(tensors: Sequence[Tensor], backend: str = "auto") -> Tensor:
    """The sum of the squares of all elements, accumulated in float64 in an order that the sizes alone determine: a scalar.

    `tensors`: contiguous, of one dtype. It is finite if they are (float64: if their squares are), and else is not.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    run = _chosen(tensors[0], backend, optimizer_reference.sum_of_squares, sum_of_squares_op, _sum_of_squares)
    total: Tensor = run(list(tensors))
    return total


def _step(runs: tuple[Any, Any, Any], backend: str, lists: tuple[Sequence[Tensor], ...], rest: tuple[Any, ...]) -> None:
    """Call the one of `runs` (reference, library form, native) that is due with the lists and the rest of its arguments.

    The first list holds the parameters, the second the gradients; the last of the rest tells whether these become zero.
    """
    if not lists[0]:
        return
    run = _chosen(lists[0][0], backend, *runs)
    run(*map(list, lists), *rest)
    if run is runs[-1]:
        _note_changes(lists, rest[-1])


def _note_changes(lists: Sequence[Sequence[Tensor]], zeroes_gradients: bool) -> None:
    """Let autograd know what was written: all lists but the second, the gradients, unless they became zero."""
    for number, tensors in enumerate(lists):
        if tensors and (number != 1 or zeroes_gradients):
            torch.autograd.graph.increment_version(tensors)


def _chosen(first: Tensor, backend: str, reference: Any, op: Any, native: Any) -> Any:
    """What runs for `backend`, where `first` is one of the tensors. The library's form notes changes by its schema."""
    if backend == "reference":
        return reference
    return op if library.is_traced(first) else native


# --- checks -------------------------------------------------------------------------------------------------------------


def _refusal(parameter: Tensor, gradient: Tensor, states: Sequence[Tensor], weight: Tensor | None) -> str:
    """Why the native optimizers do not take tensors like these; empty if they do."""
    device = parameter.device
    reason = library.refusal(device)
    if reason:
        return reason
    named = [("parameter", parameter), ("gradient", gradient), *(("state", state) for state in states)]
    for name, tensor in named if weight is None else [*named, ("weight", weight)]:
        if tensor.device != device or device.type not in ("cpu", "cuda") or tensor.dtype not in DTYPES:
            return (
                f"{name}: {tensor.dtype} on {tensor.device}; all must be floating-point, on the CPU or one CUDA device"
            )
        if device.type == "cuda" and tensor.dtype == torch.float64:
            return f"{name}: fp64 on {device}; it must be of at most 32 bits there"
    if parameter.dtype not in _MASTERS:
        return f"parameter: {parameter.dtype}; it must be fp32 or fp64"
    for state in states:
        is_short = parameter.dtype == torch.float32 and state.dtype == torch.bfloat16
        if state.dtype != states[0].dtype or not (state.dtype == parameter.dtype or is_short):
            return f"state: {state.dtype} beside {parameter.dtype}; all must be like it, or all bf16 beside fp32"
    return ""


def _slices(
    name: str,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    weights: Sequence[Tensor],
) -> array[int]:
    """The native table of slices: for each the addresses of parameter, gradient, two states, weight, and its elements."""
    sizes = [parameter.numel() for parameter in parameters]
    absent = [0] * len(sizes)
    columns = [_column(name, members, sizes) for members in (parameters, gradients, *states)]
    columns += [absent] * (4 - len(columns))
    columns.append(_column(name, weights, sizes) if weights else absent)
    firsts = [members[0] for members in states]
    reason = _refusal(parameters[0], gradients[0], firsts, weights[0] if weights else None)
    if reason:
        raise KernelError(f"{name}: {reason}")
    return array("q", chain.from_iterable(zip(*columns, sizes, strict=True)))


def _column(name: str, tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[int]:
    """The addresses of a list of tensors, which have these numbers of elements."""
    if len(tensors) != len(sizes):
        raise KernelError(
            f"{name}: {len(tensors)} tensors beside {len(sizes)} parameters: all lists must be of one length"
        )
    dtype, device = tensors[0].dtype, tensors[0].device
    for tensor, size in zip(tensors, sizes, strict=True):
        if tensor.dtype != dtype or tensor.device != device or tensor.numel() != size or not tensor.is_contiguous():
            raise KernelError(
                f"{name}: a tensor {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, strides {tensor.stride()}, "
                f"where {size} elements {dtype} on {device} are due: tensors of a list must be contiguous, of one dtype "
                "and device, and as large as their parameters"
            )
    return [tensor.data_ptr() for tensor in tensors]


def _check_numbers(name: str, count: int, multipliers: Tensor, step: Tensor, device: torch.device) -> None:
    for what, tensor, shape in (("multipliers", multipliers, (count, 2)), ("step", step, (STEP_VALUES,))):
        is_here = tensor.device.type == "cpu" or tensor.device == device
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float64 or not is_here or not tensor.is_contiguous():
            raise KernelError(
                f"{name}: {what} {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}: must be {shape}, contiguous "
                "float64 on the CPU" + ("" if device.type == "cpu" else f" or {device}")
            )


# --- what runs ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _on_device(table: bytes, device: torch.device) -> Tensor:
    """The bytes of a table on a device, which asks for the same ones in every step."""
    return torch.frombuffer(bytearray(table), dtype=torch.int64).to(device)


def _dtype_code(tensors: Sequence[Tensor]) -> int:
    return DTYPES[tensors[0].dtype] if tensors else 0


def _run_natively(
    name: str,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    weights: Sequence[Tensor],
    multipliers: Tensor,
    step: Tensor,
    *constants: Any,
) -> None:
    """Call the native op `name`, which has none, one or two lists of states."""
    first = parameters[0]
    _check_numbers(name, len(parameters), multipliers, step, first.device)
    table = _slices(name, parameters, gradients, states, weights)
    codes = [_dtype_code(x) for x in (parameters, gradients, states[0] if states else ())]
    if first.device.type == "cpu":
        where: tuple[int, ...] = (table.buffer_info()[0], multipliers.data_ptr(), len(parameters), step.data_ptr())
        library.run(name, first, *codes, _dtype_code(weights), *where, *constants)
        return
    slices, groups = _on_device(table.tobytes(), first.device), multipliers
    if groups.device != first.device:
        groups = _on_device(groups.numpy().tobytes(), first.device)
    now = step.to(first.device, non_blocking=True)
    where = (slices.data_ptr(), groups.data_ptr(), len(parameters), sum(table[5::6]), now.data_ptr())
    library.run(name, first, *codes, _dtype_code(weights) if weights else -1, *where, *constants)


def _adam(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    weights: Sequence[Tensor],
    multipliers: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    is_decoupled: bool,
    zeroes_gradients: bool,
) -> None:
    constants = (beta1, beta2, eps, weight_decay, is_decoupled, zeroes_gradients)
    states = (exp_avgs, exp_avg_sqs)
    _run_natively("adam", parameters, gradients, states, weights, multipliers, step, *constants)


def _lion(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    weights: Sequence[Tensor],
    multipliers: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    zeroes_gradients: bool,
) -> None:
    constants = (beta1, beta2, weight_decay, zeroes_gradients)
    states = (exp_avgs,)
    _run_natively("lion", parameters, gradients, states, weights, multipliers, step, *constants)


def _sgd(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    weights: Sequence[Tensor],
    multipliers: Tensor,
    step: Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    is_nesterov: bool,
    zeroes_gradients: bool,
) -> None:
    constants = (momentum, dampening, weight_decay, is_nesterov, zeroes_gradients)
    states = (momentum_buffers,) if momentum else ()
    _run_natively("sgd", parameters, gradients, states, weights, multipliers, step, *constants)


def _sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    if not library.serves(tensors[0]):
        raise KernelError(f"sum_of_squares: {library.why_not(tensors[0])}")
    sizes = [tensor.numel() for tensor in tensors]
    addresses = _column("sum_of_squares", tensors, sizes)
    table = array("q", chain.from_iterable(zip(addresses, sizes, strict=True)))
    first = tensors[0]
    total = first.new_empty((), dtype=torch.float64)
    if first.device.type == "cpu":
        where = table.buffer_info()[0]
        library.run("sum_of_squares", first, DTYPES[first.dtype], where, len(sizes), total.data_ptr())
        return total
    runs = _on_device(table.tobytes(), first.device)
    library.run("sum_of_squares", first, DTYPES[first.dtype], runs.data_ptr(), len(sizes), total.data_ptr(), scratch=())
    return total


# --- the library's form -------------------------------------------------------------------------------------------------

_NUMBERS = "Tensor multipliers, Tensor step"


def _nothing(*_: object) -> None:
    """The shapes of an op that has no result."""


def _scalar(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float64)


adam_op = define(
    "adam(Tensor(a!)[] parameters, Tensor(b!)[] gradients, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs,"
    f" Tensor(e!)[] weights, {_NUMBERS}, float beta1, float beta2, float eps, float weight_decay, bool is_decoupled,"
    " bool zeroes_gradients) -> ()",
    _adam,
    _nothing,
)
lion_op = define(
    f"lion(Tensor(a!)[] parameters, Tensor(b!)[] gradients, Tensor(c!)[] exp_avgs, Tensor(d!)[] weights, {_NUMBERS},"
    " float beta1, float beta2, float weight_decay, bool zeroes_gradients) -> ()",
    _lion,
    _nothing,
)
sgd_op = define(
    "sgd(Tensor(a!)[] parameters, Tensor(b!)[] gradients, Tensor(c!)[] momentum_buffers, Tensor(d!)[] weights,"
    f" {_NUMBERS}, float momentum, float dampening, float weight_decay, bool is_nesterov, bool zeroes_gradients) -> ()",
    _sgd,
    _nothing,
)
sum_of_squares_op = define("sum_of_squares(Tensor[] tensors) -> Tensor", _sum_of_squares, _scalar)
