"""Timelines: drawings to scale, costs from records, measured bubbles, and who cost the difference to the simulation."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from trilith.errors import ScheduleError, TrilithError
from trilith.pipeline.action import COMPUTE, Action, Kind, Schedule
from trilith.pipeline.passes import complete
from trilith.pipeline.schedules import make_schedule
from trilith.pipeline.simulate import Bar, Costs, action_times, simulate
from trilith.pipeline.timeline import COLOURS, Record, describe, figure, named_schedule, parse_costs, show, text_grid
from trilith.pipeline.trace import Records, delays, measured_bars, measured_costs, measured_step
from trilith.pipeline.trace_file import Trace, read_trace

COSTS = Costs((2.0, 3.0), (2.5, 4.0), (1.0, 2.0), 0.5)
COSTS_4 = Costs((2.0, 3.0, 1.0, 4.0), (2.5, 4.0, 1.5, 3.0), (1.0, 2.0, 0.5, 1.25), 0.5)


def recorded(schedule: Schedule, costs: Costs, pause_s: float = 0.0) -> dict[int, list[Record]]:
    """What executors would record if they ran exactly as simulated; of a pair both parts, of which neither waits for the
    other's inputs.

    The last `pause_s` of every action is not recorded: the rank launches a message, or frees memory.
    """
    parts = tuple(tuple(part for action in row for part in action.parts()) for row in schedule.actions)
    return {
        rank: [Record(a.kind, a.stage, a.microbatch, start_s + 100, end_s + 100 - pause_s) for a, start_s, end_s in row]
        for rank, row in enumerate(action_times(replace(schedule, actions=parts), costs))
    }


def changed(records: Records, rank: int, text: str, by_s: float) -> dict[int, list[Record]]:
    """The same, with one action of the rank that takes so much longer; all after it on that rank come later."""
    rows = {r: list(row) for r, row in records.items()}
    late_s = 0.0
    for index, record in enumerate(rows[rank]):
        start_s = record.start_s + late_s
        if str(Action(record.kind, record.stage, record.microbatch)) == text:
            late_s = by_s
        rows[rank][index] = record._replace(start_s=start_s, end_s=record.end_s + late_s)
    assert late_s
    return rows


# ---- drawing ------------------------------------------------------------------------------------------------------


def test_text_grid_is_to_scale() -> None:
    schedule = make_schedule("1f1b", 2, 1, 2)
    bars = simulate(schedule, Costs.uniform(2)).bars
    assert text_grid(bars).splitlines() == ["0 |F0-F1-......B0====...B1====|", "1 |...F0-B0====F1-B1====......|"]
    assert all(len(line) <= 24 for line in text_grid(bars, columns=20).splitlines())
    twice = text_grid(bars, columns=54, end_s=18.0).splitlines()
    assert [line[:30] for line in twice] == [line[:-1] for line in text_grid(bars, columns=27).splitlines()]
    assert all(set(line[30:-1]) == {"."} and len(line) == 58 for line in twice)
    assert text_grid(()) == ""
    assert describe(schedule, simulate(schedule, Costs.uniform(2)))["peak_chunks"] == [2, 1]


def test_every_recorded_kind_has_a_colour_and_a_letter_of_its_own(tmp_path: Path) -> None:
    kinds = [kind for kind in Kind if "send" not in kind and "receive" not in kind]
    assert set(COLOURS) == set(kinds) and len(set(COLOURS.values())) == len(kinds)
    bars = [Bar(0, kind, 0, 0, 3.0 * i, 3.0 * i + 3) for i, kind in enumerate(kinds)]
    letters = [
        cell[0] for cell in text_grid(bars).removeprefix("0 |").removesuffix("|").replace("-", "=").split("0=")[:-1]
    ]
    assert len(set(letters)) == len(kinds) == 11
    figure({"all": bars, "nothing": ()}, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000


def test_show_names_stages_by_schedule() -> None:
    """Without a number of stages: what the schedule asks for."""
    assert named_schedule("dualpipe_v", 2, None, 4).num_stages == 4
    assert (
        named_schedule("zb_h1", 2, None, 4).num_stages == named_schedule("interleaved_1f1b", 2, None, 4).num_stages == 2
    )
    with pytest.raises(ScheduleError, match=r"dualpipe_v runs 2 stages per rank"):
        named_schedule("dualpipe_v", 2, 1, 4)
    with pytest.raises(ScheduleError, match=r"pipeline\.schedule = 'zigzag'"):
        named_schedule("zigzag", 2, None, 4)


def test_show_simulates_with_given_costs() -> None:
    """1F1B on two ranks: m (F + B + W) on the slower path, plus (p - 1)(F + B + W) of filling, and two messages."""
    shown = show(make_schedule("1f1b", 2, 1, 4), parse_costs("2,3,4"))
    assert shown.summary["makespan_s"] == pytest.approx(5 * (2 + 3 + 4))
    assert show(make_schedule("1f1b", 2, 1, 1), parse_costs("1,1,1,0.5")).summary["makespan_s"] == 2 * 3 + 2 * 0.5
    assert shown.summary["placement"] == [0, 1] and shown.text.startswith("1f1b: 2 ranks x 1 stages, 4 microbatches\n")


@pytest.mark.parametrize("text", ["", "1,a", "1,1,1,1,1", "-1", "0,0,0,1", "nan", "1,inf"])
def test_costs_that_are_none(text: str) -> None:
    with pytest.raises(ScheduleError, match="must be up to four numbers F,B,W,transfer"):
        parse_costs(text)


# ---- costs from records -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stages", "costs"),
    [("gpipe", 1, COSTS), ("1f1b", 1, COSTS), ("zb_h1", 1, COSTS), ("zb_h2", 1, COSTS), ("interleaved_1f1b", 2, COSTS_4),
     ("dualpipe_v", 2, COSTS_4)],
)  # fmt: skip
@pytest.mark.parametrize("pause_s", [0.0, 0.125])
def test_the_simulation_of_a_simulated_step_is_that_step(name: str, stages: int, costs: Costs, pause_s: float) -> None:
    """Records of a run without noise: costs, makespan and bubbles come out again, pauses count as work, nothing is late."""
    schedule = complete(make_schedule(name, 2, stages, 6))
    simulation = simulate(schedule, costs)
    records = recorded(schedule, costs, pause_s)
    found = measured_costs(records, schedule.num_stages)
    wholes = {part.stage for _, part in schedule.parts() if part.kind is Kind.BACKWARD}
    for stage in range(schedule.num_stages):
        assert found.forward_s[stage] == pytest.approx(costs.forward_s[stage], rel=0.02)
        backward = found.backward_input_s[stage] + found.backward_weight_s[stage]
        assert backward == pytest.approx(costs.backward_input_s[stage] + costs.backward_weight_s[stage], rel=0.05)
        if stage not in wholes:
            assert found.backward_input_s[stage] == pytest.approx(costs.backward_input_s[stage], rel=0.05)
    assert found.transfer_s == pytest.approx(costs.transfer_s)
    if name == "dualpipe_v":
        return  # simulated pairs wait for both inputs, recorded ones need not: they may be quicker
    step = measured_step(records, schedule.num_stages)
    assert step.makespan_s == pytest.approx(simulation.makespan_s - pause_s)
    if not pause_s:
        assert step.bubble == pytest.approx(simulation.bubble)
        assert step.bubble_makespan == pytest.approx(simulation.bubble_makespan)
        assert simulate(schedule, found).makespan_s == pytest.approx(simulation.makespan_s)
        assert max(abs(delay.seconds) for delay in delays(records, schedule, found)) < 1e-9


def test_a_whole_backward_is_shared_among_its_halves() -> None:
    """I 2 and W 1 where they run alone, so a backward of 6 counts 4 to I and 2 to W: the total is what was measured."""
    records = {
        0: [
            Record(Kind.FORWARD, 0, 0, 0.0, 1.0),
            Record(Kind.FORWARD, 0, 1, 1.0, 4.0),
            Record(Kind.BACKWARD_INPUT, 0, 0, 4.0, 6.0),
            Record(Kind.BACKWARD_WEIGHT, 0, 0, 6.0, 7.0),
            Record(Kind.BACKWARD, 0, 1, 7.0, 13.0),
            Record(Kind.REDUCE, 0, -1, 13.0, 14.0),
        ]
    }
    costs = measured_costs(records, 2)
    assert costs == Costs((2.0, 0.0), (3.0, 0.0), (1.5, 0.0), 0.0)
    whole = {0: [record for record in records[0] if record.kind in (Kind.FORWARD, Kind.BACKWARD)]}
    assert measured_costs(whole, 1).backward_weight_s == (0.0,), "whole backwards only: nothing to share"


def test_measured_bars_start_with_the_first_computation() -> None:
    records = {
        1: [Record(Kind.BACKWARD, 1, 0, 12.5, 13.0)],
        0: [Record(Kind.VALIDATE, 0, -1, 9.0, 9.5), Record(Kind.FORWARD, 0, 0, 10.0, 11.0)],
    }
    assert [(bar.rank, bar.kind, bar.start_s, bar.end_s) for bar in measured_bars(records)] == [
        (0, Kind.VALIDATE, -1.0, -0.5),
        (0, Kind.FORWARD, 0.0, 1.0),
        (1, Kind.BACKWARD, 2.5, 3.0),
    ]


def test_pairs_are_drawn_as_one_bar() -> None:
    """Measured and simulated pictures show the same bars, pairs included."""
    schedule = complete(make_schedule("dualpipe_v", 2, 2, 6))
    bars = measured_bars(recorded(schedule, COSTS_4), schedule)
    simulated = simulate(schedule, COSTS_4).bars
    assert [(b.rank, b.kind, b.stage, b.microbatch) for b in bars] == [
        (b.rank, b.kind, b.stage, b.microbatch) for b in simulated
    ]
    assert Kind.OVERLAPPED in {bar.kind for bar in bars}


# ---- attribution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb_h1"])
def test_a_slow_action_is_named(name: str) -> None:
    """The last backward of rank 0 takes 7 s longer: it is named, with its microseconds, and the parts sum up."""
    schedule = complete(make_schedule(name, 2, 1, 6))
    last = str([action for action in schedule.actions[0] if action.kind in COMPUTE][-1])
    records = changed(recorded(schedule, COSTS), 0, last, 7.0)
    found = delays(records, schedule, COSTS)
    assert (found[0].rank, str(found[0].action), found[0].what) == (0, last, "ran")
    assert found[0].seconds == pytest.approx(7.0) and found[0].describe().startswith("+7,000,000 µs: rank 0 in ")
    measured_s = measured_step(records, 2).makespan_s
    assert sum(delay.seconds for delay in found) == pytest.approx(measured_s - simulate(schedule, COSTS).makespan_s)


def test_a_late_message_is_named() -> None:
    """B1.5 is through as always; rank 0 starts B0.5 5 s late."""
    schedule = complete(make_schedule("1f1b", 2, 1, 6))
    records = recorded(schedule, COSTS)
    records[0][-1] = records[0][-1]._replace(start_s=records[0][-1].start_s + 5, end_s=records[0][-1].end_s + 5)
    first = delays(records, schedule, COSTS)[0]
    assert (first.rank, str(first.action), first.what, first.seconds) == (0, "B0.5", "message", pytest.approx(5.0))
    assert "+5,000,000 µs: rank 0 in the wait for the message to backward of stage 0, microbatch 5" in first.describe()


def test_the_parts_sum_up_however_noisy() -> None:
    """With every action of other length than the mean: the sum is exactly measured - simulated makespan."""
    schedule = complete(make_schedule("zb_h1", 3, 1, 5))
    costs = Costs((2.0, 3.0, 2.0), (2.5, 4.0, 1.0), (1.0, 2.0, 3.0), 0.25)
    records = recorded(schedule, costs)
    for index, text in enumerate(("F0.2", "I0.1", "W0.3")):
        records = changed(records, 0, text, 0.5 + index)
    records = changed(records, 2, "I2.4", 1.5)
    own = measured_costs(records, 3)
    total = sum(delay.seconds for delay in delays(records, schedule, own))
    assert total == pytest.approx(measured_step(records, 3).makespan_s - simulate(schedule, own).makespan_s)


# ---- the file -----------------------------------------------------------------------------------------------------


def trace_of(name: str = "zb_h1", stages: int = 1) -> Trace:
    schedule = complete(replace(make_schedule(name, 2, stages, 5), ties=((0, 2 * stages - 1),)))
    return Trace(7, schedule, recorded(schedule, COSTS if stages == 1 else COSTS_4), 0.25, 0.3)


@pytest.mark.parametrize(("name", "stages"), [("zb_h1", 1), ("dualpipe_v", 2)])
def test_a_trace_comes_back_as_it_was(name: str, stages: int, tmp_path: Path) -> None:
    trace = trace_of(name, stages)
    trace.write(tmp_path)
    for path in (tmp_path, tmp_path / "timeline.json"):
        assert read_trace(path) == trace
    content = json.loads((tmp_path / "timeline.json").read_text())
    assert content["measured"]["makespan_s"] <= content["simulated"]["makespan_s"] + 1e-9
    assert content["simulated"]["costs"]["transfer_s"] == pytest.approx(0.5)
    assert content["schedule"]["actions"][0].startswith("F0.0 ")
    assert len(content["simulated"]["bars"]) == len(trace.simulation.bars)


def test_a_trace_in_words(tmp_path: Path) -> None:
    trace = trace_of()
    slow = replace(trace, records=changed(trace.records, 1, "W1.4", 4.0))
    text = slow.text()
    assert "step 7, zb_h1: 2 ranks, 2 stages, 5 microbatches" in text
    assert re.search(r"^predicted +- +25.0% +30.0%$", text, re.MULTILINE)
    beyond_s = slow.measured.makespan_s - slow.simulation.makespan_s
    assert f"measured - simulated makespan {beyond_s * 1e6:+,.0f} µs, of which" in text
    assert "rank 1 in backward weight of stage 1, microbatch 4 (W1.4)" in text.splitlines()[-5]
    slow.draw(tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")


def test_an_asynchronous_step_is_not_held_against_one_by_itself() -> None:
    trace = trace_of("1f1b")
    endless = replace(trace, schedule=replace(trace.schedule, update_every=1))
    assert trace.delays and endless.delays == [] and "of which" not in endless.text()


def test_a_chrome_trace() -> None:
    trace = trace_of("dualpipe_v", 2)
    events = trace.chrome()["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {(0, 0): "rank 0", (0, 1): "rank 1", (1, 0): "rank 0", (1, 1): "rank 1"}
    bars = [e for e in events if e["ph"] == "X"]
    assert len(bars) == len(trace.bars) + len(trace.simulation.bars)
    first = next(e for e in bars if e["pid"] == 0 and e["tid"] == 0)
    assert (first["name"], first["cat"], first["ts"], first["dur"]) == ("F0.0", "forward", 0.0, pytest.approx(2e6))
    assert first["args"] == {"stage": 0, "microbatch": 0}
    assert {"overlapped", "backward_weight"} <= {e["cat"] for e in bars}


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"step": 1}', '{"schedule": {"placement": []}}', '{"schedule": {"name": "x", "placement": [0]}}'],
)
def test_files_that_are_no_timeline(content: str, tmp_path: Path) -> None:
    (tmp_path / "timeline.json").write_text(content)
    with pytest.raises(TrilithError, match=r"timeline\.json: is no timeline of this version"):
        read_trace(tmp_path)


def test_a_damaged_action_or_stage(tmp_path: Path) -> None:
    trace_of().write(tmp_path)
    path = tmp_path / "timeline.json"
    text = path.read_text()
    for broken in (text.replace("F0.0 ", "Q0.0 ", 1), text.replace('["forward", 1, 0', '["forward", 9, 0', 1)):
        assert broken != text
        path.write_text(broken)
        with pytest.raises(TrilithError, match="is no timeline of this version"):
            read_trace(path)


def test_a_run_without_a_timeline(tmp_path: Path) -> None:
    with pytest.raises(
        TrilithError, match=r"there is no such file\. A run writes timeline\.json into its run\.directory"
    ):
        read_trace(tmp_path)
