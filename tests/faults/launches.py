"""Starts a launching process for a test, finds every process of its run, and sees that all end in time."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
GONE_S = 2.0
_DRIVER = """
import json, signal, sys
from trilith_launcher import launch
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored, and the tests send it
code = launch(**json.loads(sys.argv[1]))
assert "torch" not in sys.modules
sys.exit(code)
"""


class Launch:
    """One launching process in a session of its own, with its own directory for temporary files."""

    def __init__(self, folder: Path, target: str, num_ranks: int, preload: tuple[str, ...], args: Any) -> None:
        self.run_id = f"test-{secrets.token_hex(8)}"
        self.status, self.temporary = folder / "status", folder / "temporary"
        self.status.mkdir()
        self.temporary.mkdir()
        self._stdout, self._stderr = folder / "stdout", folder / "stderr"
        job = {
            "target": target,
            "args": {"status": str(self.status), **args},
            "num_ranks": num_ranks,
            "threads_per_rank": 1,
            "preload": preload,
            "run_id": self.run_id,
        }
        paths = [str(ROOT / "engine"), str(ROOT / "launcher"), str(ROOT), str(folder)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(self.temporary)}
        with open(self._stdout, "w") as stdout, open(self._stderr, "w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _DRIVER, json.dumps(job)],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=environment,
                start_new_session=True,
            )

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Poll until `condition` holds; fails when the launching process ends before, or after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"ended early:\n{self.stderr}"
            assert time.monotonic() < deadline, f"nothing happened in {timeout_s} s:\n{self.stderr}"
            time.sleep(0.01)

    def wait_for_files(self, *names: str) -> None:
        """Poll until the ranks have written the files `names`."""
        self.wait_until(lambda: all((self.status / name).exists() for name in names))

    def rank_pid(self, rank: int) -> int:
        """The process number of a rank, as it wrote it after its first step."""
        return int((self.status / f"ready-{rank}").read_text())

    def processes(self) -> list[psutil.Process]:
        """All living processes of this run: the launching one, the fork server, the ranks, and what they started."""
        found = []
        for process in psutil.process_iter():
            # Processes end while we look.
            with suppress(psutil.Error):
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if process.environ().get("TRILITH_RUN_ID") == self.run_id or process.pid == self.process.pid:
                    found.append(process)
        return found

    def server(self) -> psutil.Process:
        """The fork server: the one child of the launching process."""
        (server,) = psutil.Process(self.process.pid).children()
        return server

    def assert_all_gone(self, since: float) -> None:
        """Fails unless every process of the run has ended 2 s after the time `since` (monotonic)."""
        while True:
            self.process.poll()
            left = self.processes()
            if not left:
                return
            assert time.monotonic() - since < GONE_S, f"left after {GONE_S} s: {left}\n{self.stderr}"
            time.sleep(0.02)

    def finish(self, since: float) -> int:
        """The exit code, after seeing that no process is left 2 s after `since` and no temporary file at all."""
        self.assert_all_gone(since)
        assert list(self.temporary.iterdir()) == []
        return self.process.wait(timeout=1)

    @property
    def stderr(self) -> str:
        """What the run has written on stderr."""
        return self._stderr.read_text()

    @property
    def stdout(self) -> str:
        """What the run has written on stdout."""
        return self._stdout.read_text()


@contextmanager
def launched(folder: Path, target: str, num_ranks: int, preload: tuple[str, ...], **args: Any) -> Iterator[Launch]:
    """A Launch whose processes are all killed at the end, whatever the test finds."""
    launch = Launch(folder, target, num_ranks, preload, args)
    try:
        yield launch
    finally:
        for process in launch.processes():
            with suppress(psutil.Error):
                process.kill()
        launch.process.wait(timeout=10)
