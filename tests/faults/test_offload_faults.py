"""Offload on a disk that fails: the rank and its file are named, no wrong step is taken, nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.cells import Cell, config
from tests.faults.test_train_faults import assert_gone
from trilith import checkpoint

STEPS, SAVE_INTERVAL, FAULT_STEP = 6, 2, 6
MARK = "TRILITH_TEST_FOLDER"  # tells a run's processes from others
NO_REST = f"forward:*:{FAULT_STEP}:sleep=2"  # time to damage what the step before wrote


def written_config(folder: Path, resume: str = "auto", nvme_path: str = "") -> Path:
    """The file of a tiny model's config on two ranks, weights and states on disk, checksums on."""
    content = config(Cell(data=2, microbatches=2, zero=3))
    disk = folder / "disk"
    disk.mkdir(parents=True, exist_ok=True)
    place = {"device": "nvme", "nvme_path": nvme_path or str(disk)}
    content["zero_optimization"] |= {
        "offload_optimizer": place,
        "offload_param": {**place, "max_in_cpu": 0},
        "enable_sanity_checks": True,
    }
    content["training"] |= {"steps": STEPS, "log_interval": 1}
    content["run"] = {"directory": str(folder / "run")}
    content["checkpoint"] = {"save_interval": SAVE_INTERVAL, "resume": resume}
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return path


def start(folder: Path, failpoint: str = "", resume: str = "auto") -> subprocess.Popen[str]:
    """`trilith train` of that config."""
    return subprocess.Popen(
        [sys.executable, "-m", "trilith", "train", str(written_config(folder, resume))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TRILITH_FAILPOINT": failpoint, MARK: str(folder)},
        start_new_session=True,
    )


def steps_of(folder: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of all steps that are written down."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"], r["grad_norm"]) for r in map(json.loads, lines) if "loss" in r]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float, float]]:
    """The steps of a run without a fault."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert not list((folder / "disk").iterdir())
    found = steps_of(folder)
    assert [step for step, _, _ in found] == list(range(1, STEPS + 1))
    return found


def processes_of(folder: Path) -> list[psutil.Process]:
    """All living processes of a run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # they end while we look
            if process.environ().get(MARK) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def assert_named(process: subprocess.Popen[str], folder: Path, *words: str, rank: int | None = None) -> None:
    """The run has ended, its ranks with it, with an error that names the rank and, in `words`, what happened."""
    _, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, 2), errors
    headline = re.search(r"^rank (\d) failed first \(.*", errors, re.MULTILINE)
    assert headline and errors.count("failed first") == 1, errors
    assert rank is None or int(headline[1]) == rank, errors
    for word in words:
        assert word.replace("<rank>", headline[1]) in errors, (word, errors)
    assert_gone(processes_of(folder))
    assert not list((folder / "disk").iterdir()), "the file has no name"


def assert_resumed_as(folder: Path, undisturbed: list[tuple[int, float, float]]) -> None:
    """A run without the fault goes on from the last checkpoint, and ends as one that had none."""
    found = checkpoint.newest(folder / "run" / "checkpoints")
    assert found is not None
    process = start(folder, resume="must")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f"resuming from {found}" in output
    assert steps_of(folder) == undisturbed


def offload_file(process: subprocess.Popen[str], folder: Path) -> Path:
    """The nameless file of one of the run's ranks, once the step before the fault is over, after which none is saved."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step ") and f"{FAULT_STEP - 1}/" in line:
            break
    for rank in psutil.Process(process.pid).children(recursive=True):
        for entry in _open_files(rank.pid):
            with suppress(OSError):
                if os.readlink(entry).startswith(str(folder / "disk")):
                    return entry
    raise AssertionError("no rank has an offload file")


def _open_files(process: int) -> Iterator[Path]:
    with suppress(OSError):
        yield from Path(f"/proc/{process}/fd").iterdir()


def cut_short(file: Path) -> None:
    """Leave nothing of it."""
    os.truncate(file, 0)


def flip(file: Path) -> None:
    """Change a bit of every page."""
    with open(file, "r+b", buffering=0) as content:
        for offset in range(0, os.fstat(content.fileno()).st_size, 4096):
            byte = os.pread(content.fileno(), 1, offset)
            os.pwrite(content.fileno(), bytes([byte[0] ^ 1]), offset)


@pytest.mark.parametrize(
    ("damage", "word"),
    [pytest.param(cut_short, "the file was cut short", marks=pytest.mark.slow), (flip, "came back changed")],
)
def test_damage_between_write_and_read(
    damage: Callable[[Path], None], word: str, tmp_path: Path, undisturbed: list[tuple[int, float, float]]
) -> None:
    process = start(tmp_path, NO_REST)
    damage(offload_file(process, tmp_path))
    assert_named(process, tmp_path, f"OffloadError: rank <rank>: offload file in {tmp_path / 'disk'}", word)
    assert steps_of(tmp_path) == undisturbed[: FAULT_STEP - 1], "no step was taken with what was damaged"
    assert_resumed_as(tmp_path, undisturbed)


@pytest.mark.parametrize(
    ("failpoint", "words"),
    [
        ("offload_write:1:{}:full", ("OffloadError: rank 1: offload file in", "cannot write", "ENOSPC", "nvme_path")),
        pytest.param(
            "offload_read:1:{}:full",
            ("OffloadError: rank 1: offload file in", "cannot read", "ENOSPC"),
            marks=pytest.mark.slow,
        ),
        pytest.param("offload_write:1:{}:kill", ("killed by SIGKILL",), marks=pytest.mark.slow),
        ("offload_read:1:{}:kill", ("killed by SIGKILL",)),
    ],
)
def test_faults_in_a_step(
    failpoint: str, words: tuple[str, ...], tmp_path: Path, undisturbed: list[tuple[int, float, float]]
) -> None:
    process = start(tmp_path, failpoint.format(PASS[failpoint.split(":")[0]]))
    assert_named(process, tmp_path, *words, rank=1)
    assert steps_of(tmp_path) == undisturbed[: len(steps_of(tmp_path))]
    assert SAVE_INTERVAL <= len(steps_of(tmp_path)) < STEPS
    assert_resumed_as(tmp_path, undisturbed)


# The pass of a failpoint that is in the middle of the run: each step has about twenty.
PASS = {"offload_write": 130, "offload_read": 150}


def test_full_disk_at_the_start(tmp_path: Path) -> None:
    process = start(tmp_path, "offload_reserve:1:7:full")
    words = ("OffloadError: rank 1: offload file in", "cannot reserve", "ENOSPC", "Free space there")
    assert_named(process, tmp_path, *words, rank=1)
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert not metrics.exists() or not metrics.read_text(), "a step was taken"  # rank 0 may have opened the file


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(mode=0o500)
    process = start(tmp_path)
    words = (f"cannot make an offload file in {tmp_path / 'disk'}", "EACCES", "Make the directory writable")
    assert_named(process, tmp_path, *words)


def test_a_directory_that_does_not_exist_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    path = written_config(tmp_path, nvme_path=str(tmp_path / "missing"))
    found = subprocess.run(
        [sys.executable, "-m", "trilith", "train", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 2 and "offload_optimizer.nvme_path" in found.stderr, found.stderr
    assert "Make the directory" in found.stderr
