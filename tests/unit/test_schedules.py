"""Schedules against the published formulas, a naive simulator, a proven lower bound and an exhaustive search."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from itertools import product

import pytest

from trilith.errors import ScheduleError
from trilith.pipeline.action import COMPUTE, Action, Kind, Schedule, overlapped, parse
from trilith.pipeline.check import check
from trilith.pipeline.passes import complete
from trilith.pipeline.schedules import SCHEDULES, forward_only, make_schedule
from trilith.pipeline.simulate import Costs, Simulation, simulate

F, B, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_WEIGHT
TRAINING = (
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved_1f1b", 1),
    ("interleaved_1f1b", 2),
    ("interleaved_1f1b", 3),
    ("zb_h1", 1),
    ("zb_h2", 1),
    ("zb_v", 2),
    ("v_half", 2),
    ("v_min", 2),
    ("dualpipe_v", 2),
    ("pipedream", 1),
    ("pipedream_2bw", 1),
)


def admitted(name: str, ranks: Sequence[int], counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The (p, m) of a grid that a schedule admits; for some p there must be one."""
    pairs = [(p, m) for p, m in product(ranks, counts) if m >= SCHEDULES[name].min_microbatches(p)]
    assert pairs, name
    yield from pairs


def simulated(name: str, p: int, v: int, m: int) -> Simulation:
    return simulate(make_schedule(name, p, v, m), Costs.uniform(p * v))


def naive(schedule: Schedule) -> tuple[int, list[int]]:
    """(makespan, peak chunks per rank) at F = I = W = 1, by looking at the clock; shares no code with the simulator."""
    left = [[action for action in actions if action.kind in COMPUTE] for actions in schedule.actions]
    running: list[tuple[int, Action] | None] = [None] * schedule.num_ranks
    done: set[tuple[str, int, int]] = set()
    live, peak = [0] * schedule.num_ranks, [0] * schedule.num_ranks
    clock = 0
    while any(left) or any(running):
        for rank, now in enumerate(running):
            if now is not None and now[0] == clock:
                for letter, s, i in letters(now[1]):
                    done.add((letter, s, i))
                    live[rank] -= letter == "W"
                running[rank] = None
        for rank, queue in enumerate(left):
            if running[rank] is None and queue:
                work = letters(queue[0])
                wants: set[tuple[str, int, int]] = set()
                for letter, s, i in work:
                    if letter == "F":
                        wants |= {("F", s - 1, i)} if s else set()
                    elif letter == "I":
                        wants |= {("F", s, i)} | ({("I", s + 1, i)} if s + 1 < schedule.num_stages else set())
                    elif ("I", s, i) not in work:
                        wants.add(("I", s, i))
                if done >= wants:
                    live[rank] += sum(letter == "F" for letter, _, _ in work)
                    peak[rank] = max(peak[rank], live[rank])
                    running[rank] = (clock + len(work), queue.pop(0))
        clock += 1
        assert clock < 100_000, "deadlock"
    return clock - 1, peak


def letters(action: Action) -> list[tuple[str, int, int]]:
    """(F, I or W, stage, microbatch) of an action: one slot each."""
    words = {F: "F", B: "IW", Kind.BACKWARD_INPUT: "I", W: "W"}
    return [(letter, part.stage, part.microbatch) for part in action.parts() for letter in words[part.kind]]


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
    for p, m in admitted(name, (1, 2, 3, 5), (1, 2, 3, 4, 7, 11)):
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
    none_busy: tuple[tuple[int, bool, int] | None, ...] = (None,) * p
    states = {((0,) * stages, (0,) * stages, none_busy)}
    for tick in range(1000):
        following = set()
        for forwards, backwards, busy in states:
            if backwards == (m,) * stages:
                return tick
            options = []
            for rank in range(p):
                choices = [busy[rank]]
                if busy[rank] is None:
                    for s in range(rank, stages, p):
                        if forwards[s] < m and (s == 0 or forwards[s] < forwards[s - 1]):
                            choices.append((s, True, 1))
                        ready = forwards[s] if s == stages - 1 else min(forwards[s], backwards[s + 1])
                        if backwards[s] < ready:
                            choices.append((s, False, 2))
                options.append(choices)
            for choice in product(*options):
                after_f, after_b = list(forwards), list(backwards)
                after_busy: list[tuple[int, bool, int] | None] = []
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
def test_every_action_once_and_gradients_in_order(name: str, v: int) -> None:
    """On each stage forwards, input gradients and weight gradients each run in microbatch order, all of them."""
    vshaped = SCHEDULES[name].stages_per_rank == 2
    for p, m in admitted(name, (1, 2, 4), (1, 3, 4, 6, 8)):
        schedule = make_schedule(name, p, v, m)
        assert schedule.name == name
        assert schedule.placement == tuple(min(s, 2 * p - 1 - s) if vshaped else s % p for s in range(p * v))
        for stage, rank in enumerate(schedule.placement):
            slots = [slot for a in schedule.actions[rank] if a.kind in COMPUTE for slot in letters(a)]
            for letter in "FIW":
                assert [i for kind, s, i in slots if (kind, s) == (letter, stage)] == [*range(m)], (p, m, stage)


@pytest.mark.parametrize(("name", "v"), TRAINING)
def test_every_admitted_size_passes_the_check(name: str, v: int) -> None:
    for p, m in admitted(name, range(1, 9), range(1, 25)):
        check(complete(make_schedule(name, p, v, m)))


def large_bubble(name: str, p: int, v: int, m: int) -> float | None:
    """Span bubble at F = I = W = 1 and m >= 2p by formula; None for the two that trade it for memory."""
    idle: dict[str, float] = {
        "gpipe": 3 * (p - 1),
        "1f1b": 3 * (p - 1),
        "pipedream": 3 * (p - 1),
        "pipedream_2bw": 3 * (p - 1),
    }
    idle |= {"interleaved_1f1b": 3 * (p - 1) / v, "zb_h1": p - 1, "zb_h2": 0, "zb_v": 0, "dualpipe_v": p - 1}
    return idle[name] / (3 * m + idle[name]) if name in idle else None


@pytest.mark.parametrize(("name", "v"), TRAINING)
def test_64_ranks_256_microbatches_in_seconds(name: str, v: int) -> None:
    """CPU seconds of this process, so that a busy machine does not count."""
    start_s = time.process_time()
    result = simulated(name, 64, v, 256)
    seconds = time.process_time() - start_s
    print(f"{name} v={v}: {seconds:.2f} s, bubble {result.bubble:.4f}, of the makespan {result.bubble_makespan:.4f}")
    assert seconds < 5
    expected = large_bubble(name, 64, v, 256)
    if expected is not None:
        assert result.bubble == pytest.approx(expected)
    else:
        assert max(result.peak_microbatches) <= {"v_half": (64 + 2) // 2, "v_min": (64 + 4) // 3}[name]


def test_interleaved_with_one_stage_per_rank_is_1f1b() -> None:
    for p, m in product(range(1, 6), range(1, 9)):
        assert make_schedule("interleaved_1f1b", p, 1, m).actions == make_schedule("1f1b", p, 1, m).actions


def shortest_forward(placement: tuple[int, ...], m: int) -> int:
    """Fewest slots in which all forwards can run, by exhaustive search over which stage each rank runs in each slot."""
    stages = range(len(placement))
    states: set[tuple[int, ...]] = {(0,) * len(placement)}
    slots = 0
    while (m,) * len(placement) not in states:
        following = set()
        for done in states:
            possible = [s for s in stages if done[s] < m and (s == 0 or done[s] < done[s - 1])]
            per_rank = [[s for s in possible if placement[s] == rank] or [-1] for rank in set(placement)]
            for choice in product(*per_rank):
                following.add(tuple(count + (s in choice) for s, count in enumerate(done)))
        states, slots = following, slots + 1
    return slots


def test_forward_only_is_shortest_on_the_placements_of_schedules() -> None:
    """Looped, V-shaped and in blocks of v consecutive stages; each stage in microbatch order; one microbatch at a time."""
    for p, v, m in product(range(1, 9), (1, 2, 3), (1, 2, 3, 4, 7, 9, 16, 23)):
        cases = [
            (tuple(s % p for s in range(p * v)), max(v * m + p - 1, v * p + m - 1)),
            (tuple(min(s, 2 * p - 1 - s) for s in range(2 * p)), 2 * (m + p - 1)),
            (tuple(s // v for s in range(p * v)), v * (m + p - 1)),
        ]
        for placement, slots in cases:
            schedule = forward_only(placement, m)
            result = simulate(schedule, Costs.uniform(len(placement)))
            assert result.makespan_s == slots, (placement, m)
            assert set(result.peak_chunks) == {1}
            for stage, rank in enumerate(placement):
                assert [a.microbatch for a in schedule.actions[rank] if a.stage == stage] == [*range(m)]
            check(complete(schedule))


def test_forward_only_on_any_placement_is_close_to_the_shortest() -> None:
    """At least 95 of 100 are the shortest there is, none is a fifth longer; the search agrees with the formulas."""
    assert shortest_forward((0, 1, 0, 1), 3) == 7 and shortest_forward((0, 1, 1, 0), 3) == 8
    draw = random.Random(0)
    ratios = []
    for _ in range(100):
        p = draw.choice((2, 3))
        placement = [*range(p), *(draw.randrange(p) for _ in range(draw.randint(0, 6 - p)))]
        draw.shuffle(placement)
        m = draw.randint(1, 4)
        schedule = forward_only(placement, m)
        check(complete(schedule))
        makespan = simulate(schedule, Costs.uniform(len(placement))).makespan_s
        ratios.append(makespan / shortest_forward(tuple(placement), m))
    assert min(ratios) == 1 and max(ratios) < 1.2
    assert ratios.count(1) >= 95


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
    result = simulate(forward_only((0, 1), 3), Costs.uniform(2, transfer_s=5.0))
    assert [bar.start_s for bar in result.bars if bar.rank == 1] == [6, 11, 16]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("zigzag", 2, 1, 4), ("pipeline.schedule", "zigzag", "interleaved_1f1b")),
        (("1f1b", 2, 2, 4), ("pipeline.virtual_stages = 2", "one stage per rank", "interleaved_1f1b")),
        (("gpipe", 2, 3, 4), ("pipeline.virtual_stages = 3", "one stage per rank")),
        (("1f1b", 0, 1, 4), ("parallel.pipeline = 0", "at least 1")),
        (("interleaved_1f1b", 2, 0, 0), ("pipeline.virtual_stages = 0", "gradient_accumulation_steps = 0")),
        (("zb_h1", 2, 2, 4), ("pipeline.virtual_stages = 2", "one stage per rank")),
        (("zb_v", 2, 1, 4), ("pipeline.virtual_stages = 1", "schedule zb_v runs 2 stages per rank", "Set it to 2")),
        (("zb_h2", 4, 1, 6), ("gradient_accumulation_steps = 6", "zb_h2 on 4 pipeline ranks needs at least 7 micro")),
        (("dualpipe_v", 4, 1, 7), ("pipeline.virtual_stages = 1", "2 stages", "at least 8 microbatches")),
        (("pipedream_2bw", 4, 1, 3), ("gradient_accumulation_steps = 3", "at least 4 microbatches")),
        (("forward_only", 2, 1, 4), ("must be one of",)),
    ],
)
def test_bad_arguments_are_refused_with_rule_and_fix(arguments: tuple, words: tuple[str, ...]) -> None:
    with pytest.raises(ScheduleError) as caught:
        make_schedule(*arguments)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("name", "v"), TRAINING)
def test_recipes_say_what_the_schedules_do(name: str, v: int) -> None:
    """The least count is admitted and one less is not; a recipe that splits backwards has actions for weight gradients."""
    recipe = SCHEDULES[name]
    assert recipe.stages_per_rank in (None, v)
    assert recipe.asynchronous == name.startswith("pipedream")
    for p in range(1, 9):
        least = recipe.min_microbatches(p)
        kinds = {part.kind for _, part in make_schedule(name, p, v, least).parts()}
        assert (W in kinds) == recipe.splits_backward, p
        with pytest.raises(ScheduleError, match="at least"):
            make_schedule(name, p, v, least - 1)


def test_the_names_are_these() -> None:
    assert {name for name, _ in TRAINING} == set(SCHEDULES)


def test_registry_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        SCHEDULES["mine"] = SCHEDULES["1f1b"]  # type: ignore[index]


@pytest.mark.parametrize(
    "text",
    [
        "F0.3",
        "B1.12",
        "I2.0",
        "W2.0",
        "SF0.3>1",
        "SB11.2>0",
        "RF1.3<0",
        "RB0.2<1",
        "AG2",
        "FR2",
        "RD0",
        "RD0.1",
        "TR3",
        "U1.3",
        "V0",
    ],
)
def test_text_form_reads_back(text: str) -> None:
    assert str(parse(text)) == text
    pair = overlapped(Action(F, 4, 1), Action(B, 3, 0))
    assert str(pair) == "F4.1&B3.0" and parse(str(pair)) == pair


@pytest.mark.parametrize(
    "text", ["", "X0.1", "F0", "AG0.1", "V0.1", "U0", "SF0.3", "F0.3>1", "RF0.3>1", "B1.0&F0.0", "F-1.0"]
)
def test_bad_text_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError):
        parse(text)
