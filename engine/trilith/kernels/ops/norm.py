"""LayerNorm and RMSNorm of rows, alone or with the residual's sum, which a block computes beside each norm anyway."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trilith.errors import KernelError
from trilith.kernels import library, reference
from trilith.kernels.library import DTYPES, address
from trilith.kernels.ops.library_form import define, differentiate


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, backend: str = "auto") -> Tensor:
    """Rows of x (..., H) to mean 0 and variance 1, then times weight (H,) plus bias (H,); same shape and dtype."""
    if backend == "reference":
        return reference.layer_norm(x, weight, bias, eps)
    if _is_native(x, None, weight, bias, backend):
        return _native_norm(x, weight, bias, eps, False)
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str = "auto") -> Tensor:
    """Rows of x (..., H) to root mean square 1, then times weight (H,); same shape and dtype."""
    if backend == "reference":
        return reference.rms_norm(x, weight, eps)
    if _is_native(x, None, weight, None, backend):
        return _native_norm(x, weight, None, eps, True)
    return functional.rms_norm(x, weight.shape, weight, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """x + residual (both (..., H)), and its `layer_norm`: the two results in that order."""
    if _is_native(x, residual, weight, bias, backend):
        return _native_add_norm(x, residual, weight, bias, eps, False)
    total = x + residual
    return total, layer_norm(total, weight, bias, eps, backend)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """x + residual (both (..., H)), and its `rms_norm`: the two results in that order."""
    if _is_native(x, residual, weight, None, backend):
        return _native_add_norm(x, residual, weight, None, eps, True)
    total = x + residual
    return total, rms_norm(total, weight, eps, backend)


def _is_native(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, backend: str) -> bool:
    if not library.takes("norm", backend, x, residual, weight, bias):
        return False
    if x.shape[-1] != weight.shape[0] or (residual is not None and residual.shape != x.shape):
        raise KernelError(f"norm: x {tuple(x.shape)} with weight {tuple(weight.shape)}: the last dims must be equal")
    return True


def _native_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms: bool) -> Tensor:
    if library.is_traced(x):
        return norm_op(x, None, weight, bias, eps, is_rms)[0]
    return _Norm.apply(x, weight, bias, eps, is_rms)


def _native_add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms: bool
) -> tuple[Tensor, Tensor]:
    if library.is_traced(x):
        y, total, _, _ = norm_op(x, residual, weight, bias, eps, is_rms)
        return total, y
    return _AddNorm.apply(x, residual, weight, bias, eps, is_rms)


# --- what runs ----------------------------------------------------------------------------------------------------------


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, is_rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the sum (empty without a residual), and the rows' mean (empty for RMSNorm) and inverse deviation."""
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    y, total, mean, rstd = _forward_like(x, residual, weight, bias, eps, is_rms)
    width = x.shape[-1]
    library.run(
        "norm_forward",
        x,
        DTYPES[x.dtype],
        x.data_ptr(),
        address(residual),
        weight.data_ptr(),
        address(bias),
        0 if residual is None else total.data_ptr(),
        y.data_ptr(),
        0 if is_rms else mean.data_ptr(),
        rstd.data_ptr(),
        x.numel() // width if width else 0,
        width,
        eps,
    )
    return y, total, mean, rstd


def _forward_like(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, is_rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide, rows = reference.accumulation_dtype(x.dtype), x.shape[:-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x.new_empty(0) if residual is None else torch.empty_like(y)
    mean = x.new_empty(0 if is_rms else rows, dtype=wide)
    return y, total, mean, x.new_empty(rows, dtype=wide)


def _backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
    is_rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of weight, and of bias (empty without one). `x` is what was normed, `dtotal` its other gradient."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dtotal = None if dtotal is None else dtotal.contiguous()
    dx, dweight, dbias = _backward_like(dy, dtotal, x, weight, mean, rstd, has_bias, is_rms)
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    library.run(
        "norm_backward",
        x,
        DTYPES[x.dtype],
        dy.data_ptr(),
        address(dtotal),
        x.data_ptr(),
        weight.data_ptr(),
        0 if is_rms else mean.data_ptr(),
        rstd.data_ptr(),
        dx.data_ptr(),
        dweight.data_ptr(),
        dbias.data_ptr() if has_bias else 0,
        rows,
        width,
        scratch=(rows, width),
    )
    return dx, dweight, dbias


def _backward_like(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
    is_rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return dx, dweight, torch.empty_like(dweight) if has_bias else weight.new_empty(0)


class _Norm(torch.autograd.Function):
    """Keeps x and two numbers a row (one for RMSNorm)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms: bool) -> Tensor:
        y, _, mean, rstd = _forward(x, None, weight, bias, eps, is_rms)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.has_bias, ctx.is_rms = bias is not None, is_rms
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = _backward(gradients[0], None, x, weight, mean, rstd, ctx.has_bias, ctx.is_rms)
        return dx, dweight, dbias if ctx.has_bias else None, None, None


class _AddNorm(torch.autograd.Function):
    """The sum is a result and what backward reads; x and residual have one gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms: bool
    ) -> tuple[Tensor, Tensor]:
        y, total, mean, rstd = _forward(x, residual, weight, bias, eps, is_rms)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.has_bias, ctx.is_rms = bias is not None, is_rms
        return total, y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dtotal, dy = gradients
        total, weight, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = _backward(dy, dtotal, total, weight, mean, rstd, ctx.has_bias, ctx.is_rms)
        return dx, dx, dweight, dbias if ctx.has_bias else None, None, None


# --- the library's form -------------------------------------------------------------------------------------------------

norm_op = define(
    "norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool is_rms)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_like,
)
norm_backward_op = define(
    "norm_backward(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool has_bias,"
    " bool is_rms) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_like,
)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _, is_rms = inputs
    _, total, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd, *([total] if residual is None else []))
    ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
    ctx.has_residual, ctx.has_bias, ctx.is_rms = residual is not None, bias is not None, is_rms


def _library_backward(ctx: Any, dy: Tensor, dtotal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    given = dtotal if ctx.has_residual else None
    dx, dweight, dbias = norm_backward_op(dy, given, *ctx.saved_tensors, ctx.has_bias, ctx.is_rms)
    return dx, dx if ctx.has_residual else None, dweight, dbias if ctx.has_bias else None, None, None


differentiate("norm", _remember, _library_backward)
