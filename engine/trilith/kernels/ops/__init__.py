"""The ops that layers are made of: the one seam between models and kernels.

A layer writes `from trilith.kernels import ops` and calls `ops.NAME`; what runs behind the name may change (torch,
a fused kernel, `reference`), its meaning, which `kernels/reference.py` states, may not. A faster implementation of
an op goes into that op's file here and is held to the same tests.
"""

from trilith.kernels.library import takes
from trilith.kernels.ops.activation import bias_gelu, geglu, geglu_packed, gelu, swiglu, swiglu_packed
from trilith.kernels.ops.attention import (
    attention,
    combine_partials,
    packed_attention,
    partial_attention,
    partial_attention_backward,
)
from trilith.kernels.ops.cross_entropy import (
    cross_entropy_gradient,
    cross_entropy_terms,
    local_logit_max,
    log_normalisers,
    token_loss_gradient,
    token_losses,
)
from trilith.kernels.ops.dropout import dropout, dropout_add
from trilith.kernels.ops.linear import linear
from trilith.kernels.ops.linear_cross_entropy import SplitVocabulary, linear_cross_entropy, with_z_loss
from trilith.kernels.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from trilith.kernels.ops.rotary import rotary, rotary_packed
from trilith.kernels.ops.softmax import masked_softmax

__all__ = [
    "SplitVocabulary",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "bias_gelu",
    "combine_partials",
    "cross_entropy_gradient",
    "cross_entropy_terms",
    "dropout",
    "dropout_add",
    "geglu",
    "geglu_packed",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "local_logit_max",
    "log_normalisers",
    "masked_softmax",
    "packed_attention",
    "partial_attention",
    "partial_attention_backward",
    "rms_norm",
    "rotary",
    "rotary_packed",
    "swiglu",
    "swiglu_packed",
    "takes",
    "token_loss_gradient",
    "token_losses",
    "with_z_loss",
]
