"""Dropout whose mask is a function of the model (site, sample, position, feature), not of the layout or the call.

Natively no mask is kept: backward makes it again from the sample ids and positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilith.errors import KernelError
from trilith.kernels import library, reference, stream
from trilith.kernels.library import DTYPES, address
from trilith.kernels.ops.library_form import define, differentiate
from trilith.kernels.stream import Key, dropout_keep, keep_scale


def dropout(
    x: Tensor,
    p: float,
    key: Key,
    sample_ids: Tensor,
    positions: Tensor,
    feature_range: tuple[int, int],
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Zeroes elements of x (B, S, F) with probability `p`, scales the others; `x` itself if p is 0 or not training.

    `key` is the site's stream, `sample_ids` (B,) and `positions` (S,) or (B, S) are int64 and global, and the F
    features are `feature_range` of the whole tensor's. Raises KernelError where not 0 <= p < 1.
    """
    if p == 0.0 or not training:
        return x
    if backend == "reference":
        return reference.dropout(x, p, key, sample_ids, positions, feature_range)
    if _is_native(x, None, None, sample_ids, positions, feature_range, backend):
        run = dropout_op if library.is_traced(x) else _Dropout.apply
        return run(x, None, None, sample_ids, positions, feature_range[0], *key, stream.threshold(p))
    return dropped(x, dropout_keep(key, sample_ids, positions, feature_range, p, "torch"), p)


def dropout_add(
    x: Tensor,
    residual: Tensor,
    p: float,
    key: Key,
    sample_ids: Tensor,
    positions: Tensor,
    feature_range: tuple[int, int],
    bias: Tensor | None = None,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """residual + `dropout` of x + bias, in one pass: x and residual (B, S, F), bias (F,)."""
    if p > 0.0 and training and backend != "reference":
        if _is_native(x, bias, residual, sample_ids, positions, feature_range, backend):
            run = dropout_op if library.is_traced(x) else _Dropout.apply
            return run(x, bias, residual, sample_ids, positions, feature_range[0], *key, stream.threshold(p))
    shifted = x if bias is None else x + bias
    return residual + dropout(shifted, p, key, sample_ids, positions, feature_range, training, backend)


def dropped(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """x (any shape) where `keep` (bool, same shape), times the inverse of the probability of being kept; else zero."""
    return _Dropped.apply(x, keep, keep_scale(p))


def _is_native(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sample_ids: Tensor,
    positions: Tensor,
    feature_range: tuple[int, int],
    backend: str,
) -> bool:
    if not library.takes("dropout", backend, x, bias, residual):
        return False
    if sample_ids.device != x.device or positions.device != x.device:
        if backend == "fused":
            raise KernelError(
                f"dropout: backend 'fused': sample_ids on {sample_ids.device}, positions on {positions.device}: must be "
                f"on {x.device}"
            )
        return False
    shape = (len(sample_ids), positions.shape[-1], feature_range[1] - feature_range[0])
    if x.shape != shape or (positions.dim() == 2 and len(positions) != len(sample_ids)):
        raise KernelError(
            f"dropout: x {tuple(x.shape)} with sample_ids {tuple(sample_ids.shape)}, positions {tuple(positions.shape)} "
            f"and features {feature_range}: must be (B, S, F) of (B,), of (S,) or (B, S), and of F features"
        )
    if sample_ids.dtype != torch.int64 or positions.dtype != torch.int64:
        raise KernelError(f"dropout: sample_ids {sample_ids.dtype}, positions {positions.dtype}: must be int64")
    if (residual is not None and residual.shape != x.shape) or (bias is not None and bias.shape != x.shape[-1:]):
        other, what = (residual, "residual") if bias is None or bias.shape == x.shape[-1:] else (bias, "bias")
        raise KernelError(f"dropout: x {tuple(x.shape)} with {what} {tuple(other.shape)}: they must fit")  # type: ignore[union-attr]
    return True


# --- what runs ----------------------------------------------------------------------------------------------------------


def _forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sample_ids: Tensor,
    positions: Tensor,
    first_feature: int,
    key_first: int,
    key_second: int,
    threshold: int,
) -> Tensor:
    """residual + dropout(x + bias)."""
    x, sample_ids, positions = x.contiguous(), sample_ids.contiguous(), positions.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x)
    library.run(
        "dropout_forward",
        x,
        DTYPES[x.dtype],
        x.data_ptr(),
        address(bias),
        address(residual),
        y.data_ptr(),
        sample_ids.data_ptr(),
        positions.data_ptr(),
        x.shape[1] if positions.dim() == 2 else 0,
        *x.shape,
        first_feature,
        key_first,
        key_second,
        threshold,
    )
    return y


def _forward_like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _bias_backward(
    dy: Tensor,
    sample_ids: Tensor,
    positions: Tensor,
    first_feature: int,
    key_first: int,
    key_second: int,
    threshold: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of bias."""
    dy, sample_ids, positions = dy.contiguous(), sample_ids.contiguous(), positions.contiguous()
    dx, dbias = torch.empty_like(dy), dy.new_empty(dy.shape[-1])
    library.run(
        "dropout_bias_backward",
        dy,
        DTYPES[dy.dtype],
        dy.data_ptr(),
        dx.data_ptr(),
        dbias.data_ptr(),
        sample_ids.data_ptr(),
        positions.data_ptr(),
        dy.shape[1] if positions.dim() == 2 else 0,
        *dy.shape,
        first_feature,
        key_first,
        key_second,
        threshold,
        scratch=(dy.shape[0] * dy.shape[1], dy.shape[2]),
    )
    return dx, dbias


class _Dropout(torch.autograd.Function):
    """Keeps nothing of x: sample ids and positions are enough. Linear, so its gradient is dropout again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        sample_ids: Tensor,
        positions: Tensor,
        *stream_of: int,
    ) -> Tensor:
        ctx.save_for_backward(sample_ids, positions)
        ctx.stream_of, ctx.has_bias, ctx.has_residual = stream_of, bias is not None, residual is not None
        return _forward(x, bias, residual, sample_ids, positions, *stream_of)  # type: ignore[call-arg]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (sample_ids, positions) = gradients, ctx.saved_tensors
        dresidual, dbias = dy if ctx.has_residual else None, None
        if torch.is_grad_enabled():  # a graph of the gradient is wanted
            dx = _Dropout.apply(dy, None, None, sample_ids, positions, *ctx.stream_of)
            dbias = dx.sum((0, 1)) if ctx.has_bias else None
        elif ctx.has_bias:
            dx, dbias = _bias_backward(dy, sample_ids, positions, *ctx.stream_of)
        else:
            dx = _forward(dy, None, None, sample_ids, positions, *ctx.stream_of)
        return dx, dbias, dresidual, None, None, None, None, None, None


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


# --- the library's form -------------------------------------------------------------------------------------------------

dropout_op = define(
    "dropout(Tensor x, Tensor? bias, Tensor? residual, Tensor sample_ids, Tensor positions, int first_feature,"
    " int key_first, int key_second, int threshold) -> Tensor",
    _forward,
    _forward_like,
)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, residual, sample_ids, positions, *ctx.stream_of = inputs
    ctx.save_for_backward(sample_ids, positions)
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None


def _library_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    sample_ids, positions = ctx.saved_tensors
    dx = dropout_op(dy, None, None, sample_ids, positions, *ctx.stream_of)
    dbias = dx.sum((0, 1)) if ctx.has_bias else None
    return dx, dbias, dy if ctx.has_residual else None, None, None, None, None, None, None


differentiate("dropout", _remember, _library_backward)
