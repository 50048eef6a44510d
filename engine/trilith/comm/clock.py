"""Puts the monotonic clocks of ranks on one time axis: what one rank's clock says when rank 0's says zero."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from trilith.comm.objects import gather_objects
from trilith.topology import Group

_EXCHANGES = 8
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def clock_offset_s(group: Group, clock: Callable[[], float] = time.perf_counter, host: str | None = None) -> float:
    """Seconds to add to this rank's `clock` to have that of the group's first rank; all ranks (of `control`) must call.

    Ranks of one machine share its monotonic clock: exactly 0. To every other rank the first sends a message that is
    answered with a reading of the clock; the answer is taken to be of the middle of the round trip, and of several
    exchanges the quickest counts. So the error is at most half of the shortest round trip (Cristian 1989). Clocks drift:
    call it near to the times that are to be aligned. `host` names the machine, by default its boot.
    """
    hosts = gather_objects(_host() if host is None else host, group)
    offset_s = 0.0
    for other in range(1, group.size):
        if hosts[other] == hosts[0]:
            continue
        if group.index == 0:
            _ask(group, other, clock)
        elif group.index == other:
            offset_s = _answer(group, clock)
    return offset_s


def _host() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return socket.gethostname()


def _ask(group: Group, other: int, clock: Callable[[], float]) -> None:
    """The first rank's part: several round trips, then the offset of the quickest."""
    peer = group.ranks[other]
    message = torch.zeros(1, dtype=torch.float64)
    found = []
    for _ in range(_EXCHANGES):
        sent_s = clock()
        dist.send(message, peer, group=group.handle)
        dist.recv(message, peer, group=group.handle)
        back_s = clock()
        found.append((back_s - sent_s, (sent_s + back_s) / 2 - float(message)))
    message[0] = min(found)[1]
    dist.send(message, peer, group=group.handle)


def _answer(group: Group, clock: Callable[[], float]) -> float:
    first = group.ranks[0]
    message = torch.zeros(1, dtype=torch.float64)
    for _ in range(_EXCHANGES):
        dist.recv(message, first, group=group.handle)
        message[0] = clock()
        dist.send(message, first, group=group.handle)
    dist.recv(message, first, group=group.handle)
    return float(message)
