"""The parts of `trilith parity`: which configs can be compared, how tensors are put together, what counts as different."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cells import Cell, config
from trilith import cli, parity, preflight
from trilith.errors import ConfigError
from trilith.parity.compare import compare_recordings
from trilith.parity.recording import GRADIENT, GRADIENT_NORM, LOSS, WEIGHT, Key, Recording, difference, unravel
from trilith.parity.side import DEFAULT_RTOL, Tolerance, check_comparable
from trilith.preflight import Plan
from trilith.sharding import Box, Piece, ShardSpec
from trilith.trainer import Place, Trainer

CELL = Cell(2, 2, 2, "interleaved_1f1b", 2, 3, 1, True, True, "none", 0.1)
NOISE = "layers.0.attention.k.bias"  # its gradient is zero in exact arithmetic


def written(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


# ---- sides --------------------------------------------------------------------------------------------------------


def test_the_other_side_is_one_process_of_the_same_batch(tmp_path: Path) -> None:
    content = config(CELL, pipeline__partition=[1, 1, 1, 1])
    a = written(tmp_path / "a.json", content)
    one = parity.other_side(a, None, ["training.steps=3"]).plan()
    assert one.world_size == 1 and len(one.cuts) == 1
    assert (one.config.train_batch_size, one.config.gradient_accumulation_steps) == (6, 6)
    assert one.config.training.steps == 3 and one.config.model == preflight.plan(content).config.model
    other = parity.other_side(a, None, [], ["parallel.tensor=2", "train_micro_batch_size_per_gpu=3"]).plan()
    assert other.world_size == 2 and other.config.gradient_accumulation_steps == 2
    b = parity.other_side(a, tmp_path / "b.json", ["x=1"], ["y=2"])
    assert b == parity.Side(tmp_path / "b.json", ("x=1", "y=2"))


def comparable(b: dict[str, Any], steps: int = 2, rtol: float | None = None) -> Tolerance:
    return check_comparable([preflight.plan(config(CELL)), preflight.plan(b)], steps, rtol)


def test_layout_and_precision_are_free() -> None:
    plain = Cell(2, 1, 1, microbatches=3, zero=0, tied=True, recompute="full", dropout=0.1)
    other = config(plain, data__cache_directory="elsewhere", data_types__param_dtype="bf16")
    other["model"] = config(CELL)["model"]
    assert comparable(other) == Tolerance(DEFAULT_RTOL["bf16"], torch.finfo(torch.bfloat16).eps)
    assert comparable(config(CELL), rtol=0.5) == Tolerance(0.5, torch.finfo(torch.float64).eps)


def test_other_trainings_are_refused_by_key() -> None:
    other = config(CELL, model__dropout=0.2, training__seed=12, data__split=[9, 1, 0])
    other["optimizer"] = {"type": "SGD", "params": {"lr": 1e-2}}
    other["scheduler"] = {"type": "Constant"}
    other["gradient_accumulation_steps"] = 5
    with pytest.raises(ConfigError) as refused:
        comparable(other, steps=0, rtol=-1.0)
    paths = {violation.path for violation in refused.value.violations}
    assert paths >= {"model.dropout", "training.seed", "data.seed", "data.split", "train_batch_size", "optimizer.type"}
    assert paths >= {"optimizer.params.betas", "scheduler.type", "--steps", "--rtol"}
    assert "is 0.1 in A" in str(refused.value)


def test_command_refuses_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2 for what cannot be compared, 0 and 1 by the result; --json prints it as JSON."""
    a = written(tmp_path / "a.json", config(CELL))
    b = written(tmp_path / "b.json", config(CELL, training__seed=12))
    assert cli.main(["parity", str(a), str(b)]) == 2
    assert "training.seed = 12: is 11 in A" in capsys.readouterr().err
    found = parity.Difference("loss", "loss", 1, None, (), (), nan, inf)
    for first, code in ((None, 0), (found, 1)):
        phase = parity.Phase(1, "loss", 1, ("loss",) if first else (), 0.0, 0.0)
        result = parity.Result(("a", "b"), 1e-10, (phase,), first)
        monkeypatch.setattr(parity, "compare", lambda *_, _result=result, **__: _result)
        assert cli.main(["parity", str(a)]) == code
        assert ("first difference: loss, step 1" in capsys.readouterr().out) == bool(code)
        assert cli.main(["parity", str(a), "--json"]) == code
        assert json.loads(capsys.readouterr().out)["equal"] is not bool(code)
    assert result.to_json()["first_difference"]["relative_error"] == "inf"


# ---- recordings ---------------------------------------------------------------------------------------------------


def test_difference_knows_nan_and_infinity() -> None:
    a = torch.tensor([nan, nan, inf, inf, -inf, 1.0])
    b = torch.tensor([nan, 1.0, inf, -inf, 1.0, 1.5])
    assert difference(a, b).tolist() == [0.0, inf, 0.0, inf, inf, 0.5]
    assert unravel(23, (2, 3, 4)) == (1, 2, 3) and unravel(0, ()) == ()


def handmade(directory: Path, ranks: Sequence[tuple[list[float], tuple[Piece, ...]]]) -> Recording:
    """A recording of one (2, 3) weight, in which each rank holds the given storage and pieces."""
    for rank, (values, pieces) in enumerate(ranks):
        save_file({"w": torch.tensor(values)}, directory / f"{rank}.safetensors")
        part = parity.recording.Part(
            Key(WEIGHT, 0, "w"), rank, 0, None, f"{rank}.safetensors", "w", 0.0, ShardSpec("w", (2, 3), pieces)
        )
        index = {"rank": rank, "lrs": [], "data": "", "parts": [part.to_json()]}
        (directory / f"rank-{rank:05d}.json").write_text(json.dumps(index))
    return Recording(directory)


def test_parts_become_a_whole(tmp_path: Path) -> None:
    """Columns on one rank, rows on another, padding left out; the element that both hold is compared."""
    left = Piece(Box((0, 0), (2, 2)), 1, (3, 1))
    row = Piece(Box((1, 1), (2, 3)), 0, (2, 1))
    corner = Piece(Box((0, 2), (1, 3)), 2, (1, 1))
    recording = handmade(tmp_path, [([nan, 1.0, 2.0, nan, 4.0, 5.0], (left,)), ([5.5, 6.0, 3.0], (row, corner))])
    found = recording.assemble(Key(WEIGHT, 0, "w"))
    assert found.values.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert [found.holder(index).rank for index in ((0, 0), (0, 2), (1, 1), (1, 2))] == [0, 1, 0, 1]
    disagreement = found.disagreement
    assert disagreement is not None and disagreement.error == 0.5 and disagreement.index == (1, 1)
    assert (disagreement.part.rank, disagreement.value) == (1, 5.5)
    assert (disagreement.first.rank, disagreement.first_value) == (0, 5.0)
    storage = torch.zeros(4)
    column = ShardSpec("w", (2, 3), (Piece(Box((0, 1), (2, 2)), 1, (2, 1)),))
    recording.fill(Key(WEIGHT, 0, "w"), column, storage)
    assert storage.tolist() == [0.0, 2.0, 0.0, 5.0]


def test_elements_that_nobody_recorded_are_noticed(tmp_path: Path) -> None:
    recording = handmade(tmp_path, [([1.0, 2.0, 3.0], (Piece(Box((0, 0), (1, 3)), 0, (3, 1)),))])
    with pytest.raises(AssertionError, match="3 elements"):
        recording.assemble(Key(WEIGHT, 0, "w"))


# ---- what counts as different -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    """The recording of one step on one process in fp32, and its plan."""
    directory = tmp_path_factory.mktemp("recording")
    plan = preflight.plan(config(Cell(microbatches=2), data_types__param_dtype="fp32"))
    trainer = Trainer(plan, Place())
    parity.record(trainer, directory, 1)
    trainer.close()
    return directory, plan


def edited(original: Path, copy: Path, *edits: tuple[Key, tuple[int, ...], float]) -> Recording:
    """A copy of a recording in which elements of canonical tensors have other values."""
    shutil.copytree(original, copy)
    recording = Recording(copy)
    for key, index, value in edits:
        (part,) = recording.parts[key]
        tensors = load_file(copy / part.file)
        tensors[part.stored][part.spec.pieces[0].offset_of(index)] = value
        save_file(tensors, copy / part.file)
    return recording


def judged(original: tuple[Path, Plan], copy: Path, *edits: tuple[Key, tuple[int, ...], float]) -> parity.Result:
    directory, plan = original
    tolerance = Tolerance(DEFAULT_RTOL["fp32"], torch.finfo(torch.float32).eps)
    sides = (Recording(directory), edited(directory, copy, *edits))
    return compare_recordings(sides, plan, 1, tolerance, ("original", "edited"))


def test_noise_that_adam_amplifies_is_no_difference(original: tuple[Path, Plan], tmp_path: Path) -> None:
    """A gradient that is all rounding may have any sign, and Adam makes a whole step of it; no other weight may."""
    lr, steady = 1e-2, "layers.0.attention.v.bias"
    recording = Recording(original[0])
    noise = (Key(GRADIENT, 1, NOISE), (3,), -1e-8)
    moved = (Key(WEIGHT, 1, NOISE), (3,), float(recording.assemble(Key(WEIGHT, 1, NOISE)).values[3]) + lr)
    assert judged(original, tmp_path / "explained", noise, moved).equal
    first = judged(original, tmp_path / "unexplained", moved).first
    assert first is not None and (first.kind, first.name, first.index) == (WEIGHT, NOISE, (3,))
    other = (Key(WEIGHT, 1, steady), (3,), float(recording.assemble(Key(WEIGHT, 1, steady)).values[3]) + lr / 10)
    first = judged(original, tmp_path / "other", noise, moved, other).first
    assert first is not None and (first.kind, first.name, first.index) == (WEIGHT, steady, (3,))


def test_scalars_and_gradients_are_judged_in_order(original: tuple[Path, Plan], tmp_path: Path) -> None:
    """The loss comes before gradients, gradients from the last unit to the first, their norm after them."""
    loss = (Key(LOSS, 1, LOSS), (), nan)
    up = (Key(GRADIENT, 1, "layers.0.mlp.up.weight"), (0, 0), 1.0)
    down = (Key(GRADIENT, 1, "layers.1.mlp.down.weight"), (2, 1), inf)
    norm = (Key(GRADIENT_NORM, 1, GRADIENT_NORM), (), 1.0)
    first = judged(original, tmp_path / "loss", loss, up, norm).first
    assert first is not None and (first.kind, first.relative_error) == (LOSS, inf)
    result = judged(original, tmp_path / "gradients", up, down, norm)
    first = result.first
    assert first is not None and (first.name, first.index) == ("layers.1.mlp.down.weight", (2, 1))
    assert [title.split(",")[0] for title in result.phases[-1].differing] == [
        "gradient layers.1.mlp.down.weight",
        "gradient layers.0.mlp.up.weight",
    ]
    first = judged(original, tmp_path / "norm", norm).first
    assert first is not None and first.title() == "gradient norm, step 1"
