"""Dropout whose mask belongs to the model: a function of site, sample, position and feature, not of the rank."""

from __future__ import annotations

from torch import Tensor, nn

from trilith.kernels import ops


class Dropout(nn.Module):
    """Zeroes features with probability `p` and scales the others, in training mode; the identity otherwise.

    `key` is the stream of this site (`rng.stream_key`): two sites with one key would drop the same features.
    """

    def __init__(self, p: float, key: tuple[int, int], backend: str = "auto") -> None:
        super().__init__()
        self.p = p
        self.key = key
        self.backend = backend

    def forward(self, x: Tensor, sample_ids: Tensor, positions: Tensor) -> Tensor:
        """x (B, S', H) at the global `positions` (S',) of the samples `sample_ids` (B,), both int64."""
        if not self.training or self.p == 0.0:
            return x
        return ops.dropout(x, self.p, self.key, sample_ids, positions, (0, x.shape[-1]), backend=self.backend)

    def add(self, x: Tensor, residual: Tensor, sample_ids: Tensor, positions: Tensor) -> Tensor:
        """residual (B, S', H) plus what `forward` makes of x, in one pass."""
        if not self.training or self.p == 0.0:
            return residual + x
        return ops.dropout_add(
            x, residual, self.p, self.key, sample_ids, positions, (0, x.shape[-1]), backend=self.backend
        )
