"""Which keys a query of attention sees, as data: the reference and every kernel read the same value."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from trilith.errors import KernelError

BLOCK_GRAIN = 16


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Which blocks of scores are computed at all (block-sparse attention, Child et al. 2019).

    `live` (1 or N, ceil(S / size), ceil(S' / size)) bool: a block of `size` queries and `size` keys, for all heads or by
    head. `size` is a multiple of 16.
    """

    size: int
    live: Tensor

    def check(self, num_queries: int, num_keys: int, num_heads: int) -> None:
        """Raises KernelError where it does not fit."""
        if self.size < BLOCK_GRAIN or self.size % BLOCK_GRAIN:
            raise KernelError(f"attention: mask.blocks.size = {self.size}: must be a multiple of {BLOCK_GRAIN}")
        rows, columns = -(-num_queries // self.size), -(-num_keys // self.size)
        allowed = ((1, rows, columns), (num_heads, rows, columns))
        if tuple(self.live.shape) not in allowed or self.live.dtype != torch.bool:
            raise KernelError(
                f"attention: mask.blocks.live is {tuple(self.live.shape)} {self.live.dtype}: must be {allowed[0]} or "
                f"{allowed[1]} bool for {num_queries} queries and {num_keys} keys in blocks of {self.size}"
            )

    def of_heads(self, first: int, count: int) -> BlockLayout:
        """The layout of `count` heads from the `first` on."""
        return self if len(self.live) == 1 else BlockLayout(self.size, self.live[first : first + count])


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """A query at position x sees the key at position y where all that is set allows it.

    `causal`: y <= x. `window` w: also y > x - w. `prefix` (B,) int64, with causal and without window: keys at positions
    before it are seen by all queries of the sample (ChatGLM, Du et al. 2022). `slopes` (N,): the score of head h gets
    slopes[h] * (y - x) added (ALiBi, Press et al. 2022). `query_positions` (S,) or (B, S) and `key_positions`, int64, are
    the positions where they are not 0, 1, 2, ... (packed or reordered sequences). `key_begins` and `key_ends`, int64 of the
    shape of query positions: the keys that a query may see at all, by their place in memory, begin <= place < end, as of
    the documents of a packed sample (`document_mask`). `blocks`: scores outside of its live blocks are not computed.
    """

    causal: bool = True
    window: int | None = None
    prefix: Tensor | None = None
    slopes: Tensor | None = None
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None
    key_begins: Tensor | None = None
    key_ends: Tensor | None = None
    blocks: BlockLayout | None = None

    @property
    def is_plain(self) -> bool:
        """Whether `causal` says it all."""
        return all(getattr(self, field.name) is None for field in fields(self) if field.name != "causal")

    def check(self, batch: int, num_queries: int, num_keys: int, num_heads: int) -> None:
        """Raises KernelError where a part does not fit the tensors or another part."""
        if self.causal and num_queries != num_keys and (self.query_positions is None or self.key_positions is None):
            raise KernelError(f"attention: causal with {num_queries} queries and {num_keys} keys: must be equal")
        if self.window is not None and self.window < 1:
            raise KernelError(f"attention: mask.window = {self.window}: must be at least 1")
        if self.prefix is not None and (not self.causal or self.window is not None):
            raise KernelError("attention: mask.prefix goes with causal and without a window")
        if (self.key_begins is None) != (self.key_ends is None):
            raise KernelError("attention: mask.key_begins and mask.key_ends go together")
        if self.blocks is not None:
            self.blocks.check(num_queries, num_keys, num_heads)
        shapes = (
            ("prefix", self.prefix, ((batch,),), torch.int64),
            ("query_positions", self.query_positions, ((num_queries,), (batch, num_queries)), torch.int64),
            ("key_positions", self.key_positions, ((num_keys,), (batch, num_keys)), torch.int64),
            ("key_begins", self.key_begins, ((num_queries,), (batch, num_queries)), torch.int64),
            ("key_ends", self.key_ends, ((num_queries,), (batch, num_queries)), torch.int64),
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
        """Bool (1 or B, 1 or N, S, S'): which keys are seen; None: all."""
        seen = self._visible_positions(num_queries, num_keys, device)
        if self.key_begins is not None and self.key_ends is not None:
            places = torch.arange(num_keys, device=device)
            begins, ends = (x.reshape(-1, 1, num_queries, 1) for x in (self.key_begins, self.key_ends))
            seen = _both(seen, (places >= begins) & (places < ends))
        if self.blocks is not None:
            size = self.blocks.size
            live = self.blocks.live.repeat_interleave(size, 1)[:, :num_queries].repeat_interleave(size, 2)[
                ..., :num_keys
            ]
            seen = _both(seen, live[None].to(device))
        return seen

    def _visible_positions(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
        """What positions allow, (1 or B, 1, S, S')."""
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


def _both(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one & other


def document_mask(documents: Tensor, causal: bool = True) -> AttentionMask:
    """The mask of packed samples: tokens see those of their own document only.

    `documents` (S,) or (B, S): any number for each token, equal for neighbours of one document. Positions count through.
    """
    starts = functional.pad(documents[..., 1:] != documents[..., :-1], (1, 0), value=True)
    number = starts.cumsum(-1) - 1
    length = documents.shape[-1]
    places = torch.arange(length, device=documents.device).expand_as(documents)
    begins = torch.where(starts, places, 0).cummax(-1).values
    sizes = torch.zeros_like(number).scatter_add_(-1, number, torch.ones_like(number))
    return AttentionMask(causal=causal, key_begins=begins, key_ends=begins + sizes.gather(-1, number))


def packed_mask(cu_seqlens: Tensor, causal: bool = True) -> AttentionMask:
    """The mask of sequences of any lengths one behind the other in one sample.

    `cu_seqlens` (n + 1,) integers: where each begins, from 0 on, and where the last one ends (as in flash-attention).
    """
    lengths = cu_seqlens.diff()
    if cu_seqlens.dim() != 1 or int(cu_seqlens[0]) != 0 or int(lengths.min()) < 0:
        raise KernelError(f"attention: cu_seqlens {cu_seqlens.tolist()}: must begin with 0 and never fall")
    numbers = torch.arange(len(lengths), device=cu_seqlens.device)
    return document_mask(numbers.repeat_interleave(lengths), causal)


CAUSAL, FULL = AttentionMask(), AttentionMask(causal=False)
