"""Weights in several versions, for the schedules that update without a flush: weight stashing and double buffering.

A *slot* holds one version: flat buffers, and parameters that are views of them. Before a forward the stage's module is
given the parameters of the slot that its microbatch uses; autograd keeps them, so that a backward finds the weights of
its forward. Parameters and buffer count their changes together, so that autograd itself refuses to run a backward whose
weights were overwritten; not so in the first slot of a module that came with its values on the device, whose parameters
keep their identity and with it a count of their own. There is one optimizer, over master weights that belong to no
slot; an update writes the version it made into the slot whose own version nobody needs any longer.

- `pipedream` (Narayanan et al. 2019, "PipeDream", section 3.3): an update after every microbatch. Stage s of p keeps
  p - s versions and runs microbatch k with that of max(0, k - (p - 1 - s)) updates since the pipeline was empty. All
  slots add to one gradient buffer: between two updates lies one backward.
- `pipedream_2bw` (Narayanan et al. 2021, arXiv 2006.09503, section 3.1): W(t+1) = W(t) - step(grad(W(t-1))), with
  W(-1) = W(0). Two slots, each with its own gradients: those of one step are reduced and normed while the backwards of
  the next have begun. The version before the newest outlives a drain and a checkpoint; from the checkpoint of a run
  that had one version, training goes on as from W(0).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trilith import comm
from trilith.checkpoint.load import PREVIOUS
from trilith.failpoints import Failpoints
from trilith.kernels.weight_queue import Deferred
from trilith.optim.base import FlatPartition
from trilith.pipeline.action import Schedule
from trilith.precision import PrecisionPolicy
from trilith.topology import Topology
from trilith.zero.flat import DeclaredModule, FlatUnit, buffer_view, bytes_of
from trilith.zero.gradients import GradientReducer
from trilith.zero.offload import Disk
from trilith.zero.placement import Moved
from trilith.zero.sharded import ShardedModel, Sharding, StateEntry, StepOutcome
from trilith.zero.stage_parameters import StageParameters

Place = tuple[nn.Module, str]  # a module and the name of one of its own parameters


@dataclass
class Slot:
    """One version of the weights of this rank's stage.

    `bindings`: which parameter belongs where in the module. `loss_scale`: what the losses of microbatches that use this
    version are multiplied by.
    """

    units: tuple[FlatUnit, ...]
    reducer: GradientReducer
    partitions: tuple[FlatPartition, ...]
    bindings: tuple[tuple[Place, nn.Parameter], ...]
    loss_scale: float


@dataclass(frozen=True)
class Window:
    """A span of training without a flush. `first`: index of the slot that held the newest weights when it began."""

    first: int
    microbatches_per_step: int
    microbatches_per_update: int
    lr: Callable[[int], float]


class DelayedStage(StageParameters):
    """The pipeline executor's view of the stage's parameters (`pipeline.stage.StageParameters`)."""

    def __init__(self, model: DelayedModel, stage: int) -> None:
        super().__init__(model, stage)
        self._versions = model

    def begin_forward(self, microbatch: int) -> None:
        """Give the module the version that the microbatch uses; in evaluation it has the newest."""
        self._versions.bind(microbatch)

    def begin_backward(self, microbatch: int, final: bool) -> None:
        """A backward begins, with the version of its forward: what is recomputed reads it from the module again."""
        self._versions.bind(microbatch)
        self._versions.bound.reducer.begin_backward(self._stage, final)

    def end_backward(self, microbatch: int, final: bool) -> None:
        """It is done."""
        self._versions.bound.reducer.end_backward(self._stage, final)

    def begin_input_gradients(self, microbatch: int) -> None:
        """As `begin_backward`, of the first half only."""
        self._versions.bind(microbatch)
        self._versions.bound.reducer.begin_input_gradients(self._stage, microbatch)

    def end_input_gradients(self, microbatch: int, weights: Collection[Tensor]) -> None:
        """It is done."""
        self._versions.bound.reducer.end_input_gradients(self._stage, microbatch, weights)

    def begin_weight_gradients(self, microbatch: int, weights: Sequence[Tensor], final: bool) -> None:
        """The second half of the backward that began last."""
        self._versions.bound.reducer.begin_weight_gradients(self._stage, microbatch, weights, final)

    def end_weight_gradients(self, microbatch: int, final: bool) -> None:
        """It is done."""
        self._versions.bound.reducer.end_weight_gradients(self._stage, final)

    def accumulate(self, weight: Tensor, gradient: Tensor | Deferred) -> None:
        """Add a gradient that did not come through autograd."""
        self._versions.bound.reducer.accumulate(weight, gradient)

    def reduce(self, microbatch: int) -> None:
        """The gradients of the update that `microbatch` ends are complete: launch the reductions that are left."""
        self._versions.slot_of(microbatch).reducer.reduce(self._stage)

    def tie_reduce(self, microbatch: int) -> None:
        """Launch the sum of the gradients of weights that this stage shares with others."""
        self._versions.slot_of(microbatch).reducer.tie_reduce(self._stage)

    def update(self, microbatch: int) -> None:
        """Update this stage alone, with the gradients of `microbatch`."""
        self._versions.update_after(microbatch)


class DelayedModel(ShardedModel):
    """Owns what a rank stores of its one stage under an asynchronous schedule.

    Training happens inside a window (`begin_window`, `end_window`); outside of one the module holds the newest weights.
    `units` and `reducer` are those of the slot that was updated last or is being updated.
    """

    def __init__(
        self,
        stages: Mapping[int, DeclaredModule],
        topology: Topology,
        policy: PrecisionPolicy,
        config: Any,
        sharding: Sharding | None = None,
        failpoints: Failpoints | None = None,
    ) -> None:
        """As `ShardedModel`; `config.pipeline.schedule` is `pipedream` or `pipedream_2bw`."""
        super().__init__(stages, topology, policy, config, sharding, failpoints)
        ((self._stage, module),) = stages.items()
        self.stashes = config.pipeline.schedule == "pipedream"
        assert self.stashes or config.pipeline.schedule == "pipedream_2bw", config.pipeline.schedule
        if self.stashes:
            # Each would need to know something of all stages before an update, for which none of them waits.
            assert not config.gradient_clipping and not self.scaler.dynamic
            assert topology.pp.size == 1 or not self.sharding.tied_units
        self._delay = topology.pp.size - 1 - topology.coordinate("pp") if self.stashes else 1
        first = self._first_slot(module)
        self._slots = (first, *(self._copy_of(first, config) for _ in range(self._delay)))
        self._newest = 0
        self._window: Window | None = None
        self.bound = self._updated = first

    def _materialise(self, stages: Mapping[int, DeclaredModule], disk: Disk, moved: Moved) -> None:
        super()._materialise(stages, disk, moved)
        for units in self._units.values():
            for unit in units:
                if not unit.has_master:
                    unit.master = unit.own_weight.clone()

    def partitions(self) -> list[FlatPartition]:
        """As `ShardedModel.partitions`, without the module's weights: an update goes to another slot than its gradients."""
        return [unit.partition() for unit in self.units]

    def _first_slot(self, module: DeclaredModule) -> Slot:
        """What `ShardedModel` made, and where its parameters belong in the module, under every name they have."""
        places: dict[nn.Parameter, list[Place]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            path, _, leaf = name.rpartition(".")
            places.setdefault(parameter, []).append((module.get_submodule(path), leaf))
        bindings = tuple((at, p) for unit in self.units for p in unit.parameters for at in places[p])
        partitions = tuple(unit.partition() for unit in self.units)
        return Slot(self.units, self.reducer, partitions, bindings, self.scaler.loss_scale)

    def _copy_of(self, slot: Slot, config: Any) -> Slot:
        """A slot for another version, with the same weights."""
        units = tuple(_version_of(unit, shares_gradient=self.stashes) for unit in slot.units)
        twin = {
            old: new
            for before, after in zip(slot.units, units, strict=True)
            for old, new in zip(before.parameters, after.parameters, strict=True)
        }
        reducer = self._make_reducer({self._stage: units}, config.zero_optimization)
        partitions = tuple(unit.partition() for unit in units)
        return Slot(units, reducer, partitions, tuple((at, twin[p]) for at, p in slot.bindings), slot.loss_scale)

    # ---- values -------------------------------------------------------------------------------------------------

    def assign(self, stage: int, name: str, value: Tensor) -> None:
        """As `ShardedModel.assign`, in every version."""
        super().assign(stage, name, value)
        unit, place = self._places[stage, name]
        for slot in self._slots[1:]:
            for other in slot.units:
                if other.layout is unit.layout:
                    other.assign(place.offset, value)

    def stage(self, index: int) -> DelayedStage:
        """What the pipeline executor needs of the parameters of the stage."""
        return DelayedStage(self, index)

    # ---- a window -----------------------------------------------------------------------------------------------

    def begin_window(self, microbatches_per_step: int, lr: Callable[[int], float]) -> None:
        """Begin to train a span without a flush. `lr`: the learning rate of an update by the microbatch that ends it.

        Microbatches are counted from here on. Versions are, too, with `pipedream`: all stages begin with the newest.
        """
        assert self._window is None
        updates_every = 1 if self.stashes else microbatches_per_step
        self._window = Window(self._newest, microbatches_per_step, updates_every, lr)
        for slot in self._slots:
            slot.loss_scale = self.scaler.loss_scale

    def end_window(self) -> None:
        """End a span whose microbatches are all through, and whose updates are done: the module gets the newest weights."""
        self._window = None
        self._put(self._slots[self._newest])

    def slot_of(self, microbatch: int) -> Slot:
        """The slot of the version that a microbatch of the window uses."""
        window = self._window
        assert window is not None
        update = microbatch // window.microbatches_per_update
        version = max(0, update - self._delay) if self.stashes else update - 1
        return self._slots[(window.first + version) % len(self._slots)]

    def bind(self, microbatch: int) -> None:
        """Give the module the version that a microbatch uses; outside of a window it keeps the newest."""
        if self._window is not None:
            self._put(self.slot_of(microbatch))

    def _put(self, slot: Slot) -> None:
        if self.bound is not slot:
            for (owner, name), parameter in slot.bindings:
                owner._parameters[name] = parameter
            self.bound = slot

    def loss_scale_of(self, microbatch: int) -> float:
        """What the loss of a microbatch of the window is multiplied by: fixed when its weights were made.

        All ranks must agree on it, and the last ranks begin the backwards of a step while the update of the step before
        is still to come.
        """
        return self.slot_of(microbatch).loss_scale

    # ---- updates ------------------------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        """As `ShardedModel.zero_grad`; a buffer that all versions share is zeroed: one's parameters cannot tell."""
        if self.stashes and self.units:
            torch._foreach_zero_([unit.gradient for unit in self.units])
            self._stale = self._finished = False
        else:
            super().zero_grad()

    @property
    def loss_scale(self) -> float:
        """The scale of the gradients that are updated with."""
        return self._updated.loss_scale

    def _use(self, slot: Slot) -> None:
        """Let what follows read and write a slot's buffers."""
        self._updated, self.units, self.reducer = slot, slot.units, slot.reducer
        if not self.stashes:
            self.optimizer.rebind(slot.partitions)

    def update_after(self, microbatch: int) -> None:
        """One optimizer step with the gradients of a microbatch (`pipedream`); every rank of the stage must call it.

        A gradient that is not finite is not looked for.
        """
        window, reads = self._window, self.slot_of(microbatch)
        assert window is not None and self.stashes
        self._use(reads)
        self.finish()
        self.optimizer.step(window.lr(microbatch), reads.loss_scale)
        self._extra_updates += 1
        self._newest = (self._newest + 1) % len(self._slots)
        self._use(self._slots[self._newest])
        self._publish_weights()
        self.zero_grad()

    def step(self, lr: float) -> StepOutcome:
        """End the oldest train step of the window whose backwards are all done.

        With `pipedream` nothing is left to do but to count it. With `pipedream_2bw` as `ShardedModel.step`: the version
        that its gradients were computed with makes room for the new one. Every rank of the world must call it.
        """
        if self.stashes:
            self._count_step()
            return StepOutcome(None, False, self.scaler.loss_scale)
        self._newest = (self._newest + 1) % len(self._slots)
        self._use(self._slots[self._newest])
        outcome = super().step(lr)
        if outcome.skipped:
            self._publish_weights()  # the slot held the version before the newest: both are the same now
        self._updated.loss_scale = self.scaler.loss_scale
        self.zero_grad()
        return outcome

    def _count_step(self) -> None:
        """One step of several updates is over. A stage without trainable parameters is asked for none, but counts as all
        others do: a checkpoint keeps one count."""
        assert self._window is not None
        if not self.units:
            self.optimizer.num_steps += self._window.microbatches_per_step
            self._extra_updates += self._window.microbatches_per_step
        self._extra_updates -= 1

    # ---- state --------------------------------------------------------------------------------------------------

    @property
    def _previous(self) -> Slot | None:
        """With `pipedream_2bw` the version before the newest, which the next step of a window uses."""
        return None if self.stashes else self._slots[self._newest - 1]

    def state_entries(self) -> list[StateEntry]:
        """As `ShardedModel.state_entries`, and with `pipedream_2bw` the weights before the newest, as `previous`."""
        entries = super().state_entries()
        for unit in self._previous.units if self._previous else ():
            entries.extend(self._entries(unit, PREVIOUS, unit.own_weight))
        return entries

    def after_load(self) -> None:
        """As `ShardedModel.after_load`; the module gets the newest weights."""
        super().after_load()
        for unit in self._previous.units if self._previous and self._partitioned else ():
            comm.all_gather(unit.weight, unit.own_weight, self.topology.dp, unit.layout.uneven_sizes).wait()

    def _other_units(self) -> list[FlatUnit]:
        """Those of the versions that are not in `units`."""
        return [unit for slot in self._slots if slot is not self._updated for unit in slot.units]

    def all_units(self) -> list[FlatUnit]:
        """As `ShardedModel.all_units`, of all versions."""
        return [*super().all_units(), *self._other_units()]

    def memory_bytes(self) -> dict[str, int]:
        """As `ShardedModel.memory_bytes`, all versions counted."""
        found = super().memory_bytes()
        if not self.stashes:
            found["gradients"] += bytes_of([unit.gradient for unit in self._other_units()])
        return found

    def close(self) -> None:
        """Remove all hooks and gradients; the module keeps the weights it has."""
        for slot in self._slots:
            slot.reducer.close()

    def leave(self, topology: Topology) -> None:
        """As `ShardedModel.leave`, in every version."""
        super().leave(topology)
        for slot in self._slots:
            slot.reducer.close()
            slot.reducer.topology = topology


def _version_of(unit: FlatUnit, *, shares_gradient: bool) -> FlatUnit:
    """The same unit with other weights, their values equal for now; one master for all, and with `shares_gradient` one
    gradient."""
    weight = unit.weight.clone()
    views = tuple(buffer_view(weight, place) for place in unit.layout.placed)
    gradient = unit.gradient if shares_gradient else torch.zeros_like(unit.gradient)
    return replace(
        unit,
        weight=weight,
        gradient=gradient,
        parameters=tuple(nn.Parameter(view) for view in views),
        weight_views=views,
        gradient_views=unit.gradient_views
        if shares_gradient
        else tuple(buffer_view(gradient, place) for place in unit.layout.placed),
    )


def make_model(
    schedule: Schedule,
    stages: Mapping[int, DeclaredModule],
    topology: Topology,
    policy: PrecisionPolicy,
    config: Any,
    sharding: Sharding | None = None,
    failpoints: Failpoints | None = None,
) -> ShardedModel:
    """The storage of a rank's stages that `schedule` asks for; the other arguments are those of `ShardedModel`."""
    kind = DelayedModel if schedule.update_every else ShardedModel
    return kind(stages, topology, policy, config, sharding, failpoints)
