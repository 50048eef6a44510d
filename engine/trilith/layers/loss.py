"""Cross-entropy over a vocabulary that is split over tensor ranks, without gathering logits.

After Shoeybi et al. 2019, section 3. Two collectives of (B, S): the maximum, then one sum that carries both the
partition function and the target's logit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trilith import comm
from trilith.kernels import ops
from trilith.layers.embedding import VocabularyShard
from trilith.topology import Group


@dataclass(frozen=True)
class LossSettings:
    """`backend` of the ops. `overwrites_logits`: backward puts the gradient in the place of the logits. `z_loss`: so many
    times ln(sum of exp(logits))^2 belong to each token's loss (Chowdhery et al. 2022, section 5)."""

    backend: str = "auto"
    overwrites_logits: bool = False
    z_loss: float = 0.0


def vocab_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    loss_mask: Tensor | None,
    shard: VocabularyShard,
    group: Group,
    how: LossSettings = LossSettings(),
) -> Tensor:
    """Loss of each token, -log softmax(logits)[label], (B, S) float32, or float64 where the logits are.

    logits (B, S, rows) are this rank's columns; those of padding rows do not count. labels (B, S) int64 are global
    tokens. Tokens where `loss_mask` (B, S) bool is False have loss and gradient 0, whatever their label. All ranks
    of `group` must call it, with the same labels and mask.
    """
    if group.size == 1 and logits.shape[-1] == shard.vocab_size:
        return _WholeCrossEntropy.apply(logits, labels, loss_mask, how)
    return _CrossEntropy.apply(logits, labels, loss_mask, shard, group, how)


def vocab_parallel_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    batch: tuple[Tensor, Tensor | None],
    shard: VocabularyShard,
    group: Group,
    gradient_scale: float,
    how: LossSettings = LossSettings(),
) -> Tensor:
    """The sum of the losses of `vocab_parallel_cross_entropy`, a float64 scalar, for the logits x weight^T.

    x (B, S, H), weight (rows, H), `batch` the labels and the mask (B, S). The logits never exist whole; the gradients of x
    (this rank's part of a sum) and of weight are made in forward (`ops.linear_cross_entropy`), as if that of the result
    were `gradient_scale`. All ranks of `group` must call it, with the same x.
    """

    def reduce(tensor: Tensor, op: str) -> None:
        comm.all_reduce(tensor, group, op=op).wait()

    split = None
    if group.size > 1 or len(weight) != shard.vocab_size:
        split = ops.SplitVocabulary(shard.first, shard.end - shard.first, reduce)
    labels, mask = (None if t is None else t.reshape(-1) for t in batch)
    assert labels is not None
    total, _ = ops.linear_cross_entropy(
        x.reshape(len(labels), -1),
        weight,
        labels,
        mask,
        gradient_scale=gradient_scale,
        z_loss=how.z_loss,
        split=split,
        backend=how.backend,
    )
    return total


class _WholeCrossEntropy(torch.autograd.Function):
    """One rank holds all columns: keeps the logits and natively two numbers a token."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, loss_mask: Tensor | None, how: LossSettings) -> Tensor:
        losses, kept = ops.token_losses(logits, labels, how.backend)
        normalisers = ops.log_normalisers(logits, kept) if how.z_loss else None
        if normalisers is not None:
            losses = losses + how.z_loss * normalisers.square()
        ctx.save_for_backward(logits, labels, loss_mask, normalisers, *kept)
        ctx.how = how
        return _counted(losses, loss_mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, loss_mask, normalisers, *kept = ctx.saved_tensors
        scale = _counted(gradients[0], loss_mask)
        _, of_softmax = ops.with_z_loss(ctx.how.z_loss, lambda: normalisers, scale)
        more: dict[str, Any] = {
            "softmax_scale": of_softmax,
            "out": _target(logits, ctx.how),
            "backend": ctx.how.backend,
        }
        return ops.token_loss_gradient(logits, labels, scale, tuple(kept), **more), None, None, None


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits and two numbers a token; the gradient softmax - onehot is made in one pass in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        loss_mask: Tensor | None,
        shard: VocabularyShard,
        group: Group,
        how: LossSettings,
    ) -> Tensor:
        held = (shard.first, shard.end - shard.first)
        largest = ops.local_logit_max(logits, held[1], how.backend)
        comm.all_reduce(largest, group, op="max").wait()
        sums = torch.stack(ops.cross_entropy_terms(logits, labels, largest, *held, how.backend))
        comm.all_reduce(sums, group).wait()
        total, target = sums.unbind()
        ctx.save_for_backward(logits, labels, largest, total, loss_mask)
        ctx.held, ctx.how = held, how
        losses = total.log() - target
        if how.z_loss:
            losses = losses + how.z_loss * (total.log() + largest).square()
        return _counted(losses, loss_mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, largest, total, loss_mask = ctx.saved_tensors
        scale = _counted(gradients[0], loss_mask)
        _, of_softmax = ops.with_z_loss(ctx.how.z_loss, lambda: total.log() + largest, scale)
        more: dict[str, Any] = {
            "softmax_scale": of_softmax,
            "out": _target(logits, ctx.how),
            "backend": ctx.how.backend,
        }
        gradient = ops.cross_entropy_gradient(logits, labels, largest, total, scale, *ctx.held, **more)
        return gradient, None, None, None, None, None


def _target(logits: Tensor, how: LossSettings) -> Tensor | None:
    """Where the gradient goes: the logits themselves where nobody needs them any more, None for a new tensor."""
    return logits.detach() if how.overwrites_logits and logits.is_contiguous() else None


def _counted(per_token: Tensor, loss_mask: Tensor | None) -> Tensor:
    """`per_token` (B, S) with 0 where the label does not count."""
    return per_token if loss_mask is None else per_token.masked_fill(~loss_mask, 0.0)
