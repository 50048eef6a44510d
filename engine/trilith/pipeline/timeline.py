"""Draws schedules: simulated beside measured, as PNG, as text, and as numbers for `trilith schedule --json`.

Bars come from `simulate` or, through `trace`, from what executors recorded. matplotlib is imported only to
draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from trilith.errors import ScheduleError
from trilith.pipeline.action import NO_MICROBATCH, Kind, Schedule
from trilith.pipeline.check import check
from trilith.pipeline.passes import complete
from trilith.pipeline.schedules import SCHEDULES, make_schedule
from trilith.pipeline.simulate import Bar, Costs, Simulation, simulate

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Record(NamedTuple):
    """One action as an executor ran it, but for sends and receives; times of this process's monotonic clock, on the host.

    An overlapped pair leaves two: one of its forward, one of its backward.
    """

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
        Kind.GATHER: "#9c9c9c",
        Kind.RELEASE: "#c9c9c9",
        Kind.REDUCE: "#d98c7a",
        Kind.TIE_REDUCE: "#a8655a",
        Kind.UPDATE: "#4f7f86",
        Kind.VALIDATE: "#c76b9b",
    }
)
_LETTERS: Mapping[Kind, str] = MappingProxyType(
    {
        Kind.FORWARD: "F",
        Kind.BACKWARD: "B",
        Kind.BACKWARD_INPUT: "I",
        Kind.BACKWARD_WEIGHT: "W",
        Kind.OVERLAPPED: "O",
        Kind.GATHER: "G",
        Kind.RELEASE: "L",
        Kind.REDUCE: "R",
        Kind.TIE_REDUCE: "T",
        Kind.UPDATE: "U",
        Kind.VALIDATE: "V",
    }
)


def describe(schedule: Schedule, simulation: Simulation) -> dict[str, Any]:
    """A schedule in numbers, ready for JSON. Bubbles are fractions of 1, times in the unit of the simulated costs.

    `bubble` is by span, `bubble_makespan` by the whole step; `peak_microbatches` per rank in units of the rank's whole
    share of the model, `peak_chunks` in single (stage, microbatch).
    """
    return {
        "schedule": schedule.name,
        "num_ranks": schedule.num_ranks,
        "num_stages": schedule.num_stages,
        "placement": list(schedule.placement),
        "num_microbatches": schedule.num_microbatches,
        "makespan_s": simulation.makespan_s,
        "bubble": simulation.bubble,
        "bubble_makespan": simulation.bubble_makespan,
        "peak_microbatches": list(simulation.peak_microbatches),
        "peak_chunks": list(simulation.peak_chunks),
        "actions": [" ".join(str(action) for action in actions) for actions in schedule.actions],
    }


def text_grid(bars: Sequence[Bar], columns: int = 100, end_s: float | None = None) -> str:
    """A timeline for a terminal: one line a rank, at most `columns` characters of time, `.` where it waits.

    A bar starts with its letter and its microbatch where they fit; its stage is told by the order. F forward, B
    backward, I input gradient, W weight gradient, O overlapped pair, R reduction, T sum of tied weights, G gather and L
    release of parameters, U update, V validation. With `end_s`, `columns` are that long, to compare timelines.
    """
    if not bars:
        return ""
    width = columns
    if end_s is None:
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


def draw(axes: Axes, bars: Sequence[Bar], title: str, end_s: float | None = None) -> None:
    """Draw one timeline on matplotlib axes: a row per rank, colour by kind, microbatch numbers where they fit.

    Later chunks of a rank (virtual stages) are drawn darker. The axis ends at `end_s`, by default with the last bar.
    """
    ranks = sorted({bar.rank for bar in bars})
    rows = {rank: len(ranks) - 1 - index for index, rank in enumerate(ranks)}
    chunks = {rank: sorted({bar.stage for bar in bars if bar.rank == rank}) for rank in ranks}
    end_s = max((bar.end_s for bar in bars), default=1.0) if end_s is None else end_s
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
    """Draw timelines under one another, on one time axis, and write them to `path` (PNG, or what the suffix says)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    heights = [1 + 0.28 * len({bar.rank for bar in bars}) for bars in bars_by_title.values()]
    canvas = Figure(figsize=(11, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    end_s = max((bar.end_s for bars in bars_by_title.values() for bar in bars), default=1.0)
    for row, (title, bars) in zip(axes[:, 0], bars_by_title.items(), strict=True):
        draw(row, bars, title, end_s)
    kinds = {bar.kind for bars in bars_by_title.values() for bar in bars}
    legend = [Patch(color=colour, label=kind.value) for kind, colour in COLOURS.items() if kind in kinds]
    canvas.legend(handles=legend, loc="outside lower right", ncols=max(1, len(legend)), fontsize=7, frameon=False)
    canvas.savefig(path, dpi=150)


@dataclass(frozen=True)
class Shown:
    """A schedule as `trilith schedule` prints it: `summary` for JSON, `text` for a terminal."""

    summary: dict[str, Any]
    text: str


def parse_costs(text: str) -> tuple[float, float, float, float]:
    """`F,B,W,transfer`: times of a forward, an input gradient, a weight gradient, a message; by default 1, 1, 1, 0.

    Raises ScheduleError where that is not what the text says.
    """
    try:
        given = [float(part) for part in text.split(",")]
    except ValueError:
        given = []
    if not 1 <= len(given) <= 4 or not all(isfinite(value) and value >= 0 for value in given) or not sum(given[:3]):
        raise ScheduleError(
            f"costs {text!r}: must be up to four numbers F,B,W,transfer, none negative, not all of F, B, W zero. "
            "Write them as in 1,1.2,0.8,0.05"
        )
    forward, backward_input, backward_weight, transfer = given + [1.0, 1.0, 1.0, 0.0][len(given) :]
    return forward, backward_input, backward_weight, transfer


def named_schedule(name: str, num_ranks: int, virtual_stages: int | None, num_microbatches: int) -> Schedule:
    """A schedule by name; `virtual_stages` None: as many stages a rank as it asks for, one where it does not care.

    Raises ScheduleError for a name or numbers that no schedule admits.
    """
    if virtual_stages is None:
        recipe = SCHEDULES.get(name)
        virtual_stages = 1 if recipe is None or recipe.stages_per_rank is None else recipe.stages_per_rank
    return make_schedule(name, num_ranks, virtual_stages, num_microbatches)


def show(schedule: Schedule, costs: Sequence[float] = (1.0, 1.0, 1.0, 0.0), png: str | Path | None = None) -> Shown:
    """Complete, check and simulate a schedule, every stage with the same `costs` (F, B, W, transfer); draw it to `png`.

    Raises ScheduleError where it cannot run.
    """
    schedule = complete(schedule)
    check(schedule)
    simulation = simulate(schedule, Costs.uniform(schedule.num_stages, *costs))
    peaks = ", ".join(f"{peak:g}" for peak in simulation.peak_microbatches)
    per_rank = schedule.num_stages / schedule.num_ranks
    title = (
        f"{schedule.name}: {schedule.num_ranks} ranks x {per_rank:g} stages, {schedule.num_microbatches} microbatches"
    )
    bubbles = f"bubble {simulation.bubble:.1%} by span, {simulation.bubble_makespan:.1%} by makespan"
    if png is not None:
        figure({f"{title} ({bubbles})": simulation.bars}, png)
    lines = [title, text_grid(simulation.bars), bubbles, f"peak microbatches per rank: {peaks}"]
    return Shown(describe(schedule, simulation), "\n".join(lines))
