"""One group's shared memory: every rank writes its contributions to a ring of its own and reads those of the others.

A rank numbers the operations of a group; all ranks issue them in one order, so a number means the same everywhere. To
post an operation a rank copies its contribution into its ring and raises `posted`; whoever needs it reads it there and
raises `consumed` once all operations up to that number are over. There are no threads: posting never waits, what finds
no room is posted later, and a rank that waits for anything does whatever it can in all its groups meanwhile. So ranks
may wait in any order, or never.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from trilith.comm.memory import PAGE_BYTES, Process, SharedFile

# Enough for four of the largest pieces; memory is taken only as far as a ring has ever been filled.
CAPACITY_BYTES = 64 << 20
# Operations of a group that may be posted before all ranks have finished the first of them.
NUM_SLOTS = 128
# Words of a rank's head in a group; each of the first three has a cache line of its own.
POSTED, CONSUMED, _PLACES, REDUCED = 0, 8, 64, 64 + NUM_SLOTS
_ALIGNMENT = 64  # bytes: a cache line, and a multiple of every dtype's width
# A sleeper looks around this often: for ranks that died, and for what it could do for other groups.
_TICK_S = 0.02
# Waking a rank takes about as long as this; where every rank has a core it is cheaper to look again and again.
_SPIN_S = 60e-6


def area_bytes(capacity: int) -> int:
    """What a ring of `capacity` bytes takes in a rank's file: a page in front says what is in it."""
    return PAGE_BYTES + -(-capacity // PAGE_BYTES) * PAGE_BYTES


class Side:
    """The area of one rank in a group. `process` is None for this rank's own."""

    def __init__(self, file: SharedFile, start: int, capacity: int, process: Process | None) -> None:
        self.file, self.capacity, self.process = file, capacity, process
        self.words = file.words[start // 8 : (start + PAGE_BYTES) // 8]
        self._data = file.bytes_at(start + PAGE_BYTES, capacity)
        self._typed: dict[torch.dtype, Tensor] = {}

    def view(self, at: int, numel: int, dtype: torch.dtype) -> Tensor:
        """`numel` elements from byte `at` of the ring."""
        typed = self._typed.get(dtype)
        if typed is None:
            typed = self._typed[dtype] = self._data.view(dtype)
        first = at // dtype.itemsize
        return typed[first : first + numel]

    def place(self, number: int) -> int:
        """Where in the ring the contribution to operation `number` lies."""
        return self.words[_PLACES + number % NUM_SLOTS]


Blocker = tuple[Side, int, int]  # (a rank, the word, the least value) that an operation waits for


class Machine:
    """This rank among the ranks of its machine: where it sleeps, and the groups in which it has something to do."""

    def __init__(self, file: SharedFile, rank: int, num_ranks: int) -> None:
        self.rank = rank
        self.busy: list[Ring] = []
        self._own = file
        self._fence = threading.Lock()
        cores = len(os.sched_getaffinity(0))
        self._spin_s = _SPIN_S if num_ranks <= cores else 0.0

    def fence(self) -> None:
        """Let what was written before be seen before anything is read after: an atomic instruction does that."""
        self._fence.acquire(blocking=False)
        self._fence.release()

    def progress(self) -> bool:
        """Do in all groups what can be done without waiting; true while something is under way."""
        for ring in tuple(self.busy):
            ring.progress()
        return bool(self.busy)

    def wait(self, ring: Ring, operation: Operation) -> None:
        """Return when the operation is over. Raises RuntimeError for a rank that is gone or silent."""
        started_s = 0.0
        while True:
            self.progress()
            if operation.finished:
                return
            blocker = ring.room_blocker() if not operation.posted else operation.blocker()
            if blocker is None or self._spin(*blocker):
                continue
            if not operation.posted:
                self._rouse(blocker[0])
            now_s = time.monotonic()
            started_s = started_s or now_s
            self._sleep(*blocker)
            side, word, least = blocker
            if side.words[word] < least:
                _check(ring, side, word, least, time.monotonic() - started_s)

    def _spin(self, side: Side, word: int, least: int) -> bool:
        """Look for a while whether the word comes; false if it does not."""
        words = side.words
        if self._spin_s:
            stop_s = time.perf_counter() + self._spin_s
            while words[word] < least:
                if time.perf_counter() > stop_s:
                    return False
        return words[word] >= least

    def _sleep(self, side: Side, word: int, least: int) -> None:
        """Sleep until that rank raises such a word, or for a tick."""
        assert side.process is not None
        own, what = self._own, _code(side.process.rank, word)
        own.asleep = what
        self.fence()
        if side.words[word] < least:
            own.sleep(what, _TICK_S)
        own.asleep = 0

    def _rouse(self, side: Side) -> None:
        """Let a rank that sleeps on something else look around: this one needs room in its ring."""
        self.fence()
        if side.file.asleep:
            side.file.wake()


def _code(rank: int, word: int) -> int:
    """What a rank says it sleeps on: a word of another rank's."""
    kind = 1 if word == POSTED else 2 if word == CONSUMED else 3
    return (rank + 1) << 2 | kind


def _check(ring: Ring, side: Side, word: int, least: int, waited_s: float) -> None:
    """Raise the error of a lost peer (see `comm.is_lost_peer`) if a rank is gone or has been silent for too long."""
    assert side.process is not None
    if side.process.has_ended and side.words[word] < least:
        raise RuntimeError(f"connection closed by peer: the process of rank {side.process.rank} ended ({ring.name})")
    if waited_s > ring.timeout_s:
        raise RuntimeError(f"timed out waiting {ring.timeout_s:g} s for rank {side.process.rank} ({ring.name})")


class Operation(ABC):
    """One piece of a collective, as one rank sees it: what it writes to its ring, and what it does when others have."""

    __slots__ = ("finished", "number", "posted", "ring", "room")

    def __init__(self, ring: Ring, room: int) -> None:
        """`room`: bytes of its ring that this rank needs."""
        self.ring, self.room = ring, room
        self.number, self.posted, self.finished = 0, False, False

    @abstractmethod
    def write(self, at: int) -> None:
        """Copy this rank's contribution to byte `at` of its ring."""

    @abstractmethod
    def advance(self) -> bool:
        """Do what can be done without waiting; true when the operation is over. Only once it is posted."""

    def blocker(self) -> Blocker | None:
        """What this posted operation waits for first; None if nothing is missing any more."""
        return self.ring.lacking(POSTED, self.number)

    def wait(self) -> None:
        """Return when the operation is over."""
        if not self.finished:
            self.ring.complete(self)

    def is_completed(self) -> bool:
        """Whether it is over, or can be brought to its end without waiting."""
        if not self.finished:
            self.ring.progress()
        return self.finished


class Ring:
    """A group's shared memory, as one of its ranks sees it."""

    def __init__(self, machine: Machine, name: str, index: int, sides: Sequence[Side], timeout_s: float) -> None:
        self.machine, self.name, self.index, self.timeout_s = machine, name, index, timeout_s
        self.sides, self.own = tuple(sides), sides[index]
        self.others = tuple(side for place, side in enumerate(sides) if place != index)
        self._issued = 0
        self._pending: deque[Operation] = deque()
        self._unposted: deque[Operation] = deque()
        self._in_flight: deque[tuple[int, int, int]] = deque()  # (number, first byte, byte after the last)
        self._codes = {word: _code(machine.rank, word) for word in (POSTED, CONSUMED, REDUCED)}

    @property
    def piece_bytes(self) -> int:
        """The largest contribution of one operation: a quarter, so that one is read while others are written."""
        return self.own.capacity // 4

    def start(self, operation: Operation) -> Operation:
        """Give an operation the next number, and post it if there is room. Never waits."""
        self._issued += 1
        operation.number = self._issued
        if not self._pending:
            self.machine.busy.append(self)
        self._pending.append(operation)
        if self._unposted or not self._post(operation):
            self._unposted.append(operation)
            self.progress()
        elif operation.finished:  # a rank that only sends has nobody to wait for
            self._settle()
        return operation

    def complete(self, operation: Operation) -> None:
        """Return when the operation is over."""
        if operation.posted and operation.advance():
            self._settle()
        else:
            self.machine.wait(self, operation)

    def progress(self) -> None:
        """Post what found no room before, and do what the others' contributions allow."""
        for operation in self._pending:
            if not operation.posted:
                break
            if not operation.finished:
                operation.advance()
        self._settle()
        while self._unposted and self._post(self._unposted[0]):
            if self._unposted.popleft().finished:
                self._settle()

    def lacking(self, word: int, least: int) -> Blocker | None:
        """The first other rank whose `word` is below `least`."""
        for side in self.others:
            if side.words[word] < least:
                return side, word, least
        return None

    def room_blocker(self) -> Blocker | None:
        """What the oldest operation without room waits for: a rank that has not finished with the first one posted."""
        slots = self.lacking(CONSUMED, max(self._unposted[0].number - NUM_SLOTS, 0))
        if slots is None and self._in_flight:
            return self.lacking(CONSUMED, self._in_flight[0][0])
        return slots

    def raise_word(self, word: int, value: int, kind: int) -> None:
        """Say something to the others; wake those that sleep on it. `kind`: POSTED, CONSUMED or REDUCED."""
        self.own.words[word] = value
        self.machine.fence()
        code = self._codes[kind]
        for side in self.others:
            if side.file.asleep == code:
                side.file.wake()

    def _post(self, operation: Operation) -> bool:
        at = self._reserve(operation.room, operation.number)
        if at is None:
            return False
        operation.write(at)
        self.own.words[_PLACES + operation.number % NUM_SLOTS] = at
        operation.posted = True
        self.raise_word(POSTED, operation.number, POSTED)
        return True

    def _reserve(self, room: int, number: int) -> int | None:
        """The first of `room` bytes in a row for operation `number`, or None if the others still need too much."""
        flying = self._in_flight
        if flying or number > NUM_SLOTS:
            released = min(side.words[CONSUMED] for side in self.others)
            while flying and flying[0][0] <= released:
                flying.popleft()
            if number - released > NUM_SLOTS:
                return None
        size = -(-room // _ALIGNMENT) * _ALIGNMENT
        if not flying:  # from the start again: pages that were never written stay without memory
            first = 0
        else:
            (_, tail, _), (_, newest, head) = flying[0], flying[-1]
            if newest >= tail and head + size <= self.own.capacity:
                first = head
            elif newest >= tail and size < tail:
                first = 0
            elif newest < tail and head + size < tail:
                first = head
            else:
                return None
        if size:
            flying.append((number, first, first + size))
        return first

    def _settle(self) -> None:
        """Say which operations are over, in their order."""
        pending, last = self._pending, 0
        while pending and pending[0].finished:
            last = pending.popleft().number
        if last:
            self.raise_word(CONSUMED, last, CONSUMED)
            if not pending:
                self.machine.busy.remove(self)
