"""Rank arithmetic, the group plan and its errors: pure."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import product

import pytest

from trilith.errors import TopologyError
from trilith.topology import Degrees, Group, Topology, View, group_plan, groups_of


def ring(pipeline: int) -> tuple[tuple[int, int], ...]:
    """The channels of an interleaved schedule: both directions between neighbours on a ring."""
    if pipeline == 1:
        return ()
    pairs = {(p, (p + 1) % pipeline) for p in range(pipeline)}
    return tuple(sorted(pairs | {(b, a) for a, b in pairs}))


LAYOUTS = [
    Degrees(*sizes)
    for sizes in product((1, 2, 3), (1, 2), (1, 2, 3), (1, 2), (1, 2))
    if Degrees(*sizes).world_size <= 24
]


def test_view_is_row_major_and_invertible() -> None:
    view = View(("a", "b", "c"), (2, 3, 4))
    assert [view.coordinates(rank) for rank in (0, 1, 4, 12, 23)] == [
        (0, 0, 0),
        (0, 0, 1),
        (0, 1, 0),
        (1, 0, 0),
        (1, 2, 3),
    ]
    assert all(view.rank_of(view.coordinates(rank)) == rank for rank in range(24))
    assert view.ranks_along(17, ("c",)) == (16, 17, 18, 19)
    assert view.ranks_along(17, ("b",)) == (13, 17, 21)
    assert view.ranks_along(17, ("c", "a")) == (4, 5, 6, 7, 16, 17, 18, 19)
    assert view.ranks_along(17, ()) == (17,)


def test_dense_layout_by_hand() -> None:
    degrees = Degrees(pipeline=2, shard=2, tensor=2)
    plan = {(g.name, g.ranks) for g in group_plan(degrees, ties=True, channels=[(0, 1), (1, 0)])}
    stages = {(0, 4), (1, 5), (2, 6), (3, 7)}
    assert plan == (
        {("tp", ranks) for ranks in ((0, 1), (2, 3), (4, 5), (6, 7))}
        | {("dp", ranks) for ranks in ((0, 2), (1, 3), (4, 6), (5, 7))}
        | set(product(("pp", "pp_up", "pp_down", "embedding_tie"), stages))
    )


def test_dp_is_shard_times_context() -> None:
    degrees = Degrees(replicate=2, shard=2, context=2, tensor=1)
    plan = group_plan(degrees)
    assert [g.ranks for g in plan if g.name == "dp"] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [g.ranks for g in plan if g.name == "replicate"] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert [g.ranks for g in plan if g.name == "shard"] == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert not [g for g in group_plan(Degrees(shard=4)) if g.name == "shard"]  # dp serves


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_plan_is_what_ranks_make(degrees: Degrees) -> None:
    """Groups of one kind are disjoint; each rank's list is its part of the plan, in the plan's order."""
    channels = ring(degrees.pipeline)
    plan = group_plan(degrees, ties=True, channels=channels)
    assert all(len(group.ranks) > 1 for group in plan) and len(set(plan)) == len(plan)
    kinds = list(dict.fromkeys(group.name for group in plan))
    for rank in range(degrees.world_size):
        mine = groups_of(degrees, rank, ties=True, channels=channels)
        assert set(mine) == {group for group in plan if rank in group.ranks}
        assert [g.name for g in mine] == [name for name in kinds if name in {g.name for g in mine}]
    for name in kinds:
        members = [rank for group in plan if group.name == name for rank in group.ranks]
        assert len(members) == len(set(members))
        if name != "embedding_tie":
            assert len(members) == degrees.world_size


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_making_groups_one_by_one_ends(degrees: Degrees) -> None:
    """Each rank waits at its next group until all members are there: simulate it to the end."""
    channels = ring(degrees.pipeline)
    todo = [list(groups_of(degrees, r, ties=True, channels=channels)) for r in range(degrees.world_size)]
    while any(todo):
        ready = {groups[0] for groups in todo if groups}
        met = [group for group in ready if all(todo[r] and todo[r][0] == group for r in group.ranks)]
        assert met, f"deadlock: {todo}"
        for group in met:
            for rank in group.ranks:
                todo[rank].pop(0)


def test_expert_view_folds_over_the_same_ranks() -> None:
    degrees = Degrees(pipeline=2, shard=4, tensor=2, expert=4, expert_tensor=1)
    view = degrees.view("expert")
    assert (view.axes, view.sizes) == (("pp", "edp", "ep", "etp"), (2, 2, 4, 1))
    assert view.world_size == degrees.world_size
    assert view.ranks_along(5, ("ep",)) == (4, 5, 6, 7)
    assert view.ranks_along(5, ("edp",)) == (1, 5)
    assert all(view.coordinate(r, "pp") == degrees.dense.coordinate(r, "pp") for r in range(degrees.world_size))
    names = {group.name for group in group_plan(degrees)}
    assert {"ep", "edp"} <= names and "etp" not in names
    assert Degrees(shard=2, tensor=2).view("expert").sizes == (1, 2, 1, 2)  # etp = tp unless said


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"tensor": 0}, ["'tensor'", "= 0", "at least 1"]),
        ({"pipeline": -2}, ["'pipeline'", "= -2"]),
        ({"shard": 2.0}, ["'shard'", "2.0", "integer"]),
        ({"context": True}, ["'context'", "True"]),
        ({"shard": 4, "expert": 3}, ["expert 3", "must divide", "4 ranks", "Choose"]),
    ],
)
def test_wrong_degrees_are_named(wrong: dict[str, int], words: list[str]) -> None:
    with pytest.raises(TopologyError) as caught:
        Degrees(**wrong)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_world_size_that_does_not_fit() -> None:
    degrees = Degrees(pipeline=2, shard=2, tensor=2)
    degrees.check_world_size(8)
    with pytest.raises(TopologyError, match=r"pipeline 2 x .* = 8 ranks.*size is 12.*start 8.*shard = 3"):
        degrees.check_world_size(12)
    with pytest.raises(TopologyError) as caught:
        degrees.check_world_size(7)
    assert "shard = " not in str(caught.value)


@pytest.mark.parametrize("channel", [(0, 0), (0, 2), (-1, 0)])
def test_wrong_channels_are_named(channel: tuple[int, int]) -> None:
    with pytest.raises(TopologyError, match=r"channel \(.*two different pipeline ranks of 0..1"):
        group_plan(Degrees(pipeline=2), channels=[channel])


def test_a_rank_does_not_loop_over_the_world() -> None:
    """One rank of a million finds its groups at once."""
    degrees = Degrees(pipeline=16, replicate=64, shard=64, context=2, tensor=8)
    start = time.perf_counter()
    groups = groups_of(degrees, 777_777, ties=True, channels=ring(16))
    assert time.perf_counter() - start < 0.1
    sizes = {group.name: len(group.ranks) for group in groups}
    assert sizes == {
        "tp": 8,
        "cp": 2,
        "dp": 128,
        "shard": 64,
        "replicate": 64,
        "pp": 16,
        "pp_up": 16,
        "pp_down": 16,
    }


def test_groups_that_do_not_exist_have_one_rank() -> None:
    control = Group("control", (0,), 0)
    topology = Topology(Degrees(), 0, None, control, {}, {})  # type: ignore[arg-type]
    for group in (topology.tp, topology.cp, topology.dp, topology.pp, topology.replicate):
        assert group.size == 1 and group.handle is None and group.index == 0
    assert topology.embedding_tie.size == 1 and topology.coordinate("tp") == topology.expert("ep") == 0


def test_no_torch_is_imported() -> None:
    code = "import sys, trilith.topology; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
