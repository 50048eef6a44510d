"""Which of several implementations of an op is the fastest on this machine: timed once, remembered in a file of the user.

What wins depends on the device, the library's version and the shapes, so nothing is guessed: the first call of a class of
shapes runs all candidates. Other processes of the user wait for that, and read what it found. A file that cannot be read
or written costs the timing of each process, nothing else.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import filelock
import torch

from trilith.errors import KernelError

_VERSION = 1
_ROUNDS = 7
_PATIENCE_S = 60.0

Run = Callable[[], object]
Candidates = Mapping[str, Run]
Clock = Callable[[Run], float]  # the seconds of a call


class Contest:
    """The winners of one file, by class; read from it once, and whenever a class is new."""

    def __init__(self, path: Path) -> None:
        """`path`: of the JSON file; it need not exist."""
        self._path = path
        self._found: dict[str, dict[str, Any]] = self._read()

    def winner(self, shape_class: str, candidates: Candidates, clock: Clock) -> str:
        """The name of the fastest of the `candidates` for a class of shapes; `clock` gives the seconds of a call.

        A candidate that fails is out. Raises KernelError where all do.
        """
        known = self._known(shape_class, candidates)
        if known is not None:
            return known
        lock = filelock.FileLock(f"{self._path}.lock", timeout=_PATIENCE_S)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except (OSError, filelock.Timeout):
            return self._time(shape_class, candidates, clock)
        try:
            self._found = {**self._found, **self._read()}
            known = self._known(shape_class, candidates)
            if known is None:
                known = self._time(shape_class, candidates, clock)
                self._write()
            return known
        finally:
            lock.release()

    def table(self) -> dict[str, dict[str, Any]]:
        """By class `winner` and `seconds` of each candidate."""
        return dict(self._found)

    def _known(self, shape_class: str, candidates: Candidates) -> str | None:
        """Who won, if these took part."""
        found = self._found.get(shape_class)
        if found is None or set(found["seconds"]) != set(candidates):
            return None
        return str(found["winner"])

    def _time(self, shape_class: str, candidates: Candidates, clock: Clock) -> str:
        seconds: dict[str, float | None] = {}
        problem: Exception | None = None
        for name, run in candidates.items():
            try:
                run()  # compiled, and its memory allocated
                seconds[name] = min(clock(run) for _ in range(_ROUNDS))
            except (RuntimeError, KernelError) as failed:
                seconds[name], problem = None, failed
        times = {name: time for name, time in seconds.items() if time is not None}
        if not times:
            raise KernelError(f"{shape_class}: every implementation failed; the last: {problem}") from problem
        winner = min(times, key=lambda name: times[name])
        self._found[shape_class] = {"winner": winner, "seconds": seconds}
        return winner

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            content = json.loads(self._path.read_text())
            if content["version"] != _VERSION:
                return {}
            return {
                str(name): {"winner": str(row["winner"]), "seconds": dict(row["seconds"])}
                for name, row in content["winners"].items()
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}

    def _write(self) -> None:
        text = json.dumps({"version": _VERSION, "winners": self._found}, indent=1, sort_keys=True)
        try:
            handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        except OSError:
            return
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.replace(name, self._path)
        except OSError:
            Path(name).unlink(missing_ok=True)


def user_cache() -> Path:
    """Where a user's caches lie, by the XDG base directory specification."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if given.startswith("/") else Path.home() / ".cache"
    return base / "trilith"


@cache
def attention_contest() -> Contest:
    """That of attention's implementations, for this user."""
    return Contest(user_cache() / "attention.json")


def cuda_seconds(run: Run) -> float:
    """Seconds of a call on the current CUDA device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
