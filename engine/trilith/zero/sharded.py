"""A rank's stages with their weights, gradients and optimizer states, at ZeRO stages 0 to 3.

Every unit has one flat buffer of weights and one of gradients; the optimizer works on this rank's partition of them, which
at stage 0 is all of it. At stage 2 no more than the partition of the gradients is kept between microbatches, at stage 3
no more than that of the weights between uses. A step is: gradients reduced (by `gradients.py`, mostly while backward
runs), one global norm, one fused optimizer call, weights rounded and gathered (at stage 3 later, by `gathers.py`, where
they are used). Rajbhandari et al. 2020 (ZeRO), section 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from trilith import comm
from trilith.failpoints import Failpoints
from trilith.kernels.backends import chosen
from trilith.kernels.ops.optimizer import Clipping, GradScale
from trilith.models.families import declare
from trilith.optim.base import FlatPartition, Optimizer, OptimizerFactory
from trilith.optim.clip import clip_factor
from trilith.optim.groups import GroupOf, multipliers
from trilith.optim.make import make_optimizer, needs_whole_tensors
from trilith.pipeline.action import Schedule
from trilith.precision import LossScaler, PrecisionPolicy
from trilith.sharding import ShardSpec
from trilith.topology import Group, Topology
from trilith.zero.auto_placement import FirstSteps
from trilith.zero.flat import DeclaredModule, FlatUnit, add_bytes, move_buffers
from trilith.zero.gather_plans import GatherPlans
from trilith.zero.gradients import GradientReducer
from trilith.zero.offload import Disk, Offload
from trilith.zero.owners import Owners
from trilith.zero.partition import (
    PlacedParameter,
    flat_unit_names,
    partition_specs,
    tied_flat_units,
    with_copies,
)
from trilith.zero.placement import Moved, Tier
from trilith.zero.stage_parameters import StageParameters
from trilith.zero.storage import Storage, make_gatherer

StateEntry = tuple[str, ShardSpec, Tensor]


@dataclass(frozen=True)
class Sharding:
    """What ZeRO must know of the whole model, beyond this rank's stages, and of the optimizer.

    `unit_names`: every flat unit of the model, in one order for all ranks and layouts; the norm is summed in it.
    `tied_units`: those that two stages hold. `group_of`: a tensor's parameter group. `whole_gradients`: the flat units
    whose gradients stay whole over the microbatches of a step, also at stages 2 and 3; None: as `reduce_interval` says,
    and all of them where it is "auto". `whole_tensors`: the optimizer needs every parameter whole in one partition.
    """

    unit_names: tuple[str, ...]
    tied_units: frozenset[str]
    group_of: GroupOf
    make_optimizer: OptimizerFactory
    whole_gradients: frozenset[str] | None = None
    whole_tensors: bool = False


@dataclass(frozen=True)
class StepOutcome:
    """What a step did. `grad_norm` is global, of unscaled gradients, before clipping; `loss_scale` the one it ran with.

    No norm is taken where every stage updates for itself.
    """

    grad_norm: float | None
    skipped: bool
    loss_scale: float


def sharding_of(config: Any, tp: Group) -> Sharding:
    """The Sharding of a resolved Config with a `model` section; `tp` is the tensor-parallel group."""
    units = declare(config.model)
    return Sharding(
        unit_names=flat_unit_names(units),
        tied_units=tied_flat_units(units),
        group_of=multipliers(config.optimizer.param_groups),
        make_optimizer=make_optimizer(config.optimizer, tp, chosen(config.kernels).optimizer),
        whole_tensors=needs_whole_tensors(config.optimizer),
    )


class ShardedModel:
    """Owns what a rank stores of its stages; every rank of the world must make the same calls in the same order."""

    def __init__(
        self,
        stages: Mapping[int, DeclaredModule],
        topology: Topology,
        policy: PrecisionPolicy,
        config: Any,
        sharding: Sharding | None = None,
        failpoints: Failpoints | None = None,
    ) -> None:
        """Allocate buffers on `topology.device` and make every module's parameters views of them.

        Parameters of modules on the meta device have no values until `assign` has given each its own. `config` is the
        resolved Config; `sharding` is taken from its `model` section if not given.
        """
        zero = config.zero_optimization
        self.topology, self.policy, self.device = topology, policy, topology.device
        self.sharding = sharding or sharding_of(config, topology.tp)
        self.scaler = LossScaler.from_config(config)
        self.max_norm = config.gradient_clipping
        self.kept_bytes: dict[str, int] = {}  # what others keep beside this model, by category
        self._partitioned = zero.stage >= 1 and topology.dp.size > 1
        self._reduces_late = zero.reduce_interval != "microbatch"
        owners = None
        if self._partitioned and self.sharding.whole_tensors:
            owners = Owners(topology.dp.size, self.sharding.tied_units)
        self._storage = Storage(zero, topology, policy, self.sharding.group_of, self._keeps_whole, owners)
        self._units: dict[int, tuple[FlatUnit, ...]] = {}
        self._frozen: dict[int, tuple[FlatUnit, ...]] = {}
        self._places: dict[tuple[int, str], tuple[FlatUnit, PlacedParameter]] = {}
        self._buffer_bytes = 0
        disk, moved = Disk(config, topology.rank, failpoints or Failpoints()), Moved()
        self._materialise(stages, disk, moved)
        self.units = tuple(unit for units in self._units.values() for unit in units)
        self._unit_index = {name: i for i, name in enumerate(self.sharding.unit_names)}
        frozen = [unit for units in self._frozen.values() for unit in units]
        self.offload = Offload(self.units, frozen, zero, self.device, disk, moved)
        self.optimizer = self._make_optimizer()
        self.reducer = self._make_reducer(self._units, zero)
        units_of = {index: (*self._units[index], *self._frozen[index]) for index in stages}
        self.gatherer, uses = make_gatherer(stages, units_of, topology.dp, zero)
        at = topology.coordinate("pp")
        self._gather_plans = None if self.gatherer is None else GatherPlans(self.gatherer, uses, at)
        self._watch = FirstSteps.of(config, self)
        self._stale = self._finished = False
        self._extra_updates = 0  # of the optimizer, beyond one a step

    def _materialise(self, stages: Mapping[int, DeclaredModule], disk: Disk, moved: Moved) -> None:
        """Buffers of all stages. Frozen parameters have weights only, and a partition only at stage 3."""
        planned = []
        for index, module in stages.items():
            named = dict(module.named_parameters(remove_duplicate=False))
            trained = [p for p in module.local_parameters if named[p.name].requires_grad]
            frozen = [p for p in module.local_parameters if not named[p.name].requires_grad]
            planned += self._storage.plan_units(index, module, trained)
            planned += self._storage.plan_units(index, module, frozen, is_frozen=True)
        made = list(zip(planned, self._storage.make_units(planned, disk, moved), strict=True))
        for index, module in stages.items():
            of_stage = [(plan.keeping.frozen, unit) for plan, unit in made if unit.stage == index]
            self._units[index] = tuple(unit for is_frozen, unit in of_stage if not is_frozen)
            self._frozen[index] = tuple(unit for is_frozen, unit in of_stage if is_frozen)
            for _, unit in of_stage:
                self._places.update({(index, place.parameter.name): (unit, place) for place in unit.layout.placed})
            self._buffer_bytes += move_buffers(module, self.device)

    def _make_optimizer(self) -> Optimizer:
        """The optimizer of this rank's partitions; its states join what lives on disk."""
        swaps = [unit.states_swap for unit in self.units]
        for swap in swaps:
            if swap is not None:
                swap.open_blank()
        optimizer = self.sharding.make_optimizer(self.partitions())
        for swap, state in zip(swaps, optimizer.state, strict=True):
            if swap is not None:
                for role, tensor in state.items():
                    swap.add(role, tensor)
                swap.drop()
        return optimizer

    def partitions(self) -> list[FlatPartition]:
        """What the optimizer sees."""
        return [unit.partition(self.sharding.whole_tensors, with_weight=True) for unit in self.units]

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
        self.offload.open(unit)
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
        for unit in self.units:
            unit.forget_gradient()
        self._stale = self._finished = False

    def forget_step(self) -> None:
        """A backward begins: the gradients of a step that was taken are forgotten."""
        if self._stale:
            self.zero_grad()

    def begin_run(self, schedule: Schedule) -> None:
        """At stage 3: follow the gather plan of `schedule`, made at its first run."""
        self.offload.put_back()
        if self._watch is not None and not schedule.is_forward_only:
            self._watch.begin()
        if self.gatherer is not None and self._gather_plans is not None:
            self.gatherer.begin_run(id(schedule), self._gather_plans.of(schedule))

    def with_gathers(self, schedule: Schedule) -> Schedule:
        """What an executor should run: at stage 3 `schedule` with GATHER and RELEASE in this rank's row, so that weights
        are on their way while the rank waits for a message."""
        return schedule if self._gather_plans is None else self._gather_plans.insert(schedule)

    def begin_step(self) -> None:
        """A step begins whose computations are known from the one before at most."""
        self.offload.put_back()
        if self._watch is not None:
            self._watch.begin()
        if self.gatherer is not None:
            self.gatherer.begin_run("step")

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
            squares = comm.sum_in_rank_order(squares, group)
        return squares

    def grad_norm(self) -> float:
        """Global L2 norm of the reduced gradients as they are (loss scale included), each element counted once.

        The sum runs over a vector with one float64 per flat unit of the whole model, in one order for every pipeline
        layout, so that the layout of stages does not change a bit. Not finite if any gradient of any rank is not.
        """
        return float(self._global_squares().sqrt())

    def _global_squares(self) -> Tensor:
        return comm.sum_in_rank_order(self.stage_squares(), self.topology.pp).sum()

    def step(self, lr: float) -> StepOutcome:
        """One optimizer step with learning rate `lr`, clipped by the global norm, on gradients that are complete.

        With fp16, and with bf16 where it is checked, a step with a gradient that is not finite is skipped on all ranks.
        Raises TrilithError if the loss scale cannot fall further.
        """
        self.finish()
        if self._clips_where_it_lies():
            squares = self._global_squares()
            self.update(lr, Clipping(squares, self.loss_scale, self.max_norm))
            norm = float(squares.sqrt()) / self.loss_scale
        else:
            norm = self.grad_norm() / self.loss_scale
            self.apply(lr, norm)
        return self.close_step(norm)

    def _clips_where_it_lies(self) -> bool:
        """Whether the update may be queued before the host knows the norm: on a GPU that has everything, where no norm
        lets a step be skipped."""
        groups = self.offload.groups
        is_here = self.device.type == "cuda" and len(groups) == 1 and self.units[0].placement.states is Tier.DEVICE
        return is_here and not self.policy.check_overflow and self.optimizer.clips(groups[0])

    def apply(self, lr: float, norm: float) -> None:
        """Do what the global `norm` of the unscaled gradients asks for: update, clipped, or leave everything as it is."""
        if not self._overflows(norm):
            factor = clip_factor(norm, self.max_norm)
            self.update(lr, self.loss_scale / factor if factor else inf)

    def update(self, lr: float, scale: GradScale) -> None:
        """Update this rank's partitions with its gradients divided by `scale`, and the weights on all data ranks."""
        if self.gatherer is not None:
            self.gatherer.invalidate()
        self.offload.begin_update()
        handles: list[comm.Handle] = []
        for place, members in enumerate(self.offload.groups):
            self.offload.bring(place)
            if isinstance(scale, Clipping):
                is_rounded = self.optimizer.step_clipped(members, lr, scale)
            else:
                is_rounded = self.optimizer.step_parts(members, lr, scale)
            handles += self._publish([self.units[index] for index in members], is_rounded)
            self.offload.take_away(place)
        self.optimizer.end_step()
        self.offload.end_update()
        for handle in handles:
            handle.wait()

    def close_step(self, norm: float) -> StepOutcome:
        """End a step whose norm is known and that was applied: its gradients may be forgotten, the scale adapts.

        Raises TrilithError if the loss scale cannot fall further.
        """
        scale, skipped = self.loss_scale, self._overflows(norm)
        self._stale, self._finished = True, False
        if self._watch is not None and self._watch.end():
            self._watch = None
        self.scaler.update(skipped)
        return StepOutcome(norm, skipped, scale)

    def _overflows(self, norm: float) -> bool:
        return self.policy.check_overflow and not isfinite(norm)

    def _publish_weights(self) -> None:
        """Bring the updated weights into the modules of all data ranks; at stage 3 they are gathered when needed."""
        if self.gatherer is not None:
            self.gatherer.invalidate()
        handles: list[comm.Handle] = []
        for unit in self.units:
            self.offload.open(unit)
            handles += self._publish([unit])
        self.offload.end_update()
        self.offload.put_back()
        for handle in handles:
            handle.wait()

    def _publish(self, units: Iterable[FlatUnit], is_rounded: bool = False) -> list[comm.Handle]:
        """Round the master weights of units, if the optimizer has not, and begin to gather those that are always whole."""
        handles = []
        for unit in units:
            if unit.shard_swap is not None:
                unit.shard_swap.open_blank()
            if not is_rounded:
                unit.round_master()
            gathers = self._partitioned and not unit.is_sharded
            self.offload.send_up(unit, is_used=gathers)
            if gathers:
                sizes = unit.layout.uneven_sizes
                handles.append(comm.all_gather(unit.weight, unit.own_weight, self.topology.dp, sizes, async_op=True))
        return handles

    # ---- state --------------------------------------------------------------------------------------------------

    def state_entries(self) -> list[StateEntry]:
        """(role, spec, 1-D tensor) of everything a checkpoint keeps of this rank, to be filled in place when loading.

        Role `master` for the optimizer's weights, or `weight` where the module's own have the same bits, and one role
        per state of the optimizer. Offsets in a spec count from the beginning of its tensor. Where several ranks hold the
        same, replica 0 marks the one that owns it. What lives on disk is in memory then, until the next run begins.
        """
        self.offload.open_all()
        entries: list[StateEntry] = []
        for unit, state in zip(self.units, self.optimizer.state, strict=True):
            tensors = {unit.master_role: unit.master, **state}
            for role, tensor in tensors.items():
                entries.extend(e for e in self._entries(unit, role, tensor) if self.optimizer.keeps(role, e[1].name))
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
        of which the rank keeps its part. Categories in host memory and on disk begin with `host_` and `disk_`;
        `host_swap`: the most that was in host memory at one time of what lives on disk.
        """
        found = {"parameters": 0, "gradients": 0, "optimizer": 0, "buffers": self._buffer_bytes}
        for unit in self.all_units():
            add_bytes(found, unit.placement.weights, "parameters", [unit.weight if unit.shard is None else unit.shard])
        for unit, state in zip(self.units, self.optimizer.state, strict=True):
            states = unit.placement.states
            passes = Tier.DEVICE if unit.has_whole_gradient or states is Tier.DEVICE else Tier.HOST
            add_bytes(found, passes, "gradients", [unit.gradient])
            for category, passing in (("gradients", unit.optimizer_gradient), ("parameters", unit.rounded)):
                add_bytes(found, Tier.HOST, category, [] if passing is None else [passing])
            add_bytes(found, states, "optimizer", [*([unit.master] if unit.has_master else []), *state.values()])
        if self.offload.peak_host_bytes:
            found["host_swap"] = self.offload.peak_host_bytes
        found["gather_window"] = self.reducer.pool.peak_bytes + (self.gatherer.peak_bytes if self.gatherer else 0)
        return {**found, **self.kept_bytes}

    def close(self) -> None:
        """Remove all hooks and gradients; the modules keep their weights, whole. Every data rank must call it."""
        self.reducer.close()
        self.offload.put_back()
        if self.gatherer is not None:
            self.gatherer.close()
        self.offload.close()

    def leave(self, topology: Topology) -> None:
        """Remove all hooks and forget the process groups, without a word to other ranks; parted weights stay so.

        `topology`: of a rank with nobody to talk to.
        """
        self.reducer.close()
        self.topology = self.reducer.topology = topology
        if self.gatherer is not None:
            self.gatherer.leave(topology.dp)
        self.offload.close()
