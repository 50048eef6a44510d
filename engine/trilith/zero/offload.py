"""Offload at work: units whose states, or whose share of the weights, are in host memory or on disk.

A step goes through the units in groups: first those on the device, all at once, then one offloaded unit after the
other. Its gradient comes down, its states come up from the disk if they live there (the next ones are read meanwhile,
the last ones written), it is updated in host memory by the same arithmetic as on the device, and its weights go up.
Ren et al. 2021 (ZeRO-Offload), section 4; Rajbhandari et al. 2021 (ZeRO-Infinity), section 6.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from trilith.failpoints import Failpoints
from trilith.zero.copies import Arrival, Copies
from trilith.zero.disk import DiskStore
from trilith.zero.flat import FlatUnit
from trilith.zero.placement import Moved, Tier
from trilith.zero.swap import State, Swapped


class Disk:
    """The files of a rank's offload: a store for each directory that the config names, opened when it is needed."""

    def __init__(self, config: Any, rank: int, failpoints: Failpoints) -> None:
        """`config` is resolved (`zero_optimization`, `aio`)."""
        self._zero, self._aio, self._rank, self._failpoints = config.zero_optimization, config.aio, rank, failpoints
        self._stores: dict[str, DiskStore] = {}

    def swapped(self, key: str, what: str) -> Swapped:
        """A new set of tensors under `key`; `what` is `states` or `weights`."""
        section = self._zero.offload_optimizer if what == "states" else self._zero.offload_param
        assert section.nvme_path is not None, "a rule of the config"
        if section.nvme_path not in self._stores:
            self._stores[section.nvme_path] = DiskStore(
                section.nvme_path,
                self._rank,
                threads=self._aio.intra_op_parallelism,
                block_bytes=self._aio.block_size,
                queue_depth=self._aio.queue_depth,
                checksum=self._zero.enable_sanity_checks,
                failpoints=self._failpoints,
            )
        return Swapped(self._stores[section.nvme_path], f"{key}/{what}")

    @property
    def bytes_read(self) -> int:
        """From all files."""
        return sum(store.bytes_read for store in self._stores.values())

    @property
    def bytes_written(self) -> int:
        """To all files."""
        return sum(store.bytes_written for store in self._stores.values())

    def close(self) -> None:
        """Let the files go."""
        stores, self._stores = list(self._stores.values()), {}
        for store in stores:
            store.close()


class Offload:
    """Brings units together with what of them is elsewhere. `units` are all of a rank's that train, `frozen` its others.

    `groups`: indices of units that are updated together, in order, the same on all data ranks.
    """

    def __init__(
        self,
        units: Sequence[FlatUnit],
        frozen: Sequence[FlatUnit],
        zero: Any,
        device: torch.device,
        disk: Disk,
        moved: Moved,
    ) -> None:
        self._units, self._all, self._disk, self._moved = tuple(units), (*units, *frozen), disk, moved
        optimizer = zero.offload_optimizer
        others = max(optimizer.buffer_count - 1, 0)  # besides the one at work
        self._num_writing = others // 2 if optimizer.pipeline_write else 0
        self._num_reading = others - self._num_writing if optimizer.pipeline_read else 0
        self._writing: deque[Swapped] = deque()
        self._opened: list[Swapped] = []
        self._copies = Copies(device)
        self._arrivals: dict[int, Arrival] = {}
        self.peak_host_bytes = 0  # of what lives on disk
        self.regroup()

    def regroup(self) -> None:
        """Take note of where units lie."""
        here = tuple(i for i, unit in enumerate(self._units) if unit.placement.states is Tier.DEVICE)
        others = ((i,) for i in range(len(self._units)) if i not in here)
        self.groups: tuple[tuple[int, ...], ...] = (*((here,) if here else ()), *others)

    @property
    def moved(self) -> Moved:
        """Bytes that crossed from one tier to another."""
        self._moved.disk_read, self._moved.disk_written = self._disk.bytes_read, self._disk.bytes_written
        return self._moved

    # ---- a step -------------------------------------------------------------------------------------------------

    def begin_update(self) -> None:
        """Begin to send the gradients that are on the device to where they are used, in the order of the updates."""
        self.put_back()
        self._read_from(0)
        for index in (index for group in self.groups for index in group):
            unit = self._units[index]
            if unit.optimizer_gradient is not None:
                self._arrivals[index] = self._copies.down(unit.optimizer_gradient, unit.own_gradient)
                self._moved.device_to_host += _bytes(unit.optimizer_gradient)

    def bring(self, place: int) -> None:
        """Have what the update of group number `place` changes."""
        for index in self.groups[place]:
            swap = self._units[index].states_swap
            if swap is not None:
                swap.wait()
            if index in self._arrivals:
                self._arrivals.pop(index).wait()
        self._read_from(place + 1)
        self._count()

    def send_up(self, unit: FlatUnit, is_used: bool = False) -> None:
        """Begin to bring rounded weights to the device; where they are used at once, the device waits for them."""
        if unit.rounded is not None and unit.has_master:
            self._copies.up(unit.own_weight, unit.rounded)
            if is_used:
                self._copies.join()

    def take_away(self, place: int) -> None:
        """Group number `place` is updated and its weights are rounded."""
        for index in self.groups[place]:
            unit = self._units[index]
            states, weights = unit.placement.states is Tier.DEVICE, unit.placement.weights is Tier.DEVICE
            if weights and not states:
                self._moved.host_to_device += _bytes(unit.own_weight)
            elif states and not weights:
                self._moved.device_to_host += _bytes(unit.own_weight)
            for swap in (unit.states_swap, unit.shard_swap):
                if swap is not None and swap.state is State.PRESENT:
                    self._put(swap)

    def _put(self, swap: Swapped) -> None:
        swap.put()
        self._writing.append(swap)
        while len(self._writing) > self._num_writing:
            self._writing.popleft().settle()

    def _read_from(self, place: int) -> None:
        """Begin to read the states of the next groups, as far as buffers go."""
        room = self._num_reading
        for group in self.groups[place:]:
            for index in group:
                swap = self._units[index].states_swap
                if swap is not None:
                    if not room:
                        return
                    swap.fetch()
                    room -= 1

    def end_update(self) -> None:
        """All groups are updated: what was written is written when this returns, or the error is raised.

        What the device computes next waits for the weights that are on their way to it.
        """
        self._copies.join()
        while self._writing:
            self._writing.popleft().settle()

    # ---- looking at states --------------------------------------------------------------------------------------

    def open(self, unit: FlatUnit) -> None:
        """Have all of a unit in memory, to be looked at or changed, until `put_back` or the next call with another one."""
        mine = [swap for swap in (unit.states_swap, unit.shard_swap) if swap is not None]
        if mine and not all(any(swap is other for other in self._opened) for swap in mine):
            self.put_back()
            self._open(mine)

    def open_all(self) -> None:
        """Have all units in memory until `put_back`: a checkpoint reads or fills them."""
        self.put_back()
        for unit in self._all:
            self._open([swap for swap in (unit.states_swap, unit.shard_swap) if swap is not None])

    def _open(self, swaps: Sequence[Swapped]) -> None:
        for swap in swaps:
            swap.wait()
            self._opened.append(swap)
        self._count()

    def put_back(self) -> None:
        """Write back what was opened."""
        opened, self._opened = self._opened, []
        for swap in opened:
            if swap.state is State.PRESENT:
                swap.put()
                swap.settle()

    def _count(self) -> None:
        swaps = [s for unit in self._all for s in (unit.states_swap, unit.shard_swap) if s is not None]
        self.peak_host_bytes = max(self.peak_host_bytes, sum(swap.host_bytes for swap in swaps))

    def close(self) -> None:
        """Let the files go."""
        self._opened.clear()
        self._writing.clear()
        self._disk.close()


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
