"""The engine of a PipelineModel on ranks: checkpoints between layouts, number formats, data that ends, the end of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trilith
from tests.harness import ROOT, assert_close_named, run_ranks
from tests.layer_cases import Data, model
from tests.parallel.test_pipeline_engine import Case, state_of, whole
from trilith.errors import TrilithError

STEPS = 10
FIRST = Case("1f1b", data=2, zero=1, partition=(4, 6))
LAYOUTS = [
    Case("zb_v", virtual_stages=2, data=2, partition=(1, 3, 4, 2)),
    Case("dualpipe_v", virtual_stages=2, data=2, zero=1),
    Case("1f1b", pipeline=1, data=2, zero=1),
]


def trained(
    rank: int, world_size: int, case: Case, directory: str, save_at: int, first: int, last: int
) -> dict[str, Any]:
    """Train steps `first` to `last`, from the checkpoint of step `first` if it is not 0; save at step `save_at`."""
    engine = trilith.initialize(model(case.frozen, case.partition), case.config())
    if first:
        path, client = engine.load_checkpoint(directory)
        assert path.name == f"step-{first:08d}" and client == {"seen": first} and engine.global_steps == first
    stream = case.batches.stream(engine.topology.dp.index, first)
    losses = []
    for step in range(first, last):
        losses.append((engine.train_batch(stream), engine.global_grad_norm))
        if step + 1 == save_at:
            engine.save_checkpoint(directory, {"seen": step + 1})
    calls = {key: int(t) for key, t in engine.module.state_dict().items() if key.endswith("calls")}
    state = state_of(engine)
    engine.close()
    return {"after": state, "losses": losses, "calls": calls}


def test_any_layout_continues_a_checkpoint(tmp_path: Path) -> None:
    whole_run = run_ranks(FIRST.world_size, trained, FIRST, str(tmp_path), 2, 0, 3)
    expected = whole(whole_run, "after")
    for case in (FIRST, *LAYOUTS):
        results = run_ranks(case.world_size, trained, case, str(tmp_path), 0, 2, 3)
        exact = case is FIRST
        assert_close_named(
            {key: (tensor, expected[key]) for key, tensor in whole(results, "after").items()},
            rtol=0.0 if exact else 1e-10,
            atol=0.0 if exact else 1e-12,
        )
        assert results[0]["losses"][-1] == pytest.approx(whole_run[0]["losses"][-1], rel=0 if exact else 1e-10)
        assert {count for result in results for count in result["calls"].values()} == {3 * case.microbatches}


def formats(rank: int, world_size: int, case: Case) -> list[float]:
    engine = trilith.initialize(model(), {**case.config(), "fp16": {"initial_scale_power": 18, "hysteresis": 1}})
    losses = [engine.train_batch(case.batches.stream(engine.topology.dp.index)) for _ in range(STEPS)]
    skipped, dtypes = engine.skipped_steps, {p.dtype for p in engine.module.parameters()}
    assert dtypes == {{"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[case.dtype]}
    assert engine.global_steps == STEPS > skipped and (skipped > 0) == (case.dtype == "fp16")
    engine.close()
    return losses


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_number_format_trains(dtype: str) -> None:
    """With fp16 the first steps overflow, on all ranks, and the scale falls; then the loss of a batch seen often does."""
    found = run_ranks(4, formats, Case("zb_h1", data=2, zero=1, dtype=dtype))
    alone = run_ranks(2, formats, Case("1f1b", pipeline=1, data=2, zero=1, dtype=dtype))
    assert all(losses == found[0] for losses in found)
    assert found[0] == pytest.approx(alone[0], rel=1e-5 if dtype == "fp32" else 2e-2)
    assert found[0][-1] < found[0][0]


def ended(rank: int, world_size: int, case: Case) -> tuple[str, float]:
    """The data of one step and a half: every rank hears of it, and can go on with more."""
    engine = trilith.initialize(model(), case.config())
    reads = engine.is_first_stage or engine.is_last_stage
    batches = [case.batches.microbatch(0, number, 0) for number in range(case.microbatches)]
    stream = iter([*batches, *batches[:2]]) if reads else None
    engine.train_batch(stream)
    try:
        engine.train_batch(stream)
    except TrilithError as error:
        message = str(error)
    loss = engine.train_batch(iter(batches) if reads else None)
    engine.close()
    return message, loss


def test_all_ranks_hear_that_the_data_ended() -> None:
    results = run_ranks(3, ended, Case("1f1b", pipeline=3))
    assert all("data_iter: ended" in message and loss == results[0][1] for message, loss in results)


def shapes_in_a_span(rank: int, world_size: int) -> str:
    """An asynchronous schedule cannot change shapes without a drain; after one it can."""
    case = Case("pipedream_2bw", microbatches=2)
    engine = trilith.initialize(model(), case.config())
    engine.train_batch(Data(2, (5,)).stream(0))
    engine.train_batch(Data(2, (3,)).stream(0))
    if engine.is_first_stage:
        engine._running.feed.begin(Data(2, (5, 3)).stream(0), 2, trains=True, is_span=True)
        engine._running.feed._fixed = ("another", engine._running.feed._agreement._known[0])
        with pytest.raises(TrilithError, match="steps of one shape until the pipeline is drained"):
            engine._running.feed.step(1)
    engine.close()
    return "done"


def test_shapes_are_fixed_inside_a_span() -> None:
    assert run_ranks(2, shapes_in_a_span) == ["done"] * 2


SCRIPT = """
import sys, torch, trilith
from tests.layer_cases import model
from tests.parallel.test_pipeline_engine import Case
case = Case(data=1)
engine = trilith.initialize(model(), case.config())
engine.train_batch(case.batches.stream(0))
kept = engine.module
if sys.argv[1] == "close":
    engine.close()
elif sys.argv[1] == "drop":
    del engine
print("left")
"""


@pytest.mark.parametrize("how", ["close", "drop", "keep"])
def test_scripts_end_in_peace(how: str, tmp_path: Path) -> None:
    """Under torchrun's environment the world is joined, and left, whoever still holds the engine or the module."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}/engine:{ROOT}/launcher:{ROOT}",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), how],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], outputs
    assert all("left" in output for output in outputs)


def copies(rank: int, world_size: int, case: Case) -> dict[str, Tensor]:
    """Ranks whose own random numbers differ: the values of data rank 0, and of each tie's first holder, count."""
    torch.manual_seed(rank)
    layers: list[Any] = [torch.nn.Embedding(5, 3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 5, bias=False)]
    own = trilith.PipelineModel(layers, torch.nn.functional.cross_entropy, ties=[("0.weight", "2.weight")])
    engine = trilith.initialize(own, case.config())
    state = state_of(engine)
    engine.close()
    return state


def test_modules_that_are_handed_in_start_equal() -> None:
    results = run_ranks(4, copies, Case("1f1b", data=2, partition=None))
    state = whole([{"before": result} for result in results], "before")
    assert torch.equal(state["0.weight"], state["2.weight"])
    torch.manual_seed(0)
    assert torch.equal(state["0.weight"].float(), torch.nn.Embedding(5, 3).weight.detach())
