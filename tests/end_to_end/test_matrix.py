"""Bar of the whole engine: in fp64 every layout reproduces the one-process run, loss and gradient norm, to 1e-10."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cells import Cell, config, covering_array, reference_config
from tests.runs import reference, run, worst_relative

RTOL = 1e-10
STEPS = 3  # `python -m tests.matrix` takes more


def short(content: dict[str, Any]) -> dict[str, Any]:
    content["training"]["steps"] = STEPS
    return content


@pytest.mark.parametrize("cell", covering_array(), ids=str)
def test_layout_reproduces_one_process(cell: Cell) -> None:
    difference = worst_relative(run(short(config(cell))), reference(short(reference_config(cell))))
    assert difference <= RTOL, f"{cell}: {difference:.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize("cell", covering_array()[::3], ids=str)
def test_layout_reproduces_one_process_on_cuda(cell: Cell) -> None:
    """The same on CUDA, ranks sharing the device."""
    curve = run(config(cell), timeout_s=300, device="cuda")
    difference = worst_relative(curve, reference(reference_config(cell), "cuda"))
    assert difference <= RTOL, f"{cell}: {difference:.2e}"


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_loss_is_bit_equal_across_schedules(family: str) -> None:
    """One layout, three schedules (one of them cut into other stages): the same bits, with dropout and clipping."""
    curves = {}
    for schedule, virtual_stages in (("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2)):
        cell = Cell(2, 2, 2, schedule, virtual_stages, 3, 1, family == "gpt2", True, "none", 0.1, family, True, True)
        content = short(config(cell))
        content["model"]["num_layers"] = 5
        curves[schedule] = run(content)
    assert curves["gpipe"] == curves["1f1b"] == curves["interleaved_1f1b"]
