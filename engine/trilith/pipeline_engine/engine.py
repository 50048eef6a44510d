"""The engine of a `PipelineModel`, with the calls that DeepSpeed's PipelineEngine has.

    engine, optimizer, _, _ = trilith.initialize(model=PipelineModel(layers, loss_fn), config=config)
    for _ in range(steps):
        loss = engine.train_batch(data_iter)

Every rank makes the same calls. `initialize` here is `trilith.initialize`: other modules go to `zero.module`.
"""

from __future__ import annotations

import atexit
import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import nn

from trilith import comm
from trilith.config import Config, load_config, resolve
from trilith.errors import TrilithError
from trilith.failpoints import Failpoints
from trilith.kernels.backends import chosen
from trilith.kernels.weight_queue import WeightQueue
from trilith.layers.deferred_linear import DeferredLinear, defer_linears
from trilith.layers.recompute import FULL
from trilith.models.layer_stage import LayerStage, build_layer_stages
from trilith.models.pipeline_model import PipelineModel
from trilith.optim.base import Optimizer
from trilith.optim.groups import multipliers
from trilith.optim.lr import LearningRate, make_lr
from trilith.optim.make import make_optimizer, needs_whole_tensors
from trilith.pipeline.action import Schedule
from trilith.pipeline.executor import Executor
from trilith.pipeline.passes import complete
from trilith.pipeline.schedules import forward_only
from trilith.pipeline.stage import PipelineStage
from trilith.pipeline.transport import GroupChannels
from trilith.pipeline_engine.feed import BatchFeed
from trilith.pipeline_engine.keeper import StateKeeper
from trilith.pipeline_engine.layout import Layout, lay_out
from trilith.precision import PrecisionPolicy
from trilith.process_groups import build_topology, leave_world
from trilith.stepping.base import LossReport, Parts, Stepper
from trilith.stepping.make import make_stepper
from trilith.stepping.synchronous import SynchronousSteps
from trilith.topology import Degrees, Topology
from trilith.zero import module as data_parallel
from trilith.zero.declared import place, require_values
from trilith.zero.delayed import make_model
from trilith.zero.engine_state import EngineState, found_checkpoint
from trilith.zero.sharded import ShardedModel, Sharding, StepOutcome
from trilith.zero.world import device_of, join, leave_at_exit, without_groups

LOGGER = logging.getLogger(__name__)


@overload
def initialize(
    model: PipelineModel,
    config: Config | Mapping[str, Any] | str | Path,
    optimizer: None = None,
    lr_scheduler: LearningRate | None = None,
) -> PipelineEngine:
    """Layers on stages."""


@overload
def initialize(
    model: nn.Module,
    config: Config | Mapping[str, Any] | str | Path,
    optimizer: torch.optim.Optimizer | None = None,
    lr_scheduler: Any = None,
    **others: Any,
) -> data_parallel.Engine:
    """Any module, data-parallel."""


def initialize(
    model: PipelineModel | nn.Module,
    config: Config | Mapping[str, Any] | str | Path,
    optimizer: torch.optim.Optimizer | None = None,
    lr_scheduler: Any = None,
    **others: Any,
) -> PipelineEngine | data_parallel.Engine:
    """An engine that trains `model` on every rank of the world; every rank must call it with the same model and config.

    A PipelineModel is cut into stages as `parallel` and `pipeline` say; any other module is trained data-parallel (see
    `zero.module.initialize` for all arguments: `model_parameters`, `training_data`, `collate_fn` and `init_fn` are
    `others`). The engine may be unpacked as DeepSpeed's result: engine, optimizer,
    None, learning-rate function.

    Raises ConfigError for a config that breaks a rule, TrilithError for a model or optimizer that cannot be trained so.
    """
    if not isinstance(model, PipelineModel):
        return data_parallel.initialize(model, config, optimizer, lr_scheduler, **others)
    if others:
        raise TrilithError(
            f"{min(others)}: a PipelineModel builds its layers by itself and reads the iterator that train_batch is given. "
            "Leave it out"
        )
    if optimizer is not None:
        raise TrilithError(
            f"optimizer = {type(optimizer).__name__}: the layers of a PipelineModel are built on the rank that holds them, "
            "after this. Use the config section `optimizer`"
        )
    if lr_scheduler is not None and not callable(lr_scheduler):
        raise TrilithError(
            f"lr_scheduler = {type(lr_scheduler).__name__}: it must be a function from the number of steps taken to the "
            "learning rate"
        )
    given = config if isinstance(config, Config) else load_config(config)
    world_size, joined = join(given)
    resolved = resolve(given, world_size, needs="engine")
    full = resolved.config
    layout = lay_out(model, full)
    parallel = full.parallel
    degrees = Degrees(parallel.pipeline, parallel.replicate, parallel.data // parallel.replicate)
    channels, shared_memory = layout.schedule.channels(), full.run.shared_memory
    topology = build_topology(degrees, device_of(full), parallel.timeout_s, layout.ties, channels, shared_memory)
    if topology.rank == 0:
        for note in resolved.notes:
            LOGGER.log(logging.WARNING if note.startswith("pipeline.") else logging.INFO, note)
    return PipelineEngine(model, full, layout, topology, lr_scheduler, owns_world=joined)


@dataclass(frozen=True)
class _Running:
    """What holds process groups: let go of as a whole. `executors`: of evaluation, by number of microbatches."""

    sharded: ShardedModel
    feed: BatchFeed
    steps: Stepper
    make_executor: Callable[[Schedule], Executor]
    executors: dict[int, Executor] = field(default_factory=dict)


class PipelineEngine:
    """Trains a PipelineModel. `module` holds this rank's layers, named by their index in the model.

    `outcome`: what the last step did; `skipped_steps`: those of `global_steps` whose gradients overflowed.
    """

    def __init__(
        self,
        model: PipelineModel,
        config: Config,
        layout: Layout,
        topology: Topology,
        lr: LearningRate | None = None,
        owns_world: bool = False,
    ) -> None:
        """Use `initialize`, which resolves the config, lays the model out and builds the topology."""
        self.config, self.layout, self.topology = config, layout, topology
        self._owns_world = owns_world
        self._lr = lr or make_lr(config.scheduler, config.optimizer.params.lr)
        here = layout.schedule.stages_of(topology.coordinate("pp"))
        self._stages = build_layer_stages(model, layout.cuts, here, layout.holders, config.training.seed)
        for module in self._stages.values():
            require_values(module)
            place(module, config, topology)
            module.recompute = config.activation_checkpointing.recompute == FULL
        _make_copies_equal(self._stages, layout, topology)
        self._deferred: list[DeferredLinear] = []
        self._live: _Running | None = self._start()
        self.module = nn.ModuleDict({name: layer for m in self._stages.values() for name, layer in m.layers().items()})
        self.outcome: StepOutcome | None = None
        self.global_steps = self.skipped_steps = 0
        self._is_in_span = False
        if owns_world:
            atexit.register(self._leave_at_exit)

    def __iter__(self) -> Iterator[Any]:
        """Engine, optimizer, data loader (None) and learning-rate function, as DeepSpeed's `initialize` returns them."""
        return iter((self, self.optimizer, None, self._lr))

    def _start(self) -> _Running:
        """Storage, stages, data, and the stepper that the schedule asks for."""
        layout, config, topology = self.layout, self.config, self.topology
        queues = {index: WeightQueue() if layout.schedule.splits_backward else None for index in self._stages}
        for index, queue in queues.items():
            if queue is not None:
                self._deferred += defer_linears(self._stages[index], queue)
        groups = multipliers(config.optimizer.param_groups)
        make_optimizer_ = make_optimizer(config.optimizer, backend=chosen(config.kernels).optimizer)
        whole = needs_whole_tensors(config.optimizer)
        sharding = Sharding(layout.unit_names, layout.tied_units, groups, make_optimizer_, whole_tensors=whole)
        policy = PrecisionPolicy.from_config(config)
        sharded = make_model(layout.schedule, self._stages, topology, policy, config, sharding)
        last = len(layout.cuts) - 1
        stages = {
            index: PipelineStage(index, module, sharded.stage(index), index == 0, index == last, queues[index])
            for index, module in self._stages.items()
        }
        channels = GroupChannels(topology)

        def make_executor(schedule: Schedule) -> Executor:
            return Executor(sharded.with_gathers(schedule), stages, channels)

        parted = sharded if config.zero_optimization.stage == 3 else None
        feed = BatchFeed(stages, layout.schedule.placement, topology, parted)
        keeper = StateKeeper(self._stages.values(), topology.device)
        parts = Parts(sharded, layout.schedule, make_executor, feed, self._lr, topology, Failpoints(), keeper)
        return _Running(sharded, feed, make_stepper(parts, config.pipeline.optimizer_sync), make_executor)

    # ---- training and evaluation --------------------------------------------------------------------------------

    def train_batch(self, data_iter: Iterable[Any] | None = None) -> float:
        """Train one step and return its loss, the mean over all microbatches and data ranks, the same on every rank.

        `data_iter` yields microbatches (inputs, labels), `gradient_accumulation_steps` of which are taken. Ranks that
        hold the first or the last stage read it, all others may pass None. Shapes of inputs may change from step to step.
        """
        (loss,) = self.train_batches(data_iter, 1)
        return loss

    def train_batches(self, data_iter: Iterable[Any] | None, num_steps: int) -> Iterator[float]:
        """Train `num_steps` steps without draining the pipeline between them, where the schedule allows it; their losses.

        With an asynchronous schedule, and with `pipeline.optimizer_sync` = postvalidate, a loss comes later than the next
        step began. With an asynchronous schedule all steps must have inputs of one shape.

        The iterator must be exhausted before any other call. Where steps do not overlap, it may be closed instead;
        where they do, later steps are under way when a loss is given, and without them the engine cannot go on.
        Raises TrilithError for data that is missing or does not fit: in the first step on every rank, later on the ranks
        that see it.
        """
        running = self._idle
        overlaps = not isinstance(running.steps, SynchronousSteps)
        self._train_mode(True)
        count, is_delayed = self.layout.schedule.num_microbatches, self.layout.schedule.update_every > 0
        running.feed.begin(data_iter, count, trains=True, is_span=is_delayed)
        self._is_in_span = True
        try:
            for finished in running.steps.train(self.global_steps, num_steps):
                self.outcome = finished.outcome
                self.global_steps += 1
                self.skipped_steps += finished.outcome.skipped
                yield finished.loss
        except BaseException:
            self._is_in_span = overlaps and running.feed.has_begun
            raise
        self._is_in_span = False

    def eval_batch(self, data_iter: Iterable[Any] | None = None, num_microbatches: int | None = None) -> float:
        """The mean loss over the next `num_microbatches` (None: as many as a step has) and all data ranks.

        Runs the layers in evaluation mode, without gradients, on the same stages; who reads is as in `train_batch`.
        """
        running = self._idle
        self._train_mode(False)
        count = num_microbatches or self.layout.schedule.num_microbatches
        if count not in running.executors:
            schedule = complete(forward_only(self.layout.schedule.placement, count))
            running.executors[count] = running.make_executor(schedule)
        running.feed.begin(data_iter, count, trains=False)
        batch = running.feed.step(self.global_steps)
        result = running.executors[count].run(batch.microbatches, batch.boundary)
        return LossReport(result.losses, self.topology).result()[0]

    def _train_mode(self, training: bool) -> None:
        for module in self._stages.values():
            module.train(training)

    # ---- what it knows ------------------------------------------------------------------------------------------

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the first stage."""
        return 0 in self._stages

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the last stage."""
        return len(self.layout.cuts) - 1 in self._stages

    @property
    def sharded(self) -> ShardedModel:
        """This rank's weights, gradients and optimizer states."""
        return self._running.sharded

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of this rank's partitions."""
        return self._running.sharded.optimizer

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self._lr(self._running.sharded.optimizer_steps)

    @property
    def global_grad_norm(self) -> float | None:
        """L2 norm of the last step's averaged gradients before clipping; None where none was taken."""
        return None if self.outcome is None else self.outcome.grad_norm

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def save_checkpoint(self, save_dir: str | Path, client_state: Mapping[str, Any] | None = None) -> Path:
        """Publish a checkpoint of this step under `save_dir` and return its directory; every rank must call it.

        Any layout, schedule and ZeRO stage can load it. Buffers are those of data rank 0. `client_state`: whatever JSON
        can say, kept along. Raises CheckpointError on every rank if it cannot be written.
        """
        others = {
            "global_steps": self.global_steps,
            "skipped_steps": self.skipped_steps,
            "client": dict(client_state or {}),
        }
        return self._kept(self._idle).save(Path(save_dir), self.global_steps, others, self.config.checkpoint.keep_last)

    def load_checkpoint(self, load_dir: str | Path, step: int | None = None) -> tuple[Path, dict[str, Any]]:
        """Continue from the checkpoint of `step` (None: the newest) under `load_dir`; its directory and client state.

        Every rank must call it. Raises CheckpointError where there is none, it is damaged, or of another model.
        """
        running = self._idle
        directory = found_checkpoint(Path(load_dir), step, self.topology)
        state = self._kept(running).load(directory)
        self.global_steps, self.skipped_steps = state["global_steps"], state["skipped_steps"]
        return directory, dict(state["client"])

    def _kept(self, running: _Running) -> EngineState:
        """What a checkpoint keeps of this rank."""
        shapes = {p.canonical: p.shape for layer in self.layout.declared for p in layer.parameters}
        return EngineState(running.sharded, self.topology, tuple(self._stages.values()), shapes)

    # ---- the end ------------------------------------------------------------------------------------------------

    @property
    def _running(self) -> _Running:
        if self._live is None:
            raise TrilithError("the engine is closed. Make another one with trilith.initialize")
        return self._live

    @property
    def _idle(self) -> _Running:
        """As `_running`, with an empty pipeline. Raises TrilithError where steps are under way."""
        running = self._running
        if self._is_in_span:
            overlaps = not isinstance(running.steps, SynchronousSteps)
            raise TrilithError(
                "train_batches: the iterator of an earlier call was left before its end. Take all of its losses first"
                + (
                    ", or ask for fewer steps. Once it is closed or has failed, the steps under way are lost: go on with "
                    "a new engine, from a checkpoint"
                    if overlaps
                    else ", or close it"
                )
            )
        return running

    def close(self) -> None:
        """Remove all hooks; `module` keeps its weights and works without the engine. Every rank must call it.

        Leaves the process group if `initialize` made it.
        """
        if self._live is not None:
            self._live.sharded.close()
            if self._owns_world:
                atexit.unregister(self._leave_at_exit)
                leave_world()
        self.forget_groups()

    def forget_groups(self) -> None:
        """Let go of all process groups, for good, and of what needs them, without a word to other ranks.

        Weights that are parted (stage 3) stay so, unless `close` came before. gloo's threads abort a process in which a
        group lives on until the interpreter is gone.
        """
        live, self._live = self._live, None
        if live is not None:
            self.topology = without_groups(self.topology)
            live.sharded.leave(self.topology)
            for linear in self._deferred:
                linear.queue = None
            del live
            gc.collect()  # executors and their tables hold each other

    def _leave_at_exit(self) -> None:
        if dist.is_initialized():
            leave_at_exit()
            self.forget_groups()


def _make_copies_equal(stages: Mapping[int, LayerStage], layout: Layout, topology: Topology) -> None:
    """Give all copies of a tied parameter the values of the first, over the ranks that hold one."""
    copies: dict[str, list[torch.Tensor]] = {}
    for index in sorted(stages):
        named = dict(stages[index].named_parameters())
        for parameter in stages[index].local_parameters:
            if parameter.flat_unit in layout.tied_units:
                copies.setdefault(parameter.flat_unit, []).append(named[parameter.name].detach())
    for name in sorted(copies):
        first, *others = copies[name]
        group = topology.tie(name)
        if group.size > 1:
            source = layout.schedule.placement[layout.holders[name][0]]
            comm.broadcast(first, layout.ties[name].index(source), group)
        for other in others:
            other.copy_(first)
