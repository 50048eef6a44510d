"""Cross-entropy over a vocabulary, whole or split over tensor ranks: layers/loss.py communicates between the parts.

    largest = local_logit_max(...)              all-reduce max
    total, target = cross_entropy_terms(...)    all-reduce sum of both; loss = ln(total) - target
    cross_entropy_gradient(...)                 with largest and total

Where a rank holds the whole vocabulary without padding, `token_losses` and `token_loss_gradient` do the same in fewer
passes.

A rank's logits (..., V) are the columns of the labels [first_label, first_label + num_valid); columns from
`num_valid` on are padding and count nowhere. Tokens are worked through in pieces whose temporaries stay in the
cache: a second tensor of the logits' size never exists, but for the gradient itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trilith.kernels import reference
from trilith.kernels.reference import accumulation_dtype, local_logit_max

__all__ = ["cross_entropy_gradient", "cross_entropy_terms", "local_logit_max", "token_loss_gradient", "token_losses"]

_CPU_PIECE = 1 << 17
_GPU_PIECE = 1 << 24


def _pieces(logits: Tensor) -> Iterator[slice]:
    """Slices of the tokens of logits (T, V)."""
    size = _CPU_PIECE if logits.device.type == "cpu" else _GPU_PIECE
    tokens = max(1, size // max(1, logits.shape[1]))
    for token in range(0, len(logits), tokens):
        yield slice(token, token + tokens)


def cross_entropy_terms(
    logits: Tensor, labels: Tensor, logit_max: Tensor, first_label: int, num_valid: int
) -> tuple[Tensor, Tensor]:
    """This rank's part of sum(exp(logit - max)), and the label's logit - max (0 where another rank holds the label).

    `logits` (..., V), `labels` (...) int64, `logit_max` (...) the maximum over all ranks; both results are (...) in
    fp32, or fp64 where the logits are. No gradient flows: the caller's autograd.Function uses
    `cross_entropy_gradient`.
    """
    target = reference.local_target_logit(logits, labels, logit_max, first_label, num_valid)
    table = logits.reshape(-1, logits.shape[-1])
    largest = logit_max.reshape(-1, 1)
    total = torch.empty_like(logit_max).reshape(-1)
    for piece in _pieces(table):
        shifted = table[piece, :num_valid] - largest[piece]
        torch.sum(shifted.exp_(), dim=-1, out=total[piece])
    return total.view(logit_max.shape), target


def cross_entropy_gradient(
    logits: Tensor,
    labels: Tensor,
    logit_max: Tensor,
    sum_exp: Tensor,
    scale: Tensor,
    first_label: int,
    num_valid: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """(softmax - onehot) * scale in the logits' shape and dtype; 0 in padding columns.

    `logit_max` and `sum_exp` (...) are those over all ranks: max + ln(sum) in one number would lose digits where logits
    are large. `scale` (...) is the gradient of each token's loss (0 masks the token). `out`, contiguous, may be the
    logits themselves.
    """
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    source, target = logits.reshape(-1, logits.shape[-1]), gradient.view(-1, logits.shape[-1])
    column, held = reference.local_label_column(labels.reshape(-1, 1), first_label, num_valid)
    largest, factor = logit_max.reshape(-1, 1), (scale / sum_exp).reshape(-1, 1)
    at_label = scale.reshape(-1, 1).masked_fill(~held, 0.0).neg_()
    wide = accumulation_dtype(logits.dtype)
    for piece in _pieces(source):
        into = target[piece, :num_valid] if logits.dtype == wide else None
        values = torch.sub(source[piece, :num_valid], largest[piece], out=into).exp_().mul_(factor[piece])
        if num_valid:
            values.scatter_add_(1, column[piece], at_label[piece])
        if into is None:
            target[piece, :num_valid] = values
    target[:, num_valid:] = 0
    return gradient


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] of each token, (...) in fp32, or fp64 where the logits are; no gradient flows.

    `logits` (..., V) are those of the whole vocabulary, `labels` (...) int64. A label that is not in [0, V) must be
    masked by the caller: its loss is 0.
    """
    table, wide = logits.reshape(-1, logits.shape[-1]), accumulation_dtype(logits.dtype)
    column, held = reference.local_label_column(labels.reshape(-1, 1), 0, logits.shape[-1])
    losses = torch.empty(len(table), 1, dtype=wide, device=logits.device)
    for piece in _pieces(table):
        torch.gather(torch.log_softmax(table[piece], -1, dtype=wide), 1, column[piece], out=losses[piece])
    return losses.neg_().masked_fill_(~held, 0.0).view(labels.shape)


def token_loss_gradient(logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """(softmax - onehot) * scale in the logits' shape and dtype, for the arguments of `token_losses`.

    `scale` (...) is the gradient of each token's loss (0 masks the token).
    """
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    source, target = logits.reshape(-1, logits.shape[-1]), gradient.view(-1, logits.shape[-1])
    column, held = reference.local_label_column(labels.reshape(-1, 1), 0, logits.shape[-1])
    wide, factor = accumulation_dtype(logits.dtype), scale.reshape(-1, 1)
    at_label = factor.masked_fill(~held, 0.0).neg_()
    for piece in _pieces(source):
        into = target[piece] if logits.dtype == wide else None
        values = torch.softmax(source[piece], -1, dtype=wide, out=into)
        values.mul_(factor[piece]).scatter_add_(1, column[piece], at_label[piece])
        if into is None:
            target[piece] = values
    return gradient
