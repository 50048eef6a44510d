"""How much memory a rank takes, predicted: what is said of it, and what activations depend on. No torch.

What the states take follows from how they are partitioned: `zero/budget.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from trilith.config import Config
from trilith.kernels.backends import chosen, native_families
from trilith.models.activations import ActivationSetting
from trilith.pipeline.schedules import SCHEDULES

DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2})


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank of a pipeline rank's tensor and data group (the largest of its tensor ranks).

    `parameters` counts elements, one version of each; `versions`: how many of the weights there are (asynchronous
    schedules). `rollback_bytes`: the copy that `postvalidate` keeps. `activation_bytes`: the most at one time.
    `window_bytes`: the most at one time of whole weights and whole gradients of units of which the rank keeps its part.
    All of these are on the device; `host_bytes` and `disk_bytes` are what is offloaded.
    """

    parameters: int
    versions: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    rollback_bytes: int
    activation_bytes: int
    window_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0

    @property
    def state_bytes(self) -> int:
        """What is there all the time: everything but activations and the window."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.rollback_bytes

    @property
    def total_bytes(self) -> int:
        """All of it on the device, at the peak."""
        return self.state_bytes + self.activation_bytes + self.window_bytes


def activation_setting(config: Config) -> ActivationSetting:
    """What a resolved config says about the size of activations."""
    return ActivationSetting(
        batch_size=config.train_micro_batch_size_per_gpu,
        tensor=config.parallel.tensor,
        sequence_parallel=config.parallel.sequence_parallel,
        recompute=config.activation_checkpointing.recompute,
        dtype_bytes=DTYPE_BYTES[config.data_types.param_dtype],
        fused=_fused(config),
        fused_loss=config.kernels.fused_loss and not _may_split(config),
        sparse=config.sparse_attention,
        documents=config.data.reset_attention_mask,
    )


def _may_split(config: Config) -> bool:
    """Whether backwards may come in two halves; a schedule that is not made here is taken for one where they do."""
    recipe = SCHEDULES.get(config.pipeline.schedule)
    return recipe is None or recipe.splits_backward


def _fused(config: Config) -> frozenset[str]:
    """Families of ops that run as one kernel: on a GPU torch's norm, else what the native library serves."""
    if config.run.device == "cuda":
        return frozenset(("norm",))
    return native_families(chosen(config.kernels))
