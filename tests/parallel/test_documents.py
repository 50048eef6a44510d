"""Documents that are packed into samples: tokens see their own only, in every layout, with every kind of attention."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cells import Cell, config, reference_config
from tests.runs import reference, run, worst_relative

LENGTH, STEPS = 64, 3


def separated(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A cell's config with documents in long sequences: synthetic tokens end one now and then."""
    content["model"] |= {"sequence_length": LENGTH, "vocab_size": 23}
    content["training"]["steps"] = STEPS
    content["data"] = {**content["data"], "reset_attention_mask": True}
    return content | changes


@pytest.mark.parametrize(
    "cell",
    [
        Cell(tensor=2, microbatches=2, recompute="selective", sequence_parallel=True, family="llama", grouped=True),
        Cell(pipeline=3, microbatches=3, dropout=0.1, recompute="full"),
        Cell(data=2, pipeline=2, microbatches=2, schedule="zb_h1", zero=2, family="llama"),
        Cell(data=2, zero=3, dropout=0.1),
    ],
    ids=str,
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_layout_has_the_losses_of_one_process(cell: Cell, device: str) -> None:
    expected = reference(separated(reference_config(cell)))
    assert worst_relative(run(separated(config(cell)), device=device), expected) < 1e-10
    whole = separated(reference_config(cell))
    whole["data"]["reset_attention_mask"] = False
    assert worst_relative(expected, reference(whole)) > 1e-6, "documents are apart"


def test_all_kinds_of_attention_agree() -> None:
    source = separated(config(Cell(microbatches=2, dropout=0.1, grouped=True, family="llama")))
    native = run(source)
    assert worst_relative(native, run(source | {"kernels": {"backend": "reference"}})) < 1e-10
    assert worst_relative(native, run(source | {"kernels": {"attention": "sdpa"}})) < 1e-10
    assert worst_relative(native, run(source | {"compile": {"enabled": True, "backend": "aot_eager"}})) < 1e-12
    sparse = source | {"sparse_attention": {"mode": "fixed", "block": 16, "num_local_blocks": LENGTH // 16}}
    assert worst_relative(native, run(sparse)) < 1e-10, "all blocks are live"
