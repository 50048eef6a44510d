"""Models with block-sparse attention: the layout reaches every layer, whole layouts change nothing, recompute no bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import assert_close_named
from tests.model_cases import SEED, gradients, make_stage, microbatch, small, tensor_topology, whole_gradients
from trilith import measure
from trilith.config.model_keys import ModelConfig
from trilith.config.sparse_keys import BigBirdBlocks, DenseBlocks, FixedBlocks
from trilith.layers.sparsity import live_blocks
from trilith.models.families import declare
from trilith.models.stage import StageModel, StageOptions, build_stage

LENGTH, BLOCK = 128, 16
BIGBIRD = BigBirdBlocks(mode="bigbird", different_layout_per_head=True)
ALL_OF_ONE_WINDOW = FixedBlocks(mode="fixed", num_local_blocks=LENGTH // BLOCK)
EVERYTHING = (None, DenseBlocks(mode="dense"), ALL_OF_ONE_WINDOW)


def outcome(stage: StageModel, model: ModelConfig) -> tuple[float, dict[str, Tensor]]:
    loss = stage({}, microbatch(model, 2))["loss"]
    loss.backward()
    return loss.item(), whole_gradients([gradients(stage)])


def model_of(family: str) -> ModelConfig:
    return small(family, sequence_length=LENGTH)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_layout_of_all_blocks_changes_nothing(family: str) -> None:
    model = model_of(family)
    found = [outcome(make_stage(model, tensor_topology(), sparse=sparse), model) for sparse in EVERYTHING]
    for loss, whole in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-13)
        assert_close_named({name: (whole[name], found[0][1][name]) for name in whole}, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_no_bit(recompute: str) -> None:
    model = model_of("gpt2")
    loss, expected = outcome(make_stage(model, tensor_topology(), sparse=BIGBIRD), model)
    again, found = outcome(make_stage(model, tensor_topology(), sparse=BIGBIRD, recompute=recompute), model)
    assert again == loss and all(torch.equal(found[name], expected[name]) for name in expected)


def reach(stage: StageModel, model: ModelConfig, query: int) -> set[int]:
    """The tokens that the logits of one position depend on."""
    embedded: list[Tensor] = []
    embedding = stage.embedding
    assert embedding is not None
    forward = embedding.forward

    def watched(*arguments: Any) -> Tensor:
        embedded.append(forward(*arguments).detach().requires_grad_())
        return embedded[0]

    embedding.forward = watched  # type: ignore[method-assign]
    batch = microbatch(model, 1)
    batch = type(batch)(**{**vars(batch), "labels": None})
    stage({}, batch)["logits"][0, query].square().sum().backward()
    assert embedded[0].grad is not None
    return {int(token) for token in embedded[0].grad[0].abs().sum(-1).nonzero()}


def test_a_token_depends_on_the_tokens_of_live_blocks_only() -> None:
    """Of a model of one layer: those of the blocks that any head keeps, up to the token itself."""
    model = small("gpt2", sequence_length=LENGTH, num_layers=1)
    stage = make_stage(model, tensor_topology(), sparse=BIGBIRD).eval()
    rows = [live_blocks(BIGBIRD, head, LENGTH // BLOCK, SEED) for head in range(model.num_heads)]
    for query in (20, 77, 127):
        live = {column for row in rows for column, is_live in enumerate(row[query // BLOCK]) if is_live}
        expected = {token for token in range(query + 1) if token // BLOCK in live}
        assert reach(stage, model, query) == expected


def test_the_layout_is_a_buffer_of_stages_with_layers_and_not_saved() -> None:
    model = model_of("gpt2")
    stage = make_stage(model, tensor_topology(), sparse=BIGBIRD)
    assert dict(stage.named_buffers()).keys() == {"live_blocks"} and "live_blocks" not in stage.state_dict()
    assert stage.to("meta").live_blocks.device.type == "meta"  # type: ignore[union-attr]
    for units, sparse in ((declare(model)[:1], BIGBIRD), (declare(model), DenseBlocks(mode="dense"))):
        assert not list(make_stage(model, tensor_topology(), units=units, sparse=sparse).named_buffers())


def test_a_measured_stage_keeps_its_layout() -> None:
    """`measure` gives a stage new storage before it runs it, and the layout, which is no parameter, its values again."""
    model = model_of("gpt2")
    stage = build_stage(
        model, declare(model), tensor_topology(), StageOptions("none", SEED, False, torch.float32, sparse=BIGBIRD)
    )
    assert stage.live_blocks is not None
    expected = stage.live_blocks.clone()
    measure._materialise(stage, torch.device("cpu"), SEED)
    assert torch.equal(stage.live_blocks, expected)
