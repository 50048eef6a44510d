"""Normalisation of rows. torch's own are used: they compute in fp32 for bf16 and fp16, as the reference does."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Rows of x (..., H) to mean 0 and variance 1, then times weight (H,) plus bias (H,); same shape and dtype."""
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rows of x (..., H) to root mean square 1, then times weight (H,); same shape and dtype."""
    return functional.rms_norm(x, weight.shape, weight, eps)
