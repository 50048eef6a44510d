"""The cells of ZeRO's own bar: stage x schedule x tensor x data x microbatches x the rest, on two pipeline ranks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tests.cells import MAX_RANKS, Cell, config, reference_config
from trilith.pipeline.schedules import SCHEDULES

PIPELINE, STEPS = 2, 4
# What an offload adds to `zero_optimization`.
OFFLOADS: Mapping[str, Mapping[str, Any]] = MappingProxyType({"none": {}})
AXES: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "schedule": ("1f1b", "interleaved_1f1b", "zb_h1", "zb_h2", "zb_v", "v_half", "v_min", "dualpipe_v"),
        "zero": (3, 2, 1, 0),
        "tensor": (1, 2),
        "data": (2, 4),
        "microbatches": (1, 3, 4),
        "tied": (False, True),
        "recompute": ("none", "selective", "full"),
        "clipping": (0.0, 0.5),
        "interval": ("microbatch", "step"),
        "offload": tuple(OFFLOADS),
    }
)
Combination = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class ZeroCell:
    """A cell, and what is not an axis of the composition matrix."""

    cell: Cell
    clipping: float
    interval: str
    offload: str

    def __str__(self) -> str:
        return f"{self.cell}-clip{self.clipping:g}-each_{self.interval}-offload_{self.offload}"


def fits(values: Mapping[str, Any]) -> bool:
    """Whether a (partial) choice means something: enough microbatches, few enough ranks, something to reduce late."""
    least = SCHEDULES[values["schedule"]].min_microbatches(PIPELINE) if "schedule" in values else 1
    if values.get("data", 2) * values.get("tensor", 1) * PIPELINE > MAX_RANKS:
        return False
    if values.get("interval") == "step" and values.get("zero", 2) < 2:
        return False
    return values.get("microbatches", max(AXES["microbatches"])) >= least


def is_new(combination: Combination) -> bool:
    """Whether no other array covers it: `schedule_cells` has every schedule at stages 0 and 1."""
    values = dict(combination)
    return "schedule" not in values or values.get("zero", 2) >= 2


def covering_cells(seed: int = 9) -> list[ZeroCell]:
    """Cells that cover every pair of values which no other array does."""
    return _cover(2, is_new, random.Random(seed))


def every_cell(seed: int = 2) -> list[ZeroCell]:
    """Cells that cover every three values."""
    return _cover(3, lambda _: True, random.Random(seed))


def _cover(strength: int, is_wanted: Callable[[Combination], bool], draw: random.Random) -> list[ZeroCell]:
    """Greedily: each cell begins with a combination that is missing and takes the values that add most others."""
    missing = {
        combination
        for names in itertools.combinations(AXES, strength)
        for values in itertools.product(*(AXES[name] for name in names))
        if fits(dict(zip(names, values, strict=True)))
        and is_wanted(combination := tuple(zip(names, values, strict=True)))
    }
    cells = []
    while missing:
        starts = draw.choices(sorted(missing, key=str), k=200)
        trials = [_completed(dict(start), draw) for start in starts]
        best = max(trials, key=lambda values: len(missing.intersection(_combinations(values, strength))))
        missing.difference_update(_combinations(best, strength))
        cells.append(_cell(best))
    return cells


def _completed(values: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    for name in AXES:
        if name not in values:
            values[name] = draw.choice([value for value in AXES[name] if fits({**values, name: value})])
    return values


def _combinations(values: Mapping[str, Any], strength: int) -> Iterator[Combination]:
    return itertools.combinations([(name, values[name]) for name in AXES], strength)


def _cell(values: dict[str, Any]) -> ZeroCell:
    others = {name: values[name] for name in ("clipping", "interval", "offload")}
    recipe = SCHEDULES[values["schedule"]]
    named = {name: value for name, value in values.items() if name not in others}
    virtual_stages = recipe.stages_per_rank or 2
    return ZeroCell(Cell(pipeline=PIPELINE, virtual_stages=virtual_stages, dropout=0.1, odd=True, **named), **others)


def zero_config(chosen: ZeroCell) -> dict[str, Any]:
    """The config of a cell: a few steps in fp64; at stage 3 every parameter is sharded, one unit whole at a time."""
    content = config(chosen.cell, training__steps=STEPS)
    content["gradient_clipping"] = chosen.clipping
    content["zero_optimization"] |= {"reduce_interval": chosen.interval, **OFFLOADS[chosen.offload]}
    return content


def zero_reference(chosen: ZeroCell) -> dict[str, Any]:
    """The config of the same steps in one process."""
    content = reference_config(chosen.cell)
    content["gradient_clipping"] = chosen.clipping
    content["training"]["steps"] = STEPS
    return content
