"""A shard is a value: which boxes of a canonical tensor lie where in a local storage.

Pure rank-free arithmetic, no torch. Tensor-parallel layers, ZeRO partitions and checkpoints all speak it, so that
resharding between any two of them is one function: box intersection. A canonical tensor is named by its global layer
index and is whole, unfused and unpadded; a fused QKV weight, a flat ZeRO cut, replicated K/V heads and a padded
vocabulary are all just several pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod


@dataclass(frozen=True)
class Box:
    """A half-open box of a canonical tensor: `start[d] <= index[d] < stop[d]` for every dim d. A scalar has no dims."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent per dim."""
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """The common box, or None where there is none."""
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        stop = tuple(min(a, b) for a, b in zip(self.stop, other.stop, strict=True))
        if any(a >= b for a, b in zip(start, stop, strict=True)):
            return None
        return Box(start, stop)


def whole(shape: tuple[int, ...]) -> Box:
    """The box that covers a tensor of `shape`."""
    return Box((0,) * len(shape), tuple(shape))


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    strides: list[int] = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


@dataclass(frozen=True)
class Piece:
    """A box of the canonical tensor and its place in a local storage.

    Element `index` of the box lies at `offset + sum((index[d] - box.start[d]) * strides[d])`, in elements.
    `replica` counts the copies of the box over all ranks: 0 is the one that counts (norms, saving).
    """

    box: Box
    offset: int
    strides: tuple[int, ...]
    replica: int = 0

    def offset_of(self, start: tuple[int, ...]) -> int:
        """Where the element `start` (canonical index) lies in the local storage."""
        return self.offset + sum((a - b) * s for a, b, s in zip(start, self.box.start, self.strides, strict=True))


@dataclass(frozen=True)
class ShardSpec:
    """The part of one canonical tensor that one local storage holds."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    role: str = "weight"

    @property
    def numel(self) -> int:
        """Elements held locally."""
        return sum(piece.box.numel for piece in self.pieces)

    def shifted(self, by: int) -> ShardSpec:
        """The same shard in a storage where it starts `by` elements later."""
        return replace(self, pieces=tuple(replace(p, offset=p.offset + by) for p in self.pieces))

    def with_role(self, role: str) -> ShardSpec:
        """The same boxes for another role (`weight`, `master`, `exp_avg`, ...)."""
        return replace(self, role=role)

    def counted_ranges(self) -> list[tuple[int, int]]:
        """Local element ranges [lo, hi) whose piece is replica 0; pieces must be row-major in the storage."""
        ranges: list[tuple[int, int]] = []
        for piece in self.pieces:
            if piece.replica == 0:
                ranges.extend(_runs(piece))
        return merge_ranges(ranges)


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sort half-open ranges and join those that touch."""
    merged: list[tuple[int, int]] = []
    for lo, hi in sorted(ranges):
        if merged and lo <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(hi, merged[-1][1]))
        else:
            merged.append((lo, hi))
    return merged


def _runs(piece: Piece) -> Iterator[tuple[int, int]]:
    """Contiguous local ranges of a piece: one if it is dense, else one per innermost row."""
    shape, strides = piece.box.shape, piece.strides
    run = 1
    dim = len(shape)
    while dim > 0 and (strides[dim - 1] == run or shape[dim - 1] == 1):
        run *= shape[dim - 1]
        dim -= 1

    def walk(d: int, offset: int) -> Iterator[tuple[int, int]]:
        if d == dim:
            yield offset, offset + run
            return
        for i in range(shape[d]):
            yield from walk(d + 1, offset + i * strides[d])

    return walk(0, piece.offset)


def _flat_boxes(shape: tuple[int, ...], lo: int, hi: int) -> Iterator[tuple[Box, int]]:
    """Cut the row-major range [lo, hi) of a tensor of `shape` into at most 2 * dims - 1 boxes with their starts."""
    if lo >= hi:
        return
    if not shape:
        yield Box((), ()), 0
        return
    row = prod(shape[1:])
    first, last = lo // row, (hi - 1) // row
    if len(shape) == 1:
        yield Box((lo,), (hi,)), lo
        return
    if first == last and (lo > first * row or hi < (first + 1) * row):
        for box, at in _flat_boxes(shape[1:], lo - first * row, hi - first * row):
            yield Box((first, *box.start), (first + 1, *box.stop)), first * row + at
        return
    if lo > first * row:
        yield from _flat_boxes(shape, lo, (first + 1) * row)
        first += 1
    full = hi // row
    if full > first:
        rest = tuple(shape[1:])
        yield Box((first,) + (0,) * len(rest), (full, *rest)), first * row
    if hi > full * row:
        yield from _flat_boxes(shape, full * row, hi)


def cut_flat(spec: ShardSpec, lo: int, hi: int) -> ShardSpec:
    """The part of `spec` that lies in the range [lo, hi) of its storage, with offsets counted from `lo`.

    Every piece must be dense (row-major, no gaps): that is how parameters lie in ZeRO's flat buffers.
    """
    pieces: list[Piece] = []
    for piece in spec.pieces:
        shape = piece.box.shape
        assert piece.strides == contiguous_strides(shape), "only dense pieces can be cut flat"
        begin, end = max(lo, piece.offset), min(hi, piece.offset + piece.box.numel)
        for box, at in _flat_boxes(shape, begin - piece.offset, end - piece.offset):
            start = tuple(a + b for a, b in zip(box.start, piece.box.start, strict=True))
            stop = tuple(a + b for a, b in zip(box.stop, piece.box.start, strict=True))
            pieces.append(Piece(Box(start, stop), piece.offset + at - lo, contiguous_strides(box.shape), piece.replica))
    return replace(spec, pieces=tuple(pieces))


@dataclass(frozen=True)
class Copy:
    """One strided copy between two storages: `shape` elements from a source view to a target view."""

    shape: tuple[int, ...]
    source_offset: int
    source_strides: tuple[int, ...]
    target_offset: int
    target_strides: tuple[int, ...]
    box: Box


def copies(source: ShardSpec, target: ShardSpec) -> list[Copy]:
    """All copies that bring what `source` holds of `target` into place: the whole of resharding.

    Raises AssertionError if the two speak of different canonical tensors.
    """
    assert source.name == target.name and source.shape == target.shape, (source.name, target.name)
    plan: list[Copy] = []
    for want in target.pieces:
        for have in source.pieces:
            common = want.box.intersect(have.box)
            if common is not None:
                plan.append(
                    Copy(
                        common.shape,
                        have.offset_of(common.start),
                        have.strides,
                        want.offset_of(common.start),
                        want.strides,
                        common,
                    )
                )
    return plan
