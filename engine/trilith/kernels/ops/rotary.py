"""Rotary position embedding (Su et al. 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilith.errors import KernelError
from trilith.kernels import library, reference
from trilith.kernels.library import DTYPES
from trilith.kernels.ops.library_form import define, differentiate
from trilith.kernels.reference import widened


def rotary(x: Tensor, cos: Tensor, sin: Tensor, backend: str = "auto") -> Tensor:
    """Rotate the pairs (i, i + D/2) of x (B, S, N, D); same shape and dtype.

    `cos` and `sin` (S, D/2), or (B, S, D/2), are fp32, or fp64 for fp64 activations; no gradient flows to them. Raises
    KernelError where the tables do not fit x.
    """
    if 2 * cos.shape[-1] != x.shape[-1]:
        raise KernelError(
            f"rotary: head dim {x.shape[-1]} with tables of {cos.shape[-1]} angles: must be twice as many"
        )
    if backend == "reference":
        return reference.rotary(x, cos, sin)
    if _is_native(x, cos, sin, backend):
        return rotary_op(x, cos, sin, False) if library.is_traced(x) else _Rotary.apply(x, cos, sin, False)
    return _TorchRotary.apply(x, cos, sin)


def rotary_packed(
    x: Tensor, num_turned: int, head_dim: int, cos: Tensor, sin: Tensor, *, backend: str = "auto"
) -> Tensor:
    """`rotary` of the first `num_turned` heads of x (B, S, heads * head_dim), as of packed queries, keys and values.

    The native op changes x itself, which nobody else may use any more; else the result is a new tensor.
    """
    heads = x.unflatten(-1, (-1, head_dim))
    is_plain = not library.is_traced(x) and x.stride(-1) == 1
    if is_plain and _is_native(heads, cos, sin, backend):
        return _PackedRotary.apply(x, num_turned, head_dim, cos, sin)
    turned = rotary(heads[:, :, :num_turned], cos, sin, backend)
    return torch.cat((turned, heads[:, :, num_turned:]), dim=2).flatten(2)


def _is_native(x: Tensor, cos: Tensor, sin: Tensor, backend: str) -> bool:
    if not library.takes("rotary", backend, x):
        return False
    wide = reference.accumulation_dtype(x.dtype)
    if cos.device != x.device or sin.device != x.device or not cos.dtype == sin.dtype == wide:
        if backend == "fused":
            raise KernelError(
                f"rotary: backend 'fused': tables are {cos.dtype} on {cos.device}: must be {wide} on {x.device}"
            )
        return False
    if (
        x.dim() != 4
        or cos.shape != sin.shape
        or cos.shape not in (x.shape[1:2] + cos.shape[-1:], x.shape[:2] + cos.shape[-1:])
    ):
        raise KernelError(
            f"rotary: x {tuple(x.shape)} with cos {tuple(cos.shape)} and sin {tuple(sin.shape)}: must be (B, S, N, D) "
            "and (S, D/2) or (B, S, D/2)"
        )
    return True


# --- what runs ----------------------------------------------------------------------------------------------------------


def _turn(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """x turned by the angles, or back. x may have any strides but within a head."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _turn_into(x, y, cos, sin, inverse)
    return y


def _turn_into(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """The same into y, which may be x."""
    cos, sin = cos.contiguous(), sin.contiguous()
    library.run(
        "rotary",
        x,
        DTYPES[x.dtype],
        x.data_ptr(),
        y.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        *x.shape[:3],
        x.shape[3] // 2,
        *x.stride()[:3],
        *y.stride()[:3],
        x.shape[1] * cos.shape[-1] if cos.dim() == 3 else 0,
        inverse,
    )


class _Rotary(torch.autograd.Function):
    """A rotation: its backward is the rotation back, so nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.inverse = inverse
        return _turn(x, cos, sin, inverse)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        turn = _Rotary.apply if torch.is_grad_enabled() else _turn  # the former where a graph of the gradient is wanted
        return turn(gradients[0], cos, sin, not ctx.inverse), None, None, None


class _PackedRotary(torch.autograd.Function):
    """The same in place, of the first heads of a tensor; what is behind them has its gradient as it comes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_turned: int, head_dim: int, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.about = num_turned, head_dim
        ctx.mark_dirty(x)
        turned = x.unflatten(-1, (-1, head_dim))[:, :, :num_turned]
        _turn_into(turned, turned, cos, sin, False)
        torch.autograd.graph.increment_version(x)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (num_turned, head_dim), (cos, sin) = ctx.about, ctx.saved_tensors
        given = gradients[0].contiguous().unflatten(-1, (-1, head_dim))
        result = torch.empty(given.shape, dtype=given.dtype)
        result[:, :, num_turned:] = given[:, :, num_turned:]
        _turn_into(given[:, :, :num_turned], result[:, :, :num_turned], cos, sin, True)
        return result.flatten(2), None, None, None, None


class _TorchRotary(torch.autograd.Function):
    """The same of torch's ops."""

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
        return _TorchRotary.apply(gradients[0], cos, -sin), None, None


# --- the library's form -------------------------------------------------------------------------------------------------

rotary_op = define(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor",
    _turn,
    lambda x, cos, sin, inverse: torch.empty_like(x, memory_format=torch.contiguous_format),
)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


differentiate(
    "rotary", _remember, lambda ctx, dy: (rotary_op(dy, *ctx.saved_tensors, not ctx.inverse), None, None, None)
)
