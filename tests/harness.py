"""Runs a function on several ranks, each a process of its own, and brings back results or the first failure.

Starting a rank from nothing costs a second of importing torch, so one fork server per test session imports torch once
and forks the ranks of every case (8 ranks meet in about 0.1 s). The server itself never runs an op, opens no OpenMP
region and touches no CUDA: a fork after those hangs in the child. Ranks meet through a file, so cases need no port and
can run beside each other. A case has a timeout, only processes of this session are ever killed, and no rank outlives
the test process.

The protocol: the test process sends the server a job (a pickled `Job`) and reads back one line when all is over. Each
rank writes its result or its error to a file, tells the server with one byte, and then waits for the server to close
the pipe, so that no rank tears its connections down while another still uses them.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import json
import os
import pickle
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from trilith_launcher.local import rank_environment

PRELOAD = ("numpy", "pytest", "torch.distributed.device_mesh", "torch.nn.functional", "trilith.trainer")
ROOT = Path(__file__).resolve().parent.parent
SEARCH_PATH = (str(ROOT / "engine"), str(ROOT / "launcher"), str(ROOT))
GRACE_S = 3.0  # how long the other ranks get to fail by themselves, once only victims have failed


@dataclass(frozen=True)
class Job:
    """One case: `call` is the pickled (function, arguments); everything a rank needs to know of its parent is here."""

    directory: str
    world_size: int
    device: str
    timeout_s: float
    call: bytes
    search_path: tuple[str, ...]
    working_directory: str
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Failure:
    """How one rank failed. `victim` means that it only lost another rank."""

    rank: int
    time_ns: int
    victim: bool
    text: str


def run_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 60, device: str = "cpu"
) -> list[Any]:
    """Call `fn(rank, world_size, *args)` on `world_size` ranks and return their results in rank order.

    `fn` must be a function of a module (it is pickled by name). In each rank torch has one thread and, if world_size
    is above 1, torch.distributed is initialised: gloo, and nccl beside it where every rank has a GPU of its own. With
    device="cuda" rank r gets GPU r modulo their number. Results travel through torch.save and come back on the CPU.

    Raises AssertionError with the traceback of the rank that failed first (not of one that merely lost it), or with
    where every rank stands after `timeout_s`.
    """
    __tracebackhide__ = True  # pytest shows the rank's traceback, not this function
    with tempfile.TemporaryDirectory(prefix="trilith-ranks-") as directory:
        job = Job(
            directory=directory,
            world_size=world_size,
            device=device,
            timeout_s=timeout_s,
            call=pickle.dumps((fn, args)),
            search_path=tuple(sys.path),
            working_directory=os.getcwd(),
            environment=dict(os.environ),
        )
        outcome = _server().run(job)
        failures, running = _failures(job, outcome), outcome["running"]
        if running or failures:
            raise AssertionError(_report(job, failures, running))
        for rank in range(world_size):
            sys.stdout.write(_output(job, rank))
        return [
            torch.load(_path(job, rank, "result"), map_location="cpu", weights_only=False) for rank in range(world_size)
        ]


def assert_close_named(
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], rtol: float = 1e-10, atol: float = 1e-12
) -> None:
    """Compare (actual, expected) tensors and name the first, in the mapping's order, that differs.

    Raises AssertionError with the name, the count of differing elements, the largest difference and where it is.
    """
    for name, (actual, expected) in pairs.items():
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            found, wanted = (f"{t.dtype} {tuple(t.shape)}" for t in (actual, expected))
            raise AssertionError(f"{name}: {found}, expected {wanted}")
        actual, expected = actual.detach().cpu(), expected.detach().cpu()
        close = torch.isclose(actual, expected, rtol=rtol, atol=atol, equal_nan=True)
        if not bool(close.all()):
            difference = (actual.double() - expected.double()).abs().masked_fill(close, -1.0)
            at = int(difference.nan_to_num(float("inf")).argmax())
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), actual.shape))
            raise AssertionError(
                f"{name}: {int((~close).sum())} of {close.numel()} elements differ; the largest at {index}: "
                f"{actual.flatten()[at].item()!r}, expected {expected.flatten()[at].item()!r} "
                f"(difference {difference.flatten()[at].item():.3e}, rtol {rtol:g}, atol {atol:g})"
            )


def _path(job: Job, rank: int, kind: str) -> str:
    return os.path.join(job.directory, f"{kind}.{rank}")


def _output(job: Job, rank: int, limit: int = 20_000) -> str:
    """What a rank wrote to stdout and stderr, the last `limit` characters."""
    try:
        return Path(_path(job, rank, "output")).read_text(errors="replace")[-limit:]
    except FileNotFoundError:
        return ""


def _failures(job: Job, outcome: Mapping[str, Any]) -> list[Failure]:
    """All failures: those that ranks wrote down, and ranks that died without a word."""
    found = []
    for rank in range(job.world_size):
        path = Path(_path(job, rank, "error"))
        if path.exists():
            found.append(Failure(**json.loads(path.read_text())))
        elif str(rank) in outcome["died"]:
            how, time_ns = outcome["died"][str(rank)]
            found.append(Failure(rank, time_ns, False, f"rank {rank} died: {how}\n"))
    return found


def _report(job: Job, failures: Sequence[Failure], running: Sequence[int]) -> str:
    """The text of the AssertionError: the first real failure, else the timeout, else the first victim."""
    real = [failure for failure in failures if not failure.victim]
    if running and not real:
        stacks = "".join(f"--- rank {rank} stands at\n{_output(job, rank)}" for rank in running)
        victims = "".join(f"--- rank {f.rank} lost a peer\n{f.text}" for f in failures)
        limit = f"{GRACE_S:g} s after others gave them up" if failures else f"{job.timeout_s:g} s"
        return f"ranks {list(running)} of {job.world_size} still ran after {limit}\n{stacks}{victims}"
    first = min(real or failures, key=lambda failure: failure.time_ns)
    others = sorted(failure.rank for failure in failures if failure is not first)
    text = f"rank {first.rank} of {job.world_size} failed first"
    text += f" (so did ranks {others}, later or as its victims)\n" if others else "\n"
    output = _output(job, first.rank, limit=4000)
    return text + first.text + (f"--- its output\n{output}" if output else "")


# ---------------------------------------------------------------------------------------------- in the test process


class _Server:
    """The fork server as seen from the test process; started at the first case, replaced if it was interrupted."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def run(self, job: Job) -> dict[str, Any]:
        """Run one job to its end. An interrupt kills the server, and with it all ranks."""
        if self._socket is None or self._process is None or self._process.poll() is not None:
            self._start()
        assert self._socket is not None
        try:
            _send(self._socket, pickle.dumps(job))
            reply = _receive(self._socket)
        except BaseException:
            self.close()
            raise
        if reply is None:
            self.close()
            raise AssertionError("the fork server died; see its messages above")
        return dict(json.loads(reply))

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        code = f"import sys; sys.path[:0] = {list(SEARCH_PATH)!r}; from tests import harness; harness._serve()"
        environment = rank_environment(num_ranks=1, threads_per_rank=1, run_id="tests")
        environment["TRILITH_TEST_SOCKET"] = str(theirs.fileno())
        # A session of its own: Ctrl-C reaches the test process alone, which then closes the server.
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._socket = ours

    def close(self) -> None:
        """End the server and every rank it still has."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._socket = self._process = None


@lru_cache(maxsize=1)
def _server() -> _Server:
    """The session's fork server. It ends with the test process, because its socket closes then."""
    return _Server()


def close_server() -> None:
    """End the session's fork server, if one was started."""
    _server().close()


def _send(to: socket.socket, data: bytes) -> None:
    to.sendall(struct.pack("<Q", len(data)) + data)


def _receive(source: socket.socket) -> bytes | None:
    """One message, or None when the other side is gone."""
    head = _exactly(source, 8)
    return None if head is None else _exactly(source, struct.unpack("<Q", head)[0])


def _exactly(source: socket.socket, size: int) -> bytes | None:
    parts = []
    while size > 0:
        part = source.recv(min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


# -------------------------------------------------------------------------------------------------- in the fork server


def _serve() -> None:
    """The fork server's life: preload, then one job after the other until the test process closes its socket."""
    _die_with_parent()
    for name in PRELOAD:
        try:
            importlib.import_module(name)
        except Exception:
            continue  # the case that needs it says so itself, with a better traceback
    gc.collect()
    gc.freeze()
    control = socket.socket(fileno=int(os.environ.pop("TRILITH_TEST_SOCKET")))
    while (message := _receive(control)) is not None:
        job: Job = pickle.loads(message)
        outcome = _run_job(job, control)
        if outcome is None:
            return
        _send(control, json.dumps(outcome).encode())


def _run_job(job: Job, control: socket.socket) -> dict[str, Any] | None:
    """Fork the ranks and follow them to the end. None: the test process went away, all ranks were killed."""
    ranks: dict[int, socket.socket] = {}
    pids: dict[int, int] = {}
    for rank in range(job.world_size):
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            control.close()
            ours.close()
            for other in ranks.values():
                other.close()
            _rank_main(job, rank, theirs)
        theirs.close()
        ranks[rank], pids[rank] = ours, pid
    outcome: dict[str, Any] | None
    try:
        outcome = _follow(job, control, ranks, pids)
    finally:
        for link in ranks.values():
            link.close()  # finished ranks wait for this, then leave
        for pid in pids.values():
            _reap(pid)
    return outcome


def _follow(
    job: Job, control: socket.socket, ranks: Mapping[int, socket.socket], pids: dict[int, int]
) -> dict[str, Any] | None:
    """Wait until all ranks finished, one failed, or time is up; then stop those that still run."""
    deadline = time.monotonic() + job.timeout_s
    running, died = set(ranks), {}
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ, None)
        for rank, link in ranks.items():
            selector.register(link, selectors.EVENT_READ, rank)
        while running and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.data is None:
                    _kill(pids, ranks)
                    return None
                word = ranks[key.data].recv(1)
                selector.unregister(ranks[key.data])
                running.discard(key.data)
                if word == b"":
                    died[key.data] = (_reap(pids.pop(key.data)), time.time_ns())
                if word in (b"", b"e"):
                    deadline = min(deadline, time.monotonic() + 0.05)
                elif word == b"v":
                    deadline = min(deadline, time.monotonic() + GRACE_S)
    timed_out = sorted(running) if time.monotonic() >= deadline else []
    if timed_out:
        for rank in timed_out:
            os.kill(pids[rank], signal.SIGUSR1)  # faulthandler writes where it stands
        time.sleep(0.1)
        _kill(pids, timed_out)
    return {"died": died, "running": timed_out}


def _kill(pids: Mapping[int, int], ranks: Sequence[int] | Mapping[int, Any]) -> None:
    for rank in ranks:
        if rank in pids:
            os.kill(pids[rank], signal.SIGKILL)


def _reap(pid: int) -> str:
    """Wait for a rank that is ending, killing it if it does not, and tell how it ended."""
    deadline = time.monotonic() + 5
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(status)
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _die_with_parent() -> None:
    """Let the kernel kill this process when its parent dies, however it dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


# --------------------------------------------------------------------------------------------------------- in a rank


def _rank_main(job: Job, rank: int, link: socket.socket) -> NoReturn:
    """The whole life of a rank; it never returns into the fork server's code."""
    _die_with_parent()
    output = os.open(_path(job, rank, "output"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    try:
        result = _call(job, rank)
        torch.save(result, _path(job, rank, "result"))
        word = b"o"
    except BaseException as error:
        victim = _is_victim(error)
        failure = Failure(rank, time.time_ns(), victim, traceback.format_exc())
        Path(_path(job, rank, "error")).write_text(json.dumps(failure.__dict__))
        word = b"v" if victim else b"e"
    link.sendall(word)
    link.recv(1)
    os._exit(0)


def _call(job: Job, rank: int) -> Any:
    sys.path[:] = job.search_path
    os.chdir(job.working_directory)
    os.environ.clear()
    os.environ.update({**job.environment, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
    torch.set_num_threads(1)
    backend = "gloo"
    if job.device == "cuda":
        num_devices = torch.cuda.device_count()
        torch.cuda.set_device(rank % num_devices)
        if job.world_size <= num_devices:
            backend = "cpu:gloo,cuda:nccl"
    if job.world_size > 1:
        store = dist.FileStore(os.path.join(job.directory, "store"), job.world_size)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=job.world_size,
            timeout=timedelta(seconds=job.timeout_s),
        )
        dist.all_reduce(torch.zeros(1))  # a case may end, or leave, while slower ranks still connect
    fn, args = pickle.loads(job.call)
    return fn(rank, job.world_size, *args)


def _is_victim(error: BaseException) -> bool:
    """True if this rank failed only because another one is gone or silent."""
    from trilith.comm import is_lost_peer  # here, so that cases run while the engine does not even import

    return is_lost_peer(error)
