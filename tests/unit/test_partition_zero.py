"""Flat layouts as pure arithmetic: order, padding, partitions, groups, counted elements, specs, sums over tensor ranks."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilith.models.base import (
    Init,
    LocalParameter,
    ParameterDecl,
    Split,
    TensorDecl,
    UnitDecl,
    local_parameter,
)
from trilith.optim.groups import GroupKey, multipliers
from trilith.sharding import Box, copies, whole
from trilith.zero.owners import Owners
from trilith.zero.partition import (
    UnitLayout,
    counted_ranges,
    flat_unit_names,
    partition_range,
    partition_segments,
    partition_specs,
    partition_tensors,
    tied_flat_units,
    unit_layouts,
    with_copies,
)

DECAYED, PLAIN = (1.0, 1.0), (1.0, 0.0)
NORMAL = Init("normal", 0.02)


def tensor(name: str, *shape: int, split: Split | None = None) -> TensorDecl:
    return TensorDecl(name, shape, NORMAL, split)


def decl(*tensors: TensorDecl, unit: str = "u", decay: bool = True, region: bool = False) -> ParameterDecl:
    return ParameterDecl(tensors[0].name, tensors, unit, decay, region)


def block(kv_heads: int = 2, heads: int = 6, width: int = 2, hidden: int = 6, unit: str = "u") -> list[ParameterDecl]:
    """A transformer block in small: norms, stacked q, k, v with biases, an output split along dim 1."""
    queries, keys = Split(0, heads), Split(0, kv_heads, "kv_heads", heads)
    weights = [
        tensor(f"{unit}.q.weight", heads * width, hidden, split=queries),
        tensor(f"{unit}.k.weight", kv_heads * width, hidden, split=keys),
        tensor(f"{unit}.v.weight", kv_heads * width, hidden, split=keys),
    ]
    biases = [TensorDecl(w.name.replace("weight", "bias"), w.shape[:1], NORMAL, w.split) for w in weights]
    return [
        decl(tensor(f"{unit}.norm.weight", hidden), unit=unit, decay=False, region=True),
        decl(tensor(f"{unit}.norm.bias", hidden), unit=unit, decay=False, region=True),
        decl(*weights, unit=unit),
        decl(*biases, unit=unit, decay=False),
        decl(tensor(f"{unit}.out.weight", hidden, heads * width, split=Split(1, heads)), unit=unit),
        decl(tensor(f"{unit}.out.bias", hidden), unit=unit, decay=False, region=True),
    ]


def held(parameters: Sequence[ParameterDecl], rank: int = 0, degree: int = 1, sp: bool = False) -> list[LocalParameter]:
    return [local_parameter(p, rank, degree, sp) for p in parameters]


def one_layout(
    parameters: Sequence[ParameterDecl], degree: int = 1, alignment: int = 16, rank: int = 0, tensor_degree: int = 1
) -> UnitLayout:
    (layout,) = unit_layouts(held(parameters, rank, tensor_degree, True), degree, multipliers(), alignment)
    return layout


def ranges_of(layout: UnitLayout) -> list[tuple[int, int]]:
    return [partition_range(layout, rank) for rank in range(layout.degree)]


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("alignment", [1, 16, 64])
def test_partitions_are_equal_aligned_and_cover_the_buffer(degree: int, alignment: int) -> None:
    layout = one_layout(block(), degree, alignment)
    ranges = ranges_of(layout)
    assert [lo for lo, _ in ranges] == [i * (layout.numel // degree) for i in range(degree)]
    assert ranges[-1][1] == layout.numel and layout.numel % (degree * alignment) == 0
    assert all(place.offset % alignment == 0 for place in layout.placed)
    used = sum(place.parameter.numel for place in layout.placed)
    assert used <= layout.numel < used + alignment * (len(layout.placed) + degree)


def test_order_is_group_then_summed_then_declaration() -> None:
    layout = one_layout(block(), rank=1, tensor_degree=3)
    names = [place.parameter.name.removeprefix("u.") for place in layout.placed]
    # Not decayed first; among them, and among the decayed, what is summed over tensor ranks last. k and v are summed
    # here, because three ranks share two heads.
    assert names == ["norm.weight", "norm.bias", "q.bias", "out.bias", "out.weight", "q.weight"]
    assert [segment.group for segment in layout.segments] == [PLAIN, DECAYED]
    assert (layout.segments[0].start, layout.segments[-1].stop) == (0, layout.numel)


def test_stacked_tensors_may_have_different_groups() -> None:
    def group_of(name: str, decay: bool) -> GroupKey:
        return (0.5, 1.0) if ".k." in name else (1.0, 1.0)

    (layout,) = unit_layouts(held([block()[2]]), 1, group_of)
    assert [(s.start, s.stop, s.group[0]) for s in layout.segments] == [(0, 72, 1.0), (72, 96, 0.5), (96, 128, 1.0)]


def test_units_keep_the_order_in_which_they_appear() -> None:
    parameters = held([*block(unit="b"), *block(unit="a")])
    layouts = unit_layouts(parameters, 2, multipliers())
    assert [layout.name for layout in layouts] == ["b", "a"]
    assert layouts[0].numel == layouts[1].numel


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_segments_of_partitions_join_to_the_whole(degree: int) -> None:
    layout = one_layout(block(), degree)
    expected = [group for s in layout.segments for group in [s.group] * (s.stop - s.start)]
    found: list[GroupKey] = []
    for start, stop in ranges_of(layout):
        segments = partition_segments(layout, start, stop)
        assert segments[0].start == 0 and segments[-1].stop == stop - start
        found.extend(group for s in segments for group in [s.group] * (s.stop - s.start))
    assert found == expected


def counted_elements(layouts: Sequence[UnitLayout]) -> dict[tuple[str, tuple[int, ...]], int]:
    """How often each element of each canonical tensor is counted over tensor ranks and partitions."""
    counts: dict[tuple[str, tuple[int, ...]], int] = {}
    for layout in layouts:
        for start, stop in ranges_of(layout):
            here = {i for lo, hi in counted_ranges(layout, start, stop) for i in range(lo, hi)}
            for spec in partition_specs(layout, start, stop, "gradient"):
                for piece in spec.pieces:
                    for index in elements(piece.box):
                        key = (spec.name, index)
                        counts[key] = counts.get(key, 0) + (piece.offset_of(index) in here)
    return counts


def elements(box: Box) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for lo, hi in zip(box.start, box.stop, strict=True):
        found = [(*index, i) for index in found for i in range(lo, hi)]
    return found


@pytest.mark.parametrize("tensor_degree", [1, 2, 3, 6])
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_every_element_is_counted_once_over_all_ranks(tensor_degree: int, degree: int) -> None:
    parameters = [*block(), decl(tensor("u.tokens", 13, 3, split=Split(0, 13, "padded")))]
    layouts = [one_layout(parameters, degree, rank=r, tensor_degree=tensor_degree) for r in range(tensor_degree)]
    counts = counted_elements(layouts)
    assert set(counts.values()) == {1}
    assert len(counts) == sum(t.numel for p in parameters for t in p.tensors)


def test_counted_ranges_span_padding_between_parameters() -> None:
    layout = one_layout(block(), degree=1)
    assert len(counted_ranges(layout, 0, layout.numel)) == 1
    assert counted_ranges(layout, 3, 5) == ((0, 2),)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_specs_of_all_partitions_hold_each_tensor_whole(degree: int) -> None:
    parameters = block()
    layout = one_layout(parameters, degree)
    for part in (t for p in parameters for t in p.tensors):
        target = next(s for s in partition_specs(one_layout(parameters), 0, 10**6, "master") if s.name == part.name)
        covered = 0
        for start, stop in ranges_of(layout):
            for spec in partition_specs(layout, start, stop, "master"):
                assert spec.role == "master"
                if spec.name == part.name:
                    assert all(p.offset >= 0 and p.offset + p.box.numel <= stop - start for p in spec.pieces)
                    covered += sum(c.box.numel for c in copies(spec, target))
        assert covered == whole(part.shape).numel


def test_copies_of_a_spec_are_owned_by_the_first_only() -> None:
    spec = partition_specs(one_layout(block()), 0, 10**6, "master")[0]
    replicas = [{p.replica for p in with_copies(spec, index, 3).pieces} for index in range(3)]
    assert replicas == [{0}, {1}, {2}]


def exchange(layouts: Sequence[UnitLayout], buffers: list[list[float]]) -> None:
    """What the reduction over tensor ranks does: into the exchange areas, their sum, and back."""
    sizes = {layout.exchange_numel for layout in layouts}
    assert len(sizes) == 1, "every tensor rank needs the same exchange area"
    total = [0.0] * sizes.pop()
    for layout, buffer in zip(layouts, buffers, strict=True):
        for p in layout.summed:
            for i in range(p.numel):
                total[p.exchange_offset + i] += buffer[p.offset + i]
    for layout, buffer in zip(layouts, buffers, strict=True):
        for p in layout.summed:
            buffer[p.offset : p.offset + p.numel] = total[p.exchange_offset : p.exchange_offset + p.numel]


@settings(max_examples=60, deadline=None)
@given(
    heads=st.sampled_from([(6, 2, 3), (6, 2, 6), (4, 2, 4), (8, 2, 8), (6, 3, 2), (6, 1, 3), (12, 3, 4), (4, 4, 2)]),
    width=st.integers(1, 9),
    hidden=st.integers(1, 7),
    alignment=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 1000),
)
def test_sums_over_tensor_ranks_reach_exactly_the_shared_elements(
    heads: tuple[int, int, int], width: int, hidden: int, alignment: int, seed: int
) -> None:
    num_heads, kv_heads, degree = heads
    parameters = block(kv_heads, num_heads, width, hidden)
    layouts = [one_layout(parameters, 2, alignment, rank, degree) for rank in range(degree)]
    numbers = random.Random(seed)
    buffers: list[list[float]] = []
    for layout in layouts:
        buffer = [0.0] * layout.numel  # padding is zero, as in a gradient buffer
        for place in layout.placed:
            buffer[place.offset : place.stop] = [float(numbers.randint(1, 99)) for _ in range(place.parameter.numel)]
        buffers.append(buffer)
    expected: dict[tuple[str, tuple[int, ...]], float] = {}
    shared = ("k.", "v.", "norm.", "out.bias")
    places = [
        (rank, spec.name, index, place.offset + piece.offset_of(index))
        for rank, layout in enumerate(layouts)
        for place in layout.placed
        for spec in place.parameter.specs
        for piece in spec.pieces
        for index in elements(piece.box)
    ]
    for rank, name, index, at in places:
        expected[name, index] = expected.get((name, index), 0.0) + buffers[rank][at]
    exchange(layouts, buffers)
    for rank, name, index, at in places:
        assert buffers[rank][at] == expected[name, index], (rank, name, index)
    for layout, buffer in zip(layouts, buffers, strict=True):
        real = {i for place in layout.placed for i in range(place.offset, place.stop)}
        assert all(value == 0.0 for i, value in enumerate(buffer) if i not in real)
        names = {place.parameter.name.removeprefix("u.") for place in layout.placed if place.parameter.summed}
        assert all(name.startswith(("q.", *shared)) for name in names)


def test_norms_under_sequence_parallelism_are_summed_in_place() -> None:
    norms = [p for p in block() if "norm" in p.name or p.name == "u.out.bias"]
    layout = one_layout(norms, degree=4, tensor_degree=2)
    assert layout.sums_in_place and len(layout.summed) == 1
    assert not one_layout(block(), rank=1, tensor_degree=3).sums_in_place
    assert one_layout(norms).exchange_numel == 0


def test_ties_and_names_come_from_the_declarations() -> None:
    tokens = tensor("tokens", 8, 2)
    first = UnitDecl("embedding", (ParameterDecl("tokens", (tokens,), "tied"),), 0.0)
    last = UnitDecl("head", (*block(unit="head"), ParameterDecl("out", (tokens,), "tied", tie_copy=1)), 0.0)
    assert flat_unit_names([first, last]) == ("tied", "head")
    assert tied_flat_units([first, last]) == {"tied"}
    assert tied_flat_units([first]) == frozenset()


# ------------------------------------------------------------------------------------------------------------ owners


def owned_layouts(
    units: Sequence[Sequence[ParameterDecl]], owners: Owners, rank: int = 0, tensor_degree: int = 1, alignment: int = 16
) -> list[UnitLayout]:
    """The layouts of all units of a rank, dealt to owners one after the other."""
    return [
        layout
        for unit in units
        for layout in unit_layouts(
            held(unit, rank, tensor_degree, True), owners.degree, multipliers(), alignment, owners
        )
    ]


def owner_of(layout: UnitLayout) -> dict[str, int]:
    """Parameter name -> the data rank whose partition holds all of it."""
    found = {}
    for place in layout.placed:
        (owner,) = (r for r, (lo, hi) in enumerate(ranges_of(layout)) if lo <= place.offset and place.stop <= hi)
        found[place.parameter.name] = owner
    return found


models = st.lists(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=6), min_size=1, max_size=5
)


@settings(max_examples=100, deadline=None)
@given(model=models, degree=st.integers(1, 5), tensor_degree=st.sampled_from([1, 2, 3]))
def test_owners_hold_whole_parameters_and_are_balanced(
    model: list[list[tuple[int, int]]], degree: int, tensor_degree: int
) -> None:
    units = [
        [
            decl(tensor(f"{u}.{i}", *shape, split=Split(0, shape[0], "padded")), unit=f"u{u}", decay=i % 2 == 0)
            for i, shape in enumerate(shapes)
        ]
        for u, shapes in enumerate(model)
    ]
    chosen = []
    for rank in range(tensor_degree):
        owners = Owners(degree)
        layouts = owned_layouts(units, owners, rank, tensor_degree)
        for layout in layouts:
            assert layout.bounds[0] == 0 and len(layout.bounds) == degree + 1 and sum(layout.sizes) == layout.numel
            assert all(bound % 16 == 0 for bound in layout.bounds) and min(layout.sizes) >= 0
            assert all(place.offset % 16 == 0 for place in layout.placed)
            used = sum(place.parameter.numel for place in layout.placed)
            assert used <= layout.numel < used + 16 * len(layout.placed)
            names = [spec.name for lo, hi in ranges_of(layout) for spec in partition_tensors(layout, lo, hi)]
            assert names == [spec.name for place in layout.placed for spec in place.parameter.specs]
        chosen.append([owner_of(layout) for layout in layouts])
        largest = max(p.tensors[0].numel for unit in units for p in unit)
        assert sum(owners.loads) == sum(p.tensors[0].numel for unit in units for p in unit)
        assert max(owners.loads) - min(owners.loads) <= largest
    assert all(other == chosen[0] for other in chosen)


@pytest.mark.parametrize("tensor_degree", [1, 2, 3, 6])
@pytest.mark.parametrize("degree", [1, 2, 3, 7])
def test_what_owners_hold_is_what_even_partitions_hold(tensor_degree: int, degree: int) -> None:
    units = [
        [*block(unit=f"l{i}"), decl(tensor(f"l{i}.t", 13, 3, split=Split(0, 13, "padded")), unit=f"l{i}")]
        for i in (0, 1)
    ]
    ranks = [owned_layouts(units, Owners(degree), r, tensor_degree) for r in range(tensor_degree)]
    assert len({tuple(tuple(owner_of(layout).items()) for layout in layouts) for layouts in ranks}) == 1
    for at, unit in enumerate(units):
        layouts = [layouts[at] for layouts in ranks]
        assert len({layout.exchange_numel for layout in layouts}) == 1
        counts = counted_elements(layouts)
        assert set(counts.values()) == {1}
        assert len(counts) == sum(t.numel for p in unit for t in p.tensors)
        for layout in layouts:
            groups = [group for s in layout.segments for group in [s.group] * (s.stop - s.start)]
            cut = [
                group
                for lo, hi in ranges_of(layout)
                for s in partition_segments(layout, lo, hi)
                for group in [s.group] * (s.stop - s.start)
            ]
            assert groups == cut and len(groups) == layout.numel
            for lo, hi in ranges_of(layout):
                tensors = {s.name: s for s in partition_tensors(layout, lo, hi) if s.pieces}
                assert tensors == {s.name: s for s in partition_specs(layout, lo, hi, "weight")}


def test_a_rank_that_holds_padding_only_lists_the_tensor() -> None:
    unit = [decl(tensor("t", 2, 3, split=Split(0, 2, "padded")))]
    (layout,) = owned_layouts([unit], Owners(2), 2, 3)
    assert partition_specs(layout, 0, layout.numel, "weight") == ()
    assert [(s.name, s.pieces) for s in partition_tensors(layout, 0, layout.numel)] == [("t", ())]


def test_inside_a_part_parameters_lie_by_group_and_summed_last() -> None:
    (layout,) = owned_layouts([block()], Owners(2), 1, 3)
    owner = owner_of(layout)
    names = [(owner[place.parameter.name], place.parameter.name.removeprefix("u.")) for place in layout.placed]
    # q, k and v are the largest parameter and have rank 0 to themselves until the others have as much.
    assert names == [
        (0, "q.weight"),
        *((1, name) for name in ("norm.weight", "norm.bias", "q.bias", "out.bias", "out.weight")),
    ]


def test_tied_units_have_one_layout_whatever_else_a_stage_holds() -> None:
    tied = [decl(tensor("tokens", 30, 2, split=Split(0, 30, "padded")), unit="tied")]
    first = owned_layouts([tied, block(unit="a")], Owners(3, frozenset({"tied"})))
    last = owned_layouts([block(unit="b"), block(unit="c"), tied], Owners(3, frozenset({"tied"})))
    assert first[0] == last[2]
    balanced = Owners(3, frozenset({"tied"}))
    owned_layouts([tied, block(unit="a"), block(unit="b")], balanced)
    assert max(balanced.loads) - min(balanced.loads) <= 72
