"""Collectives on CPU tensors, composed for gloo from point-to-point messages and all-to-all.

Gloo has no reduce-scatter, sums in an order that depends on offset and size, knows few dtypes, and its own all-reduce
passes through more threads: on 2 cores these compositions take 1/2 to 1/5 of its time. Bytes are moved, so every dtype
works. Sums are element by element in the order of ranks, in the tensor's dtype: a value does not depend on where it
lies in a bucket, on the bucket's size, nor on whether an all-reduce or a reduce-scatter made it.

Every function takes contiguous tensors without autograd and at least two ranks, and returns a `Handle`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trilith.comm.handle import Handle
from trilith.topology import Group

Combine = Callable[..., Tensor]
# Below this many bytes over all ranks, sending everything to everyone (one step) beats reduce-scatter and all-gather.
ONE_STEP_BYTES = 1 << 20


def as_bytes(tensor: Tensor) -> Tensor:
    """The flat bytes of a contiguous tensor, without a copy."""
    return tensor.view(-1).view(torch.uint8)


def _exchange(group: Group, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> list[Any]:
    """Send `sends[r]` to, and receive `receives[r]` from, every other rank r of the group; start with a neighbour."""
    works: list[Any] = []
    peers = [(group.index + step) % group.size for step in range(1, group.size)]
    for peer in peers:
        works.append(dist.irecv(as_bytes(receives[peer]), group.ranks[peer], group=group.handle))
    for peer in reversed(peers):
        works.append(dist.isend(as_bytes(sends[peer]), group.ranks[peer], group=group.handle))
    return works


def _deal(group: Group, input: Tensor, sizes: Sequence[int]) -> tuple[list[Any], list[Tensor]]:
    """Send part r of the flat `input` to rank r. Works, and the parts to be received in the order of ranks.

    `sizes` are the parts' numbers of elements. Received parts may be overwritten; with two ranks the own part is a view
    of `input`.
    """
    mine = sizes[group.index]
    if group.size == 2:
        parts = list(input.split(list(sizes)))
        received = list(parts)
        received[1 - group.index] = input.new_empty(mine)
        received[group.index] = parts[group.index]
        return _exchange(group, parts, received), received
    buffer = input.new_empty(group.size * mine)
    width = input.element_size()
    work = dist.all_to_all_single(
        as_bytes(buffer),
        as_bytes(input),
        [mine * width] * group.size,
        [size * width for size in sizes],
        group=group.handle,
        async_op=True,
    )
    return [work], list(buffer.split(mine)) if mine else [buffer] * group.size


def _combine_all(parts: Sequence[Tensor], combine: Combine, output: Tensor) -> None:
    """Write parts[0] + parts[1] + ... to `output`, strictly from the left. All parts but the outer two are scratch."""
    total = parts[0]
    for part in parts[1:-1]:
        total = combine(total, part, out=part)
    combine(total, parts[-1], out=output)


def all_gather(output: Tensor, input: Tensor, group: Group) -> Handle:
    """Write every rank's `input` (flat, n elements) to `output` (flat, size * n), in the order of ranks."""
    rows = output.view(group.size, -1).unbind(0)
    works = _exchange(group, [input] * group.size, rows)
    mine = rows[group.index]
    if mine.data_ptr() != input.data_ptr():
        mine.copy_(input)
    return Handle(works, keep=(output, input))


def reduce_scatter(output: Tensor, input: Tensor, group: Group, combine: Combine) -> Handle:
    """Write the sum over ranks of part `index` of `input` (flat, size * n) to `output` (flat, n)."""
    works, parts = _deal(group, input, [output.numel()] * group.size)
    return Handle(works, lambda: _combine_all(parts, combine, output), keep=input)


def all_reduce(output: Tensor, input: Tensor, group: Group, combine: Combine) -> Handle:
    """Write the sum over ranks of `input` to `output` (both flat), which may be `input` itself."""
    if group.size == 2:
        in_place = output.data_ptr() == input.data_ptr()
        received = [input, input]
        received[1 - group.index] = torch.empty_like(input) if in_place else output
        works = _exchange(group, [input, input], received)
        return Handle(works, lambda: _combine_all(received, combine, output), keep=input)
    if group.size * input.numel() * input.element_size() <= ONE_STEP_BYTES:
        rows = input.new_empty(group.size, input.numel())
        gathered = all_gather(rows.view(-1), input, group)
        return gathered.then(lambda: _combine_all(rows.unbind(0), combine, output))
    few, more = divmod(input.numel(), group.size)
    sizes = [few + (rank < more) for rank in range(group.size)]
    works, parts = _deal(group, input, sizes)

    def finish() -> None:
        mine = parts[group.index]
        if mine.numel():
            _combine_all(parts, combine, mine)
        pieces = output.split(sizes)
        pieces[group.index].copy_(mine)
        for work in _exchange(group, [mine] * group.size, pieces):
            work.wait()

    return Handle(works, finish, keep=input)


def all_to_all(
    output: Tensor, input: Tensor, group: Group, output_bytes: Sequence[int], input_bytes: Sequence[int]
) -> Handle:
    """Send part r of `input` to rank r and write what rank r sent to part r of `output`; part sizes are in bytes."""
    work = dist.all_to_all_single(
        as_bytes(output),
        as_bytes(input),
        list(output_bytes),
        list(input_bytes),
        group=group.handle,
        async_op=True,
    )
    return Handle([work], keep=(output, input))


def broadcast(tensor: Tensor, source_index: int, group: Group) -> Handle:
    """Give all ranks the values of rank `source_index` of the group."""
    work = dist.broadcast(as_bytes(tensor), group.ranks[source_index], group=group.handle, async_op=True)
    return Handle([work], keep=tensor)
