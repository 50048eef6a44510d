"""Softmax of scaled scores under a mask, for attention whose scores are a tensor of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilith.errors import KernelError
from trilith.kernels import library, reference
from trilith.kernels.library import DTYPES


def masked_softmax(
    x: Tensor, scale: float = 1.0, *, causal: bool = False, mask: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """softmax(scale x) over the last dim of scores x (B, N, Q, K), over keys that are seen; same shape and dtype.

    A query sees the keys where `mask`, bool and broadcastable to x, is True, and with `causal` none behind its own place,
    the last query being at the last key. A row that sees nothing is 0. There is a CUDA kernel; elsewhere plain torch runs.
    """
    if x.dim() != 4 or (mask is not None and mask.dtype != torch.bool):
        kind = "" if mask is None else f", mask {mask.dtype}"
        raise KernelError(f"masked_softmax: x {tuple(x.shape)}{kind}: must be (B, N, Q, K), a mask bool")
    if mask is not None:
        mask = mask.expand(x.shape)  # raises where it does not fit
    is_cuda = x.device.type == "cuda"
    if (is_cuda or backend == "fused") and library.takes("masked_softmax", backend, x) and not library.is_traced(x):
        return _MaskedSoftmax.apply(x, scale, causal, mask)
    return reference.masked_softmax(x, scale, causal, mask)


class _MaskedSoftmax(torch.autograd.Function):
    """Keeps its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
        x = x.contiguous()
        if mask is not None and mask.stride(-1) != 1:
            mask = mask.contiguous()
        y = torch.empty_like(x)
        where = (0, 0, 0, 0) if mask is None else (mask.data_ptr(), *mask.stride()[:3])
        library.run("softmax_forward", x, DTYPES[x.dtype], x.data_ptr(), y.data_ptr(), *x.shape, scale, causal, *where)
        ctx.save_for_backward(y)
        ctx.scale = scale
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        dy, keys = gradients[0].contiguous(), y.shape[-1]
        dx, rows = torch.empty_like(y), y.numel() // keys if keys else 0
        addresses = y.data_ptr(), dy.data_ptr(), dx.data_ptr()
        library.run("softmax_backward", y, DTYPES[y.dtype], *addresses, rows, keys, ctx.scale)
        return dx, None, None, None
