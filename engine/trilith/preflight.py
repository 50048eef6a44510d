"""Everything that can be known, and refused, before a process starts: a config becomes a plan, or all that is wrong.

No torch, no process group, no device: a plan for a thousand ranks takes as long as one for eight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trilith.config import Config, Resolved, load_config, resolve
from trilith.data.batch import check_data, open_batches
from trilith.errors import DataError, Violation
from trilith.models.base import (
    UnitDecl,
    local_parameter,
    num_parameters,
    stage_parameters,
    train_flops_per_token,
)
from trilith.models.families import declare, rules
from trilith.pipeline.action import Schedule
from trilith.pipeline.partition import partition, partition_problems
from trilith.pipeline.passes import check, complete
from trilith.pipeline.schedules import make_schedule, schedule_problems
from trilith.pipeline.simulate import Costs, Simulation, simulate
from trilith.topology import Degrees, PlannedGroup, group_plan

DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2})
GROUPS_SHOWN = 12


@dataclass(frozen=True)
class Plan:
    """A run that can start: the resolved config and everything that follows from it. The same on every rank.

    `cuts[s]` is stage s's range of `units`; stage s lies on pipeline rank s modulo the pipeline degree. `ties`: a tied
    tensor lives on two pipeline ranks.
    """

    resolved: Resolved
    degrees: Degrees
    units: tuple[UnitDecl, ...]
    cuts: tuple[tuple[int, int], ...]
    schedule: Schedule
    ties: bool

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
    def eval_microbatches(self) -> int:
        """Microbatches of one evaluation batch on one data rank."""
        config = self.config
        return config.training.eval_batch_size // (config.train_micro_batch_size_per_gpu * config.parallel.data)

    @cached_property
    def simulation(self) -> Simulation:
        """The schedule with each stage's cost in forward FLOPs per token; backward costs twice a forward."""
        forward = tuple(
            max(sum(u.matmul_flops + 0.5 * u.attention_flops for u in self.units[lo:hi]), 1.0) for lo, hi in self.cuts
        )
        return simulate(self.schedule, Costs(forward, forward, forward))

    @cached_property
    def groups(self) -> tuple[PlannedGroup, ...]:
        """The process groups that will be made, beside the control group over the world."""
        return group_plan(self.degrees, ties=self.ties, channels=self.schedule.channels())


def plan(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    world_size: int | None = None,
    local_ranks: int | None = None,
) -> Plan:
    """Load, resolve and check a config against `world_size` ranks (None: the product of its degrees).

    `local_ranks` of them share this machine (None: all), which `run.threads` goes by.

    Raises ConfigError with every violation of every room at once.
    """
    resolved = resolve(load_config(source, overrides), world_size, local_ranks=local_ranks, checks=(layout_problems,))
    config = resolved.config
    parallel, stages = config.parallel, config.parallel.pipeline * config.pipeline.virtual_stages
    units = declare(config.model)
    cuts = partition(units, stages, config.pipeline.partition)
    ties = config.model.tie_embeddings and parallel.pipeline > 1
    schedule = complete(make_schedule(*_schedule_arguments(config)), ties=ties)
    check(schedule)
    degrees = Degrees(
        pipeline=parallel.pipeline,
        replicate=parallel.replicate,
        shard=parallel.data // parallel.replicate,
        context=parallel.context,
        tensor=parallel.tensor,
    )
    return Plan(resolved, degrees, units, cuts, schedule, ties)


def layout_problems(config: Config) -> list[Violation]:
    """Every rule of models, schedules, stages and data that a resolved config breaks."""
    stages = config.parallel.pipeline * config.pipeline.virtual_stages
    return [
        *rules(config),
        *schedule_problems(*_schedule_arguments(config)),
        *partition_problems(config.model.num_layers, stages, config.pipeline.partition),
        *_data_problems(config),
    ]


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


def _schedule_arguments(config: Config) -> tuple[str, int, int, int]:
    microbatches = config.gradient_accumulation_steps
    return config.pipeline.schedule, config.parallel.pipeline, config.pipeline.virtual_stages, microbatches


@dataclass(frozen=True)
class RankMemory:
    """State bytes of one rank of a pipeline rank's tensor and data group (the largest of its tensor ranks)."""

    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        """Parameters, gradients and optimizer states; no activations."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes


def rank_memory(plan: Plan, pipeline_rank: int) -> RankMemory:
    """What each rank of `pipeline_rank` keeps all the time, from the declarations; padding of flat buffers left out."""
    config, tensor = plan.config, plan.config.parallel.tensor
    numel = 0
    for stage in plan.schedule.stages_of(pipeline_rank):
        lo, hi = plan.cuts[stage]
        for declared in stage_parameters(plan.units[lo:hi]):
            numel += max(local_parameter(declared, rank, tensor).numel for rank in range(tensor))
    param, accum = config.data_types.param_dtype, config.data_types.grad_accum_dtype
    master = 8 if param == "fp64" else 4
    states = {"SGD": int(getattr(config.optimizer.params, "momentum", 0.0) > 0)}.get(config.optimizer.type, 2)
    copies = states + (DTYPE_BYTES[param] != master)
    share = plan.config.parallel.data * plan.config.parallel.context if config.zero_optimization.stage else 1
    return RankMemory(
        numel, numel * DTYPE_BYTES[param], numel * DTYPE_BYTES[accum], -(-numel // share) * copies * master
    )


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as one JSON object (`trilith check --json`)."""
    simulation = plan.simulation
    return {
        **plan.resolved.to_json(),
        "parameters": num_parameters(plan.units),
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
            {"pipeline_rank": rank, **vars(memory), "total_bytes": memory.total_bytes}
            for rank, memory in enumerate(rank_memory(plan, r) for r in range(plan.config.parallel.pipeline))
        ],
        "groups": [{"name": group.name, "ranks": list(group.ranks)} for group in plan.groups],
        "bubble": simulation.bubble,
        "bubble_makespan": simulation.bubble_makespan,
        "peak_microbatches": list(simulation.peak_microbatches),
    }


def describe(plan: Plan) -> str:
    """The plan as text (`trilith check`)."""
    config, parallel = plan.config, plan.config.parallel
    origins = plan.resolved.origins
    simulation = plan.simulation
    lines = [
        f"world        {plan.world_size} ranks = data {parallel.data} x pipeline {parallel.pipeline} x "
        f"tensor {parallel.tensor}" + (", sequence parallel" if parallel.sequence_parallel else ""),
        f"batch        {config.train_batch_size} samples = microbatch {config.train_micro_batch_size_per_gpu} x "
        f"{config.gradient_accumulation_steps} microbatches x data {parallel.data}",
        f"model        {config.model.family}, {num_parameters(plan.units):,} parameters, "
        f"{train_flops_per_token(plan.units, True):.4g} FLOP per token (causal; "
        f"{train_flops_per_token(plan.units, False):.4g} non-causal)",
        f"schedule     {config.pipeline.schedule}, {len(plan.cuts)} stages, ZeRO-{config.zero_optimization.stage}; "
        f"predicted bubble {simulation.bubble:.1%} of the span, {simulation.bubble_makespan:.1%} of the makespan",
        "stages",
    ]
    for index, (lo, hi) in enumerate(plan.cuts):
        names = f"{plan.units[lo].name} .. {plan.units[hi - 1].name}" if hi - lo > 1 else plan.units[lo].name
        lines.append(f"  stage {index} on pipeline rank {plan.schedule.placement[index]}: {names}")
    lines.append("state bytes per rank (no activations)")
    for rank in range(parallel.pipeline):
        memory = rank_memory(plan, rank)
        lines.append(
            f"  pipeline rank {rank}: {memory.parameters:,} parameters {_mib(memory.parameter_bytes)}, "
            f"gradients {_mib(memory.gradient_bytes)}, optimizer {_mib(memory.optimizer_bytes)}, "
            f"total {_mib(memory.total_bytes)}; peak {simulation.peak_microbatches[rank]:g} microbatches"
        )
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


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _value(config: Config, path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part, None) if not isinstance(value, Mapping) else value.get(part)
    return value
