"""What a stepper is made of and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from trilith import comm
from trilith.failpoints import Failpoints
from trilith.monitor.metrics import peak_memory_bytes
from trilith.pipeline.action import Schedule
from trilith.pipeline.executor import Executor
from trilith.pipeline.timeline import Record
from trilith.pipeline.transport import Boundary
from trilith.topology import Topology
from trilith.zero.sharded import ShardedModel, StepOutcome


@dataclass(frozen=True)
class StepBatch:
    """One step's input on this rank; `tokens` is the step's global number of target tokens."""

    microbatches: Sequence[Any]
    boundary: Boundary | Sequence[Boundary]
    tokens: int


class Feed(Protocol):
    """Where steps get their data."""

    def step(self, index: int, *, per_microbatch: bool = False) -> StepBatch:
        """The input of step `index` (0-based). Every rank must call it.

        `per_microbatch`: each microbatch is a global batch of its own, its loss normalised by its own tokens.
        """


class Keeper(Protocol):
    """What forwards change besides activations: random generators, running statistics."""

    def save(self) -> None:
        """Remember it all as it is now."""

    def restore(self) -> None:
        """Make it all what it was at `save`."""


@dataclass(frozen=True)
class Parts:
    """What a stepper drives: the model's storage, its schedule (complete), executors of schedules, data, and lr(step).

    `keeper`: of modules whose forwards leave something behind, which must be undone where forwards are thrown away.
    """

    model: ShardedModel
    schedule: Schedule
    make_executor: Callable[[Schedule], Executor]
    feed: Feed
    lr: Callable[[int], float]
    topology: Topology
    failpoints: Failpoints
    keeper: Keeper | None = None


@dataclass(frozen=True)
class Finished:
    """A step that is over; loss and memory are the same on every rank.

    `loss` is the mean over the step's target tokens, `memory_peak_bytes` the largest of any rank. `records` are this
    rank's actions, `marks_s` the times (monotonic) when the step began, had its data, had its gradients, was updated.
    """

    index: int
    tokens: int
    loss: float
    memory_peak_bytes: int
    lr: float
    outcome: StepOutcome
    marks_s: tuple[float, ...]
    records: list[Record] = field(default_factory=list)


class Stepper(Protocol):
    """Trains spans of steps."""

    def train(self, first: int, num_steps: int) -> Iterator[Finished]:
        """Train steps `first`, `first` + 1, ... and yield each, in order, when it is over. Every rank must call it.

        When the iterator is exhausted, the pipeline is empty and all weights are final.
        """


class LossReport:
    """The global loss and the largest memory peak of a step, gathered without making any rank wait.

    `losses` are those of this rank's microbatches, empty where it does not hold the last stage.
    """

    def __init__(self, losses: Sequence[Tensor], topology: Topology) -> None:
        counted = bool(losses) and topology.tp.index == 0
        total = sum((loss.double() for loss in losses), torch.zeros((), dtype=torch.float64, device=topology.device))
        peak = peak_memory_bytes(topology.device)
        self._mine = torch.tensor([float(total) if counted else 0.0, float(peak)], dtype=torch.float64)
        self._everyone = torch.empty(2 * topology.world_size, dtype=torch.float64)
        self._handle = comm.all_gather(self._everyone, self._mine, topology.control, async_op=True)

    def result(self) -> tuple[float, int]:
        """(loss, bytes), the same on every rank; the loss is summed in rank order."""
        self._handle.wait()
        return sum(self._everyone[::2].tolist()), int(self._everyone[1::2].max())
