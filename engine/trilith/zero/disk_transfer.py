"""What a disk store asks of whoever moves its bytes: the seam between slots and threads.

`disk_native` moves them in the threads of csrc/io, `disk_threads` in Python's where the native library is missing.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from torch import Tensor

from trilith.errors import OffloadError
from trilith.zero.disk_file import Moved


class Cause(StrEnum):
    """Why a block failed."""

    MOVED = "moved"  # fewer bytes were moved than the block has
    CHANGED = "changed"  # what was read is not what was written
    SOURCE = "source"  # the write that is read had failed


@dataclass(frozen=True)
class Fault:
    """A block that failed: `size` bytes from byte `start` of its transfer."""

    cause: Cause
    start: int
    size: int
    moved: Moved


class Ticket(Protocol):
    """A transfer under way."""

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""

    @property
    def error(self) -> Exception | None:
        """Of a transfer that has ended badly."""

    def wait(self) -> None:
        """Wait for the end of the transfer; raises its error."""


@dataclass(frozen=True)
class Transfer:
    """All of `tensor` to (`is_write`) or from `offset` of the file; the transfers of one `key` go one after the other.

    `checksums` has one number a block, which a write sets and a read compares; None: neither. `source`: the write that is
    read. `explain` words a fault.
    """

    key: int
    is_write: bool
    tensor: Tensor
    offset: int
    explain: Callable[[Fault], Exception]
    checksums: array[int] | None = None
    source: Ticket | None = None

    @property
    def failpoint(self) -> str:
        """What is passed before each block is moved."""
        return "offload_write" if self.is_write else "offload_read"


class Transfers(Protocol):
    """Moves bytes in background threads, block by block. `bytes_read` and `bytes_written` count what was moved."""

    @property
    def bytes_read(self) -> int:
        """Bytes that reads have brought back."""

    @property
    def bytes_written(self) -> int:
        """Bytes that writes have put away."""

    def submit(self, transfer: Transfer) -> Ticket:
        """Begin a transfer; its tensor lives until it has ended."""

    def wait_all(self) -> None:
        """Wait for all transfers; raises the errors that no `Ticket.wait` has raised."""

    def close(self) -> None:
        """Finish what was begun and end the threads; raises what `wait_all` raises."""


def raise_all(errors: list[Exception]) -> None:
    """Raise one error that tells of all, if there are any."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        lines = [f"{len(errors)} operations failed:", *(f"  {error}" for error in errors)]
        raise OffloadError("\n".join(lines)) from errors[0]
