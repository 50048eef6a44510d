"""A communication under way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from trilith.topology import Group

_PAUSE_S = 0.0005


class Handle:
    """What an asynchronous call returns: `wait()` before reading its output or writing its input.

    It keeps every buffer alive that the backend still uses. On gloo, `wait()` also does the local sum of a reduction,
    and the second half of a large all-reduce: ranks must wait for the handles of one group in one order. Through shared
    memory it does all the reading; ranks may wait in any order there.
    """

    __slots__ = ("_finish", "_keep", "_works")

    def __init__(self, works: Sequence[Any] = (), finish: Callable[[], None] | None = None, keep: Any = None) -> None:
        self._works: Sequence[Any] | None = works if works or finish else None
        self._finish = finish
        self._keep = keep

    def wait(self) -> None:
        """Block until the result is there (nccl: until later work on the current stream will see it).

        Raises what torch raises for a lost peer or a timeout; see `comm.is_lost_peer`.
        """
        if self._works is None:
            return
        for work in self._works:
            work.wait()
        if self._finish is not None:
            self._finish()
        self._works = self._finish = self._keep = None

    def then(self, finish: Callable[[], None]) -> Handle:
        """The same communication, with one more step at its end."""
        if self._works is None:
            finish()
            return self
        before = self._finish

        def both() -> None:
            if before is not None:
                before()
            finish()

        self._finish = both
        return self

    @property
    def done(self) -> bool:
        """True if `wait()` has nothing to wait for, as far as the backend can tell without waiting."""
        if self._works is None:
            return True
        return self._finish is None and all(work.is_completed() for work in self._works)


class _Patient:
    """A backend's work; who waits for it does meanwhile what other groups of this rank can do without waiting."""

    __slots__ = ("_meanwhile", "_work")

    def __init__(self, work: Any, meanwhile: Callable[[], bool]) -> None:
        self._work, self._meanwhile = work, meanwhile

    def wait(self) -> None:
        while not self._work.is_completed() and self._meanwhile():
            time.sleep(_PAUSE_S)
        self._work.wait()

    def is_completed(self) -> bool:
        return bool(self._work.is_completed())


def patient(work: Any, group: Group) -> Any:
    """The work of a backend, or one that does not keep the ranks that share memory with this one waiting."""
    return work if group.meanwhile is None else _Patient(work, group.meanwhile)
