"""Targets of ranks that need no torch, so that they start in a tenth of a second."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from trilith.errors import DataError
from trilith_launcher import RankContext


def echo(*, rank: int, world_size: int, context: RankContext, status: str, **others: Any) -> None:
    """Write what the rank was given, and what its standard input, arguments and environment are."""
    facts = {
        "world_size": world_size,
        "others": sorted(others),
        "context": context.rank,
        "stdin": sys.stdin.read(),
        "environment": dict(os.environ),
        "store_folder_mode": oct(Path(others["store_path"]).parent.stat().st_mode & 0o777),
        "sigint_ignored": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
    }
    Path(status, f"echo-{rank}").write_text(json.dumps(facts))
    print(f"rank {rank} speaks")


def sleep(*, rank: int, status: str, context: RankContext, deaf: bool = False, **_: Any) -> None:
    """Report step 7 and sleep; rank 0 starts a process of its own; `deaf` ranks ignore SIGTERM."""
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if rank == 0:
        subprocess.Popen(["sleep", "600"])
    context.position(step=7, stage=0)
    Path(status, f"ready-{rank}").write_text(str(os.getpid()))
    time.sleep(600)


def fail(*, rank: int, kinds: dict[str, str], context: RankContext, **_: Any) -> None:
    """Fail as `kinds[rank]` says, by default as a rank does that waits for the others and loses them."""
    context.position(step=3, stage=rank, phase="reduce")
    kind = kinds.get(str(rank), "lose a peer")
    if kind == "user error":
        raise DataError("data.paths = ['missing']: no such file\n  make it first")
    if kind == "segfault":
        ctypes.memset(1, 0, 1)
    if kind == "exit":
        os._exit(4)
    if kind == "exit with text":
        sys.exit("no more work")
    if kind == "end":
        return
    time.sleep(0.1)
    raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:19622")
