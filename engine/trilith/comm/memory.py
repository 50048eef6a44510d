"""Memory that the processes of one machine share, and how they sleep on it.

A process makes an anonymous file (memfd) and maps it; another opens the same file as /proc/<pid>/fd/<number> and maps it
too. No name exists in any file system, so a kill leaves nothing behind. Plain loads and stores of aligned words are
ordered as every rank must see them only where the hardware keeps total store order: x86-64 Linux, nothing else.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import select
import sys
from secrets import token_bytes

import torch
from torch import Tensor

PAGE_BYTES = mmap.PAGESIZE
_TOKEN_BYTES = 16
_ASLEEP = 16  # the 32-bit word at byte 64, in a cache line of its own
_FUTEX = 202  # the number of the system call on x86-64
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def is_possible() -> bool:
    """True on a system whose processes can share memory as it is done here."""
    has_calls = hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")
    return sys.platform == "linux" and platform.machine() == "x86_64" and has_calls


class SharedFile:
    """A shared file, in this process's memory. Its first page says which file it is and what its owner sleeps on."""

    def __init__(self, fd: int, size: int) -> None:
        """Map `size` bytes of `fd`, which may be closed then; pages take memory once they are written."""
        self._map = mmap.mmap(fd, size)
        self._halfwords = memoryview(self._map).cast("I")
        self.words = memoryview(self._map).cast("Q")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + 4 * _ASLEEP

    @property
    def token(self) -> bytes:
        """A random number that no other file has."""
        return self._map[:_TOKEN_BYTES]

    def sign(self) -> None:
        """Give the file its token."""
        self._map[:_TOKEN_BYTES] = token_bytes(_TOKEN_BYTES)

    def bytes_at(self, start: int, size: int) -> Tensor:
        """A part of the memory as a tensor, which keeps the mapping."""
        return torch.frombuffer(self._map, dtype=torch.uint8, offset=start, count=size)

    @property
    def asleep(self) -> int:
        """What the owner sleeps on, 0 while it is awake."""
        return self._halfwords[_ASLEEP]

    @asleep.setter
    def asleep(self, what: int) -> None:
        self._halfwords[_ASLEEP] = what

    def sleep(self, what: int, limit_s: float) -> None:
        """Sleep until someone wakes the owner, who said before that it sleeps on `what`; at most `limit_s`."""
        limit = _Timespec(0, int(limit_s * 1e9))
        _LIBC.syscall(_FUTEX, ctypes.c_void_p(self._address), _FUTEX_WAIT, what, ctypes.byref(limit), None, 0)

    def wake(self) -> None:
        """Wake the owner if it sleeps. A wake that comes too late only makes its next sleep end at once."""
        self._halfwords[_ASLEEP] = 0
        _LIBC.syscall(_FUTEX, ctypes.c_void_p(self._address), _FUTEX_WAKE, 1, None, None, 0)


def new_file(size: int) -> tuple[int, SharedFile]:
    """A file of `size` bytes (a descriptor, for others to open and the caller to close) and its mapping."""
    fd = os.memfd_create("trilith", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        file = SharedFile(fd, size)
    except BaseException:
        os.close(fd)
        raise
    file.sign()
    return fd, file


class Process:
    """Another process of this machine: its mapping, and whether it lives."""

    def __init__(self, rank: int, pid: int, fd: int, token: bytes) -> None:
        """Open what process `pid` has open as `fd`. Raises OSError where that is not the file with `token`."""
        self.rank = rank
        self._pidfd = os.pidfd_open(pid)  # names this process even when another one gets its number
        self._poll = select.poll()
        self._poll.register(self._pidfd, select.POLLIN)
        theirs = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            size = os.fstat(theirs).st_size
            if size < PAGE_BYTES:
                raise OSError(f"process {pid} has another file as {fd}")
            self.file = SharedFile(theirs, size)
        except ValueError as error:
            raise OSError(str(error)) from error
        finally:
            os.close(theirs)
        if self.file.token != token:
            raise OSError(f"process {pid} has another file as {fd}")

    @property
    def has_ended(self) -> bool:
        """True once the process is gone, reaped or not."""
        return bool(self._poll.poll(0))

    def __del__(self) -> None:
        """Close the descriptor."""
        if hasattr(self, "_pidfd"):
            os.close(self._pidfd)
