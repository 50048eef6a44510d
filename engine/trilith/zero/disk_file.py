"""The file of a rank's offloaded bytes: where it lies, its room on the disk, and reads and writes of blocks of it.

csrc/io reads and writes it natively by the same rules; the methods here are for where that was not built. Everything
here is Linux.

The file has no name: whatever ends the process, SIGKILL included, the kernel frees it. Io is direct (O_DIRECT) where
the file system knows it. What is offloaded does not fit into memory, so the page cache would only push out what does;
and a failed write is then reported by the write itself, while a buffered one may be lost after it was called done.
It goes through an aligned buffer of the thread, because O_DIRECT wants the device's block where torch aligns to 64
bytes, and because a fork during a direct read into private memory may lose what was read (open(2)); a disk is slower
than that copy.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import secrets
import shutil
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from trilith.errors import OffloadError

ALIGNMENT = 4096
MAX_BLOCK_BYTES = 0x7FFFF000  # more than this Linux does not move in one call
_NAME = re.compile(r"trilith-offload-rank\d+-(\d{1,9})-[0-9a-f]{8}")
_ELSEWHERE = "Free space there, or set nvme_path to a larger disk"
_FIXES = (
    ((errno.ENOSPC, errno.EDQUOT), f"The disk or quota is full. {_ELSEWHERE}"),
    ((errno.EFBIG,), "The file would be larger than allowed. Raise the limit (ulimit -f), or use another file system"),
    (
        (errno.EIO,),
        "The device failed. See the kernel's log (dmesg), replace the disk, resume from the last checkpoint",
    ),
    ((errno.ENOENT,), "Make the directory, mount its disk, or set nvme_path to one that exists"),
    ((errno.ENOTDIR,), "Set nvme_path to a directory"),
    ((errno.EACCES, errno.EPERM, errno.EROFS), "Make the directory writable for this user, or set another nvme_path"),
)


class Moved(NamedTuple):
    """What became of a transfer: the bytes that were moved, and an errno, 0 without error (then fewer bytes than asked
    for mean that the file ends)."""

    num_bytes: int
    errno: int


def round_up(num_bytes: int) -> int:
    """The smallest multiple of ALIGNMENT that is not below `num_bytes`."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def reason(number: int) -> str:
    """An errno in words, and what to do about it."""
    fix = next((fix for numbers, fix in _FIXES if number in numbers), "Set nvme_path to a directory on a local disk")
    return f"{os.strerror(number)} ({errno.errorcode.get(number, number)}). {fix}"


def disk_budget(directory: str | Path) -> int:
    """The bytes that this user may still write below `directory`; raises OffloadError if it cannot be asked."""
    try:
        if not stat.S_ISDIR(os.stat(directory).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return shutil.disk_usage(directory).free
    except OSError as error:
        raise OffloadError(f"offload to {directory}: {reason(error.errno or 0)}") from error


class BlockFile:
    """A nameless file in `directory`, read and written in blocks of at most `block_bytes`, a multiple of ALIGNMENT.

    Offsets are multiples of ALIGNMENT, and what follows a block up to the next one belongs to it. `read` and `write` may
    be called by many threads at once. Raises OffloadError if no file can be made.
    """

    def __init__(self, directory: str | Path, rank: int, block_bytes: int) -> None:
        assert block_bytes % ALIGNMENT == 0 and 0 < block_bytes <= MAX_BLOCK_BYTES, block_bytes
        self._directory, self._block_bytes = directory, block_bytes
        self._buffers = threading.local()
        self._allocated = 0
        self._descriptors: list[int] = []
        try:
            self._descriptors.append(_open_nameless(Path(directory), rank))
            direct = _open_direct(self._descriptors[0])
        except OSError as error:
            self.close()
            raise OffloadError(
                f"rank {rank}: cannot make an offload file in {directory}: {reason(error.errno or 0)}"
            ) from error
        self.is_direct = direct is not None
        if direct is not None:
            self._descriptors.append(direct)
        self._native: Any = None

    def native(self, library: ModuleType) -> Any:
        """The file as csrc/io reads and writes it; it ends before `close`."""
        direct = self._descriptors[-1] if self.is_direct else -1
        self._native = library.io.AsyncFile(self._descriptors[0], direct, True, str(self._directory))
        return self._native

    def allocate(self, num_bytes: int) -> int:
        """Make the file `num_bytes` long, its blocks on the disk; returns an errno. What it held stays."""
        more = num_bytes - self._allocated
        if more > self.free_bytes():
            return errno.ENOSPC  # to try it would fill the disk for a moment, for everyone
        try:
            if more:
                # Through the descriptor that is not direct: a file system without fallocate is written to in odd bytes.
                os.posix_fallocate(self._descriptors[0], self._allocated, more)
        except OSError as error:
            with suppress(OSError):  # a full disk gives what there was
                os.ftruncate(self._descriptors[0], self._allocated)
            return error.errno or errno.EIO
        self._allocated = num_bytes
        if self._native is not None:
            self._native.require_bytes(num_bytes)
        return 0

    def free_bytes(self) -> int:
        """The bytes that this user may still write to the file's disk; no limit where the file system does not say."""
        disk = os.fstatvfs(self._descriptors[0])
        return disk.f_bavail * disk.f_frsize if disk.f_blocks else 2**63 - 1

    def write(self, address: int, num_bytes: int, offset: int) -> Moved:
        """Write the bytes at `address` to `offset`; they are on their way to the disk when this returns."""
        allocated = self._allocated  # asked before the size, which `allocate` changes first
        try:
            # Written behind its end, a file that something cut short would hold zeros where it held data.
            if os.fstat(self._descriptors[-1]).st_size < allocated:
                return Moved(0, 0)
        except OSError as error:
            return Moved(0, error.errno or errno.EIO)
        if not self.is_direct:
            return self._move(os.pwritev, address, num_bytes, offset)
        buffer = self._buffer()
        ctypes.memmove(buffer, address, num_bytes)
        moved = self._move(os.pwritev, buffer, round_up(num_bytes), offset)
        return Moved(min(moved.num_bytes, num_bytes), moved.errno)

    def read(self, address: int, num_bytes: int, offset: int) -> Moved:
        """Read what lies at `offset` into the memory at `address`."""
        if not self.is_direct:
            return self._move(os.preadv, address, num_bytes, offset)
        buffer = self._buffer()
        moved = self._move(os.preadv, buffer, round_up(num_bytes), offset)
        had = min(moved.num_bytes, num_bytes)
        ctypes.memmove(address, buffer, had)
        return Moved(had, moved.errno if had < num_bytes else 0)

    def close(self) -> None:
        """Let the file go; no thread may be reading or writing it."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _buffer(self) -> int:
        """The address of this thread's aligned buffer of block_bytes."""
        if not hasattr(self._buffers, "memory"):
            self._buffers.memory = mmap.mmap(-1, self._block_bytes)  # shared memory: no copy-on-write at a fork
            self._buffers.address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffers.memory))
        return int(self._buffers.address)

    def _move(self, call: Callable[[int, list[Any], int], int], address: int, num_bytes: int, offset: int) -> Moved:
        """`call` until all is moved, since the system may move less than it was asked to."""
        done = 0
        while done < num_bytes:
            memory = (ctypes.c_char * (num_bytes - done)).from_address(address + done)
            try:
                count = call(self._descriptors[-1], [memory], offset + done)
            except OSError as error:
                return Moved(done, error.errno or errno.EIO)
            if self.is_direct and done + count < num_bytes:
                count -= count % ALIGNMENT  # go on at an offset that direct io allows
            if count == 0:
                return Moved(done, errno.ENOSPC if call is os.pwritev else 0)
            done += count
        return Moved(done, 0)


def _open_nameless(directory: Path, rank: int) -> int:
    """A descriptor of a new file without a name in `directory`."""
    if not stat.S_ISDIR(os.stat(directory).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    with suppress(OSError):  # not every file system makes files without a name; why, the next lines tell better
        return os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
    _remove_stale(directory)
    path = directory / f"trilith-offload-rank{rank:05d}-{os.getpid()}-{secrets.token_hex(4)}"
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    with suppress(FileNotFoundError):  # another rank may have taken us for dead: processes of a container, say
        path.unlink()
    return descriptor


def _remove_stale(directory: Path) -> None:
    """Remove files of this user's processes that were killed between making and unlinking theirs."""
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            match = _NAME.fullmatch(entry.name)
            if match is None or _is_alive(int(match[1])):
                continue
            with suppress(OSError):  # another rank removed it first
                if entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                    os.unlink(entry.path)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _open_direct(descriptor: int) -> int | None:
    """A second descriptor of the file, for direct io; None where the file system, or its device, does not serve it."""
    direct = None
    try:
        direct = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_DIRECT)
        with mmap.mmap(-1, ALIGNMENT) as page:  # some only refuse when it is used
            os.pwritev(direct, [page], 0)
        os.ftruncate(descriptor, 0)
        return direct
    except OSError as error:
        if direct is not None:
            os.close(direct)
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOENT):
            raise
        return None
