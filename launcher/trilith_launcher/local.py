"""Starts the ranks of a run on this machine and returns when all have ended; the main entry of the launcher."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Any

from trilith_launcher.cause import Ended, choose_cause, signal_name, word_report
from trilith_launcher.failure import read_record
from trilith_launcher.position import Position, PositionBoard
from trilith_launcher.rank import Job
from trilith_launcher.rundir import RunDirectory, run_directory
from trilith_launcher.server import BOOTSTRAP
from trilith_launcher.supervise import Outcome, Supervisor, caught_signals

RUN_ID_VARIABLE = "TRILITH_RUN_ID"
# Once the cause is known, other accounts add little, and eight tracebacks keep a small machine busy.
_KNOWN_CAUSE_GRACE_S = 0.2
# A training step frees and asks for the same large tensors again and again. glibc by default gives each above 32 MiB, and
# the top of the heap, back to the system at once, and every page is then a fault and zeroed anew; huge pages fault once for
# 2 MiB. What piles up unused the trainer gives back itself (trilith.host_memory).
_ALLOCATOR = "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1"
_RESERVED = ("rank", "world_size", "store_path", "context")


def rank_environment(num_ranks: int, threads_per_rank: int, run_id: str) -> dict[str, str]:
    """The environment of fork server and ranks: this process's, with threads, allocator, network device and run id set.

    OpenMP reads its variables when torch loads. Ranks that fill the machine together must not spin while they wait: two
    of two threads on two cores ran at 13-56 % of their speed. gloo's device is the loopback, so nothing listens
    outside.
    """
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = str(threads_per_rank)
    if num_ranks > 1 and num_ranks * threads_per_rank >= len(os.sched_getaffinity(0)):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    environment.setdefault("GLIBC_TUNABLES", _ALLOCATOR)
    environment[RUN_ID_VARIABLE] = run_id
    return environment


def launch(
    target: str,
    args: Mapping[str, Any],
    num_ranks: int,
    *,
    threads_per_rank: int,
    preload: Sequence[str] = ("torch",),
    grace_s: float = 0.5,
    run_id: str | None = None,
) -> int:
    """Run `target` in `num_ranks` processes on this machine; returns the exit code of the run.

    Args: `target`, "module:function", called in each rank as target(rank=, world_size=, store_path=, context=,
    **args), where `store_path` is for torch's FileStore and `context` a RankContext; `args`, what JSON can hold;
    `preload`, modules the fork server imports once for all ranks, which must not run an op; `grace_s`, how long the
    other ranks may take to write down their own failures after the first; `run_id`, found in every process's
    environment as TRILITH_RUN_ID.

    Returns: 0 when all ranks end with 0; the failing rank's code (1 for an exception, 128 + n for signal n); 130, 143
    or 129 when this process gets SIGINT, SIGTERM or SIGHUP. What failed first is the last thing written on stderr.

    When this process dies, by SIGKILL too, the kernel kills the ranks. Call it from the main thread to have signals
    handled.
    """
    if num_ranks < 1 or threads_per_rank < 1:
        raise ValueError(f"num_ranks = {num_ranks}, threads_per_rank = {threads_per_rank}: both must be at least 1")
    taken = sorted(set(args) & set(_RESERVED))
    if ":" not in target or taken:
        reserved = ", ".join(_RESERVED)
        raise ValueError(f"target {target!r} must be module:function; args may not hold {reserved}: {taken}")
    job = Job(
        target=target,
        args=dict(args),
        num_ranks=num_ranks,
        preload=tuple(preload),
        argv=tuple(sys.argv),
        sys_path=tuple(sys.path),
        launcher_pid=os.getpid(),
    )
    environment = rank_environment(num_ranks, threads_per_rank, run_id or secrets.token_hex(8))
    _open_standard_streams()
    with caught_signals() as signals_fd:
        code, report = _run(job, environment, signals_fd, grace_s)
        if report:
            # Nobody may be reading any more.
            with suppress(OSError):
                print(report, file=sys.stderr, flush=True)
    return code


def _run(job: Job, environment: Mapping[str, str], signals_fd: int, grace_s: float) -> tuple[int, str]:
    """Serve the job from start to end in a directory of its own: the exit code and the report."""
    with run_directory() as directory, ExitStack() as stack:
        board = PositionBoard.create(directory.positions, job.num_ranks)
        control, far_control = map(stack.enter_context, socket.socketpair())
        lifeline_read, lifeline_write = os.pipe()
        stack.callback(os.close, lifeline_read)
        stack.callback(os.close, lifeline_write)
        server = _start_server(directory, job, environment, (far_control.fileno(), lifeline_read))
        far_control.close()

        def grace(ended: Ended) -> float:
            return min(grace_s, _KNOWN_CAUSE_GRACE_S) if explains_itself(directory, ended) else grace_s

        outcome = Supervisor(server, control, signals_fd, grace).watch()
        return conclude(directory, outcome, job.num_ranks, board.read_all())


def _open_standard_streams() -> None:
    """Point closed standard streams to the null device: their numbers would otherwise go to the pipes made here."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


def _start_server(
    directory: RunDirectory, job: Job, environment: Mapping[str, str], fds: tuple[int, int]
) -> subprocess.Popen[bytes]:
    """Start the fork server as the leader of a process group of its own, out of reach of the terminal's Ctrl-C; `fds` are
    its ends of the control socket and of the lifeline."""
    directory.job.write_text(json.dumps(asdict(job)))
    return subprocess.Popen(
        [sys.executable, "-P", "-c", BOOTSTRAP, str(directory.root), *map(str, fds)],
        stdin=subprocess.DEVNULL,
        env=environment,
        pass_fds=fds,
        process_group=0,
    )


def explains_itself(directory: RunDirectory, ended: Ended) -> bool:
    """Whether a rank that ended badly is hardly a victim: it told an error of its own, or was killed from outside."""
    record = read_record(directory.error(ended.rank))
    return ended.returncode == -signal.SIGKILL if record is None else not record.lost_peer


def conclude(
    directory: RunDirectory, outcome: Outcome, num_ranks: int, positions: Sequence[Position]
) -> tuple[int, str]:
    """The exit code of a run, and what to tell the user on stderr ("" when it went well)."""
    if outcome.interrupted_by is not None:
        steps = [position.step for position in positions if position.step is not None]
        where = f"at step {max(steps)}" if steps else "before the first step"
        name = signal_name(outcome.interrupted_by)
        return 128 + outcome.interrupted_by, f"interrupted {where} ({name}); all {num_ranks} ranks have ended"
    if outcome.refusal:
        return 1, outcome.refusal.rstrip("\n")
    records = {rank: record for rank in range(num_ranks) if (record := read_record(directory.error(rank))) is not None}
    crashes = {
        rank: text
        for rank in range(num_ranks)
        if directory.crash(rank).exists() and (text := directory.crash(rank).read_text(errors="replace"))
    }
    ends = _all_ends(outcome, num_ranks)
    cause = choose_cause(ends, records, positions, crashes)
    if cause is not None:
        return cause.exit_code or 1, word_report(cause, ends, records, positions)
    if len(outcome.ended) < num_ranks:
        how = f"killed by {signal_name(-outcome.server_returncode)}" if outcome.server_returncode < 0 else "ended"
        return 1, f"the fork server was {how} before its ranks; {num_ranks - len(outcome.ended)} ranks ended with it"
    return 0, ""


def _all_ends(outcome: Outcome, num_ranks: int) -> tuple[Ended, ...]:
    """How the ranks ended, with those that were still there when the launcher killed their process group."""
    if outcome.group_killed_ns is None:
        return outcome.ended
    when, seen = outcome.group_killed_ns, {ended.rank for ended in outcome.ended}
    unseen = (Ended(rank, -signal.SIGKILL, when, when) for rank in range(num_ranks) if rank not in seen)
    return (*outcome.ended, *unseen)
