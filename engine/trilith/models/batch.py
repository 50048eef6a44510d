"""One microbatch, as every stage sees it: each rank reads what its stages need from the pure sampler."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Microbatch:
    """B samples of S tokens.

    `tokens` (B, S) int64, which only the first stage reads; `labels` (B, S) int64, which only the last stage reads
    (None: it returns logits); `loss_mask` (B, S) bool, False where a label does not count (None: all count);
    `positions` (S,) int64; `sample_ids` (B,) int64, the samples' consumed indices, which their dropout depends on;
    `loss_weight` is 1 / target tokens of the whole step; `documents` (B, S) int64, numbers of the documents that are packed
    into a sample, whose tokens see each other only (None: it is one).
    """

    tokens: Tensor | None
    labels: Tensor | None
    loss_mask: Tensor | None
    positions: Tensor
    sample_ids: Tensor
    loss_weight: float = 1.0
    documents: Tensor | None = None
