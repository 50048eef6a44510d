"""Draws schedules: simulated beside measured, as PNG, as text, and as numbers for `trilith schedule --json`.

Bars come from `simulate` or, through `measured_bars`, from what executors recorded. matplotlib is imported only to
draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from trilith.pipeline.action import NO_MICROBATCH, Kind, Schedule
from trilith.pipeline.passes import check, complete
from trilith.pipeline.schedules import make_schedule
from trilith.pipeline.simulate import Bar, Costs, Simulation, simulate

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Record(NamedTuple):
    """One computation or reduction as an executor ran it; times of this process's monotonic clock, on the host."""

    kind: Kind
    stage: int
    microbatch: int
    start_s: float
    end_s: float


COLOURS: Mapping[Kind, str] = MappingProxyType(
    {
        Kind.FORWARD: "#7aa6d8",
        Kind.BACKWARD: "#8fc49a",
        Kind.BACKWARD_INPUT: "#b7d98b",
        Kind.BACKWARD_WEIGHT: "#e3c46d",
        Kind.OVERLAPPED: "#b39bd3",
        Kind.REDUCE: "#d98c7a",
        Kind.TIE_REDUCE: "#a8655a",
    }
)
_LETTERS: Mapping[Kind, str] = MappingProxyType(
    {
        Kind.FORWARD: "F",
        Kind.BACKWARD: "B",
        Kind.BACKWARD_INPUT: "I",
        Kind.BACKWARD_WEIGHT: "W",
        Kind.OVERLAPPED: "O",
        Kind.REDUCE: "R",
        Kind.TIE_REDUCE: "T",
    }
)


def measured_bars(records: Mapping[int, Sequence[Any]]) -> tuple[Bar, ...]:
    """Bars from what each pipeline rank's executor recorded: `records[rank]` holds `Record`s (or plain tuples of one).

    Time 0 is the earliest start. Ranks of one machine share the monotonic clock; others must be aligned before.
    """
    rows = [(rank, Record(*record)) for rank, row in sorted(records.items()) for record in row]
    zero = min((record.start_s for _, record in rows), default=0.0)
    return tuple(Bar(rank, Kind(r.kind), r.stage, r.microbatch, r.start_s - zero, r.end_s - zero) for rank, r in rows)


def measured_costs(records: Mapping[int, Sequence[Record]], num_stages: int) -> Costs:
    """Costs to simulate a recorded step with: per stage, the mean time of its forwards and of its backwards."""

    def mean(kind: Kind, stage: int) -> float:
        times = [r.end_s - r.start_s for row in records.values() for r in row if (r.kind, r.stage) == (kind, stage)]
        return sum(times) / len(times) if times else 0.0

    forward = tuple(mean(Kind.FORWARD, stage) for stage in range(num_stages))
    backward = tuple(mean(Kind.BACKWARD, stage) for stage in range(num_stages))
    return Costs(forward, backward, (0.0,) * num_stages)


def describe(schedule: Schedule, simulation: Simulation) -> dict[str, Any]:
    """A schedule in numbers, ready for JSON. Bubbles are fractions of 1, times in the unit of the simulated costs.

    `bubble` is by span, `bubble_makespan` by the whole step; `peak_microbatches` per rank in units of the rank's whole
    share of the model, `peak_chunks` in single (stage, microbatch).
    """
    return {
        "schedule": schedule.name,
        "num_ranks": schedule.num_ranks,
        "num_stages": schedule.num_stages,
        "virtual_stages": schedule.num_stages // schedule.num_ranks,
        "num_microbatches": schedule.num_microbatches,
        "makespan_s": simulation.makespan_s,
        "bubble": simulation.bubble,
        "bubble_makespan": simulation.bubble_makespan,
        "peak_microbatches": list(simulation.peak_microbatches),
        "peak_chunks": list(simulation.peak_chunks),
        "actions": [" ".join(str(action) for action in actions) for actions in schedule.actions],
    }


def text_grid(bars: Sequence[Bar], columns: int = 100) -> str:
    """A timeline for a terminal: one line a rank, at most `columns` characters of time, `.` where it waits.

    A bar starts with its letter and its microbatch where they fit; its stage is told by the order. F forward, B
    backward, I input gradient, W weight gradient, O overlapped pair, R reduction, T sum of tied weights.
    """
    if not bars:
        return ""
    end_s = max(bar.end_s for bar in bars)
    shortest = min((bar.end_s - bar.start_s for bar in bars if bar.end_s > bar.start_s), default=1.0)
    widest = 1 + max(len(str(bar.microbatch)) for bar in bars)
    width = max(1, min(columns, round(end_s / shortest) * (widest + 1)))
    ranks = sorted({bar.rank for bar in bars})
    rows = {rank: ["."] * width for rank in ranks}
    for bar in sorted(bars, key=lambda bar: bar.start_s):
        lo, hi = (round(at / end_s * width) if end_s else 0 for at in (bar.start_s, bar.end_s))
        size = hi - lo
        label = _LETTERS[bar.kind] + ("" if bar.microbatch == NO_MICROBATCH else str(bar.microbatch))
        text = label if len(label) <= size else _LETTERS[bar.kind]
        rows[bar.rank][lo:hi] = (text.ljust(size, "-" if bar.kind is Kind.FORWARD else "="))[:size]
    margin = len(str(ranks[-1]))
    return "\n".join(f"{rank:>{margin}} |{''.join(rows[rank])}|" for rank in ranks)


def draw(axes: Axes, bars: Sequence[Bar], title: str) -> None:
    """Draw one timeline on matplotlib axes: a row per rank, colour by kind, microbatch numbers where they fit.

    Later chunks of a rank (virtual stages) are drawn darker.
    """
    ranks = sorted({bar.rank for bar in bars})
    rows = {rank: len(ranks) - 1 - index for index, rank in enumerate(ranks)}
    chunks = {rank: sorted({bar.stage for bar in bars if bar.rank == rank}) for rank in ranks}
    end_s = max((bar.end_s for bar in bars), default=1.0)
    for bar in bars:
        length = bar.end_s - bar.start_s
        chunk, of = chunks[bar.rank].index(bar.stage), len(chunks[bar.rank])
        axes.barh(
            rows[bar.rank],
            length,
            left=bar.start_s,
            height=0.86,
            color=COLOURS[bar.kind],
            alpha=1.0 if of == 1 else 0.55 + 0.45 * chunk / (of - 1),
            edgecolor="white",
            linewidth=0.4,
        )
        text = "" if bar.microbatch == NO_MICROBATCH else str(bar.microbatch)
        if text and length / end_s * 150 >= len(text) + 0.5:
            centre = bar.start_s + length / 2
            axes.text(centre, rows[bar.rank], text, ha="center", va="center", fontsize=6, clip_on=True)
    axes.set_yticks([rows[rank] for rank in ranks], [f"rank {rank}" for rank in ranks])
    axes.set_xlim(0, end_s)
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def figure(bars_by_title: Mapping[str, Sequence[Bar]], path: str | Path) -> None:
    """Draw timelines under one another and write them to `path` (PNG, or what the suffix says)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    heights = [1 + 0.28 * len({bar.rank for bar in bars}) for bars in bars_by_title.values()]
    canvas = Figure(figsize=(11, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, (title, bars) in zip(axes[:, 0], bars_by_title.items(), strict=True):
        draw(row, bars, title)
    kinds = {bar.kind for bars in bars_by_title.values() for bar in bars}
    legend = [Patch(color=colour, label=kind.value) for kind, colour in COLOURS.items() if kind in kinds]
    canvas.legend(handles=legend, loc="outside lower right", ncols=max(1, len(legend)), fontsize=7, frameon=False)
    canvas.savefig(path, dpi=150)


@dataclass(frozen=True)
class Shown:
    """A schedule as `trilith schedule` prints it: `summary` for JSON, `text` for a terminal."""

    summary: dict[str, Any]
    text: str


def show(name: str, num_ranks: int, virtual_stages: int, num_microbatches: int, png: str | Path | None = None) -> Shown:
    """Make, check and simulate a schedule with F = B = W = 1; draw it to `png` where that is given.

    Raises ScheduleError for a name or numbers that no schedule admits.
    """
    schedule = complete(make_schedule(name, num_ranks, virtual_stages, num_microbatches))
    check(schedule)
    simulation = simulate(schedule, Costs.uniform(schedule.num_stages))
    peaks = ", ".join(f"{peak:g}" for peak in simulation.peak_microbatches)
    title = f"{name}: {num_ranks} ranks x {virtual_stages} stages, {num_microbatches} microbatches"
    bubbles = f"bubble {simulation.bubble:.1%} by span, {simulation.bubble_makespan:.1%} by makespan"
    if png is not None:
        figure({f"{title} ({bubbles})": simulation.bars}, png)
    lines = [title, text_grid(simulation.bars), bubbles, f"peak microbatches per rank: {peaks}"]
    return Shown(describe(schedule, simulation), "\n".join(lines))
