"""Gather plans of ZeRO-3 against what they promise: replayed use by use, beside LRU, and beside the best there is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trilith.pipeline.action import Kind
from trilith.pipeline.passes import complete
from trilith.pipeline.schedules import make_schedule
from trilith.zero.gather_plans import GatherPlans
from trilith.zero.residency import GatherLimits, GatherPlan, StageUses, Use, plan_gathers, uses_of

NO_LIMIT = 10**9
UNLIMITED = GatherLimits(NO_LIMIT, NO_LIMIT, NO_LIMIT)


# ---- a plan, replayed -----------------------------------------------------------------------------------------------


@dataclass
class Replay:
    """What a plan does: `stays` as (unit, launched before use, first use, use at whose end it is let go); elements that
    are whole, and that wait to be used, at each use."""

    stays: list[tuple[int, int, int, int]] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    launched: list[int] = field(default_factory=list)


def replayed(plan: GatherPlan) -> Replay:
    """Follow the plan as ranks do, and refuse what they could not do."""
    result = Replay()
    there: dict[int, int] = {}  # unit -> the use before which it was launched
    used: dict[int, int] = {}  # unit -> its first use since

    def launch(unit: int, before: int) -> None:
        assert unit not in there, f"unit {unit} is gathered before use {before}, but it is there"
        there[unit] = before
        result.launched.append(unit)

    for index, use in enumerate(plan.uses):
        for unit in plan.before[index]:
            launch(unit, index)
        for unit in use.units:
            assert unit in there, f"use {index} does not find unit {unit}"
            used.setdefault(unit, index)
        result.whole.append(sum(plan.sizes[unit] for unit in there))
        result.waiting.append(sum(plan.sizes[unit] for unit in there if unit not in used))
        for unit in plan.releases[index]:
            result.stays.append((unit, there.pop(unit), used.pop(unit), index))
        for unit in plan.after[index]:
            launch(unit, index + 1)
    assert not there, f"units {sorted(there)} are never let go"
    return result


def needs(plan: GatherPlan, index: int) -> int:
    """Elements that a use cannot do without."""
    return sum(plan.sizes[unit] for unit in plan.uses[index].units)


def assert_keeps_its_promises(plan: GatherPlan, limits: GatherLimits) -> Replay:
    """Everything that holds for any plan."""
    replay = replayed(plan)
    for index, (whole, waiting) in enumerate(zip(replay.whole, replay.waiting, strict=True)):
        assert whole <= max(limits.max_live, needs(plan, index)), f"use {index} has {whole} elements whole"
        allowed = max(limits.prefetch, max(plan.sizes)) if limits.prefetch else 0  # one unit may be larger
        assert waiting <= allowed, f"{waiting} elements wait during use {index}"
    assert plan.peak_numel == max(replay.whole, default=0)
    assert plan.num_gathers == len(replay.stays) == sum(map(len, plan.releases))
    assert plan.gathered_numel == sum(plan.sizes[unit] for unit, *_ in replay.stays)
    first_uses = sorted((first, at) for at, (unit, _, first, _) in enumerate(in_order_of_launching(replay)))
    assert [at for _, at in first_uses] == list(range(len(first_uses))), "launched in another order than used"
    assert all(unit in plan.uses[last].units for unit, _, _, last in replay.stays), "kept after its last use"
    for earlier, later in reuses(plan, replay):
        between = sum(needs(plan, index) for index in range(earlier + 1, later))
        assert between <= limits.max_reuse, f"kept from use {earlier} to use {later} over {between} elements"
    if limits.after_backward:
        for index, use in enumerate(plan.uses):
            assert not use.backward or set(plan.before[index]) <= set(use.units), f"asks ahead before use {index}"
    else:
        assert not any(plan.after)
    return replay


def in_order_of_launching(replay: Replay) -> list[tuple[int, int, int, int]]:
    """The stays, one for each launch, in the order of launching."""
    left = sorted(replay.stays, key=lambda stay: stay[2])
    ordered = []
    for unit in replay.launched:
        ordered.append(next(stay for stay in left if stay[0] == unit))
        left.remove(ordered[-1])
    return ordered


def reuses(plan: GatherPlan, replay: Replay) -> Iterator[tuple[int, int]]:
    """(use, next use) of a unit between which it was kept."""
    for unit, _, first, last in replay.stays:
        at = [index for index in range(first, last + 1) if unit in plan.uses[index].units]
        yield from itertools.pairwise(at)


@st.composite
def questions(draw: st.DrawFn, equal: bool = False) -> tuple[list[Use], list[int]]:
    """Uses of a few units, one or several at once, and the units' sizes."""
    num_units = draw(st.integers(1, 6))
    sizes = [1] * num_units if equal else draw(st.lists(st.integers(1, 9), min_size=num_units, max_size=num_units))
    groups = st.lists(st.integers(0, num_units - 1), min_size=1, max_size=min(3, num_units), unique=True)
    uses = draw(st.lists(st.builds(lambda u, b: Use(tuple(sorted(u)), b), groups, st.booleans()), max_size=14))
    return uses, sizes


def numbers() -> st.SearchStrategy[int]:
    return st.one_of(st.just(NO_LIMIT), st.integers(0, 30))


def all_limits() -> st.SearchStrategy[GatherLimits]:
    return st.builds(GatherLimits, numbers(), numbers(), numbers(), st.booleans())


@settings(max_examples=400, deadline=None)
@given(questions(), all_limits())
@example(([], []), UNLIMITED)
@example(([Use((0,)), Use((1,)), Use((0,))], [3, 4]), GatherLimits(0, NO_LIMIT, NO_LIMIT, True))
def test_a_plan_keeps_its_promises(question: tuple[list[Use], list[int]], limits: GatherLimits) -> None:
    assert_keeps_its_promises(plan_gathers(*question, limits), limits)


@settings(max_examples=100, deadline=None)
@given(questions())
def test_without_a_cap_each_unit_is_gathered_once(question: tuple[list[Use], list[int]]) -> None:
    plan = plan_gathers(*question, UNLIMITED)
    assert plan.num_gathers == len({unit for use in plan.uses for unit in use.units})


@settings(max_examples=100, deadline=None)
@given(questions(), st.booleans())
def test_with_a_cap_of_nothing_every_change_of_unit_gathers_anew(
    question: tuple[list[Use], list[int]], after_backward: bool
) -> None:
    plan = plan_gathers(*question, GatherLimits(0, NO_LIMIT, NO_LIMIT, after_backward))
    before: set[int] = set()
    changes = 0
    for use in plan.uses:
        changes += len(set(use.units) - before)
        before = set(use.units)
    assert plan.num_gathers == changes
    assert plan.peak_numel == max((needs(plan, index) for index in range(len(plan.uses))), default=0)


@settings(max_examples=100, deadline=None)
@given(questions(), all_limits())
def test_prefetching_costs_no_more_than_the_room_of_one_unit(
    question: tuple[list[Use], list[int]], limits: GatherLimits
) -> None:
    """Room for a unit on its way is room in which none is kept; where there is room for all, nothing changes."""
    without = plan_gathers(*question, GatherLimits(limits.max_live, limits.max_reuse, 0))
    assert not any(replayed(without).waiting)
    room = limits.max_live if sum(question[1]) <= limits.max_live else limits.max_live - max(question[1])
    smaller = plan_gathers(*question, GatherLimits(room, limits.max_reuse, 0))
    assert plan_gathers(*question, limits).gathered_numel <= smaller.gathered_numel


# ---- beside other ways to choose ------------------------------------------------------------------------------------


def lru(uses: Sequence[Use], sizes: Sequence[int], cap: int) -> int:
    """Elements that are gathered where the unit that was used longest ago makes room."""
    there: list[int] = []  # the one used last at the end
    gathered = 0
    for use in uses:
        missing = [unit for unit in use.units if unit not in there]
        others = [unit for unit in there if unit not in use.units]
        while others and sum(sizes[unit] for unit in (*others, *use.units)) > cap:
            others.pop(0)
        gathered += sum(sizes[unit] for unit in missing)
        there = [*others, *use.units]
    return gathered


def optimum(uses: Sequence[Use], sizes: Sequence[int], cap: int) -> int:
    """The fewest elements that any choice of what to keep gathers."""
    best = {frozenset[int](): 0}
    for use in uses:
        needed, following = frozenset(use.units), dict[frozenset[int], int]()
        for kept, cost in best.items():
            cost += sum(sizes[unit] for unit in needed - kept)
            others = sorted(kept - needed)
            for count in range(len(others) + 1):
                for chosen in itertools.combinations(others, count):
                    whole = needed.union(chosen)
                    if not chosen or sum(sizes[unit] for unit in whole) <= cap:
                        following[whole] = min(cost, following.get(whole, cost))
        best = following
    return min(best.values())


@settings(max_examples=400, deadline=None)
@given(questions(), st.integers(0, 30))
def test_never_more_is_gathered_than_by_lru(question: tuple[list[Use], list[int]], cap: int) -> None:
    plan = plan_gathers(*question, GatherLimits(cap, NO_LIMIT, 0))
    assert plan.gathered_numel <= lru(*question, cap)


@settings(max_examples=300, deadline=None)
@given(questions(equal=True), st.integers(0, 6))
def test_units_of_one_size_are_gathered_as_seldom_as_can_be(question: tuple[list[Use], list[int]], cap: int) -> None:
    plan = plan_gathers(*question, GatherLimits(cap, NO_LIMIT, 0))
    assert plan.gathered_numel == optimum(*question, cap)


# ---- the uses of schedules ------------------------------------------------------------------------------------------

LAYERS = 3  # of a stage
SIZES_OF_A_STAGE = (5, 8, 8)


def stage_uses(place: int) -> StageUses:
    """A stage whose units are numbered from its place on the rank; the backward of its first one reads no weights."""
    units = [Use((place * LAYERS + layer,)) for layer in range(LAYERS)]
    return StageUses(tuple(units), tuple(Use(use.units, backward=True) for use in reversed(units[1:])))


SCHEDULES = (
    *(("1f1b", 1, m) for m in (1, 4, 7)),
    *(("interleaved_1f1b", v, m) for v in (2, 3) for m in (4, 6)),
    *(("zb_v", 2, m) for m in (1, 4, 7)),
    *(("zb_h1", 1, 5), ("dualpipe_v", 2, 8)),
)


@pytest.mark.parametrize(("name", "stages", "microbatches"), SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_of_a_schedule_has_a_plan(ranks: int, name: str, stages: int, microbatches: int) -> None:
    schedule = complete(make_schedule(name, ranks, stages, microbatches))
    for rank, actions in enumerate(schedule.actions):
        mine = {stage: stage_uses(place) for place, stage in enumerate(schedule.stages_of(rank))}
        uses, spans = uses_of(actions, mine)
        assert len(uses) == microbatches * len(mine) * (LAYERS + LAYERS - 1)
        assert [use for _, first, end in spans for use in uses[first:end]] == list(uses), "each use has one action"
        for at, first, end in spans:
            assert uses[first:end] == tuple(
                use
                for part in actions[at].parts()
                for use in (mine[part.stage].forward if part.kind is Kind.FORWARD else mine[part.stage].backward)
            )
            assert all(part.kind is not Kind.BACKWARD_WEIGHT for part in actions[at].parts())
        sizes = SIZES_OF_A_STAGE * len(mine)
        for cap, prefetch, post in itertools.product((0, 20, 40, NO_LIMIT), (0, 8, NO_LIMIT), (False, True)):
            limits = GatherLimits(cap, NO_LIMIT, prefetch, post)
            plan = plan_gathers(uses, sizes, limits)
            assert_keeps_its_promises(plan, limits)
            room = cap - max(sizes) if prefetch and cap < sum(sizes) else cap
            assert plan.gathered_numel <= lru(uses, sizes, room)
            if cap == NO_LIMIT:
                assert plan.num_gathers == len(sizes)


def test_room_and_prefetch_let_a_gather_run_beside_the_use_before() -> None:
    """Layers one after the other, one in use and one on its way: what hides the traffic."""
    uses = [Use((unit,)) for unit in range(4)] + [Use((unit,), True) for unit in (3, 2, 1, 0)]
    plan = plan_gathers(uses, [10] * 4, GatherLimits(20, NO_LIMIT, 10))
    assert plan.before == ((0, 1), (2,), (3,), (), (), (1,), (0,), ())
    assert plan.releases == ((0,), (1,), (), (), (3,), (2,), (1,), (0,))
    assert plan.peak_numel == 20 and plan.num_gathers == 6
    post = plan_gathers(uses, [10] * 4, GatherLimits(20, NO_LIMIT, 10, after_backward=True))
    assert post.after == ((), (), (), (), (2,), (1,), (0,), ())


def test_a_schedule_whose_runs_are_written_down_is_kept() -> None:
    """What its runs wrote down is known by its identity: another at its address would follow that, on this rank only."""
    plans, gone = GatherPlans(cast(Any, None), None, 0), []
    for microbatches in range(1, 50):
        schedule = complete(make_schedule("1f1b", 1, 1, microbatches))
        assert id(schedule) not in gone
        gone.append(id(schedule))
        assert plans.of(schedule) is None
        del schedule
