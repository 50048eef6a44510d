"""One step after the other: forward and backward of all microbatches, one global norm, one update."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from trilith.pipeline.timeline import Record
from trilith.stepping.base import Finished, LossReport, Parts


@dataclass(frozen=True)
class Accumulated:
    """A step between its backward and its update: its phases' times, global target tokens, losses, actions."""

    index: int
    marks_s: tuple[float, ...]
    tokens: int
    losses: Sequence[Tensor]
    records: list[Record]


class SynchronousSteps:
    """Every rank waits for the global norm before it updates its weights."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._executor = parts.make_executor(parts.schedule)

    def train(self, first: int, num_steps: int) -> Iterator[Finished]:
        """See `Stepper`."""
        for index in range(first, first + num_steps):
            yield self.update(self.accumulate(index))

    def accumulate(self, index: int) -> Accumulated:
        """The first half of step `index`: forward and backward of every microbatch. `update` must follow."""
        parts, start_s = self._parts, time.perf_counter()
        batch = parts.feed.step(index)
        has_data_s = time.perf_counter()
        parts.model.zero_grad()
        parts.failpoints.hit("forward")
        records: list[Record] = []
        seed = parts.model.loss_scale
        result = self._executor.run(batch.microbatches, batch.boundary, seed, recorder=records)
        return Accumulated(index, (start_s, has_data_s, time.perf_counter()), batch.tokens, result.losses, records)

    def update(self, accumulated: Accumulated) -> Finished:
        """The second half of a step: reduction, clipping, optimizer."""
        parts = self._parts
        parts.failpoints.hit("optimizer_step")
        lr = parts.lr(parts.model.optimizer_steps)
        outcome = parts.model.step(lr)
        marks_s = (*accumulated.marks_s, time.perf_counter())
        loss, peak = LossReport(accumulated.losses, parts.topology).result()
        return Finished(accumulated.index, accumulated.tokens, loss, peak, lr, outcome, marks_s, accumulated.records)
