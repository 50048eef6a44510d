"""Token embedding, its vocabulary split over tensor ranks (Shoeybi et al. 2019, section 3); learned positions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from trilith.layers.placement import Placement


@dataclass(frozen=True)
class VocabularyShard:
    """The tokens [first, end) whose rows a rank holds, of `vocab_size`; `rows` >= end - first counts padding rows too.

    Padding rows must hold finite values: they never reach a result, but 0 times NaN would.
    """

    first: int
    end: int
    rows: int
    vocab_size: int

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds every token."""
        return self.first == 0 and self.end == self.vocab_size


class VocabParallelEmbedding(nn.Module):
    """Rows of the token embedding; tokens of other ranks count zero here and come in with the sum over ranks."""

    def __init__(self, shard: VocabularyShard, hidden_size: int, placement: Placement) -> None:
        super().__init__()
        self.shard = shard
        self.placement = placement
        self.weight = placement.parameter(shard.rows, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, S) int64 to (B, S/t or S, H) of the sequence region. All ranks of the group must call it."""
        if self.shard.is_whole:
            return self.placement.leave(functional.embedding(tokens, self.weight))
        elsewhere = (tokens < self.shard.first) | (tokens >= self.shard.end)
        rows = (tokens - self.shard.first).masked_fill(elsewhere, 0)
        partial = functional.embedding(rows, self.weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return self.placement.leave(partial)


class PositionEmbedding(nn.Module):
    """Learned absolute positions, whole on each rank, looked up for the positions of the sequence region."""

    def __init__(self, sequence_length: int, hidden_size: int, placement: Placement) -> None:
        super().__init__()
        self.weight = placement.parameter(sequence_length, hidden_size)

    def forward(self, positions: Tensor) -> Tensor:
        """Positions (S/t or S,) int64 to (S/t or S, H)."""
        return functional.embedding(positions, self.weight)
