"""From a config to a plan: what a run will be, what it costs in memory, and everything wrong with it at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.broken_configs import edited
from tests.cells import Cell, config
from trilith import preflight
from trilith.data.indexed import IndexedDatasetWriter, token_dtype
from trilith.errors import ConfigError
from trilith.models.base import local_parameter, num_parameters
from trilith.trainer import Place, Trainer

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.json"


def plan(changes: Mapping[str, Any] | None = None) -> preflight.Plan:
    return preflight.plan(edited(changes or {}))


# ---- the quickstart -----------------------------------------------------------------------------------------------


def test_quickstart_is_eight_ranks() -> None:
    found = preflight.plan(QUICKSTART)
    assert found.world_size == 8
    assert vars(found.degrees) | {"shard": 2, "pipeline": 2, "tensor": 2} == vars(found.degrees)
    assert (found.schedule.name, found.schedule.num_ranks, found.schedule.num_stages) == ("interleaved_1f1b", 2, 4)
    assert found.schedule.num_microbatches == 32 // (8 * 2) == found.config.gradient_accumulation_steps
    assert found.schedule.placement == (0, 1, 0, 1)
    names = [unit.name for stage in found.stages for unit in stage]
    assert names == ["embedding", "layers.0", "layers.1", "layers.2", "layers.3", "head"]
    assert all(any(unit.name.startswith("layers.") for unit in stage) for stage in found.stages)
    assert found.ties == {"embedding.tokens": (0, 1)} and found.eval_microbatches == 2
    assert found.schedule.ties == ((0, 3),)


def test_quickstart_makes_the_groups_it_uses() -> None:
    found = preflight.plan(QUICKSTART)
    groups: dict[str, list[tuple[int, ...]]] = {}
    for group in found.groups:
        assert len(group.ranks) > 1
        groups.setdefault(group.name, []).append(group.ranks)
    assert sorted(groups["tp"]) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert sorted(groups["dp"]) == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert sorted(groups["pp"]) == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_overrides_and_world_size() -> None:
    found = preflight.plan(QUICKSTART, ["parallel.pipeline=1", "pipeline.virtual_stages=1", "parallel.data=auto"], 4)
    assert (found.world_size, found.config.parallel.data, found.config.gradient_accumulation_steps) == (4, 2, 2)
    assert not found.ties, "both ends lie on one pipeline rank"
    with pytest.raises(ConfigError, match="world"):
        preflight.plan(QUICKSTART, world_size=6)


def test_the_plan_travels_as_its_resolved_config() -> None:
    """Ranks get the resolved config as JSON and come to the same plan."""
    found = preflight.plan(QUICKSTART)
    sent = json.loads(json.dumps(found.resolved.to_json()["config"]))
    again = preflight.plan(sent, world_size=8)
    assert (again.config, again.cuts, again.schedule, again.degrees) == (
        found.config,
        found.cuts,
        found.schedule,
        found.degrees,
    )


# ---- what is wrong ------------------------------------------------------------------------------------------------


def test_every_room_s_violations_at_once(tmp_path: Path) -> None:
    """A rule of the config itself, of tensor parallelism, of stages and of data: one error, a line each."""
    broken = edited(
        {
            "scheduler.params.warmup_min_lr": 0.5,
            "parallel": {"data": 2, "pipeline": 2, "tensor": 8},
            "model.ffn_hidden_size": 33,
            "pipeline.partition": [1, 2],
            "data.tokenizer": {"path": str(tmp_path / "none.json"), "vocab_size": 64},
        }
    )
    with pytest.raises(ConfigError) as caught:
        preflight.plan(broken)
    violations = {violation.path: violation for violation in caught.value.violations}
    assert set(violations) == {
        "scheduler.params.warmup_min_lr",
        "model.num_heads",
        "model.ffn_hidden_size",
        "pipeline.partition",
        "data.tokenizer.path",
    }
    text = str(caught.value)
    assert text.startswith("config: 5 problems") and len(text.splitlines()) == 6
    assert "parallel.tensor = 8" in violations["model.num_heads"].rule


def test_the_source_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(edited({"model.num_heads": 2, "parallel": {"tensor": 4}})))
    with pytest.raises(ConfigError, match=r"mine\.json.*\n.*model\.num_heads"):
        preflight.plan(path)


# ---- memory -------------------------------------------------------------------------------------------------------


def test_the_rank_that_holds_most_is_meant() -> None:
    """Two K/V heads under six query heads on three ranks: the middle rank holds both."""
    heads = {"model.hidden_size": 48, "model.num_heads": 6, "model.num_kv_heads": 2, "model.ffn_hidden_size": 48}
    found = plan({**heads, "parallel": {"data": 1, "tensor": 3}, "train_batch_size": 2})
    declared = [p for unit in found.units for p in unit.parameters if p.tie_copy == 0]
    held = [sum(local_parameter(p, rank, 3).numel for p in declared) for rank in range(3)]
    assert held[0] == held[2] < held[1] == found.memory[0].parameters


HALF = {"bf16.enabled": True}
DOUBLE = {"data_types.param_dtype": "fp64"}
PLAIN_SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
MOMENTUM = {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}


@pytest.mark.parametrize(
    ("changes", "parameter", "gradient", "optimizer"),
    [
        ({}, 4, 4, 8),
        (HALF, 2, 4, 12),
        ({"fp16.enabled": True}, 2, 4, 12),
        (DOUBLE, 8, 8, 16),
        (PLAIN_SGD, 4, 4, 0),
        (MOMENTUM, 4, 4, 4),
        (HALF | PLAIN_SGD, 2, 4, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize(("stage", "data"), [(0, 2), (1, 1), (1, 2), (1, 4)])
def test_bytes_per_parameter(
    changes: dict[str, Any], parameter: int, gradient: int, optimizer: int, stage: int, data: int
) -> None:
    """The published figures: fp32 Adam 8 + 8/d, bf16 with fp32 gradients 6 + 12/d (Megatron's distributed optimizer)."""
    batch = {"train_batch_size": "auto", "gradient_accumulation_steps": 2, "zero_optimization.stage": stage}
    found = plan({"parallel": {"data": data}, **batch, **changes})
    memory = found.memory[0]
    count = memory.parameters
    share = data if stage else 1
    assert count == num_parameters(found.units)
    assert (memory.parameter_bytes, memory.gradient_bytes) == (parameter * count, gradient * count)
    assert 0 <= memory.optimizer_bytes - optimizer * count / share < optimizer + 1
    assert memory.state_bytes == memory.parameter_bytes + memory.gradient_bytes + memory.optimizer_bytes
    assert memory.total_bytes == memory.state_bytes + memory.activation_bytes > memory.state_bytes


def test_tied_copies_and_padding_count_where_they_lie() -> None:
    """Pipeline 2 x tensor 2: the last stage holds its own copy of the tied embedding, 61 rows make 31 on each rank."""
    parallel = {"data": 1, "pipeline": 2, "tensor": 2}
    batch = {"train_batch_size": "auto", "gradient_accumulation_steps": 2}
    found = plan({"parallel": parallel, "model.vocab_size": 61, "data.tokenizer": {"vocab_size": 61}, **batch})
    per_rank = [memory.parameters for memory in found.memory]
    whole = {t.name: t.numel for u in found.units for p in u.parameters for t in p.tensors if t.split is None}
    split = num_parameters(found.units) - sum(whole.values())
    rows = 61 * 32
    assert sum(per_rank) == sum(whole.values()) + (split - rows) // 2 + 2 * (31 * 32)


@pytest.mark.parametrize("changes", [{}, HALF, {"model.family": "llama"}, MOMENTUM], ids=str)
def test_prediction_is_what_a_rank_allocates(changes: dict[str, Any]) -> None:
    """To the padding of flat buffers: 15 elements a parameter at most."""
    single = {"parallel": {"data": 1}, "train_batch_size": "auto", "gradient_accumulation_steps": 2}
    found = plan({**single, **changes})
    trainer = Trainer(found, Place())
    real, predicted = trainer.model.memory_bytes(), found.memory[0]
    trainer.close()
    num_tensors = sum(len(unit.parameters) for unit in found.units)
    for name, value in (
        ("parameters", predicted.parameter_bytes),
        ("gradients", predicted.gradient_bytes),
        ("optimizer", predicted.optimizer_bytes),
    ):
        element = value / predicted.parameters
        assert 0 <= real[name] - value <= 15 * num_tensors * element, name


# ---- what `trilith check` prints ----------------------------------------------------------------------------------


def test_json() -> None:
    found = plan()
    content = json.loads(json.dumps(preflight.to_json(found), allow_nan=False))
    assert set(content) == {
        *("config", "origins", "notes", "world_size", "parameters", "train_flops_per_token", "stages", "ranks"),
        *("groups", "bubble", "bubble_makespan", "peak_microbatches", "schedule", "ranking", "gathers"),
        "attention_density",
    }
    assert content["world_size"] == 8 and content["parameters"] == num_parameters(found.units)
    assert set(content["train_flops_per_token"]) == {"causal", "noncausal"}
    assert [stage["pipeline_rank"] for stage in content["stages"]] == [0, 1]
    assert [name for stage in content["stages"] for name in stage["units"]] == [unit.name for unit in found.units]
    keys = {"pipeline_rank", "parameters", "versions", "state_bytes", "total_bytes"}
    parts = ("parameter", "gradient", "optimizer", "rollback", "activation", "window", "host", "disk")
    keys |= {f"{part}_bytes" for part in parts}
    assert [set(rank) for rank in content["ranks"]] == [keys, keys]
    assert content["schedule"]["name"] == "1f1b" and not content["schedule"]["splits_backward"]
    assert content["ranking"] == []
    assert {group["name"] for group in content["groups"]} >= {"tp", "dp", "pp"}
    assert 0 < content["bubble"] < 1 and content["peak_microbatches"] == [2, 1]
    assert content["origins"]["gradient_accumulation_steps"].startswith("derived")
    assert "auto" not in json.dumps(content["config"]["model"])


def test_text() -> None:
    text = preflight.describe(plan())
    for part in (
        "8 ranks = data 2 x pipeline 2 x tensor 2",
        "16 samples = microbatch 2 x 4 microbatches x data 2",
        "1f1b, 2 stages, ZeRO-1; predicted bubble",
        "stage 0 on pipeline rank 0: embedding ..",
        "predicted bytes per rank",
        "of 2 microbatches, total",
        "tp [0, 1]",
        "gradient_accumulation_steps = 4 (derived",
    ):
        assert part in text, part


LLAMA_405B = {
    "model": {
        "family": "llama",
        "num_layers": 126,
        "hidden_size": 16384,
        "num_heads": 128,
        "num_kv_heads": 8,
        "ffn_hidden_size": 53248,
        "sequence_length": 8192,
        "vocab_size": 128256,
    },
    "data": {"corpus": "synthetic"},
    "bf16": {"enabled": True},
    "parallel": {"data": 8, "pipeline": 16, "tensor": 8, "sequence_parallel": True},
    "zero_optimization": {"stage": 1},
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 32,
    "optimizer": {"type": "AdamW", "params": {"lr": 8e-5}},
    "training": {"steps": 10},
}

TIMED = """
import json, sys, time
start = time.process_time()
from trilith import preflight
from trilith.data.indexed import IndexedDatasetWriter, token_dtype
plan = preflight.plan(json.load(sys.stdin))
text, content = preflight.describe(plan), preflight.to_json(plan)
print(json.dumps([time.process_time() - start, "torch" in sys.modules, "numpy" in sys.modules, content]))
"""


def test_a_thousand_ranks_without_torch() -> None:
    """Llama 3.1 405B on 1024 ranks, in processor time, so that a busy machine does not matter."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "engine"), str(ROOT / "launcher")))}
    done = subprocess.run(
        [sys.executable, "-c", TIMED],
        input=json.dumps(LLAMA_405B),
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    seconds, has_torch, has_numpy, content = json.loads(done.stdout)
    print(f"405B on 1024 ranks: {seconds:.2f} s of processor time, numpy imported: {has_numpy}")
    assert not has_torch
    assert content["world_size"] == 1024 and content["parameters"] == 405_853_388_800
    assert len(content["stages"]) == 16 and sum(len(stage["units"]) for stage in content["stages"]) == 128
    assert max(rank["state_bytes"] for rank in content["ranks"]) < 80e9
    assert seconds < 2.0


def test_a_data_set_too_small_for_a_split_is_refused(tmp_path: Path) -> None:
    """Known from the index alone: no rank has to start to find out."""
    prefix = tmp_path / "small"
    with IndexedDatasetWriter(prefix, token_dtype(61)) as writer:
        for _ in range(4):
            writer.add_document(list(range(40)))
    content = config(Cell())
    content["data"] = {"paths": [str(prefix)], "split": [1, 0, 0]}
    preflight.plan(content)
    content["training"]["eval_interval"] = 5
    with pytest.raises(ConfigError, match=r"data\.split"):
        preflight.plan(content)
    content["data"]["split"] = [1, 1, 0]
    content["model"]["sequence_length"] = 120
    with pytest.raises(ConfigError, match=r"data\.split"):
        preflight.plan(content)
