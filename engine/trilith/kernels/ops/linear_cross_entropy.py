"""The last product and the loss in one op, in chunks of tokens: the logits never exist whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trilith.errors import KernelError
from trilith.kernels import library
from trilith.kernels.library import DTYPES, address
from trilith.kernels.ops.cross_entropy import (
    cross_entropy_gradient,
    cross_entropy_terms,
    is_native,
    local_logit_max,
    log_normalisers,
    token_loss_gradient,
    token_losses,
)
from trilith.kernels.ops.library_form import define, differentiate
from trilith.kernels.reference import accumulation_dtype

# A chunk of logits is less than an eighth of all; more than this many tokens make the products no faster.
_PARTS, _MOST_TOKENS, _GRAIN = 9, 1024, 16
_PRODUCT_ROWS = 1024  # of the weight


@dataclass(frozen=True)
class SplitVocabulary:
    """A weight whose rows are the labels [first_label, first_label + num_valid), then padding; other ranks hold the others.

    `reduce(x, op)` replaces x, one number a token, by the `sum` or `max` over all ranks.
    """

    first_label: int
    num_valid: int
    reduce: Callable[[Tensor, str], None]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor | None = None,
    *,
    gradient_scale: float = 1.0,
    z_loss: float = 0.0,
    split: SplitVocabulary | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax(x weight^T)[label] over the tokens that count, and each token's loss (without gradient).

    With `z_loss` a token's loss also has so many times ln(sum of exp(logits))^2 (Chowdhery et al. 2022, "PaLM", section 5).

    x (T, H), weight (V, H), labels (T,) int64, loss_mask (T,) bool: tokens where it is False have loss and gradient 0,
    whatever their label. The sum is an fp64 scalar, the losses (T,) are in fp32, or fp64 where x is.

    Because only a scalar has a gradient, those of x and weight are made in forward, while a chunk of logits is there (Hsu
    et al. 2024, "Liger Kernel", section 3.2): as if the scalar's own were `gradient_scale`, and backward multiplies them
    where it is another. In fp16 keep it large enough for the smallest logit's gradient. They take memory between the two:
    it is meant for where backward follows at once. The extra memory is under an eighth of the logits' (natively; a second
    chunk otherwise). With `split`, x is whole on each rank, and its gradient is this rank's part of a sum.

    Raises KernelError where shapes or dtypes do not fit, and where backward runs a second time.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or labels.shape != x.shape[:1]:
        raise KernelError(
            f"linear_cross_entropy: x {tuple(x.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}: "
            "must be (T, H), (V, H) and (T,)"
        )
    if x.dtype != weight.dtype or (loss_mask is not None and loss_mask.shape != labels.shape):
        raise KernelError(f"linear_cross_entropy: x is {x.dtype}, weight {weight.dtype}: must be equal, a mask (T,)")
    if gradient_scale == 0.0:
        raise KernelError("linear_cross_entropy: gradient_scale = 0: must not be, gradients are divided by it")
    needs_x, needs_weight = (torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
    if split is None and is_native(x, backend) and library.is_traced(x):
        total, losses, _, _ = linear_cross_entropy_op(
            x, weight, labels, loss_mask, gradient_scale, z_loss, needs_x, needs_weight
        )
        return total, losses
    how = _How(gradient_scale, z_loss, needs_x, needs_weight, split, backend)
    total, losses = _LinearCrossEntropy.apply(x, weight, labels, loss_mask, how)
    return total, losses


@dataclass(frozen=True)
class _How:
    gradient_scale: float
    z_loss: float
    needs_x: bool
    needs_weight: bool
    split: SplitVocabulary | None
    backend: str


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps the gradients, each of its input's size."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor | None, how: _How
    ) -> tuple[Tensor, Tensor]:
        losses, dx, dweight = _chunks(x, weight, labels, loss_mask, how)
        ctx.mark_non_differentiable(losses)
        ctx.gradients = dx if how.needs_x else None, dweight if how.needs_weight else None
        ctx.scale = how.gradient_scale
        return losses.sum(dtype=torch.float64), losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise KernelError("linear_cross_entropy: backward a second time: its gradients were handed on")
        made, ctx.gradients = ctx.gradients, None
        # A GPU multiplies by whatever it is: to look would be to wait for it.
        if gradients[0].is_cuda or float(gradients[0]) != ctx.scale:
            factor = gradients[0] / ctx.scale
            made = tuple(gradient if gradient is None else gradient.mul_(factor) for gradient in made)
        return *made, None, None, None


def _chunk_tokens(num_tokens: int) -> int:
    """Equal chunks, because a small one at the end would read all weights, too; whole registers where that is allowed."""
    exact = -(-num_tokens // _PARTS)
    grained = -(-exact // _GRAIN) * _GRAIN
    return max(1, min(grained if 8 * grained < num_tokens else exact, _MOST_TOKENS))


def _chunks(
    x: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor | None, how: _How
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's loss, and where needed (else empty) the gradients of x and weight."""
    wide, (num_tokens, vocabulary) = accumulation_dtype(x.dtype), (len(x), len(weight))
    size = _chunk_tokens(num_tokens)
    scale = torch.full((num_tokens,), how.gradient_scale, dtype=wide, device=x.device)
    if loss_mask is not None:
        scale.masked_fill_(~loss_mask, 0.0)
    losses = torch.empty_like(scale)
    dx = torch.empty_like(x) if how.needs_x else x.new_empty(0)
    # A sum over chunks in 16 bits would lose what a single product keeps.
    make = torch.empty if num_tokens and wide == x.dtype else torch.zeros
    dweight = make(weight.shape if how.needs_weight else 0, dtype=wide, device=x.device)
    buffer = x.new_empty((min(size, num_tokens), vocabulary))
    for start in range(0, num_tokens, size):
        part = slice(start, min(start + size, num_tokens))
        logits = _logits(x[part], weight, buffer[: part.stop - start])
        losses[part] = _chunk(logits, labels[part], scale[part], how)
        if how.needs_x:
            torch.mm(logits, weight, out=dx[part])
        if how.needs_weight and dweight.dtype == x.dtype:
            dweight.addmm_(logits.t(), x[part], beta=1.0 if start else 0.0)
        elif how.needs_weight:
            dweight += logits.t() @ x[part]
    losses.masked_fill_(scale == 0.0, 0.0)
    return losses, dx, dweight.to(weight.dtype)


def _logits(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """x weight^T. On a CPU some rows of the weight at a time, which stay in the cache: few tokens are slow otherwise."""
    step = _PRODUCT_ROWS if x.device.type == "cpu" else len(weight)
    for start in range(0, len(weight), step):
        torch.mm(x, weight[start : start + step].t(), out=out[:, start : start + step])
    return out


def _chunk(logits: Tensor, labels: Tensor, scale: Tensor, how: _How) -> Tensor:
    """Losses of a chunk; its logits become their gradient, where one is needed."""
    needs_gradients, split, backend = how.needs_x or how.needs_weight, how.split, how.backend
    if split is not None:
        where = split.first_label, split.num_valid
        largest = local_logit_max(logits, split.num_valid, backend)
        split.reduce(largest, "max")
        sums = torch.stack(cross_entropy_terms(logits, labels, largest, *where, backend))
        split.reduce(sums, "sum")
        total, target = sums.unbind()
        more, of_softmax = with_z_loss(how.z_loss, lambda: total.log() + largest, scale)
        if needs_gradients:
            gradient_of: dict[str, Any] = {"softmax_scale": of_softmax, "out": logits, "backend": backend}
            cross_entropy_gradient(logits, labels, largest, total, scale, *where, **gradient_of)
        return total.log() - target + more
    if needs_gradients and is_native(logits, backend):
        return _fused(logits, labels, scale, how.z_loss)
    losses, kept = token_losses(logits, labels, backend)
    more, of_softmax = with_z_loss(how.z_loss, lambda: log_normalisers(logits, kept), scale)
    if needs_gradients:
        token_loss_gradient(logits, labels, scale, kept, softmax_scale=of_softmax, out=logits, backend=backend)
    return losses + more


def with_z_loss(
    z_loss: float, normalisers: Callable[[], Tensor], scale: Tensor
) -> tuple[Tensor | float, Tensor | None]:
    """What `z_loss` adds to each token's loss, and the softmax's scale in its gradient (None: the loss's own).

    `normalisers()` are ln(sum of exp(logits)) of each token, `scale` the gradient of its loss.
    """
    if z_loss == 0.0:
        return 0.0, None
    found = normalisers()
    return z_loss * found.square(), scale * (1.0 + 2.0 * z_loss * found)


def _fused(logits: Tensor, labels: Tensor, scale: Tensor, z_loss: float) -> Tensor:
    """Losses of a chunk; its logits become their gradient."""
    labels, losses = labels.contiguous(), torch.empty_like(scale)
    library.run(
        "cross_entropy_fused",
        logits,
        DTYPES[logits.dtype],
        address(logits),
        logits.shape[1],
        address(labels),
        0,
        logits.shape[1],
        logits.shape[1],
        len(logits),
        z_loss,
        address(scale),
        address(losses),
    )
    return losses


# --- the library's form -------------------------------------------------------------------------------------------------


def _library_forward(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    scale: float,
    z_loss: float,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses, dx, dweight = _chunks(x, weight, labels, mask, _How(scale, z_loss, needs_x, needs_weight, None, "auto"))
    return losses.sum(dtype=torch.float64), losses, dx, dweight


def _library_forward_like(
    x: Tensor, weight: Tensor, labels: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, needs_x, needs_weight = rest
    losses = x.new_empty(labels.shape, dtype=accumulation_dtype(x.dtype))
    dx = torch.empty_like(x) if needs_x else x.new_empty(0)
    return losses.new_empty((), dtype=torch.float64), losses, dx, weight.new_empty(weight.shape if needs_weight else 0)


linear_cross_entropy_op = define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor labels, Tensor? loss_mask, float gradient_scale, float z_loss,"
    " bool needs_x, bool needs_weight) -> (Tensor, Tensor, Tensor, Tensor)",
    _library_forward,
    _library_forward_like,
)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, ctx.scale, _, ctx.needs_x, ctx.needs_weight = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])


def _library_backward(ctx: Any, dtotal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight = ctx.saved_tensors
    factor = (dtotal / ctx.scale).to(accumulation_dtype(dx.dtype))
    made = dx * factor if ctx.needs_x else None, dweight * factor if ctx.needs_weight else None
    return *made, None, None, None, None, None, None


differentiate("linear_cross_entropy", _remember, _library_backward)
