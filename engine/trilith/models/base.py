"""What a model is before it is built: units, canonical tensors, how they split over tensor-parallel ranks. No torch.

`trilith check`, the planner, ZeRO and checkpoints read only these declarations, so they answer at once for any
size. A *unit* is one entry of the pipeline list (`embedding`, `layers.0` ... `layers.L-1`, `head`); a stage is a
run of units. A declared parameter is one local `nn.Parameter`; it may stack several canonical tensors (q, k and v)
along dim 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from trilith.sharding import Box, Piece, ShardSpec, contiguous_strides


@dataclass(frozen=True)
class Init:
    """Initial values: `normal` with standard deviation `std`, `zeros` or `ones`."""

    kind: str
    std: float = 0.0


@dataclass(frozen=True)
class Split:
    """How one dim of a canonical tensor is dealt to tensor-parallel ranks, in `num_blocks` equal blocks.

    `even`: degree divides num_blocks. `padded`: ranks hold ceil(num_blocks / degree) blocks, the last ones with
    padding (vocabulary rows). `kv_heads`: a block is a key/value head and a rank holds those that its `num_queries
    / degree` query heads read; several ranks may hold the same head (Ainslie et al. 2023, GQA).
    """

    dim: int
    num_blocks: int
    rule: str = "even"
    num_queries: int = 0

    def held(self, rank: int, degree: int) -> tuple[int, int, int]:
        """(first block, end block, local block count with padding) of tensor rank `rank` of `degree`."""
        if self.rule == "padded":
            count = -(-self.num_blocks // degree)
            lo = min(rank * count, self.num_blocks)
            return lo, min(lo + count, self.num_blocks), count
        if self.rule == "kv_heads":
            queries, group = self.num_queries // degree, self.num_queries // self.num_blocks
            lo, hi = rank * queries // group, ((rank + 1) * queries - 1) // group + 1
            return lo, hi, hi - lo
        assert self.num_blocks % degree == 0, (self, degree)
        count = self.num_blocks // degree
        return rank * count, (rank + 1) * count, count


@dataclass(frozen=True)
class TensorDecl:
    """One canonical tensor: whole shape, initial values, and its split over tensor ranks (None: all on each)."""

    name: str
    shape: tuple[int, ...]
    init: Init
    split: Split | None = None

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return prod(self.shape)


@dataclass(frozen=True)
class ParameterDecl:
    """One local parameter: `name` is its path in the stage module, `tensors` are stacked along dim 0.

    `flat_unit` names the ZeRO unit whose flat buffer holds it. `decay` tells whether weight decay applies by default.
    `in_sequence_region`: under sequence parallelism its gradient is partial on each tensor rank and must be summed.
    `tie_copy`: 0 for the original, n for its n-th further copy on another stage (same canonical tensor).
    """

    name: str
    tensors: tuple[TensorDecl, ...]
    flat_unit: str
    decay: bool = True
    in_sequence_region: bool = False
    tie_copy: int = 0


@dataclass(frozen=True)
class UnitDecl:
    """One entry of the pipeline's list.

    `matmul_flops` are the forward FLOPs a token spends in matrix products with weights, `attention_flops` those of
    the two attention products a token spends over the whole sequence, counted non-causal (half of it is causal); of
    block-sparse attention only the live share.
    """

    name: str
    parameters: tuple[ParameterDecl, ...]
    matmul_flops: float
    attention_flops: float = 0.0

    @property
    def num_parameters(self) -> int:
        """Elements of canonical tensors that are not copies of another unit's."""
        return sum(t.numel for p in self.parameters if p.tie_copy == 0 for t in p.tensors)


@dataclass(frozen=True)
class SummedPiece:
    """A part of a local parameter whose gradient is the sum over several tensor ranks.

    `numel` elements from `offset` of the flattened local parameter go to `exchange_offset` of the parameter's
    exchange area, which has one layout on all tensor ranks; ranks that do not hold a piece contribute zeros.
    """

    offset: int
    numel: int
    exchange_offset: int


@dataclass(frozen=True)
class LocalParameter:
    """A declared parameter as one tensor rank holds it.

    `shape` is local and includes padding. `specs` say where each canonical tensor's boxes lie in the flattened local
    parameter. `summed` and `exchange_numel` describe the gradient sum over tensor ranks (empty: none is needed).
    """

    name: str
    shape: tuple[int, ...]
    specs: tuple[ShardSpec, ...]
    inits: tuple[Init, ...]
    flat_unit: str
    decay: bool
    summed: tuple[SummedPiece, ...]
    exchange_numel: int

    @property
    def numel(self) -> int:
        """Local elements, padding included."""
        return prod(self.shape)


def _first_holder(split: Split, block: int, degree: int) -> int:
    """The lowest tensor rank that holds `block`."""
    return next(r for r in range(degree) if split.held(r, degree)[0] <= block < split.held(r, degree)[1])


def _num_holders(split: Split, block: int, degree: int) -> int:
    return sum(split.held(r, degree)[0] <= block < split.held(r, degree)[1] for r in range(degree))


def local_shape(tensor: TensorDecl, rank: int, degree: int) -> tuple[int, ...]:
    """Shape of the part of `tensor` on tensor rank `rank` of `degree`, padding included."""
    if tensor.split is None:
        return tensor.shape
    dim = tensor.split.dim
    block = tensor.shape[dim] // tensor.split.num_blocks
    count = tensor.split.held(rank, degree)[2]
    return (*tensor.shape[:dim], count * block, *tensor.shape[dim + 1 :])


def local_parameter(decl: ParameterDecl, rank: int, degree: int, sequence_parallel: bool = False) -> LocalParameter:
    """What tensor rank `rank` of `degree` holds of `decl`, and which gradients must be summed over tensor ranks."""
    specs: list[ShardSpec] = []
    summed: list[SummedPiece] = []
    offset = exchange = 0
    shapes = [local_shape(tensor, rank, degree) for tensor in decl.tensors]
    for tensor, shape in zip(decl.tensors, shapes, strict=True):
        split, strides = tensor.split, contiguous_strides(shape)
        pieces: list[Piece] = []
        if split is None:
            box = Box((0,) * len(shape), tensor.shape)
            pieces.append(Piece(box, offset, strides, decl.tie_copy * degree + rank))
            if decl.in_sequence_region and sequence_parallel and degree > 1:
                summed.append(SummedPiece(offset, tensor.numel, exchange))
                exchange += tensor.numel
        else:
            block = tensor.shape[split.dim] // split.num_blocks
            lo, hi, _ = split.held(rank, degree)
            shared = split.rule == "kv_heads" and split.num_blocks % degree != 0
            assert not shared or split.dim == 0, f"{tensor.name}: heads that ranks share lie along dim 0"
            step = 1 if shared else max(hi - lo, 1)
            for at in range(lo, hi, step):
                start, stop = [0] * len(shape), list(tensor.shape)
                start[split.dim], stop[split.dim] = at * block, (at + step) * block
                replica = decl.tie_copy
                if shared:
                    replica = decl.tie_copy * degree + rank - _first_holder(split, at, degree)
                where = offset + (at - lo) * block * strides[split.dim]
                pieces.append(Piece(Box(tuple(start), tuple(stop)), where, strides, replica))
            if shared:
                width = block * strides[split.dim]
                for at in range(split.num_blocks):
                    if _num_holders(split, at, degree) > 1:
                        if lo <= at < hi:
                            summed.append(SummedPiece(offset + (at - lo) * width, width, exchange))
                        exchange += width
        specs.append(ShardSpec(tensor.name, tensor.shape, tuple(pieces)))
        offset += prod(shape)
    rows = sum(shape[0] for shape in shapes)
    return LocalParameter(
        name=decl.name,
        shape=(rows, *shapes[0][1:]),
        specs=tuple(specs),
        inits=tuple(tensor.init for tensor in decl.tensors),
        flat_unit=decl.flat_unit,
        decay=decl.decay,
        summed=tuple(summed),
        exchange_numel=exchange,
    )


def stage_parameters(units: Sequence[UnitDecl]) -> tuple[ParameterDecl, ...]:
    """The declared parameters of a stage made of `units`; a tied copy is left out where its original is present."""
    declared = [p for unit in units for p in unit.parameters]
    originals = {t.name for p in declared if p.tie_copy == 0 for t in p.tensors}
    return tuple(p for p in declared if p.tie_copy == 0 or p.tensors[0].name not in originals)


def num_parameters(units: Sequence[UnitDecl]) -> int:
    """Elements of the whole model, tied copies counted once."""
    return sum(unit.num_parameters for unit in units)


def train_flops_per_token(units: Sequence[UnitDecl], causal: bool) -> float:
    """Model FLOPs per token of forward and backward (3x forward), without recompute.

    Attention is counted over the whole sequence (`causal=False`: Megatron's 12 L h s) or half of it (6 L h s).
    """
    attention = sum(unit.attention_flops for unit in units)
    return 3.0 * (sum(unit.matmul_flops for unit in units) + attention * (0.5 if causal else 1.0))
