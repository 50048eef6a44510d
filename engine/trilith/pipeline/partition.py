"""Cuts a model's units (embedding, layers, head) into pipeline stages: contiguous, exact, every unit placed once.

No torch. Every stage holds at least one layer; the embedding lies on the first stage and the head on the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from math import lcm

from trilith.errors import ConfigError, Violation
from trilith.models.base import UnitDecl

StageRange = tuple[int, int]  # [lo, hi) of a stage's units
Cuts = tuple[StageRange, ...]
MODES = ("cost", "uniform", "parameters", "auto")
PATH = "pipeline.partition"


def _whole_numbers(costs: Sequence[float]) -> list[int]:
    """The same costs in a unit in which all are integers, so that sums and ties are exact."""
    exact = [Fraction(cost) for cost in costs]
    unit = lcm(*(cost.denominator for cost in exact))
    return [int(cost * unit) for cost in exact]


def partition_units(costs: Sequence[float], num_stages: int, is_layer: Sequence[bool] | None = None) -> Cuts:
    """The contiguous cut of units into stages whose largest cost is smallest, by dynamic programming.

    Every stage gets at least one unit of those marked `is_layer` (all, if not given). Of the cuts with that largest
    cost it is the one with the smallest sum of squares, then the one whose first stages are shortest: in most schedules
    the first stages hold the most activations. Costs are finite and not negative, of any unit; O(stages x units^2).
    """
    layers = [True] * len(costs) if is_layer is None else list(is_layer)
    assert len(layers) == len(costs) and 1 <= num_stages <= sum(layers), (len(costs), num_stages, sum(layers))
    before = list(accumulate(_whole_numbers(costs), initial=0))
    layers_before = list(accumulate(layers, initial=0))

    def best(cap: int | None) -> list[list[tuple[int, int] | None]]:
        """table[n][lo]: (value, hi of the first stage) of cutting units lo.. into n stages; None: impossible.

        The value is the largest cost (`cap` None) or the sum of squares of costs of at most `cap`.
        """
        count = len(costs)
        table: list[list[tuple[int, int] | None]] = [[None] * count + [(0, count)]]
        for _ in range(num_stages):
            after = table[-1]
            row: list[tuple[int, int] | None] = [None] * (count + 1)
            for lo in range(count):
                chosen: tuple[int, int] | None = None
                for hi in range(lo + 1, count + 1):
                    cost, rest = before[hi] - before[lo], after[hi]
                    if rest is None or layers_before[hi] == layers_before[lo] or (cap is not None and cost > cap):
                        continue
                    value = max(cost, rest[0]) if cap is None else cost * cost + rest[0]
                    if chosen is None or value < chosen[0]:
                        chosen = (value, hi)
                row[lo] = chosen
            table.append(row)
        return table

    smallest = best(None)[num_stages][0]
    assert smallest is not None
    table = best(smallest[0])
    cuts, lo = [], 0
    for left in range(num_stages, 0, -1):
        entry = table[left][lo]
        assert entry is not None
        cuts.append((lo, entry[1]))
        lo = entry[1]
    return tuple(cuts)


def num_layers_of(units: Sequence[UnitDecl], cuts: Cuts) -> tuple[int, ...]:
    """The number of layers of each stage: cuts as `pipeline.partition` lists them."""
    return tuple(num_layers_in(units[lo:hi]) for lo, hi in cuts)


def num_layers_in(units: Sequence[UnitDecl]) -> int:
    """How many of the units are layers."""
    return sum(map(_is_layer, units))


def layers_per_stage(num_layers: int, num_stages: int) -> list[int]:
    """Layers dealt evenly; where they do not divide, the first stages get one more."""
    size, extra = divmod(num_layers, num_stages)
    return [size + (stage < extra) for stage in range(num_stages)]


def _is_layer(unit: UnitDecl) -> bool:
    return unit.name.startswith("layers.")


def partition_problems(num_layers: int, num_stages: int, mode: str | Sequence[int]) -> list[Violation]:
    """Every rule that a partition of `num_layers` into `num_stages` breaks; empty where it can be made."""
    problems = []
    if isinstance(mode, str):
        if mode not in MODES:
            rule = f"must be one of {', '.join(MODES)}, or a list of layers per stage"
            problems.append(Violation(PATH, mode, rule))
        if num_stages > num_layers:
            problems.append(
                Violation(
                    "model.num_layers",
                    num_layers,
                    f"{num_stages} stages (parallel.pipeline x pipeline.virtual_stages) need at least a layer each",
                    "Use fewer stages or more layers",
                )
            )
        return problems
    counts = list(mode)
    if len(counts) != num_stages:
        rule = f"lists {len(counts)} stages; parallel.pipeline x pipeline.virtual_stages are {num_stages}"
        problems.append(Violation(PATH, counts, rule, "Give one number of layers per stage"))
    if sum(counts) != num_layers:
        rule = f"places {sum(counts)} layers; model.num_layers is {num_layers}"
        problems.append(Violation(PATH, counts, rule, "Make the numbers add up"))
    if any(count < 0 for count in counts) or any(count < 1 for count in counts[1:-1]):
        rule = "every stage needs at least one layer; only the first and the last may have 0"
        problems.append(Violation(PATH, counts, rule, "They hold the embedding and the head"))
    return problems


def unit_costs(units: Sequence[UnitDecl], mode: str) -> list[float]:
    """What a unit weighs: its forward FLOPs a token (attention counted causal), or with `parameters` their number.

    Parameters count tied copies, too: each stage holds its own. All other work of a step is taken in proportion.
    """
    if mode == "parameters":
        return [float(sum(t.numel for p in unit.parameters for t in p.tensors)) for unit in units]
    return [unit.matmul_flops + 0.5 * unit.attention_flops for unit in units]


def partition(
    units: Sequence[UnitDecl],
    num_stages: int,
    mode: str | Sequence[int],
    measured: Sequence[float] | None = None,
) -> Cuts:
    """Per stage the range [lo, hi) of `units` (`embedding`, `layers.0` ... `layers.L-1`, `head`).

    `mode`: `cost` (smallest largest FLOPs of a stage), `auto` (the same of the `measured` costs of the units, or of FLOPs
    without them), `parameters`, `uniform` (layers dealt evenly), or the number of layers of each stage. Raises
    ConfigError with every rule broken.
    """
    is_layer = [_is_layer(unit) for unit in units]
    problems = partition_problems(sum(is_layer), num_stages, mode)
    if problems:
        raise ConfigError(problems)
    if isinstance(mode, str) and mode != "uniform":
        costs = measured if mode == "auto" and measured is not None else unit_costs(units, mode)
        cuts = partition_units(costs, num_stages, is_layer)
    else:
        counts = layers_per_stage(sum(is_layer), num_stages) if isinstance(mode, str) else list(mode)
        first = is_layer.index(True)
        ends = [first + done for done in accumulate(counts)]
        ends[-1] = len(units)
        cuts = tuple(zip([0, *ends[:-1]], ends, strict=True))
    assert [index for lo, hi in cuts for index in range(lo, hi)] == list(range(len(units))), cuts
    return cuts
