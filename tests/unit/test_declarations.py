"""Declarations: published parameter counts and FLOPs, splits that cover every element once, and the modules' equality."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model_cases import small
from trilith.config import load_config, resolve
from trilith.config.model_keys import ModelConfig
from trilith.layers.placement import Placement
from trilith.models.base import (
    ParameterDecl,
    UnitDecl,
    local_parameter,
    num_parameters,
    stage_parameters,
    train_flops_per_token,
)
from trilith.models.decoder import StageSettings
from trilith.models.families import declare, rules
from trilith.models.stage import StageModel
from trilith.topology import Group

ENGINE = Path(__file__).resolve().parents[2] / "engine"


def gpt2_small() -> ModelConfig:
    return small(
        "gpt2",
        num_layers=12,
        hidden_size=768,
        num_heads=12,
        num_kv_heads=12,
        ffn_hidden_size=3072,
        sequence_length=1024,
        vocab_size=50257,
    )


def llama(**sizes: Any) -> ModelConfig:
    return small("llama", **sizes)


def llama_8b() -> ModelConfig:
    return llama(
        num_layers=32,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        ffn_hidden_size=14336,
        sequence_length=8192,
        vocab_size=128256,
    )


def test_published_parameter_counts() -> None:
    """GPT-2 124M (Radford et al. 2019, as released) and Llama 3 8B."""
    assert num_parameters(declare(gpt2_small())) == 124_439_808
    assert num_parameters(declare(llama_8b())) == 8_030_261_248


def test_untying_adds_the_vocabulary() -> None:
    tied, untied = small("gpt2"), small("gpt2", tie_embeddings=False)
    assert num_parameters(declare(untied)) - num_parameters(declare(tied)) == 61 * 24


def test_published_flops() -> None:
    """9.07 GFLOP a token, which reproduces the log of a published 1B run; and Narayanan et al. 2021's formula."""
    sizes = {"num_layers": 24, "hidden_size": 2048, "num_heads": 16, "num_kv_heads": 16, "ffn_hidden_size": 4096}
    units = declare(llama(**sizes, sequence_length=4096, vocab_size=50257))
    assert train_flops_per_token(units, causal=False) == pytest.approx(9.07e9, rel=1e-3)
    model = gpt2_small()
    num_layers, h, s, v = model.num_layers, model.hidden_size, model.sequence_length, model.vocab_size
    formula = 72 * num_layers * h * h * (1 + s / (6 * h) + v / (12 * num_layers * h))
    assert train_flops_per_token(declare(model), causal=False) == pytest.approx(formula, rel=1e-12)
    half = 6 * num_layers * h * s
    assert train_flops_per_token(declare(model), causal=True) == pytest.approx(formula - half, rel=1e-12)


CASES = [
    small("gpt2"),
    small("gpt2", tie_embeddings=False, linear_bias=False, num_kv_heads=2),
    small("llama", num_kv_heads=2),
    small("llama", num_kv_heads=3, tie_embeddings=True, linear_bias=True),
]
CASE_NAMES = ("gpt2", "gpt2-untied-grouped", "llama-grouped", "llama-tied-biased")


def parameters(model: ModelConfig) -> list[ParameterDecl]:
    return [parameter for unit in declare(model) for parameter in unit.parameters]


def test_names_and_roles() -> None:
    names = {t.name for p in parameters(small("llama", num_layers=1)) for t in p.tensors}
    layer = {f"attention.{part}.weight" for part in "qkv"} | {"attention.output.weight", "attention_norm.weight"}
    layer |= {"mlp_norm.weight", "mlp.gate.weight", "mlp.up.weight", "mlp.down.weight"}
    outside = {"embedding.tokens.weight", "head.norm.weight", "head.output.weight"}
    assert names == outside | {f"layers.0.{name}" for name in layer}
    found = {p.name: p for p in parameters(small("gpt2"))}
    fused = found["layers.1.attention.qkv.bias"]
    assert [t.name for t in fused.tensors] == [f"layers.1.attention.{part}.bias" for part in "qkv"]
    whole = {"layers.1.mlp.down.bias", "layers.1.attention.output.bias", "embedding.positions.weight"}
    for name, parameter in found.items():
        one_dim = len(parameter.tensors[0].shape) == 1
        assert parameter.decay == (not one_dim), name
        inside = "norm" in name or name in {n.replace("layers.1", f"layers.{i}") for n in whole for i in (0, 1)}
        assert parameter.in_sequence_region == inside, name
        assert parameter.in_sequence_region == all(t.split is None for t in parameter.tensors), name


def test_residual_projections_start_smaller() -> None:
    """GPT-2 divides by sqrt(2 L) what is added to the residual stream."""
    for family in ("gpt2", "llama"):
        inits = {t.name: t.init for p in parameters(small(family, num_layers=8)) for t in p.tensors}
        for part in ("attention.output", "mlp.down"):
            assert inits[f"layers.3.{part}.weight"].std == pytest.approx(0.02 / 4)
        assert inits["layers.3.attention.k.weight"].std == inits["embedding.tokens.weight"].std == 0.02
        assert inits["layers.3.mlp_norm.weight"].kind == "ones"


def test_a_tied_tensor_has_one_flat_layout_on_both_ends() -> None:
    found = {p.name: p for p in parameters(small("gpt2"))}
    first, last = found["embedding.tokens.weight"], found["head.output.weight"]
    assert first.tensors == last.tensors and first.flat_unit == last.flat_unit
    assert [p.name for p in found.values() if p.flat_unit == first.flat_unit] == [first.name, last.name]
    assert (first.tie_copy, last.tie_copy) == (0, 1)
    assert last not in stage_parameters(declare(small("gpt2")))
    assert last in stage_parameters(declare(small("gpt2"))[1:])
    untied = {p.name: p for p in parameters(small("llama"))}
    assert untied["embedding.tokens.weight"].flat_unit == "embedding"
    assert untied["head.output.weight"].flat_unit == "head" and untied["head.output.weight"].tie_copy == 0


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("degree", [1, 2, 3, 6])
@pytest.mark.parametrize("model", CASES, ids=CASE_NAMES)
def test_splits_count_each_element_once(model: ModelConfig, degree: int, sequence_parallel: bool) -> None:
    """Over the tensor ranks the pieces with replica 0 tile each tensor; exchange areas have one layout on all ranks."""
    for declared in parameters(model):
        if declared.tie_copy:
            continue
        local = [local_parameter(declared, rank, degree, sequence_parallel) for rank in range(degree)]
        assert len({rank.exchange_numel for rank in local}) == 1
        for index, tensor in enumerate(declared.tensors):
            count = torch.zeros(tensor.shape, dtype=torch.int64)
            copies: dict[Any, list[int]] = {}
            for rank in local:
                for piece in rank.specs[index].pieces:
                    where = tuple(slice(a, b) for a, b in zip(piece.box.start, piece.box.stop, strict=True))
                    count[where] += piece.replica == 0
                    copies.setdefault(piece.box, []).append(piece.replica)
            assert (count == 1).all(), tensor.name
            assert all(sorted(numbers) == list(range(len(numbers))) for numbers in copies.values()), tensor.name
        for rank in local:
            ends = [piece.exchange_offset + piece.numel for piece in rank.summed]
            assert all(end <= rank.exchange_numel for end in ends)


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("model", CASES, ids=CASE_NAMES)
def test_modules_hold_what_is_declared(model: ModelConfig, degree: int) -> None:
    """Names, shapes, and order per unit, for every cut into two stages, on every tensor rank."""
    units = declare(model)
    for rank in range(degree):
        group = Group("tp", tuple(range(degree)), rank)
        settings = StageSettings(
            model, Placement(group, False, torch.float32, torch.device("meta")), seed=1, recompute="none"
        )
        for cut in range(len(units) + 1):
            for part in (units[:cut], units[cut:]):
                check_stage(settings, part, rank, degree)


def check_stage(settings: StageSettings, units: tuple[UnitDecl, ...], rank: int, degree: int) -> None:
    local = tuple(local_parameter(p, rank, degree) for p in stage_parameters(units))
    stage = StageModel(settings, units, local)
    built = [(name, tuple(parameter.shape)) for name, parameter in stage.named_parameters()]
    assert built == [(parameter.name, parameter.shape) for parameter in local]


def test_a_family_that_builds_something_else_is_caught() -> None:
    settings = StageSettings(
        small("llama"), Placement(Group("tp", (0,), 0), False, torch.float32, torch.device("meta")), 1, "none"
    )
    units = declare(small("llama", ffn_hidden_size=48))
    with pytest.raises(AssertionError, match="declared"):
        StageModel(settings, units, tuple(local_parameter(p, 0, 1) for p in stage_parameters(units)))


def broken(model: dict[str, Any], parallel: dict[str, Any]) -> list[str]:
    """Paths of the violations of a llama config with these changes."""
    sizes = {"num_layers": 2, "hidden_size": 24, "num_heads": 6, "sequence_length": 12, "ffn_hidden_size": 36}
    source = {
        "model": {"family": "llama", **sizes, **model},
        "data": {"corpus": "synthetic", "tokenizer": {"vocab_size": 61}},
        "parallel": {"data": 1, **parallel},
        "training": {"steps": 1},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
    }
    return [violation.path for violation in rules(resolve(load_config(source)).config)]


def test_rules() -> None:
    """What cannot be split is named; key/value heads and vocabularies split over any degree."""
    assert broken({}, {"tensor": 3, "sequence_parallel": True}) == []
    assert broken({"num_kv_heads": 2}, {"tensor": 3}) == []
    assert broken({"vocab_size": 5}, {"tensor": 6}) == []
    assert broken({"ffn_hidden_size": 40}, {"tensor": 6}) == ["model.ffn_hidden_size"]
    assert broken({"sequence_length": 13}, {"tensor": 2}) == []
    assert broken({"sequence_length": 13}, {"tensor": 2, "sequence_parallel": True}) == ["model.sequence_length"]
    everything = {"model.num_heads", "model.ffn_hidden_size", "model.sequence_length"}
    assert set(broken({}, {"tensor": 5, "sequence_parallel": True})) == everything


def test_declarations_need_no_torch() -> None:
    """`trilith check` answers at once."""
    code = "import sys, trilith.models.families; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ENGINE)}, timeout=60)
