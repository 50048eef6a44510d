"""config.schema: every key is described, the schema for editors is up to date and says what the models take."""

from __future__ import annotations

import json
import operator
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.broken_configs import BROKEN_CONFIGS, edited, valid_config
from trilith.config import json_schema, load_config, resolve
from trilith.config.deepspeed_keys import TABLE
from trilith.config.schema import field_infos, known_paths, takes_auto
from trilith.config.schema_file import schema_text
from trilith.config.suggest import SYNONYMS, nearest_key

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted(field_infos()))
def test_every_key_has_a_description(path: str) -> None:
    description = field_infos()[path].description
    assert description and description.endswith(".") and len(description) > 8
    if takes_auto(path):
        assert "auto" in description, "say what auto means"


def test_schema_file_is_up_to_date() -> None:
    path = ROOT / "configs" / "schema.json"
    assert path.read_text(encoding="utf-8") == schema_text(), "run python -m trilith.config.schema_file"


def objects(node: Any) -> list[dict[str, Any]]:
    """Every object schema below `node`."""
    if isinstance(node, list):
        return [inner for child in node for inner in objects(child)]
    if not isinstance(node, dict):
        return []
    inside = [inner for child in node.values() for inner in objects(child)]
    return [node, *inside] if "properties" in node else inside


def test_everything_in_the_schema_is_described() -> None:
    schema = json_schema()
    for node in objects(schema):
        assert node.get("additionalProperties") is False
        for name, child in node["properties"].items():
            target = schema["$defs"][child["$ref"].rsplit("/", 1)[1]] if "$ref" in child else child
            assert child.get("description") or target.get("description") or target.get("deprecated"), name


KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
COMPARE = {
    "minimum": operator.ge,
    "exclusiveMinimum": operator.gt,
    "maximum": operator.le,
    "exclusiveMaximum": operator.lt,
}
SILENT = {"description", "title", "default", "deprecated", "discriminator", "$schema", "$defs", "additionalProperties"}


def is_kind(value: Any, kind: str) -> bool:
    """JSON Schema's types: an integral float is an integer, true is not."""
    if kind in ("integer", "number"):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and (kind == "number" or float(value).is_integer())
    return isinstance(value, KINDS[kind])


def holds(word: str, rule: Any, value: Any, schema: dict[str, Any]) -> bool:
    """Whether `value` keeps one keyword of a schema; an unknown keyword fails the test."""
    if word in SILENT:
        return True
    if word == "$ref":
        return matches(value, schema["$defs"][rule.rsplit("/", 1)[1]], schema)
    if word in ("anyOf", "oneOf"):
        return any(matches(value, choice, schema) for choice in rule)
    if word in ("enum", "const"):
        return value in (rule if word == "enum" else [rule]) and not isinstance(value, bool)
    if word in COMPARE:
        return bool(COMPARE[word](value, rule))
    if word in ("minItems", "maxItems"):
        return len(value) >= rule if word == "minItems" else len(value) <= rule
    if word == "items":
        return all(matches(child, rule, schema) for child in value)
    if word == "prefixItems":
        return all(matches(child, part, schema) for child, part in zip(value, rule, strict=False))
    if word == "required":
        return all(name in value for name in rule)
    assert word == "properties", word
    return all(name in rule and matches(child, rule[name], schema) for name, child in value.items())


def matches(value: Any, node: dict[str, Any], schema: dict[str, Any]) -> bool:
    """A validator for the part of JSON Schema that is used here."""
    if "type" in node and not is_kind(value, node["type"]):
        return False
    return all(holds(word, rule, value, schema) for word, rule in node.items() if word != "type")


def fits(value: Any) -> bool:
    """Whether the schema accepts `value`."""
    schema = json_schema()
    return matches(value, schema, schema)


@pytest.mark.parametrize(
    "source",
    [
        valid_config(),
        {"$schema": "schema.json", **valid_config()},
        resolve(load_config(valid_config())).to_json()["config"],
        edited({"parallel.data": "auto", "gradient_clipping": None, "pipeline.partition": [2, 2]}),
        edited({"tensor_parallel": {"autotp_size": 2}, "zero_optimization.contiguous_gradients": True}),
        edited({"optimizer": {"type": "Adam", "params": {"lr": "auto", "torch_adam": True}}}),
        edited({"zero_optimization": {"stage": 3, "cpu_offload": True, "prefetch_bucket_size": "auto"}}),
        edited({"zero_optimization.offload_optimizer": {"device": "cpu", "fast_init": False, "ratio": 0.5}}),
        edited({"aio": {"thread_count": 1, "overlap_events": True}}),
        edited({"sparse_attention": {"mode": "bigbird", "num_random_blocks": 2}}),
    ],
)
def test_schema_accepts_what_loads(source: dict[str, Any]) -> None:
    assert fits(source)
    load_config(source)


STRUCTURAL = ("typo", "key_of", "key_in", "number_in", "fractional", "bool_", "section_is", "zero_degree", "negative")


@pytest.mark.parametrize(
    "case", [c for c in BROKEN_CONFIGS if c.name.startswith(STRUCTURAL)], ids=lambda case: case.name
)
def test_schema_refuses_what_does_not_load(case: Any) -> None:
    assert not fits(dict(case.source))


def test_refused_keys_are_not_in_the_schema() -> None:
    text = schema_text()
    for row in TABLE:
        if row.verdict == "refuse":
            assert row.path not in known_paths() and row.path not in field_infos()
            assert f'"{row.path}"' not in text
    assert "wandb" not in text and "super_offload" not in text


def test_synonyms_point_at_keys() -> None:
    assert set(SYNONYMS.values()) <= set(known_paths())


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("parallel.tensr", "parallel.tensor"),
        ("parallel.Tensor", "parallel.tensor"),
        ("parallel.tp", "parallel.tensor"),
        ("zero_stage", "zero_optimization.stage"),
        ("zero_optimisation", "zero_optimization"),
        ("offload_param_device", "zero_optimization.offload_param.device"),
        ("parallel.dp_replicate", "parallel.replicate"),
        ("lr", "optimizer.params.lr"),
        ("optimizer.lr", "optimizer.params.lr"),
        ("learning-rate", "optimizer.params.lr"),
        ("training.learning_rate", "optimizer.params.lr"),
        ("seed", "training.seed"),
        ("model.n_layer", "model.num_layers"),
        ("model.n_head", "model.num_heads"),
        ("model.seq_length", "model.sequence_length"),
        ("num_layers", "model.num_layers"),
        ("max_grad_norm", "gradient_clipping"),
        ("micro_batch_size", "train_micro_batch_size_per_gpu"),
        ("train_batchsize", "train_batch_size"),
        ("optimizer.param_groups[0].patern", "optimizer.param_groups[...].pattern"),
        ("qqqq", ""),
    ],
)
def test_nearest_key(typo: str, meant: str) -> None:
    assert nearest_key(typo) == meant


def test_import_is_fast_and_without_torch() -> None:
    code = (
        "import time; start = time.process_time(); import trilith.config, sys; "
        "print(time.process_time() - start, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
        ).stdout.split()
        for _ in range(3)
    ]
    assert all(run[1:] == ["False", "False"] for run in runs)
    assert min(float(run[0]) for run in runs) < 0.35


def test_schema_command(tmp_path: Path) -> None:
    target = tmp_path / "schema.json"
    subprocess.run([sys.executable, "-m", "trilith.config.schema_file", str(target)], check=True, timeout=60)
    assert json.loads(target.read_text())["title"] == "Trilith run"
