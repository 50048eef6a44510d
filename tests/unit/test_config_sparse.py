"""The section `sparse_attention`: what each mode takes, what its numbers must fit, and DeepSpeed's files."""

from __future__ import annotations

from typing import Any

import pytest

from tests.broken_configs import edited
from trilith import preflight
from trilith.config import Config, load_config, resolve
from trilith.config.sparse_keys import MODES, FixedBlocks
from trilith.errors import ConfigError

# The example of DeepSpeed's documentation, with the keys of all modes, for a causal model.
PUBLISHED = {
    "mode": "fixed",
    "block": 16,
    "different_layout_per_head": True,
    "num_local_blocks": 4,
    "num_global_blocks": 1,
    "attention": "unidirectional",
    "horizontal_global_attention": False,
    "num_different_global_patterns": 4,
    "num_random_blocks": 0,
    "local_window_blocks": [4],
    "global_block_indices": [0],
    "global_block_end_indices": None,
    "num_sliding_window_blocks": 3,
}


def resolved(section: Any, **changes: Any) -> tuple[Config, str]:
    """(the configuration with the section, its notes as one text); sequences of eight blocks of 16."""
    found = resolve(load_config(edited({"model.sequence_length": 128, "sparse_attention": section, **changes})))
    return found.config, "\n".join(found.notes)


def refused(section: Any, **changes: Any) -> dict[str, str]:
    """path -> message of all violations."""
    with pytest.raises(ConfigError) as caught:
        resolved(section, **changes)
    return {violation.path.removeprefix("sparse_attention."): str(violation) for violation in caught.value.violations}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_defaults(mode: str) -> None:
    config, notes = resolved({"mode": mode})
    assert isinstance(config.sparse_attention, MODES[mode]) and config.sparse_attention.block == 16
    assert ("attention: unidirectional by default" in notes) == (mode != "dense")


def test_published_file_is_taken() -> None:
    config, notes = resolved(PUBLISHED)
    assert config.sparse_attention == FixedBlocks(
        mode="fixed", different_layout_per_head=True, num_different_global_patterns=4
    )
    assert "sparse_attention: {" in notes and "without the defaults of other modes" in notes
    again = load_config(config.model_dump(mode="json"))
    assert again.sparse_attention == config.sparse_attention


def test_mode_is_fixed_by_default_as_in_deepspeed() -> None:
    assert isinstance(resolved({"block": 32})[0].sparse_attention, FixedBlocks)
    assert isinstance(resolved({})[0].sparse_attention, FixedBlocks)


@pytest.mark.parametrize("off", [None, False])
def test_off(off: Any) -> None:
    assert resolved(off)[0].sparse_attention is None


def test_an_override_reaches_into_it() -> None:
    source = edited({"model.sequence_length": 128})
    config = load_config(source, ["sparse_attention.mode=bigbird", "sparse_attention.num_random_blocks=2"])
    assert config.sparse_attention is not None and config.sparse_attention.num_random_blocks == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("section", "path", "text"),
    [
        (
            {"mode": "fixed", "num_random_blocks": 2},
            "num_random_blocks",
            "mode fixed has no such key. fixed takes mode",
        ),
        ({"mode": "bigbird", "num_local_blocks": 8}, "num_local_blocks", "mode bigbird has no such key"),
        ({"mode": "fixed", "num_locl_blocks": 8}, "num_locl_blocks", "Did you mean sparse_attention.num_local_blocks?"),
        ({"mode": "longformer"}, "mode", 'Did you mean "bslongformer"?'),
        ({"mode": 3}, "mode", "must be one of 'dense', 'fixed'"),
        ({"mode": "fixed", "attention": "causal"}, "attention", "must be one of 'unidirectional' or 'bidirectional'"),
        ({"mode": "fixed", "block": 24}, "block", "must be a multiple of 16. Use 16 or 32."),
        ({"mode": "fixed", "block": 8}, "block", "must be a multiple of 16. Use 16."),
        ({"mode": "fixed", "block": 48}, "block", "must divide model.sequence_length 128. Use 16 or 32 or 64 or 128."),
        ({"mode": "fixed", "attention": "bidirectional"}, "attention", "model.family gpt2 is causal"),
        ({"mode": "variable", "horizontal_global_attention": True}, "horizontal_global_attention", "bidirectional"),
        (
            {"mode": "fixed", "num_global_blocks": 3},
            "num_global_blocks",
            "must divide sparse_attention.num_local_blocks 4",
        ),
        (
            {"mode": "fixed", "num_different_global_patterns": 2},
            "num_different_global_patterns",
            "Set sparse_attention.different_layout_per_head to true, or use 1.",
        ),
        (
            {**PUBLISHED, "num_global_blocks": 2, "num_different_global_patterns": 3},
            "num_different_global_patterns",
            "must be at most 2: a window of 4 blocks has 2 choices",
        ),
        (
            {**PUBLISHED, "num_local_blocks": 8, "num_different_global_patterns": 5},
            "num_different_global_patterns",
            "there are 4 heads",
        ),
        ({"mode": "bigbird", "num_random_blocks": 9}, "num_random_blocks", "must be at most 8"),
        ({"mode": "variable", "num_random_blocks": 9}, "num_random_blocks", "must be at most 8"),
        ({"mode": "local_sliding_window", "num_sliding_window_blocks": 9}, "num_sliding_window_blocks", "at most 8"),
        ({"mode": "variable", "local_window_blocks": []}, "local_window_blocks", "at least one entry"),
        ({"mode": "variable", "global_block_indices": [0, 8]}, "global_block_indices", "must be below 8"),
        ({"mode": "bslongformer", "global_block_end_indices": [1, 2]}, "global_block_end_indices", "has 2 entries"),
        (
            {"mode": "bslongformer", "global_block_indices": [3], "global_block_end_indices": [3]},
            "global_block_end_indices",
            "must be above that of global_block_indices [3]",
        ),
        (
            {"mode": "variable", "global_block_indices": [3], "global_block_end_indices": [9]},
            "global_block_end_indices",
            "must be at most 8",
        ),
    ],
    ids=str,
)
def test_refusals(section: Any, path: str, text: str) -> None:
    found = refused(section)
    assert list(found) == [path] and text in found[path], found


def test_a_sequence_that_no_block_divides() -> None:
    found = refused({"mode": "fixed"}, **{"model.sequence_length": 40})
    assert "Use a sequence_length of 32 or 48." in found["block"]


def test_a_module_of_ones_own_has_its_own_attention() -> None:
    with pytest.raises(ConfigError, match=r"sparse_attention = 'fixed': is about the attention of the models that"):
        resolve(load_config({"train_micro_batch_size_per_gpu": 1, "sparse_attention": PUBLISHED}), needs="engine")


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"mode": "bigbird"}, "num_random_blocks: 1 by default"),
        ({"mode": "bslongformer", "different_layout_per_head": True}, "different_layout_per_head: has no effect"),
        ({"mode": "variable", "different_layout_per_head": True}, "different_layout_per_head: has no effect"),
    ],
    ids=str,
)
def test_notes(section: Any, text: str) -> None:
    assert text in resolved(section)[1]


def test_check_says_what_is_left_of_attention() -> None:
    """Four windows of two blocks, whose last block all others after it see: 24 of 36 blocks; FLOPs count the same."""
    changes = {"model.sequence_length": 128, "kernels": {"backend": "torch"}}
    sparse = preflight.plan(edited({**changes, "sparse_attention": {"mode": "fixed", "num_local_blocks": 2}}))
    whole = preflight.plan(edited(changes))
    live = sum((1, 2, 2, 3, 3, 4, 4, 5))
    text = preflight.describe(sparse)
    assert f"attention    fixed, {live / 36:.1%} of the causal blocks of 16 tokens are live; torch's ops" in text
    assert preflight.to_json(sparse)["attention_density"] == live / 36
    assert "attention    " not in preflight.describe(whole) and preflight.to_json(whole)["attention_density"] == 1.0
    for one, other in zip(sparse.units, whole.units, strict=True):
        assert one.attention_flops == pytest.approx(other.attention_flops * live / 36)
        assert one.matmul_flops == other.matmul_flops
