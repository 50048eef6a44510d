"""Every layout x schedule x ZeRO stage, the other axes covered in pairs: `make matrix` writes docs/matrix.json.

A cell is `green` (fp64 loss and gradient norm equal the one-process run's to 1e-10 over 10 steps), `refused` (with its
rule) or `red`; precision (fp64 here) and offload are not axes of it yet. In the table of docs/matrix.md a field shows a
layout and schedule at ZeRO 0 / 1 / 2 / 3, or 0 / 1 where there is one data rank and so nothing to partition: yes is
green, - is refused (virtual stages without a pipeline).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

from tests.cells import AXES, LAYOUTS, SCHEDULES, Cell, complete, config, reference_config, row
from tests.runs import reference, run, worst_relative
from trilith import preflight
from trilith.errors import ConfigError

DOCS = Path(__file__).resolve().parent.parent / "docs"
RTOL = 1e-10


def product(seed: int = 3) -> list[Cell]:
    """One cell for every layout x schedule x ZeRO stage, refused ones included; the rest cover pairs greedily.

    On one data rank stages 2 and 3 are stage 1, and left out.
    """
    draw = random.Random(seed)
    seen: set[Any] = set()
    cells = []
    for (data, pipeline, tensor), schedule, zero in itertools.product(LAYOUTS, SCHEDULES, (0, 1, 2, 3)):
        if data == 1 and zero > 1:
            continue
        start = {"data": data, "pipeline": pipeline, "tensor": tensor, "schedule": schedule, "zero": zero}
        values = complete(dict(start), draw, lambda pair: pair not in seen)
        seen.update(itertools.combinations(sorted(values.items(), key=lambda item: item[0]), 2))
        name, virtual_stages = values.pop("schedule")
        cells.append(Cell(**values, schedule=name, virtual_stages=virtual_stages))
    return cells


def judge(cell: Cell) -> dict[str, Any]:
    """Run a cell and say what came of it."""
    try:
        preflight.plan(config(cell))
    except ConfigError as error:
        return row(cell, "refused", str(error.violations[0]))
    try:
        difference = worst_relative(run(config(cell)), reference(reference_config(cell)))
    except AssertionError as error:
        return row(cell, "red", str(error).strip().splitlines()[-1])
    return row(cell, "green" if difference <= RTOL else "red", f"{difference:.1e}")


def table(rows: list[dict[str, Any]]) -> str:
    """Layouts by schedules as Markdown; a field shows its cells, ZeRO 0 first."""
    marks = {"green": "yes", "red": "**no**", "refused": "-"}
    names = [f"{name} v={v}" for name, v in SCHEDULES]
    lines = [
        "# The composition matrix",
        "",
        __doc__ or "",
        "",
        "| data x pipeline x tensor | " + " | ".join(names) + " |",
    ]
    lines.append("|---" * (len(names) + 1) + "|")
    for data, pipeline, tensor in LAYOUTS:
        fields = []
        for name, virtual_stages in SCHEDULES:
            here = (data, pipeline, tensor, name, virtual_stages)
            keys = ("data", "pipeline", "tensor", "schedule", "virtual_stages")
            found = [r["state"] for r in rows if tuple(r[k] for k in keys) == here]
            fields.append(" / ".join(marks[state] for state in found))
        lines.append(f"| {data} x {pipeline} x {tensor} | " + " | ".join(fields) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run all cells, write the documents, return 1 if any cell is red."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, help="only so many cells, for a try; writes nothing")
    options = parser.parse_args()
    rows = []
    for cell in product()[: options.limit]:
        rows.append(judge(cell))
        print(f"{rows[-1]['state']:<8} {cell}  {rows[-1]['note']}", flush=True)
    if options.limit is None:
        DOCS.mkdir(exist_ok=True)
        axes = json.dumps({name: list(values) for name, values in AXES})
        cells = ",\n".join(json.dumps(row) for row in rows)
        (DOCS / "matrix.json").write_text(f'{{"axes": {axes},\n"cells": [\n{cells}\n]}}\n')
        (DOCS / "matrix.md").write_text(table(rows))
    red = sum(r["state"] == "red" for r in rows)
    print(f"{len(rows)} cells: {sum(r['state'] == 'green' for r in rows)} green, {red} red")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
