"""Self-attention with heads dealt to tensor ranks and grouped key/value heads (Ainslie et al. 2023, GQA)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trilith.config.sparse_keys import DenseBlocks, SparseBlocks
from trilith.kernels import ops
from trilith.kernels.mask import AttentionMask, BlockLayout
from trilith.layers.linear import ColumnParallelLinear, RowParallelLinear
from trilith.layers.placement import Placement
from trilith.layers.recompute import recomputed
from trilith.layers.sparsity import differs_by_head, live_blocks


@dataclass(frozen=True)
class HeadShard:
    """The heads of one tensor rank: query heads [first, first + num_heads) and the key/value heads that they read.

    `kv_index[i]` is the local key/value head of local query head i; where the tensor degree is no multiple of K,
    a group of query heads may be cut, so the index need not be regular.
    """

    first: int
    num_heads: int
    num_kv_heads: int
    kv_index: tuple[int, ...]
    head_dim: int


@dataclass(frozen=True)
class AttentionDropout:
    """Dropout of attention probabilities: probability and the site's stream key."""

    p: float
    key: tuple[int, int]


def block_layout(sparse: SparseBlocks | None, heads: HeadShard, sequence_length: int, seed: int) -> BlockLayout | None:
    """The layout of a rank's `heads`: `live` (1 or its heads, S/block, S/block), on the CPU. None: all blocks."""
    if sparse is None or isinstance(sparse, DenseBlocks):
        return None
    num_blocks = sequence_length // sparse.block
    held = range(heads.first, heads.first + heads.num_heads) if differs_by_head(sparse) else range(1)
    rows = bytearray().join(line for head in held for line in live_blocks(sparse, head, num_blocks, seed))
    live = torch.frombuffer(rows, dtype=torch.bool).view(len(held), num_blocks, num_blocks)
    return BlockLayout(sparse.block, live)


class Attention(nn.Module):
    """output(softmax(q k^T / sqrt(D), mask) v) with q, k and v from one product of stacked weights.

    With `recompute` only the part between the two linears is computed again in backward.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: HeadShard,
        bias: bool,
        dropout: AttentionDropout,
        recompute: bool,
        placement: Placement,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.recompute = recompute
        self.backends = placement.backends
        queries, keys = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
        self.qkv = ColumnParallelLinear(hidden_size, queries + 2 * keys, bias, placement)
        self.output = RowParallelLinear(queries, hidden_size, bias, placement)

    def forward(
        self, x: Tensor, sample_ids: Tensor, mask: AttentionMask, rotary: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """(B, S/t or S, H) to the same shape; `rotary`: cos and sin (S, D/2). All ranks of the group must call it.

        `mask`: what each query sees, with the block layout (if any) of this rank's heads.
        """
        heads, qkv = self.heads, self.qkv(x)
        if rotary is not None:
            turned = heads.num_heads + heads.num_kv_heads
            qkv = ops.rotary_packed(qkv, turned, heads.head_dim, *rotary, backend=self.backends.rotary)
        core = (qkv, sample_ids, mask)
        return self.output(recomputed(self._mix, *core) if self.recompute else self._mix(*core))

    def _mix(self, qkv: Tensor, sample_ids: Tensor, mask: AttentionMask) -> Tensor:
        """The attention core: (B, S, (N/t + 2 local K) D) to (B, S, N/t D)."""
        heads = self.heads
        return ops.packed_attention(
            qkv,
            heads.num_heads,
            mask=mask,
            head_dim=heads.head_dim,
            kv_index=heads.kv_index,
            dropout_p=self.dropout.p if self.training else 0.0,
            key=self.dropout.key,
            sample_ids=sample_ids,
            head_range=(heads.first, heads.first + heads.num_heads),
            backend=self.backends.attention,
        )
