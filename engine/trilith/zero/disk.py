"""Bytes of tensors on a local disk: the NVMe tier of offload (ZeRO-Infinity, Rajbhandari et al. 2021, section 6.3).

Pure storage: a key has a slot of fixed size in one nameless file per rank, reads and writes of slots go on in
background threads. Which bytes, and when they must be back, others know.
"""

from __future__ import annotations

import ctypes
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

import xxhash
from torch import Tensor

from trilith.errors import OffloadError
from trilith.failpoints import Failpoints
from trilith.zero.disk_file import MAX_BLOCK_BYTES, BlockFile, Moved, disk_budget, reason, round_up
from trilith.zero.disk_queue import BlockQueue, Ticket

__all__ = ["DiskStore", "Ticket", "disk_budget"]


@dataclass
class _Slot:
    """The place of a key: `num_bytes` from `offset`. `hashes` are those of its blocks as they were last written."""

    key: str
    offset: int
    num_bytes: int
    hashes: list[int]
    last_write: Ticket | None = field(default=None)


class DiskStore:
    """Slots for tensors, by key, in a file of `rank` in `directory` that vanishes with the process.

    Blocks of `block_bytes` (rounded up to a multiple of 4096) move in `threads` threads, at most `queue_depth` of them at
    once. With `checksum`, what a read brings back is compared with what was written. `capacity_bytes` limits the file.
    Made after a fork, not before. Raises OffloadError if `directory` cannot hold a file.
    """

    def __init__(
        self,
        directory: str | Path,
        rank: int,
        *,
        threads: int,
        block_bytes: int,
        queue_depth: int,
        checksum: bool,
        capacity_bytes: int | None = None,
        failpoints: Failpoints | None = None,
    ) -> None:
        assert threads >= 1 and queue_depth >= 1 and block_bytes >= 1, (threads, queue_depth, block_bytes)
        self._directory, self._rank = Path(directory), rank
        self._block_bytes = min(round_up(block_bytes), MAX_BLOCK_BYTES)
        self._checksum, self._capacity_bytes = checksum, capacity_bytes
        self._failpoints = failpoints or Failpoints()
        self._slots: dict[str, _Slot] = {}
        self._lock = threading.Lock()
        self._bytes_read = self._bytes_written = self._bytes_reserved = 0
        self._process, self._is_closed = os.getpid(), False
        self._file = BlockFile(directory, rank, self._block_bytes)
        # A thread has one block under way, so more threads than queue_depth would only wait.
        self._queue = BlockQueue(min(threads, queue_depth), f"trilith-offload-rank{rank}")

    @property
    def bytes_read(self) -> int:
        """Bytes that reads have brought back."""
        return self._bytes_read

    @property
    def bytes_written(self) -> int:
        """Bytes that writes have put away."""
        return self._bytes_written

    @property
    def bytes_reserved(self) -> int:
        """Bytes of the disk that the slots take, each rounded up to a multiple of 4096."""
        return self._bytes_reserved

    def reserve(self, key: str, num_bytes: int) -> None:
        """Take a slot of `num_bytes` on the disk for `key`, once per key; raises OffloadError if it has no room.

        The disk gives its blocks now, so that a full one ends a run at its start.
        """
        self._assert_open()
        assert num_bytes >= 0 and key not in self._slots, (key, num_bytes)
        offset, end = self._bytes_reserved, self._bytes_reserved + round_up(num_bytes)
        what = f"{self._place()}: cannot reserve {num_bytes} bytes for {key!r}"
        if self._capacity_bytes is not None and end > self._capacity_bytes:
            raise OffloadError(
                f"{what}: {offset} of the capacity of {self._capacity_bytes} bytes are taken. Offload less, or raise it"
            )
        try:
            self._failpoints.hit("offload_reserve")
            number = self._file.allocate(end)
        except OSError as error:
            number = error.errno or 0
        if number:
            free = self._file.free_bytes()
            raise OffloadError(f"{what}: {offset} bytes are reserved, {free} free: {reason(number)}")
        self._slots[key] = _Slot(key, offset, num_bytes, [0] * -(-num_bytes // self._block_bytes))
        self._bytes_reserved = end

    def write(self, key: str, tensor: Tensor) -> Ticket:
        """Begin to write `tensor`, contiguous, on the CPU and of the reserved size, after earlier operations of `key`.

        It must not change before the ticket's wait, which raises OffloadError if the disk does not take it.
        """
        slot, address = self._slot(key, tensor), tensor.data_ptr()

        def run(index: int, tensor: Tensor = tensor) -> None:  # the default keeps the memory alive
            self._write_block(slot, address, index)

        slot.last_write = self._queue.submit(key, len(slot.hashes), run)
        return slot.last_write

    def read(self, key: str, tensor: Tensor) -> Ticket:
        """Begin to read what `key` was last written into `tensor`, contiguous, on the CPU and of the reserved size.

        It holds nothing sure before the ticket's wait, which raises OffloadError if the bytes are not to be had, or not
        those that were written.
        """
        slot, address = self._slot(key, tensor), tensor.data_ptr()
        write = slot.last_write
        assert write is not None, f"{key!r} is read before it is written"

        def run(index: int, tensor: Tensor = tensor) -> None:
            self._read_block(slot, write, address, index)

        return self._queue.submit(key, len(slot.hashes), run)

    def wait_all(self) -> None:
        """Wait for all operations; raises the errors of those that nobody waited for."""
        self._assert_open()
        self._queue.wait_all()

    def close(self) -> None:
        """Finish what was begun, end the threads, let the file go; raises the errors of operations nobody waited for.

        May be called again, then does nothing.
        """
        if self._is_closed:
            return
        self._assert_open()
        try:
            self._queue.close()
        except Exception:
            self._let_go()
            raise
        self._let_go()  # not after Ctrl-C: a thread may still be using the file

    def _let_go(self) -> None:
        self._is_closed = True
        self._file.close()

    def _assert_open(self) -> None:
        assert os.getpid() == self._process, "a DiskStore does not outlive a fork: its threads stay behind"
        assert not self._is_closed, "the store is closed"

    def _slot(self, key: str, tensor: Tensor) -> _Slot:
        self._assert_open()
        slot = self._slots[key]
        assert tensor.device.type == "cpu" and tensor.is_contiguous(), (key, tensor.device, tensor.stride())
        assert tensor.nbytes == slot.num_bytes, (key, tensor.nbytes, slot.num_bytes)
        return slot

    def _extent(self, slot: _Slot, index: int) -> tuple[int, int]:
        """(start in the slot, bytes) of a block."""
        start = index * self._block_bytes
        return start, min(self._block_bytes, slot.num_bytes - start)

    def _write_block(self, slot: _Slot, address: int, index: int) -> None:
        start, size = self._extent(slot, index)
        if self._checksum:
            slot.hashes[index] = _hash(address + start, size)
        try:
            self._failpoints.hit("offload_write")
            moved = self._file.write(address + start, size, slot.offset + start)
        except OSError as error:
            moved = Moved(0, error.errno or 0)
        if moved.num_bytes < size:
            raise self._failure("write", slot, start, size, moved)
        with self._lock:
            self._bytes_written += size

    def _read_block(self, slot: _Slot, write: Ticket, address: int, index: int) -> None:
        if write.error is not None:
            raise OffloadError(
                f"{self._place()}: cannot read {slot.key!r}, its last write failed: {write.error}"
            ) from write.error
        start, size = self._extent(slot, index)
        try:
            self._failpoints.hit("offload_read")
            moved = self._file.read(address + start, size, slot.offset + start)
        except OSError as error:
            moved = Moved(0, error.errno or 0)
        if moved.num_bytes < size:
            raise self._failure("read", slot, start, size, moved)
        if self._checksum and _hash(address + start, size) != slot.hashes[index]:
            raise OffloadError(
                f"{self._place()}: {slot.key!r} came back changed: the checksum of its {size} bytes from {start} is not "
                "that of what was written. The disk or memory is faulty: see the kernel's log (dmesg), set another "
                "nvme_path, resume from the last checkpoint"
            )
        with self._lock:
            self._bytes_read += size

    def _failure(self, verb: str, slot: _Slot, start: int, size: int, moved: Moved) -> OffloadError:
        cause = reason(moved.errno)
        if not moved.errno:
            cause = (
                f"the file was cut short. Something else changed it: let nothing else write to {self._directory}, and "
                "resume from the last checkpoint"
            )
        return OffloadError(
            f"{self._place()}: cannot {verb} {slot.key!r} at its byte {start} of {slot.num_bytes} (offset "
            f"{slot.offset + start} of the file): {moved.num_bytes} of {size} bytes done: {cause}"
        )

    def _place(self) -> str:
        return f"rank {self._rank}: offload file in {self._directory}"


def _hash(address: int, num_bytes: int) -> int:
    return xxhash.xxh3_64_intdigest((ctypes.c_char * num_bytes).from_address(address))
