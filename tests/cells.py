"""The composition matrix: its axes, its rules, the covering array that `make test` runs, and a cell's config.

A cell is one combination of layout, schedule, ZeRO stage and the rest. The array covers every layout with at most eight
ranks, and every pair of values of the other axes (data, pipeline and tensor degrees counted as axes of their own, with
degrees of 5 and more as one value; `make matrix` crosses every layout with every schedule).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from trilith.pipeline.schedules import SCHEDULES as SCHEDULE_RECIPES

MAX_RANKS = 8
LARGE = 5
DEGREES = ("data", "pipeline", "tensor")
STEPS = 10


@dataclass(frozen=True)
class Cell:
    """One combination. `grouped`: fewer K/V heads than query heads. `odd`: layers and vocabulary do not divide."""

    data: int = 1
    pipeline: int = 1
    tensor: int = 1
    schedule: str = "1f1b"
    virtual_stages: int = 1
    microbatches: int = 1
    zero: int = 0
    tied: bool = False
    sequence_parallel: bool = False
    recompute: str = "none"
    dropout: float = 0.0
    family: str = "gpt2"
    grouped: bool = False
    odd: bool = False

    @property
    def num_ranks(self) -> int:
        return self.data * self.pipeline * self.tensor

    def __str__(self) -> str:
        on = [name for name in ("tied", "sequence_parallel", "grouped", "odd") if getattr(self, name)]
        layout = f"d{self.data}p{self.pipeline}t{self.tensor}"
        parts = [layout, f"{self.schedule}v{self.virtual_stages}m{self.microbatches}", f"zero{self.zero}", self.family]
        return "-".join([*parts, self.recompute, f"drop{self.dropout}", *on])


SCHEDULES = (
    *(("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 3)),
    *(("zb_h1", 1), ("zb_h2", 1), ("zb_v", 2), ("v_half", 2), ("v_min", 2), ("dualpipe_v", 2)),
)
# Those that `make test` crosses with all other axes; the rest have an array of their own (`schedule_cells.py`).
COMMON = (("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 3), ("zb_h1", 1), ("zb_v", 2))
MANY = 16  # microbatches, only for schedules that need more than the others have
Axes = tuple[tuple[str, tuple[Any, ...]], ...]
AXES: Axes = (
    ("data", tuple(range(1, 9))),
    ("pipeline", tuple(range(1, 9))),
    ("tensor", tuple(range(1, 9))),
    ("schedule", SCHEDULES),
    ("microbatches", (1, 3, 4, 5, 8, MANY)),
    ("zero", (0, 1, 2, 3)),
    ("tied", (False, True)),
    ("sequence_parallel", (False, True)),
    ("recompute", ("none", "selective", "full")),
    ("dropout", (0.0, 0.1)),
    ("family", ("gpt2", "llama")),
    ("grouped", (False, True)),
    ("odd", (False, True)),
)
LAYOUTS = tuple((d, p, t) for d, p, t in itertools.product(range(1, 9), repeat=3) if d * p * t <= MAX_RANKS)


def allowed(values: dict[str, Any]) -> bool:
    """Whether a (partial) choice of values can be completed to a cell that means something.

    Gradients and weights are partitioned only over several data ranks, so stages 2 and 3 ask for them.
    """
    name, virtual_stages = values.get("schedule", ("zb_h2", 1))
    virtual, sequence_parallel = virtual_stages > 1, values.get("sequence_parallel", False)
    pipeline = values.get("pipeline", 2 if virtual else 1)
    least = [SCHEDULE_RECIPES[name].min_microbatches(p) for p in range(pipeline, values.get("pipeline", MAX_RANKS) + 1)]
    microbatches = values.get("microbatches", max(least[0], 8 if least[-1] <= 8 else MANY))
    if microbatches < least[0] or (microbatches == MANY and least[-1] <= 8):
        return False
    tensor = values.get("tensor", 2 if sequence_parallel else 1)
    shards = values.get("zero", 0) >= 2
    data = values.get("data", 2 if shards else 1)
    if data * pipeline * tensor > MAX_RANKS:
        return False
    return not ((virtual and pipeline == 1) or (sequence_parallel and tensor == 1) or (shards and data == 1))


def _cell(values: dict[str, Any]) -> Cell:
    schedule, virtual_stages = values["schedule"]
    return Cell(**{**values, "schedule": schedule, "virtual_stages": virtual_stages})


def _pairs(values: dict[str, Any]) -> Iterator[tuple[tuple[str, Any], tuple[str, Any]]]:
    classes = [(name, min(value, LARGE) if name in DEGREES else value) for name, value in values.items()]
    yield from itertools.combinations(sorted(classes, key=lambda item: item[0]), 2)


def covering_array(seed: int = 5) -> list[Cell]:
    """Cells that cover every layout and every allowed pair of axis values, greedily; the same list every time."""
    draw = random.Random(seed)
    fewer = {"schedule": COMMON, "microbatches": (1, 3, 4, 5, 8)}
    axes = tuple((name, fewer.get(name, values)) for name, values in AXES)
    missing = set()
    for (name_a, values_a), (name_b, values_b) in itertools.combinations(sorted(axes, key=lambda axis: axis[0]), 2):
        for a, b in itertools.product(values_a, values_b):
            if allowed({name_a: a, name_b: b}):
                missing.update(_pairs({name_a: a, name_b: b}))
    layouts = list(LAYOUTS)
    draw.shuffle(layouts)
    cells: list[Cell] = []
    while missing or layouts:
        if layouts:
            start = dict(zip(DEGREES, layouts.pop(), strict=True))
        else:
            start = dict(min(missing, key=str))
        trials = [complete(dict(start), draw, missing.__contains__, axes) for _ in range(20)]
        best = max(trials, key=lambda values: sum(pair in missing for pair in _pairs(values)))
        missing -= set(_pairs(best))
        cells.append(_cell(best))
    return cells


def complete(
    values: dict[str, Any], draw: random.Random, wanted: Callable[[Any], bool], axes: Axes = AXES
) -> dict[str, Any]:
    """Choose the axes that `values` leaves open, each with the value that adds most `wanted` pairs."""
    order = [axis for axis in axes if axis[0] not in values]
    draw.shuffle(order)
    for name, choices in order:
        fitting = [choice for choice in choices if allowed({**values, name: choice})] or [choices[0]]
        draw.shuffle(fitting)
        values[name] = max(fitting, key=lambda choice, name=name: sum(map(wanted, _pairs({**values, name: choice}))))
    return values


def num_heads(cell: Cell) -> int:
    """Query heads that the tensor degree divides."""
    return {1: 6, 2: 6, 3: 6, 4: 8, 5: 5, 6: 6, 7: 7, 8: 8}[cell.tensor]


def num_kv_heads(cell: Cell) -> int:
    """All heads, or fewer: 2 of 6 with tensor degree 3 is the case where ranks share some heads and not others."""
    heads = num_heads(cell)
    return {6: 2, 8: 2, 5: 1, 7: 1}[heads] if cell.grouped else heads


def config(cell: Cell, **changes: Any) -> dict[str, Any]:
    """The engine config of a cell: a tiny fp64 model on synthetic data, 10 steps, clipping on."""
    stages = cell.pipeline * cell.virtual_stages
    heads = num_heads(cell)
    content: dict[str, Any] = {
        "model": {
            "family": cell.family,
            "num_layers": stages + 1 if cell.odd else max(stages, 2),
            "hidden_size": 4 * heads,
            "num_heads": heads,
            "num_kv_heads": num_kv_heads(cell),
            "ffn_hidden_size": 8 * heads,
            "sequence_length": 2 * heads,
            "vocab_size": 61 if cell.odd else 16 * heads,
            "tie_embeddings": cell.tied,
            "dropout": cell.dropout,
            "attention_dropout": cell.dropout,
        },
        "data": {"corpus": "synthetic"},
        "data_types": {"param_dtype": "fp64"},
        "parallel": {
            "data": cell.data,
            "pipeline": cell.pipeline,
            "tensor": cell.tensor,
            "sequence_parallel": cell.sequence_parallel,
            "timeout_s": 60,
        },
        "pipeline": {"schedule": cell.schedule, "virtual_stages": cell.virtual_stages},
        "zero_optimization": {
            "stage": cell.zero,
            # So small a model would stay whole: shard every parameter, one unit at a time.
            **({"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0} if cell.zero == 3 else {}),
        },
        "activation_checkpointing": {"recompute": cell.recompute},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": cell.microbatches,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
        "training": {"steps": STEPS, "seed": 11},
        "checkpoint": {"save_interval": None},
    }
    for path, value in changes.items():
        section, _, key = path.partition("__")
        content[section][key] = value
    return content


def one_process(cell: Cell) -> Cell:
    """The cell whose run on one process is this cell's truth: same model, data and steps."""
    return Cell(
        microbatches=1, tied=cell.tied, dropout=cell.dropout, family=cell.family, grouped=cell.grouped, odd=cell.odd
    )


def reference_config(cell: Cell) -> dict[str, Any]:
    """The one-process config of the same mathematics: the same model and global batch in one microbatch."""
    content = config(cell)
    plain = config(one_process(cell))
    for section in ("parallel", "pipeline", "zero_optimization", "activation_checkpointing"):
        content[section] = plain[section]
    content["train_micro_batch_size_per_gpu"] = cell.data * cell.microbatches
    content["gradient_accumulation_steps"] = 1
    return content


def row(cell: Cell, state: str, note: str = "") -> dict[str, Any]:
    """A line of docs/matrix.json."""
    return {**asdict(cell), "state": state, "note": note}


AXIS_NAMES = tuple(field.name for field in fields(Cell))
