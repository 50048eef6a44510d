"""Weight gradients that are written into the flat buffer as products, not added to zeros: same bits, and none is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trilith import preflight
from trilith.kernels.weight_queue import Deferred
from trilith.pipeline.stage import PipelineStage
from trilith.trainer import Place, Trainer
from trilith.zero.flat import FlatUnit

CONFIG: dict[str, Any] = {
    "model": {
        "family": "gpt2", "num_layers": 2, "hidden_size": 32, "num_heads": 4, "sequence_length": 16, "vocab_size": 64,
    },
    "data": {"corpus": "synthetic"},
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "training": {"steps": 10, "seed": 3},
}  # fmt: skip


def make(**changes: Any) -> Trainer:
    return Trainer(preflight.plan(CONFIG | changes), Place())


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        place.parameter.name: view.clone()
        for unit in trainer.model.units
        for place, view in zip(unit.layout.placed, unit.gradient_views, strict=True)
    }


def block(trainer: Trainer) -> FlatUnit:
    return next(unit for unit in trainer.model.units if unit.layout.name == "layers.0")


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_same_bits_as_through_autograd(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"activation_checkpointing": {"recompute": recompute}}
    direct = make(**changes)
    with monkeypatch.context() as patch:
        never = property(lambda self: False, lambda self, value: None)
        patch.setattr(PipelineStage, "queue_is_direct", never)
        plain = make(**changes)
        theirs = [(plain.train_step().loss, gradients(plain)) for _ in range(3)]
    for loss, expected in theirs:
        assert direct.train_step().loss == loss
        found = gradients(direct)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any(unit.written for unit in plain.model.units)
    names = [place.parameter.name for place in block(direct).layout.placed]
    assert {names[i] for i in block(direct).written} == {
        f"layers.0.{name}.weight" for name in ("attention.qkv", "attention.output", "mlp.up", "mlp.down")
    }


def test_what_got_no_product_is_zero() -> None:
    trainer = make()
    trainer.train_step()
    assert block(trainer).gradient.any() and block(trainer).written
    trainer.model.zero_grad()
    trainer.model.finish()
    assert not block(trainer).gradient.any()


def test_a_gradient_of_autograd_before_a_product_is_kept() -> None:
    trainer = make()
    trainer.train_step()
    unit = block(trainer)
    index = min(unit.written)
    parameter = unit.parameters[index]
    trainer.model.zero_grad()
    (parameter * 3).sum().backward()
    x, dy = torch.ones(2, parameter.shape[1]), torch.ones(2, parameter.shape[0])
    unit.add_product(index, Deferred(parameter, x, dy, (x._version, dy._version)))
    trainer.model.finish()
    assert torch.equal(unit.gradient_views[index], torch.full_like(parameter, 5.0))
