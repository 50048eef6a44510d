"""Save, start new processes, resume: the same bits as a run that never stopped; and any layout reads any other's state."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cells import Cell, config
from tests.harness import assert_close_named, run_ranks
from tests.runs import worst_relative
from trilith import preflight
from trilith.checkpoint import read_manifest
from trilith.errors import CheckpointError
from trilith.sharding import ShardSpec
from trilith.trainer import Place, Trainer

TOTAL_BATCH = 4


@dataclass(frozen=True)
class Order:
    """What a rank does: resume from a checkpoint (""), take `steps` steps, save under a root (""), take `more` steps."""

    steps: int
    resume: str = ""
    save: str = ""
    more: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of it: figures of all steps as text (NaN equals NaN), the checkpoint; before `more`: local weights,
    and (role, spec, tensor) of all states."""

    figures: list[str]
    curve: list[tuple[float, float]]
    weights: dict[str, Tensor]
    states: list[tuple[str, ShardSpec, Tensor]]
    saved: str


def train(rank: int, world_size: int, content: dict[str, Any], order: Order) -> Outcome:
    """One rank of a run."""
    trainer = Trainer(preflight.plan(content), Place(rank, world_size))
    if order.resume:
        trainer.resume(Path(order.resume))
    records = [trainer.train_step() for _ in range(order.steps)]
    saved = str(trainer.save(Path(order.save))) if order.save else ""
    weights = {
        f"stage {index} {name}": parameter.detach().clone()
        for index, stage in trainer.stages.items()
        for name, parameter in stage.named_parameters()
    }
    states = [(role, spec, tensor.clone()) for role, spec, tensor in trainer.model.state_entries()]
    records += [trainer.train_step() for _ in range(order.more)]
    assert trainer.state.consumed_samples == trainer.state.step * trainer.config.train_batch_size
    trainer.close()
    return Outcome(
        [f"{r.step} {r.loss!r} {r.grad_norm!r} {r.lr!r} {r.tokens} {r.loss_scale} {r.skipped}" for r in records],
        [(r.loss, r.grad_norm) for r in records],
        weights,
        states,
        saved,
    )


def run(content: dict[str, Any], order: Order) -> list[Outcome]:
    """The outcome of every rank; they must agree on the figures of every step."""
    outcomes = run_ranks(preflight.plan(content).world_size, train, content, order, timeout_s=120)
    assert all(outcome.figures == outcomes[0].figures for outcome in outcomes)
    return outcomes


def cell(data: int, pipeline: int, tensor: int, **changes: Any) -> Cell:
    """A cell with four samples a step, whose model is the same in every layout."""
    values = {"dropout": 0.1, "odd": True, "zero": 1, "microbatches": TOTAL_BATCH // data, **changes}
    return Cell(data, pipeline, tensor, **values)


def content_of(chosen: Cell, dtype: str = "fp64") -> dict[str, Any]:
    content = config(chosen, model__num_layers=3, data_types__param_dtype=dtype, training__steps=6)
    content["scheduler"] = {
        "type": "WarmupCosineLR",
        "params": {"warmup_num_steps": 2, "total_num_steps": 6, "warmup_type": "linear"},
    }
    return content


def assert_bitwise_equal(found: Sequence[Outcome], expected: Sequence[Outcome]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert_close_named({n: (w, theirs.weights[n]) for n, w in mine.weights.items()}, rtol=0, atol=0)
        for (role, spec, tensor), (other_role, other_spec, other) in zip(mine.states, theirs.states, strict=True):
            assert (role, spec) == (other_role, other_spec)
            assert torch.equal(tensor, other), f"{role} of {spec.name}"


def halves_equal_the_whole(content: dict[str, Any], root: Path) -> list[Outcome]:
    """Six steps at once, and three, a checkpoint, new processes, three more: bitwise the same. Returns the former."""
    straight = run(content, Order(6))
    first = run(content, Order(3, save=str(root)))
    second = run(content, Order(3, resume=first[0].saved))
    assert first[0].figures + second[0].figures == straight[0].figures
    assert_bitwise_equal(second, straight)
    return straight


def test_resume_continues_bit_for_bit(tmp_path: Path) -> None:
    """Data 2 x pipeline 2, ZeRO-1, tied embeddings, dropout, clipping, a learning rate that changes: fp32 AdamW."""
    straight = halves_equal_the_whole(content_of(cell(2, 2, 1, tied=True), "fp32"), tmp_path)
    losses = [loss for loss, _ in straight[0].curve]
    assert len(set(losses)) == 6 and losses[-1] < losses[0]
    assert len({figures.split()[3] for figures in straight[0].figures}) > 3, "the learning rate changes"
    assert {role for role, _, _ in straight[0].states} == {"weight", "exp_avg", "exp_avg_sq"}


def test_resume_in_bf16_keeps_the_masters(tmp_path: Path) -> None:
    """Master weights are saved exactly: the rounded ones alone would continue elsewhere."""
    straight = halves_equal_the_whole(content_of(cell(2, 1, 1, family="llama"), "bf16"), tmp_path)
    assert {role for role, _, _ in straight[0].states} == {"master", "exp_avg", "exp_avg_sq"}


def test_resume_keeps_the_loss_scale(tmp_path: Path) -> None:
    """fp16 over two tensor ranks: overflows skip steps, the scale falls and rises again, across the resume too."""
    content = content_of(cell(1, 1, 2))
    del content["data_types"]
    content["fp16"] = {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 2, "hysteresis": 1}
    straight = halves_equal_the_whole(content, tmp_path)
    scales = [float(figures.split()[5]) for figures in straight[0].figures]
    skipped = [figures.endswith("True") for figures in straight[0].figures]
    assert skipped[0] and not all(skipped[:3]), "before the checkpoint some steps are skipped, some are not"
    rises = any(before < after for before, after in itertools.pairwise(scales[2:]))
    assert min(scales) < scales[0] and rises, "the scale rises after a window that the resume cuts"


# ---- other layouts ------------------------------------------------------------------------------------------------


def canonical(outcomes: Sequence[Outcome]) -> dict[str, Tensor]:
    """Whole tensors by role and name; every element counted once, and every other copy of it equal."""
    whole: dict[str, Tensor] = {}
    copies = []
    for outcome in outcomes:
        for role, spec, tensor in outcome.states:
            target = whole.setdefault(f"{role} of {spec.name}", torch.full(spec.shape, torch.nan, dtype=tensor.dtype))
            for piece in spec.pieces:
                part = tensor.as_strided(piece.box.shape, piece.strides, piece.offset)
                box = tuple(slice(lo, hi) for lo, hi in zip(piece.box.start, piece.box.stop, strict=True))
                if piece.replica == 0:
                    assert bool(target[box].isnan().all()), spec.name
                    target[box] = part
                else:
                    copies.append((target, box, part))
    assert not any(bool(tensor.isnan().any()) for tensor in whole.values())
    assert all(torch.equal(target[box], part) for target, box, part in copies)
    return whole


LAYOUTS = (
    (cell(2, 2, 1), cell(1, 1, 2)),
    (cell(2, 2, 1, tied=True), cell(1, 1, 2, tied=True, sequence_parallel=True)),
    (cell(1, 1, 3, family="llama", grouped=True), cell(2, 1, 2, family="llama", grouped=True)),
    (cell(4, 1, 1, family="llama"), cell(1, 2, 1, family="llama", zero=0, schedule="interleaved_1f1b")),
)


@pytest.mark.parametrize(("source", "target"), LAYOUTS, ids=lambda c: f"d{c.data}p{c.pipeline}t{c.tensor}")
def test_any_layout_continues_from_any_other(source: Cell, target: Cell, tmp_path: Path) -> None:
    """Weights and moments come back bit for bit, and training goes on as it would have, to rounding in fp64."""
    saved = run(content_of(source), Order(2, save=str(tmp_path), more=2))
    found = run(content_of(target), Order(0, resume=saved[0].saved, more=2))
    states, loaded = canonical(saved), canonical(found)
    assert set(loaded) == set(states)
    assert {name.split()[0] for name in states} == {"weight", "exp_avg", "exp_avg_sq"}
    assert_close_named({name: (loaded[name], tensor) for name, tensor in states.items()}, rtol=0, atol=0)
    assert worst_relative(found[0].curve, saved[0].curve[2:]) <= 1e-10


def test_a_checkpoint_holds_each_element_once(tmp_path: Path) -> None:
    """ZeRO's partitions, tensor-parallel shards and tied copies are saved by one rank each: no more bytes than states."""
    content = content_of(cell(2, 1, 2, tied=True))
    outcomes = run(content, Order(1, save=str(tmp_path)))
    states = sum(tensor.numel() * tensor.element_size() for tensor in canonical(outcomes).values())
    files = read_manifest(Path(outcomes[0].saved)).files
    headers = 0
    for file in files:
        with (Path(outcomes[0].saved) / file.name).open("rb") as shard:
            headers += 8 + int.from_bytes(shard.read(8), "little")
    assert sum(file.num_bytes for file in files) == states + headers


# ---- what a run cannot continue -----------------------------------------------------------------------------------


def altered(**changes: Any) -> dict[str, Any]:
    content = content_of(cell(1, 1, 1))
    for path, value in changes.items():
        *parents, name = path.split("__")
        node = content
        for parent in parents:
            node = node[parent]
        node[name] = value
    return content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__seed": 99}, "was trained on other data"),
        ({"data__loss_mask": "eod"}, "was trained on other data"),
        ({"gradient_accumulation_steps": 2}, r"8 samples in 2 steps: train_batch_size = 2 differs"),
        ({"model__num_layers": 4}, r"model\.num_layers = 3 in the checkpoint, 4 in this config"),
        ({"model__vocab_size": 67}, r"model\.vocab_size = 61 in the checkpoint, 67 in this config"),
        ({"data_types__param_dtype": "fp32"}, r"is torch\.float64, this run keeps torch\.float32"),
        ({"data_types__param_dtype": "bf16"}, r"holds no master of"),
        ({"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}, r"holds no momentum\w* of"),
    ],
    ids=str,
)
def test_another_run_s_checkpoint_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved = train(0, 1, altered(), Order(2, save=str(tmp_path))).saved
    with pytest.raises(CheckpointError, match=message):
        train(0, 1, altered(**changes), Order(1, resume=saved))
