"""Number formats of a run, and the loss scale that keeps fp16 gradients inside their range.

Mixed precision is Micikevicius et al. 2018: weights and activations in 16 bits, a master copy of the weights in fp32, and
a loss multiplied by a scale that is adapted to what overflows. The scale follows DeepSpeed's rules and key names.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from trilith.errors import TrilithError

LOGGER = logging.getLogger(__name__)

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
)


@dataclass(frozen=True)
class PrecisionPolicy:
    """Which dtype each thing has.

    `param_dtype`: weights in the model, `compute_dtype`: activations, `grad_accum_dtype`: sums of gradients over
    microbatches, `reduce_dtype`: gradients on their way between ranks, `master_dtype`: weights and moments in the
    optimizer. `check_overflow`: a step whose gradients are not finite is skipped.
    """

    param_dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype = torch.float32
    grad_accum_dtype: torch.dtype = torch.float32
    reduce_dtype: torch.dtype = torch.float32
    master_dtype: torch.dtype = torch.float32
    check_overflow: bool = False

    @classmethod
    def from_config(cls, config: Any) -> PrecisionPolicy:
        """The policy of a resolved Config (`data_types`, `communication_data_type`, `fp16`, `bf16`)."""
        param = DTYPES[config.data_types.param_dtype]
        return cls(
            param_dtype=param,
            compute_dtype=param,
            grad_accum_dtype=DTYPES[config.data_types.grad_accum_dtype],
            reduce_dtype=DTYPES[config.communication_data_type],
            master_dtype=torch.float64 if param == torch.float64 else torch.float32,
            check_overflow=param == torch.float16 or (param == torch.bfloat16 and config.bf16.check_grad_overflow),
        )

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is multiplied by a scale: in fp16 only."""
        return self.param_dtype == torch.float16


class LossScaler:
    """The factor on the loss in fp16 training; 1 and never changing in other formats.

    Dynamic: after an overflow the scale halves, but only once `hysteresis` - 1 overflows have been let pass; after
    `loss_scale_window` steps without one it doubles, and the allowance is full again.
    With `consecutive_hysteresis` every good step refills the allowance. These are DeepSpeed's rules to the letter
    (`deepspeed/runtime/fp16/loss_scaler.py`), so that the same overflows give the same scales.
    """

    def __init__(
        self,
        *,
        dynamic: bool,
        scale: float,
        window: int = 1000,
        hysteresis: int = 2,
        consecutive_hysteresis: bool = False,
        min_scale: float = 1.0,
    ) -> None:
        self.dynamic = dynamic
        self._scale = float(scale)
        self._window = window
        self._hysteresis = hysteresis
        self._consecutive_hysteresis = consecutive_hysteresis
        self._min_scale = min_scale
        self._hysteresis_left = hysteresis
        self._num_updates = 0
        self._last_overflow = -1

    @classmethod
    def constant(cls, scale: float = 1.0) -> LossScaler:
        """A scale that never changes."""
        return cls(dynamic=False, scale=scale)

    @classmethod
    def from_config(cls, config: Any) -> LossScaler:
        """The scaler of a resolved Config: of `fp16` where parameters are fp16, else the constant 1."""
        fp16 = config.fp16
        if DTYPES[config.data_types.param_dtype] != torch.float16:
            return cls.constant()
        if fp16.loss_scale > 0:
            return cls.constant(fp16.loss_scale)
        return cls(
            dynamic=True,
            scale=2.0**fp16.initial_scale_power,
            window=fp16.loss_scale_window,
            hysteresis=fp16.hysteresis,
            consecutive_hysteresis=fp16.consecutive_hysteresis,
            min_scale=fp16.min_loss_scale,
        )

    @property
    def loss_scale(self) -> float:
        """What the next step's loss is multiplied by."""
        return self._scale

    def update(self, overflow: bool) -> None:
        """Take note of one step. Every rank must report the same.

        Raises TrilithError when the scale cannot fall any further: then the gradients overflow for another reason.
        """
        if not self.dynamic:
            return
        if overflow:
            self._shrink()
            self._last_overflow = self._num_updates
        else:
            self._grow()
        self._num_updates += 1

    def _shrink(self) -> None:
        if self._hysteresis_left > 1:
            self._hysteresis_left -= 1
            LOGGER.info("gradient overflow: step skipped, loss scale stays at %g", self._scale)
            return
        if self._scale == self._min_scale:
            raise TrilithError(
                f"loss scale = {self._scale:g}: gradients still overflow at the smallest scale that "
                "fp16.min_loss_scale allows. Lower the learning rate, look for infinite losses, or use bf16"
            )
        self._scale = max(self._scale / 2.0, self._min_scale)
        LOGGER.info("gradient overflow: step skipped, loss scale reduced to %g", self._scale)

    def _grow(self) -> None:
        if self._consecutive_hysteresis:
            self._hysteresis_left = self._hysteresis
        if (self._num_updates - self._last_overflow) % self._window == 0:
            self._hysteresis_left = self._hysteresis
            self._scale *= 2.0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able."""
        return {
            "scale": self._scale,
            "hysteresis_left": self._hysteresis_left,
            "num_updates": self._num_updates,
            "last_overflow": self._last_overflow,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; a constant scaler keeps the scale that the config gave it."""
        if not self.dynamic:
            return
        self._scale = float(state["scale"])
        self._hysteresis_left = int(state["hysteresis_left"])
        self._num_updates = int(state["num_updates"])
        self._last_overflow = int(state["last_overflow"])
