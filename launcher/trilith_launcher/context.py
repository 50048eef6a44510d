"""What the target of a rank is given to talk to its launcher: it reports where the rank is, and why it fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trilith_launcher.failure import ErrorRecord, describe_exception, write_record
from trilith_launcher.position import Position, PositionBoard


class RankContext:
    """Passed to a rank's target as `context`. Without a board and a path (one process, a test) it only remembers."""

    def __init__(self, rank: int, board: PositionBoard | None = None, error_path: Path | None = None) -> None:
        self.rank = rank
        self.last_position = Position()
        self._board = board
        self._error_path = error_path
        self._record: ErrorRecord | None = None

    def position(self, step: int | None = None, stage: int | None = None, phase: str | None = None) -> None:
        """Report the optimizer step, pipeline stage or phase ("forward") that begins; what is left out stays as it was.

        Costs a few microseconds and no message; the launcher reads it when the rank fails, is killed, or is
        interrupted. What the rank waited for is forgotten.
        """
        last = self.last_position
        self._store(
            Position(
                last.step if step is None else step,
                last.stage if stage is None else stage,
                last.phase if phase is None else phase,
            )
        )

    def wait(self, text: str) -> None:
        """Report that the rank begins to wait for another one: in which action, and for what, in words.

        Costs a few microseconds. The launcher tells it of every rank that had to end because another one did.
        """
        self._store(replace(self.last_position, wait=text))

    def _store(self, position: Position) -> None:
        self.last_position = position
        if self._board is not None:
            self._board.write(self.rank, position)

    def record_failure(self, exception: BaseException) -> ErrorRecord:
        """Write down why this rank fails; the first call counts, later ones return its record.

        The launcher calls it for an exception that leaves the target. A target that tears down its process groups
        itself calls it before, so that the cause is on disk before any other rank can notice.
        """
        if self._record is None:
            self._record = describe_exception(exception, self.rank, self.last_position)
            if self._error_path is not None:
                write_record(self._error_path, self._record)
        return self._record
