"""`trilith parity` finds nothing between layouts that agree, and names tensor, step and rank of injected faults."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cells import Cell, config
from tests.harness import SEARCH_PATH, run_ranks
from trilith import parity, preflight
from trilith.parity.result import Difference
from trilith.trainer import Place, Trainer

STEPS = 2
Fault = Callable[[Trainer], None]


def recorded(rank: int, world_size: int, args: Mapping[str, Any], fault: Fault | None) -> None:
    """One rank of a recorded run; every rank arms `fault`, which chooses its ranks itself."""
    trainer = Trainer(preflight.plan(args["config"]), Place(rank, world_size))
    if fault is not None:
        fault(trainer)
    leader = args["leader"] and Path(args["leader"])
    parity.record(trainer, Path(args["directory"]), args["steps"], leader)
    trainer.close()


def compared(a: Path, b: parity.Side, fault: Fault | None = None, steps: int = STEPS) -> parity.Result:
    """The comparison of A, on several ranks and with `fault`, and B, without."""

    def launch(target: str, args: Mapping[str, Any], num_ranks: int, **options: Any) -> int:
        assert target == "trilith.parity:record_rank"
        armed = fault if Path(args["directory"]).name == "A" else None
        run_ranks(num_ranks, recorded, args, armed)
        return 0

    return parity.compare(parity.Side(a), b, steps=steps, launch=launch)


def written(folder: Path, cell: Cell) -> Path:
    path = folder / "a.json"
    path.write_text(json.dumps(config(cell)))
    return path


@pytest.mark.parametrize(
    "cell",
    [
        Cell(2, 2, 2, "interleaved_1f1b", 2, 3, 1, True, True, "full", 0.1, "gpt2", False, True),
        Cell(2, 1, 3, "gpipe", 1, 2, 0, False, False, "selective", 0.1, "llama", True, True),
        Cell(2, 2, 1, "zb_v", 2, 3, 3, True, False, "none", 0.1, "gpt2", False, True),
    ],
    ids=str,
)
def test_layouts_that_agree_are_equal(cell: Cell, tmp_path: Path) -> None:
    """Every tensor of both steps is compared, with padded vocabulary, ties, shared heads and other microbatch sizes."""
    a = written(tmp_path, cell)
    samples = cell.data * cell.microbatches
    b = parity.other_side(a, None, (), ("train_micro_batch_size_per_gpu=2",))
    result = compared(a, b)
    assert result.equal, result.describe()
    plan = preflight.plan(config(cell))
    tensors = {t.name for unit in plan.units for p in unit.parameters for t in p.tensors}
    kinds = {"activation": len(plan.units) * samples, "loss": 1, "gradient": len(tensors), "gradient norm": 1}
    expected = [(0, "weight", len(tensors))]
    for step in (1, 2):
        expected += [(step, kind, count) for kind, count in {**kinds, "weight": len(tensors)}.items()]
    assert [(p.step, p.kind, p.num_tensors) for p in result.phases] == expected
    assert all(p.worst < 1e-10 and p.worst_replica < 1e-10 for p in result.phases)
    assert "equal: " in result.describe()
    assert json.loads(json.dumps(result.to_json()))["equal"] is True


# ---- faults: each arms itself on the ranks it is for --------------------------------------------------------------


def place(trainer: Trainer) -> tuple[int, int, int]:
    """(data, pipeline, tensor) coordinates."""
    topology = trainer.topology
    return topology.dp.index, topology.coordinate("pp"), topology.tp.index


def weight(trainer: Trainer, name: str) -> Tensor:
    """The local parameter `name` on whatever stage holds it, flattened."""
    found = [dict(stage.named_parameters()) for stage in trainer.stages.values()]
    return next(named[name].detach().view(-1) for named in found if name in named)


def wrong_initial_weight(trainer: Trainer) -> None:
    """All data ranks of tensor rank 1 start with another value of one element."""
    if place(trainer)[2] == 1:
        weight(trainer, "layers.1.mlp.up.weight")[5] += 1e-3


def tied_copy_starts_elsewhere(trainer: Trainer) -> None:
    """The head's copy of the token embedding, on the last stage, starts with another value of one element."""
    if place(trainer)[1:] == (1, 0):
        weight(trainer, "head.output.weight")[0] += 1e-3


def wrong_block_output(trainer: Trainer) -> None:
    """Block 1 on one rank returns what it should, but for a factor."""
    if place(trainer) == (1, 0, 1):
        block = trainer.stages[0].layers["1"]
        forward = block.forward
        block.forward = lambda *arguments: forward(*arguments) * 1.001  # type: ignore[method-assign]


def wrong_gradient(trainer: Trainer) -> None:
    """In the second step, one rank's gradient of one weight is scaled before it is reduced."""
    if place(trainer) == (0, 0, 1):
        steps, queue = {"backwards": 0}, trainer.stages[0].queue
        target = dict(trainer.stages[0].named_parameters())["layers.0.mlp.up.weight"]
        assert queue is not None
        put = queue.put

        def scaled(weight: Tensor, x: Tensor, y_gradient: Tensor) -> None:
            steps["backwards"] += weight is target
            is_wrong = weight is target and steps["backwards"] > trainer.config.gradient_accumulation_steps
            put(weight, x, y_gradient * (1.001 if is_wrong else 1.0))

        queue.put = scaled  # type: ignore[method-assign]


def wrong_update(trainer: Trainer) -> None:
    """The second optimizer step of one rank leaves one element elsewhere; ZeRO gathers it to all data ranks."""
    if place(trainer)[0] == 0 and place(trainer)[2] == 1 and 1 in trainer.stages:
        optimizer = trainer.model.optimizer
        step_parts = optimizer.step_parts

        def and_more(parts: tuple[int, ...], *arguments: Any) -> None:
            step_parts(parts, *arguments)
            unit = next(u for u in trainer.model.units if u.layout.name == "layers.1")
            if optimizer.num_steps == 1 and trainer.model.units.index(unit) in parts:
                at = next(p.offset for p in unit.layout.placed if p.parameter.name == "layers.1.mlp.down.weight")
                unit.master[at - unit.start] += 1e-5

        optimizer.step_parts = and_more  # type: ignore[assignment, method-assign]


def drifting_norm(trainer: Trainer) -> None:
    """After the first step one rank's copy of a norm's weight is not the others'."""
    if place(trainer) == (1, 0, 0):
        step = trainer.model.step

        def and_more(lr: float) -> Any:
            outcome = step(lr)
            if trainer.model.optimizer_steps == 1:
                weight(trainer, "layers.0.mlp_norm.weight")[7] += 1e-6
            return outcome

        trainer.model.step = and_more  # type: ignore[method-assign]


def diverging_hidden(trainer: Trainer) -> None:
    """One of two tensor ranks that hold the same hidden activations has another value in one of them."""
    if place(trainer) == (0, 0, 1):
        block = trainer.stages[0].layers["0"]
        forward = block.forward

        def touched(*arguments: Any) -> Tensor:
            hidden: Tensor = forward(*arguments)
            return hidden + torch.zeros_like(hidden).index_fill_(1, torch.tensor([4]), 1e-5)

        block.forward = touched  # type: ignore[method-assign]


WIDE = Cell(2, 1, 2, microbatches=2, zero=1, sequence_parallel=True, dropout=0.1)
DEEP = Cell(1, 2, 2, microbatches=2, zero=1, tied=True, dropout=0.1)
HALF_FFN, HALF_SEQUENCE = 24, 6


@dataclass(frozen=True)
class Case:
    """A fault in the run of `cell`, what must be reported of it, and `element`: whether the right element is."""

    cell: Cell
    fault: Fault
    named: tuple[str, str, int, int | None]
    ranks: tuple[int, ...]
    element: Callable[[Difference], bool]
    is_replica: bool = False


CASES = (
    Case(
        WIDE,
        wrong_initial_weight,
        ("weight", "layers.1.mlp.up.weight", 0, None),
        (1, 3),
        lambda d: d.index == (HALF_FFN, 5) and d.absolute_error == pytest.approx(1e-3),
    ),
    Case(
        DEEP,
        tied_copy_starts_elsewhere,
        ("weight", "embedding.tokens.weight", 0, None),
        (2,),
        lambda d: d.index == (0, 0) and d.values[1].rank == 0 and d.values[2].side == "B",
        is_replica=True,
    ),
    Case(
        WIDE,
        wrong_block_output,
        ("activation", "layers.1", 1, 1),
        (3,),
        lambda d: d.index[0] >= HALF_SEQUENCE and d.absolute_error == pytest.approx(1e-3 * abs(d.values[1].value)),
    ),
    Case(
        DEEP,
        diverging_hidden,
        ("activation", "layers.0", 1, 0),
        (1,),
        lambda d: d.index[0] == 4 and d.values[1].rank == 0 and d.absolute_error == pytest.approx(1e-5),
        is_replica=True,
    ),
    Case(
        WIDE,
        wrong_gradient,
        ("gradient", "layers.0.mlp.up.weight", 2, None),
        (1, 3),
        lambda d: d.index[0] >= HALF_FFN and 1e-5 < d.relative_error < 1e-2,
    ),
    Case(
        DEEP,
        wrong_update,
        ("weight", "layers.1.mlp.down.weight", 2, None),
        (3,),
        lambda d: d.index == (0, HALF_FFN) and d.absolute_error == pytest.approx(1e-5, rel=1e-3),
    ),
    Case(
        WIDE,
        drifting_norm,
        ("weight", "layers.0.mlp_norm.weight", 1, None),
        (2,),
        lambda d: d.index == (7,) and d.values[0].value - d.values[2].value == pytest.approx(1e-6, rel=1e-3),
        is_replica=True,
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.fault.__name__)
def test_faults_are_named(case: Case, tmp_path: Path) -> None:
    """The first tensor that differs, its step and sample, the rank at fault and the element; nothing before it."""
    a = written(tmp_path, case.cell)
    result = compared(a, parity.other_side(a, None), case.fault)
    first, text = result.first, result.describe()
    assert first is not None, text
    assert (first.kind, first.name, first.step, first.sample) == case.named, text
    assert first.values[0].side == "A" and first.values[0].rank in case.ranks, text
    assert first.is_replica == case.is_replica and case.element(first), text
    assert [bool(phase.differing) for phase in result.phases] == [False] * (len(result.phases) - 1) + [True]
    assert result.phases[-1].differing[0] == first.title()
    assert first.title() in text and f"rank {first.values[0].rank}" in text


def test_command(tmp_path: Path) -> None:
    """The whole command with its own launcher: rounding alone differs where no tolerance is left, exit code 1."""
    a = written(tmp_path, Cell(1, 1, 2, sequence_parallel=True))
    arguments = ["parity", str(a), "--steps", "1", "--rtol", "0", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "trilith", *arguments],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(SEARCH_PATH), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    content = json.loads(done.stdout)
    assert content["equal"] is False and content["rtol"] == 0.0
    assert 0.0 < content["first_difference"]["relative_error"] < 1e-12
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"], "the recordings are gone"
