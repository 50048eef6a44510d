"""Attention of query heads over grouped key/value heads (Ainslie et al. 2023) under an `AttentionMask`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from trilith.errors import KernelError
from trilith.kernels import library, reference
from trilith.kernels.contest import attention_contest, cuda_seconds
from trilith.kernels.library import LIBRARY
from trilith.kernels.mask import CAUSAL, AttentionMask
from trilith.kernels.ops.attention_native import (
    CUDA_PACK,
    How,
    NativeAttention,
    NativePackedAttention,
    library_attention,
    native_backward,
    native_forward,
    split_heads,
)
from trilith.kernels.stream import Key

_CUDA_MOST_FEATURES = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: AttentionMask = CAUSAL,
    kv_index: Sequence[int] | None = None,
    dropout_p: float = 0.0,
    key: Key = (0, 0),
    sample_ids: Tensor | None = None,
    head_range: tuple[int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """dropout(softmax(q k^T / sqrt(D))) v: q (B, S, N, D), k and v (B, S', K, D) to (B, S, N, D).

    Query head i reads key/value head `kv_index[i]`; None is the regular grouping (i * K // N). If `dropout_p` is not
    0, `key` is the site's stream, `sample_ids` (B,) int64 are global and `head_range` (None: all) holds the N heads'
    global indices. The native op keeps two numbers a query and head. Without it this is torch's blocked attention where
    the mask is causal or full and nothing is dropped, else the reference, which takes O(S^2) memory. Raises KernelError
    where heads do not fit, the mask does not, or dropout lacks sample ids.
    """
    first = head_range[0] if head_range else 0
    how = _checked(q, k, v, mask, kv_index, dropout_p, key, sample_ids, first)
    if _runs_natively(backend, q, k, v, how):
        return library_attention(q, k, v, how)[0] if library.is_traced(q) else NativeAttention.apply(q, k, v, how)
    return _of_torch(q, k, v, how, backend)


def _of_torch(q: Tensor, k: Tensor, v: Tensor, how: How, backend: str) -> Tensor:
    """Torch's blocked attention where it does the same, else the reference."""
    if backend == "reference" or not how.is_torchs:
        return reference.attention(q, k, v, **how.named())
    if how.kv_index != _grouping(q.shape[2], k.shape[2]):
        k, v = reference.expand_heads(k, how.kv_index), reference.expand_heads(v, how.kv_index)
    mixed = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=how.mask.causal,
        enable_gqa=k.shape[2] != q.shape[2],
    )
    return mixed.transpose(1, 2)


def packed_attention(
    qkv: Tensor,
    num_heads: int,
    *,
    mask: AttentionMask = CAUSAL,
    kv_index: Sequence[int] | None = None,
    head_dim: int,
    dropout_p: float = 0.0,
    key: Key = (0, 0),
    sample_ids: Tensor | None = None,
    head_range: tuple[int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """`attention` of q, k and v that lie one behind the other in qkv (B, S, (N + 2 K) D): (B, S, N D).

    The native op reads them where they are and writes their gradients into one tensor.
    """
    if qkv.dim() != 3 or qkv.shape[-1] % head_dim or (qkv.shape[-1] // head_dim - num_heads) % 2:
        raise KernelError(
            f"attention: qkv {tuple(qkv.shape)} with {num_heads} heads of {head_dim}: must be (B, S, (N + 2 K) D)"
        )
    q, k, v = split_heads(qkv, num_heads, head_dim)
    first = head_range[0] if head_range else 0
    how = _checked(q, k, v, mask, kv_index, dropout_p, key, sample_ids, first)
    if not _runs_natively(backend, q, k, v, how):
        return _of_torch(q, k, v, how, backend).flatten(2)
    if library.is_traced(qkv):
        return library_attention(q, k, v, how)[0].flatten(2)
    packed: Tensor = NativePackedAttention.apply(qkv, num_heads, head_dim, how)
    return packed


def partial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: AttentionMask = CAUSAL,
    kv_index: Sequence[int] | None = None,
    dropout_p: float = 0.0,
    key: Key = (0, 0),
    sample_ids: Tensor | None = None,
    first_head: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`attention` over some of the keys, and the log-sum-exp of each query's scores (B, N, S), wide; without gradients.

    `combine_partials` makes attention over all keys of such parts, `partial_attention_backward` their gradients: what
    ring attention is made of (Liu et al. 2023). A query that sees none of these keys has zeros, and minus infinity.
    """
    how = _checked(q, k, v, mask, kv_index, dropout_p, key, sample_ids, first_head)
    with torch.no_grad():
        if _takes(backend, q, k, v):
            return native_forward(q, k, v, how)
        return reference.attention_and_lse(q, k, v, **how.named())


def partial_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    mask: AttentionMask = CAUSAL,
    kv_index: Sequence[int] | None = None,
    dropout_p: float = 0.0,
    key: Key = (0, 0),
    sample_ids: Tensor | None = None,
    first_head: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys add to the gradient of q, and the gradients of k and v.

    `out` (B, S, N, D) and `lse` (B, N, S) are those over all keys, `dout` is the gradient of that `out`.
    """
    how = _checked(q, k, v, mask, kv_index, dropout_p, key, sample_ids, first_head)
    with torch.no_grad():
        if not _takes(backend, q, k, v):
            return reference.attention_backward(dout, q, k, v, out, lse, **how.named())
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        native_backward(dout, q, k, v, out, lse, how, (dq, dk, dv))
        return dq, dk, dv


def combine_partials(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over all keys, and its log-sum-exp, of what `partial_attention` gave over parts of them."""
    sums = torch.stack([lse for _, lse in parts])
    total = sums.logsumexp(0)
    # A query that sees nothing at all: every share is zero.
    shares = (sums - total.masked_fill(total.isneginf(), 0.0)).exp().transpose(2, 3)[..., None]
    outs = torch.stack([out for out, _ in parts])
    return (outs.to(shares.dtype) * shares).sum(0).to(outs.dtype), total


def _takes(backend: str, q: Tensor, *others: Tensor) -> bool:
    """Whether attention runs natively; raises KernelError where `backend` is "fused" and it cannot."""
    reason = _cuda_limit(q) if q.is_cuda else ""
    if reason and backend == "fused":
        raise KernelError(f"attention: backend 'fused': {reason}")
    return not reason and library.takes("attention", backend, q, *others)


def _runs_natively(backend: str, q: Tensor, k: Tensor, v: Tensor, how: How) -> bool:
    """Whether the native op is due: it takes the tensors, and torch's is not known to be faster."""
    return _takes(backend, q, k, v) and not _loses(backend, q, k, how)


def _loses(backend: str, q: Tensor, k: Tensor, how: How) -> bool:
    """Whether torch's attention is faster on this GPU, where it does the same and either may be taken."""
    if backend != "auto" or not q.is_cuda or library.is_traced(q) or not how.is_torchs:
        return False
    device = torch.cuda.get_device_name(q.device)
    length = 1 << (max(q.shape[1], k.shape[1]) - 1).bit_length()
    shape = f"D{q.shape[3]} N{q.shape[2]}/{k.shape[2]} S{length} B{q.shape[0]}"
    kind = "causal" if how.mask.causal else "full"
    name = f"{device}, torch {torch.__version__}: {str(q.dtype).removeprefix('torch.')} {shape} {kind}"
    shapes = (q.shape, k.shape, k.shape)

    def trial(backend: str) -> Callable[[], object]:
        given = [torch.randn(s, dtype=q.dtype, device=q.device, requires_grad=True) for s in shapes]

        def run() -> object:
            with torch.enable_grad():
                out = attention(*given, mask=how.mask, kv_index=how.kv_index, backend=backend)
                return torch.autograd.grad(out, given, out)

        return run

    trials = {name: trial(name) for name in ("fused", "torch")}
    return attention_contest().winner(name, trials, cuda_seconds) == "torch"


def _cuda_limit(q: Tensor) -> str:
    """Why the CUDA kernels do not take heads like these of q (B, S, N, D); empty if they do."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"{q.dtype} on {q.device}: the CUDA kernels take bf16 and fp16"
    features = q.shape[-1]
    if features % CUDA_PACK or not 0 < features <= _CUDA_MOST_FEATURES:
        return (
            f"heads of {features} features on {q.device}: must be a multiple of {CUDA_PACK} up to {_CUDA_MOST_FEATURES}"
        )
    return "" if LIBRARY is not None else library.MISSING  # its structures hold the arguments


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    kv_index: Sequence[int] | None,
    dropout_p: float,
    key: Key,
    sample_ids: Tensor | None,
    first_head: int,
) -> How:
    """What the arguments say, with the regular `kv_index` where it is None; raises KernelError where they do not fit."""
    batch, num_queries, num_heads, features = q.shape
    num_kv_heads = k.shape[2]
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != features:
        raise KernelError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: must be (B, S, N, D) and twice "
            "(B, S', K, D)"
        )
    mask.check(batch, num_queries, k.shape[1], num_heads)
    if kv_index is None:
        if num_heads % num_kv_heads:
            raise KernelError(f"attention: {num_heads} query and {num_kv_heads} key/value heads need a kv_index")
        kv_index = _grouping(num_heads, num_kv_heads)
    if len(kv_index) != num_heads:
        raise KernelError(f"attention: kv_index has {len(kv_index)} entries for {num_heads} query heads")
    if min(kv_index, default=0) < 0 or max(kv_index, default=0) >= num_kv_heads:
        raise KernelError(f"attention: kv_index {tuple(kv_index)}: must name the {num_kv_heads} key/value heads")
    if dropout_p > 0.0 and sample_ids is None:
        raise KernelError(f"attention: dropout_p = {dropout_p!r} needs the sample ids")
    return How(mask, tuple(kv_index), dropout_p, key, sample_ids if dropout_p > 0.0 else None, first_head)


def _grouping(num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
    """Neighbouring query heads share a key/value head."""
    group = num_heads // num_kv_heads if num_heads % num_kv_heads == 0 else 0
    return tuple(head // group for head in range(num_heads)) if group else ()
