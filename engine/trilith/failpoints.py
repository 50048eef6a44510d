"""Named places where a fault can be injected, so that the tests of survival run the product's own code.

Armed by the environment variable TRILITH_FAILPOINT, "<name>:<rank>:<nth>:<action>", several separated by commas. It
is no configuration of a run: it exists for fault tests, here and on real clusters. <rank> is a number or "*" (all),
<nth> counts the passes of that rank from 1. Actions: `raise` (InjectedFault), `full` (the OSError of a full disk), `kill`
(SIGKILL), `stop` (SIGSTOP), `exit` (exit code 1 without a word), `sleep=<seconds>`.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from types import MappingProxyType

from trilith.errors import ConfigError, Violation

VARIABLE = "TRILITH_FAILPOINT"
REGISTERED = frozenset(
    (
        "build",
        "data_read",
        "forward",
        "optimizer_step",
        "evaluate",
        "checkpoint_write",
        "checkpoint_publish",
        "checkpoint_load",
        "offload_reserve",
        "offload_write",
        "offload_read",
    )
)
ACTIONS = ("raise", "full", "kill", "stop", "exit", "sleep")


class InjectedFault(RuntimeError):
    """Raised by a failpoint armed with `raise`."""


@dataclass(frozen=True)
class Failpoint:
    """One armed failpoint: acts on pass number `nth` (from 1) of `name`; `seconds` belongs to the action sleep."""

    name: str
    rank: int | None
    nth: int
    action: str
    seconds: float = 0.0

    def act(self) -> None:
        """Let the fault happen in this process."""
        if self.action == "raise":
            raise InjectedFault(f"failpoint {self.name}, pass {self.nth}")
        if self.action == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.action == "exit":
            os._exit(1)
        else:
            assert self.action == "sleep"
            time.sleep(self.seconds)


class Failpoints:
    """The failpoints of one rank, made once by the trainer and passed along; costs one lookup a pass when none is
    armed."""

    def __init__(self, armed: tuple[Failpoint, ...] = ()) -> None:
        self._armed: Mapping[str, tuple[Failpoint, ...]] = MappingProxyType(
            {name: tuple(p for p in armed if p.name == name) for name in {p.name for p in armed}}
        )
        self._passes = {name: count(1) for name in self._armed}

    @staticmethod
    def from_environment(rank: int, environment: Mapping[str, str] = os.environ) -> Failpoints:
        """The failpoints that TRILITH_FAILPOINT arms for `rank`; ConfigError lists what it gets wrong."""
        return Failpoints(tuple(p for p in parse(environment.get(VARIABLE, "")) if p.rank in (None, rank)))

    def is_armed(self, name: str) -> bool:
        """Whether a pass of `name` may act."""
        assert name in REGISTERED, name
        return name in self._armed

    def hit(self, name: str) -> None:
        """Pass the failpoint `name`, one of REGISTERED; acts if it is armed for this pass."""
        assert name in REGISTERED, name
        if name in self._armed:
            number = next(self._passes[name])
            for point in self._armed[name]:
                if point.nth == number:
                    point.act()


def parse(text: str) -> tuple[Failpoint, ...]:
    """The failpoints that `text` describes; raises ConfigError with every part that is wrong."""
    points, violations = [], []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        try:
            points.append(_parse_one(part))
        except ValueError as error:
            fix = f"write <name>:<rank or *>:<pass from 1>:<{'|'.join(ACTIONS)}=seconds>"
            violations.append(Violation(VARIABLE, part, str(error), fix))
    if violations:
        raise ConfigError(violations, "environment")
    return tuple(points)


def _parse_one(part: str) -> Failpoint:
    fields = part.split(":")
    if len(fields) != 4:
        raise ValueError(f"has {len(fields)} fields, not 4")
    name, rank, nth, action = fields
    if name not in REGISTERED:
        raise ValueError(f"no failpoint is named {name!r}; there are {', '.join(sorted(REGISTERED))}")
    if rank != "*" and not rank.isdecimal():
        raise ValueError(f"rank {rank!r} must be a number or *")
    if not nth.isdecimal() or int(nth) < 1:
        raise ValueError(f"pass {nth!r} must be a number from 1")
    action, equals, seconds = action.partition("=")
    if action not in ACTIONS or bool(equals) != (action == "sleep"):
        raise ValueError(f"unknown action {fields[3]!r}")
    duration = float(seconds) if equals else 0.0
    if not (math.isfinite(duration) and duration >= 0):
        raise ValueError(f"cannot sleep {seconds} seconds")
    return Failpoint(name, None if rank == "*" else int(rank), int(nth), action, duration)
