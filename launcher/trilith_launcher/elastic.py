"""Ranks that somebody else started (torchrun, or a scheduler that sets RANK and WORLD_SIZE)."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trilith_launcher.context import RankContext
from trilith_launcher.failure import ErrorRecord, write_json
from trilith_launcher.lifeline import die_with_parent
from trilith_launcher.rank import find_target, flush_streams

# torch elastic blames the smallest time stamp, in whole seconds, and dates a killed rank when it notices, some 0.1 s
# later. So a rank that lost a peer is dated two seconds ahead, and ends later than the peer it lost.
_VICTIM_AHEAD_S = 2
_VICTIM_DELAY_S = 1.0


@dataclass(frozen=True)
class JoinedRank:
    """What the environment says of this process; `error_file` is where torch elastic wants to read of a failure."""

    rank: int
    world_size: int
    local_rank: int
    error_file: Path | None
    local_world_size: int | None = None


def join_from_environment(environment: Mapping[str, str] = os.environ) -> JoinedRank | None:
    """The rank that torchrun made of this process; None when RANK is not set.

    Raises: ValueError when RANK is set and the rest is missing or makes no sense.
    """
    if "RANK" not in environment:
        return None
    try:
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", "0"))
        local_world_size = int(environment.get("LOCAL_WORLD_SIZE", "0")) or None
    except KeyError as missing:
        raise ValueError(f"RANK is set but {missing.args[0]} is not: set both, or none, or use torchrun") from None
    except ValueError as wrong:
        raise ValueError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {wrong}") from None
    if not 0 <= rank < world_size or local_rank < 0:
        raise ValueError(f"RANK = {rank}, WORLD_SIZE = {world_size}, LOCAL_RANK = {local_rank}: out of range")
    error_file = environment.get("TORCHELASTIC_ERROR_FILE", "")
    return JoinedRank(rank, world_size, local_rank, Path(error_file) if error_file else None, local_world_size)


def run_joined(joined: JoinedRank, target: str, args: Mapping[str, Any]) -> int:
    """Call `target` in this process as `launch` does in its ranks, with `store_path` None (the rendezvous is in the
    environment). Returns 0; a failure ends the process.

    The failure goes to torch elastic's error file, or to stderr where there is none. Ending at once, as the ranks of
    `launch` do, keeps the failed rank from hanging in its communication threads while the others wait for it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun leaves its ranks behind when it is killed.
        die_with_parent(os.getppid())
    context = RankContext(joined.rank)
    try:
        function = find_target(target)
        function(rank=joined.rank, world_size=joined.world_size, store_path=None, context=context, **args)
    except BaseException as exception:
        if isinstance(exception, SystemExit) and exception.code in (None, 0):
            return 0
        record = context.record_failure(exception)
    else:
        return 0
    if joined.error_file is None:
        print(_text(record), file=sys.stderr, flush=True)
    else:
        write_json(joined.error_file, elastic_error(record))
        if record.lost_peer:
            time.sleep(_VICTIM_DELAY_S)
    flush_streams()
    os._exit(record.exit_code)


def elastic_error(record: ErrorRecord) -> dict[str, Any]:
    """A record in the form of torch elastic's error file. torchrun prints the call stack in place of the message, so the
    message, with rank and step, stands there, too."""
    timestamp = record.time_ns // 1_000_000_000 + (_VICTIM_AHEAD_S if record.lost_peer else 0)
    details = {"py_callstack": _text(record), "timestamp": str(timestamp)}
    return {"message": {"message": _headline(record), "extraInfo": details}}


def _headline(record: ErrorRecord) -> str:
    where = str(record.position)
    return f"rank {record.rank}{f' ({where})' if where else ''}: {record.type}: {record.message}"


def _text(record: ErrorRecord) -> str:
    return _headline(record) if record.user_error else f"{_headline(record)}\n{record.traceback.rstrip()}"
