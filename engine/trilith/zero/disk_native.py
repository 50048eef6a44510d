"""Transfers in the threads of csrc/io, which never wait for Python's lock.

A block of Python's own threads takes the interpreter's lock several times, and waits for it up to its switch interval
(5 ms) while training runs Python. And they have as many blocks under way as there are of them, where these keep
`queue_depth` blocks under way.
"""

from __future__ import annotations

import threading
from itertools import count
from types import ModuleType
from typing import Any

from torch import Tensor

from trilith.failpoints import Failpoints
from trilith.zero.disk_file import BlockFile, Moved
from trilith.zero.disk_transfer import Cause, Fault, Transfer, raise_all

_READ, _WRITE = 0, 1  # codes of csrc/io/queue.h
_CAUSES = (None, Cause.MOVED, Cause.CHANGED, Cause.SOURCE, Cause.MOVED)  # the last is the gate's
_INJECTED = -1


class NativeTicket:
    """A transfer under way; made by `NativeTransfers.submit`."""

    def __init__(self, transfers: NativeTransfers, transfer: Transfer, operation: Any, number: int) -> None:
        self.operation, self.number = operation, number
        self.explain, self.source = transfer.explain, transfer.source  # not the tensor, which goes when it is done
        self._transfers = transfers
        self._error: Exception | None = None

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._transfers.is_done(self)

    @property
    def error(self) -> Exception | None:
        """Of a transfer that has ended badly."""
        if self._error is None:
            self._error = self._transfers.error_of(self)
        return self._error

    def wait(self) -> None:
        """Wait for the end of the transfer; raises its error."""
        self._transfers.wait(self)
        if self.error is not None:
            raise self.error


class NativeTransfers:
    """Transfers to and from `file` in blocks of `block_bytes` (see `disk_transfer.Transfers`).

    `queue_depth` blocks are under way at once; `threads` of them may be copied or checked at a time.
    """

    def __init__(
        self,
        library: ModuleType,
        file: BlockFile,
        threads: int,
        queue_depth: int,
        block_bytes: int,
        name: str,
        failpoints: Failpoints,
    ) -> None:
        is_armed = failpoints.is_armed("offload_read") or failpoints.is_armed("offload_write")
        self._failpoints = failpoints
        self._file = file.native(library)
        self._queue = library.io.IoQueue(queue_depth, threads, block_bytes, name, self._gate if is_armed else None)
        self._lock = threading.Lock()
        self._numbers = count()
        self._pending: dict[
            int, tuple[NativeTicket, Tensor]
        ] = {}  # not seen to have ended, or with errors to be raised
        self._injected: dict[int, Exception] = {}

    @property
    def bytes_read(self) -> int:
        """Bytes that reads have brought back."""
        return int(self._queue.bytes_read)

    @property
    def bytes_written(self) -> int:
        """Bytes that writes have put away."""
        return int(self._queue.bytes_written)

    def submit(self, transfer: Transfer) -> NativeTicket:
        """Begin a transfer; its tensor lives until it has ended."""
        self._forget_done()
        number, tensor, source = next(self._numbers), transfer.tensor, transfer.source
        assert source is None or isinstance(source, NativeTicket)
        operation = self._queue.submit(
            _WRITE if transfer.is_write else _READ,
            self._file,
            tensor.data_ptr(),
            tensor.nbytes,
            transfer.offset,
            transfer.key,
            0 if transfer.checksums is None else transfer.checksums.buffer_info()[0],
            None if source is None else source.operation,
            number,
        )
        ticket = NativeTicket(self, transfer, operation, number)
        self._pending[number] = ticket, tensor
        return ticket

    def is_done(self, ticket: NativeTicket) -> bool:
        """Whether the transfer of `ticket` has ended."""
        return bool(self._queue.is_done(ticket.operation))

    def wait(self, ticket: NativeTicket) -> None:
        """Wait for the end of the transfer of `ticket`, whose error its caller raises."""
        self._queue.wait(ticket.operation)
        self._pending.pop(ticket.number, None)

    def wait_all(self) -> None:
        """Wait for all transfers; raises the errors that no `Ticket.wait` has raised."""
        self._queue.wait_all()
        pending, self._pending = self._pending, {}
        raise_all([ticket.error for ticket, _ in pending.values() if ticket.error is not None])

    def close(self) -> None:
        """Finish what was begun and end the threads; raises what `wait_all` raises."""
        try:
            self.wait_all()
        finally:
            self._queue.stop()

    def error_of(self, ticket: NativeTicket) -> Exception | None:
        """The error of a transfer, None while it is under way."""
        cause, start, size, num_bytes, number, _ = self._queue.fault(ticket.operation)
        if not cause or not self.is_done(ticket):
            return None
        if number == _INJECTED:
            return self._injected[ticket.number]
        found = _CAUSES[cause]
        assert found is not None
        error = ticket.explain(Fault(found, start, size, Moved(num_bytes, number)))
        if ticket.source is not None and found is Cause.SOURCE:
            error.__cause__ = ticket.source.error
        return error

    def _forget_done(self) -> None:
        """Let go of the tensors of transfers that have ended well."""
        for number, (ticket, _) in list(self._pending.items()):
            if ticket.is_done and ticket.error is None:
                del self._pending[number]

    def _gate(self, kind: int, number: int) -> int:
        """Pass the failpoint of a block, in its thread; returns an errno."""
        try:
            self._failpoints.hit("offload_write" if kind == _WRITE else "offload_read")
        except OSError as error:
            return error.errno or _INJECTED
        except Exception as error:
            with self._lock:
                self._injected.setdefault(number, error)
            return _INJECTED
        return 0
