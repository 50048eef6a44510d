"""What ZeRO will keep on a rank, gather and move, predicted from declarations before anything runs. No torch.

Bytes are those of the elements; padding of flat buffers, temporaries of ops and messages under way are not in it.
Rajbhandari et al. 2020 (ZeRO), section 3; 2021 (ZeRO-Infinity), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from trilith.config import Config
from trilith.models.activations import ActivationBytes
from trilith.models.base import LocalParameter, UnitDecl, local_parameter, stage_parameters
from trilith.pipeline.action import Kind, Schedule
from trilith.pipeline.memory import DTYPE_BYTES, RankMemory
from trilith.pipeline.partition import Cuts
from trilith.pipeline.passes import insert_gathers
from trilith.pipeline.search import human_bytes
from trilith.pipeline.simulate import peak_bytes
from trilith.zero.partition import split_small
from trilith.zero.placement import ON_DEVICE, Sized, Tier, place_units
from trilith.zero.residency import GatherPlan, StageUses, Use, gather_limits, gather_marks, plan_gathers, uses_of

WEIGHTLESS_BACKWARD = "embedding"  # the unit whose backward reads no weights
# Whole gradients that exist at one time where they are reduced after every microbatch: one filled, two on their way.
BUCKETS = 3


@dataclass(frozen=True)
class HeldUnit:
    """What a rank holds of one flat unit of a stage, in elements of its tensor rank that holds most: `small` are those
    that stay whole at stage 3."""

    stage: int
    name: str
    small: int
    large: int

    @property
    def numel(self) -> int:
        """All of it."""
        return self.small + self.large


def partition_degree(config: Config) -> int:
    """Ranks that share a partition; 1 where nothing is partitioned."""
    parallel = config.parallel
    return parallel.data // parallel.replicate * parallel.context if config.zero_optimization.stage else 1


def held_units(config: Config, units: Sequence[UnitDecl], schedule: Schedule, cuts: Cuts, rank: int) -> list[HeldUnit]:
    """The flat units of a pipeline rank, by stage."""
    found: list[HeldUnit] = []
    zero, tensor = config.zero_optimization, config.parallel.tensor
    for stage in schedule.stages_of(rank):
        lo, hi = cuts[stage]
        declared = stage_parameters(units[lo:hi])
        # Which are small follows from canonical sizes, so any tensor rank's will do.
        small, _ = split_small(
            [local_parameter(p, 0, tensor) for p in declared],
            zero.stage3_param_persistence_threshold,
            zero.stage3_model_persistence_threshold,
        )
        kept, sizes = {p.name for p in small}, dict[str, list[int]]()
        for p in declared:
            numel = max(_numel(local_parameter(p, index, tensor)) for index in range(tensor))
            sizes.setdefault(p.flat_unit, [0, 0])[p.name not in kept] += numel
        found += [HeldUnit(stage, name, *counts) for name, counts in sizes.items()]
    return found


def _numel(parameter: LocalParameter) -> int:
    return prod(parameter.shape)


# ---- the gather plan ----------------------------------------------------------------------------------------------


def with_gathers(
    config: Config, units: Sequence[UnitDecl], schedule: Schedule, cuts: Cuts
) -> tuple[Schedule, tuple[GatherPlan, ...]]:
    """The schedule (complete) with the gather plan of every pipeline rank, none where weights are always whole.

    In the schedule a GATHER stands before every computation that begins with weights to be fetched, and a RELEASE behind
    every one that lets some go. Units are numbered in the order of a rank's stages.
    """
    zero, plans = config.zero_optimization, list[GatherPlan]()
    if zero.stage < 3 or (partition_degree(config) == 1 and zero.offload_param.device == "none"):
        return schedule, ()
    marks: list[dict[int, tuple[bool, bool]]] = []
    for rank, actions in enumerate(schedule.actions):
        held = [unit for unit in held_units(config, units, schedule, cuts, rank) if unit.large]
        number = {(unit.stage, unit.name): i for i, unit in enumerate(held)}
        stages = {stage: _stage_uses(stage, units[slice(*cuts[stage])], number) for stage in schedule.stages_of(rank)}
        uses, spans = uses_of(actions, stages)
        plan = plan_gathers(uses, [unit.large for unit in held], gather_limits(zero))
        marks.append(gather_marks(plan, spans))
        plans.append(plan)
    return insert_gathers(schedule, marks), tuple(plans)


def _stage_uses(stage: int, units: Sequence[UnitDecl], number: dict[tuple[int, str], int]) -> StageUses:
    """Which sharded units each unit of a stage uses; a tied weight is used by both that share it."""
    found: list[tuple[str, Use]] = []
    for unit in units:
        names = {parameter.flat_unit for parameter in unit.parameters}
        numbers = tuple(sorted(number[stage, name] for name in names if (stage, name) in number))
        if numbers:
            found.append((unit.name, Use(numbers)))
    backward = [Use(use.units, True) for name, use in reversed(found) if name != WEIGHTLESS_BACKWARD]
    return StageUses(tuple(use for _, use in found), tuple(backward))


# ---- what is moved ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Elements of a step that a rank has in collectives over its data ranks; each crosses the wire (N - 1) / N times.

    `every_microbatch`, `once`: those of gradients, reduced after every microbatch or once a step. `weights`: gathered.
    """

    every_microbatch: int
    once: int
    weights: int


def traffic(schedule: Schedule, gathers: Sequence[GatherPlan], memories: Sequence[RankMemory]) -> list[Traffic]:
    """By pipeline rank: 2 x parameters at stages 0 and 1, (m + 1) x at stage 2 with m microbatches, 3 m x at stage 3
    where every use gathers anew."""
    found = []
    for rank, memory in enumerate(memories):
        weights = gathers[rank].gathered_numel if gathers else memory.parameters
        found.append(Traffic(schedule.num_microbatches * memory.parameters, memory.parameters, weights))
    return found


def describe(
    config: Config, schedule: Schedule, gathers: Sequence[GatherPlan], memories: Sequence[RankMemory]
) -> list[str]:
    """What `trilith check` says of ZeRO: what both reduce intervals cost, and the gather plan."""
    zero, share, lines = config.zero_optimization, partition_degree(config), []
    if share > 1 and zero.stage >= 2:
        accumulated, sent = DTYPE_BYTES[config.data_types.grad_accum_dtype], DTYPE_BYTES[config.communication_data_type]
        for rank, (memory, moved) in enumerate(zip(memories, traffic(schedule, gathers, memories), strict=True)):
            whole = (memory.parameters - -(-memory.parameters // share)) * accumulated
            lines.append(
                f"  pipeline rank {rank}: gradients reduced after each of {schedule.num_microbatches} microbatches "
                f"{human_bytes(moved.every_microbatch * sent)}, once a step {human_bytes(moved.once * sent)} and "
                f"{human_bytes(whole)} more to keep; weights gathered "
                f"{human_bytes(moved.weights * DTYPE_BYTES[config.data_types.param_dtype])}"
            )
    for rank, plan in enumerate(gathers):
        total = max(sum(plan.sizes), 1)
        actions = schedule.actions[rank]
        counts = {kind: sum(action.kind is kind for action in actions) for kind in (Kind.GATHER, Kind.RELEASE)}
        lines.append(
            f"  pipeline rank {rank}: gather plan: {plan.num_gathers} all-gathers for {len(plan.uses)} uses, "
            f"{plan.gathered_numel / total:.2f} x its {total:,} sharded elements a step (each use anew: "
            f"{sum(plan.sizes[unit] for use in plan.uses for unit in use.units) / total:.2f} x), at most "
            f"{plan.peak_numel:,} whole at one time; {counts[Kind.GATHER]} gather and {counts[Kind.RELEASE]} release "
            "actions in its schedule"
        )
    return [f"ZeRO-{zero.stage} over {share} ranks, reduce_interval {zero.reduce_interval}", *lines] if lines else []


# ---- memory -------------------------------------------------------------------------------------------------------


def rank_memories(
    config: Config,
    units: Sequence[UnitDecl],
    schedule: Schedule,
    cuts: Cuts,
    activations: Sequence[ActivationBytes],
    gathers: Sequence[GatherPlan] = (),
) -> tuple[RankMemory, ...]:
    """The memory of each pipeline rank; `activations[stage]` are those of one microbatch on a stage.

    Without the gather plans the cap is taken for what is gathered at one time.
    """
    peaks = peak_bytes(schedule, [a.after_forward for a in activations], [a.after_input_gradient for a in activations])
    found = []
    for rank, peak in enumerate(peaks):
        held = held_units(config, units, schedule, cuts, rank)
        gathered = gathers[rank].peak_numel if gathers else _gathered_at_once(config, held)
        found.append(_rank_memory(config, held, schedule, rank, (int(peak), gathered)))
    return tuple(found)


def whole_gradients(
    config: Config, units: Sequence[UnitDecl], schedule: Schedule, cuts: Cuts, memories: Sequence[RankMemory]
) -> frozenset[str]:
    """With `reduce_interval` auto: the flat units whose gradients may stay whole until the last microbatch, because
    `memory_limit_bytes` holds them besides all else; the largest first. All of them without a limit."""
    limit = config.pipeline.memory_limit_bytes
    accumulated, share = DTYPE_BYTES[config.data_types.grad_accum_dtype], partition_degree(config)
    found: set[str] = set()
    for rank, memory in enumerate(memories):
        room = None if limit is None else limit - memory.total_bytes
        held = held_units(config, units, schedule, cuts, rank)
        for unit in sorted(held, key=lambda unit: -unit.numel):
            kept = 0 if config.zero_optimization.offload_optimizer.device != "none" else -(-unit.numel // share)
            more = (unit.numel - kept) * accumulated
            if room is None or more <= room:
                found.add(unit.name)
                room = None if room is None else room - more
    return frozenset(found)


def _versions(schedule: Schedule, rank: int) -> int:
    """Versions of the weights: one for each microbatch on its way with pipedream, two where gradients are delayed."""
    if schedule.update_every == 0:
        return 1
    return schedule.num_ranks - rank if schedule.name == "pipedream" else 2


def _rank_memory(
    config: Config, held: Sequence[HeldUnit], schedule: Schedule, rank: int, peaks: tuple[int, int]
) -> RankMemory:
    """`peaks`: bytes of activations, and elements of gathered weights, at one time."""
    types, versions, delayed = config.data_types, _versions(schedule, rank), schedule.update_every > 0
    zero, share, count = config.zero_optimization, partition_degree(config), sum(unit.numel for unit in held)
    element, accumulated = DTYPE_BYTES[types.param_dtype], DTYPE_BYTES[types.grad_accum_dtype]
    master, states = max(4, element), num_states(config)
    shards = zero.stage == 3 and (share > 1 or zero.offload_param.device != "none")
    passes = (
        zero.stage >= 2 and zero.reduce_interval != "step" and (share > 1 or zero.offload_optimizer.device != "none")
    )
    found = {(name, tier): 0 for name in ("parameter", "gradient", "optimizer", "rollback") for tier in Tier}
    parts = [(part, whole) for unit in held for part, whole in _flat_parts(unit, shards)]
    sized = [Sized(-(-part // share), not whole) for part, whole in parts]
    for size, (part, _), place in zip(sized, parts, place_units(sized, zero), strict=True):
        has_master = delayed or element != master or place != ON_DEVICE
        found["parameter", place.weights] += (size.numel if size.is_sharded else part) * element
        found["optimizer", place.states] += size.numel * (states + has_master) * master
        found["rollback", place.states] += size.numel * _rollback_bytes_per_element(config, states, master)
        on_host = place.states is not Tier.DEVICE
        found["gradient", Tier.HOST] += size.numel * accumulated if on_host else 0
        if not passes:
            found["gradient", Tier.DEVICE] += part * accumulated
        elif not on_host:
            found["gradient", Tier.DEVICE] += size.numel * accumulated
    window = peaks[1] * element if shards else 0
    if passes:
        # Without overlap a microbatch's gradients are all there before the first is sent.
        most = BUCKETS if zero.overlap_comm else len(held)
        largest = sorted((unit.numel for unit in held), reverse=True)[:most]
        if len(largest) < BUCKETS and schedule.num_microbatches > 1:
            largest += largest[:1]  # one unit's, of two microbatches
        window += sum(largest) * accumulated
    return RankMemory(
        parameters=count,
        versions=versions,
        parameter_bytes=versions * found["parameter", Tier.DEVICE],
        gradient_bytes=(2 if delayed and schedule.name != "pipedream" else 1) * found["gradient", Tier.DEVICE],
        optimizer_bytes=found["optimizer", Tier.DEVICE],
        rollback_bytes=found["rollback", Tier.DEVICE],
        activation_bytes=peaks[0],
        window_bytes=window,
        host_bytes=sum(count for (_, tier), count in found.items() if tier is Tier.HOST),
        disk_bytes=sum(count for (_, tier), count in found.items() if tier is Tier.DISK),
    )


def _flat_parts(unit: HeldUnit, shards: bool) -> list[tuple[int, bool]]:
    """(elements, whether they stay whole) of the flat buffers that a unit becomes."""
    if not shards:
        return [(unit.numel, True)]
    return [(numel, whole) for numel, whole in ((unit.small, True), (unit.large, False)) if numel]


def num_states(config: Config) -> int:
    """Tensors of the size of the weights that the optimizer keeps, besides master weights."""
    return {"SGD": int(getattr(config.optimizer.params, "momentum", 0.0) > 0), "Lion": 1, "Adagrad": 1}.get(
        config.optimizer.type, 2
    )


def _gathered_at_once(config: Config, held: Sequence[HeldUnit]) -> int:
    """At most so many elements are whole at one time: what the cap allows, or the two largest units, where both are used
    at once (a tied weight)."""
    sizes = sorted((unit.large for unit in held), reverse=True)
    return min(sum(sizes), max(config.zero_optimization.stage3_max_live_parameters, sum(sizes[:1])))


def _rollback_bytes_per_element(config: Config, states: int, master: int) -> int:
    """Weights and moments, and the gradients that unscaling changes in place; nothing where no step can be wrong."""
    types, fp16 = config.data_types, config.data_types.param_dtype == "fp16"
    skips = fp16 or (types.param_dtype == "bf16" and config.bf16.check_grad_overflow)
    if config.pipeline.optimizer_sync != "postvalidate" or not (config.gradient_clipping > 0.0 or skips):
        return 0
    unscaled = fp16 and config.gradient_clipping > 0.0 and DTYPE_BYTES[types.grad_accum_dtype] == master
    return (states + 1 + unscaled) * master
