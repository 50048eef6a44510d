"""ZB-V, V-Half and V-Min: their limits of memory, their bubbles slot by slot, and what unequal costs do to them."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product

import pytest

from trilith.pipeline.action import Action, Kind, Schedule
from trilith.pipeline.check import check
from trilith.pipeline.passes import complete
from trilith.pipeline.schedules import one_f_one_b
from trilith.pipeline.simulate import Costs, peak_chunks, simulate
from trilith.pipeline.v_shape import v_half, v_min, zb_v

Generator = Callable[[int, int], Schedule]
LIMITS: tuple[tuple[Generator, Callable[[int], int]], ...] = (
    (zb_v, lambda p: p),
    (v_half, lambda p: (p + 2) // 2),
    (v_min, lambda p: (p + 4) // 3),
)
RANKS = range(1, 9)
COUNTS = range(1, 25)


def idle_slots(schedule: Schedule) -> int:
    """Slots of the longest span of a rank, F = I = W = 1, that are not work; the bubble must agree."""
    result = simulate(schedule, Costs.uniform(schedule.num_stages))
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for bar in result.bars:
        first.setdefault(bar.rank, bar.start_s)
        last[bar.rank] = bar.end_s
    work = 6 * schedule.num_microbatches
    idle = round(max(last[rank] - first[rank] for rank in first)) - work
    assert result.bubble == pytest.approx(idle / (work + idle))
    return idle


def bubble(schedule: Schedule, *costs: float) -> float:
    """Span bubble where a rank's share of the model has these costs of F, I and W, however many stages it has."""
    share = schedule.num_stages // schedule.num_ranks
    return simulate(schedule, Costs.uniform(schedule.num_stages, *(cost / share for cost in costs))).bubble


def per_microbatch(make: Generator, p: int, costs: tuple[float, float, float]) -> float:
    """Time from one microbatch to the next in the middle of a long step."""
    makespans = [simulate(make(p, m), Costs.uniform(2 * p, *costs)).makespan_s for m in (36, 60)]
    return (makespans[1] - makespans[0]) / 24


@pytest.mark.parametrize(("make", "limit"), LIMITS, ids=["zb_v", "v_half", "v_min"])
def test_no_rank_holds_more_than_the_limit(make: Generator, limit: Callable[[int], int]) -> None:
    """Where there are 2p microbatches, some rank holds as much. `test_schedules` checks all sizes up to p = 8."""
    for p, m in product(RANKS, COUNTS):
        most = max(peak_chunks(make(p, m)))
        assert most <= 2 * min(limit(p), m), (p, m)
        if m >= 2 * p:
            assert most == 2 * limit(p), (p, m)
    for p, m in ((13, 1), (13, 12), (14, 15), (15, 30), (16, 33)):
        schedule = make(p, m)
        check(complete(schedule))
        assert max(simulate(schedule, Costs.uniform(2 * p)).peak_microbatches) <= limit(p), (p, m)


@pytest.mark.parametrize("make", [zb_v, v_half, v_min])
def test_shape_and_order(make: Generator) -> None:
    """Stages go down and up; on each, forwards and both gradients run once and in order, W after its I, no whole B."""
    for p, m in product((1, 2, 3, 4, 7), (1, 2, 5, 8, 15)):
        schedule = make(p, m)
        assert schedule.name == make.__name__
        assert schedule.placement == tuple(s if s < p else 2 * p - 1 - s for s in range(2 * p))
        for stage, rank in enumerate(schedule.placement):
            row = [action for action in schedule.actions[rank] if action.stage == stage]
            assert len(row) == 3 * m
            for kind in (Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT):
                assert [action.microbatch for action in row if action.kind is kind] == [*range(m)], (p, m, stage)
            for i in range(m):
                weight = row.index(Action(Kind.BACKWARD_WEIGHT, stage, i))
                assert row.index(Action(Kind.BACKWARD_INPUT, stage, i)) < weight


def test_zb_v_has_no_bubble() -> None:
    """None from 2p-1 microbatches on; fewer, by formula."""
    for p, m in product(range(2, 9), COUNTS):
        idle = max(2 * p - 1 - m, 4 * (p - m) - 1) if m <= p else 2 * max(0, 2 * p - 1 - m)
        assert idle_slots(zb_v(p, m)) == idle, (p, m)
    for p, m in ((16, 32), (16, 33), (16, 50), (64, 128)):
        assert idle_slots(zb_v(p, m)) == 0, (p, m)


@pytest.mark.parametrize("p", [*range(3, 14), 16, 33, 64])
def test_idle_slots_of_v_half_and_v_min(p: int) -> None:
    """By formula from m = p on, up to half and two thirds of the 6 (p-1) of 1F1B: for every m up to 24 and p up to 8."""
    half = 3 * p - 3 - p % 2
    least = half if p in (3, 5) else 4 * p - 5
    assert 2 * half <= 6 * (p - 1) and 3 * least < 2 * 6 * (p - 1)
    for m in range(p, 25) if p < 9 else (p, 2 * p + 1) if p < 33 else (2 * p,):
        assert idle_slots(v_half(p, m)) == half, m
        assert idle_slots(v_min(p, m)) == least, m


def test_idle_slots_of_few_ranks_and_few_microbatches() -> None:
    """One rank never waits, two have room for ZB-V; with fewer microbatches than ranks 1F1B is worse too."""
    for make in (zb_v, v_half, v_min):
        assert {idle_slots(make(1, m)) for m in COUNTS} == {0}
        assert [idle_slots(make(2, m)) for m in (1, 2, 3, 4, 9)] == [3, 1, 0, 0, 0]
        for p, m in product((2, 3, 4, 5, 8), (1, 2, 3, 5, 8, 13, 24)):
            assert bubble(make(p, m), 1, 1, 1) < bubble(one_f_one_b(p, m), 1, 1, 1), (p, m)


def test_a_schedule_with_the_limit_of_a_larger_one_is_that_one() -> None:
    for m in (1, 3, 4, 9):
        for p in RANKS:
            assert (v_half(p, m).actions == zb_v(p, m).actions) == (p <= 2 or m == 1), (p, m)
        for p in (1, 2, 3, 5):
            assert v_min(p, m).actions == v_half(p, m).actions


COSTS = (
    (1, 1.2, 0.8),
    (1, 1, 0.8),
    (1, 0.8, 1.2),
    (1, 1, 2),
    (2, 1, 1),
    (1, 2, 0.5),
    (2, 1.5, 0.3),
    (1, 2, 3),
    (1, 1.5, 1),
)


@pytest.mark.parametrize("p", [4, 7, 8])
@pytest.mark.parametrize(("f", "i", "w"), COSTS)
def test_time_per_microbatch_with_unequal_costs(p: int, f: float, i: float, w: float) -> None:
    """The formulas of the module: what grows with m is the difference to the work, 2 (F + I + W)."""
    work = 2 * (f + i + w)
    assert per_microbatch(zb_v, p, (f, i, w)) == pytest.approx(work)
    assert per_microbatch(v_half, p, (f, i, w)) == pytest.approx(max(work, 4 * f + 2 * w, 4 * i + w))
    assert per_microbatch(v_min, p, (f, i, w)) == pytest.approx(max(work, 6 * f, 6 * i))


@pytest.mark.parametrize("p", range(2, 9))
def test_bubble_below_1f1b_with_unequal_costs(p: int) -> None:
    """ZB-V always; V-Half where F <= I <= F + W/2; V-Min where neither F nor I is above the mean, else not with many."""
    even = ((1, 1, 1), (1, 1, 2), (1, 1, 1.3), (1, 1.2, 1.4))
    gentle = (*even, (1, 1.2, 0.8), (1, 1, 0.8), (1, 1.2, 1), (1, 1.4, 0.8))
    for m in sorted({2 * p, 24}):
        for makes, costs in (
            ((zb_v, v_half, v_min), even),
            ((zb_v, v_half), gentle),
            ((zb_v,), (*COSTS, (1, 1.5, 0.5))),
        ):
            for make, cost in product(makes, costs):
                assert bubble(make(p, m), *cost) < bubble(one_f_one_b(p, m), *cost), (make.__name__, m, cost)
    if p == 4 or p > 5:
        assert bubble(v_min(p, 8 * p), 1, 1.2, 0.8) > bubble(one_f_one_b(p, 8 * p), 1, 1.2, 0.8)


@pytest.mark.parametrize("make", [zb_v, v_half, v_min])
def test_64_ranks_256_microbatches_in_seconds(make: Generator) -> None:
    """CPU seconds of this process, so that a busy machine does not count."""
    start_s = time.process_time()
    make(64, 256)
    assert time.process_time() - start_s < 3
