"""Which keys a query of attention sees, as data: the reference and every kernel read the same value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trilith.errors import KernelError


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """A query at position x sees the key at position y where all that is set allows it.

    `causal`: y <= x. `window` w: also y > x - w. `prefix` (B,) int64, with causal and without window: keys at positions
    before it are seen by all queries of the sample (ChatGLM, Du et al. 2022). `slopes` (N,): the score of head h gets
    slopes[h] * (y - x) added (ALiBi, Press et al. 2022). `query_positions` (S,) or (B, S) and `key_positions`, int64, are
    the positions where they are not 0, 1, 2, ... (packed or reordered sequences).
    """

    causal: bool = True
    window: int | None = None
    prefix: Tensor | None = None
    slopes: Tensor | None = None
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether `causal` says it all."""
        parts = (self.window, self.prefix, self.slopes, self.query_positions, self.key_positions)
        return all(part is None for part in parts)

    def check(self, batch: int, num_queries: int, num_keys: int, num_heads: int) -> None:
        """Raises KernelError where a part does not fit the tensors or another part."""
        if self.causal and num_queries != num_keys and (self.query_positions is None or self.key_positions is None):
            raise KernelError(f"attention: causal with {num_queries} queries and {num_keys} keys: must be equal")
        if self.window is not None and self.window < 1:
            raise KernelError(f"attention: mask.window = {self.window}: must be at least 1")
        if self.prefix is not None and (not self.causal or self.window is not None):
            raise KernelError("attention: mask.prefix goes with causal and without a window")
        shapes = (
            ("prefix", self.prefix, ((batch,),), torch.int64),
            ("query_positions", self.query_positions, ((num_queries,), (batch, num_queries)), torch.int64),
            ("key_positions", self.key_positions, ((num_keys,), (batch, num_keys)), torch.int64),
            ("slopes", self.slopes, ((num_heads,),), None),
        )
        for name, value, allowed, dtype in shapes:
            if value is not None and (tuple(value.shape) not in allowed or (dtype and value.dtype != dtype)):
                wanted = " or ".join(map(str, allowed)) + (f" {dtype}" if dtype else "")
                raise KernelError(f"attention: mask.{name} is {tuple(value.shape)} {value.dtype}: must be {wanted}")

    def positions(self, num_queries: int, num_keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions of queries (1 or B, S, 1) and of keys (1 or B, 1, S')."""
        queries, keys = self.query_positions, self.key_positions
        queries = torch.arange(num_queries, device=device) if queries is None else queries
        keys = torch.arange(num_keys, device=device) if keys is None else keys
        return (queries[None] if queries.dim() == 1 else queries)[:, :, None], (
            keys[None] if keys.dim() == 1 else keys
        )[:, None, :]

    def visible(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
        """Bool (1 or B, 1, S, S'): which keys are seen; None: all."""
        if not self.causal and self.window is None:
            return None
        queries, keys = self.positions(num_queries, num_keys, device)
        seen = keys <= queries if self.causal else torch.ones_like(keys <= queries)
        if self.window is not None:
            seen = seen & (keys > queries - self.window)
        if self.prefix is not None:
            seen = seen | (keys < self.prefix[:, None, None])
        return seen[:, None]

    def bias(self, num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """(1 or B, N, S, S') in `dtype`: what is added to the scores; None: nothing."""
        if self.slopes is None:
            return None
        queries, keys = self.positions(num_queries, num_keys, device)
        return self.slopes.to(device=device, dtype=dtype)[None, :, None, None] * (keys - queries).to(dtype)[:, None]


CAUSAL, FULL = AttentionMask(), AttentionMask(causal=False)
