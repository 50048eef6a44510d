"""Ends processes when the process that started them dies, by the kernel's hand and whatever they are doing.

A rank may hang in a C call with the interpreter lock held, so neither a watcher thread nor a Python signal handler
can be relied upon. Two independent means, both of which make the kernel send SIGKILL (Linux: fcntl(2) F_SETSIG,
prctl(2)): a pipe whose only write end the launching process holds, and the parent-death signal.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal

_PR_SET_PDEATHSIG = 1


def die_with_writer(read_fd: int) -> None:
    """Let the kernel kill the caller's whole process group when the last write end of a pipe is closed.

    Args: `read_fd`, the read end of a pipe through which nothing is ever written; it must stay open. The caller must
    lead its process group. Children forked later are in the group, so they end, too: the owner of the signal is the
    group, which matters because all holders of an inherited descriptor share one owner.
    """
    group = os.getpgrp()
    assert group == os.getpid(), "only a group of our own may be killed"
    fcntl.fcntl(read_fd, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(read_fd, fcntl.F_SETOWN, -group)
    fcntl.fcntl(read_fd, fcntl.F_SETFL, fcntl.fcntl(read_fd, fcntl.F_GETFL) | os.O_ASYNC)
    # The writer may have died before the signal was armed.
    if select.select([read_fd], [], [], 0)[0]:
        os.killpg(group, signal.SIGKILL)


def die_with_parent(parent_pid: int) -> None:
    """Let the kernel kill the caller when its parent ends; at once when `parent_pid` is no longer the parent.

    The kernel means the parent's thread that forked: it must live as long as the parent shall.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)
