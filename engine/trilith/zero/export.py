"""The whole model out of its parts: to look at and change in place, as a state dict, as a file of 16-bit weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trilith import comm
from trilith.errors import CheckpointError, TrilithError
from trilith.topology import Topology
from trilith.zero.engine_state import named_state
from trilith.zero.sharded import ShardedModel


@contextmanager
def gathered_parameters(sharded: ShardedModel, modifier_rank: int | None) -> Iterator[None]:
    """Within it all weights are whole; what `modifier_rank` has changed when it ends goes to all ranks and into masters.

    Every rank must enter and leave it. With None, changes are lost.
    """
    topology = sharded.topology
    if modifier_rank is not None and not 0 <= modifier_rank < topology.world_size:
        raise TrilithError(f"modifier_rank = {modifier_rank}: must be a rank, 0 to {topology.world_size - 1}")
    with sharded.gathered():
        yield
        if modifier_rank is None:
            return
        copy, index = divmod(modifier_rank, topology.dp.size)
        for unit in sharded.all_units():
            unit.collect_weights()
            comm.broadcast(unit.weight.data, index, topology.dp)
            comm.broadcast(unit.weight.data, copy, topology.replicate)
            sharded.offload.open(unit)
            unit.take_weight()
        sharded.offload.put_back()


def consolidated(module: nn.Module, sharded: ShardedModel, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The module's whole state on the CPU of rank 0, floating point in `dtype` (None: as it is); nothing on other ranks.

    Units are gathered one after the other: no rank has more than one that it would not have anyway. Every rank must call.
    """
    is_first = sharded.topology.rank == 0
    values: dict[Tensor, Tensor] = {}
    for unit in sharded.whole_units():
        if is_first:
            for parameter, view in zip(unit.parameters, unit.weight_views, strict=True):
                values[parameter] = _on_host(view, dtype)
    if not is_first:
        return {}
    state: dict[str, Tensor] = {}
    for name, tensor in named_state([module]):
        # A tied weight has all its names, each with storage of its own: any reader finds what it looks for.
        found = values.pop(tensor, None)
        if found is not None:
            values[tensor] = found
            found = found.clone() if any(found is other for other in state.values()) else found
        state[name] = _on_host(tensor, dtype) if found is None else found
    return state


def _on_host(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", wanted, copy=True).contiguous()


def write_16bit(directory: Path, name: str, state: dict[str, Tensor], topology: Topology) -> Path:
    """Write rank 0's `state` as a safetensors file that appears whole or not at all; its path. Every rank must call it.

    Raises CheckpointError on every rank if it cannot be written.
    """
    path, failure = directory / name, ""
    if topology.rank == 0:
        draft = path.with_name(f"{name}.tmp-{os.getpid()}")
        try:
            if not state:
                raise CheckpointError("there is nothing to write")
            directory.mkdir(parents=True, exist_ok=True)
            save_file(state, draft, metadata={"format": "pt"})
            with draft.open("rb+") as file:
                os.fsync(file.fileno())
            draft.replace(path)
        except Exception as error:  # whatever it was, the others must hear of it
            draft.unlink(missing_ok=True)
            failure = f"{type(error).__name__}: {error}"
    failure = comm.broadcast_object(failure, 0, topology.control)
    if failure:
        raise CheckpointError(f"{path}: could not be written: {failure}")
    return path
