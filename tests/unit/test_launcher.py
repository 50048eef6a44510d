"""The launcher with torch-free ranks: what a rank is given, every way to end, and who is blamed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.launches import Launch, launched
from trilith_launcher import launch
from trilith_launcher.local import rank_environment
from trilith_launcher.rundir import remove_stale, run_directory

PLAIN = "tests.faults.plain_targets"


@contextmanager
def sleeping(folder: Path, num_ranks: int = 2, **args: Any) -> Iterator[Launch]:
    with launched(folder, f"{PLAIN}:sleep", num_ranks, (), **args) as run:
        run.wait_for_files(*(f"ready-{rank}" for rank in range(num_ranks)))
        yield run


def failing(folder: Path, kinds: dict[int, str], num_ranks: int = 3) -> tuple[int, list[str]]:
    """Exit code and lines of stderr of a run whose ranks fail as `kinds` says (others lose a peer)."""
    with launched(folder, f"{PLAIN}:fail", num_ranks, (), kinds=kinds) as run:
        code = run.process.wait(timeout=20)
        run.finish(time.monotonic())
        return code, run.stderr.splitlines()


def test_what_a_rank_is_given(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Called in this process: environment, signal handlers and open files are afterwards as they were."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    environment, files = dict(os.environ), os.listdir("/proc/self/fd")
    args = {"status": str(tmp_path), "more": [1, "$(x) 'y'"]}
    assert launch(f"{PLAIN}:echo", args, 3, threads_per_rank=2, preload=("json",), run_id="echo") == 0
    assert dict(os.environ) == environment
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers
    assert len(os.listdir("/proc/self/fd")) == len(files)
    for rank in range(3):
        facts = json.loads((tmp_path / f"echo-{rank}").read_text())
        assert (facts["world_size"], facts["context"], facts["stdin"]) == (3, rank, "")
        assert facts["others"] == ["more", "store_path"]
        assert facts["store_folder_mode"] == "0o700" and facts["sigint_ignored"]
        set_by_us = {"OMP_NUM_THREADS": "2", "GLOO_SOCKET_IFNAME": "lo", "TRILITH_RUN_ID": "echo"}
        assert facts["environment"].items() >= set_by_us.items()
    assert sorted(capfd.readouterr().out.splitlines()) == [f"rank {rank} speaks" for rank in range(3)]


def test_waiting_threads_sleep_where_ranks_fill_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert rank_environment(cores, 1, "id")["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "OMP_WAIT_POLICY" not in rank_environment(1, cores - 1, "id")


@pytest.mark.parametrize(
    ("target", "args", "num_ranks"), [("os", {}, 1), ("os:getpid", {"rank": 1}, 1), ("os:getpid", {}, 0)]
)
def test_impossible_jobs_are_refused(target: str, args: dict[str, int], num_ranks: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        launch(target, args, num_ranks, threads_per_rank=1)


def test_outside_the_main_thread(tmp_path: Path) -> None:
    codes: list[int] = []
    args = (f"{PLAIN}:echo", {"status": str(tmp_path)}, 2)
    thread = threading.Thread(target=lambda: codes.append(launch(*args, threads_per_rank=1, preload=())))
    thread.start()
    thread.join(timeout=20)
    assert codes == [0]


def test_with_closed_standard_streams(tmp_path: Path) -> None:
    code = f"""
import os, sys
sys.path[:] = {sys.path!r}
from trilith_launcher import launch
os._exit(launch("{PLAIN}:echo", {{"status": {str(tmp_path)!r}}}, 2, threads_per_rank=1, preload=()))
"""
    run = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" <&- >&-', sys.executable, code], timeout=20)
    assert run.returncode == 0 and (tmp_path / "echo-1").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("deaf", [False, True])
def test_interrupted(tmp_path: Path, number: signal.Signals, deaf: bool) -> None:
    """Also where ranks ignore SIGTERM; what a rank started ends with it."""
    with sleeping(tmp_path, deaf=deaf) as run:
        assert len(run.processes()) == 5
        run.process.send_signal(number)
        assert run.finish(time.monotonic()) == 128 + number
        assert run.stderr == f"interrupted at step 7 ({number.name}); all 2 ranks have ended\n"


def test_interrupted_before_there_are_ranks(tmp_path: Path) -> None:
    slow = "import os, time\nopen(os.path.join(os.environ['TMPDIR'], '../status/slow'), 'w')\ntime.sleep(60)\n"
    (tmp_path / "slow_module.py").write_text(slow)
    with launched(tmp_path, f"{PLAIN}:sleep", 2, ("slow_module",)) as run:
        run.wait_for_files("slow")
        run.process.send_signal(signal.SIGINT)
        assert run.finish(time.monotonic()) == 130
        assert run.stderr.startswith("interrupted before the first step (SIGINT)")


def test_the_fork_server_is_killed(tmp_path: Path) -> None:
    with sleeping(tmp_path) as run:
        run.server().kill()
        assert run.finish(time.monotonic()) == 1
        assert run.stderr == "the fork server was killed by SIGKILL before its ranks; 2 ranks ended with it\n"


def test_ctrl_z_pauses_the_ranks_too(tmp_path: Path) -> None:
    with sleeping(tmp_path) as run:
        others = [process for process in run.processes() if process.pid != run.process.pid]
        run.process.send_signal(signal.SIGTSTP)
        stopped = lambda: [process.status() == psutil.STATUS_STOPPED for process in others]
        run.wait_until(lambda: all(stopped()), timeout_s=10)
        assert psutil.Process(run.process.pid).status() == psutil.STATUS_STOPPED
        run.process.send_signal(signal.SIGCONT)
        run.wait_until(lambda: not any(stopped()), timeout_s=10)
        run.process.terminate()
        assert run.finish(time.monotonic()) == 143


def test_the_directory_of_a_killed_launch_is_removed_by_the_next(tmp_path: Path) -> None:
    with sleeping(tmp_path) as run:
        (left,) = run.temporary.iterdir()
        remove_stale(run.temporary)
        assert left.exists(), "its owner lives"
        run.process.kill()
        run.assert_all_gone(time.monotonic())
        run.process.wait()
        remove_stale(run.temporary)
        assert not left.exists()


def test_a_directory_with_a_locked_owner_elsewhere_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner may live where its process number means nothing here."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with run_directory() as directory:
        foreign = directory.root.rename(tmp_path / "trilith-run-999999999-x")
        (tmp_path / "trilith-run-999999998-y").mkdir()
        remove_stale(tmp_path)
        assert list(tmp_path.iterdir()) == [foreign]
    remove_stale(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_user_errors_come_without_a_traceback(tmp_path: Path) -> None:
    code, lines = failing(tmp_path, {1: "user error"})
    assert code == 1
    assert lines == [
        "rank 1 failed first (stage 1, step 3, reduce): DataError: data.paths = ['missing']: no such file",
        "  make it first",
        "2 other ranks ended as a consequence of rank 1",
    ]


def test_the_same_error_everywhere_is_told_once(tmp_path: Path) -> None:
    code, lines = failing(tmp_path, {0: "user error", 1: "user error", 2: "user error"})
    assert code == 1 and len(lines) == 3
    assert lines[-1] == "2 other ranks failed with the same error"


def test_a_crash_shows_where(tmp_path: Path) -> None:
    code, lines = failing(tmp_path, {2: "segfault"})
    assert code == 128 + signal.SIGSEGV
    assert lines[0] == "rank 2 failed first (stage 2, step 3, reduce): killed by SIGSEGV (signal 11)"
    assert "Segmentation fault" in lines[1] and any("plain_targets.py" in line for line in lines)


@pytest.mark.parametrize(
    ("kind", "code", "what"),
    [
        ("exit", 4, "ended with exit code 4 and without an exception"),
        ("exit with text", 1, "sys.exit(no more work)"),
        ("end", 1, "ended with exit code 0 while other ranks still needed it"),
    ],
)
def test_a_rank_that_leaves(tmp_path: Path, kind: str, code: int, what: str) -> None:
    found, lines = failing(tmp_path, {0: kind})
    assert (found, lines[0]) == (code, f"rank 0 failed first (stage 0, step 3, reduce): {what}")
    assert lines[-1] == "2 other ranks ended as a consequence of rank 0"


def test_a_target_or_module_that_does_not_exist(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch("tests.faults.missing:f", {}, 2, threads_per_rank=1, preload=()) == 1
    text = capfd.readouterr().err
    assert "failed first: ModuleNotFoundError: No module named 'tests.faults.missing'" in text
    assert "1 other rank failed with the same error" in text
    assert launch(f"{PLAIN}:echo", {}, 2, threads_per_rank=1, preload=("no_such_module",)) == 1
    assert capfd.readouterr().err.startswith("cannot import no_such_module before starting the ranks\nTraceback")


_GROUP = """
import ctypes, os, sys
from trilith_launcher.lifeline import die_with_parent, die_with_writer
os.setpgid(0, 0)
if sys.argv[1] == "writer":
    die_with_writer(int(sys.argv[2]))
for _ in range(2):
    server = os.getpid()
    if os.fork() == 0:
        if sys.argv[1] == "parent":
            die_with_parent(server)
        os.write(1, b"x")
        ctypes.PyDLL(None).sleep(600)
os.write(1, b"x")
ctypes.PyDLL(None).sleep(600)
"""


@pytest.mark.parametrize("means", ["writer", "parent"])
def test_each_lifeline_works_alone(means: str) -> None:
    """A process and its two children hold the interpreter lock in C; stdout closes when the last has gone."""
    read_fd, write_fd = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", _GROUP, means, str(read_fd)],
        pass_fds=(read_fd,),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        os.close(read_fd)
        assert process.stdout is not None
        assert b"".join(process.stdout.read(1) for _ in range(3)) == b"xxx"
        began = time.monotonic()
        if means == "parent":
            process.kill()
        os.close(write_fd)
        assert process.stdout.read() == b""
        assert time.monotonic() - began < 1.0
        assert process.wait() == -signal.SIGKILL
