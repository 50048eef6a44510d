"""Communication and reductions are inserted right, good schedules pass the check, broken ones name what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from trilith.errors import ScheduleError
from trilith.pipeline.action import RECEIVES, SENDS, Kind, Schedule, parse
from trilith.pipeline.passes import check, complete, insert_communication, insert_reduce
from trilith.pipeline.schedules import make_schedule
from trilith.pipeline.simulate import Costs, simulate
from trilith.pipeline.timeline import Record, describe, figure, measured_bars, measured_costs, show, text_grid


def written(name: str, placement: tuple[int, ...], num_microbatches: int, *ranks: str) -> Schedule:
    """A schedule from the text form of its actions."""
    actions = tuple(tuple(parse(word) for word in row.split()) for row in ranks)
    return Schedule(name, len(ranks), len(placement), num_microbatches, placement, actions)


def edited(schedule: Schedule, rank: int, old: str, new: str) -> Schedule:
    """The schedule with a part of one rank's text replaced; `old` must be there."""
    texts = [" ".join(str(action) for action in actions) for actions in schedule.actions]
    assert old in texts[rank], texts[rank]
    texts[rank] = texts[rank].replace(old, new, 1)
    return written(schedule.name, schedule.placement, schedule.num_microbatches, *texts)


@pytest.mark.parametrize(
    ("name", "v"),
    [("gpipe", 1), ("1f1b", 1), *(("interleaved_1f1b", v) for v in (1, 2, 3)), *(("forward_only", v) for v in (1, 3))],
)
def test_every_schedule_passes_the_check(name: str, v: int) -> None:
    for p in range(1, 9):
        for m in range(1, 25):
            check(complete(make_schedule(name, p, v, m), ties=True))


def test_a_completed_schedule_word_for_word() -> None:
    schedule = complete(make_schedule("1f1b", 2, 1, 2), ties=True)
    assert [" ".join(str(a) for a in actions) for actions in schedule.actions] == [
        "F0.0 SF0.0>1 F0.1 SF0.1>1 RB0.0<1 B0.0 RB0.1<1 B0.1 RD0 TR0",
        "RF1.0<0 F1.0 RF1.1<0 B1.0 SB1.0>0 F1.1 B1.1 SB1.1>0 RD1 TR1",
    ]
    assert schedule.channels() == ((0, 1), (1, 0))


def test_stages_of_one_rank_need_no_communication() -> None:
    schedule = complete(make_schedule("interleaved_1f1b", 1, 3, 2), ties=True)
    assert not [a for _, a in schedule.parts() if a.kind in SENDS | RECEIVES or a.kind is Kind.TIE_REDUCE]
    assert schedule.channels() == ()
    check(schedule)


def test_each_message_is_sent_and_received_once() -> None:
    schedule = complete(make_schedule("interleaved_1f1b", 4, 2, 6))
    for kinds, boundaries in ((SENDS, 7), (RECEIVES, 7)):
        found = [a for _, a in schedule.parts() if a.kind in kinds]
        assert len(found) == len(set(found)) == 2 * boundaries * 6
    assert schedule.channels() == ((0, 1), (0, 3), (1, 0), (1, 2), (2, 1), (2, 3), (3, 0), (3, 2))


def test_reductions_follow_the_last_backward() -> None:
    schedule = complete(make_schedule("interleaved_1f1b", 2, 2, 3))
    for rank, actions in enumerate(schedule.actions):
        for stage in schedule.stages_of(rank):
            (reduce,) = (i for i, a in enumerate(actions) if a == parse(f"RD{stage}"))
            (last,) = (i for i, a in enumerate(actions) if a == parse(f"B{stage}.2"))
            assert all(a.kind in SENDS for a in actions[last + 1 : reduce])
    assert not [a for _, a in complete(make_schedule("forward_only", 2, 2, 3)).parts() if a.kind is Kind.REDUCE]


def test_insertion_refuses_an_order_that_cannot_run() -> None:
    backwards_first = written("mine", (0, 1), 1, "B0.0 F0.0", "F1.0 B1.0")
    with pytest.raises(ScheduleError, match=r"rank 0 cannot run backward of stage 0, microbatch 0 \(B0.0\)"):
        insert_communication(backwards_first)


GOOD = complete(make_schedule("1f1b", 2, 1, 3), ties=True)
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
        (0, "F0.1", "F0.1 F0.1", "(F0.1) is there twice"),
        (0, "F0.1", "F0.1 W0.1", "(I0.1) is missing"),
        (0, "F0.1", "F1.1", "stage 1 lies on rank 1"),
        (0, "F0.1", "F0.7", "microbatches are 0..2"),
        (0, "F0.1", "F5.1", "stages are 0..1"),
        (0, "SF0.1>1", "SF0.1>0", "(SF0.1>1) is missing"),
        (1, "SB1.0>0", "SB1.0>0 SF1.0>0", "(SF1.0>0) is not asked for"),
        (0, " TR0", "", "tied weights are summed by the ranks of the first and the last stage together"),
        (0, "RD0 TR0", "TR0 RD0", "(TR0) comes before the stage's reduce"),
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
    broken = edited(GOOD, rank, old, new)
    with pytest.raises(ScheduleError) as caught:
        check(broken)
    assert words in str(caught.value)


def test_eager_sends_alone_do_not_prove_a_schedule() -> None:
    """Both ranks send before they receive: fine with buffers, a deadlock without. The message follows the cycle."""
    schedule = written(
        "mine",
        (0, 1),
        2,
        "F0.0 SF0.0>1 F0.1 SF0.1>1 RB0.0<1 B0.0 RB0.1<1 B0.1 RD0",
        "RF1.0<0 F1.0 B1.0 SB1.0>0 RF1.1<0 F1.1 B1.1 SB1.1>0 RD1",
    )
    with pytest.raises(ScheduleError) as caught:
        check(schedule)
    text = str(caught.value)
    assert "deadlocks with blocking sends" in text
    assert "rank 0 cannot run send forward of stage 0, microbatch 1 (SF0.1>1)" in text
    assert "rank 1 cannot run send backward of stage 1, microbatch 0 (SB1.0>0)" in text


def test_shapes_of_a_schedule_are_checked() -> None:
    with pytest.raises(ScheduleError, match="placed stages"):
        check(replace(GOOD, num_stages=3))
    with pytest.raises(ScheduleError, match="placed on rank 4"):
        check(replace(GOOD, placement=(0, 4)))


def test_a_schedule_without_communication_is_refused() -> None:
    with pytest.raises(ScheduleError, match="is missing"):
        check(insert_reduce(make_schedule("1f1b", 2, 1, 2)))


def test_split_and_overlapped_backwards_pass() -> None:
    """What later schedules need: input and weight gradients apart, a forward and a backward as one, a V placement."""
    split = written("split", (0, 1), 2, "F0.0 F0.1 I0.0 W0.0 I0.1 W0.1", "F1.0 I1.0 F1.1 W1.0 I1.1 W1.1")
    check(complete(split))
    result = simulate(split, Costs.uniform(2))
    assert result.peak_chunks == (2, 2), "a microbatch lives until its weight gradient"
    v_shape = written(
        "v", (0, 1, 1, 0), 2, "F0.0 F0.1 F3.0 B3.0 F3.1&B0.0 B3.1 B0.1", "F1.0 F2.0 F1.1 F2.1 B2.0 B1.0 B2.1 B1.1"
    )
    completed = complete(v_shape, ties=True)
    assert not [a for _, a in completed.parts() if a.kind is Kind.TIE_REDUCE], "first and last stage share a rank"
    check(completed)
    with pytest.raises(ScheduleError, match="weight gradients of a stage run in microbatch order"):
        check(edited(complete(split), 0, "W0.0 RB0.1<1 I0.1 W0.1", "RB0.1<1 I0.1 W0.1 W0.0"))


def test_summary_and_pictures(tmp_path: Path) -> None:
    shown = show("interleaved_1f1b", 4, 2, 8, tmp_path / "out.png")
    assert shown.summary["bubble"] == pytest.approx(3 / 19)
    assert shown.summary["bubble_makespan"] == pytest.approx(3 / 19)
    assert shown.summary["peak_microbatches"] == [5.5, 4.5, 3.5, 2.5]
    assert shown.summary["actions"][3].split()[0] == "RF3.0<2"
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "15.8%" in shown.text and "5.5" in shown.text
    with pytest.raises(ScheduleError):
        show("1f1b", 4, 2, 8)


def test_text_grid_is_to_scale() -> None:
    schedule = make_schedule("1f1b", 2, 1, 2)
    bars = simulate(schedule, Costs.uniform(2)).bars
    assert text_grid(bars).splitlines() == ["0 |F0-F1-......B0====...B1====|", "1 |...F0-B0====F1-B1====......|"]
    assert all(len(line) <= 24 for line in text_grid(bars, columns=20).splitlines())
    assert text_grid(()) == ""
    assert describe(schedule, simulate(schedule, Costs.uniform(2)))["peak_chunks"] == [2, 1]


def test_measured_bars_start_at_zero(tmp_path: Path) -> None:
    records = {1: [("backward", 1, 0, 12.5, 13.0)], 0: [("forward", 0, 0, 10.0, 11.0), ("reduce", 0, -1, 11.0, 11.0)]}
    bars = measured_bars(records)
    assert [(bar.rank, bar.kind, bar.start_s, bar.end_s) for bar in bars] == [
        (0, Kind.FORWARD, 0.0, 1.0),
        (0, Kind.REDUCE, 1.0, 1.0),
        (1, Kind.BACKWARD, 2.5, 3.0),
    ]
    rows = {0: [*records[0], ("forward", 0, 1, 11.0, 14.0)], 1: records[1]}
    costs = measured_costs({rank: [Record(*record) for record in row] for rank, row in rows.items()}, 2)
    assert costs == Costs((2.0, 0.0), (0.0, 0.5), (0.0, 0.0))
    figure({"measured": bars, "nothing": ()}, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000
