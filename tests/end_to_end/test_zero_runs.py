"""Whole runs at ZeRO stages 2 and 3: guessed steps, checkpoints over layouts and stages, evaluation, generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cells import Cell, config
from tests.end_to_end.test_resume import (
    Order,
    assert_bitwise_equal,
    canonical,
    cell,
    content_of,
    halves_equal_the_whole,
    run,
)
from tests.end_to_end.test_schedules import digests
from tests.harness import assert_close_named, run_ranks
from tests.runs import worst_relative
from trilith import preflight
from trilith.runner import generate
from trilith.stepping.postvalidated import PostvalidatedSteps
from trilith.trainer import Place, Trainer

# ---- steps taken before the norm is known ---------------------------------------------------------------------------


def in_one_span(rank: int, world_size: int, content: dict[str, Any]) -> tuple[list[Any], dict[str, str], int, int]:
    """(loss, norm and skip of every step, digests of all states, guesses, rollbacks) of a run without a break."""
    trainer = Trainer(preflight.plan(content), Place(rank, world_size))
    records = list(trainer.train(content["training"]["steps"]))
    steps, guesses, rollbacks = trainer.steps, 0, 0
    if isinstance(steps, PostvalidatedSteps):
        guesses, rollbacks = steps.validation.num_guesses, steps.validation.num_rollbacks
    states = digests(trainer.model.state_entries())
    trainer.close()
    return [(r.loss, r.grad_norm, r.skipped) for r in records], states, guesses, rollbacks


SLOW = pytest.mark.slow
GUESSED = (
    (Cell(2, 2, 1, "1f1b", 1, 4, 3, tied=True, dropout=0.1), "fp32"),
    (Cell(2, 2, 1, "zb_h2", 1, 4, 2, dropout=0.1), "fp16"),
    pytest.param(Cell(2, 2, 1, "1f1b", 1, 4, 2, tied=True, dropout=0.1), "fp32", marks=SLOW),
    pytest.param(Cell(2, 2, 1, "zb_v", 2, 4, 3, tied=True, dropout=0.1), "bf16", marks=SLOW),
    pytest.param(Cell(2, 2, 1, "zb_v", 2, 4, 3, dropout=0.1), "fp16", marks=SLOW),
)


@pytest.mark.parametrize(("chosen", "dtype"), GUESSED, ids=str)
def test_guessed_steps_have_the_bits_of_those_that_waited(chosen: Cell, dtype: str) -> None:
    found = {}
    for optimizer_sync in ("step", "postvalidate"):
        content = config(chosen, pipeline__optimizer_sync=optimizer_sync, training__steps=24)
        content["data_types"] = {"param_dtype": dtype}
        content["gradient_clipping"] = 1.6
        content["scheduler"] = {"type": "Constant", "params": {"warmup_num_steps": 20}}
        if dtype == "fp16":
            content["fp16"] = {"enabled": True, "initial_scale_power": 18, "loss_scale_window": 4, "hysteresis": 1}
        found[optimizer_sync] = run_ranks(4, in_one_span, content, timeout_s=120)
    guesses = rollbacks = 0
    for expected, guessed in zip(found["step"], found["postvalidate"], strict=True):
        assert repr(guessed[0]) == repr(expected[0]) and guessed[1] == expected[1]
        guesses, rollbacks = guesses + guessed[2], rollbacks + guessed[3]
    assert 0 < rollbacks < guesses, "some guesses are wrong and some are right"
    assert any(skipped for *_, skipped in found["step"][0][0]) is (dtype == "fp16")


# ---- checkpoints ----------------------------------------------------------------------------------------------------

SHARDED = cell(2, 2, 1, zero=3, tied=True)
READERS = (
    cell(1, 1, 1, zero=0, tied=True),
    cell(4, 1, 1, zero=1, tied=True),
    cell(2, 1, 2, zero=2, tied=True, sequence_parallel=True),
    cell(2, 2, 1, zero=3, tied=True, schedule="interleaved_1f1b", virtual_stages=2),
)


def deep(chosen: Cell, dtype: str = "fp64") -> dict[str, Any]:
    """A config with layers for four stages."""
    content = content_of(chosen, dtype)
    content["model"]["num_layers"] = 4
    return content


def test_stages_read_each_other_s_checkpoints(tmp_path: Path) -> None:
    """Written at stage 3 by a pipeline, read by other layouts at other stages, and what they write is read again."""
    saved = run(deep(SHARDED), Order(2, save=str(tmp_path / "first"), more=2))
    states = canonical(saved)
    for reader in READERS:
        found = run(deep(reader), Order(0, resume=saved[0].saved, save=str(tmp_path / str(reader)), more=2))
        loaded = canonical(found)
        assert set(loaded) == set(states)
        assert_close_named({name: (loaded[name], value) for name, value in states.items()}, rtol=0, atol=0)
        assert worst_relative(found[0].curve, saved[0].curve[2:]) <= 1e-10, reader
        again = run(deep(SHARDED), Order(0, resume=found[0].saved, more=2))
        assert again[0].figures == saved[0].figures[2:], reader


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb_v"])
def test_a_sharded_run_resumes_bit_for_bit(schedule: str, dtype: str, tmp_path: Path) -> None:
    """One live unit, tied embeddings, dropout, clipping, a learning rate that changes."""
    stages = 2 if schedule == "zb_v" else 1
    chosen = cell(2, 2, 1, zero=3, tied=True, schedule=schedule, virtual_stages=stages)
    straight = halves_equal_the_whole(deep(chosen, dtype), tmp_path)
    assert ("master" in {role for role, _, _ in straight[0].states}) is (dtype == "bf16")


def test_a_resume_without_a_cap_continues_a_run_with_one(tmp_path: Path) -> None:
    """How long weights stay whole is in no bit."""
    content = content_of(SHARDED, "fp32")
    saved = run(content, Order(2, save=str(tmp_path), more=2))
    content["zero_optimization"]["stage3_max_live_parameters"] = 10**9
    found = run(content, Order(0, resume=saved[0].saved, more=2))
    assert found[0].figures == saved[0].figures[2:]
    kept = run(content, Order(2, resume=saved[0].saved))
    content["zero_optimization"]["stage3_max_live_parameters"] = 0
    assert_bitwise_equal(run(content, Order(2, resume=saved[0].saved)), kept)


# ---- evaluation and generation --------------------------------------------------------------------------------------


def train_evaluate_generate(rank: int, world_size: int, content: dict[str, Any]) -> list[Any]:
    """Losses, held-out loss and a sample, in turns: none disturbs the others."""
    trainer = Trainer(preflight.plan(content), Place(rank, world_size))
    found: list[Any] = [trainer.evaluate().eval_loss]
    for _ in range(2):
        found += [(r.loss, r.grad_norm) for r in trainer.train(2)]
        found += [generate(trainer, [1, 2, 3], 4), trainer.evaluate().eval_loss, generate(trainer, [5], 3)]
    units = [unit for unit in trainer.model.units if unit.is_sharded]
    live = {unit.weight.untyped_storage().nbytes() for unit in units}
    assert not units or live == {0}, "weights stay whole after an evaluation"
    trainer.close()
    return found


SPOKEN = (
    Cell(2, 1, 1, zero=3, microbatches=2, tied=True),
    Cell(3, 1, 1, zero=3, microbatches=2, family="llama"),
    Cell(2, 2, 1, "1f1b", 1, 2, 3, tied=True),
    Cell(2, 2, 1, "zb_v", 2, 2, 3, family="llama"),
    Cell(2, 1, 2, zero=3, microbatches=2, sequence_parallel=True),
)


@pytest.mark.parametrize("chosen", SPOKEN, ids=str)
def test_a_sharded_model_evaluates_and_speaks_as_a_whole_one(chosen: Cell) -> None:
    found = {}
    for stage in (0, 3):
        content = config(chosen, model__num_layers=4)
        content["zero_optimization"]["stage"] = stage
        content["training"]["eval_batches"] = 2
        ranks = run_ranks(chosen.num_ranks, train_evaluate_generate, content)
        assert all(rank == ranks[0] for rank in ranks)
        found[stage] = ranks[0]
    for whole, sharded in zip(found[0], found[3], strict=True):
        assert sharded == (whole if isinstance(whole, list) else pytest.approx(whole, rel=1e-10))
