"""The one seam for the matrix products of layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trilith.kernels.weight_queue import WeightQueue


class _SplitLinear(torch.autograd.Function):
    """A product that returns the gradient of its input and leaves in a queue what the gradient of its weight needs.

    The weight comes in a tuple, which autograd does not look into: it is no input of the node.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, anchor: Tensor, held: tuple[Tensor, WeightQueue]) -> Tensor:
        ctx.save_for_backward(x, held[0].detach())
        ctx.held = held
        return functional.linear(x, held[0], bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        parameter, queue = ctx.held
        rows = gradients[0].reshape(-1, weight.shape[0])
        x_gradient = rows.mm(weight).view(x.shape) if ctx.needs_input_grad[0] else None
        bias_gradient = rows.sum(0) if ctx.needs_input_grad[1] else None
        queue.put(parameter, x.detach().reshape(-1, weight.shape[1]), rows.detach())
        return x_gradient, bias_gradient, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, queue: WeightQueue | None = None) -> Tensor:
    """x (..., in) times weight (out, in) transposed, plus bias (out,): (..., out), all of one dtype.

    Every layer's product with a weight comes through here, and through nothing else, because that is where a product
    may be done differently: with its weight gradient deferred, in fp8, on a quantised base, with an adapter.

    With a `queue` that takes them x and the gradient of y go there in backward, for the gradient of the weight, which
    autograd does not see. The gradients of x and of the bias come as always.
    """
    if (
        queue is None
        or torch.compiler.is_compiling()
        or not (queue.takes and torch.is_grad_enabled() and weight.requires_grad)
    ):
        return functional.linear(x, weight, bias)
    return _SplitLinear.apply(x, bias, queue.anchor, (weight, queue))
