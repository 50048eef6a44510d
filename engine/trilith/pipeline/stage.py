"""What the executor knows of a stage: a module to call, and parameters it may ask to be gathered or reduced.

`StageParameters` is the seam to ZeRO: `zero` implements it, so the executor never knows how parameters are sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from trilith.kernels.weight_queue import Deferred, WeightQueue
from trilith.pipeline.action import Schedule

StageFunction = Callable[[dict[str, torch.Tensor], Any], dict[str, torch.Tensor]]


class StageParameters(Protocol):
    """What the executor asks of a stage's parameters; collective over the ranks that hold the same stage.

    `microbatch` is the action's: for `reduce` and `tie_reduce` the last one of the update, -1 where a step has but one.
    """

    def begin_run(self, schedule: Schedule) -> None:
        """Called for each stage of a rank before it runs the actions of `schedule`, again where a run begins anew."""

    def gather(self) -> None:
        """Begin to make present what the stage's next computation needs first (GATHER)."""

    def release(self) -> None:
        """Let go of what is not kept for later (RELEASE)."""

    def begin_forward(self, microbatch: int) -> None:
        """Called before each forward of the stage: the module must hold the weights that this microbatch uses."""

    def begin_backward(self, microbatch: int, final: bool) -> None:
        """Called before each whole backward.

        `final`: the last of its update: gradients may be reduced as they complete.
        """

    def end_backward(self, microbatch: int, final: bool) -> None:
        """Called when it is done."""

    def begin_input_gradients(self, microbatch: int) -> None:
        """Called before the first half of a backward: that of the input."""

    def end_input_gradients(self, microbatch: int, weights: Collection[torch.Tensor]) -> None:
        """Called when it is done. The gradients of `weights` come in the second half, all others are there."""

    def begin_weight_gradients(self, microbatch: int, weights: Sequence[torch.Tensor], final: bool) -> None:
        """Called before the second half of a backward, which brings one gradient for each of `weights`, in order.

        `final`: the last of its update. All gradients that the first halves bring are complete then.
        """

    def end_weight_gradients(self, microbatch: int, final: bool) -> None:
        """Called when it is done."""

    def accumulate(self, weight: torch.Tensor, gradient: torch.Tensor | Deferred) -> None:
        """Add a gradient that did not come through autograd, computed or still a product."""

    def reduce(self, microbatch: int) -> None:
        """Launch every reduction of gradients that is not launched yet (REDUCE, after the stage's last backward)."""

    def tie_reduce(self, microbatch: int) -> None:
        """Launch the sum of gradients of weights that stages share (TIE_REDUCE, after the stage's reduction)."""

    def update(self, microbatch: int) -> None:
        """Take an optimizer step of this stage alone, with the gradients up to `microbatch` (UPDATE)."""


class NullParameters:
    """Parameters that are whole on this rank and stay so: gradients lie in `.grad`, nothing is communicated."""

    def begin_run(self, schedule: Schedule) -> None:
        """Nothing to do."""

    def gather(self) -> None:
        """Nothing to do."""

    def release(self) -> None:
        """Nothing to do."""

    def begin_forward(self, microbatch: int) -> None:
        """Nothing to do."""

    def begin_backward(self, microbatch: int, final: bool) -> None:
        """Nothing to do."""

    def end_backward(self, microbatch: int, final: bool) -> None:
        """Nothing to do."""

    def begin_input_gradients(self, microbatch: int) -> None:
        """Nothing to do."""

    def end_input_gradients(self, microbatch: int, weights: Collection[torch.Tensor]) -> None:
        """Nothing to do."""

    def begin_weight_gradients(self, microbatch: int, weights: Sequence[torch.Tensor], final: bool) -> None:
        """Nothing to do."""

    def end_weight_gradients(self, microbatch: int, final: bool) -> None:
        """Nothing to do."""

    def accumulate(self, weight: torch.Tensor, gradient: torch.Tensor | Deferred) -> None:
        """As autograd does."""
        if isinstance(gradient, Deferred):
            gradient = gradient.gradient()
        if weight.grad is None:
            weight.grad = gradient
        else:
            weight.grad.add_(gradient)

    def reduce(self, microbatch: int) -> None:
        """Nothing to do."""

    def tie_reduce(self, microbatch: int) -> None:
        """Nothing to do."""

    def update(self, microbatch: int) -> None:
        """Nothing to do."""


@dataclass(frozen=True)
class PipelineStage:
    """One stage of the pipeline as a rank holds it.

    `module(inputs, microbatch)` maps the named tensors of the stage before (none for the first stage) and the rank's
    own data of the microbatch to the named tensors of the next stage. The last stage returns `{"loss": scalar}`, the
    microbatch's share of the step's loss; without labels it may return anything else (`{"logits": ...}`).
    `queue` is where the module's linears leave weight gradients for the second half of a split backward; what does not
    go through it is computed in the first half. With `queue_is_direct` they leave those of whole backwards there, too:
    each weight is used in one linear, once.
    """

    index: int
    module: StageFunction
    parameters: StageParameters
    is_first: bool
    is_last: bool
    queue: WeightQueue | None = None
    queue_is_direct: bool = False
