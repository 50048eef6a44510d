"""Where a rank's part of each unit lies: on the device, in host memory or on disk. Pure, no torch.

ZeRO-Offload (Ren et al. 2021) keeps master weights and optimizer states in host memory, ZeRO-Infinity (Rajbhandari et al.
2021) weights, too, and both on disk. Here each unit has a place for either, whatever the stage and the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


def place_units(owned: Sequence[int], sharded: Sequence[bool], zero: Any) -> tuple[Placement, ...]:
    """The place of every unit; `owned[i]` elements of it are this rank's, `sharded[i]`: its weights are shared out.

    `zero` is the config section `zero_optimization`. A device "auto" begins in host memory (`settle` decides later). The
    units offloaded under a `ratio` are the last ones, whose gradients come first; on disk `max_in_cpu` elements of the
    first ones stay in host memory.
    """
    optimizer, param = zero.offload_optimizer, zero.offload_param
    states_tier, weights_tier = _tier(optimizer.device), _tier(param.device)
    wanted, moved = optimizer.ratio * sum(owned), 0
    states = [Tier.DEVICE] * len(owned)
    for index in reversed(range(len(owned))):
        if states_tier is not Tier.DEVICE and moved + owned[index] / 2 <= wanted:
            states[index] = states_tier
            moved += owned[index]
    in_host, weights = 0, []
    for numel, is_sharded in zip(owned, sharded, strict=True):
        tier = weights_tier if is_sharded else Tier.DEVICE
        if tier is Tier.DISK and in_host + numel <= param.max_in_cpu:
            tier, in_host = Tier.HOST, in_host + numel
        weights.append(tier)
    return tuple(Placement(a, b) for a, b in zip(states, weights, strict=True))


def _tier(device: str) -> Tier:
    return Tier.HOST if device == "auto" else Tier(device)


def settle(
    placements: Sequence[Placement],
    states_bytes: Sequence[int],
    weights_bytes: Sequence[int],
    room_bytes: int,
    zero: Any,
) -> tuple[Placement, ...]:
    """With a device "auto": bring to the device what `room_bytes` hold; `..._bytes[i]` are those of unit i.

    Weights come first: they cross twice a microbatch, states once a step; of either the first units.
    """
    found = list(placements)
    for automatic, what, sizes in (
        (zero.offload_param.device == "auto", "weights", weights_bytes),
        (zero.offload_optimizer.device == "auto", "states", states_bytes),
    ):
        for index, size in enumerate(sizes):
            if automatic and getattr(found[index], what) is Tier.HOST and size <= room_bytes:
                room_bytes -= size
                changed = {"states": found[index].states, "weights": found[index].weights, what: Tier.DEVICE}
                found[index] = Placement(**changed)
    return tuple(found)
