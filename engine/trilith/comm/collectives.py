"""Collectives and point-to-point messages over a `Group`, the same for gloo and nccl, CPU and CUDA.

With `async_op=True` a call returns at once: wait for its `Handle` before reading the output or writing the input.
Reductions on gloo sum element by element in the order of ranks, so results do not depend on offsets or bucket sizes;
on nccl the order is nccl's. Ranks of one machine exchange through shared memory what else would go by gloo, with the
same bits. CUDA tensors over either (ranks that share a GPU) travel through host memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trilith.comm import gloo, shared
from trilith.comm.handle import Handle
from trilith.topology import Group

_COMBINES: Mapping[str, gloo.Combine] = MappingProxyType({"sum": torch.add, "max": torch.maximum, "min": torch.minimum})
_NCCL_OPS = MappingProxyType({"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN})
# torch 2.13 deprecates the older names, torch 2.11 does not have the newer ones.
_nccl_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_nccl_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|socket (closed|timeout)|tim(ed|e) ?out"
    r"|no longer connected|remote (peer|process)|peer (closed|exited|rank)|ncclRemoteError|abort(ed)? .*communicator",
    re.IGNORECASE,
)


def _carrier(group: Group) -> Any:
    """What moves CPU tensors between the ranks of a group whose backend is gloo."""
    return gloo if group.transport is None else shared


def _finished(handle: Handle, async_op: bool) -> Handle:
    if not async_op:
        handle.wait()
    return handle


def _host(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor without autograd: `tensor` itself where it is one."""
    return tensor.detach().cpu().contiguous()


def _host_output(tensor: Tensor) -> Tensor:
    """Where gloo may write for `tensor`: `tensor` itself if it is contiguous and on the CPU, else a new tensor."""
    tensor = tensor.detach()
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _returned(handle: Handle, host: Tensor, tensor: Tensor) -> Handle:
    """Copy what arrived in `host` to `tensor`, where they are not the same memory."""
    if host.device == tensor.device and host.data_ptr() == tensor.data_ptr():
        return handle
    target = tensor.detach()
    return handle.then(lambda: _write(target, host))


def _write(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


def _copied(output: Tensor, input: Tensor) -> Handle:
    """A group of one rank: the output is the input."""
    if output.data_ptr() != input.data_ptr():
        output.detach().copy_(input.detach().view(output.shape))
    return Handle()


def all_reduce(tensor: Tensor, group: Group, op: str = "sum", async_op: bool = False) -> Handle:
    """Replace `tensor` (one shape on all ranks) by its `sum`, `max` or `min` over the group, element by element."""
    if group.size == 1 or tensor.numel() == 0:
        return Handle()
    return _finished(_all_reduce(tensor, tensor, group, op), async_op)


def all_reduced(tensor: Tensor, group: Group) -> Tensor:
    """The sum of `tensor` over a group of at least two ranks, as a new tensor."""
    output = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    if tensor.numel() > 0:
        _all_reduce(output, tensor, group, "sum").wait()
    return output


def _all_reduce(output: Tensor, input: Tensor, group: Group, op: str) -> Handle:
    if group.backend == "gloo":
        source, target = _host(input), _host_output(output)
        handle = _carrier(group).all_reduce(target.view(-1), source.view(-1), group, _COMBINES[op])
        return _returned(handle, target, output)
    target = output.detach() if output.is_contiguous() else torch.empty_like(output).contiguous()
    if target.data_ptr() != input.data_ptr():
        target.copy_(input.detach())
    work = dist.all_reduce(target, _NCCL_OPS[op], group=group.handle, async_op=True)
    return _returned(Handle([work], keep=target), target, output)


def all_gather(
    output: Tensor, input: Tensor, group: Group, sizes: Sequence[int] | None = None, async_op: bool = False
) -> Handle:
    """Write every rank's `input` to `output`, one after the other in the order of ranks.

    Both are contiguous, of one dtype. Rank r's `input` has `sizes[r]` elements (the same on all ranks; it may be 0), all
    have the same number without `sizes`. `input` may be this rank's part of `output`.
    """
    parts = _parts(output, input, group, sizes, "all_gather")
    if group.size == 1:
        return _copied(output, input)
    if output.numel() == 0:
        return Handle()
    if group.backend == "gloo":
        source, target = _host(input), _host_output(output)
        handle = _carrier(group).all_gather(target.view(-1), source.view(-1), group, parts)
        return _finished(_returned(handle, target, output), async_op)
    flat, mine = output.detach().view(-1), input.detach().view(-1)
    if len(set(parts)) == 1:
        work = _nccl_all_gather(flat, mine, group=group.handle, async_op=True)
    else:
        work = dist.all_gather(list(flat.split(parts)), mine, group=group.handle, async_op=True)
    return _finished(Handle([work], keep=(output, input)), async_op)


def reduce_scatter(
    output: Tensor, input: Tensor, group: Group, sizes: Sequence[int] | None = None, async_op: bool = False
) -> Handle:
    """Write the sum over the group of this rank's part of `input` to `output`.

    Both are contiguous, of one dtype; part r is for rank r and has `sizes[r]` elements (the same on all ranks; it may be
    0), all have the same number without `sizes`. `output` may be this rank's part of `input`. The caller need not keep
    `input`, but must not write to it before `wait()`.
    """
    parts = _parts(input, output, group, sizes, "reduce_scatter")
    if group.size == 1:
        return _copied(output, input)
    if input.numel() == 0:
        return Handle()
    if group.backend == "gloo":
        source, target = _host(input), _host_output(output)
        handle = _carrier(group).reduce_scatter(target.view(-1), source.view(-1), group, torch.add, parts)
        return _finished(_returned(handle, target, output), async_op)
    flat, mine = input.detach().view(-1), output.detach().view(-1)
    if len(set(parts)) == 1:
        work = _nccl_reduce_scatter(mine, flat, group=group.handle, async_op=True)
    else:
        work = dist.reduce_scatter(mine, list(flat.split(parts)), group=group.handle, async_op=True)
    return _finished(Handle([work], keep=(output, input)), async_op)


def _parts(large: Tensor, small: Tensor, group: Group, sizes: Sequence[int] | None, name: str) -> list[int]:
    """How many elements of `large` are each rank's, after checking that `small` is this rank's part of it."""
    parts = [small.numel()] * group.size if sizes is None else list(sizes)
    assert len(parts) == group.size and parts[group.index] == small.numel(), (
        f"{name}: parts {parts} do not fit {tuple(small.shape)} on rank {group.index} of {group.size}"
    )
    assert large.numel() == sum(parts) and large.dtype == small.dtype, (
        f"{name}: {tuple(large.shape)} {large.dtype} must hold parts {parts} like {tuple(small.shape)} {small.dtype}"
    )
    assert large.is_contiguous() and small.is_contiguous(), f"{name}: tensors must be contiguous"
    return parts


def all_to_all(
    output: Tensor,
    input: Tensor,
    group: Group,
    output_rows: Sequence[int] | None = None,
    input_rows: Sequence[int] | None = None,
    async_op: bool = False,
) -> Handle:
    """Send rows of `input` to each rank and write what rank r sent after what the ranks before it sent.

    Contiguous tensors of one dtype; `input_rows[r]` rows (of dim 0) go to rank r, `output_rows[r]` come from it.
    Without them (on all ranks alike) dim 0 is cut into equal parts.
    """
    sent = list(input_rows or [len(input) // group.size] * group.size)
    got = list(output_rows or [len(output) // group.size] * group.size)
    assert sum(sent) == len(input) and sum(got) == len(output), (sent, len(input), got, len(output))
    if group.size == 1:
        return _copied(output, input)
    if group.backend == "gloo":
        source, target = _host(input), _host_output(output)
        if group.transport is not None and input_rows is None and output_rows is None:
            handle = shared.all_to_all(target.view(-1), source.view(-1), group)
        else:  # how much others send is known to nobody, so that it cannot be cut into pieces
            width = prod(input.shape[1:]) * input.element_size()
            handle = gloo.all_to_all(target, source, group, [n * width for n in got], [n * width for n in sent])
        return _finished(_returned(handle, target, output), async_op)
    work = dist.all_to_all_single(output.detach(), input.detach(), got, sent, group=group.handle, async_op=True)
    return _finished(Handle([work], keep=(output, input)), async_op)


def broadcast(tensor: Tensor, source_index: int, group: Group, async_op: bool = False) -> Handle:
    """Replace `tensor` on all ranks by that of rank `source_index` of the group."""
    if group.size == 1 or tensor.numel() == 0:
        return Handle()
    if group.backend == "gloo":
        host = _host(tensor)
        return _finished(_returned(_carrier(group).broadcast(host, source_index, group), host, tensor), async_op)
    host = tensor.detach().contiguous()
    work = dist.broadcast(host, group.ranks[source_index], group=group.handle, async_op=True)
    return _finished(_returned(Handle([work], keep=host), host, tensor), async_op)


def barrier(group: Group) -> None:
    """Return when every rank of the group has come here."""
    if group.size == 1:
        return
    if group.backend == "gloo":
        _carrier(group).barrier(group).wait()
    else:
        dist.barrier(group=group.handle, device_ids=[torch.cuda.current_device()])


def send(tensor: Tensor, channel: Group) -> Handle:
    """Send `tensor` (any dtype and strides) from the channel's source to its target; the call does not block.

    Messages of a channel arrive in the order sent. `tensor` must not be written before `wait()`.
    """
    assert channel.size == 2 and channel.index == 0, f"only the source of {channel.name} can send"
    if tensor.numel() == 0:
        return Handle()
    if channel.backend == "gloo":
        return _carrier(channel).broadcast(_host(tensor), 0, channel)
    data = tensor.detach().contiguous()
    return Handle([dist.isend(data, channel.ranks[1], group=channel.handle)], keep=data)


def receive(tensor: Tensor, channel: Group) -> Handle:
    """Receive into `tensor`, whose shape and dtype must be those that the source sends; the call does not block.

    The channel's timeout counts from here on gloo, from `wait()` on nccl and in shared memory.
    """
    assert channel.size == 2 and channel.index == 1, f"only the target of {channel.name} can receive"
    if tensor.numel() == 0:
        return Handle()
    if channel.backend == "gloo":
        target = _host_output(tensor)
        return _returned(_carrier(channel).broadcast(target, 0, channel), target, tensor)
    target = tensor.detach() if tensor.is_contiguous() else torch.empty_like(tensor).contiguous()
    work = dist.irecv(target, channel.ranks[0], group=channel.handle)
    return _returned(Handle([work], keep=target), target, tensor)


def is_lost_peer(error: BaseException) -> bool:
    """True if `error` only says that another rank is gone or silent: the rank that raised it is a victim."""
    known = isinstance(error, (dist.DistError, ConnectionError)) or type(error) is RuntimeError
    return known and _LOST_PEER.search(str(error)) is not None


def sum_in_rank_order(vector: Tensor, group: Group) -> Tensor:
    """The sum of a small vector over a group, the same bits on every rank, all of which must call it."""
    if group.size == 1:
        return vector
    gathered = vector.new_empty(group.size * vector.numel())
    all_gather(gathered, vector, group).wait()
    return gathered.view(group.size, -1).sum(0)
