"""The last product and the loss in one op, in chunks of tokens: the logits never exist whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilith.errors import KernelError
from trilith.kernels import library
from trilith.kernels.library import CPU, DTYPES, address
from trilith.kernels.ops.cross_entropy import is_native, token_loss_gradient, token_losses
from trilith.kernels.ops.library_form import define, differentiate
from trilith.kernels.reference import accumulation_dtype

# A chunk of logits is less than an eighth of all; more than this many tokens make the products no faster.
_PARTS, _MOST_TOKENS = 9, 1024


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax(x weight^T)[label] over the tokens that count, and each token's loss (without gradient).

    x (T, H), weight (V, H), labels (T,) int64, loss_mask (T,) bool: tokens where it is False have loss and gradient 0,
    whatever their label. Both results in fp32, or fp64 where x is; the second (T,).

    Because only a scalar has a gradient, those of x and weight are made in forward, while a chunk of logits is there, and
    backward scales them (Hsu et al. 2024, "Liger Kernel", section 3.2). So they take memory between the two: it is meant
    for where backward follows at once. The extra memory is under an eighth of the logits' (natively; a second chunk
    otherwise). Raises KernelError where shapes or dtypes do not fit.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or labels.shape != x.shape[:1]:
        raise KernelError(
            f"linear_cross_entropy: x {tuple(x.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}: "
            "must be (T, H), (V, H) and (T,)"
        )
    if x.dtype != weight.dtype or (loss_mask is not None and loss_mask.shape != labels.shape):
        raise KernelError(f"linear_cross_entropy: x is {x.dtype}, weight {weight.dtype}: must be equal, a mask (T,)")
    if is_native(x, backend) and library.is_traced(x):
        total, losses, _, _ = linear_cross_entropy_op(x, weight, labels, loss_mask)
        return total, losses
    total, losses = _LinearCrossEntropy.apply(x, weight, labels, loss_mask, backend)
    return total, losses


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps the gradients, each of its input's size."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        losses, dx, dweight = _chunks(x, weight, labels, loss_mask, needed, backend)
        ctx.mark_non_differentiable(losses)
        ctx.gradients = dx, dweight
        return losses.sum(), losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise KernelError("linear_cross_entropy: backward a second time: its gradients were handed on")
        (dx, dweight), ctx.gradients = ctx.gradients, None
        if float(gradients[0]) != 1.0:
            dx, dweight = dx.mul_(gradients[0]), dweight.mul_(gradients[0])
        return dx, dweight, None, None, None


def _chunk_tokens(num_tokens: int) -> int:
    return max(1, min(num_tokens // _PARTS, _MOST_TOKENS))


def _chunks(
    x: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor | None, needs_gradients: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's loss, and where needed the gradients of their sum to x and weight."""
    wide, (num_tokens, vocabulary) = accumulation_dtype(x.dtype), (len(x), len(weight))
    size, native = _chunk_tokens(num_tokens), is_native(x, backend)
    scale = torch.ones(num_tokens, dtype=wide, device=x.device)
    if loss_mask is not None:
        scale.masked_fill_(~loss_mask, 0.0)
    losses = torch.empty_like(scale)
    dx = torch.empty_like(x) if needs_gradients else x.new_empty(0)
    # A sum over chunks in 16 bits would lose what a single product keeps.
    dweight = torch.zeros(weight.shape, dtype=wide, device=x.device) if needs_gradients else x.new_empty(0, dtype=wide)
    buffer = x.new_empty((size, vocabulary))
    for start in range(0, num_tokens, size):
        part = slice(start, min(start + size, num_tokens))
        logits = buffer[: part.stop - start]
        torch.mm(x[part], weight.t(), out=logits)
        if native and needs_gradients:
            losses[part] = _fused(logits, labels[part], scale[part])
        else:
            losses[part], kept = token_losses(logits, labels[part], backend)
            if needs_gradients:
                token_loss_gradient(logits, labels[part], scale[part], kept, out=logits, backend=backend)
        if needs_gradients:
            torch.mm(logits, weight, out=dx[part])
            if dweight.dtype == x.dtype:
                dweight.addmm_(logits.t(), x[part])
            else:
                dweight += logits.t() @ x[part]
    losses.masked_fill_(scale == 0.0, 0.0)
    return losses, dx, dweight.to(weight.dtype)


def _fused(logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Losses of a chunk; its logits become their gradient."""
    labels, losses = labels.contiguous(), torch.empty_like(scale)
    CPU.cross_entropy_fused(
        DTYPES[logits.dtype],
        address(logits),
        logits.shape[1],
        address(labels),
        0,
        logits.shape[1],
        logits.shape[1],
        len(logits),
        address(scale),
        address(losses),
        torch.get_num_threads(),
    )
    return losses


# --- the library's form -------------------------------------------------------------------------------------------------


def _library_forward(
    x: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses, dx, dweight = _chunks(x, weight, labels, loss_mask, True, "auto")
    return losses.sum(), losses, dx, dweight


def _library_forward_like(
    x: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses = x.new_empty(labels.shape, dtype=accumulation_dtype(x.dtype))
    return losses.new_empty(()), losses, torch.empty_like(x), torch.empty_like(weight)


linear_cross_entropy_op = define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor labels, Tensor? loss_mask) -> (Tensor, Tensor, Tensor, Tensor)",
    _library_forward,
    _library_forward_like,
)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])


def _library_backward(ctx: Any, dtotal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight = ctx.saved_tensors
    return dx * dtotal.to(dx.dtype), dweight * dtotal.to(dweight.dtype), None, None


differentiate("linear_cross_entropy", _remember, _library_backward)
