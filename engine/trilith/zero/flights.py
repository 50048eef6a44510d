"""A unit's gradient on its way through a step: whole until it is reduced once, or reduced after every microbatch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trilith import comm
from trilith.kernels.weight_queue import Deferred
from trilith.zero.flat import FlatUnit, buffer_view
from trilith.zero.partition import UnitLayout
from trilith.zero.placement import Tier


class Flight:
    """A gradient that stays whole in the unit's buffer over the microbatches of a step, and is reduced at its end.

    `missing`: parameters that have not arrived in the backward that runs; `launched`: its reduction has begun.
    """

    passes = False

    def __init__(self, unit: FlatUnit) -> None:
        self.unit = unit
        self.missing = 0
        self.launched = False
        self.exchange: Tensor | None = None
        self.payload: Tensor | None = None
        self.handle: comm.Handle | None = None

    def whole(self) -> Tensor:
        """(numel,): this rank's gradient of the whole unit."""
        return self.unit.gradient

    def hand_over(self) -> Tensor:
        """The gradient for its reduction."""
        return self.whole()

    @property
    def has_waiting(self) -> bool:
        """Whether the first half of a backward left something that its second half has not taken."""
        return False

    def add(self, index: int, gradient: Tensor | Deferred) -> None:
        """Add the gradient of parameter number `index`, which may still be a product."""
        if isinstance(gradient, Deferred):
            self.unit.add_product(index, gradient)
        else:
            self.unit.gradient_views[index].add_(gradient)

    def wait_with(self, microbatch: int, index: int, gradient: Tensor) -> None:
        """Keep what the first half of a backward brought until the second half has come."""
        raise AssertionError("a whole gradient takes everything at once")

    def take_waiting(self, microbatch: int) -> None:
        """Add what waited for the second half of the backward of a microbatch."""

    def begin_exchange(self) -> Tensor:
        """What is summed over tensor ranks: a part of the gradient itself, or an area with copies of its parts."""
        layout, whole = self.unit.layout, self.whole()
        if layout.sums_in_place:
            start = layout.summed[0].offset
            self.exchange = whole[start : start + layout.exchange_numel]
        else:
            self.exchange = whole.new_zeros(layout.exchange_numel)
            for area, own in _summed_views(self.exchange, whole, layout):
                area.copy_(own)
        return self.exchange

    def end_exchange(self) -> None:
        """Take the sum into the gradient."""
        assert self.exchange is not None
        if not self.unit.layout.sums_in_place:
            for area, own in _summed_views(self.exchange, self.whole(), self.unit.layout):
                own.copy_(area)
        self.exchange = self.handle = None

    def settle(self) -> None:
        """Wait for the reduction, if one is under way; this rank's partition of the gradient has it then."""
        if self.handle is None:
            return
        self.handle.wait()
        assert self.payload is not None
        self._take(self.payload[self.unit.start : self.unit.stop])
        self.handle = self.payload = None

    def _take(self, reduced: Tensor) -> None:
        """`reduced` (partition,) is the sum over the data ranks."""
        if self.payload is not self.unit.gradient:
            self.unit.own_gradient.copy_(reduced)


class PassingFlight(Flight):
    """A gradient of which the rank keeps its partition only: the whole one exists in a bucket, for one microbatch."""

    passes = True

    def __init__(self, unit: FlatUnit, pool: BucketPool) -> None:
        super().__init__(unit)
        self._pool = pool
        self._bucket: Tensor | None = None
        self._views: tuple[Tensor, ...] = ()
        self._arrived: set[int] = set()
        self._sent: Tensor | None = None
        self._waiting: dict[int, list[tuple[int, Tensor]]] = {}

    @property
    def has_waiting(self) -> bool:
        """As `Flight.has_waiting`."""
        return bool(self._waiting)

    def whole(self) -> Tensor:
        """(numel,): the bucket. Parameters that no gradient arrived for have zeros."""
        bucket = self._open()
        if len(self._arrived) < len(self._views):
            for index, view in enumerate(self._views):
                if index not in self._arrived:
                    view.zero_()
            self._arrived.update(range(len(self._views)))
        return bucket

    def _open(self) -> Tensor:
        if self._bucket is None:
            self._bucket = self._pool.take(self.unit.layout)
            self._views = tuple(buffer_view(self._bucket, place) for place in self.unit.layout.placed)
        return self._bucket

    def add(self, index: int, gradient: Tensor | Deferred) -> None:
        """Put the gradient of parameter number `index` into the bucket."""
        self._open()
        view, is_first = self._views[index], index not in self._arrived
        self._arrived.add(index)
        if isinstance(gradient, Deferred):
            if is_first and view.dtype == gradient.x.dtype:
                gradient.gradient(out=view)
                return
            gradient = gradient.gradient()
        if is_first:
            view.copy_(gradient)
        else:
            view.add_(gradient)

    def wait_with(self, microbatch: int, index: int, gradient: Tensor) -> None:
        """Keep what the first half of a backward brought: norms and biases, and whatever is not deferred."""
        self._waiting.setdefault(microbatch, []).append((index, gradient))

    def take_waiting(self, microbatch: int) -> None:
        """Add what waited for the second half of the backward of a microbatch."""
        for index, gradient in self._waiting.pop(microbatch, ()):
            self.add(index, gradient)

    def settle(self) -> None:
        """As `Flight.settle`; the bucket is free for another unit then."""
        super().settle()
        if self._sent is not None:
            self._pool.give(self.unit.layout, self._sent)
            self._sent = None

    def hand_over(self) -> Tensor:
        """The whole gradient of the microbatch, no longer written to; the next arrival opens another bucket."""
        whole = self.whole()
        self._sent, self._bucket, self._views = whole, None, ()
        self._arrived.clear()
        return whole

    def _take(self, reduced: Tensor) -> None:
        own = self.unit.own_gradient
        own.add_(reduced.to(own.device))
        if self.unit.placement.states is not Tier.DEVICE:
            self.unit.moved.device_to_host += reduced.numel() * reduced.element_size()


class BucketPool:
    """Buffers for whole gradients of units, used again by units of the same layout: fresh memory costs more than a copy.

    `live_bytes` of them are in use, `peak_bytes` were at one time.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._free: dict[tuple[tuple[int, int], ...], list[Tensor]] = {}
        self.live_bytes = self.peak_bytes = 0

    def take(self, layout: UnitLayout) -> Tensor:
        """(numel,) with zeros in the padding; the rest is undefined."""
        free = self._free.get(_key(layout))
        bucket = free.pop() if free else torch.zeros(layout.numel, dtype=self._dtype, device=self._device)
        self.live_bytes += bucket.numel() * bucket.element_size()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return bucket

    def give(self, layout: UnitLayout, bucket: Tensor) -> None:
        """Take a buffer back, its padding as it was."""
        self.live_bytes -= bucket.numel() * bucket.element_size()
        self._free.setdefault(_key(layout), []).append(bucket)


def _key(layout: UnitLayout) -> tuple[tuple[int, int], ...]:
    """What two layouts share whose padding lies in the same places."""
    return ((layout.numel, layout.degree), *((place.offset, place.stop) for place in layout.placed))


def _summed_views(exchange: Tensor, whole: Tensor, layout: UnitLayout) -> Iterator[tuple[Tensor, Tensor]]:
    """(part of the exchange area, part of the gradient) of each run that is summed over tensor ranks."""
    for p in layout.summed:
        yield exchange[p.exchange_offset : p.exchange_offset + p.numel], whole[p.offset : p.offset + p.numel]
