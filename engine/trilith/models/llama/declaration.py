"""Llama's parameters as data: rotary positions, RMSNorm, SwiGLU MLP, grouped K/V heads, untied by default. No torch.

Sources: Touvron et al. 2023, "LLaMA", section 2.2; Ainslie et al. 2023 (grouped heads); Shazeer 2020 (SwiGLU).
"""

from __future__ import annotations

from trilith.config.model_keys import ModelConfig
from trilith.models import decoder_declaration as decoder
from trilith.models.base import TensorDecl, UnitDecl


def declare(model: ModelConfig) -> tuple[UnitDecl, ...]:
    """The units of a Llama: `embedding`, `layers.0` ... `layers.L-1`, `head`."""
    embedding = UnitDecl(decoder.EMBEDDING, (decoder.token_embedding(model),), matmul_flops=0.0)
    layers = (_layer(model, layer) for layer in range(model.num_layers))
    return (embedding, *layers, decoder.head_unit(model, norm_bias=False))


def _layer(model: ModelConfig, layer: int) -> UnitDecl:
    unit, hidden, ffn, bias = (
        decoder.layer_name(layer), model.hidden_size, model.ffn_hidden_size, model.linear_bias
    )  # fmt: skip
    gate, up = (
        TensorDecl(f"{unit}.mlp.{part}.weight", (ffn, hidden), decoder.normal(model), decoder.ffn_split(model, 0))
        for part in ("gate", "up")
    )
    down = TensorDecl(
        f"{unit}.mlp.down.weight", (hidden, ffn), decoder.residual_normal(model), decoder.ffn_split(model, 1)
    )
    parameters = (
        *decoder.norm(unit, f"{unit}.attention_norm", hidden, bias=False),
        *decoder.attention(model, unit),
        *decoder.norm(unit, f"{unit}.mlp_norm", hidden, bias=False),
        *decoder.column_linear(unit, f"{unit}.mlp.gate_up", (gate, up), bias),
        *decoder.row_linear(unit, down, bias),
    )
    return UnitDecl(unit, parameters, decoder.weight_flops(parameters), decoder.attention_flops(model))
