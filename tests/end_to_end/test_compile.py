"""torch.compile of a model's blocks: the losses of the same run without it, and a clear word where it cannot be.

The backend `aot_eager` traces forward and backward as the others do and runs the graph as it is, so that bits are equal.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.cells import Cell, config
from tests.runs import reference, run, worst_relative
from trilith import preflight
from trilith.errors import ConfigError


def compiled(cell: Cell, backend: str = "aot_eager", **changes: Any) -> dict[str, Any]:
    content = config(cell) | changes
    content["training"] = content["training"] | {"steps": 3}
    return content | {"compile": {"enabled": True, "backend": backend}}


def without(content: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != "compile"}


@pytest.mark.parametrize(
    ("family", "dropout", "recompute"),
    [
        ("gpt2", 0.1, "none"),
        ("llama", 0.0, "full"),
        pytest.param("gpt2", 0.0, "full", marks=pytest.mark.slow),
        pytest.param("llama", 0.1, "none", marks=pytest.mark.slow),
    ],
)
def test_same_losses(family: str, dropout: float, recompute: str) -> None:
    content = compiled(Cell(family=family, dropout=dropout, recompute=recompute, microbatches=2, grouped=True))
    assert worst_relative(reference(content), reference(without(content))) < 1e-12


def test_with_pipeline_ranks_and_parted_weights() -> None:
    content = compiled(Cell(data=2, pipeline=2, microbatches=4, zero=3, dropout=0.1))
    assert worst_relative(run(content), run(without(content))) < 1e-12


@pytest.mark.slow
def test_inductor() -> None:
    content = compiled(Cell(dropout=0.1, microbatches=2), "inductor")
    assert worst_relative(reference(content), reference(without(content))) < 1e-10


@pytest.mark.parametrize(
    ("cell", "rule"),
    [
        (Cell(tensor=2), "parallel.tensor 2"),
        (Cell(recompute="selective"), "selective"),
        (Cell(pipeline=2, schedule="zb_h1", microbatches=4), "splits the backward"),
    ],
    ids=str,
)
def test_refusals(cell: Cell, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule) as caught:
        preflight.plan(compiled(cell))
    assert "compile.enabled" in str(caught.value)
