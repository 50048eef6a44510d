"""What the executor knows of a stage: a module to call, and parameters it may ask to be gathered or reduced.

`StageParameters` is the seam to ZeRO: `zero` implements it, so the executor never knows how parameters are sharded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

StageFunction = Callable[[dict[str, torch.Tensor], Any], dict[str, torch.Tensor]]


class StageParameters(Protocol):
    """What the executor asks of a stage's parameters; collective over the ranks that hold the same stage."""

    def gather(self) -> None:
        """Make the whole parameters present (GATHER)."""

    def release(self) -> None:
        """Let go of what `gather` brought (RELEASE)."""

    def begin_backward(self, final: bool) -> None:
        """Called before each backward of the stage; on the `final` one gradients may be reduced as they complete."""

    def reduce(self) -> None:
        """Launch every reduction of gradients that is not launched yet (REDUCE, after the stage's last backward)."""

    def tie_reduce(self) -> None:
        """Sum the gradients of weights tied over the first and the last stage (TIE_REDUCE, after both reductions)."""


class NullParameters:
    """Parameters that are whole on this rank and stay so: gradients lie in `.grad`, nothing is communicated."""

    def gather(self) -> None:
        """Nothing to do."""

    def release(self) -> None:
        """Nothing to do."""

    def begin_backward(self, final: bool) -> None:
        """Nothing to do."""

    def reduce(self) -> None:
        """Nothing to do."""

    def tie_reduce(self) -> None:
        """Nothing to do."""


@dataclass(frozen=True)
class PipelineStage:
    """One stage of the pipeline as a rank holds it.

    `module(inputs, microbatch)` maps the named tensors of the stage before (none for the first stage) and the rank's
    own data of the microbatch to the named tensors of the next stage. The last stage returns `{"loss": scalar}`, the
    microbatch's share of the step's loss; without labels it may return anything else (`{"logits": ...}`).
    """

    index: int
    module: StageFunction
    parameters: StageParameters
    is_first: bool
    is_last: bool
