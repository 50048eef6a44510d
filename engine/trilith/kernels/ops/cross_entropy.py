"""Cross-entropy over a vocabulary, whole or split over tensor ranks: layers/loss.py communicates between the parts.

    largest = local_logit_max(...)              all-reduce max
    total, target = cross_entropy_terms(...)    all-reduce sum of both; loss = ln(total) - target
    cross_entropy_gradient(...)                 with largest and total

Where a rank holds the whole vocabulary without padding, `token_losses` and `token_loss_gradient` do the same in fewer
passes.

A rank's logits (..., V) are the columns of the labels [first_label, first_label + num_valid); columns from
`num_valid` on are padding and count nowhere. Natively a row is read once for its terms and once for its gradient; torch's
ops work through pieces of tokens whose temporaries stay in the cache. A second tensor of the logits' size never exists,
but for the gradient itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from trilith.errors import KernelError
from trilith.kernels import library, reference
from trilith.kernels.library import DTYPES, address
from trilith.kernels.ops.library_form import define
from trilith.kernels.reference import accumulation_dtype

__all__ = [
    "cross_entropy_gradient",
    "cross_entropy_terms",
    "local_logit_max",
    "log_normalisers",
    "token_loss_gradient",
    "token_losses",
]

_CPU_PIECE = 1 << 17
_GPU_PIECE = 1 << 24


def _pieces(logits: Tensor) -> Iterator[slice]:
    """Slices of the tokens of logits (T, V)."""
    size = _CPU_PIECE if logits.device.type == "cpu" else _GPU_PIECE
    tokens = max(1, size // max(1, logits.shape[1]))
    for token in range(0, len(logits), tokens):
        yield slice(token, token + tokens)


def is_native(logits: Tensor, backend: str) -> bool:
    """Whether the native ops work on `logits`; raises KernelError where `backend` demands it and they cannot."""
    return library.takes("cross-entropy", backend, logits)


def local_logit_max(logits: Tensor, num_valid: int, backend: str = "auto") -> Tensor:
    """Largest logit of each token on this rank (...), widened; -inf where the rank holds no label."""
    if not is_native(logits, backend):
        return reference.local_logit_max(logits, num_valid)
    return logit_max_op(logits, num_valid) if library.is_traced(logits) else _logit_max(logits, num_valid)


def cross_entropy_terms(
    logits: Tensor, labels: Tensor, logit_max: Tensor, first_label: int, num_valid: int, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """This rank's part of sum(exp(logit - max)), and the label's logit - max (0 where another rank holds the label).

    `logits` (..., V), `labels` (...) int64, `logit_max` (...) the maximum over all ranks; both results are (...) in
    fp32, or fp64 where the logits are. No gradient flows: the caller's autograd.Function uses
    `cross_entropy_gradient`.
    """
    if is_native(logits, backend):
        run = terms_op if library.is_traced(logits) else _terms
        _, total, target, _ = run(logits, labels, logit_max, first_label, num_valid)
        return total, target
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
    softmax_scale: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """(softmax - onehot) * scale in the logits' shape and dtype; 0 in padding columns.

    `logit_max` and `sum_exp` (...) are those over all ranks: max + ln(sum) in one number would lose digits where logits
    are large. `scale` (...) is the gradient of each token's loss (0 masks the token). `softmax_scale` (...) stands in its
    place before the softmax, for losses that also depend on the sum alone. `out`, contiguous, may be the logits.
    """
    if is_native(logits, backend):
        arguments = (logits, labels, logit_max, sum_exp, scale, softmax_scale, first_label, num_valid)
        return gradient_op(*arguments) if library.is_traced(logits) else _gradient(*arguments, out)
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    source, target = logits.reshape(-1, logits.shape[-1]), gradient.view(-1, logits.shape[-1])
    column, held = reference.local_label_column(labels.reshape(-1, 1), first_label, num_valid)
    of_softmax = scale if softmax_scale is None else softmax_scale
    largest, factor = logit_max.reshape(-1, 1), (of_softmax / sum_exp).reshape(-1, 1)
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


def token_losses(logits: Tensor, labels: Tensor, backend: str = "auto") -> tuple[Tensor, tuple[Tensor, ...]]:
    """-log softmax(logits)[label] of each token, (...) in fp32, or fp64 where the logits are, and what the gradient needs.

    `logits` (..., V) are those of the whole vocabulary, `labels` (...) int64. A label that is not in [0, V) must be
    masked by the caller: its loss has no meaning. No gradient flows.
    """
    if is_native(logits, backend):
        run = terms_op if library.is_traced(logits) else _terms
        largest, total, _, losses = run(logits, labels, None, 0, logits.shape[-1])
        return losses, (largest, total)
    table, wide = logits.reshape(-1, logits.shape[-1]), accumulation_dtype(logits.dtype)
    column, held = reference.local_label_column(labels.reshape(-1, 1), 0, logits.shape[-1])
    losses = torch.empty(len(table), 1, dtype=wide, device=logits.device)
    for piece in _pieces(table):
        torch.gather(torch.log_softmax(table[piece], -1, dtype=wide), 1, column[piece], out=losses[piece])
    return losses.neg_().masked_fill_(~held, 0.0).view(labels.shape), ()


def token_loss_gradient(
    logits: Tensor,
    labels: Tensor,
    scale: Tensor,
    kept: tuple[Tensor, ...],
    *,
    softmax_scale: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """(softmax - onehot) * scale in the logits' shape and dtype, for the arguments and what is `kept` of `token_losses`.

    `scale` (...) is the gradient of each token's loss (0 masks the token), `softmax_scale` and `out` are as in
    `cross_entropy_gradient`.
    """
    if is_native(logits, backend):
        largest, total = kept[:2]
        more: dict[str, Any] = {"softmax_scale": softmax_scale, "out": out, "backend": backend}
        return cross_entropy_gradient(logits, labels, largest, total, scale, 0, logits.shape[-1], **more)
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    source, target = logits.reshape(-1, logits.shape[-1]), gradient.view(-1, logits.shape[-1])
    column, held = reference.local_label_column(labels.reshape(-1, 1), 0, logits.shape[-1])
    wide, factor = accumulation_dtype(logits.dtype), (scale if softmax_scale is None else softmax_scale).reshape(-1, 1)
    at_label = scale.reshape(-1, 1).masked_fill(~held, 0.0).neg_()
    for piece in _pieces(source):
        into = target[piece] if logits.dtype == wide else None
        values = torch.softmax(source[piece], -1, dtype=wide, out=into)
        values.mul_(factor[piece]).scatter_add_(1, column[piece], at_label[piece])
        if into is None:
            target[piece] = values
    return gradient


def log_normalisers(logits: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
    """ln(sum of exp(logit)) of each token (...), widened, for the logits (..., V) and what is `kept` of `token_losses`."""
    if kept:
        return kept[1].log() + kept[0]
    table, wide = logits.reshape(-1, logits.shape[-1]), accumulation_dtype(logits.dtype)
    found = torch.empty(len(table), dtype=wide, device=logits.device)
    for piece in _pieces(table):
        torch.logsumexp(table[piece].to(wide), -1, out=found[piece])
    return found.view(logits.shape[:-1])


# --- what runs natively -------------------------------------------------------------------------------------------------


def _table(logits: Tensor) -> Tensor:
    """Logits as rows of neighbours (T, V)."""
    table = logits.reshape(-1, logits.shape[-1])
    return table if table.stride(-1) == 1 or table.shape[-1] <= 1 else table.contiguous()


def _logit_max(logits: Tensor, num_valid: int) -> Tensor:
    table = _table(logits)
    largest = logits.new_empty(logits.shape[:-1], dtype=accumulation_dtype(logits.dtype))
    library.run(
        "logit_max",
        logits,
        DTYPES[logits.dtype],
        address(table),
        table.stride(0),
        num_valid,
        len(table),
        address(largest),
    )
    return largest


def _terms(
    logits: Tensor, labels: Tensor, logit_max: Tensor | None, first_label: int, num_valid: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each token: largest logit (found, or given), sum of exponentials, label's logit relative to the largest, loss."""
    table, wide = _table(logits), accumulation_dtype(logits.dtype)
    labels = _fitting(labels, "labels", logits, torch.int64)
    largest, total, target, losses = logits.new_empty((4, *labels.shape), dtype=wide).unbind()
    if logit_max is not None:
        largest.copy_(_fitting(logit_max, "logit_max", logits, wide))
    library.run(
        "cross_entropy_terms",
        logits,
        DTYPES[logits.dtype],
        address(table),
        table.stride(0),
        address(labels),
        first_label,
        num_valid,
        len(table),
        logit_max is None,
        address(largest),
        address(total),
        address(target),
        address(losses),
    )
    return largest, total, target, losses


def _gradient(
    logits: Tensor,
    labels: Tensor,
    logit_max: Tensor,
    sum_exp: Tensor,
    scale: Tensor,
    softmax_scale: Tensor | None,
    first_label: int,
    num_valid: int,
    out: Tensor | None = None,
) -> Tensor:
    gradient = logits.new_empty(logits.shape) if out is None else out
    if not gradient.is_contiguous() or gradient.shape != logits.shape or gradient.dtype != logits.dtype:
        raise KernelError(
            f"cross-entropy: out {tuple(gradient.shape)}: must be contiguous, of the logits' shape and dtype"
        )
    table, target, wide = _table(logits), gradient.view(-1, logits.shape[-1]), accumulation_dtype(logits.dtype)
    labels = _fitting(labels, "labels", logits, torch.int64)
    logit_max, sum_exp = _fitting(logit_max, "logit_max", logits, wide), _fitting(sum_exp, "sum_exp", logits, wide)
    scale = _fitting(scale, "scale", logits, scale.dtype).to(wide)
    if softmax_scale is not None:
        softmax_scale = _fitting(softmax_scale, "softmax_scale", logits, softmax_scale.dtype).to(wide)
    library.run(
        "cross_entropy_gradient",
        logits,
        DTYPES[logits.dtype],
        address(table),
        table.stride(0),
        address(labels),
        first_label,
        num_valid,
        logits.shape[-1],
        len(table),
        address(logit_max),
        address(sum_exp),
        address(scale),
        address(softmax_scale),
        address(target),
        target.stride(0),
    )
    if out is not None:
        torch.autograd.graph.increment_version(out)  # who kept it for backward learns that it has changed
    return gradient


def _fitting(x: Tensor, name: str, logits: Tensor, dtype: torch.dtype) -> Tensor:
    """One contiguous number a token."""
    if x.shape != logits.shape[:-1] or x.dtype != dtype or x.device != logits.device:
        raise KernelError(
            f"cross-entropy: {name} {tuple(x.shape)} {x.dtype} with logits {tuple(logits.shape)}: must be "
            f"{tuple(logits.shape[:-1])} {dtype}"
        )
    return x.contiguous()


def _terms_like(
    logits: Tensor, labels: Tensor, logit_max: Tensor | None, first_label: int, num_valid: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = logits.new_empty(labels.shape, dtype=accumulation_dtype(logits.dtype))
    return like, torch.empty_like(like), torch.empty_like(like), torch.empty_like(like)


logit_max_op = define(
    "logit_max(Tensor logits, int num_valid) -> Tensor",
    _logit_max,
    lambda logits, num_valid: logits.new_empty(logits.shape[:-1], dtype=accumulation_dtype(logits.dtype)),
)
terms_op = define(
    "cross_entropy_terms(Tensor logits, Tensor labels, Tensor? logit_max, int first_label, int num_valid)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda *arguments: tuple(x.clone() for x in _terms(*arguments)),
    _terms_like,
)
gradient_op = define(
    "cross_entropy_gradient(Tensor logits, Tensor labels, Tensor logit_max, Tensor sum_exp, Tensor scale,"
    " Tensor? softmax_scale, int first_label, int num_valid) -> Tensor",
    lambda *arguments: _gradient(*arguments),
    lambda logits, *_: logits.new_empty(logits.shape),
)
