"""Boxes and their cuts by brute force, resharding between random tilings, and the element ranges that count."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trilith.sharding import (
    Box,
    Piece,
    ShardSpec,
    contiguous_strides,
    copies,
    cut_flat,
    merge_ranges,
    whole,
)

Index = tuple[int, ...]
shapes = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


def indices(box: Box) -> list[Index]:
    """Every index of a box, row-major."""
    return list(itertools.product(*(range(lo, hi) for lo, hi in zip(box.start, box.stop, strict=True))))


def places(spec: ShardSpec) -> list[tuple[int, Index]]:
    """(local offset, canonical index) of every element that a spec holds."""
    return [(piece.offset_of(index), index) for piece in spec.pieces for index in indices(piece.box)]


def random_box(draw: random.Random, shape: Index) -> Box:
    ends = [sorted(draw.sample(range(extent + 1), 2)) for extent in shape]
    return Box(tuple(lo for lo, _ in ends), tuple(hi for _, hi in ends))


def test_box() -> None:
    box = Box((1, 0, 2), (3, 4, 3))
    assert box.shape == (2, 4, 1) and box.numel == 8 == len(indices(box))
    assert whole((2, 3)) == Box((0, 0), (2, 3))
    assert (whole(()).shape, whole(()).numel) == ((), 1)
    assert Box((2,), (2,)).numel == 0


def test_intersection_is_the_common_elements() -> None:
    draw = random.Random(1)
    for _ in range(300):
        shape = tuple(draw.randint(1, 5) for _ in range(draw.randint(0, 3)))
        a, b = random_box(draw, shape), random_box(draw, shape)
        common = a.intersect(b)
        assert common == b.intersect(a)
        assert (indices(common) if common else []) == [i for i in indices(a) if i in set(indices(b))]
    assert Box((), ()).intersect(Box((), ())) == Box((), ())
    assert Box((0,), (2,)).intersect(Box((2,), (4,))) is None


@given(shapes)
def test_strides_are_torch_s(shape: Index) -> None:
    assert contiguous_strides(shape) == torch.empty(shape).stride()


def test_offsets_of_a_piece() -> None:
    """A box that is a window of a wider storage: rows 2-3, columns 1-3 of a tensor, at 10 with 8 columns a row."""
    piece = Piece(Box((2, 1), (4, 4)), offset=10, strides=(8, 1))
    assert piece.offset_of((2, 1)) == 10 and piece.offset_of((3, 3)) == 10 + 8 + 2
    spec = ShardSpec("w", (6, 6), (piece,))
    assert spec.numel == 6
    moved = spec.shifted(5)
    assert [offset for offset, _ in places(moved)] == [offset + 5 for offset, _ in places(spec)]
    assert moved.with_role("exp_avg").role == "exp_avg" and spec.role == "weight"
    assert spec.with_role("master").pieces == spec.pieces


@settings(max_examples=200, deadline=None)
@given(shapes, st.data())
def test_cut_flat_by_brute_force(shape: Index, data: st.DataObject) -> None:
    """The cut holds exactly the elements whose place lies in the range, at their place less its beginning."""
    outer = tuple(extent + data.draw(st.integers(0, 2)) for extent in shape)
    start = tuple(data.draw(st.integers(0, a - b)) for a, b in zip(outer, shape, strict=True))
    box = Box(start, tuple(a + b for a, b in zip(start, shape, strict=True)))
    first, gap = data.draw(st.integers(0, 7)), data.draw(st.integers(0, 3))
    dense = contiguous_strides(shape)
    spec = ShardSpec("w", outer, (Piece(box, first, dense), Piece(box, first + box.numel + gap, dense, replica=2)))
    end = first + 2 * box.numel + gap + 3
    lo, hi = sorted(data.draw(st.lists(st.integers(0, end), min_size=2, max_size=2)))
    cut = cut_flat(spec, lo, hi)
    expected = [(offset - lo, index) for offset, index in places(spec) if lo <= offset < hi]
    assert sorted(places(cut)) == sorted(expected)
    assert (cut.name, cut.shape, cut.role) == (spec.name, spec.shape, spec.role)
    assert all(piece.strides == contiguous_strides(piece.box.shape) for piece in cut.pieces)
    assert {piece.replica for piece in cut.pieces} <= {0, 2}
    counted = {offset - lo for offset, _ in places(ShardSpec("w", outer, spec.pieces[:1])) if lo <= offset < hi}
    assert {i for begin, stop in cut.counted_ranges() for i in range(begin, stop)} == counted


@given(shapes, st.lists(st.integers(0, 60), max_size=5))
def test_consecutive_cuts_tile_the_tensor(shape: Index, cuts: list[int]) -> None:
    """What ZeRO does: the partitions of a flat buffer together hold each element once, in few boxes."""
    numel = prod(shape)
    spec = ShardSpec("w", shape, (Piece(whole(shape), 0, contiguous_strides(shape)),))
    ends = sorted({0, numel, *(cut for cut in cuts if cut < numel)})
    found: list[Index] = []
    for lo, hi in itertools.pairwise(ends):
        part = cut_flat(spec, lo, hi)
        assert part.numel == hi - lo and len(part.pieces) <= max(2 * len(shape) - 1, 1)
        found += [index for _, index in sorted(places(part))]
    assert found == indices(whole(shape))


def test_only_dense_pieces_are_cut_flat() -> None:
    spec = ShardSpec("w", (4, 4), (Piece(Box((0, 0), (4, 2)), 0, (4, 1)),))
    with pytest.raises(AssertionError, match="dense"):
        cut_flat(spec, 0, 4)


def tiling(draw: random.Random, shape: Index) -> list[Box]:
    """A random grid of boxes that covers a tensor once; boxes of one slab may be cut at their own points."""
    if not shape:
        return [Box((), ())]
    edges = sorted({0, shape[0], *(draw.randint(0, shape[0]) for _ in range(2))})
    boxes = []
    for lo, hi in itertools.pairwise(edges):
        boxes += [Box((lo, *box.start), (hi, *box.stop)) for box in tiling(draw, shape[1:])]
    return boxes


def deal(draw: random.Random, shape: Index, num_ranks: int) -> list[tuple[ShardSpec, int]]:
    """A random tiling dealt to ranks, each box in a window of the rank's storage with gaps; (spec, storage size)."""
    held: list[list[Piece]] = [[] for _ in range(num_ranks)]
    sizes = [draw.randint(0, 3) for _ in range(num_ranks)]
    for box in tiling(draw, shape):
        rank = draw.randrange(num_ranks)
        window = tuple(extent + draw.randint(0, 1) for extent in box.shape)
        order = list(range(len(window)))
        draw.shuffle(order)  # also transposed storages
        strides, step = [0] * len(window), 1
        for dim in order:
            strides[dim], step = step, step * window[dim]
        held[rank].append(Piece(box, sizes[rank], tuple(strides)))
        sizes[rank] += step
    return [(ShardSpec("w", shape, tuple(pieces)), size) for pieces, size in zip(held, sizes, strict=True)]


def run_copies(source: torch.Tensor, have: ShardSpec, target: torch.Tensor, want: ShardSpec) -> int:
    moved = 0
    for copy in copies(have, want):
        part = source.as_strided(copy.shape, copy.source_strides, copy.source_offset)
        target.as_strided(copy.shape, copy.target_strides, copy.target_offset).copy_(part)
        assert copy.shape == copy.box.shape
        moved += prod(copy.shape)
    return moved


def storages(dealt: list[tuple[ShardSpec, int]]) -> list[tuple[ShardSpec, torch.Tensor]]:
    return [(spec, torch.full((size,), -1, dtype=torch.int64)) for spec, size in dealt]


@settings(max_examples=100, deadline=None)
@given(shapes, st.integers(0, 2**32))
def test_resharding_between_random_tilings(shape: Index, seed: int) -> None:
    """Whole tensor -> one tiling -> another -> whole: the same elements, each copied once; gaps stay untouched."""
    draw = random.Random(seed)
    canonical = torch.arange(prod(shape))
    one = (ShardSpec("w", shape, (Piece(whole(shape), 0, contiguous_strides(shape)),)), canonical)
    current = [one]
    for num_ranks in (draw.randint(1, 4), draw.randint(1, 4)):
        target = storages(deal(draw, shape, num_ranks))
        moved = sum(run_copies(s, have, t, want) for have, s in current for want, t in target)
        assert moved == prod(shape)
        for spec, storage in target:
            assert int((storage >= 0).sum()) == spec.numel
            assert all(int(storage[offset]) == flat_index(shape, index) for offset, index in places(spec))
        current = target
    back = torch.full_like(canonical, -1)
    for spec, storage in current:
        run_copies(storage, spec, back, one[0])
    assert torch.equal(back, canonical)


def flat_index(shape: Index, index: Index) -> int:
    return sum(i * s for i, s in zip(index, contiguous_strides(shape), strict=True))


def test_copies_are_between_equal_tensors_only() -> None:
    spec = ShardSpec("a", (2,), (Piece(whole((2,)), 0, (1,)),))
    for other in (ShardSpec("b", (2,), spec.pieces), ShardSpec("a", (3,), spec.pieces)):
        with pytest.raises(AssertionError):
            copies(spec, other)


def dense_run_cases() -> Iterator[tuple[Piece, list[tuple[int, int]]]]:
    yield Piece(Box((0, 0), (3, 4)), 5, (4, 1)), [(5, 17)]
    yield Piece(Box((0, 0), (3, 4)), 5, (8, 1)), [(5, 9), (13, 17), (21, 25)]  # a column-parallel part of wider rows
    yield Piece(Box((0, 0, 0), (2, 2, 3)), 0, (12, 3, 1)), [(0, 6), (12, 18)]
    yield Piece(Box((0, 0), (1, 4)), 2, (99, 1)), [(2, 6)]  # a dim of one element may have any stride
    yield Piece(Box((0, 0), (3, 1)), 0, (1, 7)), [(0, 3)]
    yield Piece(Box((), ()), 9, ()), [(9, 10)]


@pytest.mark.parametrize(("piece", "expected"), list(dense_run_cases()))
def test_counted_ranges(piece: Piece, expected: list[tuple[int, int]]) -> None:
    assert ShardSpec("w", piece.box.stop, (piece,)).counted_ranges() == expected


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**32))
def test_counted_ranges_are_the_elements_of_replica_0(shape: Index, seed: int) -> None:
    """Any windows with gaps, row-major: as sets of places, with no range touching the next."""
    draw = random.Random(seed)
    pieces, offset = [], 0
    for box in tiling(draw, shape):
        window = tuple(extent + draw.randint(0, 1) for extent in box.shape)
        pieces.append(Piece(box, offset, contiguous_strides(window), replica=draw.randint(0, 1)))
        offset += prod(window)
    spec = ShardSpec("w", shape, tuple(pieces))
    ranges = spec.counted_ranges()
    counted = ShardSpec("w", shape, tuple(piece for piece in pieces if piece.replica == 0))
    assert [i for lo, hi in ranges for i in range(lo, hi)] == sorted(place for place, _ in places(counted))
    assert all(before[1] < after[0] for before, after in itertools.pairwise(ranges))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)).map(lambda p: (p[0], p[0] + p[1])), max_size=8))
def test_merge_ranges(ranges: list[tuple[int, int]]) -> None:
    merged = merge_ranges(ranges)
    assert {i for r in merged for i in range(*r)} == {i for r in ranges for i in range(*r)}
    assert all(before[1] < after[0] for before, after in itertools.pairwise(merged))


def test_merge_ranges_joins_what_touches() -> None:
    assert merge_ranges([(4, 6), (0, 2), (2, 3), (5, 9)]) == [(0, 3), (4, 9)]
    assert merge_ranges([]) == []
