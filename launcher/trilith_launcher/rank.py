"""One rank, from the fork to its end: prepares the process, calls the target, writes down what went wrong."""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from trilith_launcher.context import RankContext
from trilith_launcher.lifeline import die_with_parent
from trilith_launcher.position import PositionBoard
from trilith_launcher.rundir import RunDirectory

_INTERNAL_ERROR = 70  # EX_SOFTWARE: the launcher's own code failed


@dataclass(frozen=True)
class Job:
    """What the fork server is told, as JSON: the target, its arguments, how many ranks, what to import before
    forking."""

    target: str
    args: Mapping[str, Any]
    num_ranks: int
    preload: tuple[str, ...]
    argv: tuple[str, ...]
    sys_path: tuple[str, ...]
    launcher_pid: int


def find_target(target: str) -> Callable[..., Any]:
    """The function named by "package.module:function"."""
    module_name, _, function_name = target.partition(":")
    function = getattr(importlib.import_module(module_name), function_name)
    assert callable(function), target
    return function  # type: ignore[no-any-return]


def become_rank(job: Job, directory: RunDirectory, rank: int, server_pid: int) -> None:
    """Turn the forked process into rank `rank`, run the target and end the process; does not return."""
    code = _INTERNAL_ERROR
    try:
        code = _run(job, directory, rank, server_pid)
    except BaseException:
        traceback.print_exc()
    finally:
        flush_streams()
        # Not a normal exit: taking the interpreter down with communication threads alive may hang.
        os._exit(code)


def _run(job: Job, directory: RunDirectory, rank: int, server_pid: int) -> int:
    # The launcher decides about Ctrl-C and a closed terminal, and sends SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(server_pid)
    sys.argv = list(job.argv)
    for stream in (sys.stdout, sys.stderr):
        # Whole lines, at once: a rank may be killed at any time, and eight share the terminal.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    context = RankContext(rank, PositionBoard(directory.positions, job.num_ranks), directory.error(rank))
    with open(directory.crash(rank), "w") as crash_file:
        faulthandler.enable(crash_file)
        return call_target(job, rank, context, str(directory.store))


def call_target(job: Job, rank: int, context: RankContext, store_path: str) -> int:
    """Call the target; returns the exit code after its failure, if any, is on disk."""
    try:
        function = find_target(job.target)
        function(rank=rank, world_size=job.num_ranks, store_path=store_path, context=context, **job.args)
    except BaseException as exception:
        return _note(exception, context)
    # What an interpreter does at its end, as far as it is safe: writers flush, helper processes are ended.
    atexit._run_exitfuncs()
    return 0


def _note(exception: BaseException, context: RankContext) -> int:
    here = exception.__traceback__
    exception = exception.with_traceback(here.tb_next if here is not None else None)
    if isinstance(exception, SystemExit) and exception.code in (None, 0):
        atexit._run_exitfuncs()
        return 0
    try:
        return context.record_failure(exception).exit_code
    except OSError as unwritable:
        # A full disk, perhaps the very reason of the failure: then say it here, though other ranks may talk after us.
        print(f"rank {context.rank}: no error file could be written: {unwritable}", file=sys.stderr)
        traceback.print_exception(exception)
        return 1


def flush_streams() -> None:
    """Write out what stdout and stderr hold; a closed pipe or a missing stream is no error."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
