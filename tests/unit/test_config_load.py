"""config.load: strict JSON, overrides, and one clear message for every mistake."""

from __future__ import annotations

import json
import pickle
import random
import string
from pathlib import Path
from typing import Any

import pytest

from tests.broken_configs import BROKEN_CONFIGS, BrokenConfig, edited, valid_config
from trilith.config import Config, load_config, resolve
from trilith.errors import ConfigError

REFUSED_HERE = [case for case in BROKEN_CONFIGS if case.stage == "config"]
REFUSED_LATER = [case for case in BROKEN_CONFIGS if case.stage == "preflight"]


def error_of(source: Any, overrides: tuple[str, ...] = (), world_size: int | None = None) -> ConfigError:
    """The ConfigError of loading and resolving `source`."""
    with pytest.raises(ConfigError) as caught:
        resolve(load_config(source, overrides), world_size)
    return caught.value


@pytest.mark.parametrize("case", REFUSED_HERE, ids=lambda case: case.name)
def test_each_mistake_gives_one_message_that_names_the_key(case: BrokenConfig, tmp_path: Path) -> None:
    path = case.write(tmp_path)
    error = error_of(path)
    assert len(error.violations) == 1, str(error)
    (violation,) = error.violations
    assert case.key in violation.path
    assert case.hint in str(violation)
    assert "1 problem" in str(error) and path.name in str(error)
    assert "Traceback" not in str(error)


def test_there_are_many_broken_configs() -> None:
    assert len(REFUSED_HERE) >= 35 and len(REFUSED_LATER) >= 5
    assert len({case.name for case in BROKEN_CONFIGS}) == len(BROKEN_CONFIGS)


@pytest.mark.parametrize("case", REFUSED_LATER, ids=lambda case: case.name)
def test_layout_is_not_judged_here(case: BrokenConfig, tmp_path: Path) -> None:
    resolve(load_config(case.write(tmp_path)))


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    tree = edited(
        {
            "parallel.tensr": 2,
            "training.steps": "20",
            "model.dropout": 1.5,
            "zero_optimization.stage": 4,
            "model.num_heads": 5,  # a contradiction, judged although other keys are broken
            "wall_clock_breakdown": 1,
        }
    )
    text = json.dumps(tree, indent=1).replace('"lr": 0.001', '"lr": -Infinity')
    path = tmp_path / "many.json"
    path.write_text(text)
    error = error_of(path, ("pipelin.schedule=gpipe",))
    assert [violation.path for violation in error.violations] == [
        "optimizer.params.lr",
        "zero_optimization.stage",
        "parallel.tensr",
        "model.num_heads",
        "model.dropout",
        "training.steps",
        "wall_clock_breakdown",
        "pipelin.schedule",
    ]
    assert "many.json: 8 problems" in str(error)


def test_messages_carry_the_line(tmp_path: Path) -> None:
    path = tmp_path / "quick.json"
    path.write_text(json.dumps(edited({"parallel.tensr": 2}), indent=1))
    line = 1 + path.read_text().splitlines().index('  "tensr": 2')
    assert f"quick.json:{line}: parallel.tensr = 2: unknown key. Did you mean parallel.tensor?" in str(error_of(path))


def test_contradictions_carry_the_line_too(tmp_path: Path) -> None:
    path = tmp_path / "quick.json"
    path.write_text(json.dumps(edited({"model.num_heads": 5}), indent=1))
    line = 1 + path.read_text().splitlines().index('  "num_heads": 5,')
    assert f"quick.json:{line}: model.num_heads = 5" in str(error_of(path))


def test_errors_survive_pickling() -> None:
    error = error_of(edited({"parallel.tensr": 2, "model.num_heads": 5}))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# --- numbers, sources ----------------------------------------------------------------------------------------------------


def test_integral_floats_are_whole_numbers() -> None:
    tree = edited({"zero_optimization.reduce_bucket_size": 5e8, "training.steps": 20.0, "pipeline.partition": [2.0, 2]})
    config = load_config(tree)
    assert config.zero_optimization.reduce_bucket_size == 500_000_000
    assert isinstance(config.training.steps, int)
    assert config.pipeline.partition == (2, 2)


@pytest.mark.parametrize("value", [True, "2", 2.5, [2], {"a": 2}, 2**70, 1e30])
def test_what_is_no_whole_number(value: Any) -> None:
    (violation,) = error_of(edited({"parallel.tensor": value})).violations
    assert violation.path == "parallel.tensor"


@pytest.mark.parametrize("value", [True, "0.1", [0.1], 10**400])
def test_what_is_no_number(value: Any) -> None:
    (violation,) = error_of(edited({"optimizer.params.weight_decay": value})).violations
    assert violation.path == "optimizer.params.weight_decay"


def test_null_means_auto_where_auto_is_allowed() -> None:
    config = load_config(edited({"gradient_accumulation_steps": None, "zero_optimization.overlap_comm": None}))
    assert resolve(config).config.gradient_accumulation_steps == 4


def test_sources_are_equal(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(valid_config()).encode())  # with a byte-order mark
    assert load_config(path) == load_config(str(path)) == load_config(valid_config())


def test_a_mapping_is_not_changed() -> None:
    tree = edited({"pipeline.stages": 2, "bfloat16": {"enabled": False}})
    before = json.dumps(tree)
    load_config(tree, ["training.steps=5"])
    assert json.dumps(tree) == before


def test_mapping_with_foreign_objects() -> None:
    paths = [violation.path for violation in error_of(edited({"training.seed": object(), "model": {3: 1}})).violations]
    assert "training.seed" in paths and "model.3" in paths
    endless: dict[str, Any] = {}
    endless["model"] = endless
    assert "nested deeper" in str(error_of(endless))


def test_schema_key_is_ignored() -> None:
    assert load_config({"$schema": "schema.json", **valid_config()}) == load_config(valid_config())


def test_keys_with_dots_are_told_to_nest() -> None:
    (violation,) = error_of({**valid_config(), "model.dropout": 0.1}).violations
    assert "nested" in violation.fix and "--set model.dropout" in violation.fix


def test_unreadable_files(tmp_path: Path) -> None:
    assert "is a directory" in str(error_of(tmp_path))
    (tmp_path / "quickstart.json").write_text(json.dumps(valid_config()))
    assert "Did you mean" in str(error_of(tmp_path / "quikstart.json"))
    assert "no directory" in str(error_of(tmp_path / "nowhere" / "a.json"))
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xff"}')
    assert "not UTF-8" in str(error_of(tmp_path / "latin.json"))
    (tmp_path / "huge.json").write_bytes(b" " * (5 * 2**20))
    assert "at most 4194304 bytes" in str(error_of(tmp_path / "huge.json"))
    (tmp_path / "deep.json").write_text("[" * 100 + "]" * 100)
    assert "nested deeper" in str(error_of(tmp_path / "deep.json"))
    (tmp_path / "deeper.json").write_text("[" * 100_000)
    assert "too deep" in str(error_of(tmp_path / "deeper.json"))
    (tmp_path / "digits.json").write_text('{"a": ' + "1" * 10_000 + "}")
    assert "too many digits" in str(error_of(tmp_path / "digits.json"))


def test_duplicates_are_found_at_any_depth(tmp_path: Path) -> None:
    path = tmp_path / "twice.json"
    text = json.dumps(edited({"optimizer.param_groups": [{"pattern": "a", "lr_mult": 2}]}), indent=1)
    path.write_text(text.replace('"lr_mult": 2', '"lr_mult": 2,\n"lr_mult": 3'))
    (violation,) = error_of(path).violations
    assert violation.path == "optimizer.param_groups[0].lr_mult" and "lines 17 and 18" in violation.rule


# --- overrides -----------------------------------------------------------------------------------------------------------


def test_overrides_are_json_or_text() -> None:
    overrides = [
        "parallel.tensor=1",
        "run.directory=runs/a b",
        "parallel.data=auto",
        "optimizer.params.betas=[0.8, 0.9]",
        "scheduler=null",
        "data.tokenizer.path=x=y.json",
    ]
    config = load_config(valid_config(), overrides)
    assert config.parallel.tensor == 1 and config.run.directory == "runs/a b" and config.scheduler is None
    assert config.optimizer.params.betas == (0.8, 0.9)  # type: ignore[union-attr]
    assert config.data.tokenizer.path == "x=y.json"
    origins = resolve(config).origins
    assert origins["parallel.tensor"] == "--set" and origins["run.directory"] == "--set"
    assert origins["parallel.data"].startswith("derived")


def test_the_last_override_wins() -> None:
    assert load_config(valid_config(), ["training.steps=5", "training.steps=7"]).training.steps == 7


@pytest.mark.parametrize(
    ("override", "key", "hint"),
    [
        ("parallel.tensr=2", "parallel.tensr", "Did you mean parallel.tensor?"),
        ("lr=2", "lr", "Did you mean optimizer.params.lr?"),
        ("parallel.tensor", "parallel.tensor", "KEY=VALUE"),
        ("=3", "--set", "KEY=VALUE"),
        ("parallel.tensor=two", "parallel.tensor", "whole number"),
        ("parallel.tensor.x=2", "parallel.tensor.x", "unknown key"),
        ("optimizer.params.lr=NaN", "optimizer.params.lr", "finite"),
        ("zero_optimization.stage=4", "zero_optimization.stage", "must be one of 0, 1, 2 or 3"),
        ("zero_optimization.stag=3", "zero_optimization.stag", "Did you mean zero_optimization.stage?"),
        ("zero_optimization.zero_quantized_weights=true", "zero_optimization.zero_quantized_weights", "not built"),
        ("zero_optimization.cpu_offload=2", "zero_optimization.cpu_offload", "must be true or false"),
        ("zero_optimization.offload_param.device=cpu", "zero_optimization.offload_param.device", "Use stage 3"),
        ("wandb.enabled=true", "wandb.enabled", "not built yet"),
    ],
)
def test_a_wrong_override_is_blamed_on_set(override: str, key: str, hint: str) -> None:
    (violation,) = error_of(valid_config(), (override,)).violations
    assert violation.path == key and hint in str(violation)
    assert str(violation).startswith("--set: ")


def test_override_into_something_that_is_no_section() -> None:
    violations = error_of(edited({"tensorboard": 3}), ("tensorboard.enabled=true",)).violations
    assert any("is no section" in violation.rule and str(violation).startswith("--set") for violation in violations)


# --- whatever is thrown at it --------------------------------------------------------------------------------------------

JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 7, 10**12, 10**30, 2.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "auto", "fp16", "AdamW", "x" * 500, "0", "\0", [], [1], [None], ["auto", "a"], {}, {"a": 1}),
    *({"type": "SGD"}, {"type": ["SGD"]}, {"type": None, "params": 3}, {"enabled": "auto"}, [[[]]], [{}], {"": {}}),
)
NAMES = (
    *("tensr", "lr", "stage", "type", "params", "", "enabled", "a.b", "offload_param", "amp", "aio", "bf16", "é"),
    *("cpu_offload", "mics_shard_size", "prefetch_bucket_size", "offload_optimizer", "replicate", "device"),
)


def mutated(tree: dict[str, Any], generator: random.Random) -> dict[str, Any]:
    """`tree` with one to four random edits."""
    for _ in range(generator.randint(1, 4)):
        node: Any = tree
        while True:
            inner = [child for child in node.values() if isinstance(child, dict) and child]
            if not inner or generator.random() < 0.3:
                break
            node = generator.choice(inner)
        name = generator.choice(list(node)) if node and generator.random() < 0.7 else generator.choice(NAMES)
        action = generator.random()
        if action < 0.2:
            node.pop(name, None)
        elif action < 0.3 and name in node:
            node[name + generator.choice(string.ascii_lowercase)] = node.pop(name)
        else:
            node[name] = json.loads(json.dumps(generator.choice(JUNK)))
    return tree


def test_mutated_configs_raise_nothing_but_config_errors() -> None:
    generator = random.Random(20)
    accepted = refused = 0
    for _ in range(600):
        tree = mutated(valid_config(), generator)
        try:
            resolved = resolve(load_config(tree), generator.choice([None, 1, 8, 12, 0, -3]))
        except ConfigError as error:
            refused += 1
            assert error.violations and str(error)
        else:
            accepted += 1
            again = resolve(load_config(resolved.to_json()["config"]), resolved.world_size)
            assert again.config == resolved.config
    assert refused > 300 and accepted > 10


def test_mutated_text_raises_nothing_but_config_errors(tmp_path: Path) -> None:
    generator = random.Random(21)
    path = tmp_path / "fuzz.json"
    text = json.dumps(valid_config(), indent=1)
    for _ in range(300):
        at = generator.randrange(len(text))
        piece = generator.choice(["", "{", "}", '"', ",", ":", "[", "\\", "\n", "1e999", "NaN", "//", '"a":', "\u2028"])
        path.write_text(text[:at] + piece + text[at + generator.randint(0, 3) :], encoding="utf-8")
        try:
            resolve(load_config(path))
        except ConfigError as error:
            assert error.violations and path.name in str(error)


def test_random_overrides_raise_nothing_but_config_errors() -> None:
    generator = random.Random(22)
    keys = [
        "parallel.tensor",
        "optimizer",
        "optimizer.params",
        "model",
        "scheduler.type",
        "zero_optimization",
        "x",
        ".",
    ]
    for _ in range(300):
        value = generator.choice(JUNK)
        text = value if isinstance(value, str) else json.dumps(value)
        try:
            load_config(valid_config(), [f"{generator.choice(keys)}{generator.choice(['=', '=', '', '.a='])}{text}"])
        except ConfigError as error:
            assert error.violations


def test_config_is_frozen_hashable_and_picklable() -> None:
    config = load_config(valid_config())
    with pytest.raises(ValueError, match="frozen"):
        config.training = None  # type: ignore[assignment, misc]
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(load_config(valid_config()))
    assert isinstance(config, Config)
