"""Bar of ZeRO: at every stage, under every schedule, in fp64 the losses and gradient norms of one process, to 1e-10."""

from __future__ import annotations

import pytest

from tests.runs import reference, run, worst_relative
from tests.zero_cells import STEPS, ZeroCell, covering_cells, every_cell, zero_config, zero_reference

RTOL = 1e-10


def reproduces_one_process(cell: ZeroCell) -> None:
    curve = run(zero_config(cell))
    assert len(curve) == STEPS
    difference = worst_relative(curve, reference(zero_reference(cell)))
    assert difference <= RTOL, f"{cell}: {difference:.2e}"


@pytest.mark.parametrize("cell", covering_cells(), ids=str)
def test_zero_reproduces_one_process(cell: ZeroCell) -> None:
    reproduces_one_process(cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", every_cell(), ids=str)
def test_zero_reproduces_one_process_in_all_threes(cell: ZeroCell) -> None:
    reproduces_one_process(cell)
