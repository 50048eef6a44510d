"""Keys of the section `sparse_attention`: which blocks of scores are computed; one kind of section for each mode.

Names, defaults and meaning are those of DeepSpeed's sparsity configurations, but for `attention`: every family of models
here is causal, so that it defaults to unidirectional. `layers/sparsity.py` makes the layouts.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from trilith.config.base import Bool, ConfigModel, Count, CountOrZero, key

DEFAULT_MODE = "fixed"
Direction = Literal["unidirectional", "bidirectional"]


def _not_empty(value: tuple[int, ...]) -> tuple[int, ...]:
    if not value:
        raise PydanticCustomError("not_empty", "must have at least one entry")
    return value


Windows = Annotated[tuple[Count, ...], AfterValidator(_not_empty)]


class _Blocks(ConfigModel):
    """What all modes have."""

    mode: str
    block: Count = key(16, "Side of a block of scores: a multiple of 16 that divides model.sequence_length.", "tokens")


class _Directed(_Blocks):
    """What all modes but dense have."""

    attention: Direction = key(
        "unidirectional",
        "unidirectional: a block sees none after it; bidirectional: it does, in families that are not causal.",
    )


class DenseBlocks(_Blocks):
    """All blocks: the same as no section."""

    mode: Literal["dense"] = key(..., "Pattern of the live blocks.")


class FixedBlocks(_Directed):
    """Windows side by side, and of each window some blocks that all others see (Child et al. 2019)."""

    mode: Literal["fixed"] = key(..., "Pattern of the live blocks.")
    different_layout_per_head: Bool = key(False, "Heads take turns in num_different_global_patterns patterns.")
    num_local_blocks: Count = key(4, "Length of a window, within which blocks see each other.", "blocks")
    num_global_blocks: Count = key(
        1, "Blocks of each window that represent it to all others; divides num_local_blocks.", "blocks"
    )
    horizontal_global_attention: Bool = key(False, "Global blocks see all others, too; bidirectional only.")
    num_different_global_patterns: Count = key(
        1,
        "Choices of the global blocks in a window, the last ones first, which heads take in turn; above 1 with "
        "different_layout_per_head only.",
        "patterns",
    )


class VariableBlocks(_Directed):
    """Windows of given lengths, given global blocks, and random ones."""

    mode: Literal["variable"] = key(..., "Pattern of the live blocks.")
    different_layout_per_head: Bool = key(False, "Every head draws its own random blocks.")
    num_random_blocks: CountOrZero = key(0, "Random blocks that each block sees.", "blocks")
    local_window_blocks: Windows = key(
        (4,), "Lengths of the windows in order; the last one is that of all that follow.", "blocks"
    )
    global_block_indices: tuple[CountOrZero, ...] = key((0,), "Global blocks, or the first of each run of them.")
    global_block_end_indices: tuple[Count, ...] | None = key(
        None, "One behind the last block of each run of global blocks; null: global_block_indices lists single ones."
    )
    horizontal_global_attention: Bool = key(False, "Global blocks see all others, too; bidirectional only.")


class BigBirdBlocks(_Directed):
    """A sliding window, the first blocks as global ones, and random ones (Zaheer et al. 2020)."""

    mode: Literal["bigbird"] = key(..., "Pattern of the live blocks.")
    different_layout_per_head: Bool = key(False, "Every head draws its own random blocks.")
    num_random_blocks: CountOrZero = key(1, "Random blocks that each block sees.", "blocks")
    num_sliding_window_blocks: Count = key(3, "Width of the window around each block.", "blocks")
    num_global_blocks: Count = key(1, "Blocks from the first on that all others see, and that see all.", "blocks")


class LongformerBlocks(_Directed):
    """A sliding window and given global blocks (Beltagy et al. 2020)."""

    mode: Literal["bslongformer"] = key(..., "Pattern of the live blocks.")
    different_layout_per_head: Bool = key(False, "Without effect: nothing in this mode differs between heads.")
    num_sliding_window_blocks: Count = key(3, "Width of the window around each block.", "blocks")
    global_block_indices: tuple[CountOrZero, ...] = key((0,), "Global blocks, or the first of each run of them.")
    global_block_end_indices: tuple[Count, ...] | None = key(
        None, "One behind the last block of each run of global blocks; null: global_block_indices lists single ones."
    )


class SlidingWindowBlocks(_Directed):
    """A sliding window alone."""

    mode: Literal["local_sliding_window"] = key(..., "Pattern of the live blocks.")
    num_sliding_window_blocks: Count = key(3, "Width of the window around each block.", "blocks")


SparseBlocks = DenseBlocks | FixedBlocks | VariableBlocks | BigBirdBlocks | LongformerBlocks | SlidingWindowBlocks
SparseAttentionConfig = Annotated[SparseBlocks, Field(discriminator="mode")]

MODES: MappingProxyType[str, type[ConfigModel]] = MappingProxyType(
    {
        "dense": DenseBlocks,
        "fixed": FixedBlocks,
        "variable": VariableBlocks,
        "bigbird": BigBirdBlocks,
        "bslongformer": LongformerBlocks,
        "local_sliding_window": SlidingWindowBlocks,
    }
)


def of_its_mode(section: Any) -> Any:
    """A section as DeepSpeed's files have it, ready to be validated.

    Its mode is fixed where it names none. It may hold the keys of all modes: those of others go where they hold a default,
    and stay, to be refused, where they ask for something that the mode does not have.
    """
    if section is None or section is False:
        return None
    if not isinstance(section, dict):
        return section
    mode = section.get("mode", DEFAULT_MODE)
    kind = MODES.get(mode) if isinstance(mode, str) else None
    if kind is None:
        return section
    kept = {name: value for name, value in section.items() if name in kind.model_fields or not _is_default(name, value)}
    return {"mode": mode, **kept}


def _is_default(name: str, value: Any) -> bool:
    """Whether `value` is what the key has by default in a mode that has it, or in DeepSpeed."""
    defaults = [kind.model_fields[name].default for kind in MODES.values() if name in kind.model_fields]
    plain = [list(default) if isinstance(default, tuple) else default for default in defaults]
    if name == "attention":
        plain.append("bidirectional")
    return any(value == default and isinstance(value, bool) == isinstance(default, bool) for default in plain)
