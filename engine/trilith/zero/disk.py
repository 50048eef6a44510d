"""Bytes of tensors on a local disk: the NVMe tier of offload (ZeRO-Infinity, Rajbhandari et al. 2021, section 6.3).

Pure storage: a key has a slot of fixed size in one nameless file per rank, reads and writes of slots go on in
background threads. Which bytes, and when they must be back, others know.
"""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from trilith.errors import OffloadError
from trilith.failpoints import Failpoints
from trilith.kernels import library
from trilith.zero.disk_file import MAX_BLOCK_BYTES, BlockFile, disk_budget, reason, round_up
from trilith.zero.disk_native import NativeTransfers
from trilith.zero.disk_threads import ThreadTransfers
from trilith.zero.disk_transfer import Cause, Fault, Ticket, Transfer, Transfers

__all__ = ["DiskStore", "Ticket", "disk_budget"]


@dataclass
class _Slot:
    """The place of a key: `num_bytes` from `offset`. `checksums` are those of its blocks as they were last written."""

    key: str
    number: int
    offset: int
    num_bytes: int
    checksums: array[int] | None
    last_write: Ticket | None = field(default=None)


class DiskStore:
    """Slots for tensors, by key, in a file of `rank` in `directory` that vanishes with the process.

    Blocks of `block_bytes` (rounded up to a multiple of 4096) move at most `queue_depth` at once, and `threads` take a
    core for it. With `checksum`, what a read brings back is compared with what was written. `capacity_bytes` limits the
    file.
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
        self._bytes_reserved = 0
        self._process, self._is_closed = os.getpid(), False
        self._file = BlockFile(directory, rank, self._block_bytes)
        how = (self._file, threads, queue_depth, self._block_bytes)
        native, name = library.LIBRARY, f"trilith-offload-rank{rank}"
        self._transfers: Transfers = (
            ThreadTransfers(*how, name, self._failpoints)
            if native is None
            else NativeTransfers(native, *how, f"offload-rank{rank}", self._failpoints)
        )

    @property
    def bytes_read(self) -> int:
        """Bytes that reads have brought back."""
        return self._transfers.bytes_read

    @property
    def bytes_written(self) -> int:
        """Bytes that writes have put away."""
        return self._transfers.bytes_written

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
        checksums = array("Q", [0] * -(-num_bytes // self._block_bytes)) if self._checksum else None
        self._slots[key] = _Slot(key, len(self._slots), offset, num_bytes, checksums)
        self._bytes_reserved = end

    def write(self, key: str, tensor: Tensor) -> Ticket:
        """Begin to write `tensor`, contiguous, on the CPU and of the reserved size, after earlier operations of `key`.

        It must not change before the ticket's wait, which raises OffloadError if the disk does not take it.
        """
        slot = self._slot(key, tensor)
        slot.last_write = self._begin(slot, tensor, None)
        return slot.last_write

    def read(self, key: str, tensor: Tensor) -> Ticket:
        """Begin to read what `key` was last written into `tensor`, contiguous, on the CPU and of the reserved size.

        It holds nothing sure before the ticket's wait, which raises OffloadError if the bytes are not to be had, or not
        those that were written.
        """
        slot = self._slot(key, tensor)
        assert slot.last_write is not None, f"{key!r} is read before it is written"
        return self._begin(slot, tensor, slot.last_write)

    def wait_all(self) -> None:
        """Wait for all operations; raises the errors of those that nobody waited for."""
        self._assert_open()
        self._transfers.wait_all()

    def close(self) -> None:
        """Finish what was begun, end the threads, let the file go; raises the errors of operations nobody waited for.

        May be called again, then does nothing.
        """
        if self._is_closed:
            return
        self._assert_open()
        try:
            self._transfers.close()
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

    def _begin(self, slot: _Slot, tensor: Tensor, source: Ticket | None) -> Ticket:
        def explain(fault: Fault) -> OffloadError:
            return self._explain(slot, source, fault)

        transfer = Transfer(slot.number, source is None, tensor, slot.offset, explain, slot.checksums, source)
        return self._transfers.submit(transfer)

    def _explain(self, slot: _Slot, source: Ticket | None, fault: Fault) -> OffloadError:
        """The error of a block; `source` is the write that was read, None where the fault is a write's."""
        if fault.cause is Cause.SOURCE:
            assert source is not None
            return OffloadError(f"{self._place()}: cannot read {slot.key!r}, its last write failed: {source.error}")
        if fault.cause is Cause.CHANGED:
            return OffloadError(
                f"{self._place()}: {slot.key!r} came back changed: the checksum of its {fault.size} bytes from "
                f"{fault.start} is not that of what was written. The disk or memory is faulty: see the kernel's log "
                "(dmesg), set another nvme_path, resume from the last checkpoint"
            )
        cause = reason(fault.moved.errno)
        if not fault.moved.errno:
            cause = (
                f"the file was cut short. Something else changed it: let nothing else write to {self._directory}, and "
                "resume from the last checkpoint"
            )
        verb = "write" if source is None else "read"
        return OffloadError(
            f"{self._place()}: cannot {verb} {slot.key!r} at its byte {fault.start} of {slot.num_bytes} (offset "
            f"{slot.offset + fault.start} of the file): {fault.moved.num_bytes} of {fault.size} bytes done: {cause}"
        )

    def _place(self) -> str:
        return f"rank {self._rank}: offload file in {self._directory}"
