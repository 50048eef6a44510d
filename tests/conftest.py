"""What every test gets: one torch thread, GPU tests skipped where there is no GPU, the fork server ended at the end."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from tests import harness


def pytest_configure() -> None:
    """Ranks and tests share few cores: more than one thread each only makes them wait for each other."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on a machine without CUDA."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Keep modules and collected tests, which all live to the end, out of the garbage collector's way: it walked through
    them again and again, for a seventh of the time of tests that make many objects."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> Iterator[None]:
    """End the fork server with the session."""
    yield
    harness.close_server()
