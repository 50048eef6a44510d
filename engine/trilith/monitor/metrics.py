"""The record of one step, and what is measured for it. Floats are kept unrounded; units stand in the names."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. `tokens` counts its target positions, `consumed_tokens` those since the start of training.

    `model_flops_per_s_causal` and `_noncausal` are achieved model FLOP/s over all ranks without recompute, attention
    counted over half or the whole of the sequence; `mfu_*` divide by the peak of all ranks where one is known.
    `breakdown` holds what `wall_clock_breakdown` and `memory_breakdown` ask for, of rank 0, units in the keys.
    `grad_norm` is None where no global norm is taken (pipedream).
    `memory_peak_bytes` is the largest peak of any rank: device memory on CUDA, resident set on a CPU.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float | None
    tokens: int
    tokens_per_s: float
    step_time_s: float
    memory_peak_bytes: int
    consumed_samples: int
    consumed_tokens: int
    model_flops_per_s_causal: float
    model_flops_per_s_noncausal: float
    mfu_causal: float | None = None
    mfu_noncausal: float | None = None
    loss_scale: float | None = None
    skipped: bool = False
    breakdown: Mapping[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON object of this record, flat; figures that are not known are left out."""
        known = {key: value for key, value in vars(self).items() if value is not None and key != "breakdown"}
        return {**known, **(self.breakdown or {})}


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation on the held-out split, after `step` optimizer steps."""

    step: int
    eval_loss: float
    eval_tokens: int
    eval_time_s: float

    def to_json(self) -> dict[str, Any]:
        """The JSON object of this record."""
        return asdict(self)


def peak_memory_bytes(device: torch.device) -> int:
    """This rank's peak so far: allocated device memory on CUDA, the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
