"""Bring your own model: any `nn.Module` trained data-parallel over all ranks, with DeepSpeed's three calls.

    engine = trilith.initialize(model, config)
    for batch in loader:
        loss = engine(batch)
        engine.backward(loss)
        engine.step()

The loss is a mean over the microbatch, as DeepSpeed expects: gradients are averaged over the accumulated microbatches and
over the data ranks. Repeated blocks (children of a ModuleList) are units, and so is each other child of the model.
"""

from __future__ import annotations

import atexit
import os
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trilith import comm
from trilith.config import Config, load_config, resolve
from trilith.errors import TrilithError
from trilith.models.base import LocalParameter
from trilith.models.layer_stage import is_lookup
from trilith.optim.foreign import ForeignOptimizer, groups_of_optimizer
from trilith.optim.groups import multipliers
from trilith.optim.lr import LearningRate, make_lr
from trilith.optim.make import make_optimizer, needs_whole_tensors
from trilith.pipeline.action import NO_MICROBATCH
from trilith.precision import DTYPES, PrecisionPolicy
from trilith.process_groups import build_topology, join_world, leave_world
from trilith.sharding import Piece, ShardSpec, contiguous_strides, whole
from trilith.topology import Degrees, Group, Topology
from trilith.zero.gradients import GradientReducer
from trilith.zero.sharded import ShardedModel, Sharding, StepOutcome

ROOT_UNIT = "root"
LEAVE_TIMEOUT_S = 5.0


def initialize(
    model: nn.Module,
    config: Config | Mapping[str, Any] | str | Path,
    optimizer: torch.optim.Optimizer | None = None,
    lr_scheduler: Any = None,
) -> Engine:
    """An engine that trains `model` on every rank of the world; every rank must call it with the same model and config.

    `config`: a Config, a mapping or a JSON file; no `model` or `data` section is needed, but the batch must be said
    (`train_micro_batch_size_per_gpu`). The values of data rank 0 are given to all. Parameters take the dtype
    `data_types.param_dtype`, floating-point buffers `data_types.buffer_dtype` (fp32 also in 16-bit training).
    `optimizer`: a torch optimizer over the model's parameters instead of the config's. `lr_scheduler`: a function from
    steps taken to the learning rate, or, with an own optimizer, a torch scheduler of it. Under torchrun the process
    group is made here if there is none.

    Raises ConfigError for a config that breaks a rule, TrilithError for a model or optimizer that cannot be trained so.
    """
    given = config if isinstance(config, Config) else load_config(config)
    world_size, joined = join(given)
    full = resolve(given, world_size, needs="engine").config
    if full.parallel.pipeline > 1 or full.parallel.tensor > 1:
        raise TrilithError(
            f"parallel: pipeline {full.parallel.pipeline} x tensor {full.parallel.tensor}: trilith.initialize takes a "
            "module as it is, so only data parallelism is possible. Set both to 1, make a PipelineModel of its layers, or "
            "describe the model in `model`"
        )
    device = device_of(full)
    replicate = full.parallel.replicate
    degrees = Degrees(replicate=replicate, shard=world_size // replicate)
    topology = build_topology(degrees, device, full.parallel.timeout_s, shared_memory=full.run.shared_memory)
    return Engine(model, full, topology, optimizer, lr_scheduler, owns_world=joined)


def join(config: Config) -> tuple[int, bool]:
    """The world size, and whether the default process group was made here, as torchrun's environment asks."""
    if dist.is_initialized():
        return dist.get_world_size(), False
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if world_size == 1:
        return 1, False
    join_world(int(os.environ["RANK"]), world_size, None, config.parallel.timeout_s, device_of(config).type)
    return world_size, True


def _end_of_process(engine: weakref.ref[Engine], reducer: weakref.ref[GradientReducer]) -> None:
    """For scripts that never call `close`: leave the world together if possible, after a failure without waiting.

    The engine may be gone while hooks of a living module still hold the reducer, and with it the groups.
    """
    if not dist.is_initialized():
        return
    leave_at_exit()
    found, left = engine(), reducer()
    if found is not None:
        found.forget_groups()
    elif left is not None:
        left.topology = without_groups(left.topology)


def leave_at_exit() -> None:
    """Leave the world when the process ends: together if all come here soon, after a failure without waiting."""
    if not hasattr(sys, "last_type"):
        with suppress(RuntimeError):
            dist.barrier(async_op=True).wait(timedelta(seconds=LEAVE_TIMEOUT_S))
    dist.destroy_process_group()


def without_groups(topology: Topology) -> Topology:
    """The same place in the world, with nobody to talk to."""
    alone = Group("control", (topology.rank,), 0)
    nobody: MappingProxyType[Any, Any] = MappingProxyType({})
    return replace(topology, control=alone, groups=nobody, channels=nobody, ties=nobody)


def device_of(config: Config) -> torch.device:
    """The device that `run.device` names; under torchrun each rank of a machine has a GPU of its own, if there are.

    Raises TrilithError where there is none.
    """
    wanted = config.run.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TrilithError("run.device = 'cuda': there is no CUDA device here. Set it to 'cpu' or 'auto'")
    index = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    return torch.device("cuda", index % torch.cuda.device_count())


class Declared:
    """Any module with its parameters declared: each whole on every rank, named as the module names it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._branches = branches_of(module)
        self.local_parameters = tuple(
            _local_parameter(name, parameter, self.home_of(name) or ROOT_UNIT)
            for name, parameter in module.named_parameters()
            if parameter.is_floating_point()
        )

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As `nn.Module.named_parameters`."""
        return self._module.named_parameters(prefix, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """As `nn.Module.named_buffers`."""
        return self._module.named_buffers(prefix, recurse, remove_duplicate)

    def get_submodule(self, target: str) -> nn.Module:
        """As `nn.Module.get_submodule`."""
        return self._module.get_submodule(target)

    def home_of(self, name: str) -> str:
        """The module that the unit of the parameter called `name` belongs to: see `branches_of`."""
        path: list[str] = []
        for part in name.split(".")[:-1]:
            if ".".join(path) not in self._branches:
                break
            path.append(part)
        # A list is never called itself: what lies in it directly belongs to the module that holds it.
        while path and isinstance(self._module.get_submodule(".".join(path)), (nn.ModuleList, nn.ModuleDict)):
            path.pop()
        return ".".join(path)

    def homes(self) -> None:
        """In which order they are called is not known before the first step."""
        return None

    def home(self, path: str) -> nn.Module:
        """The module at `path`."""
        return self._module.get_submodule(path)

    def weightless_backwards(self) -> tuple[str, ...]:
        """Modules that only look up rows."""
        return tuple(name for name, module in self._module.named_modules() if is_lookup(module))


def branches_of(module: nn.Module) -> frozenset[str]:
    """The paths of modules whose children are units of their own: the model itself, and what holds lists of blocks.

    A block of a list is a unit, whatever it holds.
    """
    found = {""}

    def walk(path: str, here: nn.Module) -> bool:
        is_list = isinstance(here, (nn.ModuleList, nn.ModuleDict))
        inside = [walk(f"{path}.{name}".lstrip("."), child) for name, child in here.named_children() if not is_list]
        if is_list or any(inside):
            found.add(path)
            return True
        return False

    walk("", module)
    return frozenset(found)


def _local_parameter(name: str, parameter: nn.Parameter, unit: str) -> LocalParameter:
    shape = tuple(parameter.shape)
    spec = ShardSpec(name, shape, (Piece(whole(shape), 0, contiguous_strides(shape)),))
    # Norm weights and biases are vectors: decay is for matrices, unless a parameter group says otherwise.
    return LocalParameter(name, shape, (spec,), (), unit, len(shape) > 1, (), 0)


def _sharding(
    declared: Declared, module: nn.Module, config: Config, optimizer: torch.optim.Optimizer | None
) -> Sharding:
    units = tuple(dict.fromkeys(parameter.flat_unit for parameter in declared.local_parameters))
    if optimizer is None:
        groups, make = multipliers(config.optimizer.param_groups), make_optimizer(config.optimizer)
        return Sharding(units, frozenset(), groups, make, whole_tensors=needs_whole_tensors(config.optimizer))
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    own = groups_of_optimizer(optimizer, trained)
    return Sharding(
        units,
        frozenset(),
        lambda name, decay: own(name, decay) if name in trained else (0.0,),
        lambda partitions: ForeignOptimizer(partitions, optimizer),
    )


class Engine:
    """A module trained data-parallel. Every rank must call `backward` and `step` equally often."""

    def __init__(
        self,
        module: nn.Module,
        config: Config,
        topology: Topology,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: Any = None,
        owns_world: bool = False,
    ) -> None:
        """Use `initialize`, which resolves the config and builds the topology."""
        if optimizer is not None and config.scheduler is not None and lr_scheduler is None:
            raise TrilithError(
                f"scheduler.type = {config.scheduler.type!r}: the config's schedule sets the learning rate of the "
                "config's optimizer, but an own one was handed in. Hand in an lr_scheduler of it, too"
            )
        if lr_scheduler is not None and optimizer is None and not callable(lr_scheduler):
            raise TrilithError(
                f"lr_scheduler = {type(lr_scheduler).__name__}: with the config's optimizer it must be a function from "
                "the number of steps taken to the learning rate. Or hand in the optimizer that it belongs to"
            )
        self.module, self.config, self.topology = module, config, topology
        self._owns_world = owns_world
        self._own_optimizer = optimizer
        self._lr_scheduler = lr_scheduler if optimizer is not None else None
        self._lr: LearningRate = make_lr(config.scheduler, config.optimizer.params.lr)
        if optimizer is None and lr_scheduler is not None:
            self._lr = lr_scheduler
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise TrilithError("no parameter of the model requires a gradient: there is nothing to train")
        place(module, config, topology)
        declared = Declared(module)
        sharding = _sharding(declared, module, config, optimizer)
        policy = PrecisionPolicy.from_config(config)
        self.sharded = ShardedModel({0: declared}, topology, policy, config, sharding)
        if owns_world:
            atexit.register(_end_of_process, weakref.ref(self), weakref.ref(self.sharded.reducer))
        self._parameters = self.sharded.stage(0)
        self._begin_step()
        self._accumulation = config.gradient_accumulation_steps
        self._microbatch = 0
        self._reduced = False
        self.outcome: StepOutcome | None = None
        self.global_steps = 0
        self.skipped_steps = 0

    def __iter__(self) -> Iterator[Any]:
        """Engine, optimizer, data loader (None) and learning-rate function, as DeepSpeed's `initialize` returns them."""
        return iter((self, self.sharded.optimizer, None, self._lr_scheduler or self._lr))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of `loss`, a scalar mean over this rank's microbatch; it is not changed.

        On the last microbatch of a step gradients are reduced over the ranks meanwhile.
        Raises TrilithError if called again after that before `step`.
        """
        if self._reduced:
            raise TrilithError(
                "engine.backward was called twice on the last microbatch of a step, after its gradients were reduced. "
                "Add the losses up first, or raise gradient_accumulation_steps and call engine.step after each"
            )
        final = self.is_gradient_accumulation_boundary
        self._parameters.begin_backward(self._microbatch, final)
        factor = self.sharded.loss_scale / (self._accumulation * self.topology.data_size)
        wide = loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss
        (wide * factor if factor != 1.0 else wide).backward()
        self._parameters.end_backward(self._microbatch, final)
        if final:
            self._parameters.reduce(NO_MICROBATCH)
            self._reduced = True

    def step(self) -> None:
        """Count the microbatch; on the last one of a step update the weights on all ranks.

        With fp16 a step whose gradients are not finite is skipped, and the learning-rate schedule does not advance.
        """
        boundary = self.is_gradient_accumulation_boundary
        self._microbatch = (self._microbatch + 1) % self._accumulation
        if not boundary:
            return
        self.outcome = self.sharded.step(0.0 if self._own_optimizer is not None else self.lr)
        self._begin_step()
        self._reduced = False
        self.global_steps += 1
        self.skipped_steps += self.outcome.skipped
        if self._lr_scheduler is not None and not self.outcome.skipped:
            self._lr_scheduler.step()

    def _begin_step(self) -> None:
        """At stage 3 a step gathers as the one before did; the first one finds out what is used when."""
        if self.sharded.gatherer is not None:
            self.sharded.gatherer.begin_run("step")

    @property
    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current microbatch is the last of an optimizer step."""
        return self._microbatch + 1 == self._accumulation

    @property
    def global_grad_norm(self) -> float | None:
        """L2 norm of the last step's averaged gradients before clipping; None before the first step."""
        return None if self.outcome is None else self.outcome.grad_norm

    @property
    def lr(self) -> float:
        """Learning rate of the next step; with an own optimizer that of its first group."""
        if self._own_optimizer is not None:
            return float(self._own_optimizer.param_groups[0]["lr"])
        return self._lr(self.sharded.optimizer_steps)

    def train(self, mode: bool = True) -> Engine:
        """Set the module to training mode."""
        self.module.train(mode)
        return self

    def eval(self) -> Engine:
        """Set the module to evaluation mode."""
        return self.train(False)

    def close(self) -> None:
        """Remove all hooks; the module keeps its weights and works without the engine. Every rank must call it.

        Leaves the process group if `initialize` made it.
        """
        self.sharded.close()
        if self._owns_world:
            self._owns_world = False
            leave_world()
            self.forget_groups()

    def forget_groups(self) -> None:
        """Let go of all process groups, for good.

        gloo's threads abort a process in which a group lives on until the interpreter is gone.
        """
        self.topology = without_groups(self.topology)
        self.sharded.topology = self.sharded.reducer.topology = self.topology


def place(module: nn.Module, config: Config, topology: Topology) -> None:
    """Bring the module to the device, its buffers to their dtype, and everything to the values of data rank 0.

    Raises TrilithError where something has no values.
    """
    meta = [name for name, tensor in module.state_dict(keep_vars=True).items() if tensor.is_meta]
    if meta:
        raise TrilithError(f"{meta[0]} is on the meta device and has no values: give the model its values first")
    module.to(topology.device)
    buffer_dtype = DTYPES[config.data_types.buffer_dtype]
    for name, buffer in list(module.named_buffers()):
        if buffer.is_floating_point():
            path, _, leaf = name.rpartition(".")
            module.get_submodule(path)._buffers[leaf] = buffer.to(buffer_dtype)
    for tensor in (*module.parameters(), *module.buffers()):
        for group in (topology.replicate, topology.dp):
            comm.broadcast(tensor.detach(), 0, group)
