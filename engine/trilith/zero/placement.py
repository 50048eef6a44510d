"""Where a rank's part of each unit lies: on the device, in host memory or on disk. Pure, no torch.

ZeRO-Offload (Ren et al. 2021) keeps master weights and optimizer states in host memory, ZeRO-Infinity (Rajbhandari et al.
2021) weights, too, and both on disk. Here each unit has a place for either, whatever the stage and the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any


class Tier(StrEnum):
    """A kind of memory, by the name that `offload_optimizer.device` has for it."""

    DEVICE = "none"
    HOST = "cpu"
    DISK = "nvme"


@dataclass(frozen=True)
class Placement:
    """`states`: of master weights and optimizer states, and of where they are updated; `weights`: of the rank's share of
    the weights at stage 3."""

    states: Tier = Tier.DEVICE
    weights: Tier = Tier.DEVICE


ON_DEVICE = Placement()


@dataclass
class Moved:
    """Bytes that crossed from one tier to another since the beginning."""

    device_to_host: int = 0
    host_to_device: int = 0
    disk_read: int = 0
    disk_written: int = 0


@dataclass(frozen=True)
class Sized:
    """A unit to be placed: the elements of its largest partition, the same on all ranks that update it together, so that
    all place it alike. `is_sharded`: its weights are shared out; `is_frozen`: it has no states."""

    numel: int
    is_sharded: bool
    is_frozen: bool = False


def place_units(units: Sequence[Sized], zero: Any) -> tuple[Placement, ...]:
    """The place of every unit.

    `zero` is the config section `zero_optimization`. A device "auto" begins in host memory (`settle` decides later). The
    units offloaded under a `ratio` are the last ones, whose gradients come first; on disk `max_in_cpu` elements of the
    first ones stay in host memory.
    """
    optimizer, param = zero.offload_optimizer, zero.offload_param
    states_tier, weights_tier = _tier(optimizer.device), _tier(param.device)
    wanted, moved = optimizer.ratio * sum(unit.numel for unit in units if not unit.is_frozen), 0
    states = [Tier.DEVICE] * len(units)
    for index, unit in reversed(list(enumerate(units))):
        if states_tier is not Tier.DEVICE and not unit.is_frozen and moved + unit.numel / 2 <= wanted:
            states[index] = states_tier
            moved += unit.numel
    in_host, weights = 0, []
    for unit in units:
        tier = weights_tier if unit.is_sharded else Tier.DEVICE
        if tier is Tier.DISK and in_host + unit.numel <= param.max_in_cpu:
            tier, in_host = Tier.HOST, in_host + unit.numel
        weights.append(tier)
    return tuple(Placement(a, b) for a, b in zip(states, weights, strict=True))


def _tier(device: str) -> Tier:
    return Tier.HOST if device == "auto" else Tier(device)


@dataclass(frozen=True)
class UnitBytes:
    """What parts of a unit take on the device: `weights`; `states`; and `masters`, which are among the states only while
    the weights are elsewhere or have another dtype."""

    weights: int
    states: int
    masters: int = 0


def settle(
    placements: Sequence[Placement], sizes: Sequence[UnitBytes], room_bytes: int, zero: Any
) -> tuple[Placement, ...]:
    """With a device "auto": bring to the device what `room_bytes` hold; `sizes` are those of the units.

    Weights come first: they cross twice a microbatch, states once a step; of either the first units.
    """
    found = list(placements)
    if zero.offload_param.device == "auto":
        for index, size in enumerate(sizes):
            if found[index].weights is Tier.HOST and size.weights <= room_bytes:
                room_bytes -= size.weights
                found[index] = replace(found[index], weights=Tier.DEVICE)
    if zero.offload_optimizer.device == "auto":
        for index, size in enumerate(sizes):
            needed = size.states + (size.masters if found[index].weights is not Tier.DEVICE else 0)
            if found[index].states is Tier.HOST and needed <= room_bytes:
                room_bytes -= needed
                found[index] = replace(found[index], states=Tier.DEVICE)
    return tuple(found)
