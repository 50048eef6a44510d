"""The declared parts that all decoder-only families share: token embedding, attention, output projection. No torch.

Canonical tensors carry the global layer index, are whole, unfused and unpadded; weights are (out, in). How they
split is Megatron's scheme (Shoeybi et al. 2019, section 3): the first product of a pair by output rows, the second
by input columns, the vocabulary by rows. A local parameter may stack several of them along dim 0, so that one
product serves q, k and v.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from trilith.config.model_keys import ModelConfig
from trilith.models.base import Init, ParameterDecl, Split, TensorDecl, UnitDecl

EMBEDDING, HEAD = "embedding", "head"
TOKEN_WEIGHT = "embedding.tokens.weight"
# Tied token weights are a flat unit of their own, so that the copy on the last stage has the identical flat layout.
TIED_UNIT = "embedding.tokens"


def layer_name(layer: int) -> str:
    """Name of the unit of global layer `layer`."""
    return f"layers.{layer}"


def layer_index(unit: str) -> int:
    """Global layer index of the unit named `layers.<index>`."""
    return int(unit.removeprefix("layers."))


def head_dim(model: ModelConfig) -> int:
    """D: elements of one attention head."""
    return model.hidden_size // model.num_heads


def vocabulary_split(model: ModelConfig) -> Split:
    """Vocabulary rows over tensor ranks; the last ranks hold padding where the vocabulary does not divide."""
    return Split(0, model.vocab_size, "padded")


def query_split(model: ModelConfig, dim: int) -> Split:
    """Query heads over tensor ranks, along `dim`."""
    return Split(dim, model.num_heads)


def kv_split(model: ModelConfig) -> Split:
    """Key/value heads over tensor ranks: each rank holds those that its query heads read."""
    return Split(0, model.num_kv_heads, "kv_heads", model.num_heads)


def ffn_split(model: ModelConfig, dim: int) -> Split:
    """Inner features of the MLP over tensor ranks, along `dim`."""
    return Split(dim, model.ffn_hidden_size)


def normal(model: ModelConfig) -> Init:
    """Initial values of input projections and embeddings."""
    return Init("normal", model.init_std)


def residual_normal(model: ModelConfig) -> Init:
    """Initial values of projections into the residual stream, scaled by their number 2 L (Radford et al. 2019)."""
    return Init("normal", model.init_std / sqrt(2 * model.num_layers))


def norm(unit: str, name: str, hidden_size: int, bias: bool) -> tuple[ParameterDecl, ...]:
    """Weight (H,) and, where the norm has one, bias (H,): whole on each rank, never decayed."""
    inits = {"weight": Init("ones")} | ({"bias": Init("zeros")} if bias else {})
    return tuple(
        ParameterDecl(
            f"{name}.{part}",
            (TensorDecl(f"{name}.{part}", (hidden_size,), init),),
            flat_unit=unit,
            decay=False,
            in_sequence_region=True,
        )
        for part, init in inits.items()
    )


def column_linear(unit: str, name: str, weights: Sequence[TensorDecl], bias: bool) -> tuple[ParameterDecl, ...]:
    """A product split by output rows: the stacked `weights`, and a bias with the same split for each of them."""
    declared = [ParameterDecl(f"{name}.weight", tuple(weights), flat_unit=unit)]
    if bias:
        biases = (
            TensorDecl(w.name.removesuffix("weight") + "bias", w.shape[:1], Init("zeros"), w.split) for w in weights
        )
        declared.append(ParameterDecl(f"{name}.bias", tuple(biases), flat_unit=unit, decay=False))
    return tuple(declared)


def row_linear(unit: str, weight: TensorDecl, bias: bool) -> tuple[ParameterDecl, ...]:
    """A product split by input columns; its bias is added after the sum over ranks, in the sequence region."""
    declared = [ParameterDecl(weight.name, (weight,), flat_unit=unit)]
    if bias:
        name = weight.name.removesuffix("weight") + "bias"
        tensor = TensorDecl(name, weight.shape[:1], Init("zeros"))
        declared.append(ParameterDecl(name, (tensor,), flat_unit=unit, decay=False, in_sequence_region=True))
    return tuple(declared)


def attention(model: ModelConfig, unit: str) -> tuple[ParameterDecl, ...]:
    """Grouped-query attention (Ainslie et al. 2023): q (N*D, H), k and v (K*D, H) stacked, output (H, N*D)."""
    hidden, name, size = model.hidden_size, f"{unit}.attention", head_dim(model)
    queries, keys = model.num_heads * size, model.num_kv_heads * size
    stacked = (
        TensorDecl(f"{name}.q.weight", (queries, hidden), normal(model), query_split(model, 0)),
        TensorDecl(f"{name}.k.weight", (keys, hidden), normal(model), kv_split(model)),
        TensorDecl(f"{name}.v.weight", (keys, hidden), normal(model), kv_split(model)),
    )
    output = TensorDecl(f"{name}.output.weight", (hidden, queries), residual_normal(model), query_split(model, 1))
    return (
        *column_linear(unit, f"{name}.qkv", stacked, model.linear_bias),
        *row_linear(unit, output, model.linear_bias),
    )


def attention_flops(model: ModelConfig) -> float:
    """Forward FLOPs a token spends in q k^T and p v of one layer, over the whole sequence: 2 * 2 * S * N * D."""
    return 4.0 * model.sequence_length * model.num_heads * head_dim(model)


def weight_flops(parameters: Sequence[ParameterDecl]) -> float:
    """Forward FLOPs a token spends in products with the matrices among `parameters`: 2 per element."""
    return 2.0 * sum(t.numel for p in parameters for t in p.tensors if len(t.shape) == 2)


def _tokens(model: ModelConfig) -> TensorDecl:
    return TensorDecl(TOKEN_WEIGHT, (model.vocab_size, model.hidden_size), normal(model), vocabulary_split(model))


def token_embedding(model: ModelConfig) -> ParameterDecl:
    """Token embedding (V, H), split by vocabulary rows."""
    return ParameterDecl(TOKEN_WEIGHT, (_tokens(model),), TIED_UNIT if model.tie_embeddings else EMBEDDING)


def head_unit(model: ModelConfig, norm_bias: bool) -> UnitDecl:
    """Final norm and output projection (V, H), which is the token embedding again where they are tied."""
    name, shape = f"{HEAD}.output.weight", (model.vocab_size, model.hidden_size)
    if model.tie_embeddings:
        output = ParameterDecl(name, (_tokens(model),), TIED_UNIT, tie_copy=1)
    else:
        tensor = TensorDecl(name, shape, normal(model), vocabulary_split(model))
        output = ParameterDecl(name, (tensor,), HEAD)
    parameters = (*norm(HEAD, f"{HEAD}.norm", model.hidden_size, norm_bias), output)
    return UnitDecl(HEAD, parameters, matmul_flops=weight_flops([output]))
