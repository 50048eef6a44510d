"""Collectives through shared memory: the same bits as by gloo, in any order of waiting, and never a hang."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.harness import run_ranks
from tests.parallel.test_comm import in_rank_order, values
from trilith import comm
from trilith.comm import meeting, memory, shared
from trilith.comm.ring import NUM_SLOTS, Ring
from trilith.process_groups import build_topology
from trilith.topology import Degrees, Group, Topology

CPU = torch.device("cpu")
DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
)
SMALL_RING = 1 << 16  # bytes; pieces of a quarter
Started = tuple[comm.Handle, Tensor, Tensor]  # (handle, output, expected)


def topology_of(world_size: int, *, tensor: int = 1, shared_memory: bool = True, timeout_s: float = 60) -> Topology:
    return build_topology(
        Degrees(shard=world_size // tensor, tensor=tensor), CPU, timeout_s, shared_memory=shared_memory
    )


def small_rings() -> None:
    """In this rank's process rings are small, so that everything is larger than one."""
    meeting.CAPACITY_BYTES = SMALL_RING  # type: ignore[misc]


def ring_of(group: Group) -> Ring:
    assert isinstance(group.transport, Ring), group
    return group.transport


def sizes_of(numel: int, world_size: int) -> list[list[int]]:
    """Equal and unequal parts of about `numel` elements."""
    rising = [numel * (2 * r + 1) // world_size**2 for r in range(world_size)]
    return [[numel // world_size] * world_size, rising, [0] * (world_size - 1) + [numel]]


def run_all(dtype: torch.dtype, numel: int, group: Group) -> list[Tensor]:
    """Every collective on `numel` elements, and what each brings."""
    rank = group.index
    whole = (values(rank, (numel,)) * 9).to(dtype)
    results = []
    for op in ("sum", "max", "min"):
        total = whole.clone()
        comm.all_reduce(total, group, op)
        results.append(total)
    results.append(comm.reduce_from(whole, group))
    for sizes in sizes_of(numel, group.size):
        lo = sum(sizes[:rank])
        mine = slice(lo, lo + sizes[rank])
        gathered = torch.zeros(sum(sizes), dtype=dtype)
        comm.all_gather(gathered, whole[: sizes[rank]], group, sizes)
        within = whole[: sum(sizes)].clone()
        comm.all_gather(within, within[mine], group, sizes)
        part = torch.zeros(sizes[rank], dtype=dtype)
        comm.reduce_scatter(part, whole[: sum(sizes)], group, sizes)
        in_place = whole[: sum(sizes)].clone()
        comm.reduce_scatter(in_place[mine], in_place, group, sizes)
        results += [gathered, within, part, in_place[mine]]
    rows = whole[: numel // group.size * group.size].view(group.size, -1)
    swapped = torch.zeros_like(rows)
    comm.all_to_all(swapped, rows, group)
    results.append(swapped)
    for source in (0, group.size - 1):
        told = whole.clone()
        comm.broadcast(told, source, group)
        results.append(told)
    comm.barrier(group)
    return results


def same_as_gloo(rank: int, world_size: int, is_small: bool) -> int:
    """Bit for bit, for every dtype and size; without and with rings that are too small."""
    if is_small:
        small_rings()
    ours, gloo = topology_of(world_size).dp, topology_of(world_size, shared_memory=False).dp
    assert ring_of(ours).own.capacity == (SMALL_RING if is_small else 64 << 20)
    assert gloo.transport is None and gloo.meanwhile is None
    count = 0
    for dtype in DTYPES:
        for numel in (0, 1, 7, 1001, 70_003):
            for found, expected in zip(run_all(dtype, numel, ours), run_all(dtype, numel, gloo), strict=True):
                assert torch.equal(found, expected), (dtype, numel, count)
                count += 1
    return count


@pytest.mark.parametrize("is_small", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, pytest.param(4, marks=pytest.mark.slow), 8])
def test_same_bits_as_gloo(world_size: int, is_small: bool) -> None:
    assert len(set(run_ranks(world_size, same_as_gloo, is_small, timeout_s=120))) == 1


def start(number: int, kind: int, numel: int, group: Group) -> Started:
    """Start a collective; its inputs are dropped here."""
    everyones = [values(1000 * number + r, (numel * group.size,), torch.float32) for r in range(group.size)]
    mine = everyones[group.index].clone()
    total = in_rank_order(everyones)
    own = slice(group.index * numel, (group.index + 1) * numel)
    if kind == 0:
        return comm.all_reduce(mine, group, async_op=True), mine, total
    if kind == 1:
        return comm.reduce_scatter(mine[own], mine, group, async_op=True), mine[own], total[own]
    if kind == 2:
        gathered = torch.empty(numel * group.size**2)
        return comm.all_gather(gathered, mine, group, async_op=True), gathered, torch.cat(everyones)
    source = number % group.size
    return comm.broadcast(mine, source, group, async_op=True), mine, everyones[source]


def check(started: Started) -> None:
    handle, output, expected = started
    handle.wait()
    assert handle.done and torch.equal(output, expected)


def many_in_flight(rank: int, world_size: int, order: str, count: int) -> int:
    """More operations than the ring and its slots hold, waited for in order, in reverse, or as each rank likes."""
    small_rings()
    group = topology_of(world_size).dp
    started = [start(number, number % 4, 1 + 37 * (number % 23), group) for number in range(count)]
    for number, one in enumerate(started):
        if number % 7 == 3:
            one[0].done  # noqa: B018 - may move things along, never waits
    if order == "reverse":
        started.reverse()
    if order == "any":
        random.Random(rank).shuffle(started)
    for one in started[: count // 2] if order == "half" else started:
        check(one)
    comm.barrier(group)
    return len(started)


@pytest.mark.parametrize("order", ["same", "reverse", "any", "half"])
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_many_in_flight(world_size: int, order: str) -> None:
    count = NUM_SLOTS + 40 if world_size < 8 else 60
    assert run_ranks(world_size, many_in_flight, order, count, timeout_s=60) == [count] * world_size


def crossed_groups(rank: int, world_size: int) -> None:
    """Full rings of one group while ranks wait in another: whoever waits for anything serves all groups."""
    small_rings()
    topology = topology_of(world_size, tensor=2)
    dp, tp = topology.dp, topology.tp
    for round_number in range(3):
        late = [start(number, number % 4, 3000, dp) for number in range(12)]  # far more than the ring holds
        for number in range(4):
            check(start(number, number % 4, 500, tp))
        if rank % 2:
            comm.barrier(topology.control)  # before its dp operations here, after them on the other ranks
        for one in reversed(late) if round_number % 2 else late:
            check(one)
        if not rank % 2:
            comm.barrier(topology.control)


def test_full_rings_of_one_group_do_not_stop_another() -> None:
    run_ranks(4, crossed_groups, timeout_s=60)


def refuse(number: int, opened: Callable[..., memory.Process], rank: int, *about: object) -> memory.Process:
    """What a rank does to whom another machine's rank is unreachable."""
    if rank % 2 != number % 2:
        raise OSError("on another machine")
    return opened(rank, *about)


def some_groups_stay_with_gloo(rank: int, world_size: int) -> list[str]:
    """Two machines of two ranks: dp within each is shared, tp across them is gloo's; waiting for one serves the other."""
    small_rings()
    meeting.Process = partial(refuse, rank, memory.Process)  # type: ignore[misc, assignment]
    topology = topology_of(world_size, tensor=2)
    dp, tp = topology.dp, topology.tp
    ring_of(dp)
    assert tp.transport is None and tp.meanwhile is not None and topology.control.transport is None
    late = [start(number, number % 4, 3000, dp) for number in range(12)]
    if rank < 2:
        comm.barrier(topology.control)  # gloo: these ranks owe the others what did not fit into their rings
    check(start(0, 0, 100_000, tp))
    for one in late:
        check(one)
    if rank >= 2:
        comm.barrier(topology.control)
    return sorted(name for name, group in topology.groups.items() if group.transport is not None)


def test_groups_across_machines_stay_with_gloo() -> None:
    assert run_ranks(4, some_groups_stay_with_gloo, timeout_s=60) == [["dp"]] * 4


def refused(rank: int, world_size: int, how: str) -> bool:
    """One rank has no shared memory: no rank of its groups uses it."""
    if how == "memfd" and rank == 1:
        meeting.is_possible = lambda: False
    if how == "file" and rank == 1:
        meeting.new_file = partial(_no_file, memory.new_file)
    topology = topology_of(world_size, shared_memory=how != "off")
    check(start(1, 0, 100, topology.dp))
    return topology.dp.transport is None and topology.control.transport is None


def _no_file(make: Callable[[int], object], size: int) -> object:
    raise OSError("no memory")


@pytest.mark.parametrize("how", ["off", "memfd", "file"])
def test_gloo_where_memory_cannot_be_shared(how: str) -> None:
    assert run_ranks(3, refused, how) == [True] * 3


def channels(rank: int, world_size: int) -> int:
    """Messages of all sizes arrive in order; sends do not wait for the other side while there is room, nor for a
    receive that was never waited for."""
    small_rings()
    topology = build_topology(Degrees(pipeline=2), CPU, 30, channels=[(0, 1), (1, 0)])
    out, back = topology.channels[rank, 1 - rank], topology.channels[1 - rank, rank]
    sizes = [1, 5000, 17, 40_000, 3, 20_000] * 40
    comm.send(torch.ones(2000), out).wait()  # nobody receives yet
    first = torch.empty(2000)
    comm.receive(first, back).wait()
    assert bool((first == 1).all())
    sends = [comm.send(torch.full((size,), float(number)), out) for number, size in enumerate(sizes)]
    arrived = [torch.empty(size) for size in sizes]
    receives = [comm.receive(tensor, back) for tensor in arrived]
    for handle in (*reversed(receives), *sends):
        handle.wait()
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(arrived))
    return len(ring_of(out)._pending) + len(ring_of(back)._pending)


def test_channels() -> None:
    assert run_ranks(2, channels) == [0, 0]


def memory_stays_bounded(rank: int, world_size: int) -> int:
    """What is consumed makes room at the ring's start; the highest byte ever used of a thousand operations."""
    group = topology_of(world_size).dp
    for number in range(1000):
        check(start(number % 10, number % 4, 100, group))
    used = ring_of(group).own.view(0, 1 << 20, torch.uint8)
    return int(used.nonzero().max())


def test_only_what_is_in_flight_takes_memory() -> None:
    assert max(run_ranks(2, memory_stays_bounded)) < 64 << 10


def shared_files() -> tuple[int, int]:
    """How many shared files this process has open, and has mapped."""
    opened = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that lists them
            opened += "memfd:trilith" in os.readlink(f"/proc/self/fd/{fd}")
    return opened, Path("/proc/self/maps").read_text().count("memfd:trilith")


def come_and_go(rank: int, world_size: int) -> list[tuple[int, int]]:
    """While a topology lives, and after."""
    counts = []
    for _ in range(3):
        topology = topology_of(world_size)
        check(start(1, 0, 100_000, topology.dp))
        comm.barrier(topology.control)
        counts.append(shared_files())
        del topology
        counts.append(shared_files())
    return counts


def test_maps_and_files_go_with_the_groups() -> None:
    assert run_ranks(2, come_and_go) == [[(2, 2), (0, 0)] * 3] * 2


def lost(rank: int, world_size: int, how: str, kind: int) -> tuple[str, float]:
    """Rank 1 goes, or hangs, before its third operation; what the others see, and after how long."""
    topology = topology_of(world_size, timeout_s=1.5)
    group, started_s = topology.dp, 0.0
    try:
        for number in range(4):
            if number == 2:
                started_s = time.monotonic()
                if rank == 1:
                    if how == "dies":
                        os.kill(os.getpid(), signal.SIGKILL)
                    time.sleep(3)
                    return "", 0.0
            check(start(number, kind, 50_000, group))
    except RuntimeError as error:
        assert comm.is_lost_peer(error) and number == 2
        return str(error), time.monotonic() - started_s
    raise AssertionError("rank 1 was not missed")


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_silent_rank_is_named(world_size: int, kind: int) -> None:
    for rank, (text, seconds) in enumerate(run_ranks(world_size, lost, "hangs", kind)):
        assert rank == 1 or (text == "timed out waiting 1.5 s for rank 1 (dp)" and 1.4 < seconds < 2.8), (text, seconds)


def test_a_dead_rank_is_named_at_once() -> None:
    started_s = time.monotonic()
    with pytest.raises(AssertionError, match="rank 1 died: signal SIGKILL"):
        run_ranks(4, lost, "dies", 0)
    assert time.monotonic() - started_s < 4


def dead_child(rank: int, world_size: int) -> str:
    """A rank whose process was replaced by nothing: the others name it, within a few ticks."""
    topology = topology_of(world_size, timeout_s=30)
    comm.barrier(topology.dp)
    if rank == 1:
        ring = ring_of(topology.dp)
        assert not ring.others[0].process.has_ended  # type: ignore[union-attr]
        return ""
    process = ring_of(topology.dp).sides[1].process
    assert process is not None
    type(process).has_ended = property(lambda self: True)  # type: ignore[assignment, method-assign]
    try:
        comm.all_reduce(torch.ones(3), topology.dp)
    except RuntimeError as error:
        assert comm.is_lost_peer(error)
        return str(error)
    return "nobody was missed"


def test_the_message_of_a_dead_rank() -> None:
    assert run_ranks(2, dead_child)[0] == "connection closed by peer: the process of rank 1 ended (dp)"


def test_steps_cover_everything() -> None:
    for largest in (0, 1, 5, 6, 7):
        covered = [i for lo, hi in shared._steps(largest, 3) for i in range(lo, min(hi, largest))]
        assert covered == list(range(largest))
