"""What a rank stores of its stages: which flat units, cut how, whole when; and the hooks by which weights are gathered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from trilith import comm
from trilith.models.base import LocalParameter
from trilith.optim.groups import GroupOf
from trilith.precision import PrecisionPolicy
from trilith.topology import Group, Topology
from trilith.zero.flat import DeclaredModule, FlatUnit, Keeping, make_unit
from trilith.zero.gathers import Gatherer
from trilith.zero.offload import Disk
from trilith.zero.owners import Owners
from trilith.zero.partition import UnitLayout, split_small, unit_layouts
from trilith.zero.placement import Moved, Sized, Tier, place_units
from trilith.zero.residency import StageUses, Use, gather_limits


@dataclass(frozen=True)
class Storage:
    """How units are made; `zero` is the config section `zero_optimization`.

    `keeps_whole`: of a flat unit's name, whether its gradient is whole until the last microbatch at stages 2 and 3, too.
    `owners`: of whole tensors, where the optimizer needs them and there are several partitions.
    """

    zero: Any
    topology: Topology
    policy: PrecisionPolicy
    group_of: GroupOf
    keeps_whole: Callable[[str], bool]
    owners: Owners | None = None

    def plan_units(
        self, stage: int, module: DeclaredModule, parameters: Sequence[LocalParameter], *, is_frozen: bool = False
    ) -> list[PlannedUnit]:
        """The flat units of some of a stage's parameters; at ZeRO stage 3 small ones and others apart."""
        zero, dp = self.zero, self.topology.dp
        partitioned = zero.stage >= 1 and dp.size > 1
        shards = zero.stage == 3 and (partitioned or zero.offload_param.device != "none")
        small, large = tuple(parameters), tuple[LocalParameter, ...]()
        if shards:
            most = zero.stage3_model_persistence_threshold
            small, large = split_small(parameters, zero.stage3_param_persistence_threshold, most)
        cut = partitioned and (shards or not is_frozen)
        degree, rank = (dp.size, dp.index) if cut else (1, 0)
        passing = zero.stage >= 2 and (cut or zero.offload_optimizer.device != "none")
        planned = []
        for members, whole in ((small, True), (large, False)):
            owners = self.owners if cut and not is_frozen else None
            for layout in unit_layouts(members, degree, self.group_of, owners=owners):
                passes = passing and not self.keeps_whole(layout.name)
                planned.append(PlannedUnit(stage, module, layout, Keeping(rank, not passes, whole, is_frozen)))
        order = {parameter.flat_unit: i for i, parameter in reversed(list(enumerate(parameters)))}
        return sorted(planned, key=lambda unit: order[unit.layout.name])

    def make_units(self, planned: Sequence[PlannedUnit], disk: Disk, moved: Moved) -> list[FlatUnit]:
        """The units, each where the config puts it."""
        zero, made = self.zero, []
        placements = place_units(self._sizes(planned), zero)
        for number, (unit, placement) in enumerate(zip(planned, placements, strict=True)):
            pinned = self.topology.device.type == "cuda" and zero.offload_optimizer.pin_memory
            keeping = replace(unit.keeping, placement=placement, pinned=pinned)
            flat = make_unit(unit.stage, unit.layout, keeping, unit.module, self.topology.device, self.policy)
            flat.moved = moved
            self._swap_out(flat, f"{number}-{unit.layout.name}", disk)
            made.append(flat)
        return made

    def _sizes(self, planned: Sequence[PlannedUnit]) -> list[Sized]:
        """What is to be placed; an optimizer may deal out tensors unevenly, and tensor ranks hold parts of unequal size."""
        sizes = torch.tensor(
            [max(unit.layout.sizes) for unit in planned], dtype=torch.int64, device=self.topology.device
        )
        comm.all_reduce(sizes, self.topology.tp, op="max").wait()
        return [
            Sized(int(size), not unit.keeping.whole_weight, unit.keeping.frozen)
            for unit, size in zip(planned, sizes, strict=True)
        ]

    @staticmethod
    def _swap_out(unit: FlatUnit, key: str, disk: Disk) -> None:
        """Bring to disk what lives there."""
        if unit.placement.states is Tier.DISK:
            unit.states_swap = disk.swapped(key, "states")
            unit.states_swap.add(unit.master_role, unit.master)
        if unit.placement.weights is Tier.DISK:
            assert unit.shard is not None
            unit.shard_swap = disk.swapped(key, "weights")
            unit.shard_swap.add("weight", unit.shard)
        for swap in (unit.states_swap, unit.shard_swap):
            if swap is not None:
                swap.put()
                swap.settle()


@dataclass(frozen=True)
class PlannedUnit:
    """A unit that is to be made of a module's parameters."""

    stage: int
    module: DeclaredModule
    layout: UnitLayout
    keeping: Keeping


def make_gatherer(
    stages: Mapping[int, DeclaredModule], units: Mapping[int, Sequence[FlatUnit]], group: Group, zero: Any
) -> tuple[Gatherer | None, dict[int, StageUses] | None]:
    """What brings the weights of sharded units, None where there are none; and which of them each stage uses in one forward
    and backward, None where the order is not known. `units`: by stage."""
    members = [unit for index in stages for unit in units[index] if unit.is_sharded]
    if not members:
        return None, None
    gatherer = Gatherer(members, group, gather_limits(zero))
    found = {index: _attach(gatherer, module, units[index]) for index, module in stages.items()}
    known = {index: uses for index, uses in found.items() if uses is not None}
    return gatherer, known if len(known) == len(found) else None


def _attach(gatherer: Gatherer, module: DeclaredModule, units: Sequence[FlatUnit]) -> StageUses | None:
    """Hook the modules of a stage that sharded units belong to."""
    unit_of = {parameter: unit for unit in units if unit.is_sharded for parameter in unit.parameters}
    homes: dict[str, dict[int, FlatUnit]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter in unit_of:
            unit = unit_of[parameter]
            homes.setdefault(module.home_of(name), {})[id(unit)] = unit
    weightless = frozenset(module.weightless_backwards())
    uses = {
        path: Use(gatherer.attach(module.home(path), tuple(held.values()), path not in weightless))
        for path, held in homes.items()
    }
    order = module.homes()
    if order is None:
        return None
    backward = [path for path in reversed(order) if path in uses and path not in weightless]
    return StageUses(
        tuple(uses[path] for path in order if path in uses),
        tuple(replace(uses[path], backward=True) for path in backward),
    )
