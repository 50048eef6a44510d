"""Fixtures of the tests of native ops."""

from __future__ import annotations

import pytest

from tests.kernels.native import SETS, use


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set of this processor in turn."""
    use(request.param, monkeypatch)
    return str(request.param)
