"""What a failing rank writes down about itself: its own error file, before any other rank can notice that it is gone.

Whoever only watches exit codes names the wrong rank: the first process to end is often a victim, whose collective broke
because its peer had gone. So each rank says what happened to it and whether it merely lost a peer.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from trilith_launcher.position import Position

# What gloo, NCCL and torch's stores say when a peer has gone or does not answer, in lower case.
LOST_PEER_TEXTS = (
    "connection closed by peer",
    "connection reset by peer",
    "application timeout caused pair closure",
    "timed out waiting",
    "wait timeout",
    "timeout waiting for key",
    "socket timeout",
    "connect timeout",
    "broken pipe",
    "connection refused",
    "failed to recv, got 0 bytes",
    "gloo connectfullmesh failed",
    "monitoredbarrier",
    "ncclremoteerror",
    "remote process exited or there was a network error",
    "nccl communicator was aborted",
    "watchdog caught collective operation timeout",
)
# torch's own exceptions of the network and of the rendezvous store; a store says so when a key never comes.
LOST_PEER_TYPES = ("DistNetworkError", "DistStoreError")
# Only torch's errors can be lost peers: a ConnectionError of a data reader is that rank's own.
PEER_ERROR_TYPES = ("RuntimeError", "DistError", "DistBackendError", *LOST_PEER_TYPES)


@dataclass(frozen=True)
class ErrorRecord:
    """One rank's account of its failure. `time_ns` is the wall clock, `monotonic_ns` orders the ranks of one machine.

    `notes`: what code on the exception's way out added to it (`BaseException.add_note`).
    """

    rank: int
    time_ns: int
    monotonic_ns: int
    type: str
    message: str
    traceback: str
    stage: int | None
    step: int | None
    phase: str
    lost_peer: bool
    user_error: bool
    exit_code: int
    notes: tuple[str, ...] = ()

    @property
    def position(self) -> Position:
        """Where the rank was."""
        return Position(self.step, self.stage, self.phase)


def _chain(exception: BaseException) -> Iterator[BaseException]:
    """The exception, then what it was raised from or while handling, back to the first."""
    seen: set[int] = set()
    current: BaseException | None = exception
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def is_lost_peer(exception: BaseException) -> bool:
    """Whether an exception only says that another rank has gone or does not answer.

    The first exception of its chain decides: an error wrapped around a lost peer is a lost peer, and a lost peer met
    while cleaning up after an error of one's own is not.
    """
    *_, first = _chain(exception)
    name = type(first).__name__
    if name in LOST_PEER_TYPES:
        return True
    text = str(first).lower()
    return name in PEER_ERROR_TYPES and any(pattern in text for pattern in LOST_PEER_TEXTS)


def exit_code_of(exception: BaseException) -> int:
    """The exit code an exception asks for: that of a SystemExit as Python defines it, else 1."""
    if not isinstance(exception, SystemExit):
        return 1
    if exception.code is None:
        return 0
    return exception.code & 0xFF if isinstance(exception.code, int) else 1


def describe_exception(exception: BaseException, rank: int, position: Position) -> ErrorRecord:
    """The record of an exception that ends `rank`, dated now.

    An exception with a class named TrilithError among its bases is the user's to mend; known by name, because the
    launcher imports nothing of the engine.
    """
    return ErrorRecord(
        rank=rank,
        time_ns=time.time_ns(),
        monotonic_ns=time.monotonic_ns(),
        type=type(exception).__name__,
        message=str(exception),
        traceback="".join(traceback.format_exception(exception)),
        stage=position.stage,
        step=position.step,
        phase=position.phase,
        lost_peer=is_lost_peer(exception),
        user_error=any(base.__name__ == "TrilithError" for base in type(exception).__mro__),
        exit_code=exit_code_of(exception),
        notes=tuple(getattr(exception, "__notes__", ())),
    )


def write_record(path: Path, record: ErrorRecord) -> None:
    """Write a record as JSON; the file appears whole or not at all."""
    write_json(path, asdict(record))


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON under a temporary name, then rename."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def read_record(path: Path) -> ErrorRecord | None:
    """The record at `path`, or None where the rank wrote none."""
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return ErrorRecord(**{**fields, "notes": tuple(fields["notes"])})
