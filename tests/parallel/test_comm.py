"""Collectives against one process: values, gradients, the order of sums, dtypes, handles."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import assert_close_named, run_ranks
from trilith import comm
from trilith.comm import gloo
from trilith.comm.collectives import _nccl_all_gather, _nccl_reduce_scatter
from trilith.process_groups import build_topology
from trilith.topology import Degrees, Group

WORLD_SIZES = (2, 3, 4)


def this_device(device: str) -> torch.device:
    """The CPU, or this rank's GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def group_of_all(world_size: int, device: str = "cpu") -> Group:
    """A group over all ranks, as the engine makes it."""
    return build_topology(Degrees(shard=world_size), this_device(device), 60).dp


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """What rank `rank` holds: every rank can compute every other's."""
    generator = torch.Generator().manual_seed(1000 + rank)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def in_rank_order(tensors: list[Tensor]) -> Tensor:
    """The sum, strictly from the left."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total = total + tensor
    return total


# ---------------------------------------------------------------------------------------------------------- autograd

# (input shape of a rank with n ranks, dim); first dims of one element take the copy-free way.
SHAPES: tuple[tuple[Callable[[int], tuple[int, ...]], int], ...] = (
    (lambda n: (n, 5), 0),
    (lambda n: (3, 2 * n, 4), 1),
    (lambda n: (1, 2 * n, 4), 1),
    (lambda n: (2, 3, 3 * n), -1),
    (lambda n: (1, 1, n), 2),
)


def part(tensor: Tensor, rank: int, size: int, dim: int) -> Tensor:
    """Part `rank` of `tensor` along `dim`."""
    return tensor.chunk(size, dim)[rank]


def truth(name: str, inputs: list[Tensor], size: int, dim: int) -> list[Tensor]:
    """The outputs of all ranks in one process. Ranks whose output is one and the same value share one tensor."""
    total = in_rank_order(inputs)
    if name == "copy_to":
        return [inputs[0]] * size
    if name == "reduce_from":
        return [total]
    if name == "gather_along":
        return [torch.cat(inputs, dim)] * size
    if name == "concat_along":
        return [torch.cat(inputs, dim)]
    if name == "scatter_sum_along":
        return [part(total, rank, size, dim) for rank in range(size)]
    assert name == "split_along"
    return [part(inputs[0], rank, size, dim) for rank in range(size)]


AUTOGRAD = ("copy_to", "reduce_from", "gather_along", "scatter_sum_along", "split_along", "concat_along")
SAME_INPUT = ("copy_to", "split_along")


def check_pair(name: str, rank: int, group: Group, shape: tuple[int, ...], dim: int, device: str) -> None:
    """Forward and gradient of one collective; the input and the gradient are not contiguous."""
    size = group.size
    inputs = [values(0 if name in SAME_INPUT else r, shape).mT.contiguous().mT.requires_grad_() for r in range(size)]
    inputs = [inputs[0]] * size if name in SAME_INPUT else inputs
    expected = truth(name, inputs, size, dim)
    weights = [values(50 + r, tuple(out.shape)) for r, out in enumerate(expected)]
    losses = [(out * weight).sum() for out, weight in zip(expected, weights, strict=True)]
    expected_gradient = torch.autograd.grad(torch.stack(losses).sum(), inputs[rank])[0]

    mine = inputs[rank].detach().to(device).requires_grad_()
    arguments = () if name in ("copy_to", "reduce_from") else (dim,)
    output = getattr(comm, name)(mine, group, *arguments)
    at = rank if len(expected) > 1 else 0
    (gradient,) = torch.autograd.grad(output, mine, weights[at].to(device).mT.contiguous().mT)
    where = f"{name} {shape} dim {dim} rank {rank} of {size}"
    assert_close_named(
        {
            f"{where} output": (output, expected[at]),
            f"{where} input gradient": (gradient, expected_gradient),
            f"{where} input": (mine, inputs[rank]),
        },
        rtol=1e-13,
    )


def all_pairs(rank: int, world_size: int, device: str) -> int:
    """Every autograd collective in every shape."""
    group = group_of_all(world_size, device)
    count = 0
    for name in AUTOGRAD:
        for shape, dim in SHAPES:
            check_pair(name, rank, group, shape(world_size), dim, device)
            count += 1
    return count


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gradients(world_size: int) -> None:
    assert run_ranks(world_size, all_pairs, "cpu") == [30] * world_size


@pytest.mark.gpu
def test_gradients_on_cuda() -> None:
    run_ranks(2, all_pairs, "cuda", device="cuda")
    run_ranks(3, all_pairs, "cuda", device="cuda")


def indivisible(rank: int, world_size: int) -> str:
    """A dim that does not divide is our mistake, said with its numbers."""
    try:
        comm.split_along(torch.zeros(2, 5), group_of_all(world_size), 1)
    except AssertionError as error:
        return str(error)
    return ""


def test_indivisible_dim_is_named() -> None:
    assert run_ranks(2, indivisible) == ["dim 1 of (2, 5) must divide by the 2 ranks of dp"] * 2


def test_one_rank_communicates_nothing() -> None:
    alone = Group("tp", (0,), 0)
    x = values(0, (2, 4)).requires_grad_()
    for name in AUTOGRAD:
        arguments = () if name in ("copy_to", "reduce_from") else (1,)
        assert getattr(comm, name)(x, alone, *arguments) is x
    y, out = values(0, (4,)), torch.zeros(4, dtype=torch.float64)
    assert comm.all_reduce(y, alone, async_op=True).done and torch.equal(y, values(0, (4,)))
    for collective in (comm.all_gather, comm.reduce_scatter, comm.all_to_all):
        out.zero_()
        assert collective(out, y, alone).done and torch.equal(out, y)
    assert comm.broadcast(y, 0, alone).done
    comm.barrier(alone)
    assert comm.gather_objects({"a": (1, 2.5)}, alone) == [{"a": [1, 2.5]}]
    assert comm.broadcast_object("text", 0, alone) == "text"


# -------------------------------------------------------------------------------------------------- the order of sums


def sums(rank: int, world_size: int) -> None:
    """Sums are bitwise the sum in rank order, at any offset and size, by either collective, in place or not."""
    group = group_of_all(world_size)
    large = gloo.COPY_BYTES // 4 + 3  # indivisible; in float32 and float64 beyond every threshold, else the first
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        whole = [values(r, (large,), dtype) for r in range(world_size)]
        expected = in_rank_order(whole)
        for lo, hi in ((0, large), (0, 1), (5, 12), (7, 70_000), (large - 100_001, large)):
            mine = whole[rank].clone()
            comm.all_reduce(mine[lo:hi], group)
            assert torch.equal(mine[lo:hi], expected[lo:hi]), (dtype, lo, hi)
            assert torch.equal(mine[hi:], whole[rank][hi:]) and torch.equal(mine[:lo], whole[rank][:lo])
            assert torch.equal(comm.reduce_from(whole[rank][lo:hi], group), expected[lo:hi])
            count = (hi - lo) // world_size
            output = torch.empty(count, dtype=dtype)
            comm.reduce_scatter(output, whole[rank][lo : lo + count * world_size], group)
            assert torch.equal(output, expected[lo:][rank * count : (rank + 1) * count]), (dtype, lo, hi)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_sums_in_rank_order(world_size: int) -> None:
    run_ranks(world_size, sums)


# ------------------------------------------------------------------------------------------------- everything else


def plain(rank: int, world_size: int, device: str) -> None:
    """all_reduce's other ops, gathers, broadcast and all_to_all in several dtypes and forms."""
    group = group_of_all(world_size, device)
    ranks = range(world_size)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool):
        table = torch.stack([(values(r, (2, 3)) * 9).to(dtype) for r in ranks])
        mine = table[rank].to(device)
        gathered = torch.empty(world_size, 2, 3, dtype=dtype, device=device)
        comm.all_gather(gathered, mine, group)
        assert torch.equal(gathered.cpu(), table)
        in_place = torch.zeros_like(gathered)
        in_place[rank] = mine
        comm.all_gather(in_place, in_place[rank], group)
        assert torch.equal(in_place.cpu(), table)
        for op, expected in (("max", table.amax(0)), ("min", table.amin(0))):
            reduced = mine.mT.contiguous().mT  # not contiguous
            comm.all_reduce(reduced, group, op)
            assert torch.equal(reduced.cpu(), expected), (dtype, op)
        for source in (0, world_size - 1):
            received = mine.mT.contiguous().mT
            comm.broadcast(received, source, group)
            assert torch.equal(received.cpu(), table[source])
        sent = torch.cat([table[rank] for _ in ranks]).to(device)
        swapped = torch.empty_like(sent)
        comm.all_to_all(swapped, sent, group)
        assert torch.equal(swapped.cpu(), torch.cat(list(table)))
    counter = torch.tensor(rank, device=device)  # no dims
    comm.all_reduce(counter, group)
    assert counter.item() == sum(ranks)
    uneven(rank, group, device)
    empty = torch.empty(0, 3, device=device)
    assert comm.all_reduce(empty, group).done and comm.all_gather(empty, empty, group).done


def large_gathers(rank: int, world_size: int) -> None:
    """All-gather on either side of the size at which its way changes, into new memory and in place."""
    group = group_of_all(world_size)
    for numel in (gloo.COPY_BYTES // 8 // world_size, gloo.COPY_BYTES // 8 // world_size + 1):
        table = torch.stack([values(r, (numel,)) for r in range(world_size)])
        gathered = torch.empty_like(table)
        comm.all_gather(gathered, table[rank], group)
        in_place = torch.zeros_like(table)
        in_place[rank] = table[rank]
        comm.all_gather(in_place, in_place[rank], group)
        assert torch.equal(gathered, table) and torch.equal(in_place, table)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_large_gathers(world_size: int) -> None:
    run_ranks(world_size, large_gathers)


def uneven(rank: int, group: Group, device: str) -> None:
    """Rank r sends r + s rows to rank s; rank 0 sends itself none."""
    counts = [rank + other for other in range(group.size)]
    rows = torch.cat([torch.full((n, 2), float(10 * rank + s)) for s, n in enumerate(counts)]).to(device)
    got = torch.empty_like(rows)
    comm.all_to_all(got, rows, group, counts, counts)
    expected = [torch.full((n, 2), float(10 * s + rank)) for s, n in enumerate(counts)]
    assert torch.equal(got.cpu(), torch.cat(expected))


def unequal_parts(world_size: int) -> list[list[int]]:
    """Numbers of elements by rank: empty parts first, last and in between, one rank with all, large ones, equal ones."""
    large = gloo.COPY_BYTES // 8 // world_size
    cases = [[(3 * r) % 5 for r in range(world_size)], [4] * world_size, [0] * world_size]
    for most in range(world_size):
        cases.append([7 if r == most else 0 for r in range(world_size)])
        cases.append([0 if r == most else 5 + r for r in range(world_size)])
        cases.append([large + 3 if r == most else 1 + 2 * r for r in range(world_size)])
        cases.append([0 if r == most else large * 2 + r for r in range(world_size)])
    return cases


def unequal(rank: int, world_size: int, device: str) -> None:
    """Gathers and sums of unequal parts, in place or not; sums are bitwise those of an all-reduce."""
    group = group_of_all(world_size, device)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for sizes in unequal_parts(world_size):
            stops = torch.tensor(sizes).cumsum(0).tolist()
            own = slice(stops[rank] - sizes[rank], stops[rank])
            rows = [values(r, (stops[-1],), dtype) for r in range(world_size)]
            expected = torch.cat([row.split(sizes)[r] for r, row in enumerate(rows)])
            gathered = torch.full((stops[-1],), torch.nan, dtype=dtype, device=device)
            comm.all_gather(gathered, rows[rank][own].to(device), group, sizes)
            assert torch.equal(gathered.cpu(), expected), (dtype, sizes)
            gathered = rows[rank].clone().to(device)
            comm.all_gather(gathered, gathered[own], group, sizes, async_op=True).wait()
            assert torch.equal(gathered.cpu(), expected), (dtype, sizes)

            total = rows[rank].clone().to(device)
            comm.all_reduce(total, group)
            output = torch.full((sizes[rank],), torch.nan, dtype=dtype, device=device)
            comm.reduce_scatter(output, rows[rank].to(device), group, sizes)
            assert torch.equal(output, total[own]), (dtype, sizes)
            assert torch.equal(output.cpu(), in_rank_order(rows)[own])
            within = rows[rank].clone().to(device)
            comm.reduce_scatter(within[own], within, group, sizes, async_op=True).wait()
            assert torch.equal(within[own], total[own]), (dtype, sizes)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_unequal_parts(world_size: int) -> None:
    run_ranks(world_size, unequal, "cpu")


@pytest.mark.gpu
def test_unequal_parts_on_cuda() -> None:
    run_ranks(3, unequal, "cuda", device="cuda")


def test_parts_that_do_not_fit_are_named() -> None:
    alone = Group("dp", (0,), 0)
    with pytest.raises(AssertionError, match=r"all_gather: parts \[2\] do not fit \(3,\) on rank 0 of 1"):
        comm.all_gather(torch.zeros(3), torch.zeros(3), alone, [2])
    with pytest.raises(AssertionError, match=r"reduce_scatter: \(4,\) torch.float32 must hold parts \[3\]"):
        comm.reduce_scatter(torch.zeros(3), torch.zeros(4), alone, [3])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_collectives(world_size: int) -> None:
    run_ranks(world_size, plain, "cpu")


@pytest.mark.gpu
def test_collectives_on_cuda() -> None:
    run_ranks(3, plain, "cuda", device="cuda")


def handles(rank: int, world_size: int) -> None:
    """Several at once on one group; inputs may be dropped; an output may be part of its input; waits may repeat."""
    group = group_of_all(world_size)
    pending: list[tuple[comm.Handle, Tensor, Tensor]] = []
    for step in range(6):
        numel = 3 * world_size * 10 ** (step % 5)
        everyones = [values(10 * step + r, (numel,), torch.float32) for r in range(world_size)]
        expected = in_rank_order(everyones)
        mine, count = everyones[rank].clone(), numel // world_size
        own = slice(rank * count, (rank + 1) * count)
        handle = comm.reduce_scatter(mine[own], mine, group, async_op=True)
        pending.append((handle, mine[own], expected[own]))
        dropped = torch.empty(count)
        handle = comm.reduce_scatter(dropped, everyones[rank].clone(), group, async_op=True)
        pending.append((handle, dropped, expected[own]))
        gathered = torch.empty(world_size, numel)
        handle = comm.all_gather(gathered, everyones[rank].clone(), group, async_op=True)
        pending.append((handle, gathered, torch.stack(everyones)))
        total = everyones[rank].clone()
        pending.append((comm.all_reduce(total, group, async_op=True), total, expected))
    junk = [torch.full((1000,), torch.nan) for _ in range(100)]  # would land in memory freed too early
    for number, (handle, actual, expected) in enumerate(pending):
        handle.wait()
        handle.wait()
        assert handle.done and torch.equal(actual, expected), number
    assert all(bool(tensor.isnan().all()) for tensor in junk)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_handles(world_size: int) -> None:
    run_ranks(world_size, handles)


def messages(rank: int, world_size: int, device: str) -> None:
    """Point to point: all dtypes and strides, several in flight, both directions, in the order sent."""
    topology = build_topology(Degrees(pipeline=2), this_device(device), 30, channels=[(0, 1), (1, 0)])
    out, back = topology.channels[rank, 1 - rank], topology.channels[1 - rank, rank]
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)
    shapes = ((), (3,), (2, 5), (0, 4), (64, 1024))
    cases = [(dtype, shape) for dtype in dtypes for shape in shapes]
    arrived, pending = [], []
    for number, (dtype, shape) in enumerate(cases):
        message = (values(100 * rank + number, shape) * 9).to(dtype).to(device)
        if len(shape) == 2:
            message = message.mT.contiguous().mT
        pending.append(comm.send(message, out))
        del message
        arrived.append(torch.empty(shape[::-1], dtype=dtype, device=device).T)
        pending.append(comm.receive(arrived[-1], back))
    for handle in pending:
        handle.wait()
    for number, (dtype, shape) in enumerate(cases):
        expected = (values(100 * (1 - rank) + number, shape) * 9).to(dtype)
        assert torch.equal(arrived[number].cpu(), expected), (dtype, shape)
    with pytest.raises(AssertionError, match=r"only the source of channel 1->0|only the source of channel 0->1"):
        comm.send(torch.zeros(1), back)


def test_messages() -> None:
    run_ranks(2, messages, "cpu")


@pytest.mark.gpu
def test_messages_on_cuda() -> None:
    run_ranks(2, messages, "cuda", device="cuda")


def objects(rank: int, world_size: int) -> list[Any]:
    """Values of different lengths, and one value for all."""
    control = build_topology(Degrees(shard=world_size), torch.device("cpu"), 30).control
    comm.barrier(control)
    mine = {"rank": rank, "text": "é" * rank, "numbers": [0.1 * rank, float("inf")], "none": None}
    everyones = comm.gather_objects(mine, control)
    assert everyones[rank] == mine
    return [everyones, comm.broadcast_object([rank, "x" * 100], 1, control)]


def test_objects() -> None:
    results = run_ranks(3, objects)
    assert results[0] == results[1] == results[2]
    assert [entry["text"] for entry in results[0][0]] == ["", "é", "éé"] and results[0][1] == [1, "x" * 100]
    with pytest.raises(TypeError):
        comm.gather_objects({"a": torch.zeros(1)}, Group("control", (0,), 0))


def not_a_number(rank: int, world_size: int) -> list[float]:
    """A nan on one rank reaches all, also through max: that is how an overflow is agreed upon."""
    group = group_of_all(world_size)
    results = []
    for op in ("sum", "max", "min"):
        tensor = torch.tensor([float("nan") if rank == 1 else 1.0])
        comm.all_reduce(tensor, group, op)
        results.append(tensor.item())
    return results


def test_nan_is_not_lost() -> None:
    assert all(value != value for result in run_ranks(3, not_a_number) for value in result)


def test_lost_peers_are_told_from_own_errors() -> None:
    lost = (
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2"),
        RuntimeError("Timed out waiting 1000ms for recv operation to complete"),
        RuntimeError("Read error [127.0.0.1]:1: Connection reset by peer"),
        torch.distributed.DistBackendError(
            "NCCL error: ncclRemoteError: A call failed possibly due to a network error"
        ),
        torch.distributed.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0//cpu//0/0"),
        BrokenPipeError("Broken pipe"),
    )
    own = (
        ValueError("timed out"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"),
        torch.OutOfMemoryError("CUDA out of memory"),
    )
    assert all(comm.is_lost_peer(error) for error in lost)
    assert not any(comm.is_lost_peer(error) for error in own)


def nccl_names(rank: int, world_size: int) -> None:
    """The native calls under this torch's names, without a warning, on nccl with one rank."""
    device = torch.device("cuda", torch.cuda.current_device())
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    x, output = torch.arange(6.0, device=device), torch.zeros(6, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in (_nccl_all_gather, _nccl_reduce_scatter):
            output.zero_()
            call(output, x, group=torch.distributed.group.WORLD, async_op=True).wait()
            assert torch.equal(output, x)
    torch.distributed.destroy_process_group()


@pytest.mark.gpu
def test_nccl_names() -> None:
    run_ranks(1, nccl_names, device="cuda")
