"""GPT-2's modules: pre-norm blocks, learned positions, dropout on each branch (Radford et al. 2019)."""

from __future__ import annotations

from torch import Tensor, nn

from trilith.layers.embedding import PositionEmbedding, VocabParallelEmbedding
from trilith.layers.mlp import MLP
from trilith.layers.norm import LayerNorm
from trilith.models.decoder import Head, StageInput, StageSettings, vocabulary_shard
from trilith.models.decoder_declaration import EMBEDDING


class Embedding(nn.Module):
    """Tokens plus learned positions."""

    def __init__(self, settings: StageSettings) -> None:
        super().__init__()
        model, placement = settings.model, settings.placement
        self.tokens = VocabParallelEmbedding(vocabulary_shard(model, placement.group), model.hidden_size, placement)
        self.positions = PositionEmbedding(model.sequence_length, model.hidden_size, placement)
        self.dropout = settings.dropout(EMBEDDING)

    def forward(self, stage_input: StageInput) -> Tensor:
        """The microbatch's tokens (B, S) to (B, S/t or S, H)."""
        batch, positions = stage_input.batch, stage_input.region_positions
        hidden = self.tokens(batch.tokens) + self.positions(positions)
        return self.dropout(hidden, batch.sample_ids, positions)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `unit` is its canonical name, `layers.<global index>`."""

    def __init__(self, settings: StageSettings, unit: str) -> None:
        super().__init__()
        model, placement = settings.model, settings.placement
        self.attention_norm = LayerNorm(model.hidden_size, model.norm_eps, placement)
        self.attention = settings.attention(unit)
        self.attention_dropout = settings.dropout(f"{unit}.attention")
        self.mlp_norm = LayerNorm(model.hidden_size, model.norm_eps, placement)
        self.mlp = MLP(model.hidden_size, settings.ffn_features, model.activation, model.linear_bias, placement)
        self.mlp_dropout = settings.dropout(f"{unit}.mlp")

    def forward(self, hidden: Tensor, stage_input: StageInput) -> Tensor:
        """(B, S/t or S, H) to the same shape."""
        samples, positions = stage_input.batch.sample_ids, stage_input.region_positions
        attended = self.attention(self.attention_norm(hidden), samples, stage_input.mask)
        hidden, normed = self.mlp_norm.add(self.attention_dropout(attended, samples, positions), hidden)
        return self.mlp_dropout.add(self.mlp(normed), hidden, samples, positions)


def head(settings: StageSettings) -> Head:
    """Final LayerNorm and output projection."""
    model = settings.model
    return Head(LayerNorm(model.hidden_size, model.norm_eps, settings.placement), settings)
