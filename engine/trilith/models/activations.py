"""What a stage keeps between forward and backward, from the declaration alone: bytes for one microbatch. No torch.

Counted tensor by tensor as our own layers save them (attention without dropout keeps no S x S matrix), once a storage; so
`monitor.activations.ActivationMeter` measures the same. Two moments count: after a forward, what autograd keeps until the
gradient of the input is there; after a backward's first half, the input of each linear and the gradient of its output,
which wait in the stage's queue for its second half (recompute does not make those fewer). Temporaries of an op, and what
recompute makes again for the part at work, are not in it. The published formulas (Korthikanti et al. 2022, section 4) count
the same for one architecture and 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trilith.config.model_keys import ModelConfig
from trilith.config.sparse_keys import DenseBlocks, SparseBlocks
from trilith.layers.sparsity import differs_by_head
from trilith.models.decoder_declaration import EMBEDDING, HEAD, head_dim, kv_split, vocabulary_split

INT64_BYTES = 8
BOOL_BYTES = 1


@dataclass(frozen=True)
class ActivationSetting:
    """What the bytes depend on beside the model. B is `batch_size`, t is `tensor`.

    `recompute` is `none`, `selective` or `full`; `dtype_bytes` those of an activation. `fused`: the families
    of ops that are one kernel and keep its inputs only (native ones; torch's norm on a GPU), not torch's chains of ops.
    `fused_loss`: the last product and the loss are one op, in schedules that leave backward whole. `sparse`: the blocks of
    scores that attention computes, where these are not all. `documents`: tokens see their own documents only.
    """

    batch_size: int
    tensor: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    dtype_bytes: int = 4
    fused: frozenset[str] = frozenset()
    fused_loss: bool = False
    sparse: SparseBlocks | None = None
    documents: bool = False

    @property
    def wide_bytes(self) -> int:
        """Bytes of a number in the precision that norms, softmax and loss compute in."""
        return max(4, self.dtype_bytes)


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes of one microbatch after its forward, and after the first half of its backward."""

    after_forward: int
    after_input_gradient: int

    def __add__(self, other: ActivationBytes) -> ActivationBytes:
        """Both sums."""
        return ActivationBytes(
            self.after_forward + other.after_forward, self.after_input_gradient + other.after_input_gradient
        )


def stage_activations(model: ModelConfig, units: Iterable[str], setting: ActivationSetting) -> ActivationBytes:
    """The bytes of a stage made of `units` (names), on the tensor rank that holds most."""
    names, total = tuple(units), ActivationBytes(0, 0)
    for name in names:
        total += unit_activations(model, name, setting)
    keeps_layers = setting.recompute != "full" and any(name not in (EMBEDDING, HEAD) for name in names)
    shared = 0  # what layers keep together
    if keeps_layers and model.family == "llama":
        shared += model.sequence_length * head_dim(model) * setting.wide_bytes  # cos and sin
    if model.dropout > 0.0 and "dropout" in setting.fused and (keeps_layers or EMBEDDING in names):
        shared += INT64_BYTES * setting.batch_size  # sample ids
        if EMBEDDING not in names or model.family == "llama":  # learned positions are counted there
            shared += INT64_BYTES * model.sequence_length
    return total + ActivationBytes(shared, 0)


def unit_activations(model: ModelConfig, unit: str, setting: ActivationSetting) -> ActivationBytes:
    """The bytes of one unit: `embedding`, `layers.<index>` or `head`."""
    if unit == EMBEDDING:
        return ActivationBytes(_embedding(model, setting), 0)
    if unit == HEAD:
        return _head(model, setting)
    return _layer(model, setting)


def boundary_bytes(model: ModelConfig, setting: ActivationSetting) -> int:
    """The message from one stage to the next: (B, S/t or S, H)."""
    return _region_tokens(model, setting) * model.hidden_size * setting.dtype_bytes


def _tokens(model: ModelConfig, setting: ActivationSetting) -> int:
    return setting.batch_size * model.sequence_length


def _region_tokens(model: ModelConfig, setting: ActivationSetting) -> int:
    """Tokens that a rank holds in the sequence region."""
    return _tokens(model, setting) // (setting.tensor if setting.sequence_parallel else 1)


def _norm(model: ModelConfig, setting: ActivationSetting) -> int:
    """What a norm keeps per token, its output left out: that is the next linear's input."""
    if model.family != "llama":
        statistics = setting.wide_bytes if "norm" in setting.fused else setting.dtype_bytes
        return model.hidden_size * setting.dtype_bytes + 2 * statistics
    if "norm" in setting.fused:
        return model.hidden_size * setting.dtype_bytes + setting.wide_bytes
    return (2 * model.hidden_size + 1) * setting.wide_bytes


def _embedding(model: ModelConfig, setting: ActivationSetting) -> int:
    """The tokens, or with a part of the vocabulary its rows and which tokens lie elsewhere; positions; the mask."""
    is_whole = setting.tensor == 1
    count = _tokens(model, setting) * (INT64_BYTES if is_whole else INT64_BYTES + BOOL_BYTES)
    if model.family != "llama":
        count += INT64_BYTES * model.sequence_length
    return count + _dropout_mask(model, setting)


def _dropout_mask(model: ModelConfig, setting: ActivationSetting) -> int:
    """The mask of one dropout in the residual stream; the native op makes it again."""
    if model.dropout == 0.0 or "dropout" in setting.fused:
        return 0
    return _region_tokens(model, setting) * model.hidden_size * BOOL_BYTES


def _head(model: ModelConfig, setting: ActivationSetting) -> ActivationBytes:
    """Norm, output product and cross-entropy, which keeps logits and labels, and of a split vocabulary the sums."""
    rows = vocabulary_split(model).held(0, setting.tensor)[2]
    tokens, element = _tokens(model, setting), setting.dtype_bytes
    x, logits = tokens * model.hidden_size * element, tokens * rows * element
    norm = _region_tokens(model, setting) * _norm(model, setting)
    if setting.fused_loss:  # its two gradients are there already
        return ActivationBytes(norm + x + rows * model.hidden_size * element, 0)
    sums = 3 * setting.wide_bytes if setting.tensor > 1 else 0
    if setting.tensor == 1 and "cross_entropy" in setting.fused:
        sums = 4 * setting.wide_bytes  # with the losses in one tensor
    loss = tokens * (INT64_BYTES + BOOL_BYTES + sums)
    return ActivationBytes(norm + x + logits + loss, x + logits)


@dataclass(frozen=True)
class _Heads:
    """The heads of a tensor rank. `regular`: neighbouring query heads share a key/value head, equally many each."""

    queries: int
    keys: int
    regular: bool


def _heads(model: ModelConfig, rank: int, degree: int) -> _Heads:
    queries = model.num_heads // degree
    first, _, keys = kv_split(model).held(rank, degree)
    per_key = model.num_heads // model.num_kv_heads
    index = [head // per_key - first for head in range(rank * queries, (rank + 1) * queries)]
    regular = queries % keys == 0 and index == [head // (queries // keys) for head in range(queries)]
    return _Heads(queries, keys, regular)


def _layer(model: ModelConfig, setting: ActivationSetting) -> ActivationBytes:
    element, region, tokens = setting.dtype_bytes, _region_tokens(model, setting), _tokens(model, setting)
    shards = [_heads(model, rank, setting.tensor) for rank in range(setting.tensor)]
    gated, width = model.activation == "swiglu", model.ffn_hidden_size // setting.tensor
    hidden = tokens * model.hidden_size * element  # a linear's whole-features input or output gradient
    inner = tokens * width * element
    norms = 2 * (region * _norm(model, setting) + hidden)
    # Gate, up, silu(gate), which the native op makes again, and the product; or before and after the GELU.
    mlp = (2 if not gated else 3 if "activation" in setting.fused else 4) * inner
    masks = 2 * _dropout_mask(model, setting)
    forward = norms + mlp + masks + max(_attention(model, setting, heads) for heads in shards)
    projected = tokens * element * head_dim(model)
    queued = 4 * hidden + (3 if gated else 2) * inner
    queued += max(projected * (2 * heads.queries + 2 * heads.keys) for heads in shards)
    if setting.recompute == "full":
        forward = region * model.hidden_size * element
    return ActivationBytes(forward, queued)


def _attention(model: ModelConfig, setting: ActivationSetting, heads: _Heads) -> int:
    """The core between the two linears of attention, with its result, which is the second one's input.

    Queries, keys and values are one tensor, rotated or not.
    """
    element, wide, tokens = setting.dtype_bytes, setting.wide_bytes, _tokens(model, setting)
    head = tokens * head_dim(model) * element
    queries, packed = heads.queries * head, (heads.queries + 2 * heads.keys) * head
    if setting.recompute == "selective":
        return packed + queries + INT64_BYTES * setting.batch_size
    softmax_sums = tokens * heads.queries * wide
    if "attention" in setting.fused:
        return packed + queries + softmax_sums
    sparse = None if isinstance(setting.sparse, DenseBlocks) else setting.sparse
    if model.attention_dropout > 0.0 or sparse is not None or setting.documents:
        # The reference: q, k and v of all heads in full precision, S x S matrices (the softmax, the factors of dropout,
        # and what multiplies v), and which keys are not seen.
        matrices = 3 if model.attention_dropout > 0.0 else 2
        squares = matrices * tokens * model.sequence_length * heads.queries * wide
        layouts = heads.queries if sparse is not None and differs_by_head(sparse) else 1
        layouts *= setting.batch_size if setting.documents else 1
        unseen = model.sequence_length**2 * BOOL_BYTES * layouts
        return 3 * queries // element * wide + squares + unseen + queries
    copied = 0 if heads.regular else 2 * queries  # keys and values repeated for each query head
    return packed + copied + queries + softmax_sums
