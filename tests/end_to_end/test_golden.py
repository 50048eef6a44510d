"""Golden losses: five fp64 steps of each family on one process must give the recorded numbers to 1e-9.

A refactor leaves tests/golden untouched. A change of numerics brings new files in the same commit and says why:

    python -m tests.end_to_end.test_golden
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import worst_relative
from trilith import preflight
from trilith.trainer import Place, Trainer

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FAMILIES = ("gpt2", "llama")
RTOL = 1e-9


def content_of(family: str) -> dict[str, Any]:
    """What the golden run of a family is: every part of the numerics that one process has takes part."""
    grouped = {"num_kv_heads": 2} if family == "llama" else {}
    return {
        "model": {
            "family": family,
            "num_layers": 3,
            "hidden_size": 24,
            "num_heads": 6,
            **grouped,
            "ffn_hidden_size": 40,
            "sequence_length": 16,
            "vocab_size": 61,
            "dropout": 0.1,
            "attention_dropout": 0.1,
        },
        "data": {"corpus": "synthetic", "loss_mask": "eod", "eod_token": 0},
        "data_types": {"param_dtype": "fp64"},
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"warmup_num_steps": 2, "total_num_steps": 5, "warmup_type": "linear"},
        },
        "training": {"steps": 5, "seed": 1234},
        "checkpoint": {"save_interval": None},
    }


def curve_of(content: dict[str, Any]) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    trainer = Trainer(preflight.plan(content), Place())
    records = [trainer.train_step() for _ in range(content["training"]["steps"])]
    trainer.close()
    return [(record.loss, record.grad_norm) for record in records]


def read(family: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / f"{family}.json").read_text())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_the_recorded_ones(family: str) -> None:
    golden = read(family)
    assert golden["config"] == content_of(family), "the recorded run is another one: record it again and say why"
    recorded = list(zip(golden["losses"], golden["grad_norms"], strict=True))
    assert len(recorded) == 5 and len(set(golden["losses"])) == 5
    assert worst_relative(curve_of(content_of(family)), recorded) <= RTOL


def test_dropout_and_mask_take_part() -> None:
    """The recorded numbers would notice if either were lost."""
    golden = read("gpt2")["losses"][0]
    for section, key, value in (
        ("model", "dropout", 0.0),
        ("model", "attention_dropout", 0.0),
        ("data", "loss_mask", "none"),
    ):
        content = content_of("gpt2")
        content[section][key] = value
        content["training"]["steps"] = 1
        assert abs(curve_of(content)[0][0] / golden - 1) > 1e-6, key


def record() -> None:
    """Write the golden files from this checkout."""
    GOLDEN.mkdir(exist_ok=True)
    for family in FAMILIES:
        losses, norms = zip(*curve_of(content_of(family)), strict=True)
        golden = {"config": content_of(family), "torch": torch.__version__, "losses": losses, "grad_norms": norms}
        (GOLDEN / f"{family}.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    record()
