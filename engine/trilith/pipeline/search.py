"""Chooses schedule, virtual stages and partition by simulation: what `pipeline.schedule` = "auto" does. Pure, no torch.

Every synchronous schedule whose rules hold is made, its stages are cut, and the whole is simulated with the costs of the
model's units: seconds and bytes as they were measured (`measure.py`), or FLOPs where nothing ran yet. What does not fit
into the memory of a rank is dropped, the fastest of the rest is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from trilith.errors import ConfigError, Violation
from trilith.models.activations import ActivationBytes
from trilith.models.base import UnitDecl
from trilith.pipeline.action import Schedule
from trilith.pipeline.memory import RankMemory
from trilith.pipeline.partition import Cuts, num_layers_in, num_layers_of, partition, partition_problems
from trilith.pipeline.schedules import SCHEDULES, Recipe, make_schedule, schedule_problems
from trilith.pipeline.simulate import Costs, simulate

PartitionMode = str | tuple[int, ...]
LIMIT_KEY = "pipeline.memory_limit_bytes"
EQUAL = 1e-3  # times that differ by less than this fraction of the best count as equal: then memory decides


@dataclass(frozen=True)
class UnitCost:
    """What one unit costs a rank for one microbatch: seconds (or any unit of time) of each action, and bytes kept."""

    forward_s: float
    backward_input_s: float
    backward_weight_s: float
    activations: ActivationBytes

    @property
    def total_s(self) -> float:
        """Forward and backward."""
        return self.forward_s + self.backward_input_s + self.backward_weight_s


@dataclass(frozen=True)
class Measured:
    """The costs of all units, in the model's order, and the time of one message between neighbouring ranks."""

    units: tuple[UnitCost, ...]
    transfer_s: float = 0.0

    def costs(self, cuts: Cuts) -> Costs:
        """The costs of stages, to simulate with: a stage takes what its units take."""
        stages = [self.units[lo:hi] for lo, hi in cuts]
        return Costs(
            tuple(sum(unit.forward_s for unit in stage) for stage in stages),
            tuple(sum(unit.backward_input_s for unit in stage) for stage in stages),
            tuple(sum(unit.backward_weight_s for unit in stage) for stage in stages),
            self.transfer_s,
        )

    def activations(self, cuts: Cuts) -> tuple[ActivationBytes, ...]:
        """The bytes that each stage keeps."""
        return tuple(
            sum((unit.activations for unit in self.units[lo:hi]), start=ActivationBytes(0, 0)) for lo, hi in cuts
        )


def by_flops(units: Sequence[UnitDecl], activations: Sequence[ActivationBytes], recompute: str) -> Measured:
    """Costs from the declaration, in FLOPs a token: what can be said before anything ran; transfers are free.

    The gradient of the weights costs as much as the product, that of the input as much as the forward's products and
    twice its attention, plus what recompute does again.
    """
    found = []
    for unit, kept in zip(units, activations, strict=True):
        attention = 0.5 * unit.attention_flops
        again = {"none": 0.0, "selective": attention, "full": unit.matmul_flops + attention}[recompute]
        if not unit.name.startswith("layers."):
            again = 0.0
        forward, backward = unit.matmul_flops + attention, unit.matmul_flops + 2 * attention + again
        found.append(UnitCost(forward, backward, unit.matmul_flops, kept))
    return Measured(tuple(found))


@dataclass(frozen=True)
class Question:
    """What to choose among, and how to judge it.

    Each of `schedules` is tried with each of `partitions`. `memory(schedule, cuts)` predicts every rank's.
    `overlaps_steps`: ranks go on to the next step without waiting for each other, so a step takes the longest span of a
    rank, not the makespan.
    """

    units: tuple[UnitDecl, ...]
    measured: Measured
    schedules: tuple[Schedule, ...]
    partitions: tuple[PartitionMode, ...]
    memory: Callable[[Schedule, Cuts], tuple[RankMemory, ...]]
    memory_limit_bytes: int | None = None
    overlaps_steps: bool = False


@dataclass(frozen=True)
class Ranked:
    """One candidate. `time_s` is a step's, in the unit of the costs; `memory_bytes` the largest total of a rank."""

    schedule: Schedule
    partition: PartitionMode
    cuts: Cuts
    num_layers: tuple[int, ...]
    time_s: float
    bubble: float
    bubble_makespan: float
    memory_bytes: int
    fits: bool

    @property
    def virtual_stages(self) -> float:
        """Stages per pipeline rank; a schedule from a file may deal them unevenly."""
        return self.schedule.num_stages / self.schedule.num_ranks


@dataclass(frozen=True)
class Ranking:
    """All candidates, the best first; those that do not fit come last, the smallest of them first."""

    rows: tuple[Ranked, ...]
    memory_limit_bytes: int | None
    is_measured: bool

    @property
    def best(self) -> Ranked:
        """The one to run."""
        return self.rows[0]

    def table(self) -> str:
        """The ranking as text, one line a candidate: time relative to the best, bubbles, memory, layers of the stages."""
        origin = "measured times" if self.is_measured else "FLOPs, provisional: times are measured when the run starts"
        limit = "" if self.memory_limit_bytes is None else f", at most {human_bytes(self.memory_limit_bytes)} a rank"
        lines = [f"schedules by simulated step time ({origin}{limit})"]
        for row in self.rows:
            slower = f"{row.time_s:.4g} s" if self.is_measured else f"{row.time_s / self.best.time_s:.3f} x"
            lines.append(
                f"  {row.schedule.name:<17}{row.virtual_stages:g} x rank  {slower:>9}  bubble {row.bubble:6.1%} span "
                f"{row.bubble_makespan:6.1%} makespan  {human_bytes(row.memory_bytes):>11}  "
                f"{_partition_text(row)}{'' if row.fits else '  does not fit'}"
            )
        return "\n".join(lines)


def _partition_text(row: Ranked) -> str:
    """The partition's name and the layers of the stages, runs of equal numbers in short: `auto [3 4x30 3]`."""
    name = "layers" if isinstance(row.partition, tuple) else row.partition
    runs = [(layers, len(list(stages))) for layers, stages in groupby(row.num_layers)]
    texts = [f"{layers}x{count}" if count > 2 else " ".join([str(layers)] * count) for layers, count in runs]
    return f"{name} [{' '.join(texts)}]"


def human_bytes(count: int) -> str:
    """Bytes as a reader likes them."""
    return f"{count / 2**20:.1f} MiB" if count < 10 * 2**30 else f"{count / 2**30:.1f} GiB"


def candidates(
    num_ranks: int, num_microbatches: int, num_layers: int, virtual_stages: int | None
) -> tuple[Schedule, ...]:
    """Every schedule that leaves the mathematics as it is and whose rules hold, with each number of stages per rank.

    `virtual_stages`: the only number to try; None: as many as a schedule and the layers allow.
    """
    found = []
    for name, recipe in SCHEDULES.items():
        if recipe.asynchronous:
            continue
        for virtual in _stages_per_rank(recipe, num_ranks, num_layers, virtual_stages):
            arguments = (name, num_ranks, virtual, num_microbatches)
            if num_ranks * virtual <= num_layers and not schedule_problems(*arguments):
                found.append(make_schedule(*arguments))
    return tuple(found)


def _stages_per_rank(recipe: Recipe, num_ranks: int, num_layers: int, given: int | None) -> Sequence[int]:
    """The numbers of stages per rank to try; one alone is no interleaving, nor is anything on one rank."""
    if given is not None:
        return (given,) if given > 1 or recipe.stages_per_rank is not None else ()
    if recipe.stages_per_rank is not None:
        return (recipe.stages_per_rank,)
    return range(2, num_layers // num_ranks + 1) if num_ranks > 1 else ()


def search(question: Question, is_measured: bool = False) -> Ranking:
    """Simulate every candidate and rank them.

    Raises ConfigError where no candidate can be made, or none fits: then it names the smallest.
    """
    rows = [row for schedule in question.schedules for row in _of_schedule(question, schedule)]
    if not rows:
        raise ConfigError([_nothing_can_be_made(question)])
    fitting = [row for row in rows if row.fits]
    if not fitting:
        raise ConfigError([_nothing_fits(question, min(rows, key=lambda row: row.memory_bytes))])
    shortest = min(row.time_s for row in fitting)
    fitting.sort(key=lambda row: (int((row.time_s / shortest - 1.0) / EQUAL) if shortest else 0, row.memory_bytes))
    others = sorted((row for row in rows if not row.fits), key=lambda row: row.memory_bytes)
    return Ranking((*fitting, *others), question.memory_limit_bytes, is_measured)


def _of_schedule(question: Question, schedule: Schedule) -> Iterator[Ranked]:
    """Every candidate of one schedule; two partitions that come to the same cut are one."""
    num_layers, seen = num_layers_in(question.units), set()
    costs = [unit.total_s for unit in question.measured.units]
    for mode in question.partitions:
        if not partition_problems(num_layers, schedule.num_stages, mode):
            cuts = partition(question.units, schedule.num_stages, mode, costs)
            if cuts not in seen:
                seen.add(cuts)
                yield _judge(question, schedule, mode, cuts)


def _judge(question: Question, schedule: Schedule, mode: PartitionMode, cuts: Cuts) -> Ranked:
    simulation = simulate(schedule, question.measured.costs(cuts))
    memory = max(rank.total_bytes for rank in question.memory(schedule, cuts))
    limit = question.memory_limit_bytes
    return Ranked(
        schedule=schedule,
        partition=mode,
        cuts=cuts,
        num_layers=num_layers_of(question.units, cuts),
        time_s=simulation.span_s if question.overlaps_steps else simulation.makespan_s,
        bubble=simulation.bubble,
        bubble_makespan=simulation.bubble_makespan,
        memory_bytes=memory,
        fits=limit is None or memory <= limit,
    )


def _nothing_can_be_made(question: Question) -> Violation:
    """No schedule's rules hold, or no partition's."""
    tried = sorted({schedule.num_stages for schedule in question.schedules})
    num_layers = num_layers_in(question.units)
    rule = f"none can be made of {num_layers} layers with pipeline.partition {question.partitions[0]}"
    rule += f" in {' or '.join(map(str, tried))} stages" if tried else ", these ranks and microbatches"
    fix = "Use fewer pipeline ranks or stages, more microbatches or layers, or another partition."
    return Violation("pipeline.schedule", "auto", rule, fix)


def _nothing_fits(question: Question, smallest: Ranked) -> Violation:
    rule = (
        f"no schedule fits: the smallest is {smallest.schedule.name} with {list(smallest.num_layers)} layers in its "
        f"stages, {smallest.memory_bytes} bytes on its largest rank"
    )
    fix = "Raise it, use more ranks, smaller microbatches, ZeRO, or activation_checkpointing.recompute."
    return Violation(LIMIT_KEY, question.memory_limit_bytes, rule, fix)
