"""Attention as `csrc/` runs it: the form of its arguments, forward and backward, and torch's two forms of the op."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from trilith.kernels import library, reference
from trilith.kernels.library import DTYPES, LIBRARY, address
from trilith.kernels.mask import AttentionMask, BlockLayout
from trilith.kernels.ops.library_form import define, differentiate
from trilith.kernels.stream import Key, threshold

CUDA_PACK = 8


def split_heads(qkv: Tensor, num_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v that lie one behind the other in qkv (B, S, (N + 2 K) D)."""
    heads = qkv.unflatten(-1, (-1, head_dim))
    num_kv_heads = (heads.shape[2] - num_heads) // 2
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=2)
    return q, k, v


@dataclass(frozen=True, eq=False)
class How:
    """All but the tensors that gradients flow to."""

    mask: AttentionMask
    kv_index: tuple[int, ...]
    dropout_p: float
    key: Key
    sample_ids: Tensor | None
    first_head: int

    def named(self) -> dict[str, Any]:
        """As the arguments of `reference.attention`."""
        heads = (self.first_head, self.first_head + len(self.kv_index))
        names = {"mask": self.mask, "kv_index": self.kv_index, "dropout_p": self.dropout_p, "key": self.key}
        return names | {"sample_ids": self.sample_ids, "head_range": heads}

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
    """The native form of a `How`; holds what its addresses point to."""

    def __init__(self, how: How, device: torch.device) -> None:
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
        is_aligned = x.data_ptr() % 16 == 0 and all(size <= 1 or stride % CUDA_PACK == 0 for size, stride in strides)
        is_readable = is_readable and is_aligned
    return x if is_readable else x.contiguous()


def native_forward(q: Tensor, k: Tensor, v: Tensor, how: How) -> tuple[Tensor, Tensor]:
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


def native_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, how: How, into: tuple[Tensor, ...]
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


class NativeAttention(torch.autograd.Function):
    """Keeps its inputs, its result, and one number a query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        out, lse = native_forward(q, k, v, how)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = how
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        into = tuple(x.new_empty(x.shape) for x in (q, k, v))
        native_backward(gradients[0], q, k, v, out, lse, ctx.how, into)
        return (*into, None)


class NativePackedAttention(torch.autograd.Function):
    """The same of one tensor."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int, head_dim: int, how: How) -> Tensor:
        out, lse = native_forward(*split_heads(_readable(qkv), num_heads, head_dim), how)
        ctx.save_for_backward(qkv, out, lse)
        ctx.about = num_heads, head_dim, how
        return out.view(*out.shape[:2], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse = ctx.saved_tensors
        num_heads, head_dim, how = ctx.about
        dqkv = qkv.new_empty(qkv.shape)
        into = split_heads(dqkv, num_heads, head_dim)
        native_backward(gradients[0], *split_heads(_readable(qkv), num_heads, head_dim), out, lse, how, into)
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
) -> How:
    blocks = None if live is None else BlockLayout(block, live)
    positions = (query_positions, key_positions, key_begins, key_ends)
    mask = AttentionMask(causal, window or None, prefix, slopes, *positions, blocks)
    return How(mask, tuple(kv_index), dropout_p, (key_first, key_second), sample_ids, first_head)


def _arguments(how: How) -> tuple[Any, ...]:
    m = how.mask
    masks = (list(how.kv_index), m.causal, m.window or 0, m.prefix, m.slopes, m.query_positions, m.key_positions)
    blocks = (None, 0) if m.blocks is None else (m.blocks.live, m.blocks.size)
    return (*masks, m.key_begins, m.key_ends, *blocks, how.dropout_p, *how.key, how.sample_ids, how.first_head)


def _library_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return native_forward(q, k, v, _how(*rest))


def _library_forward_like(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = reference.accumulation_dtype(q.dtype)
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide)


def _library_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _library_backward_like(dout, q, k, v, out, lse, *rest)
    native_backward(dout, q, k, v, out, lse, _how(*rest), (dq, dk, dv))
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


def library_attention(q: Tensor, k: Tensor, v: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """The op in torch.library's form: result and log-sum-exp."""
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
