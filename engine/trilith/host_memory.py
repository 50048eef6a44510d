"""Gives memory that the C library keeps but does not use back to the system, before it piles up.

torch asks glibc for every CPU tensor at an alignment of 64 bytes. Before glibc 2.38 a freed aligned block is a little too
small for the next request of the same size (BZ #14581); where another thread's small allocation, such as gloo's, sits
beside it, it is never joined and never reused. A training step with large activations then grows the heap at every step,
16 MB a step of the quickstart, without any tensor being kept. `malloc_trim` releases those pages.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import psutil

_STATM = Path("/proc/self/statm")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_SLACK_BYTES = 128 << 20


def total_bytes() -> int:
    """The memory of this machine, or what its container may use of it."""
    found = psutil.virtual_memory().total
    for path in _LIMITS:
        with suppress(OSError, ValueError):
            found = min(found, int(path.read_text()))
    return found


class HostMemory:
    """Watches this process's resident set; a no-op where the C library is not glibc or there is no /proc."""

    def __init__(self) -> None:
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._kept_bytes: int | None = None

    def resident_bytes(self) -> int:
        """Bytes of this process that are in memory now; 0 where that is not known."""
        try:
            return int(_STATM.read_text().split()[1]) * self._page_bytes
        except OSError:
            return 0

    def settle(self) -> bool:
        """Called once a step: trims if the resident set has grown by 128 MiB since the last time; tells whether it did."""
        if self._trim is None:
            return False
        now = self.resident_bytes()
        if self._kept_bytes is None:
            self._kept_bytes = now
        if now - self._kept_bytes < _SLACK_BYTES:
            return False
        self._trim(0)
        self._kept_bytes = self.resident_bytes()
        return True
