"""A rank's stages with their weights, gradients and optimizer states, at ZeRO stages 0 to 3.

Every unit has one flat buffer of weights and one of gradients; the optimizer works on this rank's partition of them, which
at stage 0 is all of it. At stage 2 no more than the partition of the gradients is kept between microbatches, at stage 3
no more than that of the weights between uses. A step is: gradients reduced (by `gradients.py`, mostly while backward
runs), one global norm, one fused optimizer call, weights rounded and gathered (at stage 3 later, by `gathers.py`, where
they are used). Rajbhandari et al. 2020 (ZeRO), section 5.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from trilith import comm
from trilith.models.families import declare
from trilith.optim.base import OptimizerFactory
from trilith.optim.clip import clip_factor
from trilith.optim.groups import GroupOf, multipliers
from trilith.optim.make import make_optimizer
from trilith.pipeline.action import Schedule
from trilith.precision import LossScaler, PrecisionPolicy
from trilith.sharding import ShardSpec
from trilith.topology import Group, Topology
from trilith.zero.flat import DeclaredModule, FlatUnit, move_buffers
from trilith.zero.gradients import GradientReducer
from trilith.zero.partition import (
    PlacedParameter,
    flat_unit_names,
    partition_specs,
    tied_flat_units,
    with_copies,
)
from trilith.zero.residency import GatherPlan, uses_of
from trilith.zero.storage import Storage, make_gatherer

StateEntry = tuple[str, ShardSpec, Tensor]


@dataclass(frozen=True)
class Sharding:
    """What ZeRO must know of the whole model, beyond this rank's stages, and of the optimizer.

    `unit_names`: every flat unit of the model, in one order for all ranks and layouts; the norm is summed in it.
    `tied_units`: those that two stages hold. `group_of`: a tensor's parameter group. `whole_gradients`: the flat units
    whose gradients stay whole over the microbatches of a step, also at stages 2 and 3; None: as `reduce_interval` says,
    and all of them where it is "auto".
    """

    unit_names: tuple[str, ...]
    tied_units: frozenset[str]
    group_of: GroupOf
    make_optimizer: OptimizerFactory
    whole_gradients: frozenset[str] | None = None


@dataclass(frozen=True)
class StepOutcome:
    """What a step did. `grad_norm` is global, of unscaled gradients, before clipping; `loss_scale` the one it ran with.

    No norm is taken where every stage updates for itself.
    """

    grad_norm: float | None
    skipped: bool
    loss_scale: float


def sharding_of(config: Any) -> Sharding:
    """The Sharding of a resolved Config with a `model` section."""
    units = declare(config.model)
    return Sharding(
        unit_names=flat_unit_names(units),
        tied_units=tied_flat_units(units),
        group_of=multipliers(config.optimizer.param_groups),
        make_optimizer=make_optimizer(config.optimizer),
    )


class StageParameters:
    """The pipeline executor's view of one stage's parameters (`pipeline.stage.StageParameters`)."""

    def __init__(self, model: ShardedModel, stage: int) -> None:
        self._model, self._stage = model, stage

    def begin_run(self, schedule: Schedule) -> None:
        """A run of `schedule` begins: at stage 3 its gather plan does."""
        self._model.begin_run(schedule)

    def gather(self) -> None:
        """Begin to gather what comes next; weights are whole on every data rank at stages 0 to 2."""
        if self._model.gatherer is not None:
            self._model.gatherer.ahead()

    def release(self) -> None:
        """Let go of what the plan does not keep."""
        if self._model.gatherer is not None:
            self._model.gatherer.release()

    def begin_forward(self, microbatch: int) -> None:
        """There is one version of the weights, and it is in the module."""

    def begin_backward(self, microbatch: int, final: bool) -> None:
        """A whole backward of this stage begins; `final`: the last of the step."""
        self._model.forget_step()
        self._model.reducer.begin_backward(self._stage, final)

    def end_backward(self, microbatch: int, final: bool) -> None:
        """It is done."""
        self._end_gathers()
        self._model.reducer.end_backward(self._stage, final)

    def begin_input_gradients(self, microbatch: int) -> None:
        """The first half of a backward begins."""
        self._model.forget_step()
        self._model.reducer.begin_input_gradients(self._stage, microbatch)

    def end_input_gradients(self, microbatch: int, weights: Collection[Tensor]) -> None:
        """It is done; the gradients of `weights` are to come."""
        self._end_gathers()
        self._model.reducer.end_input_gradients(self._stage, microbatch, weights)

    def begin_weight_gradients(self, microbatch: int, weights: Sequence[Tensor], final: bool) -> None:
        """The second half of a backward begins, which brings a gradient for each of `weights`."""
        self._model.reducer.begin_weight_gradients(self._stage, microbatch, weights, final)

    def end_weight_gradients(self, microbatch: int, final: bool) -> None:
        """It is done."""
        self._model.reducer.end_weight_gradients(self._stage, final)

    def _end_gathers(self) -> None:
        if self._model.gatherer is not None:
            self._model.gatherer.end_backward()

    def accumulate(self, weight: Tensor, gradient: Tensor) -> None:
        """Add a gradient of the second half of a backward."""
        self._model.reducer.accumulate(weight, gradient)

    def reduce(self, microbatch: int) -> None:
        """All gradients of this stage are complete: launch the reductions that are left."""
        self._model.reducer.reduce(self._stage)

    def tie_reduce(self, microbatch: int) -> None:
        """Sum the gradients of weights that this stage shares with others."""
        self._model.reducer.tie_reduce(self._stage)

    def update(self, microbatch: int) -> None:
        """Synchronous schedules step once, after their last action."""
        raise AssertionError("an optimizer step inside a synchronous schedule")


class ShardedModel:
    """Owns what a rank stores of its stages; every rank of the world must make the same calls in the same order."""

    def __init__(
        self,
        stages: Mapping[int, DeclaredModule],
        topology: Topology,
        policy: PrecisionPolicy,
        config: Any,
        sharding: Sharding | None = None,
    ) -> None:
        """Allocate buffers on `topology.device` and make every module's parameters views of them.

        Parameters of modules on the meta device have no values until `assign` has given each its own. `config` is the
        resolved Config; `sharding` is taken from its `model` section if not given.
        """
        zero = config.zero_optimization
        self.topology, self.policy, self.device = topology, policy, topology.device
        self.sharding = sharding or sharding_of(config)
        self.scaler = LossScaler.from_config(config)
        self.max_norm = config.gradient_clipping
        self.kept_bytes: dict[str, int] = {}  # what others keep beside this model, by category
        self._partitioned = zero.stage >= 1 and topology.dp.size > 1
        self._reduces_late = zero.reduce_interval != "microbatch"
        self._storage = Storage(zero, topology, policy, self.sharding.group_of, self._keeps_whole)
        self._units: dict[int, tuple[FlatUnit, ...]] = {}
        self._frozen: dict[int, tuple[FlatUnit, ...]] = {}
        self._places: dict[tuple[int, str], tuple[FlatUnit, PlacedParameter]] = {}
        self._buffer_bytes = 0
        for index, module in stages.items():
            self._materialise(index, module)
        self.units = tuple(unit for units in self._units.values() for unit in units)
        self._unit_index = {name: i for i, name in enumerate(self.sharding.unit_names)}
        self.optimizer = self.sharding.make_optimizer([unit.partition() for unit in self.units])
        self.reducer = self._make_reducer(self._units, zero)
        units_of = {index: (*self._units[index], *self._frozen[index]) for index in stages}
        self.gatherer, self._uses = make_gatherer(stages, units_of, topology.dp, zero)
        self._gather_plans: dict[int, tuple[Schedule, GatherPlan]] = {}
        self._stale = self._finished = False
        self._extra_updates = 0  # of the optimizer, beyond one a step

    def _materialise(self, index: int, module: DeclaredModule) -> None:
        """Buffers of one stage. Frozen parameters have weights only, and a partition only at stage 3."""
        named = dict(module.named_parameters(remove_duplicate=False))
        trained = [p for p in module.local_parameters if named[p.name].requires_grad]
        frozen = [p for p in module.local_parameters if not named[p.name].requires_grad]
        self._units[index] = self._storage.make_units(index, module, trained)
        self._frozen[index] = self._storage.make_units(index, module, frozen, is_frozen=True)
        for unit in (*self._units[index], *self._frozen[index]):
            self._places.update({(index, place.parameter.name): (unit, place) for place in unit.layout.placed})
        self._buffer_bytes += move_buffers(module, self.device)

    def _keeps_whole(self, flat_unit: str) -> bool:
        """Whether a unit's gradient is whole over the microbatches of a step, where it need not be."""
        chosen = self.sharding.whole_gradients
        return self._reduces_late if chosen is None else flat_unit in chosen

    def _make_reducer(self, units: Mapping[int, Sequence[FlatUnit]], zero: Any) -> GradientReducer:
        """The reducer of `units`, by stage; `zero` is the config section `zero_optimization`."""
        return GradientReducer(
            units,
            self.topology,
            self.policy,
            tied_units=self.sharding.tied_units,
            overlap=zero.overlap_comm,
            bucket_numel=zero.reduce_bucket_size,
        )

    # ---- values -------------------------------------------------------------------------------------------------

    def assign(self, stage: int, name: str, value: Tensor) -> None:
        """Set the local parameter `name` of `stage` to `value` (its local shape): rounded in the model, exact in the
        master weights."""
        unit, place = self._places[stage, name]
        assert tuple(value.shape) == place.parameter.shape, (name, value.shape)
        unit.assign(place.offset, value)

    def stage(self, index: int) -> StageParameters:
        """What the pipeline executor needs of the parameters of stage `index`."""
        return StageParameters(self, index)

    # ---- the step -----------------------------------------------------------------------------------------------

    @property
    def loss_scale(self) -> float:
        """What the loss of the next backward must be multiplied by."""
        return self.scaler.loss_scale

    @property
    def optimizer_steps(self) -> int:
        """Steps taken, skipped ones not counted: the argument of the learning-rate function.

        The optimizer has made more updates where earlier steps had several each (`pipedream`).
        """
        return self.optimizer.num_steps - self._extra_updates

    def zero_grad(self) -> None:
        """Forget all gradients."""
        if self.units:
            torch._foreach_zero_([unit.gradient for unit in self.units])
        self._stale = self._finished = False

    def forget_step(self) -> None:
        """A backward begins: the gradients of a step that was taken are forgotten."""
        if self._stale:
            self.zero_grad()

    def begin_run(self, schedule: Schedule) -> None:
        """At stage 3: follow the gather plan of `schedule`, made at its first run."""
        if self.gatherer is None:
            return
        key = id(schedule)  # which is kept, so that no other can have it
        if key not in self._gather_plans and self._uses is not None:
            actions = schedule.actions[self.topology.coordinate("pp")]
            self._gather_plans[key] = (schedule, self.gatherer.plan(uses_of(actions, self._uses)[0]))
        _, plan = self._gather_plans.get(key, (schedule, None))
        self.gatherer.begin_run(key, plan)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it the weights of this rank's stages are whole; all data ranks must enter and leave it together."""
        with nullcontext() if self.gatherer is None else self.gatherer.all_whole():
            yield

    def finish(self) -> None:
        """Wait for all reductions. Each rank's partition of the gradients is then final: summed over all ranks.

        `step` does it; a tool may do it before, to look at the gradients.
        """
        if not self._finished:
            self.reducer.finish()
            self._finished = True

    def stage_squares(self) -> Tensor:
        """Sums of squares of the reduced gradients of this pipeline rank, with one float64 per flat unit of the model.

        Summed over the ranks that hold the same stages, which all get the same bits. 0 for units of other ranks.
        """
        squares = torch.zeros(len(self._unit_index), dtype=torch.float64, device=self.device)
        for unit in self.units:
            squares[self._unit_index[unit.layout.name]] += unit.sum_of_squares()
        for group in [self.topology.dp, self.topology.tp] if self._partitioned else [self.topology.tp]:
            squares = _sum_in_rank_order(squares, group)
        return squares

    def grad_norm(self) -> float:
        """Global L2 norm of the reduced gradients as they are (loss scale included), each element counted once.

        The sum runs over a vector with one float64 per flat unit of the whole model, in one order for every pipeline
        layout, so that the layout of stages does not change a bit. Not finite if any gradient of any rank is not.
        """
        return float(_sum_in_rank_order(self.stage_squares(), self.topology.pp).sum().sqrt())

    def step(self, lr: float) -> StepOutcome:
        """One optimizer step with learning rate `lr`, clipped by the global norm, on gradients that are complete.

        With fp16, and with bf16 where it is checked, a step with a gradient that is not finite is skipped on all ranks.
        Raises TrilithError if the loss scale cannot fall further.
        """
        self.finish()
        norm = self.grad_norm() / self.loss_scale
        self.apply(lr, norm)
        return self.close_step(norm)

    def apply(self, lr: float, norm: float) -> None:
        """Do what the global `norm` of the unscaled gradients asks for: update, clipped, or leave everything as it is."""
        if not self._overflows(norm):
            self.update(lr, clip_factor(norm, self.max_norm))

    def update(self, lr: float, factor: float) -> None:
        """Update this rank's partitions with its gradients times `factor`, and the weights on all data ranks."""
        self.optimizer.step(lr, self.loss_scale / factor if factor else inf)
        self._publish_weights()

    def close_step(self, norm: float) -> StepOutcome:
        """End a step whose norm is known and that was applied: its gradients may be forgotten, the scale adapts.

        Raises TrilithError if the loss scale cannot fall further.
        """
        scale, skipped = self.loss_scale, self._overflows(norm)
        self._stale, self._finished = True, False
        self.scaler.update(skipped)
        return StepOutcome(norm, skipped, scale)

    def _overflows(self, norm: float) -> bool:
        return self.policy.check_overflow and not isfinite(norm)

    def _publish_weights(self) -> None:
        """Bring the updated weights into the modules of all data ranks; at stage 3 they are gathered when needed."""
        if self.gatherer is not None:
            self.gatherer.invalidate()
        handles = []
        for unit in self.units:
            unit.round_master()
            if self._partitioned and not unit.is_sharded:
                handles.append(comm.all_gather(unit.weight, unit.own_weight, self.topology.dp, async_op=True))
        for handle in handles:
            handle.wait()

    # ---- state --------------------------------------------------------------------------------------------------

    def state_entries(self) -> list[StateEntry]:
        """(role, spec, 1-D tensor) of everything a checkpoint keeps of this rank, to be filled in place when loading.

        Role `master` for the optimizer's weights, or `weight` where the module's own have the same bits, and one role
        per state of the optimizer. Offsets in a spec count from the beginning of its tensor. Where several ranks hold the
        same, replica 0 marks the one that owns it.
        """
        entries: list[StateEntry] = []
        for unit, state in zip(self.units, self.optimizer.state, strict=True):
            tensors = {unit.master_role: unit.master, **state}
            for role, tensor in tensors.items():
                entries.extend(self._entries(unit, role, tensor))
        for units in self._frozen.values():
            for unit in units:
                entries.extend(self._entries(unit, "weight", unit.own_weight))
        return entries

    def owned_entries(self) -> list[StateEntry]:
        """Those of `state_entries` that hold something this rank must save."""
        return [e for e in self.state_entries() if any(piece.replica == 0 for piece in e[1].pieces)]

    def gradient_entries(self) -> list[StateEntry]:
        """(role `gradient`, spec, 1-D tensor) of this rank's partition of the gradients, for tools, after `finish`.

        They are those of the scaled loss.
        """
        return [entry for unit in self.units for entry in self._entries(unit, "gradient", unit.own_gradient)]

    def _entries(self, unit: FlatUnit, role: str, tensor: Tensor) -> Iterator[StateEntry]:
        dp, replicate = self.topology.dp, self.topology.replicate
        copies, index = replicate.size, replicate.index
        if unit.layout.degree == 1:
            copies, index = copies * dp.size, index * dp.size + dp.index
        for spec in partition_specs(unit.layout, unit.start, unit.stop, role):
            yield role, with_copies(spec, index, copies) if copies > 1 else spec, tensor

    def after_load(self) -> None:
        """Bring the modules' weights up to date after the tensors of `state_entries` were filled."""
        self._publish_weights()
        for unit in self.all_units():
            if unit.is_frozen and unit.layout.degree > 1 and not unit.is_sharded:
                comm.all_gather(unit.weight, unit.own_weight, self.topology.dp).wait()

    def state_dict(self) -> dict[str, Any]:
        """The scalars that a checkpoint keeps, JSON-able; the same on every rank."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "extra_updates": self._extra_updates,
            "loss_scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self._extra_updates = state["extra_updates"]
        self.scaler.load_state_dict(state["loss_scaler"])

    def weight_buffers(self) -> list[Tensor]:
        """The flat buffers, in the parameter dtype, that all weights of this rank's stages are views of: every version."""
        return [unit.weight for unit in self.all_units()]

    def whole_units(self) -> Iterator[FlatUnit]:
        """The units one after the other, each whole while it is given; all data ranks must go through all of them."""
        for unit in self.all_units():
            with nullcontext() if self.gatherer is None else self.gatherer.whole([unit]):
                yield unit

    def all_units(self) -> list[FlatUnit]:
        """Those that are trained, and frozen ones."""
        return [*self.units, *(unit for units in self._frozen.values() for unit in units)]

    def memory_bytes(self) -> dict[str, int]:
        """Bytes this rank stores, by category: parameters, gradients, optimizer (masters and moments), buffers.

        `gather_window`: the most that was there beyond these at one time, of whole weights and whole gradients of units
        of which the rank keeps its part.
        """
        masters = [unit.master for unit in self.units if unit.has_master]
        moments = [tensor for state in self.optimizer.state for tensor in state.values()]
        return {
            "parameters": bytes_of([unit.weight if unit.shard is None else unit.shard for unit in self.all_units()]),
            "gradients": bytes_of([unit.gradient for unit in self.units]),
            "optimizer": bytes_of([*masters, *moments]),
            "buffers": self._buffer_bytes,
            "gather_window": self.reducer.pool.peak_bytes + (self.gatherer.peak_bytes if self.gatherer else 0),
            **self.kept_bytes,
        }

    def close(self) -> None:
        """Remove all hooks and gradients; the modules keep their weights, whole. Every data rank must call it."""
        self.reducer.close()
        if self.gatherer is not None:
            self.gatherer.close()

    def leave(self, topology: Topology) -> None:
        """Remove all hooks and forget the process groups, without a word to other ranks; parted weights stay so.

        `topology`: of a rank with nobody to talk to.
        """
        self.reducer.close()
        self.topology = self.reducer.topology = topology
        if self.gatherer is not None:
            self.gatherer.leave(topology.dp)


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of the elements of `tensors`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _sum_in_rank_order(vector: Tensor, group: Group) -> Tensor:
    """The sum of a small vector over a group, the same bits on every rank."""
    if group.size == 1:
        return vector
    gathered = vector.new_empty(group.size * vector.numel())
    comm.all_gather(gathered, vector, group).wait()
    return gathered.view(group.size, -1).sum(0)
