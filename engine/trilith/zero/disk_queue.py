"""Threads that carry out operations block by block, the operations of one key one after the other.

Operations of different keys overlap, the oldest first, and the blocks of one operation are spread over all threads. A
thread waits in its system call, so there are never more blocks under way than threads.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable

from trilith.zero.disk_transfer import raise_all


class Ticket:
    """An operation under way; made by `BlockQueue.submit`."""

    def __init__(self, queue: BlockQueue, key: str, num_blocks: int, run: Callable[[int], None]) -> None:
        self.key = key
        self.error: Exception | None = None
        self._queue = queue
        self._done = threading.Event()
        # The queue's, under its lock.
        self.num_blocks, self.num_begun, self.num_ended = num_blocks, 0, 0
        self.run: Callable[[int], None] | None = run

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._done.is_set()

    def wait(self) -> None:
        """Wait for the end of the operation; raises its error."""
        self._done.wait()
        if self.error is not None:
            self._queue.forgive(self)
            raise self.error

    def end(self) -> None:
        """The queue calls this when the last block has ended."""
        self.run = None  # lets the tensor go
        self._done.set()


class BlockQueue:
    """`num_threads` daemon threads and the operations they carry out; they sleep while there is nothing to do."""

    def __init__(self, num_threads: int, name: str) -> None:
        assert num_threads >= 1, num_threads
        lock = threading.Lock()
        self._work, self._idle = threading.Condition(lock), threading.Condition(lock)
        self._of_key: dict[str, deque[Ticket]] = defaultdict(deque)  # the first of each is under way
        self._ready: deque[Ticket] = deque()  # under way, and with blocks not begun
        self._failed: list[Ticket] = []  # nobody has seen their errors yet
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"{name}-{index}", daemon=True) for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, key: str, num_blocks: int, run: Callable[[int], None]) -> Ticket:
        """Let the threads call `run` with 0 to num_blocks - 1, in any order, after all earlier operations of `key`.

        After an exception no further block begins, and the operation ends with it.
        """
        ticket = Ticket(self, key, num_blocks, run)
        with self._work:
            assert not self._is_closed
            self._of_key[key].append(ticket)
            if len(self._of_key[key]) == 1:
                self._begin(ticket)
        return ticket

    def wait_all(self) -> None:
        """Wait for all operations; raises the errors that no `Ticket.wait` has raised, if there are any."""
        with self._idle:
            while self._of_key:
                self._idle.wait()
            failed, self._failed = self._failed, []
        raise_all([ticket.error for ticket in failed if ticket.error is not None])

    def close(self) -> None:
        """Finish what was submitted and end the threads; raises what `wait_all` raises."""
        try:
            self.wait_all()
        finally:
            with self._work:
                self._is_closed = True
                self._work.notify_all()
            for thread in self._threads:
                thread.join()

    def forgive(self, ticket: Ticket) -> None:
        """The error of `ticket` has been raised to whoever waited for it."""
        with self._work:
            if ticket in self._failed:
                self._failed.remove(ticket)

    def _begin(self, ticket: Ticket) -> None:
        if ticket.num_blocks:
            self._ready.append(ticket)
            self._work.notify(ticket.num_blocks)
        else:
            self._end(ticket)

    def _end(self, ticket: Ticket) -> None:
        waiting = self._of_key[ticket.key]
        assert waiting.popleft() is ticket
        if ticket.error is not None:
            self._failed.append(ticket)
        ticket.end()
        if waiting:
            self._begin(waiting[0])
        else:
            self._of_key.pop(ticket.key, None)
            if not self._of_key:
                self._idle.notify_all()

    def _serve(self) -> None:
        while True:
            with self._work:
                while not self._ready and not self._is_closed:
                    self._work.wait()
                if not self._ready:
                    return
                ticket, index = self._ready[0], self._ready[0].num_begun
                ticket.num_begun += 1
                if ticket.num_begun == ticket.num_blocks:
                    self._ready.popleft()
                run = ticket.run
            assert run is not None
            error = None
            try:
                run(index)
            except Exception as caught:  # whatever it was, it is the operation's, and the thread lives on
                error = caught
            del run  # a sleeping thread must not keep a tensor
            with self._work:
                ticket.num_ended += 1
                if error is not None:
                    ticket.error = ticket.error or error
                    if ticket.num_begun < ticket.num_blocks:
                        self._ready.remove(ticket)
                        ticket.num_blocks = ticket.num_begun
                if ticket.num_ended == ticket.num_blocks:
                    self._end(ticket)
            del ticket, error
