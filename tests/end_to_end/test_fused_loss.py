"""`kernels.fused_loss`, the last product and the loss as one op, and `training.z_loss`, under layouts of the last stage."""

from __future__ import annotations

import pytest

from tests.cells import Cell, config
from tests.runs import reference, run, worst_relative

CELLS = (
    Cell(microbatches=3, tied=True, dropout=0.1),
    Cell(family="llama", recompute="full", microbatches=1),
    Cell(tensor=3, odd=True, tied=True, microbatches=1),
    Cell(tensor=2, pipeline=2, sequence_parallel=True, microbatches=4, zero=2, data=2),
    Cell(data=2, pipeline=2, microbatches=4, zero=3, tied=True, odd=True),
    Cell(pipeline=2, schedule="zb_h1", microbatches=4),  # weight gradients are put off: the logits exist
)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_same_losses(cell: Cell) -> None:
    content = config(cell)
    content["training"] = content["training"] | {"steps": 4}
    fused = content | {"kernels": {"fused_loss": True}}
    assert worst_relative((run if cell.num_ranks > 1 else reference)(fused), reference(config(cell))[:4]) < 1e-10


@pytest.mark.parametrize("is_fused", [False, True])
def test_z_loss(is_fused: bool) -> None:
    """One process, tensor ranks and pipeline ranks agree; the term is there."""
    cells = (Cell(microbatches=4), Cell(tensor=2, pipeline=2, microbatches=4, odd=False))
    contents = [config(cell) for cell in cells]
    for content in contents:
        content["training"] = content["training"] | {"steps": 3, "z_loss": 0.1}
        content["kernels"] = {"fused_loss": is_fused}
    expected = reference(contents[0])
    assert worst_relative(run(contents[1]), expected) < 1e-10
    assert expected[0][0] > reference(config(cells[0]))[0][0] + 0.1
