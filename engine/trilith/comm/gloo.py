"""Collectives on CPU tensors, composed for gloo from all-to-all.

Gloo has no reduce-scatter, knows few dtypes, and sums in an order that depends on offset and size. All-to-all is also
its fastest call: every other one wakes more threads (measured with 8 ranks on 2 cores: a small all-reduce 5 ms instead
of 20, and point-to-point calls cost more time than an all-to-all that carries the same). Bytes are moved, so every
dtype works. Sums are element by element in the order of ranks, in the tensor's dtype: a value depends neither on
where it lies in a bucket nor on the bucket's size, nor on whether an all-reduce or a reduce-scatter made it.

Every function takes contiguous tensors without autograd and at least two ranks, and returns a `Handle`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trilith.comm.handle import Handle, patient
from trilith.topology import Group

Combine = Callable[..., Tensor]
# Up to this many bytes over all ranks, sending everything to everyone (one step) beats reduce-scatter and all-gather.
ONE_STEP_BYTES = 1 << 20
# Above this many bytes over all ranks, point-to-point calls beat an all-to-all of copies.
COPY_BYTES = 4 << 20


def as_bytes(tensor: Tensor) -> Tensor:
    """The flat bytes of a contiguous tensor, without a copy."""
    return tensor.view(-1).view(torch.uint8)


def _post(group: Group, output: Tensor, input: Tensor, got: list[int], sent: list[int]) -> Any:
    """Start an all-to-all; `got` and `sent` count bytes by rank."""
    work = dist.all_to_all_single(as_bytes(output), as_bytes(input), got, sent, group=group.handle, async_op=True)
    return patient(work, group)


def _swap(group: Group, received: Tensor, sent: Tensor) -> Any:
    """Start to swap tensors between two ranks, without a copy; the two may differ in size."""
    other, width = 1 - group.index, sent.element_size()
    got_bytes, sent_bytes = [0, 0], [0, 0]
    got_bytes[other], sent_bytes[other] = received.numel() * width, sent.numel() * width
    return _post(group, received, sent, got_bytes, sent_bytes)


def _spread(group: Group, output: Tensor, input: Tensor, sizes: Sequence[int]) -> list[Any]:
    """Start to bring every rank r's `input` (sizes[r] elements) to part r of the flat `output`."""
    parts = output.split(list(sizes))
    mine = parts[group.index]
    width = input.element_size()
    large = group.size > 2 and output.numel() * width > COPY_BYTES
    if (group.size == 2 or large) and mine.data_ptr() != input.data_ptr():
        mine.copy_(input)
    if group.size == 2:
        return [_swap(group, parts[1 - group.index], input)]
    if large:
        return _tell_all(group, parts, input)
    got, sent = [size * width for size in sizes], [input.numel() * width] * group.size
    return [_post(group, output, input.expand(group.size, -1).contiguous(), got, sent)]


def _tell_all(group: Group, parts: Sequence[Tensor], input: Tensor) -> list[Any]:
    """Start to send `input` to every other rank and receive theirs in `parts`, without making copies to send."""
    works: list[Any] = []
    peers = [(group.index + step) % group.size for step in range(1, group.size)]
    for peer in peers:
        if parts[peer].numel():
            works.append(patient(dist.irecv(as_bytes(parts[peer]), group.ranks[peer], group=group.handle), group))
    for peer in reversed(peers) if input.numel() else ():
        works.append(patient(dist.isend(as_bytes(input), group.ranks[peer], group=group.handle), group))
    return works


def _deal(group: Group, input: Tensor, sizes: Sequence[int]) -> tuple[Any, list[Tensor]]:
    """Start to send part r of the flat `input` to rank r. The work, and the parts it brings in the order of ranks.

    `sizes` are the parts' numbers of elements. Of more than two ranks all parts are scratch; of two, the own part is a
    view of `input`.
    """
    mine = sizes[group.index]
    if group.size == 2:
        sent = input.split(list(sizes))
        received = input.new_empty(mine)
        parts = [sent[0], received] if group.index == 0 else [received, sent[1]]
        return _swap(group, received, sent[1 - group.index]), parts
    buffer = input.new_empty(group.size, mine)
    width = input.element_size()
    work = _post(group, buffer, input, [mine * width] * group.size, [size * width for size in sizes])
    return work, list(buffer.unbind(0))


def _combine_all(parts: Sequence[Tensor], combine: Combine, output: Tensor) -> None:
    """Write parts[0] + parts[1] + ... to `output`, strictly from the left. All parts but the outer two are scratch."""
    total = parts[0]
    for part in parts[1:-1]:
        total = combine(total, part, out=part)
    combine(total, parts[-1], out=output)


def all_gather(output: Tensor, input: Tensor, group: Group, sizes: Sequence[int]) -> Handle:
    """Write every rank r's `input` (flat, sizes[r] elements) to `output` (flat), in the order of ranks."""
    return Handle(_spread(group, output, input, sizes), keep=(output, input))


def reduce_scatter(output: Tensor, input: Tensor, group: Group, combine: Combine, sizes: Sequence[int]) -> Handle:
    """Write the sum over ranks of part `index` of `input` (flat; part r has sizes[r] elements) to `output` (flat)."""
    work, parts = _deal(group, input, sizes)
    return Handle([work], lambda: _combine_all(parts, combine, output), keep=input)


def all_reduce(output: Tensor, input: Tensor, group: Group, combine: Combine) -> Handle:
    """Write the sum over ranks of `input` to `output` (both flat), which may be `input` itself."""
    if group.size == 2:
        in_place = output.data_ptr() == input.data_ptr()
        received = torch.empty_like(input) if in_place else output
        pair = (input, received) if group.index == 0 else (received, input)
        work = _swap(group, received, input)
        return Handle([work], lambda: _combine_all(pair, combine, output), keep=input)
    if group.size * input.numel() * input.element_size() <= ONE_STEP_BYTES:
        rows = input.new_empty(group.size, input.numel())
        works = _spread(group, rows.view(-1), input, [input.numel()] * group.size)
        return Handle(works, lambda: _combine_all(rows.unbind(0), combine, output), keep=input)
    return _two_step_all_reduce(output, input, group, combine)


def _two_step_all_reduce(output: Tensor, input: Tensor, group: Group, combine: Combine) -> Handle:
    """Reduce-scatter, then all-gather when the handle is waited for."""
    few, more = divmod(input.numel(), group.size)
    sizes = [few + (rank < more) for rank in range(group.size)]
    work, parts = _deal(group, input, sizes)

    def finish() -> None:
        mine = parts[group.index]
        _combine_all(parts, combine, mine)
        for work in _spread(group, output, mine, sizes):
            work.wait()

    return Handle([work], finish, keep=input)


def all_to_all(
    output: Tensor, input: Tensor, group: Group, output_bytes: Sequence[int], input_bytes: Sequence[int]
) -> Handle:
    """Send part r of `input` to rank r and write what rank r sent to part r of `output`; part sizes are in bytes."""
    work = _post(group, output, input, list(output_bytes), list(input_bytes))
    return Handle([work], keep=(output, input))


def broadcast(tensor: Tensor, source_index: int, group: Group) -> Handle:
    """Give all ranks the values of rank `source_index` of the group.

    A channel sends by it too: its group has two ranks and one direction, so that nothing else comes in between.
    """
    work = dist.broadcast(as_bytes(tensor), group.ranks[source_index], group=group.handle, async_op=True)
    return Handle([patient(work, group)], keep=tensor)


def barrier(group: Group) -> Handle:
    """Over once every rank has come to it."""
    return Handle([patient(dist.barrier(group=group.handle, async_op=True), group)])
