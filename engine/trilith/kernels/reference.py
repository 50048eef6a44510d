"""The plain-torch truth of every op: the measure of faster implementations, and the fallback where there is none.

Low-precision inputs (bf16, fp16) are widened to fp32, computed there and rounded once at the end; fp64 stays fp64.
Only differentiable torch functions are used, so autograd gives each op's true gradient. Shape letters: B microbatch
size, S sequence, H hidden, N query heads, K key/value heads, D head dim, V local vocabulary columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trilith.errors import KernelError
from trilith.kernels.mask import CAUSAL, AttentionMask
from trilith.kernels.stream import Key, attention_keep, dropout_keep, keep_scale


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an op on `dtype` computes: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(x: Tensor) -> Tensor:
    """`x` in the dtype that ops compute in."""
    return x.to(accumulation_dtype(x.dtype))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in) transposed, plus bias (out,)."""
    y = widened(x) @ widened(weight).t()
    return (y if bias is None else y + widened(bias)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Rows of x (..., H) to mean 0 and variance 1, then times weight plus bias (Ba, Kiros, Hinton 2016)."""
    wide = widened(x)
    centred = wide - wide.mean(dim=-1, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    scaled = normal * widened(weight)
    return (scaled if bias is None else scaled + widened(bias)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rows of x (..., H) to root mean square 1, then times weight (Zhang and Sennrich 2019)."""
    wide = widened(x)
    normal = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (normal * widened(weight)).to(x.dtype)


def gelu(x: Tensor, kind: str) -> Tensor:
    """x Phi(x) (Hendrycks and Gimpel 2016): exact for `gelu`, by their tanh formula for `gelu_tanh`."""
    wide = widened(x)
    if kind == "gelu":
        return (0.5 * wide * (1.0 + torch.erf(wide * 0.5**0.5))).to(x.dtype)
    if kind == "gelu_tanh":
        inner = (2.0 / torch.pi) ** 0.5 * (wide + 0.044715 * wide * wide * wide)
        return (0.5 * wide * (1.0 + torch.tanh(inner))).to(x.dtype)
    raise KernelError(f"gelu: kind = {kind!r}: must be 'gelu' or 'gelu_tanh'")


def bias_gelu(x: Tensor, bias: Tensor, kind: str) -> Tensor:
    """`gelu` of x + bias."""
    return gelu(widened(x) + widened(bias), kind).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate sigmoid(gate) up (Shazeer 2020)."""
    wide = widened(gate)
    return (wide * torch.sigmoid(wide) * widened(up)).to(gate.dtype)


def geglu(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """gelu(gate) up (Shazeer 2020)."""
    return (gelu(widened(gate), kind) * widened(up)).to(gate.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2), as in Llama, of x (B, S, N, D) by angles of cos, sin (S or B, S, D/2) (Su et al. 2021)."""
    first, second = widened(x).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def dropped(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """x where `keep`, times the inverse of the probability of being kept; zero elsewhere."""
    factor = keep.to(accumulation_dtype(x.dtype)).mul_(keep_scale(p))
    return (widened(x) * factor).to(x.dtype)


def dropout(
    x: Tensor,
    p: float,
    key: Key,
    sample_ids: Tensor,
    positions: Tensor,
    feature_range: tuple[int, int],
) -> Tensor:
    """Dropout of x (B, S, F) whose features are `feature_range` of the whole; mask of `stream.dropout_keep`."""
    return dropped(x, dropout_keep(key, sample_ids, positions, feature_range, p, "torch"), p)


def expand_heads(x: Tensor, kv_index: Sequence[int]) -> Tensor:
    """Key or value heads (B, S, K, D) to one per query head (B, S, N, D): head i is x's head `kv_index[i]`.

    Made of slices, not of a gather, because a gather's backward adds in no fixed order on a GPU.
    """
    runs = [(head, len(list(members))) for head, members in groupby(kv_index)]
    return torch.cat([x[:, :, head : head + 1].expand(-1, -1, count, -1) for head, count in runs], dim=2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_index: Sequence[int],
    mask: AttentionMask = CAUSAL,
    dropout_p: float = 0.0,
    key: Key = (0, 0),
    sample_ids: Tensor | None = None,
    head_range: tuple[int, int] = (0, 0),
) -> Tensor:
    """dropout(softmax(q k^T / sqrt(D) + bias)) v: q (B, S, N, D), k and v (B, S', K, D) to (B, S, N, D); O(S^2) memory.

    Query head i reads key/value head `kv_index[i]` and has the global index `head_range[0] + i` in the dropout stream.
    A query that sees no key gives zeros.
    """
    scores, visible = _scores(q, k, kv_index, mask)
    values = widened(expand_heads(v, kv_index)).transpose(1, 2)
    weights = functional.softmax(scores, dim=-1)
    if visible is not None and mask is not CAUSAL:
        weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    if dropout_p > 0.0:
        assert sample_ids is not None, "attention dropout needs the sample ids"
        weights = dropped(weights, _attention_keep(mask, key, sample_ids, head_range, weights, dropout_p), dropout_p)
    return (weights @ values).transpose(1, 2).to(q.dtype)


def attention_and_lse(
    q: Tensor, k: Tensor, v: Tensor, *, kv_index: Sequence[int], mask: AttentionMask, **dropout: Any
) -> tuple[Tensor, Tensor]:
    """`attention`, and the log-sum-exp of each query's scores (B, N, S), wide; minus infinity where nothing is seen."""
    scores, _ = _scores(q, k, kv_index, mask)
    return attention(q, k, v, kv_index=kv_index, mask=mask, **dropout), scores.logsumexp(-1)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    kv_index: Sequence[int],
    mask: AttentionMask,
    dropout_p: float = 0.0,
    key: Key = (0, 0),
    sample_ids: Tensor | None = None,
    head_range: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `out` and `lse` (B, N, S) are of these keys or of more (Dao et al. 2022, algorithm 4)."""
    scores, _ = _scores(q, k, kv_index, mask)
    weights = (scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    keys, values = (widened(expand_heads(x, kv_index)).transpose(1, 2) for x in (k, v))
    gradient = widened(dout).transpose(1, 2)
    kept = torch.ones((), dtype=weights.dtype, device=weights.device)
    if dropout_p > 0.0:
        assert sample_ids is not None, "attention dropout needs the sample ids"
        keep = _attention_keep(mask, key, sample_ids, head_range, weights, dropout_p)
        kept = dropped(torch.ones_like(weights), keep, dropout_p)
    delta = (gradient * widened(out).transpose(1, 2)).sum(-1, keepdim=True)
    scale = q.shape[-1] ** -0.5
    dscores = weights * (gradient @ values.transpose(-1, -2) * kept - delta) * scale
    dq = dscores @ keys
    dk = dscores.transpose(-1, -2) @ widened(q).transpose(1, 2)
    dv = (weights * kept).transpose(-1, -2) @ gradient
    index = torch.tensor(kv_index, device=q.device)
    summed = [dq.new_zeros((len(k), k.shape[2], *x.shape[2:])).index_add_(1, index, x) for x in (dk, dv)]
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, *summed))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _scores(q: Tensor, k: Tensor, kv_index: Sequence[int], mask: AttentionMask) -> tuple[Tensor, Tensor | None]:
    """Scaled scores (B, N, S, S'), minus infinity where a key is not seen, and which are; None: all."""
    queries = (widened(q) * q.shape[-1] ** -0.5).transpose(1, 2)
    scores = queries @ widened(expand_heads(k, kv_index)).transpose(1, 2).transpose(-1, -2)
    length, num_keys = scores.shape[-2:]
    bias = mask.bias(length, num_keys, scores.dtype, q.device)
    if bias is not None:
        scores = scores + bias
    visible = mask.visible(length, num_keys, q.device)
    return scores if visible is None else scores.masked_fill(~visible, float("-inf")), visible


def masked_softmax(x: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    """softmax(scale x) over the keys of x (B, N, Q, K) that are seen: see `ops.masked_softmax`."""
    queries, keys = x.shape[-2:]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=x.device)
    if causal:
        seen = seen.tril(keys - queries)
    if mask is not None:
        seen = seen & mask
    scores = (widened(x) * scale).masked_fill(~seen, -torch.inf)
    # A row of minus infinities has no softmax, and its gradient would be NaN.
    weights = scores.masked_fill(~seen.any(-1, keepdim=True), 0.0).softmax(-1)
    return weights.masked_fill(~seen, 0.0).to(x.dtype)


def _attention_keep(
    mask: AttentionMask, key: Key, sample_ids: Tensor, head_range: tuple[int, int], weights: Tensor, p: float
) -> Tensor:
    """Which of the weights (B, N, S, S') are kept: a function of their positions."""
    length, num_keys = weights.shape[-2:]
    queries, keys = (x.reshape(-1, x.numel() // len(x)) for x in mask.positions(length, num_keys, weights.device))
    if mask.key_positions is None and len(queries) == 1:
        return attention_keep(key, sample_ids, head_range, queries[0], (0, num_keys), p)
    kept = []
    for b in range(len(sample_ids)):
        rows, columns = queries[b % len(queries)], keys[b % len(keys)]
        whole = attention_keep(key, sample_ids[b : b + 1], head_range, rows, (0, int(columns.max()) + 1), p)
        kept.append(whole.index_select(-1, columns))
    return torch.cat(kept)


# Cross-entropy over a vocabulary that is split over ranks, in pieces between which layers/loss.py communicates. A
# rank's logits (..., V) are the columns of the labels [first_label, first_label + num_valid); columns from
# num_valid on pad.


def local_logit_max(logits: Tensor, num_valid: int) -> Tensor:
    """Largest logit of each token on this rank (...), widened; -inf where the rank holds no label."""
    if num_valid == 0:
        return widened(logits.new_full(logits.shape[:-1], float("-inf")))
    return widened(logits[..., :num_valid].amax(dim=-1))


def local_sum_exp(logits: Tensor, logit_max: Tensor, num_valid: int) -> Tensor:
    """This rank's part of sum(exp(logit - max)) with the maximum over all ranks (...), widened."""
    return (widened(logits[..., :num_valid]) - logit_max.unsqueeze(-1)).exp().sum(dim=-1)


def local_label_column(labels: Tensor, first_label: int, num_valid: int) -> tuple[Tensor, Tensor]:
    """Column of each label on this rank (0 where the rank does not hold it), and whether it holds it; both (...)."""
    held = (labels >= first_label) & (labels < first_label + num_valid)
    return (labels - first_label).masked_fill(~held, 0), held


def local_target_logit(logits: Tensor, labels: Tensor, logit_max: Tensor, first_label: int, num_valid: int) -> Tensor:
    """Logit of each token's label minus the maximum (...), widened; 0 where another rank holds the label."""
    column, held = local_label_column(labels, first_label, num_valid)
    target = widened(logits.gather(-1, column.unsqueeze(-1)).squeeze(-1))
    return (target - logit_max).masked_fill(~held, 0.0)


def local_logit_gradient(
    logits: Tensor,
    labels: Tensor,
    logit_max: Tensor,
    sum_exp: Tensor,
    scale: Tensor,
    first_label: int,
    num_valid: int,
) -> Tensor:
    """(softmax - onehot) * scale in the logits' shape and dtype; 0 in padding columns.

    `logit_max` and `sum_exp` (...) are those over all ranks, `scale` (...) is the gradient of each token's loss.
    """
    column, held = local_label_column(labels, first_label, num_valid)
    gradient = (widened(logits) - logit_max.unsqueeze(-1)).exp() / sum_exp.unsqueeze(-1)
    gradient[..., num_valid:] = 0.0
    gradient.scatter_add_(-1, column.unsqueeze(-1), -held.to(gradient.dtype).unsqueeze(-1))
    return (gradient * scale.unsqueeze(-1)).to(logits.dtype)
