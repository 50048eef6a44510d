"""Runs with block-sparse attention: every layout has the losses of one process, with random blocks of each head's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.cells import Cell, config, reference_config
from tests.harness import run_ranks
from tests.runs import reference, run, worst_relative
from trilith import preflight
from trilith.config.sparse_keys import BigBirdBlocks, FixedBlocks, SparseBlocks, VariableBlocks
from trilith.errors import CheckpointError
from trilith.measure import decide
from trilith.runner import generate
from trilith.trainer import Place, Trainer

LENGTH = 128
BIGBIRD = BigBirdBlocks(mode="bigbird", different_layout_per_head=True)
VARIABLE = VariableBlocks(
    mode="variable", block=32, num_random_blocks=1, different_layout_per_head=True, local_window_blocks=(1,)
)
PATTERNS = FixedBlocks(
    mode="fixed", num_local_blocks=3, different_layout_per_head=True, num_different_global_patterns=3
)

STEPS = 3


def long(content: dict[str, Any], sparse: SparseBlocks | None) -> dict[str, Any]:
    """A cell's config with sequences of eight blocks of 16."""
    content["model"]["sequence_length"] = LENGTH
    content["training"]["steps"] = STEPS
    return content | ({} if sparse is None else {"sparse_attention": sparse.model_dump(mode="json")})


@pytest.mark.parametrize(
    ("cell", "sparse"),
    [
        (Cell(tensor=2, microbatches=2, dropout=0.1), BIGBIRD),
        (Cell(tensor=2, recompute="selective", sequence_parallel=True, family="llama", grouped=True), VARIABLE),
        (Cell(tensor=3, recompute="full", family="llama", grouped=True), PATTERNS),
        (Cell(pipeline=2, microbatches=4, dropout=0.1, recompute="full"), BIGBIRD),
        (Cell(pipeline=2, microbatches=3, schedule="zb_v", virtual_stages=2, tied=True), VARIABLE),
        (Cell(data=2, pipeline=2, tensor=2, microbatches=2, zero=2, recompute="selective", dropout=0.1), BIGBIRD),
        (Cell(data=2, zero=3, family="llama"), PATTERNS),
    ],
    ids=lambda value: getattr(value, "mode", str(value)),
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_layout_has_the_losses_of_one_process(cell: Cell, sparse: SparseBlocks, device: str) -> None:
    expected = reference(long(reference_config(cell), sparse))
    assert worst_relative(run(long(config(cell), sparse), device=device), expected) < 1e-10
    assert worst_relative(expected, reference(long(reference_config(cell), None))) > 1e-6, "blocks are left out"


def content(cell: Cell, sparse: SparseBlocks | None = BIGBIRD, **changes: Any) -> dict[str, Any]:
    return long(config(cell, **changes), sparse)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_runs_of_kernels_and_reference_agree(family: str) -> None:
    source = content(Cell(family=family, dropout=0.1, grouped=True))
    native, plain = run(source), run(source | {"kernels": {"backend": "reference"}})
    assert worst_relative(native, plain) < 1e-10
    assert worst_relative(native, reference(content(Cell(family=family, dropout=0.1, grouped=True), None))) > 1e-6


def test_compiled_blocks_agree() -> None:
    source = content(Cell(microbatches=2, dropout=0.1))
    compiled = source | {"compile": {"enabled": True, "backend": "aot_eager"}}
    assert worst_relative(run(compiled), run(source)) < 1e-12


def trainer_of(source: Mapping[str, Any]) -> Trainer:
    return Trainer(preflight.plan(source), Place())


def test_evaluation_and_generation(tmp_path: Any) -> None:
    """They run on the same stages; a checkpoint has no layout in it, and continues only where the layout is the same."""
    source = content(Cell(), training__eval_batches=1)
    trainer, sparser = trainer_of(source), trainer_of(content(Cell(), FixedBlocks(mode="fixed")))
    try:
        trainer.train_step()
        assert trainer.evaluate().eval_loss > 0.0
        tokens = generate(trainer, [3, 4, 5], 4)
        assert len(tokens) == 7 and generate(trainer, [3, 4, 5], 4) == tokens
        directory = trainer.save(tmp_path)
        again = trainer_of(source)
        again.resume(directory)
        assert generate(again, [3, 4, 5], 4) == tokens
        assert again.train_step().loss == trainer.train_step().loss
        again.close()
        with pytest.raises(CheckpointError, match=r"sparse_attention = \{.*'bigbird'.* in the checkpoint"):
            sparser.resume(directory)
        with pytest.raises(CheckpointError, match=r"training\.seed = 11 in the checkpoint, 12 in this config"):
            trainer_of(content(Cell(), training__seed=12, data__seed=11)).resume(directory)
    finally:
        trainer.close()
        sparser.close()


def chosen_run(rank: int, world_size: int, source: dict[str, Any]) -> list[float]:
    place = Place(rank, world_size)
    trainer = Trainer(decide(preflight.plan(source), place, lambda text: None), place)
    losses = [trainer.train_step().loss for _ in range(STEPS)]
    trainer.close()
    return losses


def test_with_a_schedule_chosen_by_measured_costs() -> None:
    cell = Cell(pipeline=2, microbatches=4)
    source = content(cell)
    source["pipeline"] = {"schedule": "auto"}
    expected = [loss for loss, _ in reference(long(reference_config(cell), BIGBIRD))]
    for losses in run_ranks(2, chosen_run, source, timeout_s=60):
        assert losses == pytest.approx(expected, rel=1e-10)
