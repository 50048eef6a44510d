"""`report.html` and `report.png`: the loss curve, one step's pipeline measured beside simulated, memory per rank."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trilith.monitor.progress import human_bytes


@dataclass(frozen=True)
class Panel:
    """One plot of the report: `draw` gets a matplotlib Axes. `height` is in inches."""

    title: str
    draw: Callable[[Any], None]
    height: float = 2.6


@dataclass(frozen=True)
class Report:
    """What the report shows: headline figures, plots, and tables (title -> rows of cells, head row first)."""

    title: str
    figures: Mapping[str, str]
    panels: Sequence[Panel]
    tables: Mapping[str, Sequence[Sequence[str]]]


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(step records, evaluation records) of a `metrics.jsonl`."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [r for r in records if "loss" in r], [r for r in records if "eval_loss" in r]


def loss_panel(steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> Panel:
    """Training loss over steps with evaluation points."""

    def draw(axes: Any) -> None:
        axes.plot([r["step"] for r in steps], [r["loss"] for r in steps], linewidth=1, label="loss")
        if evaluations:
            points = [r["step"] for r in evaluations], [r["eval_loss"] for r in evaluations]
            axes.plot(*points, "o-", markersize=4, label="eval_loss")
        axes.set_xlabel("step")
        axes.set_ylabel("nats per token")
        axes.grid(alpha=0.3)
        axes.legend()

    return Panel("Loss", draw, 3.2)


def memory_panel(categories: Mapping[str, Sequence[int]]) -> Panel:
    """Stacked bytes per rank: category -> bytes of each rank."""

    def draw(axes: Any) -> None:
        ranks = range(len(next(iter(categories.values()))))
        base = [0.0] * len(ranks)
        for name, values in categories.items():
            mib = [value / 2**20 for value in values]
            axes.bar(ranks, mib, 0.7, base, label=name)
            base = [a + b for a, b in zip(base, mib, strict=True)]
        axes.set_xlabel("rank")
        axes.set_ylabel("MiB")
        axes.set_xticks(list(ranks))
        axes.legend(fontsize=7, ncols=3)

    return Panel("Memory per rank by category", draw, 2.8)


def memory_rows(categories: Mapping[str, Sequence[int]]) -> list[list[str]]:
    """The same figures as a table."""
    names = list(categories)
    rows = [["rank", *names]]
    for rank, values in enumerate(zip(*categories.values(), strict=True)):
        rows.append([str(rank), *(human_bytes(value) for value in values)])
    return rows


def compared_rows(measured: Mapping[str, Sequence[int]], predicted: Mapping[str, Sequence[int]]) -> list[list[str]]:
    """Measured bytes of each rank beside what the plan said, with their ratio; a category that neither has is left out."""
    names = [name for name in predicted if any((*measured.get(name, ()), *predicted[name]))]
    rows = [["rank", *(f"{name}: measured / predicted" for name in names)]]
    for rank in range(len(next(iter(predicted.values())))):
        cells = []
        for name in names:
            real, said = measured[name][rank] if name in measured else 0, predicted[name][rank]
            ratio = f" ({real / said:.2f})" if said else ""
            cells.append(f"{human_bytes(real)} / {human_bytes(said)}{ratio}")
        rows.append([str(rank), *cells])
    return rows


def write(directory: Path, report: Report) -> None:
    """Write `report.png` and `report.html` into `directory`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [panel.height for panel in report.panels]
    figure, axes = pyplot.subplots(
        len(heights),
        1,
        figsize=(11, sum(heights) + 0.6),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for panel, target in zip(report.panels, axes[:, 0], strict=True):
        target.set_title(panel.title, loc="left", fontsize=10)
        panel.draw(target)
    figure.savefig(directory / "report.png", dpi=110)
    pyplot.close(figure)
    (directory / "report.html").write_text(_html(report), encoding="utf-8")


def _html(report: Report) -> str:
    escape = html.escape
    figures = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in report.figures.items()
    )
    tables = []
    for title, rows in report.tables.items():
        head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
        tables.append(f"<h2>{escape(title)}</h2><table><tr>{head}</tr>{body}</table>")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(report.title)}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em; color: #222; }}
.figures {{ display: flex; flex-wrap: wrap; gap: 1em 2.5em; }}
.figures div {{ display: flex; flex-direction: column; }} .figures b {{ font-size: 1.4em; }}
.figures span {{ color: #666; font-size: .85em; }}
img {{ width: 100%; margin: 1em 0; }} table {{ border-collapse: collapse; font-size: .9em; }}
td, th {{ padding: .15em .8em; text-align: right; border-bottom: 1px solid #ddd; }}
td:first-child, th:first-child {{ text-align: left; }}
</style></head><body>
<h1>{escape(report.title)}</h1>
<div class="figures">{figures}</div>
<img src="report.png" alt="Loss, pipeline timeline measured and simulated, memory per rank">
{"".join(tables)}
</body></html>
"""
