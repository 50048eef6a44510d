"""What the optimizer ops mean, in plain torch on any device: the truth that `kernels/ops/optimizer.py` is tested against.

Arguments are those of the ops. Everything is computed in the parameters' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def adam(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    weights: Sequence[Tensor],
    multipliers: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    is_decoupled: bool,
    zeroes_gradients: bool,
) -> None:
    """Kingma & Ba 2015, algorithm 1; decoupled: Loshchilov & Hutter 2019, algorithm 2."""
    lr, _, _, correction1, correction2, _ = step.tolist()
    for i, (p, g, lr_mult, decay_mult) in enumerate(_slices(parameters, gradients, multipliers, step)):
        decay = weight_decay * decay_mult
        if not is_decoupled:
            g = g + decay * p
        mean = exp_avgs[i].to(p.dtype).lerp(g, 1.0 - beta1)
        square = exp_avg_sqs[i].to(p.dtype).lerp(g * g, 1.0 - beta2)
        change = lr * lr_mult * (mean / correction1) / ((square / correction2).sqrt() + eps)
        p.sub_(change + lr * lr_mult * decay * p if is_decoupled else change)
        exp_avgs[i].copy_(mean)
        exp_avg_sqs[i].copy_(square)
    _finish(parameters, gradients, weights, zeroes_gradients)


def lion(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    weights: Sequence[Tensor],
    multipliers: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    zeroes_gradients: bool,
) -> None:
    """Chen et al. 2023, algorithm 2."""
    lr = float(step[0])
    for i, (p, g, lr_mult, decay_mult) in enumerate(_slices(parameters, gradients, multipliers, step)):
        mean = exp_avgs[i].to(p.dtype)
        p.sub_(lr * lr_mult * (mean.lerp(g, 1.0 - beta1).sign() + weight_decay * decay_mult * p))
        exp_avgs[i].copy_(mean.lerp(g, 1.0 - beta2))
    _finish(parameters, gradients, weights, zeroes_gradients)


def sgd(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    weights: Sequence[Tensor],
    multipliers: Tensor,
    step: Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    is_nesterov: bool,
    zeroes_gradients: bool,
) -> None:
    """Sutskever et al. 2013, in torch's form."""
    lr, is_first = float(step[0]), bool(step[5])
    for i, (p, g, lr_mult, decay_mult) in enumerate(_slices(parameters, gradients, multipliers, step)):
        g = g + weight_decay * decay_mult * p
        if momentum:
            buffer = g if is_first else momentum * momentum_buffers[i].to(p.dtype) + (1.0 - dampening) * g
            momentum_buffers[i].copy_(buffer)
            g = g + momentum * buffer if is_nesterov else buffer
        p.sub_(lr * lr_mult * g)
    _finish(parameters, gradients, weights, zeroes_gradients)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """The squares of all elements, in float64, added up: a scalar."""
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    for tensor in tensors:
        total += tensor.double().square().sum()
    return total


def _slices(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], multipliers: Tensor, step: Tensor
) -> Iterator[tuple[Tensor, Tensor, float, float]]:
    """Parameter, gradient as it is applied, and the two multipliers of each slice."""
    _, clip_factor, loss_scale, *_ = step.tolist()
    for p, g, (lr_mult, decay_mult) in zip(parameters, gradients, multipliers.tolist(), strict=True):
        yield p, g.to(p.dtype) * (clip_factor / loss_scale), lr_mult, decay_mult


def _finish(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], weights: Sequence[Tensor], zeroes_gradients: bool
) -> None:
    for weight, p in zip(weights, parameters if weights else (), strict=True):
        weight.copy_(p)
    for gradient in gradients if zeroes_gradients else ():
        gradient.zero_()
