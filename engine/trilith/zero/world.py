"""How an engine of a user's script comes into the world of ranks, and leaves it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from trilith.config import Config
from trilith.errors import TrilithError
from trilith.process_groups import join_world
from trilith.topology import Group, Topology

LEAVE_TIMEOUT_S = 5.0


def join(config: Config) -> tuple[int, bool]:
    """The world size, and whether the default process group was made here, as torchrun's environment asks."""
    if dist.is_initialized():
        return dist.get_world_size(), False
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if world_size == 1:
        return 1, False
    join_world(int(os.environ["RANK"]), world_size, None, config.parallel.timeout_s, device_of(config).type)
    return world_size, True


def leave_at_exit() -> None:
    """Leave the world when the process ends: together if all come here soon, after a failure without waiting."""
    if not hasattr(sys, "last_type"):
        with suppress(RuntimeError):
            dist.barrier(async_op=True).wait(timedelta(seconds=LEAVE_TIMEOUT_S))
    dist.destroy_process_group()


def without_groups(topology: Topology) -> Topology:
    """The same place in the world, with nobody to talk to."""
    alone = Group("control", (topology.rank,), 0)
    nobody: MappingProxyType[Any, Any] = MappingProxyType({})
    return replace(topology, control=alone, groups=nobody, channels=nobody, ties=nobody)


def device_of(config: Config) -> torch.device:
    """The device that `run.device` names; under torchrun each rank of a machine has a GPU of its own, if there are.

    Raises TrilithError where there is none.
    """
    wanted = config.run.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TrilithError("run.device = 'cuda': there is no CUDA device here. Set it to 'cpu' or 'auto'")
    index = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    return torch.device("cuda", index % torch.cuda.device_count())
