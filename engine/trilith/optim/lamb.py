"""LAMB: Adam's step, scaled for each tensor by the norm of its weights over that of the step (You et al. 2020).

The formula is that of DeepSpeed's FusedLamb, with moments m and v that are not corrected themselves:

    u = m / (sqrt(v) + eps) + decay * w
    w = w - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * clamp(|w| / |u|, min_coeff, max_coeff) * u

The ratio is 1 where a norm is 0. Norms are of whole canonical tensors: q, k and v have one ratio each, stacked or not, and
in every layout the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from trilith.optim.base import FlatPartition, Optimizer, unscaled
from trilith.optim.clip import sum_of_squares
from trilith.optim.whole import ALONE, runs_of, sum_over, views, whole_tensors
from trilith.topology import Group


@dataclass(frozen=True)
class LambOptions:
    """LAMB's constants. `always_adapts`: scale the steps of tensors without weight decay too, as DeepSpeed does."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    bias_correction: bool = True
    max_coeff: float = 10.0
    min_coeff: float = 0.01
    eps_inside_sqrt: bool = False
    always_adapts: bool = True


class Lamb(Optimizer):
    """LAMB. State: `exp_avg` and `exp_avg_sq`, in the master dtype. All ranks of the group `tp` step together."""

    state_roles = ("exp_avg", "exp_avg_sq")
    needs_whole_tensors = True

    def __init__(self, partitions: Sequence[FlatPartition], options: LambOptions, tp: Group = ALONE) -> None:
        super().__init__(partitions)
        self.options = options
        self._tp = tp
        self._tensors = whole_tensors(partitions, tp)
        self._decays = [options.weight_decay * tensor.group[1] for tensor in self._tensors]
        self.rebind(partitions)

    def rebind(self, partitions: Sequence[FlatPartition]) -> None:
        """Take weights and gradients of `partitions`, and states, from where they are now."""
        self._weights = views(self._tensors, [partition.parameter for partition in partitions])
        self._gradients = views(self._tensors, [partition.gradient for partition in partitions])
        self._averages = views(self._tensors, [state["exp_avg"] for state in self.state])
        self._squares = views(self._tensors, [state["exp_avg_sq"] for state in self.state])

    def step_parts(self, parts: tuple[int, ...], lr: float, grad_scale: float = 1.0) -> bool:
        """Update the tensors of some partitions: moments and norms first, one sum over tensor ranks, then the weights."""
        chosen = runs_of(self._tensors, parts)
        if not chosen:
            return False
        first, second = self.options.betas
        device = self._weights[chosen[0].start].device
        squares = torch.zeros(2, len(self._tensors), dtype=torch.float64, device=device)
        for run in chosen:
            averages, variances = self._averages[run], self._squares[run]
            gradients = unscaled(self._gradients[run], averages[0].dtype, grad_scale)
            torch._foreach_lerp_(averages, gradients, 1.0 - first)
            torch._foreach_mul_(variances, second)
            torch._foreach_addcmul_(variances, gradients, gradients, 1.0 - second)
            for i, direction in zip(range(run.start, run.stop), self._directions(run), strict=True):
                ranges = self._tensors[i].counted_ranges
                squares[0, i] = sum_of_squares(self._weights[i], ranges)
                squares[1, i] = sum_of_squares(direction, ranges)
        sum_over(squares, self._tp)
        steps = self._step_sizes(squares.sqrt_().cpu(), lr)
        for run in chosen:
            directions = self._directions(run)
            torch._foreach_mul_(directions, steps[run])
            torch._foreach_sub_(self._weights[run], directions)
        return False

    def _directions(self, run: slice) -> list[Tensor]:
        """The steps before they are scaled. Computed twice: all norms must be known before the first step is taken."""
        eps, variances = self.options.eps, self._squares[run]
        if self.options.eps_inside_sqrt:
            roots = torch._foreach_add(variances, eps)
            torch._foreach_sqrt_(roots)
        else:
            roots = torch._foreach_sqrt(variances)
            torch._foreach_add_(roots, eps)
        directions = torch._foreach_div(self._averages[run], roots)
        if self.options.weight_decay:
            torch._foreach_add_(directions, torch._foreach_mul(self._weights[run], self._decays[run]))
        return list(directions)

    def _step_sizes(self, norms: Tensor, lr: float) -> list[float]:
        """By tensor what its direction is multiplied by; `norms` are those of weights and of directions."""
        options, t = self.options, self.num_steps + 1
        if options.bias_correction:
            lr *= sqrt(1.0 - options.betas[1] ** t) / (1.0 - options.betas[0] ** t)
        weights, directions = norms
        ratios = (weights / directions).clamp(options.min_coeff, options.max_coeff)
        ratios = torch.where((weights == 0) | (directions == 0), 1.0, ratios).tolist()
        return [
            lr * tensor.group[0] * (ratio if decay or options.always_adapts else 1.0)
            for tensor, ratio, decay in zip(self._tensors, ratios, self._decays, strict=True)
        ]
