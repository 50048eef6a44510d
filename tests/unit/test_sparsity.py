"""Patterns of block-sparse attention against layouts drawn by hand from their definitions; random blocks by their laws."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from trilith.config.sparse_keys import SparseAttentionConfig, SparseBlocks
from trilith.layers.attention import HeadShard, block_layout
from trilith.layers.sparsity import causal_density, differs_by_head, live_blocks

SEED = 7


def section(mode: str, **keys: Any) -> SparseBlocks:
    return TypeAdapter(SparseAttentionConfig).validate_python({"mode": mode, **keys})  # type: ignore[no-any-return]


def drawn(sparse: SparseBlocks, num_blocks: int, head: int = 0, seed: int = SEED) -> list[str]:
    """A layout as text, a line for each row of blocks: # is live."""
    return ["".join(".#"[block] for block in row) for row in live_blocks(sparse, head, num_blocks, seed)]


BOTH = {"attention": "bidirectional"}

# The last window has two blocks of four: its global block, which would be behind the end, is its last one.
FIXED = """
#.........
##........
###.......
####......
...##.....
...###....
...####...
...#####..
...#...##.
...#...###
"""

# Each window sees itself, and all see blocks 3, 7 and 9.
FIXED_BOTH = """
####...#.#
####...#.#
####...#.#
####...#.#
...#####.#
...#####.#
...#####.#
...#####.#
...#...###
...#...###
"""

# Blocks 3, 7 and 9 see all, too.
FIXED_HORIZONTAL = """
####...#.#
####...#.#
####...#.#
##########
...#####.#
...#####.#
...#####.#
##########
...#...###
##########
"""

# The third choice of one global block in windows of four: their second block, 1 and 5.
FIXED_THIRD_PATTERN = """
#.......
##......
###.....
####....
.#..#...
.#..##..
.#..###.
.#..####
"""

# Two global blocks in windows of four, the second choice: 0 and 1, 4 and 5; the last window is one block, and has the last
# two of the sequence. A run is seen whole from its first block on.
FIXED_PAIRS = """
##.......
##.......
###......
####.....
##..##...
##..##...
##..###..
##..#####
##..##.##
"""

# Windows 0 | 1 2 3 | 4 5 6 | 7, global blocks 2, 3 and 5, seen from the first row of their run on.
VARIABLE = """
#.......
.#......
.###....
.###....
..###...
..####..
..#####.
..##.#.#
"""

# Windows of two, block 1 global: a column, and a row.
VARIABLE_BOTH = """
##....
######
.###..
.###..
.#..##
.#..##
"""

BIGBIRD = """
#......
##.....
###....
#.##...
#..##..
#...##.
#....##
"""

BIGBIRD_BOTH = """
######
######
####..
#####.
##.###
##..##
"""

# Windows of three around the diagonal, blocks 0 and 3 global: rows and columns, up to the diagonal.
LONGFORMER = """
#.......
##......
###.....
####....
#..##...
#..###..
#..#.##.
#..#..##
"""

# Blocks 2 and 3 as a run.
LONGFORMER_BOTH = """
####..
####..
######
######
..####
..####
"""

SLIDING = """
#.....
##....
###...
.###..
..###.
...###
"""

SLIDING_BOTH = """
##....
###...
.###..
..###.
...###
....##
"""

PICTURES: tuple[tuple[SparseBlocks, int, str], ...] = (
    (section("dense"), 0, "###\n###\n###"),
    (section("fixed"), 0, FIXED),
    (section("fixed", **BOTH), 0, FIXED_BOTH),
    (section("fixed", **BOTH, horizontal_global_attention=True), 0, FIXED_HORIZONTAL),
    (section("fixed", different_layout_per_head=True, num_different_global_patterns=4), 2, FIXED_THIRD_PATTERN),
    (section("fixed", different_layout_per_head=True, num_different_global_patterns=4), 6, FIXED_THIRD_PATTERN),
    (
        section("fixed", num_global_blocks=2, different_layout_per_head=True, num_different_global_patterns=2),
        1,
        FIXED_PAIRS,
    ),
    (
        section("variable", local_window_blocks=[1, 3], global_block_indices=[2, 5], global_block_end_indices=[4, 6]),
        0,
        VARIABLE,
    ),
    (
        section(
            "variable", **BOTH, local_window_blocks=[2], global_block_indices=[1], horizontal_global_attention=True
        ),
        0,
        VARIABLE_BOTH,
    ),
    (section("bigbird", num_random_blocks=0), 3, BIGBIRD),
    (section("bigbird", **BOTH, num_random_blocks=0, num_global_blocks=2), 0, BIGBIRD_BOTH),
    (section("bslongformer", global_block_indices=[0, 3]), 0, LONGFORMER),
    (
        section("bslongformer", **BOTH, global_block_indices=[2], global_block_end_indices=[4]),
        0,
        LONGFORMER_BOTH,
    ),
    (section("local_sliding_window", num_sliding_window_blocks=5), 0, SLIDING),
    (section("local_sliding_window", **BOTH), 0, SLIDING_BOTH),
)


@pytest.mark.parametrize(("sparse", "head", "picture"), PICTURES, ids=lambda value: getattr(value, "mode", None))
def test_patterns_are_those_drawn_by_hand(sparse: SparseBlocks, head: int, picture: str) -> None:
    lines = picture.split()
    assert drawn(sparse, len(lines), head) == lines


# --- random blocks -------------------------------------------------------------------------------------------------------

LONELY = {"local_window_blocks": [1], "global_block_indices": [], **BOTH}  # the diagonal, and what is drawn


def columns(sparse: SparseBlocks, num_blocks: int, head: int = 0, seed: int = SEED) -> list[set[int]]:
    rows = live_blocks(sparse, head, num_blocks, seed)
    return [{column for column, live in enumerate(row) if live} for row in rows]


def test_random_blocks_are_a_function_of_seed_head_and_row() -> None:
    """Numbers of seed 7, written down once: a layout that a run was trained with must not change."""
    sparse = section("variable", num_random_blocks=2, different_layout_per_head=True, **LONELY)
    again = [live_blocks(sparse, head, 16, SEED) for head in (1, 0, 1)]
    assert again[0] == again[2] != again[1]
    assert live_blocks(sparse, 0, 16, SEED + 1) != again[1]
    assert drawn(sparse, 8) == PINNED


PINNED = [
    "#..#...#",
    ".#.#.#..",
    "..#..##.",
    "...##...",
    ".#.##...",
    ".....###",
    ".##...#.",
    "##.....#",
]


def test_rows_have_as_many_random_blocks_as_asked() -> None:
    """No block twice: a row has them beside its own, or its own is one of them."""
    sparse = section("variable", num_random_blocks=3, **LONELY)
    for row, live in enumerate(columns(sparse, 24)):
        assert row in live and len(live) in (3, 4)
    everything = section("variable", num_random_blocks=5, **LONELY)
    assert drawn(everything, 5) == ["#" * 5] * 5


def test_random_blocks_are_drawn_evenly() -> None:
    sparse = section("variable", num_random_blocks=4, different_layout_per_head=True, **LONELY)
    counts: Counter[int] = Counter()
    for head in range(200):
        counts.update(columns(sparse, 20, head)[0] - {0})
    expected = 200 * 4 / 20
    assert len(counts) == 19
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 45, counts  # chi-square, 18 degrees


def test_a_causal_row_of_bigbird_draws_among_what_it_sees() -> None:
    """The first rows have fewer blocks than are asked for, and take all."""
    sparse = section("bigbird", num_random_blocks=3, num_sliding_window_blocks=1)
    for row, live in enumerate(columns(sparse, 12)):
        assert max(live) == row and live >= {0, row}
        assert len(live) >= min(3, row + 1)


def test_heads_share_a_layout_unless_told_otherwise() -> None:
    for mode in ("variable", "bigbird"):
        alike, apart = (section(mode, num_random_blocks=2, different_layout_per_head=per) for per in (False, True))
        assert not differs_by_head(alike) and differs_by_head(apart)
        assert drawn(alike, 12, 5) == drawn(alike, 12, 0) == drawn(apart, 12, 0) != drawn(apart, 12, 5)


# --- what is made of them ------------------------------------------------------------------------------------------------


def test_density_counts_causal_blocks_only() -> None:
    assert causal_density(section("dense"), 3, 7, SEED) == 1.0
    assert causal_density(section("fixed", num_local_blocks=8), 3, 7, SEED) == 1.0
    live = sum(line.count("#") for line in FIXED.split())
    assert causal_density(section("fixed"), 4, 10, SEED) == live / 55
    below = sum(line[: row + 1].count("#") for row, line in enumerate(FIXED_BOTH.split()))
    assert causal_density(section("fixed", **BOTH), 4, 10, SEED) == below / 55


def test_density_is_the_mean_over_heads() -> None:
    sparse = section("bigbird", different_layout_per_head=True)
    layout = block_layout(sparse, HeadShard(0, 5, 5, tuple(range(5)), 4), 160, SEED)
    assert layout is not None
    assert causal_density(sparse, 5, 10, SEED) == pytest.approx(layout.live.tril().sum().item() / (5 * 55))


def test_a_rank_has_the_layouts_of_its_own_heads() -> None:
    sparse = section("bigbird", block=32, different_layout_per_head=True)
    whole = block_layout(sparse, HeadShard(0, 6, 6, tuple(range(6)), 4), 256, SEED)
    part = block_layout(sparse, HeadShard(2, 3, 3, (0, 1, 2), 4), 256, SEED)
    assert whole is not None and part is not None
    assert (whole.size, whole.live.shape, whole.live.dtype) == (32, (6, 8, 8), torch.bool)
    assert torch.equal(part.live, whole.of_heads(2, 3).live)
    shared = block_layout(section("fixed"), HeadShard(2, 3, 3, (0, 1, 2), 4), 160, SEED)
    assert shared is not None
    assert shared.live.tolist() == [[[block == "#" for block in line] for line in FIXED.split()]]


def test_dense_is_no_layout() -> None:
    heads = HeadShard(0, 2, 2, (0, 1), 4)
    assert block_layout(section("dense"), heads, 64, SEED) is None and block_layout(None, heads, 64, SEED) is None
