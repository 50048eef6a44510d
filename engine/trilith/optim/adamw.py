"""Adam and AdamW, one fused pass over all slices natively, or over those of a parameter group by torch.

Adam: Kingma & Ba 2015, algorithm 1; weight decay is added to the gradient. AdamW: Loshchilov & Hutter 2019, algorithm 2;
decay acts on the weight, scaled by the learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trilith.kernels.ops import optimizer
from trilith.kernels.ops.optimizer import GradScale, Slices
from trilith.optim.base import ElementwiseOptimizer, FlatPartition, SliceGroup

# After so many steps both corrections 1 - beta^t are exactly 1: how the fused kernel is told to leave them out.
_NO_CORRECTION_STEP = 1e12


@dataclass(frozen=True)
class AdamOptions:
    """Adam's constants; `decoupled_decay` makes it AdamW."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_decay: bool = True
    bias_correction: bool = True


class Adam(ElementwiseOptimizer):
    """Adam or AdamW. State: `exp_avg` and `exp_avg_sq`, in the master dtype."""

    state_roles = ("exp_avg", "exp_avg_sq")
    has_kernel = True

    def __init__(self, partitions: Sequence[FlatPartition], options: AdamOptions, backend: str = "auto") -> None:
        super().__init__(partitions, backend)
        self.options = options

    def _update_slices(self, slices: Slices, lr: float, grad_scale: GradScale) -> None:
        options = self.options
        betas = options.betas if options.bias_correction else None
        optimizer.adam(
            slices,
            optimizer.step_values(lr, grad_scale=grad_scale, step=self.num_steps + 1, betas=betas),
            *options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
            is_decoupled=options.decoupled_decay,
        )

    def _update(self, group: SliceGroup, gradients: list[Tensor], lr: float, grad_scale: Tensor | None) -> None:
        lr_mult, decay_mult = group.key
        options = self.options
        fused = torch._fused_adamw_ if options.decoupled_decay else torch._fused_adam_
        step = self.num_steps + 1 if options.bias_correction else _NO_CORRECTION_STEP
        steps = torch.full((), step, dtype=torch.float32, device=group.parameters[0].device)
        fused(
            list(group.parameters),
            gradients,
            list(group.states["exp_avg"]),
            list(group.states["exp_avg_sq"]),
            [],
            [steps] * len(gradients),
            lr=lr * lr_mult,
            beta1=options.betas[0],
            beta2=options.betas[1],
            weight_decay=options.weight_decay * decay_mult,
            eps=options.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=grad_scale,
            found_inf=None,
        )
