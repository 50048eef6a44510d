"""Tensors of a unit that live on disk: in host memory from `fetch` until what `put` wrote back is written."""

from __future__ import annotations

from enum import StrEnum

from torch import Tensor

from trilith.zero.disk import DiskStore, Ticket


class State(StrEnum):
    """Where the tensors are."""

    ABSENT = "absent"
    READING = "reading"
    PRESENT = "present"
    WRITING = "writing"


class Swapped:
    """A set of tensors that come and go together. They keep their identity, and so do views of them: only their storage
    comes and goes. What was never put is zero when it is fetched."""

    def __init__(self, store: DiskStore, key: str) -> None:
        self._store, self._key = store, key
        self._tensors: dict[str, Tensor] = {}
        self._written: set[str] = set()
        self._tickets: list[Ticket] = []
        self.state = State.PRESENT

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())

    @property
    def host_bytes(self) -> int:
        """Bytes of them that are in host memory now."""
        return 0 if self.state is State.ABSENT else self.num_bytes

    def add(self, role: str, tensor: Tensor) -> None:
        """Take in a contiguous tensor on the host, which is there now; raises OffloadError if the disk has no room."""
        assert role not in self._tensors and self.state is State.PRESENT, (self._key, role, self.state)
        self._store.reserve(f"{self._key}/{role}", tensor.numel() * tensor.element_size())
        self._tensors[role] = tensor

    def fetch(self) -> None:
        """Begin to bring the tensors back, if they are away; `wait` ends it."""
        if self.state is State.WRITING:
            self._finish()
            self.state = State.PRESENT
        if self.state is not State.ABSENT:
            return
        for role, tensor in self._tensors.items():
            tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())
            if role in self._written:
                self._tickets.append(self._store.read(f"{self._key}/{role}", tensor))
            else:
                tensor.zero_()
        self.state = State.READING

    def wait(self) -> None:
        """Have the tensors in host memory. Raises OffloadError if they are not to be had."""
        self.fetch()
        self._finish()
        self.state = State.PRESENT

    def put(self) -> None:
        """Begin to write the tensors back; they must not change until they are fetched again."""
        assert self.state is State.PRESENT, (self._key, self.state)
        for role, tensor in self._tensors.items():
            self._tickets.append(self._store.write(f"{self._key}/{role}", tensor))
            self._written.add(role)
        self.state = State.WRITING

    def settle(self) -> None:
        """Wait for what `put` began; then the memory is free. Raises OffloadError if the disk did not take it."""
        if self.state is State.WRITING:
            self._finish()
            self.drop()

    def drop(self) -> None:
        """Free the memory of tensors that are as they were when they were fetched."""
        if self.state is State.READING:
            self._finish()
        assert self.state is not State.WRITING or not self._tickets, self._key
        for tensor in self._tensors.values():
            tensor.untyped_storage().resize_(0)
        self.state = State.ABSENT

    def open_blank(self) -> None:
        """Give the tensors storage without contents, if they are away: to make views of them, or to write all of them."""
        if self.state is not State.ABSENT:
            return self.wait()
        for tensor in self._tensors.values():
            tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())
        self.state = State.PRESENT

    def _finish(self) -> None:
        tickets, self._tickets = self._tickets, []
        for ticket in tickets:
            ticket.wait()
