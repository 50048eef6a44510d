"""The cells of the schedules' own bar: every synchronous schedule x ranks x microbatches x tensor x ZeRO, in pairs."""

from __future__ import annotations

import itertools
import random
from typing import Any

from tests.cells import MAX_RANKS, Cell
from trilith.pipeline.schedules import SCHEDULES

AXES: dict[str, tuple[Any, ...]] = {
    "schedule": tuple(name for name, recipe in SCHEDULES.items() if not recipe.asynchronous),
    "pipeline": (2, 3, 4),
    "microbatches": ("minimum", "p+1", "2p", "2p+3"),
    "tensor": (1, 2),
    "data": (1, 2),
    "zero": (0, 1),
    "tied": (False, True),
    "recompute": ("none", "selective", "full"),
    "family": ("gpt2", "llama"),
    "sequence_parallel": (False, True),
}


def num_microbatches(name: str, pipeline: int, how: str) -> int:
    """The number that `how` means; never below the schedule's minimum."""
    least = SCHEDULES[name].min_microbatches(pipeline)
    return max(least, {"minimum": least, "p+1": pipeline + 1, "2p": 2 * pipeline, "2p+3": 2 * pipeline + 3}[how])


def every_cell(seed: int = 5) -> list[Cell]:
    """A cell for every (schedule, pipeline, microbatches); the other axes covered in pairs."""
    starts = itertools.product(AXES["schedule"], AXES["pipeline"], AXES["microbatches"])
    return _cover([dict(zip(AXES, start, strict=False)) for start in starts], random.Random(seed))


def covering_cells(seed: int = 6) -> list[Cell]:
    """Cells that cover every pair of values of the axes: one for every (schedule, microbatches), and what that leaves."""
    starts = itertools.product(AXES["schedule"], AXES["microbatches"])
    return _cover([{"schedule": name, "microbatches": how} for name, how in starts], random.Random(seed))


def _cover(starts: list[dict[str, Any]], draw: random.Random) -> list[Cell]:
    """Complete each start with the values that cover most new pairs; two starts that come to one cell are one."""
    missing = set()
    for a, b in itertools.combinations(AXES, 2):
        missing.update(((a, x), (b, y)) for x, y in itertools.product(AXES[a], AXES[b]) if fits({a: x, b: y}))
    cells: list[Cell] = []
    while starts or missing:
        start = starts.pop(0) if starts else dict(min(missing, key=str))
        trials = [_completed(dict(start), draw) for _ in range(30)]
        best = max(trials, key=lambda values: len(missing.intersection(_pairs(values))))
        missing.difference_update(_pairs(best))
        cells.append(_cell(best))
    return list(dict.fromkeys(cells))


def _completed(values: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    for name in AXES:
        if name not in values:
            values[name] = draw.choice([value for value in AXES[name] if fits({**values, name: value})])
    return values


def _pairs(values: dict[str, Any]) -> list[tuple[tuple[str, Any], tuple[str, Any]]]:
    return list(itertools.combinations([(name, values[name]) for name in AXES], 2))


def _cell(values: dict[str, Any]) -> Cell:
    recipe = SCHEDULES[values["schedule"]]
    microbatches = num_microbatches(values["schedule"], values["pipeline"], values["microbatches"])
    fixed = {"virtual_stages": recipe.stages_per_rank or 2, "dropout": 0.1, "odd": True}
    return Cell(**{**values, "microbatches": microbatches}, **fixed)


def fits(values: dict[str, Any]) -> bool:
    """Whether a (partial) choice means something on at most eight ranks; ZeRO-1 partitions over two data ranks."""
    tensor = values.get("tensor", 2 if values.get("sequence_parallel") else 1)
    data = values.get("data", 2 if values.get("zero") else 1)
    if values.get("sequence_parallel") and tensor == 1:
        return False
    if values.get("zero") and data == 1:
        return False
    return values.get("pipeline", 2) * tensor * data <= MAX_RANKS
