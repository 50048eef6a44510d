"""Rotary position embedding (Su et al. 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilith.errors import KernelError
from trilith.kernels.reference import widened


class _Rotary(torch.autograd.Function):
    """A rotation: its backward is the rotation back, so nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = widened(x).chunk(2, dim=-1)
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        out = torch.empty(x.shape, dtype=first.dtype, device=x.device)
        left, right = out.chunk(2, dim=-1)
        torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=right).addcmul_(first, sin)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _Rotary.apply(gradients[0], cos, -sin), None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x (B, S, N, D); same shape and dtype.

    `cos` and `sin` (S, D/2) are fp32, or fp64 for fp64 activations; no gradient flows to them. Raises KernelError
    where the tables do not fit the head dim.
    """
    if 2 * cos.shape[-1] != x.shape[-1]:
        raise KernelError(
            f"rotary: head dim {x.shape[-1]} with tables of {cos.shape[-1]} angles: must be twice as many"
        )
    return _Rotary.apply(x, cos, sin)
