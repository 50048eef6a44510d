"""Whatever ends a run of eight ranks: no process stays, and the right rank and cause are named (20 of 20 times)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.faults.launches import Launch, launched

RANKS = 8
READY = tuple(f"ready-{rank}" for rank in range(RANKS))
TARGET = "tests.faults.targets:loop"
PRELOAD = ("torch", "torch.distributed", "tests.faults.targets")
CONSEQUENCE = "7 other ranks ended as a consequence of rank {}"
# Twice in `make test`; `-m slow` runs the other 18.
attempts = pytest.mark.parametrize(
    "attempt", [pytest.param(n, marks=pytest.mark.slow if n >= 1 else ()) for n in range(20)]
)


def run(folder: Path, **args: Any) -> AbstractContextManager[Launch]:
    return launched(folder, TARGET, RANKS, PRELOAD, **{"steps": 100_000, **args})


@contextmanager
def running(folder: Path, **args: Any) -> Iterator[Launch]:
    """A run whose ranks have all passed their first collective."""
    with run(folder, **args) as launch:
        launch.wait_for_files(*READY)
        yield launch


def wait_for_fault(launch: Launch) -> float:
    launch.wait_for_files("fault")
    return time.monotonic()


def assert_named(launch: Launch, rank: int, what: str) -> None:
    """The report comes last: headline, perhaps a traceback, one line about the others; and no victim's complaint."""
    text = launch.stderr
    headline = rf"rank {rank} failed first \(stage {rank % 2}, step \d+, forward\): {what}"
    assert len(re.findall("failed first", text)) == 1 and re.search(f"^{headline}", text, re.MULTILINE), text
    assert text.splitlines()[-1] == CONSEQUENCE.format(rank), text
    assert "closed by peer" not in text and "reset by peer" not in text, text


@attempts
def test_sigkill_of_the_parent(tmp_path: Path, attempt: int) -> None:
    with running(tmp_path) as launch:
        assert len(launch.processes()) == RANKS + 2
        launch.process.kill()
        launch.assert_all_gone(time.monotonic())
    # A killed process cannot clean up; the next launch with the same temporary directory does (test_launcher.py).
    assert len(list((tmp_path / "temporary").iterdir())) == 1


@pytest.mark.parametrize("rank", [0, 6])
@attempts
def test_sigkill_of_a_rank(tmp_path: Path, rank: int, attempt: int) -> None:
    with running(tmp_path) as launch:
        os.kill(launch.rank_pid(rank), signal.SIGKILL)
        assert launch.finish(time.monotonic()) == 128 + signal.SIGKILL
        assert_named(launch, rank, r"killed by SIGKILL \(signal 9; often the out-of-memory killer\)$")


@attempts
def test_ctrl_c(tmp_path: Path, attempt: int) -> None:
    """The terminal sends SIGINT to the foreground process group; a script may send it to the launching process only."""
    with running(tmp_path) as launch:
        if attempt % 2:
            os.kill(launch.process.pid, signal.SIGINT)
        else:
            os.killpg(launch.process.pid, signal.SIGINT)
        assert launch.finish(time.monotonic()) == 130
        assert re.fullmatch(r"interrupted at step \d+ \(SIGINT\); all 8 ranks have ended\n", launch.stderr)


@pytest.mark.parametrize("rank", [5, 0])
@attempts
def test_exception_of_a_rank(tmp_path: Path, rank: int, attempt: int) -> None:
    """The other ranks are inside the collective when it is raised."""
    with run(tmp_path, fault={"rank": rank, "step": 12, "kind": "raise"}) as launch:
        assert launch.finish(wait_for_fault(launch)) == 1
        assert_named(launch, rank, "ValueError: an injected error$")
        assert f"rank {rank} failed first (stage {rank % 2}, step 12, forward)" in launch.stderr
        assert launch.stderr.count("Traceback") == 1 and "in _raise_error" in launch.stderr


@attempts
def test_sys_exit_of_a_rank(tmp_path: Path, attempt: int) -> None:
    with run(tmp_path, fault={"rank": 4, "step": 3, "kind": "sys_exit"}) as launch:
        assert launch.finish(wait_for_fault(launch)) == 3
        assert_named(launch, 4, r"sys.exit\(3\)$")


@attempts
def test_a_rank_holds_the_interpreter_lock_when_the_parent_dies(tmp_path: Path, attempt: int) -> None:
    with running(tmp_path, fault={"rank": 3, "step": 3, "kind": "hold_lock"}) as launch:
        wait_for_fault(launch)
        launch.process.kill()
        launch.assert_all_gone(time.monotonic())


def test_ctrl_c_while_a_rank_holds_the_interpreter_lock(tmp_path: Path) -> None:
    with running(tmp_path, fault={"rank": 3, "step": 3, "kind": "hold_lock"}) as launch:
        wait_for_fault(launch)
        launch.process.send_signal(signal.SIGINT)
        assert launch.finish(time.monotonic()) == 130
        assert launch.stderr.startswith("interrupted at step 3 ")


def test_a_stopped_rank_is_named_not_those_that_wait_for_it(tmp_path: Path) -> None:
    with running(tmp_path, timeout_s=1.0, fault={"rank": 2, "step": 3, "kind": "stop"}) as launch:
        launch.wait_for_files("fault")
        assert launch.process.wait(timeout=10) == 1
        launch.finish(time.monotonic())
        headline, victim, last = launch.stderr.splitlines()
        assert headline.startswith("rank 2 failed first (stage 0, step 3, forward): did not answer, ")
        assert re.match(r"rank \d noticed .*RuntimeError: .*([Tt]imed out|closed by peer)", victim)
        assert last == CONSEQUENCE.format(2)


_JOIN = """
import json, sys
from trilith_launcher import join_from_environment, run_joined
sys.exit(run_joined(join_from_environment(), "tests.faults.targets:loop", json.loads(sys.argv[1])))
"""


@pytest.mark.slow
def test_under_torchrun_the_right_rank_is_named(tmp_path: Path) -> None:
    (tmp_path / "join.py").write_text(_JOIN)
    args = {"status": str(tmp_path), "steps": 100, "fault": {"rank": 2, "step": 12, "kind": "raise"}}
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4")
    run = subprocess.run(
        [sys.executable, *torchrun, str(tmp_path / "join.py"), json.dumps(args)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    root_cause = run.stderr[run.stderr.index("Root Cause") :]
    assert run.returncode == 1
    assert "rank 2 (stage 0, step 12, forward): ValueError: an injected error" in root_cause
