"""Good schedules pass the check, broken ones are refused by the first action that is wrong or cannot run."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product

import pytest

from tests.written_schedules import play, texts, written
from trilith.errors import ScheduleError
from trilith.pipeline.action import Action, Kind, Schedule, overlapped
from trilith.pipeline.check import check
from trilith.pipeline.delayed import pipedream, pipedream_2bw
from trilith.pipeline.passes import complete, freeze, insert_reductions
from trilith.pipeline.schedules import SCHEDULES, make_schedule
from trilith.pipeline.simulate import Costs, simulate


def edited(schedule: Schedule, rank: int, old: str, new: str) -> Schedule:
    """The schedule with a part of one rank's text replaced; `old` must be there."""
    rows = texts(schedule)
    assert old in rows[rank], rows[rank]
    rows[rank] = rows[rank].replace(old, new, 1)
    return replace(
        schedule, actions=written(schedule.name, schedule.placement, schedule.num_microbatches, *rows).actions
    )


def refusal(schedule: Schedule) -> str:
    """The text that `check` refuses a schedule with."""
    with pytest.raises(ScheduleError) as caught:
        check(schedule)
    return str(caught.value)


GOOD = complete(replace(make_schedule("1f1b", 2, 1, 3), ties=((0, 1),)))
# rank 0: F0.0 SF0.0>1 F0.1 SF0.1>1 RB0.0<1 B0.0 F0.2 RB0.1<1 SF0.2>1 B0.1 RB0.2<1 B0.2 RD0 TR0
# rank 1: RF1.0<0 F1.0 RF1.1<0 B1.0 SB1.0>0 F1.1 B1.1 SB1.1>0 RF1.2<0 F1.2 B1.2 SB1.2>0 RD1 TR1


@pytest.mark.parametrize(
    ("rank", "old", "new", "words"),
    [
        (0, "F0.1 ", "", "forward of stage 0, microbatch 1 (F0.1) is missing"),
        (1, "B1.1 ", "", "backward of stage 1, microbatch 1 (B1.1) is missing"),
        (1, "RF1.1<0 ", "", "(RF1.1<0) is missing"),
        (0, "SF0.1>1 ", "", "(SF0.1>1) is missing"),
        (0, "RD0 ", "", "reduce of stage 0 (RD0) is missing"),
        (0, " TR0", "", "tie reduce of stage 0 (TR0) is missing"),
        (0, "F0.1", "F0.1 F0.1", "(F0.1) is there twice"),
        (0, "F0.1", "F0.1 W0.1", "(I0.1) is missing"),
        (0, "F0.1", "F1.1", "stage 1 lies on rank 1"),
        (0, "F0.1", "F0.7", "microbatches are 0..2"),
        (0, "F0.1", "F5.1", "stages are 0..1"),
        (0, "SF0.1>1", "SF0.1>0", "(SF0.1>1) is missing"),
        (1, "SB1.0>0", "SB1.0>0 SF1.0>0", "(SF1.0>0) is not asked for"),
        (0, "RD0 TR0", "TR0 RD0", "(TR0) comes before reduce of stage 0 (RD0)"),
        (0, "RD0", "RD0.2", "(RD0) is missing"),
        (0, "RD0", "RD0 U0.2", "update of stage 0, microbatch 2 (U0.2) is not asked for"),
        (1, "B1.2 SB1.2>0 RD1", "RD1 B1.2 SB1.2>0", "(RD1) comes before the stage's last backward"),
        (0, "B0.1 RB0.2<1 B0.2", "B0.2 RB0.2<1 B0.1", "(B0.2) comes before microbatch 1"),
        (1, "RF1.0<0 F1.0 RF1.1<0", "RF1.1<0 F1.0 RF1.0<0", "rank 1 cannot run receive forward of stage 1"),
        (1, "RF1.0<0 F1.0", "F1.0 RF1.0<0", "it waits for receive forward of stage 1, microbatch 0 (RF1.0<0)"),
        (0, "F0.0 SF0.0>1", "SF0.0>1 F0.0", "it waits for forward of stage 0, microbatch 0 (F0.0), which comes after"),
        (1, "F1.1 B1.1", "B1.1 F1.1", "rank 1 cannot run backward of stage 1, microbatch 1 (B1.1)"),
        (0, "F0.1 SF0.1>1 RB0.0<1 B0.0", "RB0.0<1 B0.0 F0.1 SF0.1>1", "which stands at receive forward of stage 1"),
    ],
)
def test_a_broken_schedule_is_refused_by_name(rank: int, old: str, new: str, words: str) -> None:
    check(GOOD)
    assert words in refusal(edited(GOOD, rank, old, new))


def test_eager_sends_alone_do_not_prove_a_schedule() -> None:
    """Both ranks send before they receive: fine with buffers, a deadlock without. The message follows the cycle."""
    text = refusal(
        written(
            "mine",
            (0, 1),
            2,
            "F0.0 SF0.0>1 F0.1 SF0.1>1 RB0.0<1 B0.0 RB0.1<1 B0.1 RD0",
            "RF1.0<0 F1.0 B1.0 SB1.0>0 RF1.1<0 F1.1 B1.1 SB1.1>0 RD1",
        )
    )
    assert "deadlocks with blocking sends" in text
    assert "rank 0 cannot run send forward of stage 0, microbatch 1 (SF0.1>1)" in text
    assert "rank 1 cannot run send backward of stage 1, microbatch 0 (SB1.0>0)" in text


def test_shapes_of_a_schedule_are_checked() -> None:
    assert "placed stages" in refusal(replace(GOOD, num_stages=3))
    assert "placed on rank 4" in refusal(replace(GOOD, placement=(0, 4)))
    assert "rank 1 holds no stage" in refusal(replace(GOOD, placement=(0, 0)))
    assert "stage 2 is frozen or tied" in refusal(replace(GOOD, ties=((0, 2),)))
    assert "3 microbatches do not divide into updates of 2" in refusal(replace(GOOD, update_every=2))


def test_a_schedule_without_communication_is_refused() -> None:
    assert "is missing" in refusal(insert_reductions(make_schedule("1f1b", 2, 1, 2)))


def test_ties_are_the_schedules() -> None:
    """Sums that no tie asks for are refused, and none is asked for where a tie stays on one rank."""
    assert "tie reduce of stage 0 (TR0) is not asked for" in refusal(replace(GOOD, ties=()))
    assert "tie reduce of stage 0 (TR0) is not asked for" in refusal(replace(GOOD, ties=((1,),)))


# ------------------------------------------------------------------------------------- split and overlapped backwards

SPLIT = complete(written("split", (0, 1), 2, "F0.0 F0.1 I0.0 W0.0 I0.1 W0.1", "F1.0 I1.0 F1.1 W1.0 I1.1 W1.1"))
# rank 0: F0.0 SF0.0>1 F0.1 SF0.1>1 RB0.0<1 I0.0 W0.0 RB0.1<1 I0.1 W0.1 RD0
# rank 1: RF1.0<0 F1.0 RF1.1<0 I1.0 SB1.0>0 F1.1 W1.0 I1.1 SB1.1>0 W1.1 RD1


@pytest.mark.parametrize(
    ("rank", "old", "new", "words"),
    [
        (
            0,
            "I0.0 W0.0",
            "W0.0 I0.0",
            "rank 0 cannot run backward weight of stage 0, microbatch 0 (W0.0): it waits for",
        ),
        (0, "W0.0 RB0.1<1 I0.1 W0.1", "RB0.1<1 I0.1 W0.1 W0.0", "weight gradients of a stage run in microbatch order"),
        (
            0,
            "RB0.0<1 I0.0 W0.0 RB0.1<1 I0.1",
            "RB0.0<1 RB0.1<1 I0.1 I0.0 W0.0",
            "(I0.1) comes before microbatch 0: input gradients of a stage run in microbatch order",
        ),
        (0, "W0.1 RD0", "RD0 W0.1", "(RD0) comes before the stage's last backward"),
        (0, " W0.1", "", "backward weight of stage 0, microbatch 1 (W0.1) is missing"),
        (1, "I1.1", "B1.1", "backward input of stage 1, microbatch 1 (I1.1) is missing"),
        (1, "W1.1", "W1.1 B1.1", "backward of stage 1, microbatch 1 (B1.1) is not asked for"),
    ],
)
def test_split_backwards(rank: int, old: str, new: str, words: str) -> None:
    check(SPLIT)
    assert words in refusal(edited(SPLIT, rank, old, new))


PAIRS = complete(
    written("v", (0, 1, 1, 0), 2, "F0.0 F0.1 F3.0 B3.0 F3.1&B0.0 B3.1 B0.1", "F1.0 F2.0 F1.1 F2.1 B2.0 B1.0 B2.1 B1.1")
)


def test_overlapped_pairs() -> None:
    """The dependencies of both parts hold before a pair starts, and it is of two microbatches."""
    check(PAIRS)
    late = edited(PAIRS, 0, "RF3.1<1 SB3.0>1 RB0.0<1 F3.1&B0.0", "SB3.0>1 F3.1&B0.0 RF3.1<1 RB0.0<1")
    assert "(F3.1) overlapped with backward of stage 0, microbatch 0 (B0.0)" in refusal(late)
    assert "it waits for receive forward of stage 3, microbatch 1 (RF3.1<1), which comes after it" in refusal(late)
    half = edited(PAIRS, 0, "RB0.0<1 F3.1&B0.0", "F3.1&B0.0 RB0.0<1")
    assert "it waits for receive backward of stage 0, microbatch 0 (RB0.0<1), which comes after it" in refusal(half)
    same = written("mine", (0, 0), 1, "F0.0 F1.0&B1.0 B0.0 RD0 RD1")
    assert "(F1.0) with backward of stage 1, microbatch 0 (B1.0): a pair has two microbatches" in refusal(same)
    wrong = overlapped(Action(Kind.FORWARD, 0, 1), Action(Kind.BACKWARD_WEIGHT, 0, 0))
    actions = (Action(Kind.FORWARD, 0, 0), Action(Kind.BACKWARD_INPUT, 0, 0), wrong)
    row = (*actions, Action(Kind.BACKWARD, 0, 1), Action(Kind.REDUCE, 0))
    assert "a pair is F and B, or F and I" in refusal(Schedule("mine", 1, 1, 2, (0,), (row,)))


# ------------------------------------------------------------------------------------------- windows, frozen, validate

WINDOW = complete(pipedream(2, 3))
# rank 0: F0.0 SF0.0>1 F0.1 SF0.1>1 RB0.0<1 B0.0 RD0.0 U0.0 F0.2 RB0.1<1 SF0.2>1 B0.1 RD0.1 U0.1 RB0.2<1 B0.2 ...
TWO_STEPS = complete(replace(pipedream_2bw(2, 2, 2), ties=((0, 1),)))
FROZEN = complete(freeze(make_schedule("1f1b", 3, 1, 2), (0, 2)))
VALIDATED = complete(make_schedule("1f1b", 2, 1, 3), validate=True)


@pytest.mark.parametrize(
    ("good", "rank", "old", "new", "words"),
    [
        (WINDOW, 0, " U0.1", "", "update of stage 0, microbatch 1 (U0.1) is missing"),
        (WINDOW, 0, " RD0.1", "", "reduce of stage 0, microbatch 1 (RD0.1) is missing"),
        (WINDOW, 0, "RD0.0 U0.0", "U0.0 RD0.0", "(U0.0) comes before reduce of stage 0, microbatch 0 (RD0.0)"),
        (WINDOW, 0, "B0.0 RD0.0", "RD0.0 B0.0", "(RD0.0) comes before the stage's last backward of that update"),
        (WINDOW, 0, "RD0.1 U0.1 RB0.2<1 B0.2", "RB0.2<1 B0.2 RD0.1 U0.1", "(RD0.1) comes after the stage's backward"),
        (WINDOW, 0, "U0.1 RB0.2<1 B0.2", "RB0.2<1 B0.2 U0.1", "(U0.1) comes after the stage's backward of the next"),
        (WINDOW, 0, "RD0.1", "RD0", "(RD0.1) is missing"),
        (TWO_STEPS, 1, "RD1.1 TR1.1", "TR1.1 RD1.1", "(TR1.1) comes before reduce of stage 1, microbatch 1 (RD1.1)"),
        (TWO_STEPS, 1, " TR1.1", "", "tie reduce of stage 1, microbatch 1 (TR1.1) is missing"),
        (TWO_STEPS, 1, "RD1.1 TR1.1", "RD1.1 TR1.1 U1.1", "stages 0, 1 share weights across ranks"),
        (FROZEN, 1, " B1.0", " B1.0 SB1.0>0", "send backward of stage 1, microbatch 0 (SB1.0>0) is not asked for"),
        (FROZEN, 2, "I2.1", "B2.1", "backward input of stage 2, microbatch 1 (I2.1) is missing"),
        (FROZEN, 2, "I2.1", "I2.1 W2.1", "backward weight of stage 2, microbatch 1 (W2.1) is not asked for"),
        (FROZEN, 0, "SF0.1>1", "SF0.1>1 RD0", "reduce of stage 0 (RD0) is not asked for"),
        (VALIDATED, 0, " V0", "", "rank 0: validate of stage 0 (V0) is missing"),
        (VALIDATED, 1, "V1 B1.0", "B1.0 V1", "validate of stage 1 (V1) comes after the rank's first backward"),
        (
            VALIDATED,
            0,
            "V0 RB0.0<1",
            "RB0.0<1 V0",
            "receive backward of stage 0, microbatch 0 (RB0.0<1) comes before the",
        ),
        (VALIDATED, 0, "F0.1 SF0.1>1 V0", "V0 F0.1 SF0.1>1", "(RF1.1<0) comes before the rank's validate, but rank 0"),
        (VALIDATED, 0, "V0", "V0 V0", "validate of stage 0 (V0) is there twice"),
    ],
)
def test_what_else_a_schedule_may_hold(good: Schedule, rank: int, old: str, new: str, words: str) -> None:
    check(good)
    assert words in refusal(edited(good, rank, old, new))


def test_updates_stage_by_stage_do_not_go_with_shared_weights() -> None:
    tied = complete(replace(pipedream(2, 3), ties=((0, 1),)))
    assert "it updates stage by stage, but stages 0, 1 share weights across ranks" in refusal(tied)


def test_only_synchronous_training_is_validated() -> None:
    assert "(V0) is not asked for" in refusal(edited(WINDOW, 0, "RB0.0<1", "V0 RB0.0<1"))
    forward = complete(written("mine", (0,), 1, "F0.0"))
    check(forward)
    assert "(V0) is not asked for" in refusal(edited(forward, 0, "F0.0", "F0.0 V0"))


# ---------------------------------------------------------------------------------------------------- all of them


def test_every_schedule_plays_to_its_end() -> None:
    """A player that shares no code with the check agrees with it; pairs, splits, windows and validated steps."""
    for name, recipe in SCHEDULES.items():
        v = recipe.stages_per_rank or 2
        for p, more in product((1, 2, 4), (0, 3)):
            schedule = complete(make_schedule(name, p, v, recipe.min_microbatches(p) + more))
            check(schedule)
            play(schedule)
            if not recipe.asynchronous:
                play(complete(schedule, validate=True))


@pytest.mark.slow
def test_64_ranks_are_proven_in_seconds() -> None:
    """98304 computations; CPU seconds of this process, so that a busy machine does not count."""
    schedule = make_schedule("interleaved_1f1b", 64, 2, 256)
    split = {Kind.BACKWARD: (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)}
    rows = (
        tuple(replace(a, kind=kind) for a in row for kind in split.get(a.kind, (a.kind,))) for row in schedule.actions
    )
    schedule = replace(schedule, actions=tuple(rows))
    start_s = time.process_time()
    simulate(schedule, Costs.uniform(128))
    simulated_s = time.process_time()
    check(complete(schedule))
    assert simulated_s - start_s < 3
    assert time.process_time() - simulated_s < 30
