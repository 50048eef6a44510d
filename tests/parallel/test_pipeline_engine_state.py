"""The engine of a PipelineModel on ranks: checkpoints between layouts, number formats, data that ends, the end of it."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trilith
from tests.harness import ROOT, assert_close_named, run_ranks
from tests.layer_cases import Data, model
from tests.parallel.test_pipeline_engine import Case, state_of, whole
from trilith.errors import TrilithError
from trilith.models.pipeline_model import LayerSpec
from trilith.stepping.postvalidated import PostvalidatedSteps

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


def ends_within_a_span(rank: int, world_size: int, case: Case) -> list[str]:
    """The data of the second step: too little of it on all ranks, then an error on the rank of the first stage."""
    engine = trilith.initialize(model(), case.config())
    batches, found = [case.batches.microbatch(0, number, 0) for number in range(case.microbatches)], []
    broken = itertools.chain(batches, broken_data(batches, "raises") if engine.is_first_stage else batches)
    for source in (iter([*batches, *batches[:2]]), broken):
        try:
            for _ in engine.train_batches(source, 2):
                pass
        except Exception as error:
            found.append(str(error))
    engine.train_batch(iter(batches))
    assert engine.global_steps == 3
    engine.close()
    return found


def test_a_pipeline_hears_of_it_inside_a_span() -> None:
    results = run_ranks(3, ends_within_a_span, Case("zb_h1", pipeline=3))
    assert all("data_iter: ended" in result[0] for result in results)
    assert results[0][1] == "no such shard"
    assert all("the rank of the first stage could not read its microbatches" in result[1] for result in results[1:])


def shapes_of_spans(rank: int, world_size: int) -> str:
    """With an asynchronous schedule shapes can change after a drain (inside of a span: the test of one process)."""
    engine = trilith.initialize(model(), Case("pipedream_2bw", microbatches=2).config())
    for length in (5, 3, 5):
        assert len(list(engine.train_batches(Data(2, (length,)).stream(0), 2))) == 2
    engine.close()
    return "done"


def test_shapes_may_change_between_spans() -> None:
    assert run_ranks(2, shapes_of_spans) == ["done"] * 2


def broken_data(batches: list[Any], where: str) -> Iterator[Any]:
    """What a rank with bad data has: `None` is handed in by the caller."""
    if where == "raises":
        raise ValueError("no such shard")
    yield batches[0]
    yield {"malformed": {"tokens": batches[0]}, "differs": (batches[0][0][:1], batches[0][1])}[where]


def one_rank_fails(rank: int, world_size: int, case: Case) -> list[tuple[str, str]]:
    """On one rank after the other something is wrong with the data, then all train on; (class, text) of each error."""
    engine = trilith.initialize(model(), case.config())
    batches = [case.batches.microbatch(0, number, 0) for number in range(case.microbatches)]
    found = []
    for bad_rank, what in BAD:
        source = broken_data(batches, what) if what else None
        try:
            engine.train_batch(source if rank == bad_rank else iter(batches))
        except Exception as error:
            found.append((type(error).__name__, str(error)))
    assert len(found) == len(BAD) and engine.global_steps == 0, found
    engine.train_batch(iter(batches))
    engine.close()
    return found


BAD = [(0, "differs"), (2, ""), (3, "malformed"), (1, "raises"), (2, "raises"), (3, "")]


@pytest.mark.parametrize("schedule", ["1f1b", "pipedream_2bw"])
def test_all_ranks_hear_that_one_cannot_read(schedule: str) -> None:
    """Ranks 0 and 1 hold the first stage, 2 and 3 the last: it is another pipeline that must hear of it, too."""
    results = run_ranks(4, one_rank_fails, Case(schedule, data=2, microbatches=2))
    own = {"differs": "microbatch 1 of the step has inputs", "": "data_iter = None", "malformed": "yielded a dict"}
    for number, (bad_rank, what) in enumerate(BAD):
        for rank, result in enumerate(results):
            kind, text = result[number]
            if rank != bad_rank:
                assert kind == "TrilithError" and f"rank {bad_rank} could not read its microbatches" in text, text
            elif what == "raises":
                assert (kind, text) == ("ValueError", "no such shard")
            else:
                assert kind == "TrilithError" and own[what] in text, text


def guessing(rank: int, world_size: int, sync: str) -> dict[str, Any]:
    """Steps with dropout and running statistics, whose gradients are large now and then."""
    layers: list[Any] = [
        *(LayerSpec(nn.Linear, 4, 8), LayerSpec(nn.BatchNorm1d, 8), nn.Dropout(0.3), LayerSpec(nn.Linear, 8, 8)),
        *(torch.tanh, LayerSpec(nn.BatchNorm1d, 8), nn.Dropout(0.3), LayerSpec(nn.Linear, 8, 3)),
    ]
    case = Case("zb_v", virtual_stages=2, optimizer_sync=sync, dtype="fp32", clipping=GUESSED)
    config = {**case.config(), "optimizer": {"type": "SGD", "params": {"lr": 0.01}}}
    engine = trilith.initialize(trilith.PipelineModel(layers, nn.functional.mse_loss), config)
    torch.manual_seed(rank)
    generator = torch.Generator().manual_seed(7)

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        for size in SIZES:
            for _ in range(case.microbatches):
                yield torch.randn(6, 4, generator=generator), size * torch.randn(6, 3, generator=generator)

    losses, norms = [], []
    for loss in engine.train_batches(stream(), len(SIZES)):
        losses.append(loss)
        norms.append(engine.global_grad_norm)
    steps, counts = engine._running.steps, (0, 0)
    if isinstance(steps, PostvalidatedSteps):
        counts = (steps.validation.num_guesses, steps.validation.num_rollbacks)
    state = state_of(engine)
    engine.close()
    return {"losses": losses, "norms": norms, "state": state, "next": torch.rand(3), "counts": counts}


GUESSED, SIZES = 6.5, (1, 1, 6, 1, 1, 1, 6, 1)


def test_a_step_that_is_thrown_away_leaves_no_trace() -> None:
    """Bits of `step`: weights, running statistics, and the masks of dropout that are drawn again."""
    waiting, guessed = run_ranks(2, guessing, "step"), run_ranks(2, guessing, "postvalidate")
    assert all(norm > GUESSED for norm, size in zip(waiting[0]["norms"], SIZES, strict=True) if size > 1)
    assert sum(result["counts"][0] for result in guessed) > sum(result["counts"][1] for result in guessed) > 0
    for a, b in zip(waiting, guessed, strict=True):
        assert a["losses"] == b["losses"] and a["norms"] == b["norms"] and torch.equal(a["next"], b["next"])
        assert a["state"].keys() == b["state"].keys()
        assert all(torch.equal(a["state"][key], b["state"][key]) for key in a["state"])
    tracked = [int(t) for r in guessed for key, t in r["state"].items() if key.endswith("num_batches_tracked")]
    assert tracked == [len(SIZES) * Case().microbatches] * 2


SCRIPT = """
import sys, torch, trilith
from tests.layer_cases import model
from tests.parallel.test_pipeline_engine import Case
parted = Case(pipeline=1, data=2, zero=3, zero_keys=(("stage3_param_persistence_threshold", 0),))
case = parted if sys.argv[2] == "3" else Case()
engine = trilith.initialize(model(), case.config())
engine.train_batch(case.batches.stream(0))
kept = engine.module
if sys.argv[1] == "close":
    engine.close()
elif sys.argv[1] == "drop":
    del engine
print("left")
"""


ENDS = [("close", 0), ("drop", 0), ("close", 3), ("keep", 3)]


@pytest.mark.parametrize(
    "how, stage", [*(pytest.param(how, stage, marks=pytest.mark.slow) for how, stage in ENDS), ("keep", 0)]
)
def test_scripts_end_in_peace(how: str, stage: int, tmp_path: Path) -> None:
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
            [sys.executable, str(script), how, str(stage)],
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
