"""How a unit's parameters lie in one flat buffer, and how that buffer is dealt to data ranks. Pure, no torch.

A unit is what one block of the model holds. Its parameters lie one after another, each at a multiple of `alignment`
elements, and the buffer is padded so that every data rank owns an equal partition that starts at such a multiple too; or,
where the optimizer needs tensors whole, unequal partitions, each made of the parameters that `owners` gave to its rank.
Parameters with the same multipliers lie together, so that the optimizer sees few long slices; among them, those whose
gradient is summed over tensor ranks lie together, so that this sum is one or two copies. Stage 0 is degree 1: the
partition is the whole buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod

from trilith.models.base import LocalParameter, SummedPiece, UnitDecl
from trilith.optim.groups import GroupKey, GroupOf, Segment
from trilith.sharding import ShardSpec, cut_flat, merge_ranges
from trilith.zero.owners import Owners

# A cache line or a vector register of any dtype: what lies at such multiples is treated alike wherever it is cut.
ALIGNMENT = 16


@dataclass(frozen=True)
class PlacedParameter:
    """A local parameter and where it begins in its unit's flat buffer, in elements."""

    parameter: LocalParameter
    offset: int

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.offset + self.parameter.numel


@dataclass(frozen=True)
class UnitLayout:
    """The flat buffer of one unit.

    `bounds`: data rank r owns the elements from bounds[r] to bounds[r + 1]; all are multiples of the alignment, and even
    unless there are owners. `segments` cover the whole buffer, padding included. `summed`: runs whose gradient is summed
    over tensor ranks through an area of `exchange_numel` elements, which has one layout on all tensor ranks.
    """

    name: str
    placed: tuple[PlacedParameter, ...]
    bounds: tuple[int, ...]
    segments: tuple[Segment, ...]
    summed: tuple[SummedPiece, ...]
    exchange_numel: int

    @property
    def numel(self) -> int:
        """Elements of the buffer, with padding."""
        return self.bounds[-1]

    @property
    def degree(self) -> int:
        """Number of partitions."""
        return len(self.bounds) - 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each partition."""
        return tuple(stop - start for start, stop in zip(self.bounds, self.bounds[1:], strict=False))

    @property
    def uneven_sizes(self) -> tuple[int, ...] | None:
        """The sizes, where collectives must be told because they differ."""
        return self.sizes if len(set(self.sizes)) > 1 else None

    @property
    def sums_in_place(self) -> bool:
        """Whether the summed run is one and fills the exchange area, so that no copy is needed."""
        return len(self.summed) == 1 and self.summed[0].numel == self.exchange_numel


def unit_layouts(
    parameters: Sequence[LocalParameter],
    degree: int,
    group_of: GroupOf,
    alignment: int = ALIGNMENT,
    owners: Owners | None = None,
) -> tuple[UnitLayout, ...]:
    """One flat buffer per `flat_unit`, in the order in which the units first appear.

    `degree`: number of partitions. `group_of` gives each canonical tensor its parameter group. With `owners` (one for all
    stages of a rank, in order) every parameter lies whole in one partition.
    """
    assert owners is None or owners.degree == degree, (owners, degree)
    units: dict[str, list[LocalParameter]] = {}
    for parameter in parameters:
        units.setdefault(parameter.flat_unit, []).append(parameter)
    dealt = {name: None if owners is None else owners.deal(name, members) for name, members in units.items()}
    return tuple(_layout(name, units[name], degree, group_of, alignment, dealt[name]) for name in units)


def split_small(
    parameters: Sequence[LocalParameter], threshold: int, most: int
) -> tuple[tuple[LocalParameter, ...], tuple[LocalParameter, ...]]:
    """(those that stay whole at stage 3 for being small, the others), each in order.

    Small are at most `threshold` elements; of these the smallest, as long as they are not more than `most` together.
    Sizes are those of the canonical tensors, so that all tensor ranks choose the same.
    """
    sizes = [sum(prod(spec.shape) for spec in parameter.specs) for parameter in parameters]
    small, total = set(), 0
    for index in sorted(range(len(parameters)), key=sizes.__getitem__):
        total += sizes[index]
        if sizes[index] > threshold or total > most:
            break
        small.add(index)
    kept = tuple(p for i, p in enumerate(parameters) if i in small)
    return kept, tuple(p for i, p in enumerate(parameters) if i not in small)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _layout(
    name: str,
    members: Sequence[LocalParameter],
    degree: int,
    group_of: GroupOf,
    alignment: int,
    owners: Sequence[int] | None,
) -> UnitLayout:
    groups = [_tensor_groups(parameter, group_of) for parameter in members]
    owner = owners or [0] * len(members)
    order = sorted(range(len(members)), key=lambda i: (owner[i], groups[i][0][1], bool(members[i].exchange_numel), i))
    placed: list[PlacedParameter] = []
    starts: list[tuple[int, GroupKey]] = []
    summed: list[SummedPiece] = []
    padding: dict[tuple[int, int], int] = {}
    offset = exchange = exchange_stop = 0
    stops = [0] * degree
    for i in order:
        parameter = members[i]
        placed.append(PlacedParameter(parameter, offset))
        starts.extend((offset + at, group) for at, group in groups[i])
        summed.extend(SummedPiece(offset + p.offset, p.numel, exchange + p.exchange_offset) for p in parameter.summed)
        stop, exchange_stop = offset + parameter.numel, exchange + parameter.exchange_numel
        offset, exchange = _round_up(stop, alignment), _round_up(exchange_stop, alignment)
        if offset - stop == exchange - exchange_stop:
            padding[stop, exchange_stop] = offset - stop
        stops[owner[i]] = offset
    if owners is None:
        size = _round_up(offset, degree * alignment) // degree
        stops = [size * (rank + 1) for rank in range(degree)]
    bounds = (0, *accumulate(stops, max))
    return UnitLayout(
        name=name,
        placed=tuple(placed),
        bounds=bounds,
        segments=_segments(starts, bounds[-1]),
        summed=_joined(summed, padding),
        exchange_numel=exchange_stop,
    )


def _tensor_groups(parameter: LocalParameter, group_of: GroupOf) -> list[tuple[int, GroupKey]]:
    """(first element, group) of each canonical tensor stacked in a local parameter."""
    starts: list[tuple[int, GroupKey]] = []
    for index, spec in enumerate(parameter.specs):
        # The first tensor begins the parameter even where its own pieces do not (a rank that holds padding only).
        start = min((piece.offset for piece in spec.pieces), default=parameter.numel) if index else 0
        starts.append((start, group_of(spec.name, parameter.decay)))
    return starts


def _segments(starts: Iterable[tuple[int, GroupKey]], numel: int) -> tuple[Segment, ...]:
    """Runs of equal group from the points where one begins; padding belongs to what stands before it."""
    merged: list[tuple[int, GroupKey]] = []
    for start, group in starts:
        if not merged or merged[-1][1] != group:
            merged.append((start, group))
    stops = [start for start, _ in merged[1:]] + [numel]
    return tuple(
        Segment(start, stop, group) for (start, group), stop in zip(merged, stops, strict=True) if start < stop
    )


def _joined(pieces: Sequence[SummedPiece], padding: Mapping[tuple[int, int], int]) -> tuple[SummedPiece, ...]:
    """Fewer, longer runs: pieces that follow each other in buffer and exchange area alike.

    `padding`: (buffer offset, exchange offset) where equally long padding begins in both -> its length.
    """
    joined: list[SummedPiece] = []
    for piece in pieces:
        if joined:
            last = joined[-1]
            ends = (last.offset + last.numel, last.exchange_offset + last.numel)
            gap = piece.offset - ends[0]
            if piece.exchange_offset - ends[1] == gap and gap in (0, padding.get(ends, 0)):
                joined[-1] = replace(last, numel=last.numel + gap + piece.numel)
                continue
        joined.append(piece)
    return tuple(joined)


def partition_range(layout: UnitLayout, rank: int) -> tuple[int, int]:
    """The elements [start, stop) of the flat buffer that data rank `rank` owns."""
    assert 0 <= rank < layout.degree, (rank, layout.degree)
    return layout.bounds[rank], layout.bounds[rank + 1]


def partition_segments(layout: UnitLayout, start: int, stop: int) -> tuple[Segment, ...]:
    """The parameter groups inside [start, stop) of the buffer, counted from `start`."""
    cut = (Segment(max(s.start, start), min(s.stop, stop), s.group) for s in layout.segments)
    return tuple(Segment(s.start - start, s.stop - start, s.group) for s in cut if s.start < s.stop)


def counted_ranges(layout: UnitLayout, start: int, stop: int) -> tuple[tuple[int, int], ...]:
    """Ranges inside [start, stop), counted from `start`, of the elements that enter a norm on this rank.

    Those whose piece is replica 0. The padding between parameters is taken along where it joins two ranges: its gradient
    is zero, and one long range is summed faster than several short ones.
    """
    real = [
        (lo + place.offset, hi + place.offset)
        for place in layout.placed
        for spec in place.parameter.specs
        for lo, hi in spec.counted_ranges()
    ]
    ends = {hi for _, hi in real}
    begins = {lo for lo, _ in real}
    gaps = [
        (before.stop, after.offset)
        for before, after in zip(layout.placed, layout.placed[1:], strict=False)
        if before.stop in ends and after.offset in begins
    ]
    cut = ((max(lo, start), min(hi, stop)) for lo, hi in merge_ranges([*real, *gaps]))
    return tuple((lo - start, hi - start) for lo, hi in cut if lo < hi)


def partition_specs(layout: UnitLayout, start: int, stop: int, role: str) -> tuple[ShardSpec, ...]:
    """What [start, stop) of the buffer holds of each canonical tensor, offsets counted from `start`."""
    specs = (
        cut_flat(spec.shifted(place.offset), start, stop).with_role(role)
        for place in layout.placed
        for spec in place.parameter.specs
    )
    return tuple(spec for spec in specs if spec.pieces)


def partition_tensors(layout: UnitLayout, start: int, stop: int) -> tuple[ShardSpec, ...]:
    """The canonical tensors of the parameters that lie whole in [start, stop) of the buffer, offsets counted from `start`.

    All tensor ranks list the same tensors in the same order, also one of which a rank holds nothing but padding.
    """
    return tuple(
        spec.shifted(place.offset - start)
        for place in layout.placed
        if start <= place.offset < place.stop <= stop
        for spec in place.parameter.specs
    )


def with_copies(spec: ShardSpec, index: int, count: int) -> ShardSpec:
    """The spec of the copy `index` of `count` equal ones: only copy 0 keeps replica 0, so only it is saved."""
    return replace(spec, pieces=tuple(replace(p, replica=p.replica * count + index) for p in spec.pieces))


def tied_flat_units(units: Sequence[UnitDecl]) -> frozenset[str]:
    """Flat units that several stages may hold, because their tensors are tied."""
    return frozenset(p.flat_unit for unit in units for p in unit.parameters if p.tie_copy > 0)


def flat_unit_names(units: Sequence[UnitDecl]) -> tuple[str, ...]:
    """Every flat unit of a model once, in the model's order: the order in which a global norm is summed."""
    return tuple(dict.fromkeys(p.flat_unit for unit in units for p in unit.parameters))
