"""What optimizers share that treat each canonical tensor as a whole: where it lies here, and which of its copies counts.

Under ZeRO the tensor lies whole in one partition (`zero.owners`); under tensor parallelism its pieces lie in the same
partition of several tensor ranks, some of them several times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from trilith import comm
from trilith.optim.base import FlatPartition, runs
from trilith.optim.groups import GroupKey, Segment
from trilith.sharding import Piece, ShardSpec, merge_ranges
from trilith.topology import Group

ALONE = Group("tp", (0,), 0)


@dataclass(frozen=True)
class WholeTensor:
    """One canonical tensor and its part on this rank: elements [start, stop) of partition number `index`.

    `pieces`: all boxes held here, offsets counted from `start`; `counted`: those of them that count, so that over all
    tensor ranks each element does once.
    """

    spec: ShardSpec
    index: int
    start: int
    stop: int
    group: GroupKey
    pieces: tuple[Piece, ...]
    counted: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return prod(self.spec.shape)

    @property
    def counted_ranges(self) -> list[tuple[int, int]]:
        """Where the counted pieces lie, from `start` on."""
        return merge_ranges((p.offset, p.offset + p.box.numel) for p in self.counted)


def whole_tensors(partitions: Sequence[FlatPartition], tp: Group) -> tuple[WholeTensor, ...]:
    """All tensors of this rank's partitions. All ranks of the tensor-parallel group `tp` must call it."""
    for partition in partitions:
        assert partition.tensors or not partition.parameter.numel(), (
            f"{partition.name}: does not say what tensors it holds"
        )
    found = [(i, p, spec) for i, p in enumerate(partitions) for spec in p.tensors]
    rules = _counting_rules([spec for _, _, spec in found], tp)
    return tuple(_whole(i, part, spec, rule, tp.size) for (i, part, spec), rule in zip(found, rules, strict=True))


def views(tensors: Sequence[WholeTensor], buffers: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor's run of the buffer of its partition."""
    return [buffers[tensor.index][tensor.start : tensor.stop] for tensor in tensors]


def runs_of(tensors: Sequence[WholeTensor], parts: tuple[int, ...]) -> list[slice]:
    """The tensors of some partitions, cut into runs that are not large together; `tensors` stand in the partitions'
    order."""
    found: list[slice] = []
    chosen, start = frozenset(parts), 0
    while start < len(tensors):
        stop = start
        while stop < len(tensors) and tensors[stop].index in chosen:
            stop += 1
        found += (slice(start + r.start, start + r.stop) for r in runs(t.numel for t in tensors[start:stop]))
        start = stop + 1
    return found


def sum_over(tensor: Tensor, tp: Group) -> None:
    """Replace `tensor` by its sum over the group; it may lie in host memory, where nccl does not reach."""
    if tp.backend != "nccl" or tensor.is_cuda:
        comm.all_reduce(tensor, tp)
        return
    on_device = tensor.cuda()
    comm.all_reduce(on_device, tp)
    tensor.copy_(on_device)


def _counts(piece: Piece, rule: int, degree: int) -> bool:
    """Whether a piece counts. Rule 0: it is an original; 1: every piece is; 2: it is the first of its copies.

    A tied copy has no original, yet the stage that holds it must step it exactly as another steps the original. Its
    replica numbers are the number of the tie where tensor ranks (`degree` of them) share no element; where they do, that
    number times `degree`, and from there on one for each copy.
    """
    if rule == 1:
        return True
    return piece.replica == 0 if rule == 0 else piece.replica % degree == 0


def _counting_rules(specs: Sequence[ShardSpec], tp: Group) -> list[int]:
    """For each tensor the rule by which the pieces that count, over all tensor ranks, are the whole tensor once."""
    sums = torch.zeros(len(specs), 3, dtype=torch.float64)
    for row, spec in enumerate(specs):
        for rule in range(3):
            sums[row, rule] = sum(p.box.numel for p in spec.pieces if _counts(p, rule, tp.size))
    sum_over(sums, tp)
    rules = []
    for spec, row in zip(specs, sums.tolist(), strict=True):
        assert prod(spec.shape) in row, f"{spec.name}: does not lie whole in one partition: {row} of {spec.shape}"
        rules.append(row.index(prod(spec.shape)))
    return rules


def _whole(index: int, partition: FlatPartition, spec: ShardSpec, rule: int, degree: int) -> WholeTensor:
    start = min((piece.offset for piece in spec.pieces), default=0)
    stop = max((piece.offset + piece.box.numel for piece in spec.pieces), default=0)
    assert stop - start == spec.numel, f"{spec.name}: pieces must lie one after the other"
    pieces = spec.shifted(-start).pieces
    counted = tuple(piece for piece in pieces if _counts(piece, rule, degree))
    return WholeTensor(spec, index, start, stop, _group_at(partition.segments, start), pieces, counted)


def _group_at(segments: Sequence[Segment], offset: int) -> GroupKey:
    return next(segment.group for segment in segments if segment.start <= offset < segment.stop)
