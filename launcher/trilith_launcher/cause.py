"""Finds the rank that failed first among all that ended, and words the report the user sees last."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trilith_launcher.failure import ErrorRecord
from trilith_launcher.position import Position

# A killed rank is noticed later than it died: on a busy machine its peers may raise before it is reaped.
_REAPING_CREDIT_NS = 100_000_000
# Python code does not end by these: somebody sent them.
_OUTSIDE_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_SIGNAL_HINTS = ((signal.SIGKILL, "; often the out-of-memory killer"),)


@dataclass(frozen=True)
class Ended:
    """How one rank's process ended: `returncode` as subprocess has it (-9 = killed by signal 9), when it was noticed,
    and when the launcher had sent the rank a signal (None = it had not)."""

    rank: int
    returncode: int
    monotonic_ns: int
    signalled_ns: int | None = None


@dataclass(frozen=True)
class Cause:
    """The rank that failed first: what happened, where, the text below the headline, the exit code of the whole run."""

    rank: int
    what: str
    position: Position
    details: str
    exit_code: int

    def headline(self) -> str:
        """`rank 5 failed first (stage 1, step 12): ValueError: ...`"""
        where = str(self.position)
        return f"rank {self.rank} failed first{f' ({where})' if where else ''}: {self.what}"


def signal_name(number: int) -> str:
    """SIGKILL for 9; real-time signals by number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _severity(ended: Ended, record: ErrorRecord | None) -> tuple[int, int]:
    """The order of suspicion, (class, time): the smallest is the cause.

    Class 0: an error of the rank's own, an exit code, a signal from outside or a crash; the earliest is the cause,
    since what follows from a failure comes after it. Class 1: SIGABRT, by which communication libraries also end a
    rank whose peer has gone. Class 2: lost peers. Class 3: what happened after the launcher began to end the ranks.
    """
    when = ended.monotonic_ns if record is None else record.monotonic_ns
    if ended.signalled_ns is not None and when >= ended.signalled_ns:
        return 3, when
    if record is not None:
        return (2 if record.lost_peer else 0), when
    if -ended.returncode in _OUTSIDE_SIGNALS:
        return 0, when - _REAPING_CREDIT_NS
    return (1 if -ended.returncode == signal.SIGABRT else 0), when


def choose_cause(
    ends: Sequence[Ended],
    records: Mapping[int, ErrorRecord],
    positions: Sequence[Position],
    crash_dumps: Mapping[int, str],
) -> Cause | None:
    """The failure that the others follow from; None when every rank ended well.

    Args: `ends` of all ranks; `records` and `crash_dumps` (faulthandler's text) by rank where there are any; the last
    reported position of every rank.
    """
    bad = [ended for ended in ends if ended.returncode != 0]
    if not bad:
        return None
    ended = min(bad, key=lambda end: (_severity(end, records.get(end.rank)), end.rank))
    record = records.get(ended.rank)
    if record is not None and record.lost_peer:
        hidden = _hidden_cause(ends, record, records, positions)
        if hidden is not None:
            return hidden
    if record is not None:
        return _recorded_cause(record)
    position = positions[ended.rank]
    if ended.returncode > 0:
        what = f"ended with exit code {ended.returncode} and without an exception"
        return Cause(ended.rank, what, position, "", ended.returncode)
    number = -ended.returncode
    hint = "".join(text for known, text in _SIGNAL_HINTS if known == number)
    what = f"killed by {signal_name(number)} (signal {number}{hint})"
    return Cause(ended.rank, what, position, crash_dumps.get(ended.rank, ""), 128 + number)


def _recorded_cause(record: ErrorRecord) -> Cause:
    """A rank's own account. What the rank meant to say (an error of the user's, sys.exit) comes without a traceback."""
    if record.type == "SystemExit":
        return Cause(record.rank, f"sys.exit({record.message})", record.position, "", record.exit_code)
    what = f"{record.type}: {record.message}" if record.message else record.type
    if record.user_error:
        return Cause(record.rank, what, record.position, "", record.exit_code)
    return Cause(record.rank, what.splitlines()[0], record.position, record.traceback, record.exit_code)


def _hidden_cause(
    ends: Sequence[Ended],
    victim: ErrorRecord,
    records: Mapping[int, ErrorRecord],
    positions: Sequence[Position],
) -> Cause | None:
    """Where all that is known is lost peers, `victim` the earliest: the rank they lost, if it gave itself away.

    It either reacted to nothing but SIGKILL, or had left with exit code 0 before, or, after a timeout, was not
    waiting for anybody, so that the end of the others did not end it; of several such, the one furthest behind.
    """
    stuck = [end for end in ends if end.returncode == -signal.SIGKILL and end.rank not in records]
    early = [end for end in ends if end.returncode == 0 and end.monotonic_ns < victim.monotonic_ns + _REAPING_CREDIT_NS]
    timed_out = "timed out" in victim.message.lower() or "timeout" in victim.message.lower()
    busy = [end for end in ends if timed_out and end.returncode == -signal.SIGTERM and end.rank not in records]
    for suspects, what in (
        (stuck, "did not answer, and ended only by SIGKILL: it was stopped, or stuck in the kernel"),
        (early, "ended with exit code 0 while other ranks still needed it"),
        (busy, "did not answer its peers in time"),
    ):
        if suspects:
            rank = min(suspects, key=lambda end: (positions[end.rank].step or 0, end.monotonic_ns)).rank
            noticed = f"rank {victim.rank} noticed ({victim.position}): {victim.type}: {victim.message}"
            return Cause(rank, what, positions[rank], noticed, 1)
    return None


def _ranks(count: int) -> str:
    return f"{count} other rank{'s' if count != 1 else ''}"


def _aftermath(
    cause: Cause, ends: Sequence[Ended], records: Mapping[int, ErrorRecord], positions: Sequence[Position]
) -> tuple[str, ...]:
    """Where each rank stood that ended because of the cause, as far as it is known; then a line about all others."""
    others = [ended for ended in ends if ended.rank != cause.rank]
    well = [ended for ended in others if ended.returncode == 0]
    own = records.get(cause.rank)
    same = [
        ended
        for ended in others
        if own is not None
        and (other := records.get(ended.rank)) is not None
        and (other.type, other.message) == (own.type, own.message)
        and not own.lost_peer
    ]
    rest = sorted(ended.rank for ended in others if ended not in well and ended not in same)
    places = (_place(rank, records.get(rank), positions[rank]) for rank in rest)
    parts = (
        f"{_ranks(len(same))} failed with the same error" if same else "",
        f"{_ranks(len(rest))} ended as a consequence of rank {cause.rank}" if rest else "",
        f"{_ranks(len(well))} had ended normally" if well else "",
    )
    return (*places, "; ".join(part for part in parts if part))


def _place(rank: int, record: ErrorRecord | None, position: Position) -> str:
    """Where a rank was when it lost another one: what its exception notes, or where it last waited; "" if not known."""
    if record is not None:
        text = "; ".join(record.notes)
    else:
        text = f"last waited in {position.wait}" if position.wait else ""
    where = str(position)
    return text and f"rank {rank}{f' ({where})' if where else ''}: {text}"


def word_report(
    cause: Cause, ends: Sequence[Ended], records: Mapping[int, ErrorRecord], positions: Sequence[Position]
) -> str:
    """The report: headline, traceback or crash dump, where the other ranks stood, and how many they were in a line."""
    parts = (cause.headline(), cause.details.rstrip("\n"), *_aftermath(cause, ends, records, positions))
    return "\n".join(part for part in parts if part)
