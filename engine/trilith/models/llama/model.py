"""Llama's modules: pre-norm blocks with RMSNorm, rotary positions, a gated MLP (Touvron et al. 2023, 2.2)."""

from __future__ import annotations

from torch import Tensor, nn

from trilith.layers.embedding import VocabParallelEmbedding
from trilith.layers.mlp import GatedMLP
from trilith.layers.norm import RMSNorm
from trilith.layers.position import rotary_tables
from trilith.models.decoder import Head, StageInput, StageSettings, vocabulary_shard
from trilith.models.decoder_declaration import EMBEDDING, head_dim


class Embedding(nn.Module):
    """Tokens; positions come in by rotation in every block."""

    def __init__(self, settings: StageSettings) -> None:
        super().__init__()
        model, placement = settings.model, settings.placement
        self.tokens = VocabParallelEmbedding(vocabulary_shard(model, placement.group), model.hidden_size, placement)
        self.dropout = settings.dropout(EMBEDDING)

    def forward(self, stage_input: StageInput) -> Tensor:
        """The microbatch's tokens (B, S) to (B, S/t or S, H)."""
        batch = stage_input.batch
        return self.dropout(self.tokens(batch.tokens), batch.sample_ids, stage_input.region_positions)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `unit` is its canonical name, `layers.<global index>`."""

    def __init__(self, settings: StageSettings, unit: str) -> None:
        super().__init__()
        model, placement = settings.model, settings.placement
        self.attention_norm = RMSNorm(model.hidden_size, model.norm_eps, placement)
        self.attention = settings.attention(unit)
        self.attention_dropout = settings.dropout(f"{unit}.attention")
        self.mlp_norm = RMSNorm(model.hidden_size, model.norm_eps, placement)
        self.mlp = GatedMLP(model.hidden_size, settings.ffn_features, model.linear_bias, placement)
        self.mlp_dropout = settings.dropout(f"{unit}.mlp")

    def forward(self, hidden: Tensor, stage_input: StageInput) -> Tensor:
        """(B, S/t or S, H) to the same shape."""
        samples, positions = stage_input.batch.sample_ids, stage_input.region_positions
        attended = self.attention(self.attention_norm(hidden), samples, stage_input.mask, stage_input.rotary)
        hidden, normed = self.mlp_norm.add(self.attention_dropout(attended, samples, positions), hidden)
        return self.mlp_dropout.add(self.mlp(normed), hidden, samples, positions)


def head(settings: StageSettings) -> Head:
    """Final RMSNorm and output projection."""
    model = settings.model
    return Head(RMSNorm(model.hidden_size, model.norm_eps, settings.placement), settings)


def rotary(settings: StageSettings, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (S, D/2) of `positions` (S,)."""
    model = settings.model
    return rotary_tables(positions, head_dim(model), model.rope_theta, settings.placement.dtype)
