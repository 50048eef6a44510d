"""What the ranks of the launch tests run: all-reduce steps over gloo, or a pipeline; and one fault at one rank and step."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from tests.pipeline_cases import BOUNDARY, batches, stages_of
from trilith.pipeline.executor import Executor
from trilith.pipeline.passes import complete
from trilith.pipeline.schedules import make_schedule
from trilith.pipeline.transport import GroupChannels
from trilith.process_groups import build_topology, join_world
from trilith.topology import Degrees
from trilith_launcher import RankContext


def _raise_error() -> None:
    time.sleep(0.1)  # the other ranks are inside the collective by now
    raise ValueError("an injected error\nof two lines")


def _hold_interpreter_lock() -> None:
    ctypes.PyDLL(None).sleep(600)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


FAULTS: MappingProxyType[str, Callable[[], None]] = MappingProxyType(
    {
        "raise": _raise_error,
        "sys_exit": lambda: sys.exit(3),
        "hold_lock": _hold_interpreter_lock,
        "stop": _stop,
        "kill": _kill,
    }
)


def loop(
    *,
    rank: int,
    world_size: int,
    store_path: str | None,
    context: RankContext,
    status: str,
    steps: int,
    timeout_s: float = 60.0,
    fault: dict[str, Any] | None = None,
) -> None:
    """Sum ones over all ranks, `steps` times; `fault` = {kind, rank, step}.

    Without a `store_path` the environment says where to meet. Files in `status` tell the test what has happened:
    ready-<rank> after step 1, fault before the fault.
    """
    store = None if store_path is None else dist.FileStore(store_path, world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s))
    for step in range(1, steps + 1):
        context.position(step=step, stage=rank % 2, phase="forward")
        if fault is not None and (rank, step) == (fault["rank"], fault["step"]):
            Path(status, "fault").touch()
            FAULTS[fault["kind"]]()
        ones = torch.ones(1000)
        dist.all_reduce(ones)
        assert ones[0].item() == world_size
        if step == 1:
            Path(status, f"ready-{rank}").write_text(str(os.getpid()))
        time.sleep(0.005)
    dist.destroy_process_group()


def pipeline(
    *,
    rank: int,
    world_size: int,
    store_path: str,
    context: RankContext,
    status: str,
    schedule: str,
    fault: dict[str, Any],
    timeout_s: float = 60.0,
) -> None:
    """Steps of a pipeline of `world_size` ranks and eight microbatches, without an optimizer, for ever.

    `fault` = {kind, rank, step, action}: in that step, where the rank's computation `action` ("F2.3") would begin.
    """
    join_world(rank, world_size, store_path, timeout_s)
    torch.set_num_threads(1)
    actions = complete(make_schedule(schedule, world_size, 1, 8))
    topology = build_topology(Degrees(pipeline=world_size), torch.device("cpu"), timeout_s, channels=actions.channels())
    stages = stages_of(actions, rank)
    executor = Executor(actions, stages, GroupChannels(topology))
    executor.on_wait = context.wait
    names = [str(action) for action in actions.actions[rank]]
    stop = names.index(fault["action"]) if fault["rank"] == rank else len(names)
    for step in range(1, 100_000):
        context.position(step=step, stage=rank, phase="train")
        executor.begin(batches(8), BOUNDARY)
        if step == fault["step"]:
            executor.advance(stop)
            if fault["rank"] == rank:
                time.sleep(0.1)  # the other ranks have come to where they wait
                Path(status, "fault").touch()
                FAULTS[fault["kind"]]()
        executor.advance()
        executor.end()
