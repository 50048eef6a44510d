"""Random numbers that belong to the model: pure functions of a key and of global indices, the same in every layout.

This docstring is the specification. Any implementation (numpy, C++, CUDA) follows it and agrees bit for bit. Numbers
are 64-bit IEEE doubles unless said otherwise; each written operation is rounded by itself, to nearest even, in the
written order: nothing is fused (no FMA), nothing is replaced (no reciprocal multiplication), no library function is
called.

**Generator.** Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
multipliers 0xD2511F53 and 0xCD9E8D57, key steps 0x9E3779B9 and 0xBB67AE85, ten rounds. A key is two 32-bit words
(`rng.stream_key`); a call maps a counter (c0, c1, c2, c3) of 32-bit words to four 32-bit words w0..w3.

**Normal numbers.** Element i (its row-major index in the whole canonical tensor, below 2^66) takes word w = w[i mod
4] of counter (floor(i/4) mod 2^32, floor(i/2^34), 0, 0). It is the inverse of the normal distribution at u = (w +
0.5) / 2^32, by algorithm AS 241, PPND7 (Wichura, Applied Statistics 37, 1988; about 7 digits), in these steps:

    q = u - 0.5                                                    (exact, as is u)
    if |q| <= 0.425:
        r = 0.180625 - q*q
        z = (q * (((A3*r + A2)*r + A1)*r + A0)) / (((B3*r + B2)*r + B1)*r + 1)
    else:
        v = 0.5 - |q|                                              (exact; 2^-33 <= v < 0.075)
        t = root(-ln(v)) - 1.6
        z = ((((C3*t + C2)*t + C1)*t + C0) / ((D2*t + D1)*t + 1)) with the sign of q

    ln(v): v = m * 2^e with integer e and H <= m < 2H, H = 0x1.6a09e667f3bcdp-1 (sqrt(1/2) as a double);
        s = (m - 1) / (m + 1);  y = s*s
        ln(v) = e*LN2 + s*(((((G5*y + G4)*y + G3)*y + G2)*y + G1)*y + G0)
    root(x), square root to 11 digits: g = x*0.1674 + 1.289; then three times g = (g + x/g) * 0.5

    A = 3.3871327179, 50.434271938, 159.29113202, 59.109374720      B1.. = 17.895169469, 78.757757664, 67.187563600
    C = 1.4234372777, 2.7568153900, 1.3067284816, 0.17023821103     D1.. = 0.73700164250, 0.12021132975
    LN2 = 0x1.62e42fefa39efp-1      G0..G5 = 2, 2/3, 2/5, 2/7, 2/9, 2/11 (the nearest doubles)

(The third branch of AS 241 starts at u < 1.4e-11 and 2^-33 is larger: it cannot be reached.) An initial value is z *
std, rounded to fp64 or to fp32; bf16 and fp16 are rounded from that fp32 value, so that low-precision weights are
exactly the rounded fp32 master weights.

**Dropout.** One call decides eight neighbours, with 16 bits each. For sample s (consumed-sample index, below 2^48),
position x (below 2^32) and feature f the counter is (floor(s / 2^32), x, s mod 2^32, floor(f/8)); for attention, with
query head h (below 2^16), query position x and key position y it is (h + 2^16 * floor(s / 2^32), x, s mod 2^32,
floor(y/8)). All are global indices. Decision j = f mod 8 (or y mod 8) is the low half of w[j/2] where j is even, the
high half where it is odd. The element is kept where this half, unsigned, is >= T = round(65536 * p) (ties to even),
and a kept one is multiplied by 65536 / (65536 - T), so that the expectation is exact although p is rounded to 16
bits. The small, slow indices stand in the first three words because then the first three rounds work on small
tensors.

On CPUs the native library (csrc/common/philox.h, csrc/cpu/random.cpp) makes the numbers where it was built. The torch
implementation, for everything else (`backend="torch"` asks for it), holds 32-bit words in int64, works through bounded
pieces and keeps no state. It reads halves and words of an int64 through views, so it needs a little-endian machine (as
every device torch supports is).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trilith.errors import KernelError
from trilith.kernels import library
from trilith.kernels.library import DTYPES, MISSING, is_traced
from trilith.sharding import Box, contiguous_strides

Key = tuple[int, int]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Flip the top bit of each 16-bit half or 32-bit word of an int64: unsigned order becomes signed order.
_FLIP_HALVES = 0x8000800080008000 - (1 << 64)
_FLIP_WORDS = 0x8000000080000000 - (1 << 64)

_A = (59.109374720, 159.29113202, 50.434271938, 3.3871327179)
_B = (67.187563600, 78.757757664, 17.895169469, 1.0)
_C = (0.17023821103, 1.3067284816, 2.7568153900, 1.4234372777)
_D = (0.12021132975, 0.73700164250, 1.0)
_G = (2 / 11, 2 / 9, 2 / 7, 2 / 5, 2 / 3, 2.0)
_LN2 = float.fromhex("0x1.62e42fefa39efp-1")
_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD

_DECISIONS = 8
_HALF_RANGE = 1 << 16
# Philox calls at once: on a CPU the temporaries of one piece stay in the cache; a GPU wants long launches.
_CPU_PIECE = 1 << 15
_GPU_PIECE = 1 << 21


def _is_native(backend: str, *tensors: Tensor, on_cuda: bool = False) -> bool:
    """Whether the native library makes what belongs to these tensors; `on_cuda`: whether it can there."""
    device = tensors[0].device
    if backend not in ("auto", "fused") or not library.is_trusted(device, backend):
        return False
    is_takeable = device.type == "cpu" or (on_cuda and device.type == "cuda")
    if is_takeable and not library.refusal(device) and not any(x.device != device or is_traced(x) for x in tensors):
        return True
    if backend == "fused":
        devices = sorted({str(x.device) for x in tensors})
        raise KernelError(f"random stream: backend 'fused': {MISSING or f'tensors on {devices}: must be on the CPU'}")
    return False


def _piece(device: torch.device) -> int:
    return _CPU_PIECE if device.type == "cpu" else _GPU_PIECE


def _rounds(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds on broadcastable int64 words; c0 and c2 are below 2^32, c1 and c3 are right in their low 32 bits.

    So are the results. Words keep their own shapes while they can: what depends on few indices is computed once.
    """
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A product is below 2^64: in int64 it wraps and its bits are right. The low word needs no mask to be xored.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        c2 = ((product0 >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3 = product1, product0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of four broadcastable int64 tensors of 32-bit words; returns four int64 tensors of 32-bit words."""
    w0, w1, w2, w3 = torch.broadcast_tensors(*_rounds(*counter, key))
    return w0, w1 & _MASK, w2, w3 & _MASK


def _packed(out: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Key, flip: int) -> None:
    """Philox into `out` (..., 2) int64: w0 and w1, w2 and w3 in the low and high word, then xor with `flip`."""
    w0, w1, w2, w3 = _rounds(*counter, key)
    torch.bitwise_or(w0, w1 << 32, out=out[..., 0])
    torch.bitwise_or(w2, w3 << 32, out=out[..., 1])
    out.bitwise_xor_(flip)


# --- normal numbers -----------------------------------------------------------------------------------------------


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Polynomial from the highest coefficient down, each product and each sum rounded by itself."""
    value = x * coefficients[0]
    for coefficient in coefficients[1:-1]:
        value.add_(coefficient).mul_(x)
    return value.add_(coefficients[-1])


def _log(v: Tensor) -> Tensor:
    """ln of positive normal float64 numbers, as the module docstring defines it."""
    bits = v.view(torch.int64)
    exponent = (bits - _SQRT_HALF_BITS) >> 52
    mantissa = (bits - (exponent << 52)).view(torch.float64)
    s = (mantissa - 1.0).div_(mantissa + 1.0)
    return (exponent.to(torch.float64) * _LN2).add_(_horner(s * s, _G).mul_(s))


def _root(x: Tensor) -> Tensor:
    """Square root for 2.5 < x < 23 as the module docstring defines it; torch.sqrt is not correctly rounded on CPUs."""
    guess = (x * 0.1674).add_(1.289)
    for _ in range(3):
        guess = (x / guess).add_(guess).mul_(0.5)
    return guess


def _inverse_normal(q: Tensor) -> Tensor:
    """Inverse of the normal distribution at u = q + 0.5 (AS 241, PPND7); q is flat float64 with |q| < 0.5."""
    r = 0.180625 - q * q
    z = _horner(r, _A).mul_(q).div_(_horner(r, _B))
    tail = (q.abs() > 0.425).nonzero().squeeze(1)
    if tail.numel():
        far = q.index_select(0, tail)
        t = _root(_log(0.5 - far.abs()).neg_()).sub_(1.6)
        z.index_copy_(0, tail, torch.copysign(_horner(t, _C).div_(_horner(t, _D)), far))
    return z


def _centred(signed_word: Tensor) -> Tensor:
    """q = u - 0.5 of words given as w - 2^31; exact."""
    return signed_word.to(torch.float64).add_(0.5).mul_(2.0**-32)


def normal(key: Key, indices: Tensor) -> Tensor:
    """Standard normal numbers of the elements `indices` (int64, any shape) of a canonical tensor, in float64.

    One Philox call per element; `fill_box` uses all four words of a call and is what fills weights.
    """
    flat = indices.reshape(-1)
    block, nought = flat >> 2, flat.new_zeros(())
    words = torch.stack(philox4x32((block & _MASK, block >> 32, nought, nought), key), dim=1)
    word = words.gather(1, (flat & 3)[:, None]).squeeze(1)
    return _inverse_normal(_centred(word - (1 << 31))).reshape(indices.shape)


def _normal_runs(key: Key, starts: Tensor, length: int, skew: int | None) -> Tensor:
    """Normal numbers of runs of `length` elements from each of `starts` (R,) int64; float64 (R, length).

    `skew` is starts mod 4 where all runs have the same, None where they differ.
    """
    calls = ((3 if skew is None else skew) + length + 3) // 4
    block = (starts >> 2)[:, None] + torch.arange(calls, device=starts.device)
    nought = starts.new_zeros((1, 1))
    packed = block.new_empty((*block.shape, 2))
    _packed(packed, (block & _MASK, block >> 32, nought, nought), key, _FLIP_WORDS)
    words = packed.view(torch.int32).view(len(starts), calls * 4)
    if skew is None:
        columns = (starts & 3)[:, None] + torch.arange(length, device=starts.device)
        words = words.gather(1, columns)
    else:
        words = words[:, skew : skew + length]
    return _inverse_normal(_centred(words).reshape(-1)).view(len(starts), length)


def _run_starts(rows: range, shape: tuple[int, ...], box: Box, device: torch.device) -> Tensor:
    """Row-major canonical index of the first element of each of `rows`, counted in the box's dims but the last."""
    ordinal = torch.arange(rows.start, rows.stop, device=device)
    starts = torch.full_like(ordinal, box.start[-1])
    strides = contiguous_strides(shape)
    for dim in reversed(range(len(shape) - 1)):
        extent = box.stop[dim] - box.start[dim]
        starts.add_((ordinal % extent).add_(box.start[dim]), alpha=strides[dim])
        ordinal = ordinal.div(extent, rounding_mode="floor")
    return starts


def _merged(shape: tuple[int, ...], box: Box) -> tuple[tuple[int, ...], Box]:
    """The same elements with trailing dims joined as far as the box stays one contiguous run per row."""
    dims, start, stop = list(shape) or [1], list(box.start) or [0], list(box.stop) or [1]
    while len(dims) > 1 and start[-1] == 0 and stop[-1] == dims[-1]:
        width = dims.pop()
        start.pop(), stop.pop()
        dims[-1], start[-1], stop[-1] = dims[-1] * width, start[-1] * width, stop[-1] * width
    return tuple(dims), Box(tuple(start), tuple(stop))


def _pieces(num_rows: int, run: int, piece: int) -> Iterator[tuple[range, int, int]]:
    """Cut rows of `run` elements into (rows, first column, end column) of at most about `piece` elements."""
    rows, columns = max(1, piece // run), min(run, piece)
    for row in range(0, num_rows, rows):
        for column in range(0, run, columns):
            yield range(row, min(row + rows, num_rows)), column, min(column + columns, run)


def fill_box(
    key: Key,
    shape: tuple[int, ...],
    box: Box,
    kind: str,
    std: float,
    out_dtype: torch.dtype,
    device: torch.device | str,
    backend: str = "auto",
) -> Tensor:
    """Initial values of the elements `box` of a canonical tensor of `shape`, in `out_dtype`, shaped like the box.

    `kind` is `normal` (mean 0, standard deviation `std`), `zeros` or `ones`. Any box equals the slice of the whole, and
    memory beyond the result is bounded. Raises KernelError for another kind.
    """
    device = torch.device(device)
    out = torch.empty(box.shape, dtype=out_dtype, device=device)
    if kind in ("zeros", "ones"):
        return out.fill_(float(kind == "ones"))
    if kind != "normal":
        raise KernelError(f"fill_box: kind = {kind!r}: must be 'normal', 'zeros' or 'ones'")
    if out.numel() == 0:
        return out
    dims, joined = _merged(tuple(shape), box)
    run = joined.shape[-1]
    table = out.view(-1, run)
    if out_dtype in DTYPES and _is_native(backend, out):
        _fill_native(key, table, dims, joined, std)
        return out
    aligned = len(table) == 1 or all(stride % 4 == 0 for stride in contiguous_strides(dims)[:-1])
    # A call makes four elements, but thin rows use only one of them.
    for rows, lo, hi in _pieces(len(table), run, _piece(device) * (4 if run >= 8 else 1)):
        starts = _run_starts(rows, dims, joined, device) + lo
        skew = int(starts[0]) & 3 if aligned else None
        values = _normal_runs(key, starts, hi - lo, skew).mul_(std)
        if out_dtype in (torch.bfloat16, torch.float16):
            values = values.to(torch.float32)
        table[rows.start : rows.stop, lo:hi] = values
    return out


def _fill_native(key: Key, table: Tensor, dims: tuple[int, ...], box: Box, std: float) -> None:
    """`fill_box` of the joined box into its rows."""
    leading = torch.tensor([box.shape[:-1], contiguous_strides(dims)[:-1]], dtype=torch.int64)
    first = sum(start * stride for start, stride in zip(box.start, contiguous_strides(dims), strict=True))
    extents, strides = leading
    library.run(
        "fill_normal",
        table,
        DTYPES[table.dtype],
        table.data_ptr(),
        *table.shape,
        first,
        extents.data_ptr(),
        strides.data_ptr(),
        len(dims) - 1,
        *key,
        std,
    )


# --- dropout ------------------------------------------------------------------------------------------------------


def threshold(p: float) -> int:
    """Half-words below this are dropped."""
    bound = round(p * _HALF_RANGE)
    if not 0 <= bound < _HALF_RANGE:
        raise KernelError(f"dropout probability = {p!r}: must be at least 0 and below 1")
    return bound


def keep_scale(p: float) -> float:
    """What a kept element is multiplied by: the inverse of the exact probability of being kept."""
    return _HALF_RANGE / (_HALF_RANGE - threshold(p))


def _decide(high: Tensor, middle: Tensor, low: Tensor, blocks: Tensor, key: Key, p: float) -> Tensor:
    """Decisions of counters (high (R,), middle (1 or R, X), low (R,), blocks (Y,)); bool (R, X, 8 * Y)."""
    rows, columns, width = len(high), middle.shape[1], len(blocks)
    keep = torch.empty((rows, columns, width * _DECISIONS), dtype=torch.bool, device=high.device)
    bound = threshold(p) - _HALF_RANGE // 2
    for some, lo, hi in _pieces(rows, max(columns, 1), max(1, _piece(high.device) // max(width, 1))):
        part = slice(some.start, some.stop)
        counter = (
            high[part, None, None],
            (middle if len(middle) == 1 else middle[part])[:, lo:hi, None],
            low[part, None, None],
            blocks,
        )
        packed = blocks.new_empty((len(some), hi - lo, width, 2))
        _packed(packed, counter, key, _FLIP_HALVES)
        torch.ge(packed.view(torch.int16).flatten(2), bound, out=keep[part, lo:hi])
    return keep


def _block_range(lo: int, hi: int, device: torch.device) -> tuple[Tensor, slice]:
    """The blocks of eight that cover [lo, hi), and where it lies in them."""
    first = lo // _DECISIONS
    blocks = torch.arange(first, -(-hi // _DECISIONS), device=device)
    return blocks, slice(lo - first * _DECISIONS, hi - first * _DECISIONS)


def check_places(sample_ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both, contiguous, and the distance between two samples' positions; KernelError where they are not as documented."""
    if sample_ids.dtype != torch.int64 or sample_ids.dim() != 1:
        raise KernelError(f"dropout: sample_ids {tuple(sample_ids.shape)} {sample_ids.dtype}: must be (B,) int64")
    wanted = (len(sample_ids), positions.shape[-1]) if positions.dim() == 2 else positions.shape[-1:]
    if positions.dtype != torch.int64 or positions.shape != wanted or positions.dim() == 0:
        raise KernelError(
            f"dropout: positions {tuple(positions.shape)} {positions.dtype}: must be (S,) or (B, S) int64"
        )
    return sample_ids.contiguous(), positions.contiguous(), positions.shape[-1] if positions.dim() == 2 else 0


def dropout_keep(
    key: Key,
    sample_ids: Tensor,
    positions: Tensor,
    feature_range: tuple[int, int],
    p: float,
    backend: str = "auto",
) -> Tensor:
    """Which elements dropout keeps: bool (B, S, hi - lo), for features lo <= f < hi = `feature_range`.

    `sample_ids` (B,) int64 are consumed-sample indices, `positions` (S,) or (B, S) int64 positions in the sequence, all
    global: any sub-range gives the slice of the whole. Raises KernelError where not 0 <= p < 1.
    """
    lo, hi = feature_range
    if _is_native(backend, sample_ids, positions, on_cuda=True):
        sample_ids, positions, stride = check_places(sample_ids, positions)
        shape = (len(sample_ids), positions.shape[-1], hi - lo)
        keep = torch.empty(shape, dtype=torch.bool, device=sample_ids.device)
        addresses = keep.data_ptr(), sample_ids.data_ptr(), positions.data_ptr()
        library.run("dropout_keep", keep, *addresses, stride, *shape, lo, *key, threshold(p))
        return keep
    blocks, where = _block_range(lo, hi, sample_ids.device)
    middle = positions if positions.dim() == 2 else positions[None]
    return _decide(sample_ids >> 32, middle, sample_ids & _MASK, blocks, key, p)[..., where]


def attention_keep(
    key: Key,
    sample_ids: Tensor,
    head_range: tuple[int, int],
    queries: Tensor,
    keys: Tensor | tuple[int, int],
    p: float,
    backend: str = "auto",
) -> Tensor:
    """Which attention probabilities dropout keeps: bool (B, N, Q, Y) for query heads lo <= h < hi = `head_range`.

    `queries` (Q,) int64 are global positions; `keys` too (Y,), or a range (lo, hi) of them, which is cheaper.
    Sub-ranges give the slice of the whole. Raises KernelError where not 0 <= p < 1.
    """
    if isinstance(keys, tuple) and _is_native(backend, sample_ids, queries):
        return _attention_keep_native(key, sample_ids, head_range, queries, keys, p)
    heads = torch.arange(*head_range, device=sample_ids.device)
    high = ((sample_ids >> 32)[:, None] * _HALF_RANGE + heads).reshape(-1)
    low = (sample_ids & _MASK)[:, None].expand(-1, len(heads)).reshape(-1)
    if isinstance(keys, tuple):
        blocks, where = _block_range(*keys, sample_ids.device)
        keep = _decide(high, queries[None], low, blocks, key, p)[..., where]
    else:
        blocks, place = torch.unique(keys // _DECISIONS, return_inverse=True)
        keep = _decide(high, queries[None], low, blocks, key, p)
        keep = keep.index_select(2, place * _DECISIONS + keys % _DECISIONS)
    return keep.unflatten(0, (len(sample_ids), len(heads)))


def _attention_keep_native(
    key: Key, sample_ids: Tensor, head_range: tuple[int, int], queries: Tensor, keys: tuple[int, int], p: float
) -> Tensor:
    sample_ids, queries, stride = check_places(sample_ids, queries)
    if stride:
        raise KernelError(f"attention_keep: queries {tuple(queries.shape)}: must be (Q,)")
    shape = (len(sample_ids), head_range[1] - head_range[0], len(queries), keys[1] - keys[0])
    keep = torch.empty(shape, dtype=torch.bool)
    library.run(
        "attention_keep",
        keep,
        keep.data_ptr(),
        sample_ids.data_ptr(),
        queries.data_ptr(),
        *shape,
        head_range[0],
        keys[0],
        *key,
        threshold(p),
    )
    return keep
