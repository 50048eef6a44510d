"""Bars of the schedules: equal to one process in fp64, and the same bits in every schedule of one partition."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from tests.cells import Cell, config, reference_config
from tests.harness import run_ranks
from tests.runs import reference, run, worst_relative
from tests.schedule_cells import covering_cells, every_cell
from trilith import preflight
from trilith.runner import generate
from trilith.trainer import Place, Trainer

RTOL = 1e-10
STEPS = 4


def reproduces_one_process(cell: Cell) -> None:
    curve = run(config(cell, training__steps=STEPS))
    expected = reference(short(reference_config(cell)))
    assert len(curve) == STEPS and worst_relative(curve, expected) <= RTOL


@pytest.mark.parametrize("cell", covering_cells(), ids=str)
def test_a_schedule_reproduces_one_process(cell: Cell) -> None:
    reproduces_one_process(cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", every_cell(), ids=str)
def test_every_schedule_at_every_size_reproduces_one_process(cell: Cell) -> None:
    reproduces_one_process(cell)


def short(content: dict[str, Any]) -> dict[str, Any]:
    content["training"]["steps"] = STEPS
    return content


def train_and_hash(
    rank: int, world_size: int, content: dict[str, Any]
) -> tuple[list[Any], dict[str, str], dict[str, str]]:
    """(losses and norms of every step, digests of the last step's gradients, of the final weights) by canonical box."""
    trainer = Trainer(preflight.plan(content), Place(rank, world_size))
    try:
        records = [trainer.train_step() for _ in range(content["training"]["steps"] - 1)]
        accumulated = trainer.accumulate()
        trainer.model.finish()
        gradients = digests(trainer.model.gradient_entries())
        records.append(trainer.update(accumulated))
        return [(r.loss, r.grad_norm) for r in records], gradients, digests(trainer.model.owned_entries())
    finally:
        trainer.close()


def digests(entries: Any) -> dict[str, str]:
    found = {}
    for role, spec, tensor in entries:
        for piece in spec.pieces:
            value = tensor.as_strided(piece.box.shape, piece.strides, piece.offset).contiguous()
            key = f"{role} {spec.name} {piece.box.start}"
            found[key] = hashlib.sha256(value.numpy().tobytes()).hexdigest()
    return found


FAMILIES = {
    "one stage a rank": ("gpipe", "1f1b", "zb_h1", "zb_h2"),
    "two stages a rank": ("interleaved_1f1b", "zb_v", "v_half", "v_min", "dualpipe_v"),
}


SIZES = ((1, 4, 1, "full", "fp32"), (2, 2, 2, "selective", "bf16"))


@pytest.mark.parametrize(
    ("names", "data", "pipeline", "tensor", "recompute", "dtype"),
    [
        pytest.param(
            names, *size, id=f"{family} {size}", marks=[pytest.mark.slow] * (size == SIZES[1] and "zb_v" in names)
        )
        for family, names in FAMILIES.items()
        for size in SIZES
    ],
)
def test_bits_are_equal_across_schedules(
    names: tuple[str, ...], data: int, pipeline: int, tensor: int, recompute: str, dtype: str
) -> None:
    """Loss, gradients and weights of every synchronous schedule of one partition: the same bits, dropout on."""
    results = {}
    stages = 2 if "zb_v" in names else 1
    for name in names:
        cell = Cell(data, pipeline, tensor, name, stages, 2 * pipeline + 1, 1, True, tensor > 1, recompute, 0.1, "gpt2")
        content = config(cell, training__steps=3)
        content["data_types"] = {"param_dtype": dtype}
        ranks = run_ranks(preflight.plan(content).world_size, train_and_hash, content)
        curve = ranks[0][0]
        gradients = {key: value for rank in ranks for key, value in rank[1].items()}
        weights = {key: value for rank in ranks for key, value in rank[2].items()}
        results[name] = (curve, gradients, weights)
    first = results[names[0]]
    assert first[0][0][0] > 0 and len(first[2]) > 10
    for name, (curve, gradients, weights) in results.items():
        assert curve == first[0], name
        assert gradients.keys() == first[1].keys() and weights.keys() == first[2].keys()
        assert [key for key in gradients if gradients[key] != first[1][key]] == [], name
        assert [key for key in weights if weights[key] != first[2][key]] == [], name


def train_and_generate(rank: int, world_size: int, content: dict[str, Any]) -> tuple[list[int], float]:
    trainer = Trainer(preflight.plan(content), Place(rank, world_size))
    try:
        for _ in trainer.train(3):
            pass
        return generate(trainer, [1, 2, 3], 5), trainer.evaluate().eval_loss
    finally:
        trainer.close()


def test_evaluation_and_generation_go_where_the_last_stage_lies() -> None:
    """In a V the last stage is on the first rank; asynchronous weights are the newest ones."""
    found = {}
    for name, stages in (("interleaved_1f1b", 2), ("zb_v", 2), ("dualpipe_v", 2), ("pipedream_2bw", 1)):
        content = config(Cell(1, 2, 1, name, stages, 4, family="llama"), training__steps=3)
        content["model"]["num_layers"] = 4
        content["training"]["eval_batches"] = 1
        ranks = run_ranks(2, train_and_generate, content)
        assert ranks[0] == ranks[1] and len(ranks[0][0]) == 8
        found[name] = ranks[0]
    assert found["interleaved_1f1b"] == found["zb_v"] == found["dualpipe_v"]
