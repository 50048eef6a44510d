"""Optimizers that treat tensors as a whole, against plain versions: one small model, cut for any data and tensor rank.

`check` drives an optimizer on the partitions of one rank, with values and gradients that every rank can compute, and
compares the weights of its pieces with those of a plain version over whole tensors.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from trilith.models.base import Init, ParameterDecl, Split, TensorDecl, local_parameter
from trilith.optim.base import FlatPartition, Optimizer
from trilith.optim.groups import multipliers
from trilith.optim.lamb import Lamb, LambOptions
from trilith.optim.muon import Muon, MuonOptions
from trilith.topology import Group
from trilith.zero.owners import Owners
from trilith.zero.partition import partition_range, partition_segments, partition_tensors, unit_layouts

ALONE = Group("tp", (0,), 0)
NUM_STEPS = 3
PARAM_GROUPS = (
    SimpleNamespace(pattern=r"\.k\.weight$", lr_mult=0.5, weight_decay_mult=None, muon=None),
    SimpleNamespace(pattern=r"up\.bias$", lr_mult=0.2, weight_decay_mult=1.5, muon=None),
    SimpleNamespace(pattern=r"layers\.1\.down", lr_mult=1.0, weight_decay_mult=0.5, muon=False),
)


def _decl(*tensors: TensorDecl, unit: str, decay: bool = True, region: bool = False) -> ParameterDecl:
    return ParameterDecl(tensors[0].name, tensors, unit, decay, region)


def model(heads: int = 6, kv_heads: int = 2, width: int = 2, hidden: int = 10) -> list[ParameterDecl]:
    """Two layers with stacked q, k, v, an embedding whose rows do not divide, norms and biases; the last is a tied copy."""
    init = Init("zeros")
    queries, keys = Split(0, heads), Split(0, kv_heads, "kv_heads", heads)
    found = [_decl(TensorDecl("embedding.tokens.weight", (7, hidden), init, Split(0, 7, "padded")), unit="tied")]
    for i in (0, 1):
        unit = f"layers.{i}"
        weights = [
            TensorDecl(f"{unit}.q.weight", (heads * width, hidden), init, queries),
            TensorDecl(f"{unit}.k.weight", (kv_heads * width, hidden), init, keys),
            TensorDecl(f"{unit}.v.weight", (kv_heads * width, hidden), init, keys),
        ]
        biases = [TensorDecl(w.name.replace("weight", "bias"), w.shape[:1], init, w.split) for w in weights]
        found += [
            _decl(TensorDecl(f"{unit}.norm.weight", (hidden,), init), unit=unit, decay=False, region=True),
            _decl(*weights, unit=unit),
            _decl(*biases, unit=unit, decay=False),
            _decl(TensorDecl(f"{unit}.up.weight", (6 * width, hidden), init, Split(0, 6)), unit=unit),
            _decl(TensorDecl(f"{unit}.up.bias", (6 * width,), init, Split(0, 6)), unit=unit, decay=False),
            _decl(TensorDecl(f"{unit}.down.weight", (hidden, 6 * width), init, Split(1, 6)), unit=unit),
            _decl(TensorDecl(f"{unit}.mix.weight", (3, hidden), init), unit=unit, region=True),
        ]
    return found


def tied_copy(parameters: Sequence[ParameterDecl], number: int = 1) -> list[ParameterDecl]:
    """The same parameters as the copies number `number` of tied ones."""
    return [replace(parameter, tie_copy=number) for parameter in parameters]


def values(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """What the whole tensor `name` holds; seed 0 are the weights, t the gradients of step t. One tensor starts at zero."""
    if seed == 0 and name.endswith("1.norm.weight"):
        return torch.zeros(shape, dtype=torch.float64)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Place:
    """Which part of the model a rank has: tensor rank and degree, data rank and degree."""

    tensor: int = 0
    tensor_degree: int = 1
    data: int = 0
    data_degree: int = 1


def partitions(
    parameters: Sequence[ParameterDecl],
    place: Place,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> list[FlatPartition]:
    """This rank's part of every unit, with the weights in it; what is no part of a tensor is zero."""
    local = [local_parameter(p, place.tensor, place.tensor_degree, True) for p in parameters]
    owners = Owners(place.data_degree, frozenset({"tied"}))
    made = []
    for layout in unit_layouts(local, place.data_degree, multipliers(PARAM_GROUPS), owners=owners):
        start, stop = partition_range(layout, place.data)
        made.append(
            FlatPartition(
                layout.name,
                torch.zeros(stop - start, dtype=dtype, device=device),
                torch.zeros(stop - start, dtype=grad_dtype, device=device),
                partition_segments(layout, start, stop),
                partition_tensors(layout, start, stop),
            )
        )
    return made


def each_piece(parts: Sequence[FlatPartition], buffers: Sequence[Tensor]) -> Any:
    """(name, shape, index of the box, view of the buffer) of every piece here."""
    for part, buffer in zip(parts, buffers, strict=True):
        for spec in part.tensors:
            for piece in spec.pieces:
                index = tuple(slice(a, b) for a, b in zip(piece.box.start, piece.box.stop, strict=True))
                view = buffer[piece.offset : piece.offset + piece.box.numel].view(piece.box.shape)
                yield spec.name, spec.shape, index, view


def fill(parts: Sequence[FlatPartition], buffers: Sequence[Tensor], seed: int, factor: float = 1.0) -> None:
    """Write the values of `seed` times `factor` into every piece."""
    for name, shape, index, view in each_piece(parts, buffers):
        view.copy_(values(name, shape, seed)[index] * factor)


Plain = Callable[[str, Tensor, Tensor, dict[str, Tensor], int, float], None]


def expected(
    parameters: Sequence[ParameterDecl], plain: Plain, scale: float, grad_dtype: torch.dtype
) -> dict[str, Tensor]:
    """The whole tensors after NUM_STEPS steps of the plain version."""
    tensors = [tensor for parameter in parameters for tensor in parameter.tensors]
    weights = {tensor.name: values(tensor.name, tensor.shape, 0) for tensor in tensors}
    states: dict[str, dict[str, Tensor]] = {name: {} for name in weights}
    for t in range(1, NUM_STEPS + 1):
        for name, weight in weights.items():
            gradient = (values(name, tuple(weight.shape), t) * scale).to(grad_dtype).double() / scale
            plain(name, weight, gradient, states[name], t, 0.1 / t)
    return weights


def check(
    make: Callable[[Sequence[FlatPartition]], Optimizer],
    parts: Sequence[FlatPartition],
    wanted: Mapping[str, Tensor],
    scale: float = 1.0,
) -> tuple[float, int]:
    """(largest difference of any element here after NUM_STEPS steps, number of elements compared)."""
    fill(parts, [part.parameter for part in parts], 0)
    optimizer = make(parts)
    for t in range(1, NUM_STEPS + 1):
        fill(parts, [part.gradient for part in parts], t, scale)
        optimizer.step(0.1 / t, scale)
    worst, count = 0.0, 0
    for name, _, index, view in each_piece(parts, [part.parameter for part in parts]):
        worst, count = max(worst, float((view.double().cpu() - wanted[name][index]).abs().max())), count + view.numel()
    return worst, count


def group_of(name: str) -> tuple[float, ...]:
    """The multipliers of a tensor of `model`."""
    return multipliers(PARAM_GROUPS)(name, not name.endswith(("bias", "norm.weight")))


def plain_lamb(options: LambOptions) -> Plain:
    """DeepSpeed's FusedLamb over one whole tensor."""

    def step(name: str, w: Tensor, g: Tensor, state: dict[str, Tensor], t: int, lr: float) -> None:
        lr_mult, decay_mult = group_of(name)
        b1, b2 = options.betas
        decay = options.weight_decay * decay_mult
        m, v = state.setdefault("m", torch.zeros_like(w)), state.setdefault("v", torch.zeros_like(w))
        m.copy_(b1 * m + (1 - b1) * g)
        v.copy_(b2 * v + (1 - b2) * g * g)
        root = (v + options.eps).sqrt() if options.eps_inside_sqrt else v.sqrt() + options.eps
        u = m / root + decay * w
        ratio = 1.0
        if w.norm() > 0 and u.norm() > 0 and (decay or options.always_adapts):
            ratio = min(max(float(w.norm() / u.norm()), options.min_coeff), options.max_coeff)
        size = lr * lr_mult
        if options.bias_correction:
            size *= (1 - b2**t) ** 0.5 / (1 - b1**t)
        w -= size * ratio * u

    return step


def plain_orthogonal(g: Tensor, num_iterations: int) -> Tensor:
    """Jordan's zeropower_via_newtonschulz5."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(num_iterations):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def plain_muon(options: MuonOptions) -> Plain:
    """Jordan's MuonWithAuxAdam over one whole tensor."""

    def step(name: str, w: Tensor, g: Tensor, state: dict[str, Tensor], t: int, lr: float) -> None:
        lr_mult, decay_mult = group_of(name)
        m = state.setdefault("m", torch.zeros_like(w))
        if options.is_matrix(name, tuple(w.shape)):
            lr *= lr_mult * options.lr_factor
            m.lerp_(g, 1 - options.momentum)
            update = g.lerp(m, options.momentum) if options.nesterov else m
            rows, columns = w.shape
            factor = 0.2 * max(rows, columns) ** 0.5 if options.matches_adamw else max(1, rows / columns) ** 0.5
            w *= 1 - lr * options.weight_decay * decay_mult
            w -= lr * factor * plain_orthogonal(update, options.num_iterations)
            return
        lr *= lr_mult * options.adam_lr_factor
        b1, b2 = options.adam.betas
        v = state.setdefault("v", torch.zeros_like(w))
        m.lerp_(g, 1 - b1)
        v.lerp_(g * g, 1 - b2)
        w *= 1 - lr * options.adam.weight_decay * decay_mult
        w -= lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + options.adam.eps)

    return step


def maker(options: LambOptions | MuonOptions, tp: Group = ALONE) -> Callable[[Sequence[FlatPartition]], Optimizer]:
    """The optimizer that the options are of."""
    if isinstance(options, LambOptions):
        return lambda parts: Lamb(parts, options, tp)
    return lambda parts: Muon(parts, options, tp)


def plain_of(options: LambOptions | MuonOptions) -> Plain:
    """The plain version of the optimizer that the options are of."""
    return plain_lamb(options) if isinstance(options, LambOptions) else plain_muon(options)
