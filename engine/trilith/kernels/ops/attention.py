"""Attention of query heads over grouped key/value heads (Ainslie et al. 2023), causal or full."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from trilith.errors import KernelError
from trilith.kernels import reference
from trilith.kernels.stream import Key


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    kv_index: Sequence[int] | None = None,
    dropout_p: float = 0.0,
    key: Key = (0, 0),
    sample_ids: Tensor | None = None,
    head_range: tuple[int, int] | None = None,
) -> Tensor:
    """dropout(softmax(q k^T / sqrt(D))) v: q (B, S, N, D), k and v (B, S, K, D) to (B, S, N, D).

    Query head i reads key/value head `kv_index[i]`; None is the regular grouping (i * K // N). If `dropout_p` is not
    0, `key` is the site's stream, `sample_ids` (B,) int64 are global and `head_range` (None: all) holds the N heads'
    global indices. Without dropout this is torch's blocked attention; with it the reference, which takes O(S^2)
    memory. Raises KernelError where heads do not fit, a causal product is not square, or dropout lacks sample ids.
    """
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    regular = num_heads % num_kv_heads == 0
    if kv_index is None:
        if not regular:
            raise KernelError(f"attention: {num_heads} query and {num_kv_heads} key/value heads need a kv_index")
        kv_index = _grouping(num_heads, num_kv_heads)
    elif len(kv_index) != num_heads:
        raise KernelError(f"attention: kv_index has {len(kv_index)} entries for {num_heads} query heads")
    if causal and q.shape[1] != k.shape[1]:
        raise KernelError(f"attention: causal with {q.shape[1]} queries and {k.shape[1]} keys: must be equal")
    if dropout_p > 0.0:
        if sample_ids is None:
            raise KernelError(f"attention: dropout_p = {dropout_p!r} needs the sample ids")
        return reference.attention(
            q,
            k,
            v,
            kv_index=kv_index,
            causal=causal,
            dropout_p=dropout_p,
            key=key,
            sample_ids=sample_ids,
            head_range=head_range or (0, num_heads),
        )
    if not (regular and tuple(kv_index) == _grouping(num_heads, num_kv_heads)):
        k, v = reference.expand_heads(k, kv_index), reference.expand_heads(v, kv_index)
    mixed = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=causal,
        enable_gqa=k.shape[2] != num_heads,
    )
    return mixed.transpose(1, 2)


def _grouping(num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
    """Neighbouring query heads share a key/value head."""
    group = num_heads // num_kv_heads
    return tuple(head // group for head in range(num_heads))
