"""Fixtures of the tests of native ops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.emulated import Device, Emulated, module
from tests.kernels.native import SETS, use
from trilith.kernels import library


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set of this processor in turn."""
    use(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A GPU, or the processor with the CUDA kernels in the place of its own."""
    if request.param == "cuda":
        if not torch.cuda.is_available() or library.cuda_refusal(0):
            pytest.skip(library.cuda_refusal(0) if torch.cuda.is_available() else "no CUDA device")
        yield Device(torch.device("cuda", 0), "fused")
        return
    kernels = module()
    if isinstance(kernels, str):
        pytest.skip(kernels)
    monkeypatch.setattr(library, "CPU", Emulated(kernels))
    yield Device(torch.device("cpu"), "fused")
