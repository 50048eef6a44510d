"""LAMB and Muon in one process against plain versions over whole tensors; what they keep; their config."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.whole_cases import (
    PARAM_GROUPS,
    Place,
    check,
    expected,
    fill,
    maker,
    model,
    partitions,
    plain_of,
    plain_orthogonal,
    tied_copy,
)
from trilith.config import load_config, resolve
from trilith.errors import ConfigError
from trilith.optim import base
from trilith.optim.adamw import AdamOptions
from trilith.optim.lamb import Lamb, LambOptions
from trilith.optim.make import _matrix_rule, make_optimizer, needs_whole_tensors
from trilith.optim.muon import Muon, MuonOptions, is_hidden_matrix, orthogonalised

LAMB = LambOptions((0.8, 0.95), 1e-6, 0.3)
ADAM = AdamOptions((0.8, 0.9), 1e-8, 0.2)
MUON = MuonOptions(weight_decay=0.2, lr_factor=2.0, adam_lr_factor=0.3, adam=ADAM, is_matrix=_matrix_rule(PARAM_GROUPS))
OPTIONS: dict[str, Any] = {
    "lamb": LAMB,
    "lamb uncorrected, narrow bounds": LambOptions((0.8, 0.95), 1e-6, 0.3, False, 1.2, 0.8),
    "lamb eps inside, plain without decay": LambOptions(
        (0.8, 0.95), 1e-2, 0.3, eps_inside_sqrt=True, always_adapts=False
    ),
    "lamb without decay": LambOptions(),
    "muon": MUON,
    "muon like adamw": MuonOptions(0.9, False, 0.1, 3, True, adam=ADAM, is_matrix=_matrix_rule(PARAM_GROUPS)),
}


@pytest.mark.parametrize("scale", [1.0, 3.7])
@pytest.mark.parametrize("data_degree", [1, 3, 20])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_owner_steps_as_the_plain_version(name: str, data_degree: int, scale: float) -> None:
    parameters, options = model(), OPTIONS[name]
    wanted = expected(parameters, plain_of(options), scale, torch.float64)
    count = 0
    for owner in range(data_degree):
        parts = partitions(parameters, Place(data=owner, data_degree=data_degree), torch.float64, torch.float64)
        worst, compared = check(maker(options), parts, wanted, scale)
        assert worst < 1e-12
        count += compared
    assert count == sum(tensor.numel for parameter in parameters for tensor in parameter.tensors)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("batch_numel", [1, 100])
def test_runs_of_any_size_give_the_same(name: str, batch_numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "BATCH_NUMEL", batch_numel)
    wanted = expected(model(), plain_of(OPTIONS[name]), 1.0, torch.float64)
    parts = partitions(model(), Place(), torch.float64, torch.float64)
    assert check(maker(OPTIONS[name]), parts, wanted)[0] < 1e-12


@pytest.mark.parametrize("name", ["lamb", "muon"])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_single_precision(name: str, grad_dtype: torch.dtype) -> None:
    wanted = expected(model(), plain_of(OPTIONS[name]), 2.0, grad_dtype)
    parts = partitions(model(), Place(), torch.float32, grad_dtype)
    assert check(maker(OPTIONS[name]), parts, wanted, 2.0)[0] < 2e-4


@pytest.mark.parametrize("name", ["lamb", "muon"])
def test_a_tied_copy_is_stepped_as_the_original(name: str) -> None:
    wanted = expected(model(), plain_of(OPTIONS[name]), 1.0, torch.float64)
    parts = partitions(tied_copy(model()), Place(), torch.float64, torch.float64)
    assert check(maker(OPTIONS[name]), parts, wanted)[0] < 1e-12


@pytest.mark.parametrize("name", ["lamb", "muon"])
def test_gradients_change_only_where_there_is_a_scale(name: str) -> None:
    parts = partitions(model(), Place(), torch.float64, torch.float64)
    fill(parts, [part.gradient for part in parts], 1)
    before = [part.gradient.clone() for part in parts]
    optimizer = maker(OPTIONS[name])(parts)
    optimizer.step(0.1)
    assert all(torch.equal(part.gradient, old) for part, old in zip(parts, before, strict=True))
    other = partitions(model(), Place(), torch.float64, torch.float64)
    optimizer.rebind(
        [
            base.FlatPartition(p.name, p.parameter, o.gradient, p.segments, p.tensors)
            for p, o in zip(parts, other, strict=True)
        ]
    )
    weights = [part.parameter.clone() for part in parts]
    optimizer.step(0.0)
    assert all(torch.equal(part.parameter, old) for part, old in zip(parts, weights, strict=True))


@pytest.mark.parametrize("name", ["lamb", "muon"])
def test_continuing_from_saved_state_gives_the_same_bits(name: str) -> None:
    def run(steps: range, values: list[Any] | None = None, scalars: Any = None) -> tuple[list[Any], list[Any], Any]:
        parts = partitions(model(), Place(), torch.float32, torch.float32)
        fill(parts, [part.parameter for part in parts], 0)
        optimizer = maker(OPTIONS[name])(parts)
        live = [part.parameter for part in parts] + [t for state in optimizer.state for t in state.values()]
        if values is not None:
            torch._foreach_copy_(live, values)
            optimizer.load_state_dict(scalars)
        for t in steps:
            fill(parts, [part.gradient for part in parts], t)
            optimizer.step(0.1)
        return [tensor.clone() for tensor in live], parts, optimizer.state_dict()

    straight, _, _ = run(range(1, 5))
    halfway, _, scalars = run(range(1, 3))
    resumed, _, _ = run(range(3, 5), halfway, scalars)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_muon_keeps_one_state_for_matrices_and_two_for_the_rest() -> None:
    parts = partitions(model(), Place(), torch.float32, torch.float32)
    optimizer = Muon(parts, MUON)
    tied, first, second = optimizer.state
    assert tied["momentum_buffer"].numel() == 0 and tied["exp_avg"].numel() == 7 * 10
    assert first["momentum_buffer"].numel() <= parts[1].parameter.numel()
    # Norms and biases lie first, so that the two states of AdamW end with them.
    assert first["exp_avg_sq"].numel() == first["exp_avg"].numel() < 100 < first["momentum_buffer"].numel()
    assert second["exp_avg"].numel() > 100  # layers.1.down is stepped by AdamW, and lies further on
    roles = ("momentum_buffer", "exp_avg", "exp_avg_sq", "master")
    assert [optimizer.keeps(role, "layers.0.q.weight") for role in roles] == [True, False, False, True]
    assert [optimizer.keeps(role, "layers.0.q.bias") for role in roles] == [False, True, True, True]
    assert all(Lamb(parts, LAMB).keeps(role, "layers.0.q.weight") for role in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("shape", [(8, 8), (5, 30), (30, 5), (1, 4)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = orthogonalised(matrix, 5, torch.float64)
    assert torch.allclose(found, plain_orthogonal(matrix, 5), rtol=0, atol=1e-12)
    if min(shape) < 8:
        assert all(0.6 < value < 1.3 for value in torch.linalg.svdvals(found).tolist())
    low = orthogonalised(matrix.float(), 5, torch.bfloat16)
    assert low.dtype == torch.float32 and torch.allclose(low.double(), found, atol=0.1)
    assert orthogonalised(torch.zeros(shape), 5, torch.float32).abs().max() == 0


def test_which_tensors_are_hidden_matrices() -> None:
    names = (
        "layers.0.attention.q.weight",
        "embedding.tokens.weight",
        "head.output.weight",
        "wte.embed.weight",
        "lm_head.weight",
    )
    assert [is_hidden_matrix(name, (4, 4)) for name in names] == [True, False, False, False, False]
    assert not is_hidden_matrix("layers.0.norm.weight", (4,)) and not is_hidden_matrix("layers.0.conv", (4, 4, 3))
    rule = _matrix_rule(PARAM_GROUPS)
    assert rule("layers.0.down.weight", (2, 2)) and not rule("layers.1.down.weight", (2, 2))


def test_a_tensor_that_is_cut_is_refused() -> None:
    (part, *_) = partitions(model(), Place(tensor=0, tensor_degree=2), torch.float32, torch.float32)
    with pytest.raises(AssertionError, match=r"embedding.tokens.weight: does not lie whole in one partition"):
        Lamb([part], LAMB)
    silent = base.FlatPartition("unit", part.parameter, part.gradient, part.segments)
    with pytest.raises(AssertionError, match=r"unit: does not say what tensors it holds"):
        Muon([silent], MUON)


def made(section: dict[str, Any]) -> Any:
    config = resolve(load_config({"train_batch_size": 1, "optimizer": section}), 1, needs="engine").config
    assert needs_whole_tensors(config.optimizer) is (section["type"].lower() in ("lamb", "muon"))
    parts = partitions(model(), Place(), torch.float32, torch.float32)
    optimizer: Any = make_optimizer(config.optimizer)(parts)
    assert optimizer.needs_whole_tensors is needs_whole_tensors(config.optimizer)
    return optimizer.options


def test_make_optimizer() -> None:
    made({"type": "AdamW", "params": {"lr": 1e-3}})
    assert made({"type": "lamb", "params": {"lr": 1e-3}}) == LambOptions()
    params = {
        "lr": 1e-3,
        "max_coeff": 5,
        "min_coeff": 0.1,
        "eps_inside_sqrt": True,
        "betas": "auto",
        "always_adapt": False,
    }
    assert made({"type": "Lamb", "params": params}) == LambOptions(
        max_coeff=5.0, min_coeff=0.1, eps_inside_sqrt=True, always_adapts=False
    )
    params = {
        "lr": 0.01,
        "muon_lr": 0.02,
        "adam_lr": 0.005,
        "weight_decay": 0.1,
        "ns_method": "gram",
        "ns_dtype": "bf16",
    }
    options = made({"type": "MUON", "params": params})
    assert (options.lr_factor, options.adam_lr_factor, options.low_precision) == (2.0, 0.5, True)
    assert options.adam == AdamOptions((0.9, 0.95), 1e-10, 0.1) and options.weight_decay == 0.1
    options = made(
        {
            "type": "Muon",
            "params": {"lr": "auto", "adjust_lr_fn": "match_rms_adamw", "momentum": 0.9},
            "param_groups": [{"pattern": "down", "muon": False}, {"pattern": "tokens", "muon": True}],
        }
    )
    assert (options.lr_factor, options.adam_lr_factor, options.matches_adamw, options.momentum) == (1, 1, True, 0.9)
    assert not options.is_matrix("a.down.weight", (2, 2)) and options.is_matrix("embedding.tokens.weight", (2, 2))
    assert not options.is_matrix("tokens.bias", (2,))


def test_what_makes_no_sense_is_refused() -> None:
    for section, path, rule in (
        ({"type": "Lamb", "params": {"lr": 1, "min_coeff": 11}}, "optimizer.params", "min_coeff at most max_coeff"),
        ({"type": "Muon", "params": {"lr": 0}}, "optimizer.params.lr", "greater than 0"),
        ({"type": "Muon", "params": {"lr": 1, "per_head_muon": True}}, "optimizer.params.per_head_muon", "whole"),
        ({"type": "AdamW", "params": {"lr": 1}, "param_groups": [{"pattern": "a", "muon": True}]}, "muon", ""),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config({"train_batch_size": 1, "optimizer": section})
        (violation,) = caught.value.violations
        assert path in violation.path and rule in str(violation)
