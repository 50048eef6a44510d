"""The one seam for the matrix products of layers."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in) transposed, plus bias (out,): (..., out), all of one dtype.

    Every layer's product with a weight comes through here, and through nothing else, because that is where a
    product may be done differently: with its weight gradient deferred (a split backward), in fp8, on a quantised
    base, with an adapter. Each of these is one more keyword (None: not asked for) that the layer passes on, and
    None stays this line.

    A deferred weight gradient is then an autograd.Function that hands only x to autograd. The weight must not be an
    input of it, or torch fires the weight's hooks when the input gradient is ready, too early; it is reached
    through the queue that the stage owns, and backward appends (x, gradient of y, their versions, the weight's
    accumulator) to that queue.
    """
    return functional.linear(x, weight, bias)
