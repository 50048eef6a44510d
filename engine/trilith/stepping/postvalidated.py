"""Steps whose optimizer does not wait for the global norm: the end of one and the beginning of the next overlap.

A rank ends a step with a guess of its outcome (`zero/postvalidate.py`) and goes on with the forwards of the next. At that
step's VALIDATE action it learns the norm; where any pipeline rank guessed wrong, the step before is mended and the one
under way begins anew. Qi et al. 2024 (arXiv 2401.10241), section 4. Results have the bits of `synchronous.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from trilith.pipeline.action import Kind
from trilith.pipeline.timeline import Record
from trilith.stepping.base import Finished, LossReport, Parts
from trilith.zero.postvalidate import PostValidation


@dataclass(frozen=True)
class _Begun:
    """A step whose optimizer step was taken and not validated."""

    index: int
    tokens: int
    lr: float
    report: LossReport
    marks_s: tuple[float, ...]
    records: list[Record]


class PostvalidatedSteps:
    """No rank waits for the others at the end of a step; `validation` counts its guesses and rollbacks.

    The schedule must have VALIDATE actions (`passes.complete` with `validate=True`).
    """

    def __init__(self, parts: Parts) -> None:
        kinds = {action.kind for _, action in parts.schedule.parts()}
        assert Kind.VALIDATE in kinds, f"schedule {parts.schedule.name} was not completed with validate=True"
        self._parts = parts
        self._executor = parts.make_executor(parts.schedule)
        self.validation = PostValidation(parts.model)

    def train(self, first: int, num_steps: int) -> Iterator[Finished]:
        """See `Stepper`: a step is given back when the next one, inside which it was validated, is at its end."""
        before: _Begun | None = None
        for index in range(first, first + num_steps):
            begun = self._step(index)
            if before is not None:
                yield self._finished(before)
            before = begun
        if before is not None:
            self.validation.validate()
            yield self._finished(before)

    def _step(self, index: int) -> _Begun:
        """Run step `index`, validating the one before inside it, and take its optimizer step on a guess."""
        parts, validation, start_s = self._parts, self.validation, time.perf_counter()
        batch = parts.feed.step(index)
        has_data_s = time.perf_counter()
        parts.failpoints.hit("forward")
        records: list[Record] = []
        keeper = parts.keeper if validation.is_pending else None
        if keeper is not None:
            keeper.save()
        result = self._executor.run(
            batch.microbatches,
            batch.boundary,
            lambda microbatch: parts.model.loss_scale,  # that of this step is known once the one before is validated
            validate=validation.validate if validation.is_pending else None,
            recorder=records,
            on_restart=None if keeper is None else keeper.restore,
        )
        marks_s = (start_s, has_data_s, time.perf_counter())
        parts.failpoints.hit("optimizer_step")
        lr = parts.lr(parts.model.optimizer_steps)
        validation.begin_step(lr)
        report = LossReport(result.losses, parts.topology)
        return _Begun(index, batch.tokens, lr, report, (*marks_s, time.perf_counter()), records)

    def _finished(self, begun: _Begun) -> Finished:
        """The step that was validated last."""
        outcome = self.validation.outcome
        assert outcome is not None
        loss, peak = begun.report.result()
        return Finished(begun.index, begun.tokens, loss, peak, begun.lr, outcome, begun.marks_s, begun.records)
