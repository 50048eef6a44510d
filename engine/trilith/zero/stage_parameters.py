"""What the pipeline executor sees of a rank's storage, stage by stage."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from trilith.kernels.weight_queue import Deferred
from trilith.pipeline.action import Schedule

if TYPE_CHECKING:
    from trilith.zero.sharded import ShardedModel


class StageParameters:
    """The pipeline executor's view of one stage's parameters (`pipeline.stage.StageParameters`)."""

    def __init__(self, model: ShardedModel, stage: int) -> None:
        self._model, self._stage = model, stage

    def begin_run(self, schedule: Schedule) -> None:
        """A run of `schedule` begins: at stage 3 its gather plan does."""
        self._model.begin_run(schedule)

    def gather(self) -> None:
        """Begin to gather what comes next; weights are whole on every data rank at stages 0 to 2."""
        if self._model.gatherer is not None:
            self._model.gatherer.ahead()

    def release(self) -> None:
        """Let go of what the plan does not keep."""
        if self._model.gatherer is not None:
            self._model.gatherer.release()

    def begin_forward(self, microbatch: int) -> None:
        """There is one version of the weights, and it is in the module."""

    def begin_backward(self, microbatch: int, final: bool) -> None:
        """A whole backward of this stage begins; `final`: the last of the step."""
        self._model.forget_step()
        self._model.reducer.begin_backward(self._stage, final)

    def end_backward(self, microbatch: int, final: bool) -> None:
        """It is done."""
        self._end_gathers()
        self._model.reducer.end_backward(self._stage, final)

    def begin_input_gradients(self, microbatch: int) -> None:
        """The first half of a backward begins."""
        self._model.forget_step()
        self._model.reducer.begin_input_gradients(self._stage, microbatch)

    def end_input_gradients(self, microbatch: int, weights: Collection[Tensor]) -> None:
        """It is done; the gradients of `weights` are to come."""
        self._end_gathers()
        self._model.reducer.end_input_gradients(self._stage, microbatch, weights)

    def begin_weight_gradients(self, microbatch: int, weights: Sequence[Tensor], final: bool) -> None:
        """The second half of a backward begins, which brings a gradient for each of `weights`."""
        self._model.reducer.begin_weight_gradients(self._stage, microbatch, weights, final)

    def end_weight_gradients(self, microbatch: int, final: bool) -> None:
        """It is done."""
        self._model.reducer.end_weight_gradients(self._stage, final)

    def _end_gathers(self) -> None:
        if self._model.gatherer is not None:
            self._model.gatherer.end_backward()

    def accumulate(self, weight: Tensor, gradient: Tensor | Deferred) -> None:
        """Add a gradient that did not come through autograd."""
        self._model.reducer.accumulate(weight, gradient)

    def reduce(self, microbatch: int) -> None:
        """All gradients of this stage are complete: launch the reductions that are left."""
        self._model.reducer.reduce(self._stage)

    def tie_reduce(self, microbatch: int) -> None:
        """Sum the gradients of weights that this stage shares with others."""
        self._model.reducer.tie_reduce(self._stage)

    def update(self, microbatch: int) -> None:
        """Synchronous schedules step once, after their last action."""
        raise AssertionError("an optimizer step inside a synchronous schedule")
