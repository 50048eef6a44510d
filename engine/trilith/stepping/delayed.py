"""Steps without a flush: forwards of later steps run before the backwards of earlier ones are through.

A span is one window of the asynchronous schedule, cut into one segment per step (`pipeline.delayed`). Once the pipeline is
full, segments repeat themselves: a long span goes round in a short window. A segment ends when all backwards of its step
are done, everywhere. With `pipedream` the updates lie inside of it, one per microbatch; with
`pipedream_2bw` there is one, between two segments. Only the end of a span drains the pipeline.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from trilith.errors import TrilithError
from trilith.pipeline.action import Schedule
from trilith.pipeline.delayed import pipedream, pipedream_2bw, segments
from trilith.pipeline.executor import Executor
from trilith.pipeline.passes import complete
from trilith.pipeline.timeline import Record
from trilith.stepping.base import Feed, Finished, LossReport, Parts, StepBatch
from trilith.zero.delayed import DelayedModel


@dataclass(frozen=True)
class _Window:
    """The schedule of a span as this rank runs it: `stops[i]` is the action before which step i is over.

    In a span of more steps than it has, step `turn` is run again and again.
    """

    executor: Executor
    stops: tuple[int, ...]
    turn: int

    def rest(self) -> int:
        """Steps after step `turn`, in which the pipeline drains."""
        return len(self.stops) - 1 - self.turn


@dataclass(frozen=True)
class _Closed:
    """A step whose update is done while its loss is on its way to all ranks; the other fields are those of `Finished`."""

    report: LossReport
    rest: Finished

    def finished(self) -> Finished:
        """The step with its loss."""
        loss, peak = self.report.result()
        return replace(self.rest, loss=loss, memory_peak_bytes=peak)


class DelayedSteps:
    """Trains with `pipedream` or `pipedream_2bw`; a step is given back when the next one is over, the last at the end."""

    def __init__(self, parts: Parts) -> None:
        assert isinstance(parts.model, DelayedModel)
        self._parts, self._model = parts, parts.model
        self._microbatches = parts.schedule.num_microbatches
        self._windows: dict[int, _Window] = {}

    def train(self, first: int, num_steps: int) -> Iterator[Finished]:
        """See `Stepper`. The loss of a `pipedream` step is the mean over its microbatches of their mean token losses."""
        window, model, records = self._window(num_steps), self._model, list[Record]()
        start_s = time.perf_counter()
        stream = _Stream(self._parts.feed, first, self._microbatches, per_microbatch=model.stashes)
        model.begin_window(
            self._microbatches, lambda microbatch: self._parts.lr(first + microbatch // self._microbatches)
        )
        window.executor.begin(stream, stream.boundary, model.loss_scale_of, recorder=records)
        before: _Closed | None = None
        place = 0
        for index in range(num_steps):
            self._parts.failpoints.hit("forward")
            window.executor.advance(window.stops[place])
            closed = self._close(first, index, stream, window.executor, start_s)
            closed.rest.records.extend(records)
            records.clear()
            start_s = closed.rest.marks_s[-1]
            if before is not None:
                yield before.finished()
            before = closed
            if place == window.turn and num_steps - 1 - index > window.rest():
                done = (place + 1) * self._microbatches
                window.executor.rewind(window.stops[place - 1], self._microbatches, done)
            else:
                place += 1
        window.executor.end()
        model.end_window()
        if before is not None:
            yield before.finished()

    def _close(self, first: int, index: int, stream: _Stream, executor: Executor, start_s: float) -> _Closed:
        """End step `index` of the window, whose backwards are all done; its loss is sent to all ranks."""
        parts, model, size = self._parts, self._model, self._microbatches
        gradients_s = time.perf_counter()
        parts.failpoints.hit("optimizer_step")
        lr = parts.lr(first + index if model.stashes else model.optimizer_steps)
        outcome = model.step(lr)
        share = 1.0 / size if model.stashes else 1.0
        mine = range(index * size, (index + 1) * size)
        losses = [executor.losses[k] * share for k in mine if k in executor.losses]
        marks_s = (start_s, start_s + stream.take_seconds(), gradients_s, time.perf_counter())
        rest = Finished(first + index, stream.take_tokens(index), 0.0, 0, lr, outcome, marks_s)
        return _Closed(LossReport(losses, parts.topology), rest)

    def _window(self, num_steps: int) -> _Window:
        """The window of a span of so many steps; made once for each length, and once for all that are long."""
        # By then the pipeline is full, one step is as the one before, and there is time to drain.
        full = 2 + -(-self._parts.schedule.num_ranks // self._microbatches)
        length = min(num_steps, 2 * full + 1)
        if length not in self._windows:
            schedule = self._parts.schedule
            make = pipedream if self._model.stashes else pipedream_2bw
            whole = make(schedule.num_ranks, self._microbatches, length)
            whole = complete(replace(whole, ties=schedule.ties, frozen=schedule.frozen))
            rank, cuts = self._parts.topology.coordinate("pp"), segments(whole, self._microbatches)
            if length > 2 * full:
                _assert_repeats(whole, cuts, full, self._microbatches)
            stops = tuple(cut[rank] for cut in cuts)
            self._windows[length] = _Window(self._parts.make_executor(whole), stops, full)
        return self._windows[length]


def _assert_repeats(schedule: Schedule, cuts: tuple[tuple[int, ...], ...], step: int, size: int) -> None:
    """After step `step` of a window every rank does what it did after the step before, `size` microbatches later."""
    for rank, actions in enumerate(schedule.actions):
        before, here, after = (cuts[i][rank] for i in (step - 1, step, step + 1))
        later = [replace(action, microbatch=action.microbatch + size) for action in actions[before:here]]
        assert list(actions[here:after]) == later, f"rank {rank} of {schedule.name} does not repeat itself"


class _Stream:
    """The microbatches of a window by number, read step by step as its forwards, which run in order, come to them."""

    def __init__(self, feed: Feed, first: int, size: int, *, per_microbatch: bool) -> None:
        self._feed, self._first, self._size, self._per_microbatch = feed, first, size, per_microbatch
        self._seconds = 0.0
        self._tokens: dict[int, int] = {}
        self._step, self._batch = 0, self._read(0)
        self.boundary = self._batch.boundary

    def __getitem__(self, microbatch: int, /) -> Any:
        """The rank's own data of a microbatch. Raises TrilithError where its shapes are not those of the window."""
        step, index = divmod(microbatch, self._size)
        if step != self._step:
            assert step == self._step + 1, (step, self._step)
            self._step, self._batch = step, self._read(step)
            if self._batch.boundary != self.boundary:
                raise TrilithError(
                    f"step {self._first + step + 1}: shapes between stages are {self._batch.boundary}, before they were "
                    f"{self.boundary}: an asynchronous schedule has steps of one shape until the pipeline is drained"
                )
        return self._batch.microbatches[index]

    def _read(self, step: int) -> StepBatch:
        start_s = time.perf_counter()
        batch = self._feed.step(self._first + step, per_microbatch=self._per_microbatch)
        self._seconds += time.perf_counter() - start_s
        self._tokens[step] = batch.tokens
        return batch

    def take_tokens(self, step: int) -> int:
        """The global number of target tokens of a step that is over."""
        return self._tokens.pop(step)

    def take_seconds(self) -> float:
        """The time spent on reading since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
