"""Collectives on CPU tensors of ranks that share memory: the same functions as in `gloo`, with the same bits.

A rank copies what others need to its ring and reads what it needs from theirs, so that a byte is moved twice and no
thread of a network library takes a core. Sums are element by element in the order of ranks, in the tensor's dtype.
What is larger than a piece of the ring goes in pieces, each an operation of its own.

Every function takes contiguous tensors without autograd and at least two ranks, and returns a `Handle`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from trilith.comm.handle import Handle
from trilith.comm.ring import NUM_SLOTS, POSTED, REDUCED, Blocker, Operation, Ring
from trilith.topology import Group

Combine = Callable[..., Tensor]
# Of more than two ranks: above this many bytes, sums are shared out, each rank reads the others' (two steps).
TWO_STEP_BYTES = 64 << 10
# Sums of more than two ranks go in blocks of so many bytes, which stay in the core's cache.
_BLOCK_BYTES = 256 << 10


def _offsets(sizes: Sequence[int]) -> list[int]:
    """Where each part begins, and where the last one ends."""
    return [0, *accumulate(sizes)]


def _combine_all(parts: Sequence[Tensor], combine: Combine, output: Tensor) -> None:
    """Write parts[0] + parts[1] + ... to `output`, strictly from the left. `output` may be one of the parts."""
    if len(parts) == 2:
        combine(parts[0], parts[1], out=output)
        return
    numel = output.numel()
    block = min(numel, _BLOCK_BYTES // output.element_size())
    scratch = output.new_empty(block)
    for lo in range(0, numel, block or 1):
        hi = min(lo + block, numel)
        total = combine(parts[0][lo:hi], parts[1][lo:hi], out=scratch[: hi - lo])
        for part in parts[2:-1]:
            combine(total, part[lo:hi], out=total)
        combine(total, parts[-1][lo:hi], out=output[lo:hi])


class _Gather(Operation):
    """Every rank's part to all ranks."""

    __slots__ = ("_input", "_parts")

    def __init__(self, ring: Ring, parts: Sequence[Tensor], input: Tensor) -> None:
        super().__init__(ring, input.numel() * input.element_size())
        self._parts, self._input = parts, input

    def write(self, at: int) -> None:
        source, mine = self._input, self._parts[self.ring.index]
        if source.numel():
            self.ring.own.view(at, source.numel(), source.dtype).copy_(source)
            if mine.data_ptr() != source.data_ptr():
                mine.copy_(source)

    def advance(self) -> bool:
        ring, number = self.ring, self.number
        if ring.lacking(POSTED, number) is not None:
            return False
        for place, (side, part) in enumerate(zip(ring.sides, self._parts, strict=True)):
            if place != ring.index and part.numel():
                part.copy_(side.view(side.place(number), part.numel(), part.dtype))
        self.finished = True
        return True


class _Deal(Operation):
    """Part r of every rank's input to rank r, who combines them in the order of ranks, or takes them as they are."""

    __slots__ = ("_finish", "_input_parts", "_numel")

    def __init__(self, ring: Ring, input_parts: Sequence[Tensor], finish: Callable[[list[Tensor]], None]) -> None:
        mine = input_parts[ring.index]
        self._numel = [part.numel() for part in input_parts]
        super().__init__(ring, (sum(self._numel) - mine.numel()) * mine.element_size())
        self._input_parts, self._finish = input_parts, finish

    def write(self, at: int) -> None:
        ring, width = self.ring, self._input_parts[0].element_size()
        for place, part in enumerate(self._input_parts):
            if place != ring.index and part.numel():
                ring.own.view(at, part.numel(), part.dtype).copy_(part)
                at += part.numel() * width

    def advance(self) -> bool:
        ring, number = self.ring, self.number
        if ring.lacking(POSTED, number) is not None:
            return False
        index = ring.index
        mine = self._input_parts[index]
        numel, width = mine.numel(), mine.element_size()
        if numel:
            before = sum(self._numel[:index])
            parts = []
            for place, side in enumerate(ring.sides):
                if place == index:
                    parts.append(mine)
                else:  # a rank's ring has all parts but its own
                    skipped = before - (self._numel[place] if place < index else 0)
                    parts.append(side.view(side.place(number) + skipped * width, numel, mine.dtype))
            self._finish(parts)
        self.finished = True
        return True


class _ReduceAll(Operation):
    """The sum of all ranks' inputs to all ranks: everyone reads everyone's whole."""

    __slots__ = ("_combine", "_input", "_output")

    def __init__(self, ring: Ring, output: Tensor, input: Tensor, combine: Combine) -> None:
        super().__init__(ring, input.numel() * input.element_size())
        self._output, self._input, self._combine = output, input, combine

    def write(self, at: int) -> None:
        source = self._input
        self.ring.own.view(at, source.numel(), source.dtype).copy_(source)

    def advance(self) -> bool:
        ring, number, source = self.ring, self.number, self._input
        if ring.lacking(POSTED, number) is not None:
            return False
        numel, dtype = source.numel(), source.dtype
        parts = [
            source if place == ring.index else side.view(side.place(number), numel, dtype)
            for place, side in enumerate(ring.sides)
        ]
        _combine_all(parts, self._combine, self._output)
        self.finished = True
        return True


class _ReduceInTwoSteps(_ReduceAll):
    """The same, shared out: rank r sums part r, in its ring in the place of its own part r, and all read the sums."""

    __slots__ = ("_cuts", "_is_reduced")

    def __init__(self, ring: Ring, output: Tensor, input: Tensor, combine: Combine) -> None:
        super().__init__(ring, output, input, combine)
        few, more = divmod(input.numel(), len(ring.sides))
        self._cuts = _offsets([few + (place < more) for place in range(len(ring.sides))])
        self._is_reduced = False

    @property
    def _word(self) -> int:
        return REDUCED + self.number % NUM_SLOTS

    def _part(self, place: int, of: int) -> Tensor:
        """Part `of` in the ring of rank `place`."""
        side, source = self.ring.sides[place], self._input
        lo, hi = self._cuts[of], self._cuts[of + 1]
        return side.view(side.place(self.number) + lo * source.element_size(), hi - lo, source.dtype)

    def advance(self) -> bool:
        ring, number = self.ring, self.number
        if not self._is_reduced:
            if ring.lacking(POSTED, number) is not None:
                return False
            parts = [self._part(place, ring.index) for place in range(len(ring.sides))]
            mine = parts[ring.index]
            _combine_all(parts, self._combine, mine)
            # Once the others have read it, its place in the ring may be used again.
            self._output[self._cuts[ring.index] : self._cuts[ring.index + 1]].copy_(mine)
            self._is_reduced = True
            ring.raise_word(self._word, number, REDUCED)
        if ring.lacking(self._word, number) is not None:
            return False
        for place in range(len(ring.sides)):
            if place != ring.index:
                self._output[self._cuts[place] : self._cuts[place + 1]].copy_(self._part(place, place))
        self.finished = True
        return True

    def blocker(self) -> Blocker | None:
        if self._is_reduced:
            return self.ring.lacking(self._word, self.number)
        return super().blocker()


class _Broadcast(Operation):
    """One rank's tensor to all. The source is done once it has posted it."""

    __slots__ = ("_source_index", "_tensor")

    def __init__(self, ring: Ring, tensor: Tensor, source_index: int) -> None:
        is_source = ring.index == source_index
        super().__init__(ring, tensor.numel() * tensor.element_size() if is_source else 0)
        self._tensor, self._source_index = tensor, source_index

    def write(self, at: int) -> None:
        tensor = self._tensor
        if self.ring.index == self._source_index:
            self.ring.own.view(at, tensor.numel(), tensor.dtype).copy_(tensor)
            self.finished = True

    def advance(self) -> bool:
        if not self.finished and self.blocker() is None:
            tensor, side = self._tensor, self.ring.sides[self._source_index]
            tensor.copy_(side.view(side.place(self.number), tensor.numel(), tensor.dtype))
            self.finished = True
        return self.finished

    def blocker(self) -> Blocker | None:
        side = self.ring.sides[self._source_index]
        return (side, POSTED, self.number) if side.words[POSTED] < self.number else None


def _ring(group: Group) -> Ring:
    ring = group.transport
    assert isinstance(ring, Ring), f"{group.name} shares no memory"
    return ring


def _steps(largest: int, step: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of each piece of `largest` elements, at most `step` long; one at least."""
    step = max(step, 1)
    for lo in range(0, max(largest, 1), step):
        yield lo, lo + step


def all_gather(output: Tensor, input: Tensor, group: Group, sizes: Sequence[int]) -> Handle:
    """Write every rank r's `input` (flat, sizes[r] elements) to `output` (flat), in the order of ranks."""
    ring, parts = _ring(group), output.split(list(sizes))
    largest, step = max(sizes), ring.piece_bytes // input.element_size()
    if largest <= step:
        return Handle([ring.start(_Gather(ring, parts, input))])
    pieces = _steps(largest, step)
    return Handle([ring.start(_Gather(ring, [part[lo:hi] for part in parts], input[lo:hi])) for lo, hi in pieces])


def reduce_scatter(output: Tensor, input: Tensor, group: Group, combine: Combine, sizes: Sequence[int]) -> Handle:
    """Write the sum over ranks of part `index` of `input` (flat; part r has sizes[r] elements) to `output` (flat)."""

    def finish(lo: int, hi: int) -> Callable[[list[Tensor]], None]:
        return lambda parts: _combine_all(parts, combine, output[lo:hi])

    return Handle(_deal(_ring(group), input, sizes, finish))


def _deal(
    ring: Ring,
    input: Tensor,
    sizes: Sequence[int],
    finish: Callable[[int, int], Callable[[list[Tensor]], None]],
) -> list[Operation]:
    """Start to give part r of `input` to rank r; `finish(lo, hi)` takes elements lo to hi of this rank's parts."""
    parts = input.split(list(sizes))
    step = ring.piece_bytes // input.element_size() // len(sizes)
    return [
        ring.start(_Deal(ring, [part[lo:hi] for part in parts], finish(lo, hi))) for lo, hi in _steps(max(sizes), step)
    ]


def all_reduce(output: Tensor, input: Tensor, group: Group, combine: Combine) -> Handle:
    """Write the sum over ranks of `input` to `output` (both flat), which may be `input` itself."""
    ring, numel, width = _ring(group), input.numel(), input.element_size()
    kind = _ReduceInTwoSteps if group.size > 2 and numel * width > TWO_STEP_BYTES else _ReduceAll
    step = ring.piece_bytes // width
    if numel <= step:
        return Handle([ring.start(kind(ring, output, input, combine))])
    pieces = _steps(numel, step)
    return Handle([ring.start(kind(ring, output[lo:hi], input[lo:hi], combine)) for lo, hi in pieces])


def all_to_all(output: Tensor, input: Tensor, group: Group) -> Handle:
    """Send part r of `input` (flat, equal parts) to rank r and write what rank r sent to part r of `output` (flat)."""
    ring, count = _ring(group), input.numel() // group.size
    rows = output.split(count)

    def finish(lo: int, hi: int) -> Callable[[list[Tensor]], None]:
        def write(parts: list[Tensor]) -> None:
            for row, part in zip(rows, parts, strict=True):
                row[lo:hi].copy_(part)

        return write

    return Handle(_deal(ring, input, [count] * group.size, finish))


def broadcast(tensor: Tensor, source_index: int, group: Group) -> Handle:
    """Give all ranks the values of rank `source_index` of the group. A channel sends by it too."""
    ring, flat = _ring(group), tensor.view(-1)
    pieces = _steps(flat.numel(), ring.piece_bytes // flat.element_size())
    return Handle([ring.start(_Broadcast(ring, flat[lo:hi], source_index)) for lo, hi in pieces])


def barrier(group: Group) -> Handle:
    """Over once every rank has come to it."""
    ring, nothing = _ring(group), torch.empty(0)
    return Handle([ring.start(_Gather(ring, [nothing] * group.size, nothing))])
