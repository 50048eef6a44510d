"""`timeline.json`: a run's newest recorded step and what the simulation says of it; as text, picture, Chrome trace.

The Chrome trace follows the Trace Event Format, which Perfetto and chrome://tracing read. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trilith.errors import ScheduleError, TrilithError
from trilith.pipeline.action import NO_MICROBATCH, Action, Kind, Schedule, parse
from trilith.pipeline.simulate import Bar, Costs, Simulation, simulate
from trilith.pipeline.timeline import Record, figure, text_grid
from trilith.pipeline.trace import Delay, Measured, Records, delays, measured_bars, measured_costs, measured_step

FILE = "timeline.json"
SHOWN_DELAYS = 5


@dataclass(frozen=True)
class Trace:
    """One recorded step. `records` of every pipeline rank are on rank 0's clock.

    `schedule` is the one of a step, complete. `predicted_bubble` and `predicted_bubble_makespan` are what was said before
    the run, from operation counts.
    """

    step: int
    schedule: Schedule
    records: Records
    predicted_bubble: float
    predicted_bubble_makespan: float

    @cached_property
    def costs(self) -> Costs:
        """Mean action times of the step."""
        return measured_costs(self.records, self.schedule.num_stages)

    @cached_property
    def simulation(self) -> Simulation:
        """The schedule simulated with them."""
        return simulate(self.schedule, self.costs)

    @cached_property
    def measured(self) -> Measured:
        """What was measured, in the simulation's terms."""
        return measured_step(self.records, self.schedule.num_stages)

    @cached_property
    def bars(self) -> tuple[Bar, ...]:
        """What was measured, to draw it."""
        return measured_bars(self.records, self.schedule)

    @cached_property
    def delays(self) -> list[Delay]:
        """Where the measured makespan comes from beyond the simulated one, the largest first.

        Empty for an asynchronous schedule: there a step runs into the next one, and the simulation is of one by itself.
        """
        return [] if self.schedule.update_every else delays(self.records, self.schedule, self.costs)

    # ---- the file -------------------------------------------------------------------------------------------------

    def write(self, directory: Path) -> None:
        """Write `timeline.json` into a run directory: what `read` needs, and what follows from it, for other tools."""
        schedule, simulation = self.schedule, self.simulation
        content = {
            "step": self.step,
            "schedule": {
                "name": schedule.name,
                "num_microbatches": schedule.num_microbatches,
                "placement": schedule.placement,
                "ties": schedule.ties,
                "update_every": schedule.update_every,
                "frozen": sorted(schedule.frozen),
                "actions": [" ".join(map(str, row)) for row in schedule.actions],
            },
            "predicted": {"bubble": self.predicted_bubble, "bubble_makespan": self.predicted_bubble_makespan},
            "measured": asdict(self.measured),
            "simulated": {
                "makespan_s": simulation.makespan_s,
                "bubble": simulation.bubble,
                "bubble_makespan": simulation.bubble_makespan,
                "costs": asdict(self.costs),
                "bars": [
                    [bar.rank, bar.kind, bar.stage, bar.microbatch, bar.start_s, bar.end_s] for bar in simulation.bars
                ],
            },
            "delays": [
                {"rank": delay.rank, "action": str(delay.action or ""), "what": delay.what, "seconds": delay.seconds}
                for delay in self.delays
            ],
            "records": {str(rank): row for rank, row in self.records.items()},
        }
        (directory / FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")

    # ---- ways to look at it ---------------------------------------------------------------------------------------

    def rows(self) -> list[list[str]]:
        """Makespan and bubbles as a table: measured, simulated from measured action times, predicted before the run."""
        measured, simulated = self.measured, self.simulation
        return [
            ["", "makespan", "bubble by span", "bubble by makespan"],
            _row("measured", measured.makespan_s, measured.bubble, measured.bubble_makespan),
            _row("simulated", simulated.makespan_s, simulated.bubble, simulated.bubble_makespan),
            _row("predicted", None, self.predicted_bubble, self.predicted_bubble_makespan),
        ]

    def delay_rows(self) -> list[list[str]]:
        """The largest delays as a table."""
        head = ["rank", "action", "beyond the simulation"]
        rows = [
            ["-" if d.action is None else str(d.rank), "-" if d.action is None else str(d.action), d.describe()]
            for d in self.delays[:SHOWN_DELAYS]
        ]
        return [head, *rows]

    def text(self) -> str:
        """The step for a terminal."""
        schedule, end_s = self.schedule, max(bar.end_s for bar in (*self.bars, *self.simulation.bars))
        lines = [
            f"step {self.step}, {schedule.name}: {schedule.num_ranks} ranks, {schedule.num_stages} stages, "
            f"{schedule.num_microbatches} microbatches",
            "measured",
            text_grid(self.bars, end_s=end_s),
            "simulated from the measured action times",
            text_grid(self.simulation.bars, end_s=end_s),
            _aligned(self.rows()),
        ]
        if self.delays:
            beyond_s = self.measured.makespan_s - self.simulation.makespan_s
            lines.append(f"measured - simulated makespan {beyond_s * 1e6:+,.0f} µs, of which")
            lines += [f"  {delay.describe()}" for delay in self.delays[:SHOWN_DELAYS]]
        return "\n".join(lines)

    def draw(self, path: Path) -> None:
        """Measured above simulated, as a picture."""
        measured, simulated = self.measured, self.simulation
        figure(
            {
                f"{self.schedule.name}, step {self.step}, measured: {measured.makespan_s:.4g} s, bubble "
                f"{measured.bubble:.1%} by span, {measured.bubble_makespan:.1%} by makespan": self.bars,
                f"simulated from the measured action times: {simulated.makespan_s:.4g} s, bubble "
                f"{simulated.bubble:.1%} by span, {simulated.bubble_makespan:.1%} by makespan": simulated.bars,
            },
            path,
        )

    def chrome(self) -> dict[str, Any]:
        """The same as a Chrome trace: a process for what was measured, one for the simulation, a thread a rank."""
        events: list[dict[str, Any]] = []
        for process, (title, bars) in enumerate((("measured", self.bars), ("simulated", self.simulation.bars))):
            events.append({"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": title}})
            for rank in range(self.schedule.num_ranks):
                name = {"name": f"rank {rank}"}
                events.append({"ph": "M", "name": "thread_name", "pid": process, "tid": rank, "args": name})
            events += [_event(process, bar) for bar in bars]
        return {"traceEvents": events, "displayTimeUnit": "ms"}


def _row(name: str, makespan_s: float | None, bubble: float, bubble_makespan: float) -> list[str]:
    makespan = "-" if makespan_s is None else f"{makespan_s * 1e3:.2f} ms"
    return [name, makespan, f"{bubble:.1%}", f"{bubble_makespan:.1%}"]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _event(process: int, bar: Bar) -> dict[str, Any]:
    """One complete event; times in microseconds."""
    args = {"stage": bar.stage} | ({} if bar.microbatch == NO_MICROBATCH else {"microbatch": bar.microbatch})
    name = bar.kind.value if bar.kind is Kind.OVERLAPPED else str(Action(bar.kind, bar.stage, bar.microbatch))
    return {
        "ph": "X",
        "name": name,
        "cat": bar.kind.value,
        "pid": process,
        "tid": bar.rank,
        "ts": bar.start_s * 1e6,
        "dur": (bar.end_s - bar.start_s) * 1e6,
        "args": args,
    }


def read_trace(run: Path) -> Trace:
    """The trace of a run: its directory, or the `timeline.json` in it.

    Raises TrilithError where there is none, or none that this version can read.
    """
    path = run / FILE if run.is_dir() else run
    if not path.exists():
        raise TrilithError(
            f"{path}: there is no such file. A run writes {FILE} into its run.directory when it ends: name that directory"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schedule = _schedule(content["schedule"])
        records = {
            int(rank): [Record(Kind(kind), *rest) for kind, *rest in row] for rank, row in content["records"].items()
        }
        predicted = content["predicted"]
        trace = Trace(
            int(content["step"]), schedule, records, float(predicted["bubble"]), float(predicted["bubble_makespan"])
        )
        assert all(0 <= r.stage < schedule.num_stages for row in records.values() for r in row), "a stage out of range"
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, ScheduleError) as error:
        raise TrilithError(
            f"{path}: is no timeline of this version ({type(error).__name__}: {error}). Run the job again to write one"
        ) from error
    return trace


def _schedule(content: dict[str, Any]) -> Schedule:
    placement = tuple(content["placement"])
    return Schedule(
        name=content["name"],
        num_ranks=max(placement) + 1,
        num_stages=len(placement),
        num_microbatches=content["num_microbatches"],
        placement=placement,
        actions=tuple(tuple(parse(text) for text in row.split()) for row in content["actions"]),
        ties=tuple(tuple(tie) for tie in content["ties"]),
        update_every=content["update_every"],
        frozen=frozenset(content["frozen"]),
    )
