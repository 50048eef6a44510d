"""Schedules against the published formulas, a naive simulator, a proven lower bound and an exhaustive search."""

from __future__ import annotations

from itertools import product

import pytest

from trilith.errors import ScheduleError
from trilith.pipeline.action import Action, Kind, Schedule, overlapped, parse
from trilith.pipeline.schedules import SCHEDULES, make_schedule
from trilith.pipeline.simulate import Costs, Simulation, simulate

F, B = Kind.FORWARD, Kind.BACKWARD
TRAINING = (("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 3))


def simulated(name: str, p: int, v: int, m: int) -> Simulation:
    return simulate(make_schedule(name, p, v, m), Costs.uniform(p * v))


def naive(schedule: Schedule, forward: int = 1, backward: int = 2) -> tuple[int, list[int]]:
    """(makespan, peak chunks per rank) by looking at the clock tick by tick; shares no code with the simulator."""
    left = [list(actions) for actions in schedule.actions]
    running: list[tuple[int, Action] | None] = [None] * schedule.num_ranks
    done: set[tuple[Kind, int, int]] = set()
    live, peak = [0] * schedule.num_ranks, [0] * schedule.num_ranks
    clock = 0
    while any(left) or any(running):
        for rank, now in enumerate(running):
            if now is not None and now[0] == clock:
                done.add((now[1].kind, now[1].stage, now[1].microbatch))
                live[rank] -= now[1].kind is B
                running[rank] = None
        for rank, queue in enumerate(left):
            if running[rank] is None and queue:
                kind, s, i = queue[0].kind, queue[0].stage, queue[0].microbatch
                wants = [(F, s - 1, i)] if s else []
                if kind is B:
                    wants = [(F, s, i)] + ([(B, s + 1, i)] if s + 1 < schedule.num_stages else [])
                if done.issuperset(wants):
                    live[rank] += kind is F
                    peak[rank] = max(peak[rank], live[rank])
                    running[rank] = (clock + (forward if kind is F else backward), queue.pop(0))
        clock += 1
        assert clock < 100_000, "deadlock"
    return clock - 1, peak


def lower_bound(p: int, v: int, m: int) -> int:
    """No order of p x v equal stages is faster (see `interleaved_1f1b`): the last rank, or the last stage, decides."""
    return 3 * max(v * m + p - 1, v * p + m - 1)


@pytest.mark.parametrize(
    ("p", "m", "plain", "interleaved", "peaks"),
    [(4, 8, 0.273, 0.158, (8, 4, 5.5)), (8, 8, 0.467, 0.304, (8, 8, 8)), (8, 16, 0.304, 0.179, (16, 8, 11.5))],
)
def test_check_values(p: int, m: int, plain: float, interleaved: float, peaks: tuple[float, ...]) -> None:
    """Bubbles and rank 0's peak at F = B = W = 1; with m = p no rank can hold more than m microbatches' chunks."""
    gpipe, one, inter = (simulated(name, p, v, m) for name, v in (("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2)))
    assert gpipe.bubble == pytest.approx(plain, abs=5e-4)
    assert one.bubble == pytest.approx(plain, abs=5e-4)
    assert inter.bubble == pytest.approx(interleaved, abs=5e-4)
    assert (gpipe.peak_microbatches[0], one.peak_microbatches[0], inter.peak_microbatches[0]) == peaks


@pytest.mark.parametrize("p", range(1, 9))
def test_formulas_where_ranks_divide_microbatches(p: int) -> None:
    for m in range(p, 25, p):
        for name in ("gpipe", "1f1b"):
            result = simulated(name, p, 1, m)
            assert result.bubble == pytest.approx((p - 1) / (m + p - 1))
            assert result.bubble_makespan == pytest.approx((p - 1) / (m + p - 1))
            peaks = [float(m if name == "gpipe" else min(p - s, m)) for s in range(p)]
            assert list(result.peak_microbatches) == peaks
        for v in (2, 3):
            result = simulated("interleaved_1f1b", p, v, m)
            assert result.bubble == pytest.approx((p - 1) / (v * m + p - 1))
            assert result.peak_microbatches[0] == pytest.approx(min(m, p * (1 + (p - 1) / (p * v))))


@pytest.mark.parametrize(("name", "v"), TRAINING)
def test_any_count_equals_a_naive_simulation(name: str, v: int) -> None:
    for p, m in product((1, 2, 3, 5), (1, 2, 3, 4, 7, 11)):
        schedule = make_schedule(name, p, v, m)
        result = simulate(schedule, Costs.uniform(p * v))
        assert (result.makespan_s, list(result.peak_chunks)) == naive(schedule), (p, m)


@pytest.mark.parametrize("v", (1, 2, 3))
def test_interleaved_reaches_the_lower_bound_for_every_count(v: int) -> None:
    """Remainders and fewer microbatches than ranks included: no order of equal stages can have a smaller bubble."""
    for p, m in product(range(1, 9), range(1, 25)):
        result = simulated("interleaved_1f1b", p, v, m)
        assert result.makespan_s == lower_bound(p, v, m), (p, m)
        if m >= p:
            assert result.bubble_makespan == pytest.approx((p - 1) / (v * m + p - 1)), (p, m)


def test_peak_of_interleaved_with_remainders() -> None:
    for p, v, m in product((2, 3, 5, 8), (2, 3), range(1, 25)):
        largest = -(-m // max(1, m // p))
        expected = tuple(min(v * m, 2 * (p - 1 - rank) + (v - 1) * largest + 1) for rank in range(p))
        assert simulated("interleaved_1f1b", p, v, m).peak_chunks == expected, (p, v, m)


def shortest_makespan(p: int, v: int, m: int) -> int:
    """Exhaustive search over all orders (microbatches of a stage in order, F 1 tick, B 2): layers of states by tick."""
    stages = p * v
    start = ((0,) * stages, (0,) * stages, (None,) * p)
    states = {start}
    for tick in range(1000):
        following = set()
        for forwards, backwards, busy in states:
            if backwards == (m,) * stages:
                return tick
            options = []
            for rank in range(p):
                choices = [busy[rank]] if busy[rank] is not None else [None]
                if busy[rank] is None:
                    for s in range(rank, stages, p):
                        if forwards[s] < m and (s == 0 or forwards[s] < forwards[s - 1]):
                            choices.append((s, True, 1))
                        ready = forwards[s] if s == stages - 1 else min(forwards[s], backwards[s + 1])
                        if backwards[s] < ready:
                            choices.append((s, False, 2))
                options.append(choices)
            for choice in product(*options):
                after_f, after_b, after_busy = list(forwards), list(backwards), []
                for work in choice:
                    if work is not None and work[2] == 1:
                        (after_f if work[1] else after_b)[work[0]] += 1
                    after_busy.append((work[0], work[1], work[2] - 1) if work is not None and work[2] > 1 else None)
                following.add((tuple(after_f), tuple(after_b), tuple(after_busy)))
        states = following
    raise AssertionError("no end")


@pytest.mark.parametrize(("p", "v", "m"), [(2, 1, 3), (3, 1, 2), (2, 2, 1), (2, 2, 2), (2, 2, 3), (3, 2, 1)])
def test_no_order_is_faster(p: int, v: int, m: int) -> None:
    assert simulated("interleaved_1f1b", p, v, m).makespan_s == shortest_makespan(p, v, m) == lower_bound(p, v, m)


@pytest.mark.parametrize(("name", "v"), TRAINING)
def test_every_action_once_and_backwards_in_order(name: str, v: int) -> None:
    for p, m in product((1, 2, 4), (1, 3, 4, 6)):
        schedule = make_schedule(name, p, v, m)
        assert schedule.placement == tuple(s % p for s in range(p * v))
        found = sorted((a.kind, a.stage, a.microbatch) for _, a in schedule.parts())
        assert found == sorted(product((F, B), range(p * v), range(m)))
        for rank, actions in enumerate(schedule.actions):
            for stage in schedule.stages_of(rank):
                for kind in (F, B):
                    assert [a.microbatch for a in actions if (a.kind, a.stage) == (kind, stage)] == [*range(m)]


def test_interleaved_with_one_stage_per_rank_is_1f1b() -> None:
    for p, m in product(range(1, 6), range(1, 9)):
        assert make_schedule("interleaved_1f1b", p, 1, m).actions == make_schedule("1f1b", p, 1, m).actions


def test_forward_only_keeps_one_microbatch_and_wastes_no_slot() -> None:
    for p, v, m in product((1, 2, 4), (1, 2, 3), (1, 3, 4, 9)):
        result = simulated("forward_only", p, v, m)
        assert result.makespan_s == max(v * m + p - 1, v * p + m - 1)
        assert set(result.peak_chunks) == {1}


def test_costs_of_stages_and_transfers_count() -> None:
    schedule = make_schedule("1f1b", 2, 1, 1)
    costs = Costs((1.0, 2.0), (3.0, 4.0), (0.5, 0.25), transfer_s=10.0)
    result = simulate(schedule, costs)
    assert result.makespan_s == 1 + 10 + 2 + 4.25 + 10 + 3.5
    work = (1 + 3.5 + 2 + 4.25) / 2
    assert result.bubble_makespan == pytest.approx(1 - work / result.makespan_s)
    assert [bar.start_s for bar in result.bars if bar.rank == 1] == [11, 13]


def test_messages_of_a_channel_follow_one_another() -> None:
    """Three activations made at 1, 2 and 3 on a channel that takes 5 each arrive at 6, 11 and 16."""
    result = simulate(make_schedule("forward_only", 2, 1, 3), Costs.uniform(2, transfer_s=5.0))
    assert [bar.start_s for bar in result.bars if bar.rank == 1] == [6, 11, 16]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("zigzag", 2, 1, 4), ("pipeline.schedule", "zigzag", "interleaved_1f1b")),
        (("1f1b", 2, 2, 4), ("pipeline.virtual_stages = 2", "one stage per rank", "interleaved_1f1b")),
        (("gpipe", 2, 3, 4), ("pipeline.virtual_stages = 3", "one stage per rank")),
        (("1f1b", 0, 1, 4), ("parallel.pipeline = 0", "at least 1")),
        (("interleaved_1f1b", 2, 0, 0), ("pipeline.virtual_stages = 0", "gradient_accumulation_steps = 0")),
    ],
)
def test_bad_arguments_are_refused_with_rule_and_fix(arguments: tuple, words: tuple[str, ...]) -> None:
    with pytest.raises(ScheduleError) as caught:
        make_schedule(*arguments)
    for word in words:
        assert word in str(caught.value)


def test_registry_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        SCHEDULES["mine"] = SCHEDULES["1f1b"]  # type: ignore[index]


@pytest.mark.parametrize(
    "text", ["F0.3", "B1.12", "I2.0", "W2.0", "SF0.3>1", "SB11.2>0", "RF1.3<0", "RB0.2<1", "AG2", "FR2", "RD0", "TR3"]
)
def test_text_form_reads_back(text: str) -> None:
    assert str(parse(text)) == text
    pair = overlapped(Action(F, 4, 1), Action(B, 3, 0))
    assert str(pair) == "F4.1&B3.0" and parse(str(pair)) == pair


@pytest.mark.parametrize("text", ["", "X0.1", "F0", "RD0.1", "SF0.3", "F0.3>1", "RF0.3>1", "B1.0&F0.0", "F-1.0"])
def test_bad_text_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError):
        parse(text)
