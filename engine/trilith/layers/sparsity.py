"""Block-sparse attention: which blocks of scores each head computes. Pure functions of the config and the seed, no torch.

Attention that costs O(S) or O(S sqrt(S)) keeps, of all blocks of queries and keys, those near the diagonal and some that
tie the sequence together: representatives of windows (Child et al. 2019, "Generating Long Sequences with Sparse
Transformers", section 4), the first or chosen blocks as global ones beside a sliding window (Beltagy et al. 2020,
"Longformer", section 3), and random ones (Zaheer et al. 2020, "Big Bird", section 2). The patterns are those of DeepSpeed's
sparsity configurations, block for block, but for the random ones: here they are a function of (seed, head, row), so that
every rank and every layout draws the same. A layout belongs to the model: all layers have it, and a tensor rank takes the
heads that it holds.

A layout is a list of rows, one for each block of queries, with a byte for each block of keys: 1 where the block is live. In
a causal model the mask cuts what lies after the diagonal, whatever a pattern says there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from trilith.config.sparse_keys import (
    BigBirdBlocks,
    DenseBlocks,
    FixedBlocks,
    LongformerBlocks,
    SlidingWindowBlocks,
    SparseBlocks,
    VariableBlocks,
)
from trilith.rng import stream_key

Rows = list[bytearray]
_LIVE = b"\1"


def differs_by_head(sparse: SparseBlocks) -> bool:
    """Whether heads may have different layouts."""
    if isinstance(sparse, FixedBlocks):
        return sparse.different_layout_per_head and sparse.num_different_global_patterns > 1
    if isinstance(sparse, VariableBlocks | BigBirdBlocks):
        return sparse.different_layout_per_head and sparse.num_random_blocks > 0
    return False


def layout_number(sparse: SparseBlocks, head: int) -> int:
    """Heads of one number have one layout: that of the head which is called as it is numbered."""
    if not differs_by_head(sparse):
        return 0
    return head % sparse.num_different_global_patterns if isinstance(sparse, FixedBlocks) else head


def live_blocks(sparse: SparseBlocks, head: int, num_blocks: int, seed: int) -> Rows:
    """The layout of the query head with global index `head` over `num_blocks` blocks; `seed` is the run's."""
    head = layout_number(sparse, head)
    match sparse:
        case DenseBlocks():
            return [bytearray(_LIVE * num_blocks) for _ in range(num_blocks)]
        case FixedBlocks():
            return _fixed(sparse, head, num_blocks)
        case VariableBlocks():
            return _variable(sparse, head, num_blocks, seed)
        case BigBirdBlocks():
            return _bigbird(sparse, head, num_blocks, seed)
        case LongformerBlocks():
            rows = _sliding(sparse.num_sliding_window_blocks, num_blocks)
            _add_global(rows, _runs(sparse.global_block_indices, sparse.global_block_end_indices), False, True)
            return _cut(rows) if _looks_back(sparse) else rows
        case SlidingWindowBlocks():
            rows = _sliding(sparse.num_sliding_window_blocks, num_blocks)
            return _cut(rows) if _looks_back(sparse) else rows


def causal_density(sparse: SparseBlocks, num_heads: int, num_blocks: int, seed: int) -> float:
    """The live blocks of all heads, as a share of those that causality allows (the diagonal's counted whole)."""
    allowed = num_blocks * (num_blocks + 1) // 2
    counts: dict[int, int] = {}
    total = 0
    for head in range(num_heads):
        number = layout_number(sparse, head)
        if number not in counts:
            rows = live_blocks(sparse, head, num_blocks, seed)
            counts[number] = sum(line.count(_LIVE, 0, row + 1) for row, line in enumerate(rows))
        total += counts[number]
    return total / (num_heads * allowed)


# ---- the patterns -------------------------------------------------------------------------------------------------


def _fixed(sparse: FixedBlocks, head: int, num_blocks: int) -> Rows:
    """Windows side by side; the global blocks of a window are its last ones, or those before them for other patterns.

    A last window that is cut short has them at the same place, or at its end where that lies outside.
    """
    window, share, looks_back = sparse.num_local_blocks, sparse.num_global_blocks, _looks_back(sparse)
    place = window - (1 + head % sparse.num_different_global_patterns) * share
    whole = num_blocks - num_blocks % window
    starts = list(range(place, whole, window))
    if whole < num_blocks:
        starts.append(max(min(whole + place, num_blocks - share), 0))
    columns = _empty(num_blocks, 1)[0]
    for start in starts:
        _set(columns, start, start + share)
    rows = []
    for row in range(num_blocks):
        line = columns
        if looks_back:  # a run is seen from its first block on
            known = bisect_right(starts, row)
            line = columns[: starts[known - 1] + share] if known else bytearray()
        line = line[:num_blocks] + bytearray(num_blocks - len(line[:num_blocks]))
        begin = row - row % window
        _set(line, begin, row + 1 if looks_back else begin + window)
        if sparse.horizontal_global_attention and columns[row]:
            _set(line, 0, num_blocks)
        rows.append(line)
    return rows


def _variable(sparse: VariableBlocks, head: int, num_blocks: int, seed: int) -> Rows:
    """Random blocks of the whole row, windows of given lengths, global blocks."""
    rows, looks_back = _empty(num_blocks, num_blocks), _looks_back(sparse)
    _add_random(rows, sparse.num_random_blocks, [num_blocks] * num_blocks, (seed, head))
    begin, number, windows = 0, 0, sparse.local_window_blocks
    while begin < num_blocks:
        end = begin + windows[min(number, len(windows) - 1)]
        for row in range(begin, min(end, num_blocks)):
            _set(rows[row], begin, row + 1 if looks_back else end)
        begin, number = end, number + 1
    runs = _runs(sparse.global_block_indices, sparse.global_block_end_indices)
    _add_global(rows, runs, looks_back, sparse.horizontal_global_attention)
    return rows


def _bigbird(sparse: BigBirdBlocks, head: int, num_blocks: int, seed: int) -> Rows:
    """Random blocks (of those before the query's, where it sees no others), a sliding window, the first blocks."""
    rows, looks_back = _sliding(sparse.num_sliding_window_blocks, num_blocks), _looks_back(sparse)
    choices = [row + 1 if looks_back else num_blocks for row in range(num_blocks)]
    _add_random(rows, sparse.num_random_blocks, choices, (seed, head))
    _add_global(rows, [(0, sparse.num_global_blocks)], False, True)
    return _cut(rows) if looks_back else rows


# ---- their parts --------------------------------------------------------------------------------------------------


def _looks_back(sparse: FixedBlocks | VariableBlocks | BigBirdBlocks | LongformerBlocks | SlidingWindowBlocks) -> bool:
    return sparse.attention == "unidirectional"


def _empty(num_blocks: int, num_rows: int) -> Rows:
    return [bytearray(num_blocks) for _ in range(num_rows)]


def _set(line: bytearray, begin: int, end: int) -> None:
    """Make the blocks [begin, end) of a row live, as far as there are any."""
    end = min(end, len(line))
    if begin < end:
        line[begin:end] = _LIVE * (end - begin)


def _cut(rows: Rows) -> Rows:
    """Without what lies after the diagonal."""
    for row, line in enumerate(rows):
        line[row + 1 :] = bytes(len(line) - row - 1)
    return rows


def _sliding(width: int, num_blocks: int) -> Rows:
    """Each block with width // 2 neighbours on either side."""
    rows, reach = _empty(num_blocks, num_blocks), width // 2
    for row, line in enumerate(rows):
        _set(line, max(row - reach, 0), row + reach + 1)
    return rows


def _runs(starts: tuple[int, ...], ends: tuple[int, ...] | None) -> list[tuple[int, int]]:
    return [(start, start + 1) for start in starts] if ends is None else list(zip(starts, ends, strict=True))


def _add_global(rows: Rows, runs: Iterable[tuple[int, int]], looks_back: bool, horizontal: bool) -> None:
    """Columns of each run [begin, end), from its first row on where rows look back only; and its rows."""
    for begin, end in runs:
        for row, line in enumerate(rows):
            if horizontal and begin <= row < end:
                _set(line, 0, len(line))
            if row >= begin or not looks_back:
                _set(line, begin, end)


def _add_random(rows: Rows, count: int, choices: list[int], source: tuple[int, int]) -> None:
    """`count` random blocks in each row among its first `choices[row]`, or all of them where there are fewer."""
    for row, line in enumerate(rows):
        for column in _sample(min(count, choices[row]), choices[row], (*source, row)):
            line[column] = 1


def _sample(count: int, among: int, source: tuple[int, int, int]) -> set[int]:
    """`count` different numbers below `among`, each set of them equally likely; `source` is (seed, head, row).

    Floyd's algorithm (Bentley and Floyd, Communications of the ACM 30, 1987). A draw is the 64 bits of a stream's key.
    """
    seed, head, row = source
    chosen: set[int] = set()
    for last in range(among - count, among):
        high, low = stream_key(seed, "sparse_attention", head, row, last)
        draw = ((high << 32 | low) * (last + 1)) >> 64
        chosen.add(last if draw in chosen else draw)
    return chosen
