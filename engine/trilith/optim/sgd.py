"""Stochastic gradient descent with momentum (Sutskever et al. 2013, in torch's form).

One fused pass over all slices natively, or over those of a parameter group by torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trilith.kernels.ops import optimizer
from trilith.kernels.ops.optimizer import GradScale, Slices
from trilith.optim.base import ElementwiseOptimizer, FlatPartition, SliceGroup


@dataclass(frozen=True)
class SGDOptions:
    """SGD's constants; weight decay is added to the gradient."""

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0


class SGD(ElementwiseOptimizer):
    """SGD. State: `momentum_buffer` where there is momentum; it starts as the first gradient, undampened."""

    has_kernel = True

    def __init__(self, partitions: Sequence[FlatPartition], options: SGDOptions, backend: str = "auto") -> None:
        self.options = options
        self.state_roles = ("momentum_buffer",) if options.momentum else ()
        super().__init__(partitions, backend)

    def _update_slices(self, slices: Slices, lr: float, grad_scale: GradScale) -> None:
        options = self.options
        optimizer.sgd(
            slices,
            optimizer.step_values(lr, grad_scale=grad_scale, step=self.num_steps + 1),
            momentum=options.momentum,
            dampening=options.dampening,
            weight_decay=options.weight_decay,
            is_nesterov=options.nesterov,
        )

    def _update(self, group: SliceGroup, gradients: list[Tensor], lr: float, grad_scale: Tensor | None) -> None:
        lr_mult, decay_mult = group.key
        options = self.options
        torch._fused_sgd_(
            list(group.parameters),
            gradients,
            list(group.states.get("momentum_buffer", ())),
            weight_decay=options.weight_decay * decay_mult,
            momentum=options.momentum,
            lr=lr * lr_mult,
            dampening=options.dampening,
            nesterov=options.nesterov,
            maximize=False,
            is_first_step=self.num_steps == 0,
            grad_scale=grad_scale,
            found_inf=None,
        )
