"""Everything that can be known, and refused, before a process starts: a config becomes a plan, or all that is wrong.

No torch, no process group, no device: a plan for a thousand ranks takes as long as one for eight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trilith import host_memory
from trilith.config import Config, Resolved, load_config, resolve
from trilith.config.base import AUTO
from trilith.data.batch import check_data, open_batches
from trilith.errors import ConfigError, DataError, OffloadError, Violation
from trilith.models.activations import ActivationBytes, boundary_bytes, stage_activations
from trilith.models.base import UnitDecl, num_parameters, stage_parameters, train_flops_per_token
from trilith.models.families import attention_density, declare, describe_attention, rules
from trilith.pipeline.action import Schedule
from trilith.pipeline.memory import RankMemory, activation_setting
from trilith.pipeline.of_config import asked_problems, asked_schedule, completed, tied_ranks
from trilith.pipeline.partition import Cuts, partition, partition_problems
from trilith.pipeline.search import (
    LIMIT_KEY,
    Measured,
    PartitionMode,
    Question,
    Ranked,
    Ranking,
    by_flops,
    candidates,
    human_bytes,
    search,
)
from trilith.pipeline.simulate import Simulation, simulate
from trilith.topology import Degrees, PlannedGroup, group_plan
from trilith.zero import budget as zero
from trilith.zero.budget import rank_memories, whole_gradients, with_gathers
from trilith.zero.disk_file import disk_budget
from trilith.zero.partition import tied_flat_units
from trilith.zero.residency import GatherPlan

GROUPS_SHOWN = 12


@dataclass(frozen=True)
class Plan:
    """A run that can start: the resolved config and everything that follows from it. The same on every rank.

    `cuts[s]` is stage s's range of `units`; `schedule`, complete and checked, says on which pipeline rank it lies. `ties`:
    flat unit -> pipeline ranks that hold a copy of it, where these are several. `ranking`: the candidates, where schedule
    or partition were to be found. `gathers`: by pipeline rank, how ZeRO-3 brings its weights; none at other stages.
    `measured`: the costs that they were judged by; None: FLOPs, and a run measures first.
    """

    resolved: Resolved
    degrees: Degrees
    units: tuple[UnitDecl, ...]
    cuts: Cuts
    schedule: Schedule
    ties: Mapping[str, tuple[int, ...]]
    gathers: tuple[GatherPlan, ...] = ()
    ranking: Ranking | None = None
    measured: Measured | None = None

    @property
    def config(self) -> Config:
        """The resolved config."""
        return self.resolved.config

    @property
    def stages(self) -> tuple[tuple[UnitDecl, ...], ...]:
        """The units of each stage."""
        return tuple(self.units[lo:hi] for lo, hi in self.cuts)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.degrees.world_size

    @property
    def is_delayed(self) -> bool:
        """Whether the schedule is asynchronous: updates use gradients of older weights."""
        return self.schedule.update_every > 0

    @property
    def is_provisional(self) -> bool:
        """Whether schedule or partition were chosen by FLOPs, and are to be chosen again by measured costs."""
        return self.ranking is not None and self.measured is None

    @cached_property
    def splits_backward(self) -> bool:
        """Whether weight gradients are computed apart from input gradients."""
        return self.schedule.splits_backward

    @property
    def eval_microbatches(self) -> int:
        """Microbatches of one evaluation batch on one data rank."""
        config = self.config
        return config.training.eval_batch_size // (config.train_micro_batch_size_per_gpu * config.parallel.data)

    @cached_property
    def simulation(self) -> Simulation:
        """The schedule on paper, with measured costs or, without them, in FLOPs per token (see `search.by_flops`)."""
        measured = self.measured or _flops(self.config, self.units)
        costs = measured.costs(self.cuts)
        some = max(costs.forward_s) * 1e-6  # a stage of an embedding alone has no FLOPs, but takes its turn
        return simulate(self.schedule, replace(costs, forward_s=tuple(max(cost, some) for cost in costs.forward_s)))

    @cached_property
    def memory(self) -> tuple[RankMemory, ...]:
        """What each pipeline rank needs, by prediction; activations are measured ones where there are any."""
        kept = _activations(self.config, self.units, self.cuts, self.measured)
        return rank_memories(self.config, self.units, self.schedule, self.cuts, kept, self.gathers)

    @cached_property
    def whole_gradients(self) -> frozenset[str]:
        """The flat units whose gradients stay whole over the microbatches of a step, at stages 2 and 3."""
        interval = self.config.zero_optimization.reduce_interval
        if interval == "auto":
            return whole_gradients(self.config, self.units, self.schedule, self.cuts, self.memory)
        names = {p.flat_unit for unit in self.units for p in unit.parameters}
        return frozenset(names if interval == "step" else ())

    @cached_property
    def groups(self) -> tuple[PlannedGroup, ...]:
        """The process groups that will be made, beside the control group over the world."""
        return group_plan(self.degrees, ties=self.ties, channels=self.schedule.channels())


def plan(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    world_size: int | None = None,
    local_ranks: int | None = None,
    measured: Measured | None = None,
) -> Plan:
    """Load, resolve and check a config against `world_size` ranks (None: the product of its degrees).

    `local_ranks` of them share this machine (None: all), which `run.threads` goes by. `measured`: the costs of the model's
    units, by which schedule and partition are chosen where they are "auto"; the config of the plan then names what was
    chosen. Without them FLOPs must do, and the plan is provisional.

    Raises ConfigError with every violation of every room at once.
    """
    resolved = resolve(load_config(source, overrides), world_size, local_ranks=local_ranks, checks=(layout_problems,))
    try:
        found = _plan(resolved, measured)
        _require_compilable(found)
        _require_memory(found)
        _require_machine(found, local_ranks or found.world_size)
    except ConfigError as error:
        provenance = resolved.config.provenance
        raise ConfigError(provenance.locate(error.violations), provenance.source) from None
    return found


def _require_compilable(plan: Plan) -> None:
    """torch.compile computes weight gradients where it likes: nothing of them can be put off."""
    if plan.config.compile.enabled and plan.splits_backward:
        rule = f"cannot be with pipeline.schedule {plan.schedule.name!r}, which splits the backward"
        fix = "Use a schedule with whole backwards (1f1b, interleaved_1f1b, gpipe), or leave compile off."
        raise ConfigError([Violation("compile.enabled", True, rule, fix)])


def _plan(resolved: Resolved, measured: Measured | None) -> Plan:
    config = resolved.config
    units = declare(config.model, attention_density(config))
    ranking = None
    if config.pipeline.schedule == AUTO or config.pipeline.partition == AUTO:
        ranking = _search(config, units, measured)
        cuts, schedule = ranking.best.cuts, ranking.best.schedule
        resolved = _noted(resolved, ranking) if measured is None else _decided(resolved, ranking.best)
    else:
        schedule = asked_schedule(config)
        cuts = partition(units, schedule.num_stages, config.pipeline.partition)
    tied_stages = _tied_stages(units, cuts)
    schedule = completed(replace(schedule, ties=tuple(tied_stages.values())), config)
    schedule, gathers = with_gathers(config, units, schedule, cuts)
    parallel = config.parallel
    degrees = Degrees(
        pipeline=parallel.pipeline,
        replicate=parallel.replicate,
        shard=parallel.data // parallel.replicate,
        context=parallel.context,
        tensor=parallel.tensor,
    )
    ties = tied_ranks(tied_stages, schedule)
    return Plan(resolved, degrees, units, cuts, schedule, ties, gathers, ranking, measured)


def layout_problems(config: Config) -> list[Violation]:
    """Every rule of models, schedules, stages and data that a resolved config breaks."""
    found = rules(config)
    if config.pipeline.schedule != AUTO:
        problems, num_stages = asked_problems(config)
        found += problems
        if num_stages is not None:
            found += partition_problems(config.model.num_layers, num_stages, config.pipeline.partition)
    return [*found, *_data_problems(config)]


# ---- schedule and stages ------------------------------------------------------------------------------------------


def _search(config: Config, units: tuple[UnitDecl, ...], measured: Measured | None) -> Ranking:
    """Judge every schedule and partition that the config leaves open."""
    pipeline = config.pipeline
    partitions: tuple[PartitionMode, ...] = (pipeline.partition,)
    if pipeline.schedule != AUTO:
        schedules: tuple[Schedule, ...] = (asked_schedule(config),)
    else:
        virtual_stages = None if pipeline.virtual_stages == AUTO else pipeline.virtual_stages
        num_ranks, microbatches = config.parallel.pipeline, config.gradient_accumulation_steps
        schedules = candidates(num_ranks, microbatches, config.model.num_layers, virtual_stages)
        if pipeline.partition == AUTO:
            partitions = ("auto", "uniform")

    def memory(schedule: Schedule, cuts: Cuts) -> tuple[RankMemory, ...]:
        return rank_memories(config, units, schedule, cuts, _activations(config, units, cuts, measured))

    question = Question(
        units=units,
        measured=measured or _flops(config, units),
        schedules=schedules,
        partitions=partitions,
        memory=memory,
        memory_limit_bytes=pipeline.memory_limit_bytes,
        overlaps_steps=pipeline.optimizer_sync == "postvalidate",
    )
    return search(question, is_measured=measured is not None)


def _tied_stages(units: Sequence[UnitDecl], cuts: Cuts) -> dict[str, tuple[int, ...]]:
    """Flat unit -> the stages that hold a copy of it, for those that several do."""
    found = {}
    for name in sorted(tied_flat_units(units)):
        stages = [
            stage
            for stage, (lo, hi) in enumerate(cuts)
            if any(parameter.flat_unit == name for parameter in stage_parameters(units[lo:hi]))
        ]
        if len(stages) > 1:
            found[name] = tuple(stages)
    return found


def _noted(resolved: Resolved, ranking: Ranking) -> Resolved:
    """Say that what was chosen may change."""
    best = ranking.best
    note = (
        f"pipeline: {best.schedule.name} with {list(best.num_layers)} layers in its stages is provisional, by FLOPs: a run "
        "measures the model's units and chooses again"
    )
    return replace(resolved, notes=(*resolved.notes, note))


def _decided(resolved: Resolved, best: Ranked) -> Resolved:
    """The config with what was chosen by measured costs in the place of "auto"."""
    pipeline = resolved.config.pipeline
    chosen: dict[str, Any] = {"partition": best.num_layers} if pipeline.partition == AUTO else {}
    if pipeline.schedule == AUTO:
        chosen |= {"schedule": best.schedule.name, "virtual_stages": int(best.virtual_stages)}
    origins = {f"pipeline.{key}": "derived: by simulation with measured costs" for key in chosen}
    config = resolved.config.model_copy(update={"pipeline": pipeline.model_copy(update=chosen)})
    return replace(resolved, config=config, origins=MappingProxyType({**resolved.origins, **origins}))


# ---- costs --------------------------------------------------------------------------------------------------------


def _activations(
    config: Config, units: Sequence[UnitDecl], cuts: Cuts, measured: Measured | None
) -> tuple[ActivationBytes, ...]:
    """What each stage keeps of a microbatch."""
    if measured is not None:
        return measured.activations(cuts)
    setting = activation_setting(config)
    return tuple(stage_activations(config.model, [unit.name for unit in units[lo:hi]], setting) for lo, hi in cuts)


def _flops(config: Config, units: Sequence[UnitDecl]) -> Measured:
    """The costs of units where nothing was measured."""
    setting = activation_setting(config)
    kept = [stage_activations(config.model, [unit.name], setting) for unit in units]
    return by_flops(units, kept, config.activation_checkpointing.recompute)


def _require_memory(plan: Plan) -> None:
    """Refuse a plan that is predicted to need more than the config allows."""
    limit = plan.config.pipeline.memory_limit_bytes
    rank, most = max(enumerate(plan.memory), key=lambda item: item[1].total_bytes)
    if limit is None or most.total_bytes <= limit:
        return
    rule = (
        f"pipeline rank {rank} is predicted to need {most.total_bytes} bytes: {most.state_bytes} of state and "
        f"{most.activation_bytes} of activations"
    )
    fix = 'Raise it, set pipeline.schedule to "auto", or use more ranks, smaller microbatches or recompute.'
    raise ConfigError([Violation(LIMIT_KEY, limit, rule, fix)])


def _require_machine(plan: Plan, local_ranks: int) -> None:
    """Refuse to offload more than this machine's memory and disk hold for `local_ranks` ranks."""
    zero = plan.config.zero_optimization
    on_host = plan.config.run.device == "cpu"
    needed = [m.host_bytes + (m.total_bytes if on_host else 0) for m in plan.memory]
    share, found = local_ranks / len(plan.memory), list[Violation]()
    path, section = "zero_optimization.offload_optimizer", zero.offload_optimizer
    if section.device == "none":
        path, section = "zero_optimization.offload_param", zero.offload_param  # type: ignore[assignment]
    total = host_memory.total_bytes()
    if section.device != "none" and sum(needed) * share > total:
        rule = (
            f"puts {human_bytes(int(sum(needed) * share))} of {local_ranks} ranks into the memory of this machine, "
            f"which has {human_bytes(total)}"
        )
        fix = 'Use device "nvme", more machines, or a higher data degree.'
        found.append(Violation(f"{path}.device", section.device, rule, fix))
    for name, offload in (("offload_optimizer", zero.offload_optimizer), ("offload_param", zero.offload_param)):
        if offload.device != "nvme" or offload.nvme_path is None:
            continue
        key = f"zero_optimization.{name}.nvme_path"
        try:
            free = disk_budget(offload.nvme_path)
        except OffloadError as error:
            found.append(Violation(key, offload.nvme_path, str(error), "Name a directory that exists."))
            continue
        wanted = sum(m.disk_bytes for m in plan.memory) * share
        if wanted > free:
            rule = f"has {human_bytes(free)} free, but {local_ranks} ranks put {human_bytes(int(wanted))} there"
            found.append(Violation(key, offload.nvme_path, rule, "Free some, or name another disk."))
    if found:
        raise ConfigError(found)


def _data_problems(config: Config) -> list[Violation]:
    """What the data section breaks; for data sets on disk also that each split that is read has a sample."""
    model = config.model
    found = check_data(config.data, model.sequence_length, model.vocab_size)
    if found or not config.data.paths:
        return found
    for split in ("train", "valid") if config.training.eval_interval else ("train",):
        try:
            open_batches(config.data, model.sequence_length, model.vocab_size, split)
        except DataError as error:
            found.append(Violation("data.split", list(config.data.split), f"split {split!r}: {error}"))
    return found


# ---- what a reader sees -------------------------------------------------------------------------------------------


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as one JSON object (`trilith check --json`)."""
    simulation = plan.simulation
    return {
        **plan.resolved.to_json(),
        "parameters": num_parameters(plan.units),
        "attention_density": attention_density(plan.config),
        "train_flops_per_token": {
            "causal": train_flops_per_token(plan.units, causal=True),
            "noncausal": train_flops_per_token(plan.units, causal=False),
        },
        "stages": [
            {
                "stage": index,
                "pipeline_rank": plan.schedule.placement[index],
                "units": [u.name for u in plan.units[lo:hi]],
            }
            for index, (lo, hi) in enumerate(plan.cuts)
        ],
        "ranks": [
            {
                "pipeline_rank": rank,
                **vars(memory),
                "state_bytes": memory.state_bytes,
                "total_bytes": memory.total_bytes,
            }
            for rank, memory in enumerate(plan.memory)
        ],
        "schedule": {
            "name": plan.schedule.name,
            "num_stages": plan.schedule.num_stages,
            "num_microbatches": plan.schedule.num_microbatches,
            "splits_backward": plan.splits_backward,
            "asynchronous": plan.is_delayed,
            "provisional": plan.is_provisional,
        },
        "ranking": [_ranked_json(row) for row in plan.ranking.rows] if plan.ranking else [],
        "gathers": [
            {
                "num_gathers": gathers.num_gathers,
                "gathered_numel": gathers.gathered_numel,
                "sharded_numel": sum(gathers.sizes),
                "peak_numel": gathers.peak_numel,
            }
            for gathers in plan.gathers
        ],
        "groups": [{"name": group.name, "ranks": list(group.ranks)} for group in plan.groups],
        "bubble": simulation.bubble,
        "bubble_makespan": simulation.bubble_makespan,
        "peak_microbatches": list(simulation.peak_microbatches),
    }


def _ranked_json(row: Ranked) -> dict[str, Any]:
    found = {key: value for key, value in vars(row).items() if key not in ("schedule", "cuts")}
    return {"schedule": row.schedule.name, "virtual_stages": row.virtual_stages, **found}


def describe(plan: Plan) -> str:
    """The plan as text (`trilith check`)."""
    config, parallel = plan.config, plan.config.parallel
    origins = plan.resolved.origins
    lines = [
        f"world        {plan.world_size} ranks = data {parallel.data} x pipeline {parallel.pipeline} x "
        f"tensor {parallel.tensor}" + (", sequence parallel" if parallel.sequence_parallel else ""),
        f"batch        {config.train_batch_size} samples = microbatch {config.train_micro_batch_size_per_gpu} x "
        f"{config.gradient_accumulation_steps} microbatches x data {parallel.data}",
        f"model        {config.model.family}, {num_parameters(plan.units):,} parameters, "
        f"{train_flops_per_token(plan.units, True):.4g} FLOP per token (causal; "
        f"{train_flops_per_token(plan.units, False):.4g} non-causal)",
        *describe_attention(config, "attention" in activation_setting(config).fused),
        *_schedule_lines(plan),
        "stages",
    ]
    for index, (lo, hi) in enumerate(plan.cuts):
        names = f"{plan.units[lo].name} .. {plan.units[hi - 1].name}" if hi - lo > 1 else plan.units[lo].name
        lines.append(f"  stage {index} on pipeline rank {plan.schedule.placement[index]}: {names}")
    lines += zero.describe(plan.config, plan.schedule, plan.gathers, plan.memory)
    lines += _memory_lines(plan)
    if plan.ranking is not None:
        lines.append(plan.ranking.table())
    lines.append(f"process groups ({len(plan.groups)} beside the control group)")
    lines += [f"  {group.name} {list(group.ranks)}" for group in plan.groups[:GROUPS_SHOWN]]
    if len(plan.groups) > GROUPS_SHOWN:
        lines.append(f"  ... {len(plan.groups) - GROUPS_SHOWN} more (--json lists all)")
    lines.append("derived values")
    lines += [
        f"  {path} = {_value(config, path)!r} ({how})" for path, how in origins.items() if how.startswith("derived")
    ]
    lines += [f"note: {note}" for note in plan.resolved.notes]
    return "\n".join(lines)


def _schedule_lines(plan: Plan) -> list[str]:
    """Which schedule, its bubbles, and the stages on their ranks."""
    config, simulation, schedule = plan.config, plan.simulation, plan.schedule
    kinds = [
        f"{schedule.num_stages} stages",
        f"ZeRO-{config.zero_optimization.stage}",
        *(["split backward"] if plan.splits_backward else []),
        *(["asynchronous"] if plan.is_delayed else []),
        *(["post-validated optimizer step"] if config.pipeline.optimizer_sync == "postvalidate" else []),
    ]
    return [
        f"schedule     {schedule.name}, {', '.join(kinds)}; "
        f"predicted bubble {simulation.bubble:.1%} of the span, {simulation.bubble_makespan:.1%} of the makespan; "
        f"{human_bytes(boundary_bytes(config.model, activation_setting(config)))} a message between stages",
    ]


def _memory_lines(plan: Plan) -> list[str]:
    lines = ["predicted bytes per rank"]
    for rank, (memory, live) in enumerate(zip(plan.memory, plan.simulation.peak_microbatches, strict=True)):
        versions = f" in {memory.versions} versions" if memory.versions > 1 else ""
        rollback = f", rollback copy {human_bytes(memory.rollback_bytes)}" if memory.rollback_bytes else ""
        lines.append(
            f"  pipeline rank {rank}: {memory.parameters:,} parameters{versions} {human_bytes(memory.parameter_bytes)}, "
            f"gradients {human_bytes(memory.gradient_bytes)}, optimizer {human_bytes(memory.optimizer_bytes)}{rollback}, "
            f"activations {human_bytes(memory.activation_bytes)} of {live:g} microbatches, "
            + (f"gather window {human_bytes(memory.window_bytes)}, " if memory.window_bytes else "")
            + f"total {human_bytes(memory.total_bytes)}"
            + (f"; in host memory {human_bytes(memory.host_bytes)}" if memory.host_bytes else "")
            + (f"; on disk {human_bytes(memory.disk_bytes)}" if memory.disk_bytes else "")
        )
    return lines


def _value(config: Config, path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part, None) if not isinstance(value, Mapping) else value.get(part)
    return value
