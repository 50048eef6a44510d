"""Where each rank is (stage, step, phase, what it waits for), in a small shared file with one slot a rank.

The positions outlive a rank that was killed, can be read while a rank hangs, and cost no message.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

_SLOT = struct.Struct("<qq48s256s")  # step, stage (-1 = not known), phase and wait in UTF-8


@dataclass(frozen=True)
class Position:
    """Where a rank was last: optimizer step, pipeline stage, phase of the step. None or "" = not reported.

    `wait`: in which action it last began to wait for another rank in that phase, and for what.
    """

    step: int | None = None
    stage: int | None = None
    phase: str = ""
    wait: str = ""

    def __str__(self) -> str:
        stage = "" if self.stage is None else f"stage {self.stage}"
        step = "" if self.step is None else f"step {self.step}"
        return ", ".join(part for part in (stage, step, self.phase) if part)


class PositionBoard:
    """The shared file of positions: `num_ranks` slots, each written by its rank and read by the launcher."""

    def __init__(self, path: Path, num_ranks: int) -> None:
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), num_ranks * _SLOT.size)
        self._num_ranks = num_ranks

    @staticmethod
    def create(path: Path, num_ranks: int) -> PositionBoard:
        """Make the file at `path` with every position unknown."""
        path.write_bytes(_SLOT.pack(-1, -1, b"", b"") * num_ranks)
        return PositionBoard(path, num_ranks)

    def write(self, rank: int, position: Position) -> None:
        """Store the position of `rank`."""
        step = -1 if position.step is None else position.step
        stage = -1 if position.stage is None else position.stage
        texts = (position.phase.encode(), position.wait.encode())
        _SLOT.pack_into(self._memory, rank * _SLOT.size, step, stage, *texts)

    def read(self, rank: int) -> Position:
        """The last position that `rank` stored."""
        step, stage, phase, wait = _SLOT.unpack_from(self._memory, rank * _SLOT.size)
        return Position(
            step=None if step < 0 else step,
            stage=None if stage < 0 else stage,
            phase=_text(phase),
            wait=_text(wait),
        )

    def read_all(self) -> tuple[Position, ...]:
        """The last position of every rank, in rank order."""
        return tuple(self.read(rank) for rank in range(self._num_ranks))


def _text(stored: bytes) -> str:
    return stored.rstrip(b"\0").decode(errors="replace")
