"""Transfers in Python's own threads: what `disk_native` does, where the native library was not built."""

from __future__ import annotations

import ctypes
import threading

import xxhash

from trilith.failpoints import Failpoints
from trilith.zero.disk_file import BlockFile, Moved
from trilith.zero.disk_queue import BlockQueue
from trilith.zero.disk_transfer import Cause, Fault, Ticket, Transfer


class ThreadTransfers:
    """Transfers to and from `file` in blocks of `block_bytes` (see `disk_transfer.Transfers`)."""

    def __init__(
        self, file: BlockFile, threads: int, queue_depth: int, block_bytes: int, name: str, failpoints: Failpoints
    ) -> None:
        self._file, self._block_bytes, self._failpoints = file, block_bytes, failpoints
        self._lock = threading.Lock()
        self.bytes_read = self.bytes_written = 0
        # A thread has one block under way, so more threads than queue_depth would only wait.
        self._queue = BlockQueue(min(threads, queue_depth), name)

    def submit(self, transfer: Transfer) -> Ticket:
        """Begin a transfer; its tensor lives until it has ended."""

        def run(index: int) -> None:
            self._move_block(transfer, index)

        return self._queue.submit(str(transfer.key), -(-transfer.tensor.nbytes // self._block_bytes), run)

    def wait_all(self) -> None:
        """Wait for all transfers; raises the errors that no `Ticket.wait` has raised."""
        self._queue.wait_all()

    def close(self) -> None:
        """Finish what was begun and end the threads; raises what `wait_all` raises."""
        self._queue.close()

    def _move_block(self, transfer: Transfer, index: int) -> None:
        start = index * self._block_bytes
        size = min(self._block_bytes, transfer.tensor.nbytes - start)
        address, sums = transfer.tensor.data_ptr() + start, transfer.checksums
        if transfer.source is not None and transfer.source.error is not None:
            raise transfer.explain(Fault(Cause.SOURCE, start, size, Moved(0, 0))) from transfer.source.error
        if transfer.is_write and sums is not None:
            sums[index] = _checksum(address, size)
        try:
            self._failpoints.hit(transfer.failpoint)
            move = self._file.write if transfer.is_write else self._file.read
            moved = move(address, size, transfer.offset + start)
        except OSError as error:
            moved = Moved(0, error.errno or 0)
        if moved.num_bytes < size:
            raise transfer.explain(Fault(Cause.MOVED, start, size, moved))
        if not transfer.is_write and sums is not None and _checksum(address, size) != sums[index]:
            raise transfer.explain(Fault(Cause.CHANGED, start, size, moved))
        with self._lock:
            if transfer.is_write:
                self.bytes_written += size
            else:
                self.bytes_read += size


def _checksum(address: int, num_bytes: int) -> int:
    return xxhash.xxh3_64_intdigest((ctypes.c_char * num_bytes).from_address(address))
