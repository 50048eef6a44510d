"""Process groups in every small layout: they are made without deadlock, reach the right ranks, and end cleanly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.harness import run_ranks
from trilith import comm
from trilith.errors import TopologyError
from trilith.process_groups import build_topology, device_mesh, join_world, leave_world
from trilith.topology import Degrees, Topology, groups_of

CPU = torch.device("cpu")


def ring(pipeline: int) -> list[tuple[int, int]]:
    """The channels of an interleaved schedule, in no particular order."""
    if pipeline == 1:
        return []
    pairs = {(p, (p + 1) % pipeline) for p in range(pipeline)}
    return sorted(pairs | {(b, a) for a, b in pairs}, reverse=True)


def tied(pipeline: int) -> dict[str, tuple[int, ...]]:
    """A unit on both ends of the pipeline, one on its first ranks, one on all."""
    sets = {"ends": (0, pipeline - 1), "first": (0, 1), "all": tuple(range(pipeline))}
    return sets if pipeline > 1 else {}


def layouts(world_size: int) -> list[Degrees]:
    """Every pipeline x data x tensor of this world size."""
    degrees = range(1, world_size + 1)
    return [
        Degrees(pipeline=p, shard=d, tensor=t)
        for p in degrees
        for d in degrees
        for t in degrees
        if p * d * t == world_size
    ]


def check_groups(topology: Topology) -> None:
    """All groups sum over their ranks, channels carry messages both ways, the mesh sees the same groups."""
    for group in (*topology.groups.values(), topology.control):
        tensor = torch.tensor([float(topology.rank)])
        comm.all_reduce(tensor, group)
        assert tensor.item() == sum(group.ranks), group
    handles, arrived = [], {}
    for (source, target), channel in topology.channels.items():
        assert channel.ranks[channel.index] == topology.rank
        if channel.index == 1:
            arrived[source, target] = torch.empty(3, dtype=torch.int64)
            handles.append(comm.receive(arrived[source, target], channel))
        else:
            handles.append(comm.send(torch.tensor([*channel.ranks, 7]), channel))
    for handle in handles:
        handle.wait()
    for pair, tensor in arrived.items():
        assert tensor.tolist() == [*topology.channels[pair].ranks, 7]
    mesh = device_mesh(topology)
    axes = mesh.mesh_dim_names if mesh is not None else None
    for axis in axes or ():
        assert mesh is not None
        assert mesh.get_local_rank(axis) == topology.coordinate(axis)
        ranks = topology.degrees.dense.ranks_along(topology.rank, (axis,))
        assert tuple(dist.get_process_group_ranks(mesh.get_group(axis))) == ranks


def every_layout(rank: int, world_size: int, directory: str) -> int:
    """Join, build twice, check, leave: for every layout of this world."""
    leave_world()
    for number, degrees in enumerate(layouts(world_size)):
        assert join_world(rank, world_size, Path(directory) / f"store{number}", 30) == CPU
        for _ in range(2):  # a second topology in one world works too
            topology = build_topology(degrees, CPU, 30, ties=tied(degrees.pipeline), channels=ring(degrees.pipeline))
            check_groups(topology)
            planned = groups_of(degrees, rank, ties=tied(degrees.pipeline), channels=ring(degrees.pipeline))
            made = (*topology.groups.values(), *topology.channels.values())
            assert {g.name: g.ranks for g in made} == {g.name: g.ranks for g in planned}
            column = degrees.dense.ranks_along(rank, ("pp",))
            for unit, ranks in tied(degrees.pipeline).items():
                shares = topology.coordinate("pp") in ranks
                assert topology.tie(unit).ranks == (tuple(column[p] for p in ranks) if shares else (rank,))
        leave_world()
        assert not dist.is_initialized()
    return len(layouts(world_size))


@pytest.mark.parametrize("world_size", range(2, 9))
def test_every_layout(world_size: int, tmp_path: Path) -> None:
    assert set(run_ranks(world_size, every_layout, str(tmp_path), timeout_s=90)) == {len(layouts(world_size))}


def alone(rank: int, world_size: int) -> list[int]:
    """World size 1 runs the same lines, without any process group."""
    assert join_world(rank, world_size, None, 5) == CPU
    topology = build_topology(Degrees(), CPU, 5)
    assert not dist.is_initialized() and device_mesh(topology) is None
    check_groups(topology)
    x = torch.ones(4, requires_grad=True)
    comm.barrier(topology.control)
    leave_world()
    return [topology.tp.size, topology.control.size, int(comm.copy_to(x, topology.tp) is x)]


def test_world_of_one() -> None:
    assert run_ranks(1, alone) == [[1, 1, 1]]
    with pytest.raises(TopologyError, match=r"no process group exists.*trilith train"):
        build_topology(Degrees(shard=2), CPU, 5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_gpu_is_named() -> None:
    with pytest.raises(TopologyError, match=r"run.device = 'cuda': there is no CUDA device"):
        join_world(0, 1, None, 5, "cuda")


def all_axes(rank: int, world_size: int) -> dict[str, list[int]]:
    """Hybrid sharding, context and expert axes; both meshes."""
    topology = build_topology(Degrees(replicate=2, shard=2, context=2, expert=2), CPU, 30)
    check_groups(topology)
    experts = device_mesh(topology, "expert")
    assert experts is not None and experts.mesh_dim_names == ("edp", "ep")
    assert experts.get_local_rank("ep") == topology.expert("ep")
    return {name: list(group.ranks) for name, group in topology.groups.items()}


def test_all_axes() -> None:
    assert run_ranks(8, all_axes)[5] == {
        "cp": [4, 5],
        "dp": [4, 5, 6, 7],
        "shard": [5, 7],
        "replicate": [1, 5],
        "ep": [4, 5],
        "edp": [1, 3, 5, 7],
    }


def wrong_world(rank: int, world_size: int) -> str:
    """Degrees that do not fill the world are refused before any group is made."""
    try:
        build_topology(Degrees(tensor=4), CPU, 5)
    except TopologyError as error:
        return str(error)
    return ""


def test_wrong_world_size_is_refused_on_every_rank() -> None:
    assert all("tensor 4 = 4 ranks, but the world size is 2" in text for text in run_ranks(2, wrong_world))


def silent_peer(rank: int, world_size: int) -> list[bool]:
    """Rank 1 never answers: the group's own timeout ends the wait, and the error is a lost peer's."""
    topology = build_topology(Degrees(pipeline=2), CPU, 1.0, channels=[(0, 1), (1, 0)])
    found = []
    if rank == 0:
        calls = (
            lambda: comm.receive(torch.empty(4), topology.channels[1, 0]).wait(),
            lambda: comm.all_reduce(torch.ones(4), topology.pp),
        )
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                found.append(comm.is_lost_peer(error))
    dist.barrier()
    return found


def test_timeouts_are_explicit() -> None:
    assert run_ranks(2, silent_peer, timeout_s=30)[0] == [True, True]


def shared_gpu(rank: int, world_size: int) -> str:
    """Ranks that share a GPU get gloo groups for CUDA tensors."""
    topology = build_topology(Degrees(shard=2), torch.device("cuda", torch.cuda.current_device()), 30)
    tensor = torch.full((1000,), float(rank + 1), device=topology.device)
    comm.all_reduce(tensor, topology.dp)
    assert tensor.is_cuda and bool((tensor == 3).all())
    return topology.dp.backend


@pytest.mark.gpu
def test_backend_follows_the_gpus() -> None:
    expected = "nccl" if torch.cuda.device_count() >= 2 else "gloo"
    assert run_ranks(2, shared_gpu, device="cuda") == [expected] * 2
