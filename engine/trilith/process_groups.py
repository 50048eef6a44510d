"""Makes the process groups that `topology.py` lists: joining the world, building a `Topology`, leaving.

The default group is gloo over all ranks: it is the control group, for objects, barriers and agreement. Groups over axes
are nccl where every rank has a GPU of its own, else gloo, with shared memory in its place within a machine. Only the
ranks of a group take part in making it.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from trilith.comm.meeting import share_memory
from trilith.errors import TopologyError
from trilith.topology import (
    NO_TIES,
    Degrees,
    Group,
    PlannedGroup,
    Ties,
    Topology,
    channel_name,
    check_channels,
    check_ties,
    steps_of,
)


def join_world(
    rank: int, world_size: int, store_path: str | Path | None, timeout_s: float, device: str = "cpu"
) -> torch.device:
    """Join the other ranks in the default process group and return this rank's device.

    `store_path`: a file that all ranks share, on one machine; None: torchrun's environment says where to meet.
    `device`: "cpu" or "cuda"; rank r takes GPU r modulo the machine's number of GPUs. A world of one joins nothing.
    Every later wait of the control group is limited to `timeout_s` seconds.
    """
    here = torch.device("cpu")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise TopologyError("run.device = 'cuda': there is no CUDA device here. Set run.device to 'cpu'")
        here = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(here)
    if world_size > 1:
        timeout = timedelta(seconds=timeout_s)
        if store_path is None:
            dist.init_process_group("gloo", init_method="env://", rank=rank, world_size=world_size, timeout=timeout)
        else:
            _stay_on_this_machine()
            store = dist.FileStore(str(store_path), world_size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    return here


def leave_world() -> None:
    """Close all process groups, after every rank came here; a no-op in a world of one.

    Without the barrier a rank that ends early breaks connections that others still use. After a failure do not call
    it: exit, so that the others learn of it at once.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _stay_on_this_machine() -> None:
    """Let gloo use the loopback interface unless the user chose one: a laptop's host name often resolves to nothing."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])


def build_topology(
    degrees: Degrees,
    device: torch.device,
    timeout_s: float,
    ties: Ties = NO_TIES,
    channels: Iterable[tuple[int, int]] = (),
    shared_memory: bool = True,
) -> Topology:
    """Make this rank's groups. All ranks must call it with the same arguments (`device` aside), in the same order.

    `timeout_s` limits every wait on a group. `ties` and `channels` as in `topology.steps_of`. With world size 1 no
    process group is needed, nor made. `shared_memory`: ranks of one machine exchange CPU tensors through memory, where
    the system lets them, instead of by gloo.

    Raises TopologyError if the degrees do not fill the world, or there is no world to build it in.
    """
    channels = tuple(sorted(set(channels)))
    check_channels(degrees, channels)
    check_ties(degrees, ties)
    if degrees.world_size > 1 and not dist.is_initialized():
        raise TopologyError(
            f"world size {degrees.world_size}: no process group exists. Start the ranks with `trilith train` or "
            f"torchrun, or set all degrees to 1"
        )
    rank = dist.get_rank() if dist.is_initialized() else 0
    degrees.check_world_size(dist.get_world_size() if dist.is_initialized() else 1)
    if degrees.world_size == 1:
        return Topology(degrees, 0, device, Group("control", (0,), 0), MappingProxyType({}), MappingProxyType({}))
    timeout = timedelta(seconds=timeout_s)
    control = _control(rank, degrees.world_size, timeout)
    backend = _backend(control, device)
    groups: dict[str, Group] = {}
    for planned in steps_of(degrees, rank, ties=ties, channels=channels):
        if planned is None:
            _keep_count(rank, timeout)
        elif planned.uses:
            groups[planned.name] = replace(groups[planned.uses], name=planned.name)
        else:
            groups[planned.name] = _make(planned, rank, backend, timeout)
    if backend == "nccl":
        _connect(groups.values(), device)
    elif shared_memory:
        groups = share_memory({"control": control, **groups}, timeout_s)
        control = groups.pop("control")
    found = {pair: groups.pop(channel_name(*pair), None) for pair in channels}
    mine = {pair: group for pair, group in found.items() if group is not None}
    return Topology(degrees, rank, device, control, MappingProxyType(groups), MappingProxyType(mine), ties)


def _control(rank: int, world_size: int, timeout: timedelta) -> Group:
    """The gloo group over the world: the default group where it is gloo, else a new one."""
    ranks = tuple(range(world_size))
    handle = dist.group.WORLD
    if dist.get_backend() != "gloo":
        handle = dist.new_group(list(ranks), timeout=timeout, backend="gloo", use_local_synchronization=True)
    return Group("control", ranks, rank, handle, "gloo")


def _backend(control: Group, device: torch.device) -> str:
    """Nccl if every rank has a GPU of its own and torch has nccl, else gloo; the same answer on all ranks."""
    machine = f"{socket.gethostname()} {device}"
    if device.type == "cuda":
        machine = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
    digest = hashlib.blake2b(machine.encode(), digest_size=7).digest()
    able = device.type == "cuda" and dist.is_nccl_available()
    mine = torch.tensor([int.from_bytes(digest, "little") if able else -1])
    everyones = [torch.empty_like(mine) for _ in range(control.size)]
    dist.all_gather(everyones, mine, group=control.handle)
    found = [int(one) for one in everyones]
    return "nccl" if min(found) >= 0 and len(set(found)) == control.size else "gloo"


def _make(planned: PlannedGroup, rank: int, backend: str, timeout: timedelta) -> Group:
    handle = dist.new_group(
        list(planned.ranks),
        timeout=timeout,
        backend=backend,
        use_local_synchronization=True,
        group_desc=planned.name,
    )
    return Group(planned.name, planned.ranks, planned.ranks.index(rank), handle, backend)


def _keep_count(rank: int, timeout: timedelta) -> None:
    """Make a group of this rank alone, which waits for nobody, in a step in which only others make one.

    torch names a group made with local synchronisation by its ranks and by how many groups the rank has: ranks whose
    counts differ would wait for each other under different names, in this topology's next group or in the next one's.
    """
    dist.new_group([rank], timeout=timeout, backend="gloo", use_local_synchronization=True)


def _connect(groups: Iterable[Group], device: torch.device) -> None:
    """Let nccl make its communicators now, in one order on all ranks.

    It makes them at the first use, waiting on the host for all members; two ranks whose first uses come in different
    orders would wait for each other for ever. A channel has one for its messages, others for collectives.
    """
    token = torch.zeros(1, device=device)
    for group in groups:
        if not group.name.startswith("channel"):
            dist.all_reduce(token, group=group.handle)
        elif group.index == 0:
            _wait(dist.isend(token, group.ranks[1], group=group.handle))
        else:
            _wait(dist.irecv(token, group.ranks[0], group=group.handle))
    torch.cuda.synchronize(device)


def _wait(work: dist.Work | None) -> None:
    assert work is not None, "this rank is not in its own group"
    work.wait()


def device_mesh(topology: Topology, view: str = "dense") -> DeviceMesh | None:
    """The torch DeviceMesh of the `dense` or `expert` view over the groups that exist: axes of size above 1.

    None where no axis is. Raises TopologyError if the run made no group for an axis.
    """
    layout = topology.degrees.view(view)
    axes = tuple(axis for axis in layout.axes if layout.size(axis) > 1)
    if not axes:
        return None
    handles: list[Any] = []
    for axis in axes:
        ranks = layout.ranks_along(topology.rank, (axis,))
        made = [group for group in topology.groups.values() if group.ranks == ranks]
        if not made:
            raise TopologyError(
                f"axis {axis!r} of the {view} view has degree {layout.size(axis)}, but no group over ranks {ranks} "
                f"was made; there are {sorted(topology.groups)}. Use an expert degree above 1, or the dense view"
            )
        handles.append(made[0].handle)
    shape = [layout.size(axis) for axis in axes]
    mesh = torch.arange(layout.world_size).reshape(shape)
    kind = topology.device.type
    if len(axes) == 1:
        return DeviceMesh.from_group(handles[0], kind, mesh_dim_names=axes)
    return DeviceMesh.from_group(handles, kind, mesh, mesh_dim_names=axes)
