"""What the engines of users' models save and load: any layout of ranks, ZeRO stage and schedule reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trilith import checkpoint, comm
from trilith.checkpoint.load import DTYPES
from trilith.errors import CheckpointError
from trilith.optim.foreign import ForeignOptimizer
from trilith.sharding import Piece, ShardSpec, contiguous_strides, whole
from trilith.topology import Topology
from trilith.zero.sharded import ShardedModel

WEIGHTS = ("master", "weight")  # the roles that are not the optimizer's


@dataclass(frozen=True)
class EngineState:
    """An engine's storage. `modules`: of this rank; `parameters`: canonical name -> shape, of the whole model."""

    sharded: ShardedModel
    topology: Topology
    modules: Sequence[nn.Module]
    parameters: Mapping[str, Sequence[int]]

    def save(self, root: Path, step: int, others: Mapping[str, Any], keep_last: int) -> Path:
        """Publish a checkpoint of `step` under `root`, with `others` beside; every rank must call it.

        Buffers are those of data rank 0. Raises CheckpointError on every rank if it cannot be written.
        """
        state = self.sharded.state_dict()
        optimizer = self.sharded.optimizer
        if isinstance(optimizer, ForeignOptimizer):
            state["optimizer"] = optimizer.merged(comm.gather_objects(state["optimizer"], self.topology.control))
            optimizer.make_room(state["optimizer"])
        entries = [checkpoint.Entry(spec.with_role(role), t) for role, spec, t in self.sharded.owned_entries()]
        parameters = {name: list(shape) for name, shape in self.parameters.items()}
        content = {**others, "parameters": parameters, "model": state}
        entries += self._buffers()
        return checkpoint.save(root, step, entries, content, self.topology.control, keep_last=keep_last)

    def load(self, directory: Path, *, module_only: bool = False, optimizer_states: bool = True) -> Mapping[str, Any]:
        """Fill everything from the checkpoint in `directory` and return its scalar state; every rank must call it.

        `module_only`: weights and buffers; without `optimizer_states` the loss scaler, too. Raises CheckpointError where
        it is damaged or of another model.
        """
        state = checkpoint.read_manifest(directory).state
        self._require_same_model(directory, state)
        whole_state = optimizer_states and not module_only
        optimizer = self.sharded.optimizer
        if whole_state and isinstance(optimizer, ForeignOptimizer) and "groups" in state["model"]["optimizer"]:
            optimizer.make_room(state["model"]["optimizer"])
        entries = [
            checkpoint.Entry(spec.with_role(role), tensor)
            for role, spec, tensor in self.sharded.state_entries()
            if whole_state or role in WEIGHTS
        ]
        checkpoint.load(directory, [*entries, *self._buffers()])
        if whole_state:
            self.sharded.load_state_dict(state["model"])
        elif not module_only:
            self.sharded.scaler.load_state_dict(state["model"]["loss_scaler"])
        self.sharded.after_load()
        return state

    def _require_same_model(self, directory: Path, state: Mapping[str, Any]) -> None:
        if "parameters" not in state:
            raise CheckpointError(f"{directory}: was not saved by the engine of trilith.initialize")
        saved = {name: list(shape) for name, shape in state["parameters"].items()}
        mine = {name: list(shape) for name, shape in self.parameters.items()}
        for name in sorted({*saved, *mine}):
            if saved.get(name) != mine.get(name):
                raise CheckpointError(
                    f"{directory}: parameter {name} has shape {saved.get(name)} in the checkpoint, {mine.get(name)} in "
                    "this model (None: there is no such parameter)"
                )

    def _buffers(self) -> list[checkpoint.Entry]:
        """Everything in the state of the modules that is no parameter of ZeRO's, to be saved or filled in place."""
        entries = []
        for name, tensor in named_state(self.modules):
            if not (isinstance(tensor, nn.Parameter) and tensor.is_floating_point()):
                flat = tensor.detach().view(-1)
                shape = tuple(tensor.shape)
                if flat.dtype not in DTYPES.values():
                    flat = flat.view(torch.uint8)
                    shape = (flat.numel(),)
                piece = Piece(whole(shape), 0, contiguous_strides(shape), self.topology.data_index)
                entries.append(checkpoint.Entry(ShardSpec(name, shape, (piece,), "buffer"), flat))
        return entries


def named_state(modules: Iterable[nn.Module]) -> list[tuple[str, Tensor]]:
    """The tensors of the modules' `state_dict`, as the modules hold them."""
    return [
        (name, tensor)
        for module in modules
        for name, tensor in module.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    ]


def place_of(root: str | Path, tag: str | None) -> Path:
    """Where checkpoints with a tag lie; those without lie directly in the directory that the user named."""
    return Path(root) if tag is None else Path(root) / tag


def found_checkpoint(root: Path, step: int | None, topology: Topology) -> Path:
    """The checkpoint of `step` under `root` (None: the newest, also among tagged ones if there is no other).

    Rank 0 looks, every rank must ask. Raises CheckpointError where there is none.
    """
    found = None
    if topology.control.index == 0:
        found = _newest(root) if step is None else checkpoint.step_directory(root, step)
    name = comm.broadcast_object(None if found is None else str(found), 0, topology.control)
    if name is None:
        raise CheckpointError(f"{root}: holds no checkpoint. Name the directory that save_checkpoint was given")
    return Path(name)


def _newest(root: Path) -> Path | None:
    own = checkpoint.newest(root)
    if own is not None or not root.is_dir():
        return own
    inside = [checkpoint.newest(folder) for folder in sorted(root.iterdir()) if folder.is_dir()]
    order: Callable[[Path], tuple[int, float]] = lambda path: (
        checkpoint.read_manifest(path).step,
        path.stat().st_mtime,
    )
    return max((path for path in inside if path is not None), key=order, default=None)
