"""The cut of a model into stages: optimal, whole, deterministic, and refused with a rule where it cannot be made."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from trilith.errors import ConfigError
from trilith.models.base import Init, ParameterDecl, TensorDecl, UnitDecl
from trilith.pipeline.partition import layers_per_stage, num_layers_of, partition, partition_problems, partition_units


def all_cuts(count: int, num_stages: int) -> list[tuple[tuple[int, int], ...]]:
    cuts = []
    for inner in combinations(range(1, count), num_stages - 1):
        ends = (0, *inner, count)
        cuts.append(tuple(pairwise(ends)))
    return cuts


def key(costs: list[float], cuts: tuple[tuple[int, int], ...]) -> tuple:
    sums = [sum(costs[lo:hi]) for lo, hi in cuts]
    return max(sums), sum(value * value for value in sums), cuts


def test_equals_exhaustive_search() -> None:
    generator = random.Random(0)
    for _ in range(300):
        count = generator.randint(1, 8)
        num_stages = generator.randint(1, count)
        costs = [float(generator.randint(0, 6)) for _ in range(count)]
        best = min(all_cuts(count, num_stages), key=lambda cuts: key(costs, cuts))
        assert partition_units(costs, num_stages) == best, (costs, num_stages)


def test_every_stage_holds_a_layer() -> None:
    """A heavy head would like a stage of its own; the last layer stays with it."""
    costs, is_layer = [0.0, 1.0, 1.0, 1.0, 50.0], [False, True, True, True, False]
    assert partition_units(costs, 3, is_layer) == ((0, 2), (2, 3), (3, 5))
    assert partition_units([50.0, 1.0, 1.0], 2, [False, True, True]) == ((0, 2), (2, 3))


def test_sums_that_floats_would_blur_are_exact() -> None:
    assert partition_units([0.1, 0.2, 0.3, 0.1, 0.2], 3) == ((0, 2), (2, 3), (3, 5))
    assert partition_units([1e18, 1.0, 1e18, 1.0], 2) == ((0, 2), (2, 4))


def test_large_models_are_cut_at_once() -> None:
    cuts = partition_units([0.0, *[1.7e9] * 126, 4.2e9], 64, [False, *[True] * 126, False])
    assert cuts[0][0] == 0 and cuts[-1][1] == 128 and all(a[1] == b[0] for a, b in pairwise(cuts))


def units(num_layers: int, head_flops: float = 0.0, tied: bool = True) -> list[UnitDecl]:
    def unit(name: str, numel: int, flops: float, tie_copy: int = 0) -> UnitDecl:
        tensor = TensorDecl(f"{name}.weight", (numel,), Init("zeros"))
        return UnitDecl(name, (ParameterDecl(f"{name}.weight", (tensor,), name, tie_copy=tie_copy),), flops)

    layers = [unit(f"layers.{index}", 10, 10.0) for index in range(num_layers)]
    return [unit("embedding", 40, 0.0), *layers, unit("head", 40, head_flops, tie_copy=int(tied))]


def test_modes() -> None:
    model = units(8, head_flops=20.0)
    assert partition(model, 2, "uniform") == ((0, 5), (5, 10))
    assert partition(model, 2, "cost") == ((0, 6), (6, 10)), "the head counts as two layers"
    assert partition(model, 2, "parameters") == ((0, 5), (5, 10)), "the copy of a tied tensor counts where it lies"
    assert partition(model, 4, "parameters") == ((0, 2), (2, 5), (5, 8), (8, 10))
    assert partition(model, 3, [1, 6, 1]) == ((0, 2), (2, 8), (8, 10))
    assert partition(model, 3, [0, 8, 0]) == ((0, 1), (1, 9), (9, 10))
    assert partition(model, 1, "cost") == ((0, 10),)


def test_measured_costs() -> None:
    """The embedding and the head cost like any layer; without measurements FLOPs must do."""
    model = units(4, head_flops=20.0)
    assert partition(model, 2, "auto") == partition(model, 2, "cost") == ((0, 4), (4, 6))
    measured = partition(model, 2, "auto", [3.0, 1.0, 1.0, 1.0, 1.0, 0.5])
    assert measured == ((0, 2), (2, 6))
    assert num_layers_of(model, measured) == (1, 3) and partition(model, 2, [1, 3]) == measured
    assert partition(model, 2, "cost", [3.0, 1.0, 1.0, 1.0, 1.0, 0.5]) == ((0, 4), (4, 6)), "only auto is measured"


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
def test_every_layer_is_placed_once(num_stages: int) -> None:
    draw = random.Random(num_stages)
    model = units(5)
    cuts = partition(model, num_stages, "auto", [draw.random() for _ in model])
    assert sum(num_layers_of(model, cuts)) == 5 and cuts[0][0] == 0 and cuts[-1][1] == len(model)
    assert all(before[1] == after[0] for before, after in pairwise(cuts))


def test_uniform_deals_the_remainder_to_the_first_stages() -> None:
    assert layers_per_stage(7, 3) == [3, 2, 2]
    assert partition(units(7), 3, "uniform") == ((0, 4), (4, 6), (6, 9))


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "mode", "words"),
    [
        (2, 4, "cost", ("model.num_layers = 2", "4 stages", "at least a layer each")),
        (4, 2, "fair", ("pipeline.partition = 'fair'", "cost, uniform, parameters, auto")),
        (4, 2, [4], ("lists 1 stages", "are 2")),
        (4, 2, [1, 2], ("places 3 layers", "model.num_layers is 4")),
        (4, 3, [2, 0, 2], ("at least one layer",)),
        (4, 3, [5, 1, -2], ("at least one layer",)),
    ],
)
def test_what_cannot_be_cut_is_refused(num_layers: int, num_stages: int, mode, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        partition(units(num_layers), num_stages, mode)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.violations == tuple(partition_problems(num_layers, num_stages, mode))


def test_all_rules_broken_are_listed_at_once() -> None:
    assert len(partition_problems(4, 3, [0, 0])) == 2
    assert len(partition_problems(4, 3, [1, 0, 1, 1])) == 3
