"""Bring your own model: any `nn.Module` trained data-parallel over all ranks, with DeepSpeed's three calls.

    engine = trilith.initialize(model, config)
    for batch in loader:
        loss = engine(batch)
        engine.backward(loss)
        engine.step()

The loss is a mean over the microbatch, as DeepSpeed expects: gradients are averaged over the accumulated microbatches and
over the data ranks. Repeated blocks (children of a ModuleList, or of a Sequential of blocks) are units, and so is each
other child of the model.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from trilith.config import Config, load_config, resolve
from trilith.errors import TrilithError
from trilith.layers.recompute import FULL, SELECTIVE
from trilith.optim.lr import LearningRate, make_lr
from trilith.optim.state_values import from_json, to_json
from trilith.pipeline.action import NO_MICROBATCH
from trilith.precision import PrecisionPolicy
from trilith.process_groups import build_topology, leave_world
from trilith.topology import Degrees, Topology
from trilith.zero.blocks import BlockRecompute
from trilith.zero.declared import Declared, place
from trilith.zero.engine_state import EngineState, found_checkpoint, place_of
from trilith.zero.export import consolidated, gathered_parameters, write_16bit
from trilith.zero.gathers import Gatherer
from trilith.zero.gradients import GradientReducer
from trilith.zero.loader import EpochLoader, make_loader
from trilith.zero.materialise import InitFunction, Initialiser
from trilith.zero.parameter_groups import Given, ModelParameters, sharding_for
from trilith.zero.sharded import ShardedModel, StepOutcome
from trilith.zero.world import device_of, join, leave_at_exit, without_groups


def initialize(
    model: nn.Module,
    config: Config | Mapping[str, Any] | str | Path,
    optimizer: torch.optim.Optimizer | None = None,
    lr_scheduler: Any = None,
    model_parameters: ModelParameters | None = None,
    training_data: Dataset[Any] | None = None,
    collate_fn: Callable[..., Any] | None = None,
    init_fn: InitFunction | None = None,
) -> Engine:
    """An engine that trains `model` on every rank of the world; every rank must call it with the same model and config.

    `config`: a Config, a mapping or a JSON file; no `model` or `data` section is needed, but the batch must be said
    (`train_micro_batch_size_per_gpu`). The values of data rank 0 are given to all. Parameters take the dtype
    `data_types.param_dtype`, floating-point buffers `data_types.buffer_dtype` (fp32 also in 16-bit training). Those on
    the meta device (`empty_weights`) are initialised here, unit by unit, by `init_fn(module)` or the modules' own methods.
    `optimizer`: a torch optimizer over the model's parameters instead of the config's; or `model_parameters`: all
    parameters, or groups of them with `lr` and `weight_decay`, for the config's. `lr_scheduler`: a function from steps
    taken to the learning rate, or, with an own optimizer, a torch scheduler of it. `training_data`: a dataset, of which
    the engine's `training_dataloader` reads this rank's part, with `collate_fn` as in torch. Under torchrun the process
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
    handed_in = Given(optimizer, lr_scheduler, model_parameters)
    loader = make_loader(training_data, full, topology, collate_fn)
    engine = Engine(model, full, topology, handed_in, init_fn, loader)
    if joined:
        engine.own_world()
    return engine


def _end_of_process(
    engine: weakref.ref[Engine], reducer: weakref.ref[GradientReducer], gatherer: weakref.ref[Gatherer] | None
) -> None:
    """For scripts that never call `close`: leave the world together if possible, after a failure without waiting.

    The engine may be gone while hooks of a living module still hold reducer and gatherer, and with them the groups.
    """
    if not dist.is_initialized():
        return
    leave_at_exit()
    found, left = engine(), reducer()
    if found is not None:
        found.forget_groups()
    elif left is not None:
        left.topology = without_groups(left.topology)
        gathers = None if gatherer is None else gatherer()
        if gathers is not None:
            gathers.leave(left.topology.dp)


class Engine:
    """A module trained data-parallel. Every rank must call `backward` and `step` equally often.

    `training_dataloader`: of the `training_data` that `initialize` was given, or None.
    """

    def __init__(
        self,
        module: nn.Module,
        config: Config,
        topology: Topology,
        given: Given = Given(),  # noqa: B008
        init_fn: InitFunction | None = None,
        loader: EpochLoader | None = None,
    ) -> None:
        """Use `initialize`, which resolves the config and builds the topology."""
        _require_fit(module, config, given)
        self.module, self.config, self.topology, self.training_dataloader = module, config, topology, loader
        self._owns_world = False
        self._own_optimizer = given.optimizer
        self._lr_scheduler = given.lr_scheduler if given.optimizer is not None else None
        self._lr: LearningRate = make_lr(config.scheduler, config.optimizer.params.lr)
        if given.optimizer is None and given.lr_scheduler is not None:
            self._lr = given.lr_scheduler
        initialiser = Initialiser(module, topology, config.training.seed, init_fn)
        place(module, config, topology)
        declared = Declared(module)
        sharding = sharding_for(declared, module, config, given)
        policy = PrecisionPolicy.from_config(config)
        self.sharded = ShardedModel({0: declared}, topology, policy, config, sharding)
        initialiser.run(declared, self.sharded)
        recomputes = config.activation_checkpointing.recompute == FULL
        self._recompute = BlockRecompute(declared.blocks() if recomputes else {}, topology.device)
        shapes = {parameter.name: parameter.shape for parameter in declared.local_parameters}
        self._state = EngineState(self.sharded, topology, (module,), shapes)
        self._parameters = self.sharded.stage(0)
        self._begin_step()
        self._accumulation = config.gradient_accumulation_steps
        self._microbatch = 0
        self._boundary: bool | None = None
        self._reduced = self._syncs_not = False
        self.outcome: StepOutcome | None = None
        self.global_steps = 0
        self.skipped_steps = 0

    def own_world(self) -> None:
        """The default process group was made for this engine: it is left with it, at the latest with the process."""
        self._owns_world = True
        gatherer = self.sharded.gatherer
        held = None if gatherer is None else weakref.ref(gatherer)
        atexit.register(_end_of_process, weakref.ref(self), weakref.ref(self.sharded.reducer), held)

    def __iter__(self) -> Iterator[Any]:
        """Engine, optimizer, data loader and learning-rate function, as DeepSpeed's `initialize` returns them."""
        return iter((self, self.sharded.optimizer, self.training_dataloader, self._lr_scheduler or self._lr))

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

        Raises TrilithError within `no_sync`. With fp16 a step whose gradients are not finite is skipped, and the
        learning-rate schedule does not advance.
        """
        if self._syncs_not:
            raise TrilithError(
                "engine.step was called within no_sync, where gradients are only added up. Call it outside"
            )
        if not self.is_gradient_accumulation_boundary:
            self._microbatch += 1
            return
        self._microbatch = 0
        self.outcome = self.sharded.step(0.0 if self._own_optimizer is not None else self.lr)
        self._begin_step()
        self._reduced = False
        self.global_steps += 1
        self.skipped_steps += self.outcome.skipped
        if self._lr_scheduler is not None and not self.outcome.skipped:
            self._lr_scheduler.step()

    # ---- accumulation -------------------------------------------------------------------------------------------

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it `backward` only adds gradients up on this rank; they count for the step of the next one outside.

        Raises TrilithError where a rank keeps no whole gradients to add to (stages 2 and 3).
        """
        if any(not unit.has_whole_gradient for unit in self.sharded.units):
            raise TrilithError(
                f"no_sync: at zero_optimization.stage {self.zero_optimization_stage()} a rank keeps its part of the "
                "gradients only, so each backward must hand the others theirs. Set zero_optimization.reduce_interval to "
                '"step", or use stage 0 or 1'
            )
        before, self._syncs_not = self._syncs_not, True
        try:
            yield
        finally:
            self._syncs_not = before

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """From now on each microbatch is the last of a step, or none is, whatever gradient_accumulation_steps says."""
        self._boundary = is_boundary

    @property
    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current microbatch is the last of an optimizer step."""
        if self._syncs_not:
            return False
        return (self._microbatch + 1) % self._accumulation == 0 if self._boundary is None else self._boundary

    def _begin_step(self) -> None:
        """At stage 3 a step gathers as the one before did; the first one finds out what is used when."""
        self.sharded.begin_step()

    # ---- what it knows ------------------------------------------------------------------------------------------

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

    def get_global_grad_norm(self) -> float | None:
        """As `global_grad_norm`."""
        return self.global_grad_norm

    def get_lr(self) -> list[float]:
        """The learning rate of the next step; with an own optimizer one for each of its groups."""
        if self._own_optimizer is not None:
            return [float(group["lr"]) for group in self._own_optimizer.param_groups]
        return [self.lr]

    def train_batch_size(self) -> int:
        """Samples of a step, over all ranks."""
        return int(self.config.train_batch_size)

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples of a microbatch."""
        return int(self.config.train_micro_batch_size_per_gpu)

    def gradient_accumulation_steps(self) -> int:
        """Microbatches of a step."""
        return int(self._accumulation)

    def zero_optimization_stage(self) -> int:
        """The ZeRO stage."""
        return int(self.config.zero_optimization.stage)

    def train(self, mode: bool = True) -> Engine:
        """Set the module to training mode."""
        self.module.train(mode)
        return self

    def eval(self) -> Engine:
        """Set the module to evaluation mode."""
        return self.train(False)

    # ---- weights and checkpoints --------------------------------------------------------------------------------

    @contextmanager
    def gathered_parameters(self, modifier_rank: int | None = None) -> Iterator[None]:
        """Within it all weights are whole. What rank `modifier_rank` changes goes to all ranks and into master weights.

        Every rank must enter and leave it; with None changes are lost.
        """
        with gathered_parameters(self.sharded, modifier_rank):
            yield

    def module_state_dict(self) -> dict[str, Tensor]:
        """The state of the whole module on the CPU of rank 0, weights as they compute; {} on the others, which must call.

        Units are gathered one after the other.
        """
        return consolidated(self.module, self.sharded)

    def save_16bit_model(self, save_dir: str | Path, save_filename: str = "model.safetensors") -> Path:
        """Write the whole module in 16 bits (fp16 where it is trained so, else bf16) and return the file's path.

        Every rank must call it. At stage 3 it needs `zero_optimization.stage3_gather_16bit_weights_on_model_save`, for it
        takes host memory for the whole model on rank 0: raises TrilithError without. Raises CheckpointError on every rank
        if it cannot be written.
        """
        zero = self.config.zero_optimization
        if zero.stage == 3 and not zero.stage3_gather_16bit_weights_on_model_save:
            raise TrilithError(
                "save_16bit_model: zero_optimization.stage3_gather_16bit_weights_on_model_save is false: at stage 3 no "
                "rank has the whole model. Set it to true to gather it on rank 0, or use save_checkpoint"
            )
        dtype = torch.float16 if self.config.data_types.param_dtype == "fp16" else torch.bfloat16
        state = consolidated(self.module, self.sharded, dtype)
        return write_16bit(Path(save_dir), save_filename, state, self.topology)

    def save_checkpoint(
        self, save_dir: str | Path, tag: str | None = None, client_state: Mapping[str, Any] | None = None
    ) -> Path:
        """Publish a checkpoint of this step under `save_dir` (and `tag`); its directory. Every rank must call it.

        Any number of ranks and ZeRO stage can load it. Buffers are those of data rank 0. `client_state`: whatever JSON can
        say, kept along. Raises CheckpointError on every rank if it cannot be written.
        """
        scheduler = getattr(self._lr_scheduler, "state_dict", None)
        others = {
            "global_steps": self.global_steps,
            "skipped_steps": self.skipped_steps,
            "client": dict(client_state or {}),
            "lr_scheduler": None if scheduler is None else to_json(scheduler(), "lr_scheduler"),
        }
        keep = self.config.checkpoint.keep_last
        return self._state.save(place_of(save_dir, tag), self.global_steps, others, keep)

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[Path, dict[str, Any]]:
        """Continue from the newest checkpoint under `load_dir` (and `tag`); its directory and client state.

        `load_module_only`: weights and buffers. Every rank must call it. Raises CheckpointError where there is none, it
        is damaged, or of another model.
        """
        directory = found_checkpoint(place_of(load_dir, tag), None, self.topology)
        state = self._state.load(directory, module_only=load_module_only, optimizer_states=load_optimizer_states)
        if not load_module_only:
            self.global_steps, self.skipped_steps = state["global_steps"], state["skipped_steps"]
            if load_lr_scheduler_states and self._lr_scheduler is not None and state.get("lr_scheduler") is not None:
                self._lr_scheduler.load_state_dict(from_json(state["lr_scheduler"]))
        self._microbatch, self._reduced = 0, False
        self._begin_step()
        return directory, dict(state["client"])

    # ---- the end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Remove all hooks; the module keeps its weights and works without the engine. Every rank must call it.

        Leaves the process group if `initialize` made it.
        """
        self._recompute.close()
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
        self._state = EngineState(self.sharded, self.topology, (self.module,), self._state.parameters)
        self.sharded.leave(self.topology)


def _require_fit(module: nn.Module, config: Config, given: Given) -> None:
    """Raises TrilithError for what cannot be trained so."""
    optimizer, scheduler = given.optimizer, given.lr_scheduler
    if optimizer is not None and config.scheduler is not None and scheduler is None:
        raise TrilithError(
            f"scheduler.type = {config.scheduler.type!r}: the config's schedule sets the learning rate of the "
            "config's optimizer, but an own one was handed in. Hand in an lr_scheduler of it, too"
        )
    if scheduler is not None and optimizer is None and not callable(scheduler):
        raise TrilithError(
            f"lr_scheduler = {type(scheduler).__name__}: with the config's optimizer it must be a function from "
            "the number of steps taken to the learning rate. Or hand in the optimizer that it belongs to"
        )
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise TrilithError("no parameter of the model requires a gradient: there is nothing to train")
    if config.activation_checkpointing.recompute == SELECTIVE:
        raise TrilithError(
            'activation_checkpointing.recompute = "selective": only models that the section `model` describes have an '
            'attention core that is known. Use "full" or "none"'
        )
