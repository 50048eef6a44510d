"""A rank lost in mid-schedule ends the run, and the report says in which action, of which microbatch, each other waited."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cells import Cell, config
from tests.faults.launches import launched
from trilith_launcher.cause import Cause, Ended, word_report
from trilith_launcher.context import RankContext
from trilith_launcher.failure import describe_exception, read_record, write_record
from trilith_launcher.local import conclude
from trilith_launcher.position import Position, PositionBoard
from trilith_launcher.rundir import RunDirectory
from trilith_launcher.supervise import Outcome

RANKS = 4
TARGET = "tests.faults.targets:pipeline"
PRELOAD = ("torch", "torch.distributed", "tests.faults.targets")
CLOSED = "[pair.cc:553] Connection closed by peer [127.0.0.1]:19622"


def places(report: str, lost: int) -> dict[int, str]:
    """What the report says of each rank but the lost one; ranks that need nothing of it may be a step ahead."""
    found = re.findall(r"^rank (\d) \(stage (\d), step [34], train\): (.*)$", report, re.MULTILINE)
    assert all(rank == stage for rank, stage, _ in found), report
    assert sorted(int(rank) for rank, _, _ in found) == [rank for rank in range(RANKS) if rank != lost], report
    return {int(rank): text for rank, _, text in found}


@pytest.mark.parametrize(
    ("schedule", "action", "kind"),
    [
        ("1f1b", "B2.3", "kill"),
        ("zb_h1", "F2.1", "kill"),
        ("zb_h1", "W2.5", "kill"),
        ("zb_h1", "W2.5", "stop"),
        pytest.param("1f1b", "B2.3", "stop", marks=pytest.mark.slow),
        pytest.param("zb_h1", "F2.1", "stop", marks=pytest.mark.slow),
    ],
)
def test_a_rank_is_lost_in_mid_schedule(tmp_path: Path, schedule: str, action: str, kind: str) -> None:
    """Rank 2 of 4 dies, or stops answering, before one of its computations in the third step."""
    fault = {"kind": kind, "rank": 2, "step": 3, "action": action}
    timeout_s = 4.0 if kind == "stop" else 60.0
    with launched(tmp_path, TARGET, RANKS, PRELOAD, schedule=schedule, fault=fault, timeout_s=timeout_s) as launch:
        launch.wait_for_files("fault")
        assert launch.process.wait(timeout=10) == (128 + signal.SIGKILL if kind == "kill" else 1)
        launch.finish(time.monotonic())
        report = launch.stderr
    how = r"killed by SIGKILL" if kind == "kill" else "did not answer, and ended only by SIGKILL"
    assert re.match(rf"rank 2 failed first \(stage 2, step 3, train\): {how}", report), report
    for rank, text in places(report, lost=2).items():
        action_of = r"(forward|backward|backward input) of stage {0}, microbatch \d \([FBI]{0}\.\d\)"
        waits = rf"in {action_of.format(rank)}, waiting for receive .* from pipeline rank \d$"
        assert re.search(waits, text), (rank, report)
    assert report.splitlines()[-1] == "3 other ranks ended as a consequence of rank 2"


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_a_rank_of_the_main_job_is_lost(tmp_path: Path, schedule: str) -> None:
    """`trilith train`, four stages: rank 2 is killed where it would begin the third step, in the middle of the others'."""
    content = config(Cell(1, 4, 1, schedule, microbatches=8))
    content["training"] |= {"steps": 100_000, "log_interval": 1}
    content["run"] = {"directory": str(tmp_path / "run")}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    found = subprocess.run(
        [sys.executable, "-m", "trilith", "train", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TRILITH_FAILPOINT": "forward:2:3:kill"},
    )
    report = found.stderr
    assert found.returncode == 128 + signal.SIGKILL, report
    assert "rank 2 failed first (stage 2, step 2, train): killed by SIGKILL" in report, report
    for rank in (0, 1, 3):
        waits = rf"in [a-z ]+ of stage {rank}, microbatch \d \([FBI]{rank}\.\d\), waiting for receive"
        assert re.search(rf"^rank {rank} \(stage {rank}, step 2, train\): .*{waits}", report, re.MULTILINE), report


def test_places_in_the_report(tmp_path: Path) -> None:
    """A rank's own exception knows better than what it last reported; ranks that are not known to wait have no line."""
    board = PositionBoard.create(tmp_path / "positions", 4)
    contexts = [RankContext(rank, PositionBoard(tmp_path / "positions", 4), tmp_path / f"e{rank}") for rank in range(4)]
    for context in contexts:
        context.position(step=7, phase="train")
        context.wait(f"forward of rank {context.rank}")
    contexts[3].position(phase="evaluate")
    lost = RuntimeError(CLOSED)
    lost.add_note("on pipeline rank 1, in backward 5")
    contexts[1].record_failure(lost)
    record = read_record(tmp_path / "e1")
    assert record is not None and record.notes == ("on pipeline rank 1, in backward 5",)
    ends = [Ended(rank, -signal.SIGKILL if rank == 0 else 1, rank) for rank in range(4)]
    cause = Cause(0, "killed", Position(step=7), "", 137)
    assert word_report(cause, ends, {1: record}, board.read_all()).splitlines() == [
        "rank 0 failed first (step 7): killed",
        "rank 1 (step 7, train): on pipeline rank 1, in backward 5",
        "rank 2 (step 7, train): last waited in forward of rank 2",
        "3 other ranks ended as a consequence of rank 0",
    ]


def test_reporting_a_wait_is_cheap(tmp_path: Path) -> None:
    """It happens some hundred times a step."""
    context = RankContext(0, PositionBoard.create(tmp_path / "positions", 1))
    text = "backward input of stage 1, microbatch 12 (I1.12), waiting for receive backward of stage 1, microbatch 12"
    best_s = min(_timed(context, text) for _ in range(20))
    assert context.last_position.wait == text and best_s < 100e-6


def _timed(context: RankContext, text: str) -> float:
    start_s = time.perf_counter()
    for _ in range(10):
        context.wait(text)
    return (time.perf_counter() - start_s) / 10


def test_a_rank_that_the_launcher_killed_with_the_group_is_no_secret(tmp_path: Path) -> None:
    """On a busy machine the fork server may be killed before it told how a stopped rank ended."""
    directory = RunDirectory(tmp_path)
    write_record(directory.error(0), describe_exception(RuntimeError(CLOSED), 0, Position(step=2)))
    outcome = Outcome((Ended(0, 1, 1),), None, "", -9, group_killed_ns=10)
    code, report = conclude(directory, outcome, 2, [Position(step=2), Position(step=1)])
    assert code == 1 and report.startswith("rank 1 failed first (step 1): did not answer, and ended only by SIGKILL")
