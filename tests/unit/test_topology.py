"""Rank arithmetic, the group plan and its errors: pure."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product

import pytest

from trilith.errors import TopologyError
from trilith.topology import (
    Degrees,
    Group,
    Topology,
    View,
    channel_name,
    group_plan,
    groups_of,
    steps_of,
)

Channels = tuple[tuple[int, int], ...]


def ring(pipeline: int) -> Channels:
    """The channels of an interleaved schedule: both directions between neighbours on a ring."""
    if pipeline == 1:
        return ()
    pairs = {(p, (p + 1) % pipeline) for p in range(pipeline)}
    return tuple(sorted(pairs | {(b, a) for a, b in pairs}))


def chain(pipeline: int) -> Channels:
    """The channels of a schedule without virtual stages."""
    return tuple(pair for p in range(pipeline - 1) for pair in ((p, p + 1), (p + 1, p)))


def tied(pipeline: int) -> dict[str, tuple[int, ...]]:
    """Shared units on the ends of a pipeline, on all of its ranks, on every other one, and on the ends again."""
    sets = {
        "ends": (0, pipeline - 1),
        "all": tuple(range(pipeline)),
        "others": tuple(range(0, pipeline, 2)),
        "again": (0, pipeline - 1),
    }
    return {name: ranks for name, ranks in sets.items() if len(set(ranks)) > 1}


LAYOUTS = [
    Degrees(*sizes)
    for sizes in product((1, 2, 3, 5), (1, 2), (1, 2, 3), (1, 2), (1, 2))
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
    plan = {(g.name, g.ranks) for g in group_plan(degrees, ties={"tokens": (0, 1)}, channels=[(0, 1), (1, 0)])}
    columns = {(0, 4), (1, 5), (2, 6), (3, 7)}
    assert plan == (
        {("tp", ranks) for ranks in ((0, 1), (2, 3), (4, 5), (6, 7))}
        | {("dp", ranks) for ranks in ((0, 2), (1, 3), (4, 6), (5, 7))}
        | set(product(("pp", "channel 0->1"), columns))
        | {("channel 1->0", (b, a)) for a, b in columns}
    )


def test_ties_over_equal_ranks_share_a_group() -> None:
    """A tie over the whole axis uses the axis's group; others have one per set, made beside channels of other ranks."""
    assert [g.name for g in group_plan(Degrees(pipeline=2), ties={"a": (0, 1), "b": (0, 1)})] == ["pp"]
    ties = {"b": (0, 3), "a": (0, 3), "c": (0, 1, 2, 3)}
    steps = [
        [step and step.name for step in steps_of(Degrees(pipeline=4), rank, ties=ties, channels=chain(4))]
        for rank in range(4)
    ]
    assert steps[0] == ["pp", "channel 0->1", "channel 1->0", "tie 0,3", None]
    assert steps[1] == ["pp", "channel 0->1", "channel 1->0", "channel 1->2", "channel 2->1"]
    assert steps[2] == ["pp", "channel 2->3", "channel 3->2", "channel 1->2", "channel 2->1"]
    assert steps[3] == ["pp", "channel 2->3", "channel 3->2", "tie 0,3", None]
    wide = [step and step.name for step in steps_of(Degrees(pipeline=5), 2, ties=tied(5), channels=chain(5))]
    assert [name for name in wide if name and name.startswith("tie")] == ["tie 0,2,4"]


@pytest.mark.parametrize("ranks", [(), (0,), (1, 0), (0, 0), (0, 2), (-1, 0)])
def test_wrong_ties_are_named(ranks: tuple[int, ...]) -> None:
    with pytest.raises(TopologyError, match=r"tied unit 'tokens' on pipeline ranks .*two or more of 0..1"):
        group_plan(Degrees(pipeline=2), ties={"tokens": ranks})


def test_a_rank_finds_the_group_of_a_tie() -> None:
    pp, pair = Group("pp", (0, 1, 2), 1), Group("tie 1,2", (1, 2), 0)
    ties = {"all": (0, 1, 2), "some": (1, 2), "others": (0, 2)}
    control = Group("control", (0, 1, 2), 1)
    groups = {"pp": pp, "tie 1,2": pair}
    topology = Topology(Degrees(pipeline=3), 1, None, control, groups, {}, ties)  # type: ignore[arg-type]
    assert topology.tie("all") is pp and topology.tie("some") is pair
    assert topology.tie("others").ranks == topology.tie("nothing").ranks == (1,)


def test_dp_is_shard_times_context() -> None:
    degrees = Degrees(replicate=2, shard=2, context=2, tensor=1)
    plan = group_plan(degrees)
    assert [g.ranks for g in plan if g.name == "dp"] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [g.ranks for g in plan if g.name == "replicate"] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert [g.ranks for g in plan if g.name == "shard"] == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert not [g for g in group_plan(Degrees(shard=4)) if g.name == "shard"]  # dp serves


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
@pytest.mark.parametrize("links", [chain, ring])
def test_plan_is_what_ranks_make(degrees: Degrees, links: Callable[[int], Channels]) -> None:
    """In each step groups are disjoint, and every rank is in one or sits out: their counts of groups stay equal."""
    channels = links(degrees.pipeline)
    plan = group_plan(degrees, ties=tied(degrees.pipeline), channels=channels)
    assert all(len(set(group.ranks)) == len(group.ranks) > 1 for group in plan)
    steps = [steps_of(degrees, r, ties=tied(degrees.pipeline), channels=channels) for r in range(degrees.world_size)]
    for column in zip(*steps, strict=True):
        groups = {group for group in column if group is not None}
        members = [rank for group in groups for rank in group.ranks]
        assert len(members) == len(set(members)) and groups <= set(plan)
        assert all(column[rank] == group for group in groups for rank in group.ranks)
        assert len({group.uses for group in groups}) == 1
    for rank in range(degrees.world_size):
        assert set(groups_of(degrees, rank, ties=tied(degrees.pipeline), channels=channels)) == {
            group for group in plan if rank in group.ranks
        }
    names = {group.name for group in plan}
    assert {channel_name(*pair) for pair in channels} <= names
    expected = {3: {"tie 0,2"}, 5: {"tie 0,4", "tie 0,2,4"}}
    assert {name for name in names if name.startswith("tie")} == expected.get(degrees.pipeline, set())


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
    groups = groups_of(degrees, 540_000, ties={"tokens": (0, 15)}, channels=ring(16))
    assert time.perf_counter() - start < 0.1
    sizes = {group.name: len(group.ranks) for group in groups}
    assert sizes == {
        "tp": 8,
        "cp": 2,
        "dp": 128,
        "shard": 64,
        "replicate": 64,
        "pp": 16,
        "channel 7->8": 2,
        "channel 8->7": 2,
        "channel 8->9": 2,
        "channel 9->8": 2,
    }


def test_groups_that_do_not_exist_have_one_rank() -> None:
    control = Group("control", (0,), 0)
    topology = Topology(Degrees(), 0, None, control, {}, {})  # type: ignore[arg-type]
    for group in (topology.tp, topology.cp, topology.dp, topology.pp, topology.replicate):
        assert group.size == 1 and group.handle is None and group.index == 0
    assert topology.tie("tokens").size == 1 and topology.coordinate("tp") == topology.expert("ep") == 0


def test_no_torch_is_imported() -> None:
    code = "import sys, trilith.topology; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
