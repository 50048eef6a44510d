"""Attention of query heads over grouped key/value heads (Ainslie et al. 2023) under an `AttentionMask`."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trilith.errors import KernelError
from trilith.kernels import library, reference
from trilith.kernels.contest import attention_contest, cuda_seconds
from trilith.kernels.library import DTYPES, LIBRARY, address
from trilith.kernels.mask import CAUSAL, AttentionMask, BlockLayout
from trilith.kernels.ops.library_form import define, differentiate
from trilith.kernels.stream import Key, threshold

_CUDA_PACK, _CUDA_MOST_FEATURES = 8, 256


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
    heads = head_range or (0, q.shape[2])
    how = _checked(q, k, v, mask, kv_index, dropout_p, key, sample_ids, heads[0])
    kv_index = how.kv_index
    if _takes(backend, q, k, v) and not _loses(backend, q, k, how):
        return _library(q, k, v, how)[0] if library.is_traced(q) else _Attention.apply(q, k, v, how)
    if backend == "reference" or not how.is_torchs:
        return reference.attention(
            q, k, v, kv_index=kv_index, mask=mask, dropout_p=dropout_p, key=key, sample_ids=sample_ids, head_range=heads
        )
    if kv_index != _grouping(q.shape[2], k.shape[2]):
        k, v = reference.expand_heads(k, kv_index), reference.expand_heads(v, kv_index)
    mixed = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=mask.causal,
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
    q, k, v = _split(qkv, num_heads, head_dim)
    first = head_range[0] if head_range else 0
    how = _checked(q, k, v, mask, kv_index, dropout_p, key, sample_ids, first)
    if _takes(backend, q) and not library.is_traced(qkv) and not _loses(backend, q, k, how):
        return _PackedAttention.apply(qkv, num_heads, head_dim, how)
    mixed = attention(
        q,
        k,
        v,
        mask=mask,
        kv_index=kv_index,
        dropout_p=dropout_p,
        key=key,
        sample_ids=sample_ids,
        head_range=head_range,
        backend=backend,
    )
    return mixed.flatten(2)


def _takes(backend: str, q: Tensor, *others: Tensor) -> bool:
    """Whether attention runs natively; raises KernelError where `backend` is "fused" and it cannot."""
    reason = _cuda_limit(q) if q.is_cuda else ""
    if reason and backend == "fused":
        raise KernelError(f"attention: backend 'fused': {reason}")
    return not reason and library.takes("attention", backend, q, *others)


def _loses(backend: str, q: Tensor, k: Tensor, how: _How) -> bool:
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
    if features % _CUDA_PACK or not 0 < features <= _CUDA_MOST_FEATURES:
        return f"heads of {features} features on {q.device}: must be a multiple of {_CUDA_PACK} up to {_CUDA_MOST_FEATURES}"
    return "" if LIBRARY is not None else library.MISSING  # its structures hold the arguments


def _split(qkv: Tensor, num_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = qkv.unflatten(-1, (-1, head_dim))
    num_kv_heads = (heads.shape[2] - num_heads) // 2
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=2)
    return q, k, v


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
) -> _How:
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
    return _How(mask, tuple(kv_index), dropout_p, key, sample_ids if dropout_p > 0.0 else None, first_head)


def _grouping(num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
    """Neighbouring query heads share a key/value head."""
    group = num_heads // num_kv_heads if num_heads % num_kv_heads == 0 else 0
    return tuple(head // group for head in range(num_heads)) if group else ()


# --- what runs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _How:
    """All but the tensors that gradients flow to."""

    mask: AttentionMask
    kv_index: tuple[int, ...]
    dropout_p: float
    key: Key
    sample_ids: Tensor | None
    first_head: int

    @property
    def is_torchs(self) -> bool:
        """Whether torch's own attention does it without a matrix of scores."""
        return self.mask.is_plain and self.dropout_p == 0.0


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> Any:
    assert LIBRARY is not None
    batch, num_queries, num_heads, features = q.shape
    strides = [LIBRARY.HeadStrides(*x.stride()[:3]) for x in (q, k, v)]
    return LIBRARY.AttentionSizes(
        batch, num_queries, k.shape[1], num_heads, k.shape[2], features, features**-0.5, *strides
    )


class _Rule:
    """The native form of a `_How`; holds what its addresses point to."""

    def __init__(self, how: _How, device: torch.device) -> None:
        assert LIBRARY is not None
        mask, p = how.mask, how.dropout_p
        live, ranges = None if mask.blocks is None else mask.blocks.live, (mask.key_begins, mask.key_ends)
        positions = (mask.query_positions, mask.key_positions)
        given = (mask.prefix, mask.slopes, *positions, *ranges, live, how.sample_ids)
        held = [None if x is None else x.contiguous() for x in given]
        if held[1] is not None:
            held[1] = held[1].double()
        prefix, slopes, queries, keys, begins, ends, live, samples = self.held = tuple(held)
        self.kv_index = array("q", how.kv_index)
        self._on_device = None if device.type == "cpu" else _indices_on(how.kv_index, device)
        self.native = LIBRARY.AttentionRule(
            mask.causal,
            mask.window or 0,
            address(prefix),
            address(slopes),
            address(queries),
            address(keys),
            0 if queries is None or queries.dim() == 1 else queries.shape[1],
            0 if keys is None or keys.dim() == 1 else keys.shape[1],
            address(begins),
            address(ends),
            0 if begins is None or begins.dim() == 1 else begins.shape[1],
            address(live),
            1 if mask.blocks is None else mask.blocks.size,
            0 if live is None or len(live) == 1 else live[0].numel(),
            0 if live is None else live.shape[2],
            address(samples),
            how.first_head,
            *how.key,
            threshold(p) if p > 0.0 else 0,
        )

    @property
    def heads(self) -> int:
        """Where the key/value head of each query head stands."""
        return self.kv_index.buffer_info()[0] if self._on_device is None else self._on_device.data_ptr()


@lru_cache(maxsize=64)
def _indices_on(kv_index: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(kv_index, dtype=torch.int64, device=device)


def _readable(x: Tensor) -> Tensor:
    """`x` with neighbouring features, and on CUDA heads that begin at multiples of 16 bytes: as it is, or a copy."""
    is_readable = x.stride(-1) == 1 or x.shape[-1] == 1
    if x.is_cuda:
        strides = zip(x.shape[:-1], x.stride()[:-1], strict=True)
        is_aligned = x.data_ptr() % 16 == 0 and all(size <= 1 or stride % _CUDA_PACK == 0 for size, stride in strides)
        is_readable = is_readable and is_aligned
    return x if is_readable else x.contiguous()


def _forward(q: Tensor, k: Tensor, v: Tensor, how: _How) -> tuple[Tensor, Tensor]:
    """The result (B, S, N, D), and the log-sum-exp of each query's scores (B, N, S), wide."""
    q, k, v = _readable(q), _readable(k), _readable(v)
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=reference.accumulation_dtype(q.dtype))
    rule = _Rule(how, q.device)
    library.run(
        "attention_forward",
        q,
        DTYPES[q.dtype],
        _sizes(q, k, v),
        rule.native,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        rule.heads,
        out.data_ptr(),
        lse.data_ptr(),
    )
    return out, lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, how: _How, into: tuple[Tensor, ...]
) -> None:
    """Gradients of q, k and v, written to the tensors of `into`, whose features are neighbours."""
    dout, q, k, v = dout.contiguous(), _readable(q), _readable(k), _readable(v)
    dq, dk, dv = into
    rule = _Rule(how, q.device)
    library.run(
        "attention_backward",
        q,
        DTYPES[q.dtype],
        _sizes(q, k, v),
        rule.native,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        rule.heads,
        out.data_ptr(),
        lse.data_ptr(),
        dout.data_ptr(),
        dq.data_ptr(),
        dk.data_ptr(),
        dv.data_ptr(),
        _sizes(dq, dk, dv),
        scratch=(q.shape[0], q.shape[2], q.shape[1]),
    )


class _Attention(torch.autograd.Function):
    """Keeps its inputs, its result, and one number a query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, how: _How) -> Tensor:
        out, lse = _forward(q, k, v, how)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = how
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        into = tuple(x.new_empty(x.shape) for x in (q, k, v))
        _backward(gradients[0], q, k, v, out, lse, ctx.how, into)
        return (*into, None)


class _PackedAttention(torch.autograd.Function):
    """The same of one tensor."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int, head_dim: int, how: _How) -> Tensor:
        out, lse = _forward(*_split(_readable(qkv), num_heads, head_dim), how)
        ctx.save_for_backward(qkv, out, lse)
        ctx.about = num_heads, head_dim, how
        return out.view(*out.shape[:2], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse = ctx.saved_tensors
        num_heads, head_dim, how = ctx.about
        dqkv = qkv.new_empty(qkv.shape)
        into = _split(dqkv, num_heads, head_dim)
        _backward(gradients[0], *_split(_readable(qkv), num_heads, head_dim), out, lse, how, into)
        return dqkv, None, None, None


# --- the library's form -------------------------------------------------------------------------------------------------

_MASK = (
    "int[] kv_index, bool causal, int window, Tensor? prefix, Tensor? slopes, Tensor? query_positions, "
    "Tensor? key_positions, Tensor? key_begins, Tensor? key_ends, Tensor? live, int block"
)
_DROPOUT = "float dropout_p, int key_first, int key_second, Tensor? sample_ids, int first_head"


def _how(
    kv_index: Sequence[int],
    causal: bool,
    window: int,
    prefix: Tensor | None,
    slopes: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    key_begins: Tensor | None,
    key_ends: Tensor | None,
    live: Tensor | None,
    block: int,
    dropout_p: float,
    key_first: int,
    key_second: int,
    sample_ids: Tensor | None,
    first_head: int,
) -> _How:
    blocks = None if live is None else BlockLayout(block, live)
    positions = (query_positions, key_positions, key_begins, key_ends)
    mask = AttentionMask(causal, window or None, prefix, slopes, *positions, blocks)
    return _How(mask, tuple(kv_index), dropout_p, (key_first, key_second), sample_ids, first_head)


def _arguments(how: _How) -> tuple[Any, ...]:
    m = how.mask
    masks = (list(how.kv_index), m.causal, m.window or 0, m.prefix, m.slopes, m.query_positions, m.key_positions)
    blocks = (None, 0) if m.blocks is None else (m.blocks.live, m.blocks.size)
    return (*masks, m.key_begins, m.key_ends, *blocks, how.dropout_p, *how.key, how.sample_ids, how.first_head)


def _library_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, _how(*rest))


def _library_forward_like(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = reference.accumulation_dtype(q.dtype)
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide)


def _library_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _library_backward_like(dout, q, k, v, out, lse, *rest)
    _backward(dout, q, k, v, out, lse, _how(*rest), (dq, dk, dv))
    return dq, dk, dv


def _library_backward_like(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


attention_op = define(
    f"attention(Tensor q, Tensor k, Tensor v, {_MASK}, {_DROPOUT}) -> (Tensor, Tensor)",
    _library_forward,
    _library_forward_like,
)
attention_backward_op = define(
    f"attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_MASK}, {_DROPOUT})"
    " -> (Tensor, Tensor, Tensor)",
    _library_backward,
    _library_backward_like,
)


def _library(q: Tensor, k: Tensor, v: Tensor, how: _How) -> tuple[Tensor, Tensor]:
    out, lse = attention_op(q, k, v, *_arguments(how))
    return out, lse


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, *(x for x in rest if isinstance(x, Tensor)))
    ctx.rest = [None if isinstance(x, Tensor) else x for x in rest]
    ctx.are_tensors = [isinstance(x, Tensor) for x in rest]


def _differentiated(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    held = iter(tensors)
    rest = [next(held) if is_tensor else x for x, is_tensor in zip(ctx.rest, ctx.are_tensors, strict=True)]
    gradients = attention_backward_op(dout, q, k, v, out, lse, *rest)
    return (*gradients, *[None] * len(rest))


differentiate("attention", _remember, _differentiated)
