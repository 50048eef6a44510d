"""Dropout whose mask is a function of the model (site, sample, position, feature), not of the layout or the call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilith.kernels.stream import Key, dropout_keep, keep_scale


class _Dropped(torch.autograd.Function):
    """x where `keep`, times `scale`. Keeps the mask for backward, one byte an element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        # The scale comes last: as a factor of its own in bf16 it would be rounded before it is used.
        return keep.to(x.dtype).mul_(x).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        return _Dropped.apply(gradients[0], keep, ctx.scale), None, None


def dropped(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """x (any shape) where `keep` (bool, same shape), times the inverse of the probability of being kept; else zero."""
    return _Dropped.apply(x, keep, keep_scale(p))


def dropout(
    x: Tensor,
    p: float,
    key: Key,
    sample_ids: Tensor,
    positions: Tensor,
    feature_range: tuple[int, int],
    training: bool = True,
) -> Tensor:
    """Zeroes elements of x (B, S, F) with probability `p`, scales the others; `x` itself if p is 0 or not training.

    `key` is the site's stream, `sample_ids` (B,) and `positions` (S,) or (B, S) are int64 and global, and the F
    features are `feature_range` of the whole tensor's. Raises KernelError where not 0 <= p < 1.
    """
    if p == 0.0 or not training:
        return x
    return dropped(x, dropout_keep(key, sample_ids, positions, feature_range, p), p)
