"""Lion: the sign of an interpolation between momentum and gradient (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

Weight decay acts on the weight, scaled by the learning rate. One state instead of Adam's two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trilith.kernels.ops import optimizer
from trilith.kernels.ops.optimizer import GradScale, Slices
from trilith.optim.base import ElementwiseOptimizer, FlatPartition, SliceGroup, batches


@dataclass(frozen=True)
class LionOptions:
    """Lion's constants: `betas` are of the step's direction and of the momentum that is kept."""

    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0


class Lion(ElementwiseOptimizer):
    """Lion. State: `exp_avg`, in the master dtype."""

    state_roles = ("exp_avg",)
    scales_by_itself = False
    has_kernel = True

    def __init__(self, partitions: Sequence[FlatPartition], options: LionOptions, backend: str = "auto") -> None:
        super().__init__(partitions, backend)
        self.options = options

    def _update_slices(self, slices: Slices, lr: float, grad_scale: GradScale) -> None:
        optimizer.lion(
            slices,
            optimizer.step_values(lr, grad_scale=grad_scale),
            *self.options.betas,
            weight_decay=self.options.weight_decay,
        )

    def _update(self, group: SliceGroup, gradients: list[Tensor], lr: float, grad_scale: Tensor | None) -> None:
        lr_mult, decay_mult = group.key
        first, second = self.options.betas
        step_size = lr * lr_mult
        decay = 1.0 - step_size * self.options.weight_decay * decay_mult
        for weights, slopes, averages in batches(group.parameters, gradients, group.states["exp_avg"]):
            direction = torch._foreach_lerp(averages, slopes, 1.0 - first)
            torch._foreach_sign_(direction)
            torch._foreach_mul_(weights, decay)
            torch._foreach_add_(weights, direction, alpha=-step_size)
            torch._foreach_lerp_(averages, slopes, 1.0 - second)
