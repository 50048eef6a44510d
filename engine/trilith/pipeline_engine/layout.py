"""Which layers of a user's model lie on which stage, and in what order stages work. Every rank finds the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from types import MappingProxyType

from trilith.config import Config
from trilith.config.base import AUTO
from trilith.errors import ConfigError, TrilithError, Violation
from trilith.models.layer_stage import Holders, holders_of, unit_of
from trilith.models.pipeline_model import DeclaredLayer, PipelineModel
from trilith.pipeline.action import Schedule
from trilith.pipeline.of_config import asked_problems, asked_schedule, completed, tied_ranks
from trilith.pipeline.partition import Cuts, layers_per_stage, partition_units
from trilith.topology import Ties

PARTITION, TYPE = "PipelineModel partition", "type:"


@dataclass(frozen=True)
class Layout:
    """`cuts[s]`: the layers of stage s. `schedule`: complete and checked. `ties`: flat unit -> pipeline ranks."""

    declared: tuple[DeclaredLayer, ...]
    cuts: Cuts
    schedule: Schedule
    holders: Holders
    ties: Ties

    @property
    def unit_names(self) -> tuple[str, ...]:
        """Every flat unit of the model, in an order that no layout changes."""
        return (*(unit_of(layer.index) for layer in self.declared), *sorted(self.holders))

    @property
    def tied_units(self) -> frozenset[str]:
        """The flat units that several stages hold."""
        return frozenset(name for name, stages in self.holders.items() if len(stages) > 1)


def lay_out(model: PipelineModel, config: Config) -> Layout:
    """Cut the model into stages and complete the schedule that the config names.

    Raises ConfigError or TrilithError for what the config or the model asks for and cannot be had.
    """
    _require(config, _own_problems(config))
    _require(config, asked_problems(config)[0])
    schedule = asked_schedule(config)
    declared = model.declared
    mode = config.pipeline.partition if model.partition is None else model.partition
    cuts = cut_layers(declared, schedule.num_stages, mode)
    holders = holders_of(declared, cuts)
    trained = {p.canonical for layer in declared for p in layer.parameters if p.trains}
    frozen = [
        stage
        for stage, (lo, hi) in enumerate(cuts)
        if not any(p.trains for layer in declared[lo:hi] for p in layer.parameters)
    ]
    if len(frozen) == len(cuts):
        raise TrilithError("no parameter of the model requires a gradient: there is nothing to train")
    tied = tuple(dict.fromkeys(stages for name, stages in holders.items() if len(stages) > 1 and name in trained))
    schedule = replace(schedule, ties=tied, frozen=frozenset(frozen))
    schedule = completed(schedule, config)
    ties = tied_ranks(holders, schedule)
    if config.pipeline.schedule == "pipedream" and schedule.shared_ties:
        raise TrilithError(
            f"PipelineModel: {', '.join(sorted(ties))}: tied over pipeline ranks, but pipeline.schedule pipedream updates "
            "each stage alone. Untie them, or use another schedule"
        )
    return Layout(declared, cuts, schedule, MappingProxyType(holders), ties)


def _require(config: Config, problems: list[Violation]) -> None:
    """Refuse a config that breaks rules."""
    if problems:
        raise ConfigError(config.provenance.locate(problems), config.provenance.source)


def _own_problems(config: Config) -> list[Violation]:
    """What only a model that the config describes can have."""
    found = []
    if config.parallel.tensor > 1:
        rule = "the layers of a PipelineModel are taken as they are, so they cannot be split over tensor ranks"
        found.append(Violation("parallel.tensor", config.parallel.tensor, rule, "Use 1, or the section `model`."))
    if config.pipeline.schedule == AUTO:
        rule = "costs are measured only for models that the section `model` describes"
        found.append(Violation("pipeline.schedule", AUTO, rule, "Name a schedule."))
    if config.pipeline.partition == AUTO and config.pipeline.schedule != AUTO:
        rule = "costs are measured only for models that the section `model` describes"
        fix = 'Use "parameters", "uniform" or the number of layers of each stage.'
        found.append(Violation("pipeline.partition", AUTO, rule, fix))
    if config.pipeline.memory_limit_bytes is not None:
        rule = "the memory of a user's layers is not predicted, so nothing can be held to a limit"
        fix = "Leave it out, or use the section `model`."
        found.append(Violation("pipeline.memory_limit_bytes", config.pipeline.memory_limit_bytes, rule, fix))
    if config.activation_checkpointing.recompute == "selective":
        rule = "only models that the section `model` describes have an attention core that is known"
        found.append(Violation("activation_checkpointing.recompute", "selective", rule, 'Use "full" or "none".'))
    return found


def cut_layers(declared: Sequence[DeclaredLayer], num_stages: int, mode: str | Sequence[int]) -> Cuts:
    """The range [lo, hi) of layers of each stage; every stage has one at least.

    `mode`: `uniform` (layers dealt evenly), `parameters` or `cost` (smallest largest number of parameters: the FLOPs of
    a user's layers are not known), `type:<regex>` (smallest largest number of layers whose class has a name in which the
    expression, case ignored, is found), or the number of layers of each stage. Raises TrilithError where it cannot be.
    """
    if len(declared) < num_stages:
        raise TrilithError(
            f"PipelineModel: {len(declared)} layers for {num_stages} stages (parallel.pipeline x "
            "pipeline.virtual_stages): each needs one at least. Use fewer stages or more layers"
        )
    if isinstance(mode, str) and mode != "uniform":
        cuts = partition_units(_weights(declared, mode), num_stages)
    else:
        counts = layers_per_stage(len(declared), num_stages) if isinstance(mode, str) else list(mode)
        if len(counts) != num_stages or sum(counts) != len(declared) or min(counts) < 1:
            raise TrilithError(
                f"{PARTITION} = {counts}: must be {num_stages} numbers of at least 1, which add up to {len(declared)} "
                "layers"
            )
        cuts = tuple(pairwise(accumulate(counts, initial=0)))
    assert [index for lo, hi in cuts for index in range(lo, hi)] == list(range(len(declared))), cuts
    return cuts


def _weights(declared: Sequence[DeclaredLayer], mode: str) -> list[float]:
    """What each layer weighs."""
    if mode in ("parameters", "cost"):
        return [float(sum(p.numel for p in layer.parameters)) for layer in declared]
    if not mode.startswith(TYPE):
        raise TrilithError(
            f"{PARTITION} = {mode!r}: must be 'uniform', 'parameters', 'type:<regex>' or the number of layers of each stage"
        )
    try:
        pattern = re.compile(mode.removeprefix(TYPE), re.IGNORECASE)
    except re.error as error:
        raise TrilithError(f"{PARTITION} = {mode!r}: is no regular expression: {error}") from None
    weights = [float(pattern.search(layer.kind) is not None) for layer in declared]
    if not any(weights):
        kinds = ", ".join(sorted({layer.kind for layer in declared}))
        raise TrilithError(f"{PARTITION} = {mode!r}: matches no layer. Their classes are {kinds}")
    return weights
