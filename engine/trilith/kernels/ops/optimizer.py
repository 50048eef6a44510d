"""Optimizer steps over slices of flat buffers, each in one pass, and the sum of squares that gradients are clipped by.

A call takes `Slices`, parallel lists of contiguous tensors, of one dtype each: `parameters` (fp32 or fp64), their
`gradients` (any floating-point dtype), states (fp32 or bf16; fp64 beside fp64), and `weights`: nothing, or for each
parameter a tensor that gets its new value, rounded. `multipliers` (n, 2) float64: of learning rate and weight decay. `step`
(6,) float64 is what changes from step to step: learning rate, clip factor, loss scale, 1 - beta1^t, 1 - beta2^t, and 1 in
the very first step. Gradients are divided by the loss scale and multiplied by the clip factor as they are read; they keep
their values, or become zero with `zeroes_gradients`. Updates do not depend on how a list is cut, on threads or on the
processor.

All tensors of a call lie on the CPU, or on one CUDA device, where parameters are fp32; `multipliers` and `step` lie
with them, or on the CPU, from where they are copied. Addresses and multipliers are copied to a device once.

`backend` "reference" is plain torch; otherwise ops run natively, or raise KernelError where they cannot. Callers that have
torch's own optimizers to fall back on ask `is_native` first.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Clipping:
    """What gradients are divided by where only their device knows their norm, so that nobody waits for it.

    `squares`: float64 scalar on the device, the sum of the squares of all gradients as they are, those of a loss times
    `loss_scale`. They are clipped to the L2 norm `max_norm` (0: not at all) as by `torch.nn.utils.clip_grad_norm_`.
    """

    squares: Tensor
    loss_scale: float
    max_norm: float


GradScale = float | Clipping


class Slices:
    """The lists of a call, one state after the other, and their `multipliers`.

    The native op checks them in its first call; later calls only look up where the tensors are, since memory may come
    and go. So whoever calls again with the same tensors keeps the object.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        weights: Sequence[Tensor],
        multipliers: Tensor,
    ) -> None:
        self.parameters, self.gradients = parameters, gradients
        self.states, self.weights, self.multipliers = tuple(states), weights, multipliers
        self._sizes: tuple[int, ...] | None = None

    @property
    def lists(self) -> tuple[Sequence[Tensor], ...]:
        """Parameters, gradients, states, weights."""
        return (self.parameters, self.gradients, *self.states, self.weights)

    def table(self, name: str) -> array[int]:
        """The native table: for each slice the addresses of parameter, gradient, two states, weight, and its elements.

        Raises KernelError where the lists do not fit each other or the native op `name`.
        """
        if self._sizes is None:
            self._sizes = self._checked_sizes(name)
        absent = (0,) * len(self._sizes)
        columns: list[Sequence[int]] = [
            [t.data_ptr() for t in x] for x in (self.parameters, self.gradients, *self.states)
        ]
        columns += [absent] * (4 - len(columns))
        columns.append([t.data_ptr() for t in self.weights] if self.weights else absent)
        return array("q", chain.from_iterable(zip(*columns, self._sizes, strict=True)))

    def _checked_sizes(self, name: str) -> tuple[int, ...]:
        sizes = tuple(parameter.numel() for parameter in self.parameters)
        for members in self.lists[:-1] if not self.weights else self.lists:
            _check_list(name, members, sizes)
        firsts = [members[0] for members in self.states]
        reason = _refusal(self.parameters[0], self.gradients[0], firsts, self.weights[0] if self.weights else None)
        if reason:
            raise KernelError(f"{name}: {reason}")
        return sizes


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
    lr: float, *, grad_scale: GradScale = 1.0, step: int = 1, betas: tuple[float, float] | None = None
) -> Tensor:
    """The array `step` for step number `step` (from 1 on), its gradients divided by `grad_scale`, infinity included.

    Without `betas` moments are not corrected for their start at zero. Where the scale is a `Clipping` the array lies on
    its device, and its clip factor is computed there.
    """
    first, second = (1.0, 1.0) if betas is None else (1.0 - betas[0] ** step, 1.0 - betas[1] ** step)
    divisor = grad_scale.loss_scale if isinstance(grad_scale, Clipping) else grad_scale
    values = torch.tensor([lr, 1.0, divisor, first, second, float(step == 1)], dtype=torch.float64)
    return _clipped(values, grad_scale) if isinstance(grad_scale, Clipping) else values


def _clipped(values: Tensor, clipping: Clipping) -> Tensor:
    """The array `step` on the device of `clipping`, with the clip factor in its place."""
    squares = clipping.squares
    values = values.to(squares.device, non_blocking=True)
    if squares.is_cuda:
        library.run("clip_step", squares, squares.data_ptr(), values.data_ptr(), 0, clipping.max_norm)
    elif clipping.max_norm > 0:
        values[1] = (clipping.max_norm / (squares.sqrt() / clipping.loss_scale + 1e-6)).clamp(max=1.0)
    return values


def adam(
    slices: Slices,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    is_decoupled: bool = True,
    zeroes_gradients: bool = False,
    backend: str = "auto",
) -> None:
    """Adam, or AdamW where the decay `is_decoupled`, in place. States: averages of gradients, and of their squares."""
    constants = (beta1, beta2, eps, weight_decay, is_decoupled, zeroes_gradients)
    _step("adam", (optimizer_reference.adam, adam_op), backend, slices, step, constants)


def lion(
    slices: Slices,
    step: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    zeroes_gradients: bool = False,
    backend: str = "auto",
) -> None:
    """Lion, in place: `beta1` is of the direction, `beta2` of the momentum that is kept, its state."""
    constants = (beta1, beta2, weight_decay, zeroes_gradients)
    _step("lion", (optimizer_reference.lion, lion_op), backend, slices, step, constants)


def sgd(
    slices: Slices,
    step: Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    is_nesterov: bool = False,
    zeroes_gradients: bool = False,
    backend: str = "auto",
) -> None:
    """SGD in torch's form, in place. State: momentum, which starts as the first gradient; none where `momentum` is 0."""
    constants = (momentum, dampening, weight_decay, is_nesterov, zeroes_gradients)
    _step("sgd", (optimizer_reference.sgd, sgd_op), backend, slices, step, constants)


def sum_of_squares(tensors: Sequence[Tensor], backend: str = "auto") -> Tensor:
    """The sum of the squares of all elements, accumulated in float64 in an order that the sizes alone determine: a scalar.

    `tensors`: contiguous, of one dtype. It is finite if they are (float64: if their squares are), and else is not.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    run = _chosen(tensors[0], backend, optimizer_reference.sum_of_squares, sum_of_squares_op, _sum_of_squares)
    total: Tensor = run(list(tensors))
    return total


def _step(
    name: str, others: tuple[Any, Any], backend: str, slices: Slices, step: Tensor, constants: tuple[Any, ...]
) -> None:
    """Run the native op `name`, or that one of `others` (reference, library form) that is due.

    The last of the constants tells whether gradients become zero.
    """
    if not slices.parameters:
        return
    run = _chosen(slices.parameters[0], backend, *others, None)
    if run is None:
        _run_natively(name, slices, step, constants)
        _note_changes(slices.lists, constants[-1])
        return
    states = slices.states if slices.states or name != "sgd" else ((),)  # sgd has an empty list there
    lists = (slices.parameters, slices.gradients, *states, slices.weights)
    run(*map(list, lists), slices.multipliers, step, *constants)


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


def _check_list(name: str, tensors: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """Raises KernelError where tensors are not alike, contiguous and of these numbers of elements."""
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


def _run_natively(name: str, slices: Slices, step: Tensor, constants: tuple[Any, ...]) -> None:
    """Call the native op `name`."""
    first, count, multipliers = slices.parameters[0], len(slices.parameters), slices.multipliers
    _check_numbers(name, count, multipliers, step, first.device)
    table = slices.table(name)
    codes = [_dtype_code(x) for x in (slices.parameters, slices.gradients, slices.states[0] if slices.states else ())]
    if first.device.type == "cpu":
        where: tuple[int, ...] = (table.buffer_info()[0], multipliers.data_ptr(), count, step.data_ptr())
        library.run(name, first, *codes, _dtype_code(slices.weights), *where, *constants)
        return
    held, groups = _on_device(table.tobytes(), first.device), multipliers
    if groups.device != first.device:
        groups = _on_device(groups.numpy().tobytes(), first.device)
    now = step.to(first.device, non_blocking=True)
    where = (held.data_ptr(), groups.data_ptr(), count, sum(table[5::6]), now.data_ptr())
    library.run(name, first, *codes, _dtype_code(slices.weights) if slices.weights else -1, *where, *constants)


def _sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    if not library.serves(tensors[0]):
        raise KernelError(f"sum_of_squares: {library.why_not(tensors[0])}")
    sizes = [tensor.numel() for tensor in tensors]
    _check_list("sum_of_squares", tensors, sizes)
    addresses = [tensor.data_ptr() for tensor in tensors]
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


def _from_lists(name: str, num_states: int) -> Callable[..., None]:
    """The native op `name` with its lists one by one: parameters, gradients, states, weights."""

    def run(parameters: list[Tensor], gradients: list[Tensor], *rest: Any) -> None:
        states, (weights, multipliers, step, *constants) = rest[:num_states], rest[num_states:]
        slices = Slices(parameters, gradients, [state for state in states if state], weights, multipliers)
        _run_natively(name, slices, step, tuple(constants))

    return run


def _nothing(*_: object) -> None:
    """The shapes of an op that has no result."""


def _scalar(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float64)


adam_op = define(
    "adam(Tensor(a!)[] parameters, Tensor(b!)[] gradients, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs,"
    f" Tensor(e!)[] weights, {_NUMBERS}, float beta1, float beta2, float eps, float weight_decay, bool is_decoupled,"
    " bool zeroes_gradients) -> ()",
    _from_lists("adam", 2),
    _nothing,
)
lion_op = define(
    f"lion(Tensor(a!)[] parameters, Tensor(b!)[] gradients, Tensor(c!)[] exp_avgs, Tensor(d!)[] weights, {_NUMBERS},"
    " float beta1, float beta2, float weight_decay, bool zeroes_gradients) -> ()",
    _from_lists("lion", 1),
    _nothing,
)
sgd_op = define(
    "sgd(Tensor(a!)[] parameters, Tensor(b!)[] gradients, Tensor(c!)[] momentum_buffers, Tensor(d!)[] weights,"
    f" {_NUMBERS}, float momentum, float dampening, float weight_decay, bool is_nesterov, bool zeroes_gradients) -> ()",
    _from_lists("sgd", 1),
    _nothing,
)
sum_of_squares_op = define("sum_of_squares(Tensor[] tensors) -> Tensor", _sum_of_squares, _scalar)
