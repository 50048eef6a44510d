"""The launching process while its ranks run: it waits, ends them all when one fails or the user interrupts, and knows
why.

Nothing here waits without a limit once the end has begun: other ranks get a grace to write their own accounts, then
SIGTERM, then SIGKILL, then the kernel is asked to kill the whole process group.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from trilith_launcher.cause import Ended

# After SIGTERM: until SIGKILL to each rank, and until SIGKILL to the group with everything the ranks started.
_TERM_TO_KILL_S = 0.5
_KILL_TO_GROUP_S = 0.5


@dataclass(frozen=True)
class Outcome:
    """How a run ended: every rank that was seen to end; the signal that interrupted it, unless a rank had failed
    before; why the fork server refused to start ranks (text), and how the server itself ended (0 = well).

    `group_killed_ns`: when the launcher killed what was left of the ranks, and the server with it (None = it did not).
    """

    ended: tuple[Ended, ...]
    interrupted_by: int | None
    refusal: str
    server_returncode: int
    group_killed_ns: int | None = None


@contextmanager
def caught_signals() -> Iterator[int]:
    """Turn SIGINT, SIGTERM, SIGHUP and SIGTSTP into bytes (their numbers) to be read from the file descriptor yielded.

    Outside the main thread nothing is caught, as Python delivers signals to the main thread only. SIGHUP stays ignored
    where it was (nohup). Former handlers are put back at the end.
    """
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    os.set_blocking(write_fd, False)

    def note(number: int, frame: object) -> None:
        with suppress(BlockingIOError):
            os.write(write_fd, bytes([number]))

    former = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
                ignored = signal.getsignal(number) == signal.SIG_IGN
                if not (ignored and number in (signal.SIGHUP, signal.SIGTSTP)):
                    former[number] = signal.signal(number, note)
        yield read_fd
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        os.close(read_fd)
        os.close(write_fd)


class Supervisor:
    """Watches one fork server and its ranks through `control`, on which the server writes one JSON object a line.

    `grace_s` says how long the other ranks get to end by themselves after the first that ended badly.
    """

    def __init__(
        self,
        server: subprocess.Popen[bytes],
        control: socket.socket,
        signals_fd: int,
        grace_s: Callable[[Ended], float],
    ) -> None:
        self._server = server
        self._control = control
        self._signals_fd = signals_fd
        self._grace_s = grace_s
        self._received = b""
        self._ended: list[Ended] = []
        self._refusal = ""
        self._interrupted_by: int | None = None
        self._failed = False
        self._signalled_ns: int | None = None
        self._group_killed_ns: int | None = None
        # What is still to be done to end the run: (when, signal), soonest first; signal 0 = kill the group.
        self._agenda: list[tuple[float, int]] = []

    def watch(self) -> Outcome:
        """Return when every rank, the server and whatever the ranks started in their process group are gone."""
        try:
            while self._step():
                pass
        finally:
            # The group cannot have been reused: its leader, the server, has not been reaped yet.
            self._kill_group()
            returncode = self._server.wait()
        return Outcome(tuple(self._ended), self._interrupted_by, self._refusal, returncode, self._group_killed_ns)

    def _step(self) -> bool:
        """Wait for one event and act on it; False when the server has gone."""
        control = self._control.fileno()
        timeout = max(0.0, self._agenda[0][0] - time.monotonic()) if self._agenda else None
        readable, _, _ = select.select((control, self._signals_fd), (), (), timeout)
        if self._signals_fd in readable:
            for number in os.read(self._signals_fd, 64):
                self._interrupt(number)
        if control in readable and not self._receive():
            return False
        while self._agenda and self._agenda[0][0] <= time.monotonic():
            self._signal_ranks(self._agenda.pop(0)[1])
        return True

    def _receive(self) -> bool:
        try:
            data = self._control.recv(65536)
        except ConnectionResetError:
            data = b""
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "refused" in message:
                self._refusal = message["refused"]
            else:
                self._note_end(Ended(**message, signalled_ns=self._signalled_ns))
        return bool(data)

    def _note_end(self, ended: Ended) -> None:
        self._ended.append(ended)
        if ended.returncode != 0 and not self._agenda and self._signalled_ns is None:
            self._failed = True
            self._begin_end(self._grace_s(ended))

    def _interrupt(self, number: int) -> None:
        if number == signal.SIGTSTP:
            self._pause()
            return
        if self._interrupted_by is not None:
            # Asked twice: no more patience.
            self._agenda = [(time.monotonic(), signal.SIGKILL), (time.monotonic() + _KILL_TO_GROUP_S, 0)]
            return
        if not self._failed:
            self._interrupted_by = number
            self._begin_end(0.0)

    def _begin_end(self, grace_s: float) -> None:
        term = time.monotonic() + grace_s
        kill = term + _TERM_TO_KILL_S
        self._agenda = [(term, signal.SIGTERM), (kill, signal.SIGKILL), (kill + _KILL_TO_GROUP_S, 0)]

    def _signal_ranks(self, number: int) -> None:
        if self._signalled_ns is None:
            self._signalled_ns = time.monotonic_ns()
        if number == 0:
            self._group_killed_ns = time.monotonic_ns()
            self._kill_group()
            return
        with suppress(BrokenPipeError, ConnectionResetError):
            self._control.send(bytes([number]))

    def _kill_group(self, number: int = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._server.pid, number)

    def _pause(self) -> None:
        """Ctrl-Z: the ranks, who are not in the terminal's foreground group, stop and go on with the launcher."""
        self._kill_group(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._kill_group(signal.SIGCONT)
