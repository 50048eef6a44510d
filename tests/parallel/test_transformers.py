"""Hugging Face models, random weights from a config, trained at every ZeRO stage beside one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import trilith
from tests.harness import run_ranks

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `peers`)")
VOCABULARY, LENGTH, STEPS, MICROBATCHES = 64, 12, 3, 2


def model_of(kind: str, recomputes: bool) -> Any:
    """A tiny model in fp64; GPT-2 ties its output to its embedding."""
    torch.manual_seed(0)
    if kind == "gpt2":
        content = transformers.GPT2Config(
            **{"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 16, "n_layer": 3, "n_head": 2},
            **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False},
        )
        model = transformers.GPT2LMHeadModel(content)
    else:
        content = transformers.LlamaConfig(
            **{"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3},
            **{"num_attention_heads": 2, "num_key_value_heads": 1, "use_cache": False},
        )
        model = transformers.LlamaForCausalLM(content)
    if recomputes:
        model.gradient_checkpointing_enable()
    return model.double().train()


def losses(rank: int, world_size: int, kind: str, stage: int, recomputes: bool) -> list[float]:
    """The mean loss of every step, and at last a number that follows from all weights."""
    engine = trilith.initialize(
        model_of(kind, recomputes),
        {
            "train_micro_batch_size_per_gpu": 4 // world_size,
            "gradient_accumulation_steps": MICROBATCHES,
            "data_types": {"param_dtype": "fp64"},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            "zero_optimization": {
                "stage": stage,
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": 0,
            },
            "run": {"device": "cpu"},
        },
    )
    generator, found = torch.Generator().manual_seed(5), []
    for _ in range(STEPS):
        total = 0.0
        for _ in range(MICROBATCHES):
            tokens = torch.randint(0, VOCABULARY, (4, LENGTH), generator=generator)
            mine = tokens.view(world_size, -1, LENGTH)[rank]
            logits = engine(input_ids=mine).logits  # its own loss is taken in fp32
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), mine[:, 1:].flatten())
            engine.backward(loss)
            engine.step()
            total += loss.item()
        found.append(total / MICROBATCHES)
    with engine.gathered_parameters():
        found.append(float(sum(p.detach().square().sum() for p in engine.module.parameters())))
    return found


@pytest.mark.parametrize("recomputes", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_model_of_transformers_is_trained_as_by_one_process(kind: str, stage: int, recomputes: bool) -> None:
    (alone,) = run_ranks(1, losses, kind, 0, False)
    ranks = run_ranks(2, losses, kind, stage, recomputes)
    together = [sum(values) / 2 for values in zip(*ranks, strict=True)]
    assert together == pytest.approx(alone, rel=1e-10)
