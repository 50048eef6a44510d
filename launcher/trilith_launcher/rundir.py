"""The private temporary directory of one launch: job, rendezvous store, positions, error files; gone when the run ends.

A launching process that is SIGKILLed cannot clean up, so every launch removes the directories of dead owners. An
owner is dead when its process is gone and its lock is free; the lock also tells processes apart that share a disk,
but not their process numbers (containers).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "trilith-run-"


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside the directory of one launch."""

    root: Path

    @property
    def job(self) -> Path:
        """What the fork server shall do, as JSON."""
        return self.root / "job.json"

    @property
    def store(self) -> Path:
        """The file of torch's FileStore, over which the ranks find each other."""
        return self.root / "store"

    @property
    def positions(self) -> Path:
        """The shared file of PositionBoard."""
        return self.root / "positions"

    @property
    def lock(self) -> Path:
        """Locked by the launching process as long as it lives."""
        return self.root / "lock"

    def error(self, rank: int) -> Path:
        """Where a rank writes its ErrorRecord."""
        return self.root / f"error-{rank}.json"

    def crash(self, rank: int) -> Path:
        """Where faulthandler writes when a rank crashes."""
        return self.root / f"crash-{rank}.txt"


@contextmanager
def run_directory() -> Iterator[RunDirectory]:
    """Make a directory that only this user can enter (mode 0700), and remove it with all that is in it at the end."""
    parent = Path(tempfile.gettempdir())
    remove_stale(parent)
    directory = RunDirectory(Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent)))
    try:
        with open(directory.lock, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield directory
    finally:
        shutil.rmtree(directory.root, ignore_errors=True)


def remove_stale(parent: Path) -> None:
    """Remove the run directories under `parent` that belong to this user and whose owners are dead."""
    for path in parent.glob(f"{_PREFIX}*-*"):
        # Another launch may remove it at the same time.
        with suppress(OSError):
            if path.lstat().st_uid == os.getuid() and not path.is_symlink() and not _has_owner(path):
                shutil.rmtree(path, ignore_errors=True)


def _has_owner(path: Path) -> bool:
    pid = path.name.removeprefix(_PREFIX).partition("-")[0]
    if not pid.isdigit() or Path("/proc", pid).exists():
        return True
    try:
        with open(path / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
