"""The product under faults: `trilith train` on eight ranks names the right rank and cause and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cells import Cell, config
from trilith import checkpoint

GONE_WITHIN_S = 2.0


def start(folder: Path, failpoint: str = "", steps: int = 100_000, **checkpointing: object) -> subprocess.Popen[str]:
    """`trilith train` of a tiny model, data 2 x pipeline 2 x tensor 2, in a process group of its own."""
    content = config(Cell(2, 2, 2, microbatches=2, zero=1))
    content["training"] |= {"steps": steps, "log_interval": 1}
    content["run"] = {"directory": str(folder / "run")}
    content["checkpoint"] = {"save_interval": None, **checkpointing}
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return subprocess.Popen(
        [sys.executable, "-m", "trilith", "train", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TRILITH_FAILPOINT": failpoint},
        start_new_session=True,
    )


def wait_for_step(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Read the log until the second step is reported; returns every process of the run."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step ") and "2/" in line:
            break
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 8, family
    return family


def assert_gone(family: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(family, timeout=GONE_WITHIN_S)
    assert not alive, alive


@pytest.mark.parametrize(
    ("failpoint", "rank", "cause"),
    [
        ("forward:5:3:raise", 5, "InjectedFault: failpoint forward, pass 3"),
        ("optimizer_step:0:2:kill", 0, "killed by SIGKILL"),
        ("data_read:6:4:kill", 6, "killed by SIGKILL"),
    ],
)
def test_fault_in_a_rank(tmp_path: Path, failpoint: str, rank: int, cause: str) -> None:
    process = start(tmp_path, failpoint)
    _, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, 2), errors
    stage = 0 if rank < 4 else 1
    headline = f"rank {rank} failed first (stage {stage}, step "
    assert headline in errors and cause in errors.split(headline)[1], errors
    assert errors.count("failed first") == 1, errors


def test_sigkill_of_the_command(tmp_path: Path) -> None:
    process = start(tmp_path)
    family = wait_for_step(process)
    process.kill()
    process.wait(timeout=10)
    assert_gone(family)


def test_interrupt(tmp_path: Path) -> None:
    process = start(tmp_path)
    family = wait_for_step(process)
    os.killpg(process.pid, signal.SIGINT)
    started = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and "interrupted" in errors, errors
    assert_gone(family)
    assert time.monotonic() - started < 4


def test_kill_while_publishing_keeps_the_earlier_checkpoint(tmp_path: Path) -> None:
    """A run killed between shards and rename resumes from the checkpoint before, and ends as the plan says."""
    process = start(tmp_path, "checkpoint_publish:0:2:kill", 6, save_interval=2)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "rank 0" in errors, errors
    found = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert found is not None and found.name == "step-00000002"
    process = start(tmp_path, "", 6, save_interval=2, resume="must")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "resuming from" in output
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
