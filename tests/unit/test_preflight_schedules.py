"""Plans whose schedule is a file, asynchronous, V-shaped, post-validated, or to be found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.broken_configs import edited
from trilith import preflight
from trilith.config.layout_keys import ASYNCHRONOUS, V_SHAPED, PipelineConfig
from trilith.config.schema import field_infos
from trilith.errors import ConfigError
from trilith.models.activations import ActivationBytes
from trilith.pipeline.action import Kind
from trilith.pipeline.schedule_file import write_schedule
from trilith.pipeline.schedules import SCHEDULES, make_schedule
from trilith.pipeline.search import Measured, UnitCost

SMALL = {"parallel": {"data": 1, "pipeline": 2}, "train_batch_size": 16}  # 8 microbatches of 2
PIPEDREAM = {**SMALL, "gradient_clipping": 0, "model.tie_embeddings": False}


def plan(changes: Mapping[str, Any], measured: Measured | None = None) -> preflight.Plan:
    return preflight.plan(edited(changes), measured=measured)


def refused(changes: Mapping[str, Any]) -> dict[str, str]:
    """path -> message of what is wrong."""
    with pytest.raises(ConfigError) as caught:
        plan(changes)
    return {violation.path: str(violation) for violation in caught.value.violations}


# ---- names --------------------------------------------------------------------------------------------------------


def test_the_config_names_the_schedules_that_there_are() -> None:
    named = set(PipelineConfig.model_fields["schedule"].annotation.__args__)  # type: ignore[union-attr]
    assert named == {*SCHEDULES, "auto", "file"}
    assert {name for name, recipe in SCHEDULES.items() if recipe.asynchronous} == ASYNCHRONOUS
    assert {name for name, recipe in SCHEDULES.items() if recipe.stages_per_rank == 2} == V_SHAPED
    assert "schedule_file" in str(field_infos()["pipeline.schedule"].description)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_can_be_planned(name: str) -> None:
    found = plan({**PIPEDREAM, "pipeline.schedule": name})
    recipe = SCHEDULES[name]
    assert found.schedule.name == name and found.schedule.num_microbatches == 8
    assert found.config.pipeline.virtual_stages == (2 if name in V_SHAPED else 1)
    assert (found.splits_backward, found.is_delayed) == (recipe.splits_backward, recipe.asynchronous)
    assert [unit.name for stage in found.stages for unit in stage] == [unit.name for unit in found.units]
    asynchronous = [note for note in found.resolved.notes if "changes the mathematics" in note]
    assert bool(asynchronous) == recipe.asynchronous
    drained = [note for note in found.resolved.notes if "draining at other steps" in note]
    assert bool(drained) == (name == "pipedream")
    assert not found.is_provisional and name in preflight.describe(found)


@pytest.mark.parametrize("name", sorted(V_SHAPED & set(SCHEDULES)))
def test_a_v_brings_both_ends_to_one_rank(name: str) -> None:
    """The tied stages 0 and 3 lie on pipeline rank 0: no group, but both copies are summed."""
    found = plan({**SMALL, "pipeline.schedule": name})
    assert found.schedule.placement == (0, 1, 1, 0)
    assert found.ties == {} and found.schedule.ties == ((0, 3),)
    assert not any(part.kind is Kind.TIE_REDUCE for _, part in found.schedule.parts())


def test_ties_over_two_ranks() -> None:
    found = plan({**SMALL, "pipeline": {"schedule": "interleaved_1f1b", "virtual_stages": 2}})
    assert found.ties == {"embedding.tokens": (0, 1)} and found.schedule.ties == ((0, 3),)
    assert sum(part.kind is Kind.TIE_REDUCE for _, part in found.schedule.parts()) == 2
    assert plan({**SMALL, "model.tie_embeddings": False}).ties == {}
    assert plan({"parallel": {"data": 1}}).ties == {}


def test_post_validation() -> None:
    found = plan({**SMALL, "pipeline": {"schedule": "zb_h1", "optimizer_sync": "postvalidate"}})
    assert sum(part.kind is Kind.VALIDATE for _, part in found.schedule.parts()) == 2
    memory = found.memory[0]
    assert memory.rollback_bytes == 12 * memory.parameters, "fp32 Adam: the weights and both moments"
    assert "rollback copy" in preflight.describe(found)
    alone = plan({"parallel": {"data": 1}, "pipeline.optimizer_sync": "postvalidate"})
    assert any("gains nothing" in note for note in alone.resolved.notes)
    never_wrong = plan({**SMALL, "gradient_clipping": 0, "pipeline.optimizer_sync": "postvalidate"})
    assert never_wrong.memory[0].rollback_bytes == 0


@pytest.mark.parametrize(
    ("evaluation", "save", "text"),
    [
        (0, None, "only where it starts (training.eval_interval and checkpoint.save_interval are off)"),
        (0, 0, "only where it starts"),
        (5, 0, "on all stages, every 5 steps (training.eval_interval): draining"),
        (5, 7, "every 5 steps (training.eval_interval) and every 7 steps (checkpoint.save_interval): draining"),
    ],
    ids=str,
)
def test_what_drains_pipedream_is_said(evaluation: int, save: int | None, text: str) -> None:
    changes = {"pipeline.schedule": "pipedream", "training.eval_interval": evaluation, "checkpoint.save_interval": save}
    assert text in "\n".join(plan({**PIPEDREAM, **changes}).resolved.notes)


def test_versions_of_weights() -> None:
    plain = plan({**PIPEDREAM, "pipeline.schedule": "1f1b"}).memory
    stashed = plan({**PIPEDREAM, "pipeline.schedule": "pipedream"}).memory
    double = plan({**PIPEDREAM, "pipeline.schedule": "pipedream_2bw"}).memory
    assert [memory.versions for memory in stashed] == [2, 1] and [memory.versions for memory in double] == [2, 2]
    for before, after, buffered in zip(plain, stashed, double, strict=True):
        assert after.parameter_bytes == after.versions * before.parameter_bytes
        assert after.gradient_bytes == before.gradient_bytes
        assert buffered.gradient_bytes == 2 * before.gradient_bytes
        assert after.optimizer_bytes == buffered.optimizer_bytes == before.optimizer_bytes * 3 // 2


# ---- a schedule from a file -----------------------------------------------------------------------------------------


def from_file(path: Path, **pipeline: Any) -> dict[str, Any]:
    return {**SMALL, "pipeline": {"schedule": "file", "schedule_file": str(path), **pipeline}}


def test_a_schedule_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    write_schedule(make_schedule("zb_h1", 2, 1, 8), path)
    found, named = plan(from_file(path)), plan({**SMALL, "pipeline.schedule": "zb_h1"})
    assert found.schedule == named.schedule and found.cuts == named.cuts
    write_schedule(make_schedule("interleaved_1f1b", 2, 2, 8), path)
    found = plan(from_file(path, partition=[1, 1, 1, 1]))
    assert found.schedule.num_stages == 4 and found.config.pipeline.virtual_stages == "auto"
    assert preflight.plan(json.loads(json.dumps(found.resolved.to_json()["config"]))).schedule == found.schedule


def test_a_file_must_fit_the_config(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    write_schedule(make_schedule("1f1b", 3, 1, 4), path)
    found = refused(from_file(path, virtual_stages=2))
    assert set(found) == {"parallel.pipeline", "gradient_accumulation_steps", "pipeline.virtual_stages"}
    assert "which has 3 pipeline ranks" in found["parallel.pipeline"]
    assert "which has 4 microbatches" in found["gradient_accumulation_steps"]


def test_a_broken_file_is_refused_with_the_action(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("microbatches: 1\nplacement: 0 1\nrank 0: F0.0 B0.0\nrank 1: B1.0 F1.0\n")
    changes = {**from_file(path), "train_batch_size": 2}
    assert "backward of stage 1, microbatch 0" in refused(changes)["pipeline.schedule_file"]
    path.write_text("microbatches: 1\nplacement: 0 1\nrank 0: F0.0\nrank 1: F1.0 B1.0\n")
    assert "backward of stage 0, microbatch 0 (B0.0) is missing" in refused(changes)["pipeline.schedule_file"]


# ---- memory limit and search ------------------------------------------------------------------------------------------


def test_a_limit_holds_for_named_schedules_too() -> None:
    most = max(memory.total_bytes for memory in plan(SMALL).memory)
    assert plan({**SMALL, "pipeline.memory_limit_bytes": most}).schedule.name == "1f1b"
    text = refused({**SMALL, "pipeline.memory_limit_bytes": most - 1})["pipeline.memory_limit_bytes"]
    assert f"pipeline rank 0 is predicted to need {most} bytes" in text


AUTO = {**SMALL, "pipeline": {"schedule": "auto"}}


def cost(seconds: float, kept: int = 1000) -> UnitCost:
    return UnitCost(seconds, seconds, seconds, ActivationBytes(kept, kept))


def test_without_measurements_a_choice_is_provisional() -> None:
    found = plan(AUTO)
    assert found.is_provisional and found.ranking is not None
    assert found.schedule.name == found.ranking.best.schedule.name and found.cuts == found.ranking.best.cuts
    assert found.config.pipeline.schedule == "auto" and found.config.pipeline.partition == "auto"
    assert any("provisional" in note for note in found.resolved.notes)
    text, content = preflight.describe(found), json.loads(json.dumps(preflight.to_json(found)))
    assert "by simulated step time (FLOPs, provisional" in text
    assert [row["schedule"] for row in content["ranking"]] == [r.schedule.name for r in found.ranking.rows]
    assert content["schedule"]["provisional"]
    again = preflight.plan(json.loads(json.dumps(found.resolved.to_json()["config"])))
    assert again.is_provisional and again.schedule == found.schedule, "it travels as auto"


def test_measured_costs_decide() -> None:
    """The first of four layers takes as long as the other three."""
    measured = Measured((cost(0.0), cost(0.3), cost(0.1), cost(0.1), cost(0.1), cost(0.0)))
    found = plan(AUTO, measured)
    assert not found.is_provisional and found.ranking is not None and found.ranking.is_measured
    pipeline, best = found.config.pipeline, found.ranking.best
    assert (pipeline.schedule, pipeline.virtual_stages) == (found.schedule.name, best.virtual_stages)
    assert pipeline.partition == best.num_layers and sum(best.num_layers) == 4
    assert found.resolved.origins["pipeline.schedule"] == "derived: by simulation with measured costs"
    assert found.simulation.makespan_s == pytest.approx(best.time_s, rel=1e-4)
    again = preflight.plan(json.loads(json.dumps(found.resolved.to_json()["config"])))
    assert again.ranking is None and (again.schedule, again.cuts) == (found.schedule, found.cuts)


def test_what_is_given_narrows_the_search() -> None:
    found = plan({**SMALL, "pipeline": {"schedule": "auto", "virtual_stages": 1, "partition": [1, 3]}})
    assert found.ranking is not None
    assert all(row.virtual_stages == 1 and row.num_layers == (1, 3) for row in found.ranking.rows)
    measured = Measured((cost(0.0), cost(0.3), cost(0.1), cost(0.1), cost(0.1), cost(0.0)))
    found = plan({**SMALL, "pipeline": {"schedule": "zb_h1", "partition": "auto"}}, measured)
    assert found.config.pipeline.partition == (1, 3) and found.schedule.name == "zb_h1"
    assert found.ranking is not None and len(found.ranking.rows) == 1


def test_a_search_keeps_the_limit() -> None:
    ranking = plan(AUTO).ranking
    assert ranking is not None
    least = min(row.memory_bytes for row in ranking.rows)
    found = plan({**SMALL, "pipeline": {"schedule": "auto", "memory_limit_bytes": least}})
    assert max(memory.total_bytes for memory in found.memory) <= least
    text = refused({**SMALL, "pipeline": {"schedule": "auto", "memory_limit_bytes": least - 1}})
    assert "no schedule fits: the smallest is" in text["pipeline.memory_limit_bytes"]
