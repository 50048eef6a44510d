"""What simulation says of schedules beyond their bubbles: overlapped pairs, live microbatches and live bytes."""

from __future__ import annotations

import random

import pytest

from tests.written_schedules import written
from trilith.pipeline.action import Kind, Schedule
from trilith.pipeline.delayed import pipedream, pipedream_2bw
from trilith.pipeline.passes import complete, freeze
from trilith.pipeline.schedules import SCHEDULES, forward_only, make_schedule
from trilith.pipeline.simulate import Costs, peak_bytes, peak_chunks, simulate

PAIR = written("pair", (0,), 2, "F0.0 F0.1&B0.0 B0.1")


def test_an_overlapped_pair_takes_the_sum_or_what_it_is_said_to_take() -> None:
    assert simulate(PAIR, Costs.uniform(1)).makespan_s == 1 + 3 + 2
    assert simulate(PAIR, Costs.uniform(1, overlapped_s=2.5)).makespan_s == 1 + 2.5 + 2
    two = Costs((1.0, 1.0), (1.0, 1.0), (1.0, 1.0), overlapped_s=(2.0, 2.25))
    crossing = written("crossing", (0, 0), 2, "F0.0 F1.0 F0.1&B1.0 B0.0 F1.1 B1.1 B0.1")
    assert simulate(crossing, two).makespan_s == 2 + 2.0 + 2 + 1 + 4, "the forward's stage says which"


def test_peaks_of_split_and_frozen_stages() -> None:
    split = written("split", (0, 1), 2, "F0.0 F0.1 I0.0 W0.0 I0.1 W0.1", "F1.0 I1.0 F1.1 W1.0 I1.1 W1.1")
    assert peak_chunks(split) == (2, 2), "a microbatch lives until its weight gradient"
    assert peak_chunks(freeze(split, (1,))) == (2, 1), "where there is none, until its input gradient"
    assert peak_chunks(freeze(split, (0,))) == (1, 2), "without backward, while its forward runs"
    assert peak_chunks(forward_only((0, 1, 0), 3)) == (1, 1)
    assert peak_chunks(PAIR) == (2,), "both microbatches of a pair are live while it runs"


@pytest.mark.parametrize("p", range(1, 7))
def test_peaks_of_long_windows(p: int) -> None:
    assert peak_chunks(pipedream(p, 3, 4)) == tuple(min(p - s, 12) for s in range(p))
    assert peak_chunks(pipedream_2bw(p, p, 4)) == tuple(p - s for s in range(p))


def slow_peak_bytes(schedule: Schedule, forward: list[float], gradient: list[float]) -> tuple[float, ...]:
    """By a table of what is held, summed anew after each action."""
    backwards = {a.stage for _, a in schedule.parts() if a.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT)}
    peaks = []
    for actions in schedule.actions:
        held: dict[tuple[int, int], float] = {}
        peak = 0.0
        for part in (part for action in actions for part in action.parts()):
            at = (part.stage, part.microbatch)
            if part.kind is Kind.FORWARD and part.stage in backwards:
                held[at] = forward[part.stage]
            elif part.kind is Kind.BACKWARD_INPUT and part.stage not in schedule.frozen:
                held[at] = gradient[part.stage]
            elif part.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT):
                del held[at]
            peak = max(peak, sum(held.values()))
        assert not held
        peaks.append(peak)
    return tuple(peaks)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_peak_bytes_of_every_schedule(name: str) -> None:
    draw, recipe = random.Random(0), SCHEDULES[name]
    for p in (2, 3, 4):
        schedule = make_schedule(name, p, recipe.stages_per_rank or 2, recipe.min_microbatches(p) + 4)
        forward = [float(draw.randint(1, 1000)) for _ in range(schedule.num_stages)]
        gradient = [float(draw.randint(1, 1000)) for _ in range(schedule.num_stages)]
        for frozen in ((), (0,), (0, 1), (schedule.num_stages - 1,)):
            if len(frozen) < schedule.num_stages:
                cases = freeze(schedule, frozen)
                expected = slow_peak_bytes(cases, forward, gradient)
                assert (
                    peak_bytes(cases, forward, gradient) == expected == peak_bytes(complete(cases), forward, gradient)
                )


def test_peak_bytes_by_hand() -> None:
    split = written("split", (0,), 2, "F0.0 I0.0 F0.1 I0.1 W0.0 W0.1")
    assert peak_bytes(split, [10.0], [4.0]) == (14.0,), "after F0.1: 4 of microbatch 0, 10 of microbatch 1"
    assert peak_bytes(split, [10.0], [40.0]) == (80.0,), "after I0.1: 40 of each"
    assert peak_bytes(PAIR, [10.0], [4.0]) == (20.0,)
    assert peak_bytes(forward_only((0, 1), 2), [10.0, 10.0], [4.0, 4.0]) == (0.0, 0.0)
