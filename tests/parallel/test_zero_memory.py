"""What ranks store at each ZeRO stage, counted in their buffers, against the formulas of the paper.

Rajbhandari et al. 2020 (ZeRO), section 3: of weights, gradients and optimizer states a rank keeps all or 1/N.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import nn

from tests.cells import Cell, config
from tests.harness import run_ranks
from trilith import preflight
from trilith.trainer import Place, Trainer
from trilith.zero.flat import FlatUnit

HIDDEN, LAYERS = 64, 4
# Bytes of a parameter's weight, gradient and optimizer states (with masters).
BYTES = {"fp32": (4, 4, 8), "bf16": (2, 4, 12)}
TOLERANCE = 0.02  # padding
NO_LIMIT = 10**9


def stored(dtype: str, stage: int, shards: int) -> tuple[float, float, float]:
    """Bytes that a rank keeps of each parameter."""
    weight, gradient, states = BYTES[dtype]
    return (
        weight / shards if stage == 3 else weight,
        gradient / shards if stage >= 2 else gradient,
        states / shards if stage >= 1 else states,
    )


def content_of(cell: Cell, dtype: str, **zero: Any) -> dict[str, Any]:
    """The config of a cell whose units are large enough for padding not to count."""
    content = config(cell, training__steps=2)
    sizes = {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_heads": 4, "num_kv_heads": 4, "vocab_size": 128}
    content["model"] |= {**sizes, "ffn_hidden_size": 4 * HIDDEN, "sequence_length": 16}
    content["data_types"] = {"param_dtype": dtype}
    content["zero_optimization"] |= zero
    return content


@dataclass
class Found:
    """What a rank counted: its parameters, elements of its units (padded, the largest first), and bytes."""

    parameters: int
    units: list[int]
    memory: dict[str, int]
    gathered_peak: int
    buckets_peak: int
    whole_at_once: list[int] = field(default_factory=list)  # units with storage at each look
    whole_after: int = 0


def measure(rank: int, world_size: int, contents: list[dict[str, Any]]) -> list[Found]:
    """Train two steps of each config, looking at the units' storages whenever a module runs."""
    return [_measured(Trainer(preflight.plan(content), Place(rank, world_size))) for content in contents]


def _measured(trainer: Trainer) -> Found:
    model, looks = trainer.model, []
    units = model.units

    def look(*_: object) -> None:
        looks.append(sum(map(has_storage, units)))

    for stage in trainer.stages.values():
        for path in stage.homes():
            stage.home(path).register_forward_pre_hook(look)
        for parameter in stage.parameters():
            parameter.register_post_accumulate_grad_hook(look)
    for _ in range(2):
        trainer.train_step()
    for unit in units:
        assert_keeps_its_part(unit, trainer.config.zero_optimization.stage)
    found = Found(
        parameters=sum(p.numel for stage in trainer.stages.values() for p in stage.local_parameters),
        units=sorted((unit.layout.numel for unit in units), reverse=True),
        memory=model.memory_bytes(),
        gathered_peak=model.gatherer.peak_bytes if model.gatherer else 0,
        buckets_peak=model.reducer.pool.peak_bytes,
        whole_at_once=looks,
        whole_after=sum(map(has_storage, units)),
    )
    trainer.close()
    return found


def has_storage(unit: FlatUnit) -> bool:
    return unit.weight.untyped_storage().nbytes() > 0


def assert_keeps_its_part(unit: FlatUnit, stage: int) -> None:
    """No attribute of a parameter keeps a whole gradient beside what the unit says."""
    own = unit.stop - unit.start
    assert unit.gradient.numel() == (own if stage >= 2 else unit.layout.numel)
    if stage >= 2:
        assert all(parameter.grad is None for parameter in unit.parameters)
    if stage == 3:
        assert unit.shard is not None and unit.shard.numel() == own
        assert all(isinstance(parameter, nn.Parameter) for parameter in unit.parameters)


def assert_as_by_formula(found: Found, dtype: str, stage: int, shards: int) -> None:
    categories = ("parameters", "gradients", "optimizer")
    for category, bytes_each in zip(categories, stored(dtype, stage, shards), strict=True):
        expected = bytes_each * found.parameters
        assert expected <= found.memory[category] <= (1 + TOLERANCE) * expected, (category, dtype, stage)


@pytest.mark.parametrize("shards", [2, 4])
def test_a_rank_stores_what_the_formulas_say(shards: int) -> None:
    cases = [(dtype, stage) for dtype in BYTES for stage in range(4)]
    contents = [content_of(Cell(shards, microbatches=2, zero=stage), dtype) for dtype, stage in cases]
    for results in run_ranks(shards, measure, contents):
        for (dtype, stage), found in zip(cases, results, strict=True):
            assert_as_by_formula(found, dtype, stage, shards)
            assert_bounded(found, dtype, stage, 0)


def assert_bounded(found: Found, dtype: str, stage: int, max_live: int) -> None:
    """Beside what it stores a rank has three whole gradients and, at stage 3, weights up to the cap."""
    weight, gradient, _ = BYTES[dtype]
    largest, *_ = found.units
    assert found.memory["gather_window"] == found.gathered_peak + found.buckets_peak
    if stage < 2:
        assert found.memory["gather_window"] == 0
        return
    assert largest * gradient <= found.buckets_peak <= 3 * largest * gradient
    if stage < 3:
        assert found.gathered_peak == 0
        return
    assert largest * weight <= found.gathered_peak <= max(max_live, largest) * weight
    assert found.whole_after == 0, "weights stay whole after the step"
    if max_live == 0:
        assert max(found.whole_at_once) == 1 and len(found.whole_at_once) > len(found.units)


SCHEDULES = (("1f1b", 1), ("interleaved_1f1b", 2), ("zb_h1", 1), ("zb_v", 2))


@pytest.mark.parametrize(("schedule", "stages"), SCHEDULES, ids=str)
def test_a_pipeline_rank_stores_what_the_formulas_say(schedule: str, stages: int) -> None:
    """With four microbatches under way too, split backwards or not, and at every cap of what is whole at one time."""
    cases = [("fp32", 2, 0, 0), ("bf16", 3, 0, 0), ("fp32", 3, 0, NO_LIMIT), ("fp32", 3, 110_000, NO_LIMIT)]
    contents = [
        content_of(
            Cell(2, 2, 1, schedule, stages, 4, stage),
            dtype,
            stage3_max_live_parameters=max_live,
            stage3_prefetch_bucket_size=prefetch,
        )
        for dtype, stage, max_live, prefetch in cases
    ]
    for results in run_ranks(4, measure, contents, timeout_s=120):
        for (dtype, stage, max_live, _), found in zip(cases, results, strict=True):
            assert_as_by_formula(found, dtype, stage, 2)
            assert_bounded(found, dtype, stage, max_live)
            if max_live:
                assert found.gathered_peak > found.units[0] * BYTES[dtype][0], "there is room for two units"


def test_tensor_ranks_store_what_the_formulas_say_of_their_part() -> None:
    """Sums over tensor ranks keep no further bucket alive."""
    contents = [content_of(Cell(2, 1, 2, zero=stage, microbatches=2), "fp32") for stage in (2, 3)]
    for results in run_ranks(4, measure, contents):
        for stage, found in zip((2, 3), results, strict=True):
            assert_as_by_formula(found, "fp32", stage, 2)
            assert_bounded(found, "fp32", stage, 0)


def test_gradients_reduced_once_a_step_stay_whole() -> None:
    """What `reduce_interval` = step costs: the gradients of stage 1."""
    content = content_of(Cell(2, microbatches=2, zero=2), "fp32", reduce_interval="step")
    for (found,) in run_ranks(2, measure_plainly, [content]):
        assert found["gradients"] == pytest.approx(found["parameters"], rel=TOLERANCE)
        assert found["gather_window"] == 0


def measure_plainly(rank: int, world_size: int, contents: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Bytes after a step of each config."""
    found = []
    for content in contents:
        trainer = Trainer(preflight.plan(content), Place(rank, world_size))
        trainer.train_step()
        found.append(trainer.model.memory_bytes())
        trainer.close()
    return found
