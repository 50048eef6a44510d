"""Adagrad (Duchi et al. 2011), in torch's form: weight decay is added to the gradient, and lr may fall by 1 / t."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trilith.optim.base import ElementwiseOptimizer, FlatPartition, SliceGroup, batches


@dataclass(frozen=True)
class AdagradOptions:
    """Adagrad's constants; `lr_decay` divides the learning rate of step t = 0, 1, ... by 1 + t * lr_decay."""

    eps: float = 1e-10
    weight_decay: float = 0.0
    lr_decay: float = 0.0
    initial_accumulator_value: float = 0.0


class Adagrad(ElementwiseOptimizer):
    """Adagrad. State: `sum`, of squared gradients without what it starts from, in the master dtype."""

    state_roles = ("sum",)
    scales_by_itself = False

    def __init__(self, partitions: Sequence[FlatPartition], options: AdagradOptions) -> None:
        super().__init__(partitions)
        self.options = options

    def _update(self, group: SliceGroup, gradients: list[Tensor], lr: float, grad_scale: Tensor | None) -> None:
        lr_mult, decay_mult = group.key
        options = self.options
        decay = options.weight_decay * decay_mult
        step_size = lr * lr_mult / (1.0 + self.num_steps * options.lr_decay)
        for weights, slopes, sums in batches(group.parameters, gradients, group.states["sum"]):
            decayed = torch._foreach_add(slopes, weights, alpha=decay) if decay else slopes
            torch._foreach_addcmul_(sums, decayed, decayed)
            roots = torch._foreach_add(sums, options.initial_accumulator_value)
            torch._foreach_sqrt_(roots)
            torch._foreach_add_(roots, options.eps)
            torch._foreach_addcdiv_(weights, decayed, roots, -step_size)
