"""Rules of `sparse_attention`: the blocks divide the sequence, and what a mode is told fits into their number."""

from __future__ import annotations

from collections.abc import Callable

from trilith.config.rule import Rule
from trilith.config.schema import Config
from trilith.config.sparse_keys import (
    BigBirdBlocks,
    DenseBlocks,
    FixedBlocks,
    LongformerBlocks,
    VariableBlocks,
)
from trilith.errors import Violation

_SPARSE = "sparse_attention"
_GRAIN = 16
# Families whose queries see keys after them.
_NOT_CAUSAL: frozenset[str] = frozenset()


def _num_blocks(config: Config) -> int | None:
    """Blocks of a sequence; None: there is no section, or its blocks do not fit, which is said elsewhere."""
    sparse = config.sparse_attention
    if sparse is None or sparse.block % _GRAIN or config.model.sequence_length % sparse.block:
        return None
    return config.model.sequence_length // sparse.block


def sparse_attention_is_of_our_models(config: Config) -> list[Violation]:
    """The attention of a user's own module is that module's affair."""
    if config.sparse_attention is None or config.model is not None:
        return []
    rule = "is about the attention of the models that a config describes; a module of your own has its own"
    return [Violation(_SPARSE, config.sparse_attention.mode, rule, "Remove it.")]


def blocks_divide_the_sequence(config: Config) -> list[Violation]:
    """A block is a multiple of the kernels' grain, and the sequence one of a block."""
    sparse, length = config.sparse_attention, config.model.sequence_length
    if sparse is None or _num_blocks(config) is not None:
        return []
    path, block = f"{_SPARSE}.block", sparse.block
    if block % _GRAIN:
        above = -(-block // _GRAIN) * _GRAIN
        below = f"{above - _GRAIN} or " if above > _GRAIN else ""
        return [Violation(path, block, f"must be a multiple of {_GRAIN}", f"Use {below}{above}.")]
    fits = [str(size) for size in range(_GRAIN, length + 1, _GRAIN) if length % size == 0]
    near = sorted({max(length // block, 1) * block, -(-length // block) * block})
    fix = f"Use {' or '.join(fits[:8])}" if fits else f"Use a sequence_length of {' or '.join(map(str, near))}"
    return [Violation(path, block, f"must divide model.sequence_length {length}", f"{fix}.")]


def direction_of_family(config: Config) -> list[Violation]:
    """A causal family sees no block after its own."""
    sparse, family = config.sparse_attention, config.model.family
    if sparse is None or isinstance(sparse, DenseBlocks):
        return []
    if sparse.attention == "bidirectional" and family not in _NOT_CAUSAL:
        rule = f"model.family {family} is causal: no token sees a later one"
        return [Violation(f"{_SPARSE}.attention", sparse.attention, rule, 'Use "unidirectional".')]
    return []


def rows_of_global_blocks(config: Config) -> list[Violation]:
    """Global blocks see all others only where they may see later ones."""
    sparse = config.sparse_attention
    if not isinstance(sparse, FixedBlocks | VariableBlocks):
        return []
    if not sparse.horizontal_global_attention or sparse.attention == "bidirectional":
        return []
    rule = f"needs {_SPARSE}.attention bidirectional: a causal block sees no later one"
    return [Violation(f"{_SPARSE}.horizontal_global_attention", True, rule, "Set it to false.")]


def global_patterns_fit(config: Config) -> list[Violation]:
    """Each pattern of fixed has its own global blocks in a window, and a head that uses it."""
    sparse = config.sparse_attention
    if not isinstance(sparse, FixedBlocks):
        return []
    window, share, patterns = sparse.num_local_blocks, sparse.num_global_blocks, sparse.num_different_global_patterns
    if window % share:
        rule = f"must divide {_SPARSE}.num_local_blocks {window}"
        return [Violation(f"{_SPARSE}.num_global_blocks", share, rule)]
    path = f"{_SPARSE}.num_different_global_patterns"
    if patterns > 1 and not sparse.different_layout_per_head:
        fix = f"Set {_SPARSE}.different_layout_per_head to true, or use 1."
        return [Violation(path, patterns, "is above 1, but all heads have one layout", fix)]
    most = min(window // share, config.model.num_heads)
    if patterns > most:
        rule = (
            f"must be at most {most}: a window of {window} blocks has {window // share} choices of {share} global ones, "
            f"and there are {config.model.num_heads} heads"
        )
        return [Violation(path, patterns, rule)]
    return []


def counts_fit(config: Config) -> list[Violation]:
    """No more random, global or neighbouring blocks are asked for than a sequence has."""
    sparse, num_blocks = config.sparse_attention, _num_blocks(config)
    if num_blocks is None:
        return []
    found = []
    for name in ("num_random_blocks", "num_sliding_window_blocks", "num_global_blocks"):
        count = getattr(sparse, name, 0)
        if count > num_blocks:
            rule = f"must be at most {num_blocks}, the blocks of a sequence"
            found.append(Violation(f"{_SPARSE}.{name}", count, rule))
    return found


def global_indices_fit(config: Config) -> list[Violation]:
    """Runs of global blocks have an end each, behind their start, and lie within the sequence."""
    sparse, num_blocks = config.sparse_attention, _num_blocks(config)
    if not isinstance(sparse, VariableBlocks | LongformerBlocks):
        return []
    starts, ends = sparse.global_block_indices, sparse.global_block_end_indices
    path, found = f"{_SPARSE}.global_block_end_indices", list[Violation]()
    if ends is not None and len(starts) != len(ends):
        rule = f"has {len(ends)} entries, but global_block_indices has {len(starts)}"
        found.append(Violation(path, ends, rule))
    elif ends is not None and any(start >= end for start, end in zip(starts, ends, strict=True)):
        found.append(Violation(path, ends, f"every entry must be above that of global_block_indices {list(starts)}"))
    if num_blocks is not None and max(starts, default=0) >= num_blocks:
        rule = f"entries must be below {num_blocks}, the blocks of a sequence"
        found.append(Violation(f"{_SPARSE}.global_block_indices", starts, rule))
    elif num_blocks is not None and max(ends or (0,)) > num_blocks:
        found.append(Violation(path, ends, f"entries must be at most {num_blocks}, the blocks of a sequence"))
    return found


_LENGTH = "model.sequence_length"
SPARSE_RULES: tuple[Rule, ...] = (
    Rule((_SPARSE,), sparse_attention_is_of_our_models),
    Rule((_SPARSE, _LENGTH), blocks_divide_the_sequence),
    Rule((_SPARSE, "model.family"), direction_of_family),
    Rule((_SPARSE, "model.family"), rows_of_global_blocks),
    Rule((_SPARSE, "model.num_heads"), global_patterns_fit),
    Rule((_SPARSE, _LENGTH), counts_fit),
    Rule((_SPARSE, _LENGTH), global_indices_fit),
)


def sparse_notes(config: Config, was_given: Callable[[str], bool]) -> list[str]:
    """What of `sparse_attention` has no effect, or another default than a reader of DeepSpeed's may expect."""
    sparse, notes = config.sparse_attention, []
    if sparse is None or isinstance(sparse, DenseBlocks):
        return []
    if not was_given(f"{_SPARSE}.attention"):
        notes.append(
            f"{_SPARSE}.attention: unidirectional by default; DeepSpeed's default is bidirectional in most modes"
        )
    if isinstance(sparse, BigBirdBlocks) and not was_given(f"{_SPARSE}.num_random_blocks"):
        notes.append(
            f"{_SPARSE}.num_random_blocks: 1 by default, as in DeepSpeed's BigBirdSparsityConfig; its files mean 0"
        )
    if getattr(sparse, "different_layout_per_head", False):
        random, patterns = getattr(sparse, "num_random_blocks", 0), getattr(sparse, "num_different_global_patterns", 1)
        if random == 0 and patterns == 1:
            notes.append(f"{_SPARSE}.different_layout_per_head: has no effect: nothing in the layout differs by head")
    return notes
