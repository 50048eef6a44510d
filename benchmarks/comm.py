"""What a collective costs: through shared memory beside gloo, and beside copying the bytes once.

`python -m benchmarks.comm [--json FILE] [--only TEXT]`. Ranks of one thread each, fp32; all_reduce, reduce_scatter and
all_gather of 64 KiB, 1 MiB and 16 MiB (the size of the whole: what a rank holds before an all_reduce or reduce_scatter,
after an all_gather). Results must have the same bits first. Then both take turns in the same processes; a call begins
after a barrier and lasts as long as the slowest rank needs. The limit is one copy of what a rank must take in, by memcpy,
times the ranks that share a core.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import trilith_launcher
from benchmarks.harness import Benchmark, Result, option_parser, timed
from trilith import comm
from trilith.process_groups import build_topology, join_world, leave_world
from trilith.topology import Degrees, Group

WORLD_SIZES = (2, 4, 8)
SIZES = (64 << 10, 1 << 20, 16 << 20)
CALLS = {64 << 10: 20, 1 << 20: 5, 16 << 20: 1}  # in one timing
NAMES = ("all_reduce", "reduce_scatter", "all_gather")
Call = Callable[[], Tensor]


def call_of(name: str, size: int, group: Group) -> Call:
    """A collective of `size` bytes over the group; it returns what the rank got."""
    whole = torch.randn(size // 4, generator=torch.Generator().manual_seed(group.index))
    part = whole[: len(whole) // group.size].clone()

    def call() -> Tensor:
        if name == "all_reduce":
            comm.all_reduce(whole, group)
            return whole
        if name == "reduce_scatter":
            comm.reduce_scatter(part, whole, group)
            return part
        comm.all_gather(whole, part, group)
        return whole

    return call


def timed_by_the_slowest(calls: int) -> Callable[[Callable[[], Any]], float]:
    """Seconds of one of several calls, from a barrier on, on the slowest rank."""

    def measure(action: Callable[[], Any]) -> float:
        dist.barrier()
        taken = torch.tensor(timed(lambda: [action() for _ in range(calls)]) / calls, dtype=torch.float64)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        return float(taken)

    return measure


def copy_s(size: int, world_size: int) -> float:
    """Seconds to copy what a rank takes in, where so many ranks share the cores."""
    source = torch.ones(size * (world_size - 1) // world_size // 4)
    target = torch.empty_like(source)
    return min(timed(lambda: target.copy_(source)) for _ in range(20)) * math.ceil(world_size / (os.cpu_count() or 1))


def measure_rank(*, rank: int, world_size: int, store_path: str, context: Any, rounds: int, only: str, to: str) -> None:
    """One rank; rank 0 writes the rows to the file `to`."""
    torch.set_num_threads(1)
    join_world(rank, world_size, store_path, 120)
    degrees, cpu = Degrees(shard=world_size), torch.device("cpu")
    shared, gloo = (build_topology(degrees, cpu, 120, shared_memory=flag).dp for flag in (True, False))
    benchmark = Benchmark("comm")
    for name in NAMES:
        for size in SIZES:
            case = f"{name}, {world_size} ranks, {size >> 10} KiB"
            if only not in case:
                continue
            ours, peer = call_of(name, size, shared), call_of(name, size, gloo)
            assert torch.equal(ours(), peer()), case
            benchmark.compare(
                case,
                ours,
                peer,
                peer_name="gloo",
                rounds=rounds,
                limit=copy_s(size, world_size),
                goal=0.2 if world_size == 2 and size != 1 << 20 else 1.0,
                timed=timed_by_the_slowest(CALLS[size]),
            )
    if rank == 0:
        Path(to).write_text(json.dumps([asdict(result) for result in benchmark.results]))
    leave_world()


def main() -> None:
    """Measure every collective with every number of ranks."""
    parser = option_parser(__doc__ or "")
    parser.add_argument("--only", default="", help="measure only rows whose case contains this text, as in '2 ranks'")
    options = parser.parse_args()
    benchmark = Benchmark("comm")
    with tempfile.TemporaryDirectory() as directory:
        for world_size in WORLD_SIZES:
            to = Path(directory) / "rows.json"
            code = trilith_launcher.launch(
                "benchmarks.comm:measure_rank",
                {"rounds": options.rounds, "only": options.only, "to": str(to)},
                num_ranks=world_size,
                threads_per_rank=1,
                preload=("torch", "trilith.trainer"),
            )
            if code:
                sys.exit(code)
            benchmark.results.extend(Result(**row) for row in json.loads(to.read_text()))
    benchmark.finish(options.json)


if __name__ == "__main__":
    main()
