"""Measuring a model's units on real ranks, and runs whose schedule and partition are chosen by what was measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.cells import Cell, config
from tests.harness import run_ranks
from tests.runs import reference, worst_relative
from trilith import preflight
from trilith.errors import ConfigError
from trilith.measure import decide, measure, measuring_schedule
from trilith.models.activations import stage_activations
from trilith.pipeline.check import check
from trilith.pipeline.memory import activation_setting
from trilith.pipeline.search import Measured
from trilith.trainer import Place, Trainer

STEPS = 3


def content(cell: Cell, **pipeline: Any) -> dict[str, Any]:
    """The config of a cell with schedule "auto"; `pipeline` overrides keys of its section."""
    found = config(cell)
    found["pipeline"] = {"schedule": "auto", **pipeline}
    found["training"]["steps"] = STEPS
    return found


def measured_and_kept(rank: int, world_size: int, source: dict[str, Any]) -> tuple[Measured, list[Any]]:
    plan = preflight.plan(source)
    found = measure(plan, Place(rank, world_size))
    return found, [unit.name for unit in plan.units]


@pytest.mark.parametrize(
    ("cell", "changes"),
    [
        (Cell(pipeline=2, microbatches=4, tied=True, dropout=0.1, odd=True), {}),
        (Cell(pipeline=2, tensor=2, microbatches=2, family="llama", sequence_parallel=True, recompute="full"), {}),
        (Cell(data=2, microbatches=2), {"schedule": "1f1b", "partition": "auto"}),
    ],
    ids=str,
)
def test_every_rank_learns_the_same_costs(cell: Cell, changes: dict[str, Any]) -> None:
    """Bytes are those of the memory model; times are positive, and nothing is sent with one pipeline rank."""
    source = content(cell, **changes)
    everyone = run_ranks(cell.num_ranks, measured_and_kept, source, timeout_s=60)
    measured, names = everyone[0]
    assert all(found == measured for found, _ in everyone)
    assert len(measured.units) == len(names)
    resolved = preflight.plan(source).config
    for name, unit in zip(names, measured.units, strict=True):
        predicted = stage_activations(resolved.model, [name], activation_setting(resolved))
        assert unit.activations.after_input_gradient == predicted.after_input_gradient
        assert unit.activations.after_forward == pytest.approx(predicted.after_forward, rel=0.02)
        assert unit.forward_s > 0 and unit.backward_input_s > 0 and unit.backward_weight_s > 0
    assert (measured.transfer_s > 0) == (cell.pipeline > 1)


def test_the_measuring_schedule_is_proven() -> None:
    units = preflight.plan(content(Cell(pipeline=3, microbatches=3))).units
    schedule = measuring_schedule(units, 3)
    check(schedule)
    assert schedule.splits_backward and sorted(schedule.placement) == list(schedule.placement)
    assert schedule.num_stages == len(units) and len(schedule.channels()) == 4


def chosen_run(rank: int, world_size: int, source: dict[str, Any]) -> dict[str, Any]:
    said: list[str] = []
    place = Place(rank, world_size)
    plan = decide(preflight.plan(source), place, said.append)
    assert not plan.is_provisional and decide(plan, place, said.append) is plan
    trainer = Trainer(plan, place)
    records = [trainer.train_step() for _ in range(STEPS)]
    trainer.close()
    return {
        "said": said,
        "curve": [(record.loss, record.grad_norm) for record in records],
        "chosen": plan.config.pipeline.model_dump(mode="json"),
        "rows": [(row.schedule.name, row.fits) for row in plan.ranking.rows] if plan.ranking else [],
        "placed": [unit.name for stage in plan.stages for unit in stage],
    }


def test_a_run_chooses_its_schedule_prints_the_ranking_and_trains() -> None:
    cell = Cell(pipeline=2, microbatches=4, tied=True, odd=True)
    source = content(cell)
    source["model"]["num_layers"] = 5
    ranks = run_ranks(2, chosen_run, source, timeout_s=90)
    for found in ranks[1:]:
        assert found["said"] == [] and found["rows"] == ranks[0]["rows"] and found["chosen"] == ranks[0]["chosen"]
    ((table,), chosen) = ranks[0]["said"], ranks[0]["chosen"]
    assert "measured times" in table and chosen["schedule"] in table
    assert chosen["schedule"] == ranks[0]["rows"][0][0] != "auto"
    assert sum(chosen["partition"]) == 5 and len(chosen["partition"]) == 2 * chosen["virtual_stages"]
    assert ranks[0]["placed"] == ["embedding", *(f"layers.{i}" for i in range(5)), "head"]
    plain = config(cell, training__steps=STEPS)
    plain["model"]["num_layers"] = 5
    plain["parallel"]["pipeline"] = 1
    assert worst_relative(ranks[0]["curve"], reference(plain)) < 1e-10


def refused(rank: int, world_size: int, source: dict[str, Any], limit: int) -> str:
    plan = preflight.plan(source)
    pipeline = plan.config.pipeline.model_copy(update={"memory_limit_bytes": limit})
    resolved = replace(plan.resolved, config=plan.config.model_copy(update={"pipeline": pipeline}))
    tight = replace(plan, resolved=resolved)
    with pytest.raises(ConfigError) as caught:
        decide(tight, Place(rank, world_size), print)
    return str(caught.value)


def test_nothing_fits_on_any_rank() -> None:
    """All ranks refuse together, so that none waits."""
    texts = run_ranks(2, refused, content(Cell(pipeline=2, microbatches=4)), 1000, timeout_s=60)
    assert texts[0] == texts[1] and "no schedule fits: the smallest is" in texts[0]
