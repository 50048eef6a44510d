"""GPT-2's parameters as data: learned positions, LayerNorm, GELU MLP, biases, head tied by default. No torch.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.
"""

from __future__ import annotations

from trilith.config.model_keys import ModelConfig
from trilith.models import decoder_declaration as decoder
from trilith.models.base import ParameterDecl, TensorDecl, UnitDecl


def declare(model: ModelConfig) -> tuple[UnitDecl, ...]:
    """The units of a GPT-2: `embedding`, `layers.0` ... `layers.L-1`, `head`."""
    layers = (_layer(model, layer) for layer in range(model.num_layers))
    return (_embedding(model), *layers, decoder.head_unit(model, norm_bias=True))


def _embedding(model: ModelConfig) -> UnitDecl:
    positions = TensorDecl(
        "embedding.positions.weight", (model.sequence_length, model.hidden_size), decoder.normal(model)
    )
    parameters = (
        decoder.token_embedding(model),
        ParameterDecl(positions.name, (positions,), decoder.EMBEDDING, in_sequence_region=True),
    )
    return UnitDecl(decoder.EMBEDDING, parameters, matmul_flops=0.0)


def _layer(model: ModelConfig, layer: int) -> UnitDecl:
    unit, hidden, ffn, bias = (
        decoder.layer_name(layer), model.hidden_size, model.ffn_hidden_size, model.linear_bias
    )  # fmt: skip
    up = TensorDecl(f"{unit}.mlp.up.weight", (ffn, hidden), decoder.normal(model), decoder.ffn_split(model, 0))
    down = TensorDecl(
        f"{unit}.mlp.down.weight", (hidden, ffn), decoder.residual_normal(model), decoder.ffn_split(model, 1)
    )
    parameters = (
        *decoder.norm(unit, f"{unit}.attention_norm", hidden, bias=True),
        *decoder.attention(model, unit),
        *decoder.norm(unit, f"{unit}.mlp_norm", hidden, bias=True),
        *decoder.column_linear(unit, f"{unit}.mlp.up", (up,), bias),
        *decoder.row_linear(unit, down, bias),
    )
    return UnitDecl(unit, parameters, decoder.weight_flops(parameters), decoder.attention_flops(model))
