"""What tests of native ops share: the instruction sets of this processor, and that the number of threads changes no bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from trilith.kernels import library

SETS: tuple[str, ...] = library.LIBRARY.instruction_sets if library.LIBRARY is not None else ()
native = pytest.mark.skipif(library.LIBRARY is None, reason=library.MISSING)


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let native ops run on the instruction set `name`."""
    monkeypatch.setattr(library, "CPU", getattr(library.LIBRARY, name))


def require_same_bits(run: Callable[[], Sequence[Tensor]], threads: Sequence[int] = (1, 2, 3)) -> list[Tensor]:
    """`run` gives the same bits on each number of threads; returns them."""
    before, found = torch.get_num_threads(), []
    try:
        for count in threads:
            torch.set_num_threads(count)
            found.append(list(run()))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))
    return found[0]
