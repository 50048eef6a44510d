"""The asynchronous schedules: which weights a microbatch sees, how much is live, and where steps are cut apart."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import pytest

from tests.written_schedules import Play, texts
from trilith.errors import ScheduleError
from trilith.pipeline.action import MESSAGES, Action, Kind, Schedule
from trilith.pipeline.check import check
from trilith.pipeline.delayed import pipedream, pipedream_2bw, segments
from trilith.pipeline.passes import complete, freeze
from trilith.pipeline.simulate import Costs, simulate

SIZES = [(p, m, steps) for p, m, steps in product(range(1, 7), range(1, 10), range(1, 5))]
DELAYED = {"pipedream": pipedream, "pipedream_2bw": pipedream_2bw}
CASES = [(name, *size) for name in DELAYED for size in SIZES if name == "pipedream" or size[1] >= size[0]]


def test_word_for_word() -> None:
    assert texts(complete(pipedream(2, 2, 2))) == [
        "F0.0 SF0.0>1 F0.1 SF0.1>1 RB0.0<1 B0.0 RD0.0 U0.0 F0.2 RB0.1<1 SF0.2>1 B0.1 RD0.1 U0.1 F0.3 RB0.2<1 SF0.3>1 "
        "B0.2 RD0.2 U0.2 RB0.3<1 B0.3 RD0.3 U0.3",
        "RF1.0<0 F1.0 RF1.1<0 B1.0 SB1.0>0 RD1.0 U1.0 F1.1 B1.1 SB1.1>0 RD1.1 RF1.2<0 U1.1 F1.2 B1.2 SB1.2>0 RD1.2 "
        "RF1.3<0 U1.2 F1.3 B1.3 SB1.3>0 RD1.3 U1.3",
    ]
    tied = complete(replace(pipedream_2bw(2, 2, 2), ties=((0, 1),)))
    assert texts(tied) == [
        "F0.0 SF0.0>1 F0.1 SF0.1>1 RB0.0<1 B0.0 F0.2 RB0.1<1 SF0.2>1 B0.1 RD0.1 TR0.1 F0.3 RB0.2<1 SF0.3>1 B0.2 "
        "RB0.3<1 B0.3 RD0.3 TR0.3",
        "RF1.0<0 F1.0 RF1.1<0 B1.0 SB1.0>0 F1.1 B1.1 SB1.1>0 RD1.1 TR1.1 RF1.2<0 F1.2 B1.2 SB1.2>0 RF1.3<0 F1.3 B1.3 "
        "SB1.3>0 RD1.3 TR1.3",
    ]
    check(tied)
    assert segments(tied, 2) == ((12, 13), (20, 20))


@pytest.mark.parametrize("name", list(DELAYED))
def test_every_window_passes_the_check(name: str) -> None:
    for case, p, m, steps in CASES:
        if case == name:
            check(complete(DELAYED[name](p, m, steps)))


@pytest.mark.parametrize(("p", "m", "steps"), [(1, 4, 2), (2, 3, 3), (4, 3, 2), (4, 8, 3), (6, 1, 9)])
def test_pipedream_sees_the_weights_that_its_paper_says(p: int, m: int, steps: int) -> None:
    """Stage s runs F(k) after exactly max(0, k-(p-1-s)) updates of its own, with at most p-s microbatches live."""
    schedule = complete(pipedream(p, m, steps))
    for stage, actions in enumerate(schedule.actions):
        updates, live, most = 0, 0, 0
        for action in actions:
            if action.kind is Kind.FORWARD:
                assert updates == max(0, action.microbatch - (p - 1 - stage))
                live += 1
                most = max(most, live)
            elif action.kind is Kind.BACKWARD:
                live -= 1
            elif action.kind is Kind.UPDATE:
                assert action.microbatch == updates
                updates += 1
        assert updates == m * steps
        assert most == min(p - stage, m * steps) == simulate(schedule, Costs.uniform(p)).peak_chunks[stage]


def cut(schedule: Schedule, bounds: tuple[tuple[int, ...], ...], step: int, rank: int) -> tuple[Action, ...]:
    """What a rank has done when step `step` is over."""
    return schedule.actions[rank][: bounds[step][rank]]


@pytest.mark.parametrize("frozen", [(), (0,), (0, 1), (1,)])
@pytest.mark.parametrize("name", list(DELAYED))
def test_a_cut_is_between_steps(name: str, frozen: tuple[int, ...]) -> None:
    """All of step i is done everywhere, its reductions and updates too; nothing of step i+2 has begun (2BW)."""
    for case, p, m, steps in CASES:
        if case != name or p <= len(frozen):
            continue
        schedule = complete(freeze(DELAYED[name](p, m, steps), frozen))
        check(schedule)
        bounds = segments(schedule, m)
        assert len(bounds) == steps and bounds[-1] == tuple(len(actions) for actions in schedule.actions)
        for step, rank in product(range(steps), range(p)):
            done, rest = cut(schedule, bounds, step, rank), schedule.actions[rank][bounds[step][rank] :]
            assert not [a for a in rest if -1 < a.microbatch < (step + 1) * m], "left over"
            if name == "pipedream_2bw":
                assert not [a for a in done if a.microbatch >= (step + 2) * m], "begun too early"
        for before, after in pairwise(bounds):
            late = 0 if name == "pipedream" else 1  # m < p: the last ranks run out of work before
            assert all(a + late <= b for a, b in zip(before, after, strict=True))


def test_the_pipeline_stays_full_over_a_cut() -> None:
    """At a cut of 2BW every rank has begun at least p-2 forwards of the next step."""
    for p in range(2, 7):
        schedule = complete(pipedream_2bw(p, 8, 3))
        bounds = segments(schedule, 8)
        for rank in range(p):
            done = cut(schedule, bounds, 0, rank)
            begun = sum(action.kind is Kind.FORWARD for action in done) - 8
            assert begun >= p - 2, (p, rank)


@pytest.mark.parametrize("frozen", [(), (0,), (1,)])
@pytest.mark.parametrize("name", list(DELAYED))
def test_barriers_at_the_cuts_do_not_deadlock(name: str, frozen: tuple[int, ...]) -> None:
    """Played with all ranks waiting for each other at every cut, with buffers and without; no message crosses a cut."""
    for case, p, m, steps in CASES:
        if case != name or p <= len(frozen):
            continue
        schedule = complete(freeze(DELAYED[name](p, m, steps), frozen))
        for buffered in (True, False):
            played = Play(schedule, buffered=buffered)
            for stops in segments(schedule, m):
                played.to(stops)
                assert not any(played.wires.values())


@pytest.mark.parametrize("name", list(DELAYED))
def test_the_bubble_goes_down_with_the_steps(name: str) -> None:
    for p, m in ((2, 2), (4, 8), (6, 6)):
        bubbles = [simulate(DELAYED[name](p, m, steps), Costs.uniform(p)).bubble for steps in range(1, 9)]
        assert bubbles == [pytest.approx((p - 1) / (steps * m + p - 1)) for steps in range(1, 9)]


def test_2bw_needs_a_microbatch_per_rank() -> None:
    with pytest.raises(ScheduleError, match="3 microbatches on 4 ranks; it needs at least 4"):
        pipedream_2bw(4, 3)
    assert pipedream_2bw(4, 4).update_every == 4 and pipedream(4, 3).update_every == 1


def test_frozen_stages_have_no_updates() -> None:
    schedule = complete(freeze(pipedream(3, 2, 2), (1,)))
    kinds = [{action.kind for action in actions} - MESSAGES for actions in schedule.actions]
    trained = {Kind.FORWARD, Kind.BACKWARD, Kind.REDUCE, Kind.UPDATE}
    assert kinds == [trained, {Kind.FORWARD, Kind.BACKWARD_INPUT}, trained]
