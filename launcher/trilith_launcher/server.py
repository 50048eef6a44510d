"""The fork server: imports torch once, forks the ranks, reaps them, and tells the launcher how each ended.

It only imports and runs no op, because a fork after an op (OpenMP threads, CUDA) hangs or breaks the child. It is the
leader of a process group that holds the ranks and whatever they start, so that one signal ends them all, and it
passes the launcher's signals on by process number, which is safe here: a number cannot be reused before its parent
reaps it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import time
import traceback
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from trilith_launcher.lifeline import die_with_parent, die_with_writer
from trilith_launcher.rank import Job, become_rank, flush_streams
from trilith_launcher.rundir import RunDirectory

# How a process becomes the server: the job's import path first, then this module. Arguments: the run directory, and the
# numbers of the control socket and of the lifeline.
BOOTSTRAP = (
    "import json, sys\n"
    "with open(sys.argv[1] + '/job.json') as file:\n"
    "    job = json.load(file)\n"
    "sys.path[:] = job['sys_path']\n"
    "from trilith_launcher.server import main\n"
    "main(job, sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))\n"
)


def main(job: Mapping[str, Any], directory: str, control_fd: int, lifeline_fd: int) -> NoReturn:
    """Serve one job (the fields of rank.Job) and end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for fd in (control_fd, lifeline_fd):
        os.set_inheritable(fd, False)
    die_with_writer(lifeline_fd)
    with socket.socket(fileno=control_fd) as control:
        serve(Job(**job), RunDirectory(Path(directory)), control)
    # Nothing here needs the interpreter to take torch down in order.
    os._exit(0)


def serve(job: Job, directory: RunDirectory, control: socket.socket) -> None:
    """Preload, fork the ranks, and report until the last has ended."""
    die_with_parent(job.launcher_pid)
    refusal = _preload(job.preload)
    if refusal:
        _send(control, {"refused": refusal})
        return
    # Objects of the imported modules stay out of collections, whose marks would copy the shared pages.
    gc.collect()
    gc.freeze()
    # What an import printed would otherwise be printed by every rank.
    flush_streams()
    server_pid = os.getpid()
    ranks: dict[int, int] = {}
    for rank in range(job.num_ranks):
        pid = _fork()
        if pid == 0:
            control.close()
            become_rank(job, directory, rank, server_pid)
        ranks[pid] = rank
    _watch(control, ranks)


def _preload(modules: tuple[str, ...]) -> str:
    """Import the modules; what went wrong, or ""."""
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception:
            return f"cannot import {name} before starting the ranks\n{traceback.format_exc()}"
    return ""


def _fork() -> int:
    with warnings.catch_warnings():
        # Python 3.12 warns of threads; numpy's BLAS has some after its import and handles forks.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _watch(control: socket.socket, ranks: dict[int, int]) -> None:
    """Reap the ranks (by process number) and pass signals on, until none is left."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    os.set_blocking(wake_read, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    _reap(control, ranks)
    while ranks:
        readable, _, _ = select.select((control.fileno(), wake_read), (), ())
        if wake_read in readable:
            os.read(wake_read, 4096)
        if control.fileno() in readable:
            # Each byte is a signal number. Without a launcher the lifeline ends this process, too.
            for number in control.recv(64):
                for pid in ranks:
                    os.kill(pid, number)
        _reap(control, ranks)


def _reap(control: socket.socket, ranks: dict[int, int]) -> None:
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        rank = ranks.pop(pid, None)
        if rank is not None:
            returncode = os.waitstatus_to_exitcode(status)
            _send(control, {"rank": rank, "returncode": returncode, "monotonic_ns": time.monotonic_ns()})


def _send(control: socket.socket, message: Mapping[str, Any]) -> None:
    # The launcher may be gone; then the kernel is about to end this process.
    with suppress(BrokenPipeError, ConnectionResetError):
        control.sendall(json.dumps(message).encode() + b"\n")
