"""Communication, reductions and validation are inserted right, and frozen stages lose what they do not need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest

from tests.written_schedules import texts, written
from trilith.errors import ScheduleError
from trilith.pipeline.action import COMPUTE, INPUT_GRADIENT, MESSAGES, RECEIVES, SENDS, Kind, Schedule, parse
from trilith.pipeline.check import check, validated_prefix
from trilith.pipeline.passes import complete, freeze, insert_communication
from trilith.pipeline.schedules import SCHEDULES, forward_only, make_schedule
from trilith.pipeline.simulate import Costs, simulate


def tied(schedule: Schedule, *ties: tuple[int, ...]) -> Schedule:
    return replace(schedule, ties=ties)


def synchronous(ranks: tuple[int, ...], extra: tuple[int, ...]) -> Iterator[Schedule]:
    """Every synchronous schedule, at its least number of microbatches and some more."""
    for name, recipe in SCHEDULES.items():
        v = recipe.stages_per_rank or 3
        for p, more in product(ranks, extra):
            if not recipe.asynchronous:
                yield make_schedule(name, p, v, recipe.min_microbatches(p) + more)


# ------------------------------------------------------------------------------------- messages and reductions


def test_a_completed_schedule_word_for_word() -> None:
    schedule = complete(tied(make_schedule("1f1b", 2, 1, 2), (0, 1)))
    assert texts(schedule) == [
        "F0.0 SF0.0>1 F0.1 SF0.1>1 RB0.0<1 B0.0 RB0.1<1 B0.1 RD0 TR0",
        "RF1.0<0 F1.0 RF1.1<0 B1.0 SB1.0>0 F1.1 B1.1 SB1.1>0 RD1 TR1",
    ]
    assert schedule.channels() == ((0, 1), (1, 0))
    assert complete(schedule) == schedule, "what is there is taken as it is"


def test_stages_of_one_rank_need_no_communication() -> None:
    schedule = complete(tied(make_schedule("interleaved_1f1b", 1, 3, 2), (0, 2)))
    assert not [a for _, a in schedule.parts() if a.kind in MESSAGES or a.kind is Kind.TIE_REDUCE]
    assert schedule.channels() == ()
    check(schedule)


def test_each_message_is_sent_and_received_once() -> None:
    schedule = complete(make_schedule("interleaved_1f1b", 4, 2, 6))
    for kinds, boundaries in ((SENDS, 7), (RECEIVES, 7)):
        found = [a for _, a in schedule.parts() if a.kind in kinds]
        assert len(found) == len(set(found)) == 2 * boundaries * 6
    assert schedule.channels() == ((0, 1), (0, 3), (1, 0), (1, 2), (2, 1), (2, 3), (3, 0), (3, 2))


@pytest.mark.parametrize("name", ["interleaved_1f1b", "zb_h1", "dualpipe_v"])
def test_reductions_follow_the_last_weight_gradient(name: str) -> None:
    schedule = complete(make_schedule(name, 2, SCHEDULES[name].stages_per_rank or 2, 5))
    for rank, actions in enumerate(schedule.actions):
        for stage in schedule.stages_of(rank):
            (reduce,) = (i for i, a in enumerate(actions) if a == parse(f"RD{stage}"))
            ends = {parse(f"B{stage}.4"), parse(f"W{stage}.4")}
            (last,) = (i for i, a in enumerate(actions) if not ends.isdisjoint(a.parts()))
            between = actions[last + 1 : reduce]
            assert all(a.kind in MESSAGES for a in between) and (not between or between[-1].kind in SENDS)
    forwards = complete(forward_only((0, 1, 0, 1), 3))
    assert not [a for _, a in forwards.parts() if a.kind is Kind.REDUCE]


def test_ties_are_summed_over_ranks_once_the_rank_is_reduced() -> None:
    """Of the stages 0 2 | 1 3 on two ranks: the tie of 0 and 2 stays on one rank, the other does not."""
    schedule = complete(tied(make_schedule("interleaved_1f1b", 2, 2, 2), (0, 2), (1, 2, 3)))
    reductions = [[word for word in row.split() if word[:2] in ("RD", "TR")] for row in texts(schedule)]
    assert reductions == [["RD2", "RD0", "TR2"], ["RD3", "RD1", "TR1", "TR3"]]
    check(schedule)


def test_insertion_refuses_an_order_that_cannot_run() -> None:
    backwards_first = written("mine", (0, 1), 1, "B0.0 F0.0", "F1.0 B1.0")
    with pytest.raises(ScheduleError, match=r"rank 0 cannot run backward of stage 0, microbatch 0 \(B0.0\)"):
        insert_communication(backwards_first)


# --------------------------------------------------------------------------------------------------- frozen stages

MIDDLE = "RF1.0<0 F1.0 RF1.1<0 SF1.0>2 F1.1 SF1.1>2"


@pytest.mark.parametrize(
    ("frozen", "rows"),
    [
        (
            (0,),  # stage 1 trains, and has no one to send gradients to
            [
                "F0.0 SF0.0>1 F0.1 SF0.1>1",
                f"{MIDDLE} RB1.0<2 B1.0 RB1.1<2 B1.1 RD1",
                "RF2.0<1 F2.0 RF2.1<1 B2.0 SB2.0>1 F2.1 B2.1 SB2.1>1 RD2",
            ],
        ),
        (
            (1,),
            [
                "F0.0 SF0.0>1 F0.1 SF0.1>1 RB0.0<1 B0.0 RB0.1<1 B0.1 RD0",
                f"{MIDDLE} RB1.0<2 I1.0 SB1.0>0 RB1.1<2 I1.1 SB1.1>0",
                "RF2.0<1 F2.0 RF2.1<1 B2.0 SB2.0>1 F2.1 B2.1 SB2.1>1 RD2",
            ],
        ),
        (
            (0, 2),
            [
                "F0.0 SF0.0>1 F0.1 SF0.1>1",
                f"{MIDDLE} RB1.0<2 B1.0 RB1.1<2 B1.1 RD1",
                "RF2.0<1 F2.0 RF2.1<1 I2.0 SB2.0>1 F2.1 I2.1 SB2.1>1",
            ],
        ),
        ((0, 1), ["F0.0 SF0.0>1 F0.1 SF0.1>1", MIDDLE, "RF2.0<1 F2.0 RF2.1<1 B2.0 F2.1 B2.1 RD2"]),
    ],
)
def test_frozen_stages_word_for_word(frozen: tuple[int, ...], rows: list[str]) -> None:
    schedule = complete(freeze(make_schedule("1f1b", 3, 1, 2), frozen))
    assert texts(schedule) == rows
    check(schedule)


def test_every_schedule_passes_with_frozen_stages() -> None:
    """Before or after completion, split or not; a stage with nothing to train before it keeps its weight gradients."""
    for schedule in synchronous((2, 3), (0, 3)):
        last = schedule.num_stages - 1
        for frozen in ({0}, {last}, {0, last - 1} if last > 1 else {0}, set(range(last))):
            after = complete(freeze(schedule, frozen))
            check(after)
            assert freeze(complete(schedule), frozen) == after == complete(replace(schedule, frozen=frozenset(frozen)))
            assert freeze(after, ()) == after
            weights = {a.stage for _, a in after.parts() if a.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT)}
            assert weights == set(range(schedule.num_stages)) - frozen
            simulate(after, Costs.uniform(schedule.num_stages))


def test_a_frozen_rank_does_not_run_ahead_of_its_neighbour() -> None:
    """Rank 0 has no backwards, but rank 1 takes its messages in where 1F1B takes them."""
    plain, frozen = (complete(freeze(make_schedule("1f1b", 3, 1, 8), stages)) for stages in ((), (0,)))
    forwards = [[a for a in s.actions[1] if a.kind in (Kind.RECEIVE_FORWARD, Kind.BACKWARD)] for s in (plain, frozen)]
    assert forwards[0] == forwards[1]


def test_a_tie_with_a_frozen_stage_is_not_summed() -> None:
    schedule = tied(make_schedule("1f1b", 3, 1, 2), (0, 2), (1, 2))
    both = complete(schedule)
    assert [row.split()[-1] for row in texts(both)] == ["TR0", "TR1", "TR2"]
    one = complete(freeze(both, (0,)))
    assert [row.split()[-1] for row in texts(one)] == ["SF0.1>1", "TR1", "TR2"]
    check(one)


def test_a_schedule_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ScheduleError, match="nothing trains: none of its 2 stages has trainable parameters"):
        freeze(make_schedule("1f1b", 2, 1, 2), (0, 1))
    evaluation = complete(freeze(forward_only((0, 1), 2), (0, 1)))
    check(evaluation)
    with pytest.raises(ScheduleError, match="stage 2 is frozen or tied: stages are 0"):
        freeze(make_schedule("1f1b", 2, 1, 2), (2,))


# ------------------------------------------------------------------------------------------------------ validation


def test_validation_word_for_word() -> None:
    schedule = complete(make_schedule("1f1b", 2, 1, 3), validate=True)
    assert texts(schedule) == [
        "F0.0 SF0.0>1 F0.1 SF0.1>1 V0 RB0.0<1 B0.0 F0.2 RB0.1<1 SF0.2>1 B0.1 RB0.2<1 B0.2 RD0",
        "RF1.0<0 F1.0 RF1.1<0 V1 B1.0 SB1.0>0 F1.1 B1.1 SB1.1>0 RF1.2<0 F1.2 B1.2 SB1.2>0 RD1",
    ]
    assert validated_prefix(schedule) == {(0, 1): 2, (1, 0): 0}
    assert complete(schedule, validate=True) == schedule
    assert validated_prefix(complete(make_schedule("1f1b", 2, 1, 3))) == {}


def test_a_rank_without_backward_validates_when_its_neighbours_do() -> None:
    schedule = complete(freeze(make_schedule("1f1b", 3, 1, 9), (0, 1)), validate=True)
    check(schedule)
    assert [row.split("V")[0] for row in texts(schedule)] == [
        "F0.0 SF0.0>1 F0.1 SF0.1>1 F0.2 SF0.2>1 ",
        "RF1.0<0 F1.0 RF1.1<0 SF1.0>2 F1.1 RF1.2<0 SF1.1>2 ",
        "RF2.0<1 F2.0 RF2.1<1 ",
    ]


WRAPPED = written(
    "wrapped",
    (0, 1, 0, 0),
    2,
    "F0.0 F2.0 F3.0 B3.0 F0.1 F2.1 B2.0 B0.0 F3.1 B3.1 B2.1 B0.1",
    "F1.0 F1.1 B1.0 B1.1",
)


def followers(schedule: Schedule) -> set[tuple[int, int]]:
    """(rank, index) of all that follows from a backward: on its rank, or through a message. The plain way."""
    ends = {}  # (rank that sends, its text) -> place
    for rank, actions in enumerate(schedule.actions):
        for index, a in enumerate(actions):
            if a.kind in SENDS:
                reader = a.stage + (1 if a.kind is Kind.SEND_FORWARD else -1)
                ends[a.peer, reader, a.microbatch, a.kind is Kind.SEND_FORWARD] = (rank, index)
    tainted: set[tuple[int, int]] = set()
    before = -1
    while len(tainted) != before:
        before = len(tainted)
        for rank, actions in enumerate(schedule.actions):
            follows = False
            for index, a in enumerate(actions):
                follows |= a.kind in COMPUTE and any(part.kind in INPUT_GRADIENT for part in a.parts())
                if a.kind in RECEIVES:
                    follows |= ends[rank, a.stage, a.microbatch, a.kind is Kind.RECEIVE_FORWARD] in tainted
                if follows:
                    tainted.add((rank, index))
    return tainted


def test_validation_is_as_late_as_can_be() -> None:
    """Every schedule: the cut is right before the first action that follows from a backward, and passes the check."""
    for schedule in (*synchronous((1, 2, 3, 4), (0, 1, 5)), WRAPPED):
        validated, tainted = complete(schedule, validate=True), followers(complete(schedule))
        check(validated)
        for rank, actions in enumerate(validated.actions):
            (at,) = (index for index, a in enumerate(actions) if a.kind is Kind.VALIDATE)
            assert actions[at].stage == min(schedule.stages_of(rank))
            assert at == min(index for r, index in tainted if r == rank)


def test_validation_comes_before_a_forward_that_follows_from_a_backward() -> None:
    """Rank 0 sends F0.1 after its first backward, so rank 1 may not take it in before it has validated."""
    assert [row.split("V")[0] for row in texts(complete(WRAPPED, validate=True))] == [
        "F0.0 SF0.0>1 RF2.0<1 F2.0 F3.0 ",
        "RF1.0<0 F1.0 SF1.0>0 ",
    ]
    assert texts(complete(WRAPPED, validate=True))[1].split("V")[1].startswith("1 RF1.1<0 F1.1")


def test_what_has_no_step_before_it_is_not_validated() -> None:
    with pytest.raises(ScheduleError, match="computes no gradient: there is no step before it to validate"):
        complete(forward_only((0, 1), 2), validate=True)
    with pytest.raises(ScheduleError, match="asynchronous: there is no step before it to validate"):
        complete(replace(make_schedule("1f1b", 2, 1, 2), update_every=1), validate=True)
