"""Muon: momentum, orthogonalised, for the matrices inside a model (Jordan et al. 2024); AdamW for everything else.

The momentum of a matrix is replaced by a matrix near to the closest semi-orthogonal one, which five steps of a quintic
Newton-Schulz iteration find: products only. The formula is that of Jordan's reference and of DeepSpeed. Under tensor
parallelism the matrix is assembled on every tensor rank from the pieces of all, and each takes its own of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod, sqrt

import torch
from torch import Tensor

from trilith.optim.adamw import Adam, AdamOptions
from trilith.optim.base import FlatPartition, Optimizer, blank, unscaled
from trilith.optim.groups import Segment
from trilith.optim.whole import ALONE, WholeTensor, runs_of, sum_over, views, whole_tensors
from trilith.sharding import Box, Piece
from trilith.topology import Group

# Chosen for the steepest rise at 0 that still ends near 1; the result's singular values lie between about 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NORM_EPS = 1e-7
_ADAM = AdamOptions((0.9, 0.95), 1e-10)

# (canonical name, whole shape) -> whether the tensor is orthogonalised
IsMatrix = Callable[[str, tuple[int, ...]], bool]


def is_hidden_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix inside the model: neither an embedding nor the output projection."""
    is_outside = name.startswith(("embedding.", "head.")) or "embed" in name.lower() or "lm_head" in name.lower()
    return len(shape) == 2 and not is_outside


@dataclass(frozen=True)
class MuonOptions:
    """Muon's constants; `adam` are those of everything that is no hidden matrix.

    `lr_factor` and `adam_lr_factor` multiply the learning rate for either. `matches_adamw`: scale the result to the size
    that AdamW's steps usually have, 0.2 sqrt(max(rows, columns)) (Liu et al. 2025, Muon is scalable for LLM training),
    instead of sqrt(max(1, rows / columns)). `low_precision`: iterate in bf16.
    """

    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    num_iterations: int = 5
    matches_adamw: bool = False
    low_precision: bool = False
    lr_factor: float = 1.0
    adam_lr_factor: float = 1.0
    adam: AdamOptions = _ADAM
    is_matrix: IsMatrix = is_hidden_matrix


class Muon(Optimizer):
    """Muon and AdamW. State: `momentum_buffer` of matrices, `exp_avg` and `exp_avg_sq` of the rest, in the master dtype.

    A state ends in each partition with the last tensor that has it. All ranks of the tensor-parallel group step together.
    """

    state_roles = ("momentum_buffer", "exp_avg", "exp_avg_sq")
    needs_whole_tensors = True

    def __init__(
        self, partitions: Sequence[FlatPartition], options: MuonOptions, tp: Group = ALONE, backend: str = "auto"
    ) -> None:
        self.options = options
        tensors = whole_tensors(partitions, tp)
        self._tp = tp
        self._matrices = [t for t in tensors if options.is_matrix(t.spec.name, t.spec.shape)]
        self._others = [t for t in tensors if not options.is_matrix(t.spec.name, t.spec.shape)]
        rest = [_adam_part(i, part, self._others) for i, part in enumerate(partitions)]
        self._adam = Adam(rest, options.adam, backend)
        super().__init__(partitions)
        for i, (partition, state) in enumerate(zip(partitions, self.state, strict=True)):
            stop = max((t.stop for t in self._matrices if t.index == i), default=0)
            momentum = blank(partition, partition.parameter[:stop])
            state.update({"momentum_buffer": momentum, **self._adam.state[i]})
        self._names = frozenset(t.spec.name for t in self._matrices)
        self.rebind(partitions)

    def _new_state(self, partition: FlatPartition) -> dict[str, Tensor]:
        return {}

    def keeps(self, role: str, name: str) -> bool:
        """Whether the state `role` has a meaning for the canonical tensor `name`."""
        return (role == "momentum_buffer") == (name in self._names) or role not in self.state_roles

    def rebind(self, partitions: Sequence[FlatPartition]) -> None:
        """Take weights and gradients of `partitions`, and states, from where they are now."""
        for own, inner in zip(self.state, self._adam.state, strict=True):
            inner.update({role: own[role] for role in inner})
        self._adam.rebind([_adam_part(i, part, self._others) for i, part in enumerate(partitions)])
        self._weights = views(self._matrices, [partition.parameter for partition in partitions])
        self._gradients = views(self._matrices, [partition.gradient for partition in partitions])
        self._momenta = views(self._matrices, [state["momentum_buffer"] for state in self.state])

    def step_parts(self, parts: tuple[int, ...], lr: float, grad_scale: float = 1.0) -> bool:
        """Update the tensors of some partitions in place; `lr` is multiplied by the factors of the options."""
        self._adam.num_steps = self.num_steps
        self._adam.step_parts(parts, lr * self.options.adam_lr_factor, grad_scale)
        for run in runs_of(self._matrices, parts):
            self._step_matrices(run, lr * self.options.lr_factor, grad_scale)
        return False

    def _step_matrices(self, run: slice, lr: float, grad_scale: float) -> None:
        options, momenta = self.options, self._momenta[run]
        gradients = unscaled(self._gradients[run], momenta[0].dtype, grad_scale)
        torch._foreach_lerp_(momenta, gradients, 1.0 - options.momentum)
        directions = momenta
        if options.nesterov:
            directions = list(torch._foreach_lerp(gradients, momenta, options.momentum))
        matrices = self._matrices[run]
        wholes = _assembled(matrices, directions, self._tp)
        for matrix, weight, whole in zip(matrices, self._weights[run], wholes, strict=True):
            lr_mult, decay_mult = matrix.group
            step_size = lr * lr_mult
            orthogonal = orthogonalised(whole, options.num_iterations, self._dtype(whole))
            weight.mul_(1.0 - step_size * options.weight_decay * decay_mult)
            for piece in matrix.pieces:
                own = _run_of(weight, piece)
                own.add_(orthogonal[_index(piece.box)], alpha=-step_size * self._factor(*whole.shape))

    def _dtype(self, whole: Tensor) -> torch.dtype:
        """What a matrix is orthogonalised in: float64 where that is what the weights are kept in."""
        return torch.bfloat16 if self.options.low_precision and whole.dtype != torch.float64 else whole.dtype

    def _factor(self, num_rows: int, num_columns: int) -> float:
        if self.options.matches_adamw:
            return 0.2 * sqrt(max(num_rows, num_columns))
        return sqrt(max(1.0, num_rows / num_columns))


def orthogonalised(matrix: Tensor, num_iterations: int, dtype: torch.dtype) -> Tensor:
    """About U V^T of a `matrix` U S V^T (rows, columns), computed in `dtype` and returned in the matrix's own."""
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if is_tall else matrix).to(dtype)
    x = x / (torch.linalg.vector_norm(x) + _NORM_EPS)
    for _ in range(num_iterations):
        square = x @ x.T
        polynomial = torch.addmm(square, square, square, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return (x.T if is_tall else x).to(matrix.dtype)


def _assembled(matrices: Sequence[WholeTensor], parts: Sequence[Tensor], tp: Group) -> list[Tensor]:
    """The whole matrices of which tensor ranks hold `parts`: every element from the rank where it counts, plus zeros."""
    if tp.size == 1:
        return [part.view(matrix.spec.shape) for matrix, part in zip(matrices, parts, strict=True)]
    bucket = parts[0].new_zeros(sum(matrix.numel for matrix in matrices))
    flat = bucket.split([matrix.numel for matrix in matrices])
    wholes = [piece.view(matrix.spec.shape) for matrix, piece in zip(matrices, flat, strict=True)]
    for matrix, part, whole in zip(matrices, parts, wholes, strict=True):
        for piece in matrix.counted:
            whole[_index(piece.box)] = _run_of(part, piece)
    sum_over(bucket, tp)
    return wholes


def _index(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in zip(box.start, box.stop, strict=True))


def _run_of(part: Tensor, piece: Piece) -> Tensor:
    """The elements of a tensor's local `part` that are `piece`, in the shape of its box."""
    return part[piece.offset : piece.offset + prod(piece.box.shape)].view(piece.box.shape)


def _adam_part(index: int, partition: FlatPartition, others: Sequence[WholeTensor]) -> FlatPartition:
    """The partition as AdamW sees it: nothing but its tensors, and no further than the last of them."""
    mine = [tensor for tensor in others if tensor.index == index]
    segments = tuple(Segment(t.start, t.stop, t.group) for t in mine if t.start < t.stop)
    stop = max((segment.stop for segment in segments), default=0)
    return replace(
        partition,
        parameter=partition.parameter[:stop],
        gradient=partition.gradient[:stop],
        segments=segments,
        weight=None,
    )
