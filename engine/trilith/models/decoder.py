"""The modules that all decoder-only families share: settings of a stage, head and vocabulary shards, the head."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trilith.config.model_keys import ModelConfig
from trilith.config.sparse_keys import SparseBlocks
from trilith.kernels.mask import AttentionMask, BlockLayout
from trilith.layers.attention import Attention, AttentionDropout, HeadShard, block_layout
from trilith.layers.dropout import Dropout
from trilith.layers.embedding import VocabularyShard
from trilith.layers.linear import ColumnParallelLinear
from trilith.layers.loss import LossSettings, vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy
from trilith.layers.placement import Placement
from trilith.layers.recompute import SELECTIVE
from trilith.models.batch import Microbatch
from trilith.models.decoder_declaration import head_dim, kv_split, vocabulary_split
from trilith.rng import stream_key
from trilith.topology import Group


@dataclass(frozen=True)
class StageSettings:
    """What every unit of a stage is built from. `recompute` is `none`, `selective` or `full`; `seed` is the run's.

    `fused_loss`: the last product and the loss are one op, which never holds the logits whole and makes their gradients in
    forward (`ops.linear_cross_entropy`): for last stages whose backward follows at once. `z_loss`: see LossSettings.
    `sparse`: which blocks of scores attention computes, in all layers alike; None: all.
    """

    model: ModelConfig
    placement: Placement
    seed: int
    recompute: str
    fused_loss: bool = False
    z_loss: float = 0.0
    sparse: SparseBlocks | None = None

    def dropout(self, site: str) -> Dropout:
        """Dropout of the residual stream at `site`, a canonical name such as `layers.3.mlp`."""
        key = stream_key(self.seed, "dropout", site)
        return Dropout(self.model.dropout, key, self.placement.backends.dropout)

    def attention(self, unit: str) -> Attention:
        """The attention of the block `unit`."""
        model = self.model
        return Attention(
            model.hidden_size,
            head_shard(model, self.placement.group),
            model.linear_bias,
            AttentionDropout(
                model.attention_dropout, stream_key(self.seed, "dropout", f"{unit}.attention.probabilities")
            ),
            self.recompute == SELECTIVE,
            self.placement,
        )

    def block_layout(self) -> BlockLayout | None:
        """The live blocks of this rank's heads; None: all."""
        heads = head_shard(self.model, self.placement.group)
        return block_layout(self.sparse, heads, self.model.sequence_length, self.seed)

    @property
    def ffn_features(self) -> int:
        """F/t: inner MLP features of this rank."""
        return self.model.ffn_hidden_size // self.placement.group.size


@dataclass(frozen=True)
class StageInput:
    """A microbatch with what the units of a stage share.

    `region_positions` (S/t or S,) are the positions that this rank holds in the sequence region; `rotary` are cos
    and sin (S, D/2) of all positions, for families that rotate; `mask` is what the queries of its heads see.
    """

    batch: Microbatch
    region_positions: Tensor
    rotary: tuple[Tensor, Tensor] | None
    mask: AttentionMask


def head_shard(model: ModelConfig, group: Group) -> HeadShard:
    """The query heads of this tensor rank and the key/value heads that they read."""
    num_heads = model.num_heads // group.size
    first = group.index * num_heads
    first_kv, _, num_kv_heads = kv_split(model).held(group.index, group.size)
    per_kv = model.num_heads // model.num_kv_heads
    kv_index = tuple(head // per_kv - first_kv for head in range(first, first + num_heads))
    return HeadShard(first, num_heads, num_kv_heads, kv_index, head_dim(model))


def vocabulary_shard(model: ModelConfig, group: Group) -> VocabularyShard:
    """The vocabulary rows of this tensor rank."""
    first, end, rows = vocabulary_split(model).held(group.index, group.size)
    return VocabularyShard(first, end, rows, model.vocab_size)


class Head(nn.Module):
    """Final norm (the family's) and output projection over this rank's vocabulary rows."""

    def __init__(self, norm: nn.Module, settings: StageSettings) -> None:
        super().__init__()
        self.group = settings.placement.group
        self.shard = vocabulary_shard(settings.model, self.group)
        self.fused_loss = settings.fused_loss
        self.norm = norm
        # Nobody reads logits after the loss but an observer, before backward.
        self._how = LossSettings(settings.placement.backends.cross_entropy, True, settings.z_loss)
        self.output = ColumnParallelLinear(settings.model.hidden_size, self.shard.rows, False, settings.placement)

    @property
    def how(self) -> LossSettings:
        """How the loss is computed now; in evaluation it is the cross-entropy alone."""
        return self._how if self.training else replace(self._how, z_loss=0.0)

    @property
    def fuses(self) -> bool:
        """Whether the loss may come without logits now: not where the weight's gradient is put off."""
        queue = self.output.placement.queue
        return self.fused_loss and (queue is None or not queue.defers)

    def forward(self, hidden: Tensor, batch: Microbatch | None = None) -> Tensor:
        """(B, S/t or S, H) to this rank's logits (B, S, rows), those of padding rows included.

        With a batch, for which `fuses` must hold, to its `loss`, without logits.
        """
        normal = self.norm(hidden)
        if batch is None:
            return self.output(normal)
        assert batch.labels is not None
        x, weight = self.output.placement.enter(normal), self.output.weight
        labels = (batch.labels, batch.loss_mask)
        # In fp16 the small gradients of a mean would be lost before the loss scale comes.
        scale = 1.0 if weight.dtype == torch.float16 else batch.loss_weight
        total = vocab_parallel_linear_cross_entropy(x, weight, labels, self.shard, self.group, scale, self.how)
        return total * batch.loss_weight

    def loss(self, logits: Tensor, batch: Microbatch) -> Tensor:
        """Sum of the token losses times `batch.loss_weight`: a float64 scalar, the same on all tensor ranks."""
        assert batch.labels is not None
        losses = vocab_parallel_cross_entropy(logits, batch.labels, batch.loss_mask, self.shard, self.group, self.how)
        return losses.sum(dtype=torch.float64) * batch.loss_weight
