"""Stochastic gradient descent with momentum (Sutskever et al. 2013, in torch's form), one fused pass per group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trilith.kernels.ops.optimizer import SGD as _SGD
from trilith.kernels.ops.optimizer import Update
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

    def __init__(self, partitions: Sequence[FlatPartition], options: SGDOptions, backend: str = "auto") -> None:
        self.options = options
        self.state_roles = ("momentum_buffer",) if options.momentum else ()
        super().__init__(partitions, backend)

    def _native_update(self, group: SliceGroup, values: Tensor) -> Update:
        options, decay = self.options, self.options.weight_decay * group.key[1]
        betas, nesterov = (options.momentum, 0.0), options.nesterov
        return Update(_SGD, values, betas, decay, dampening=options.dampening, decoupled=False, nesterov=nesterov)

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
