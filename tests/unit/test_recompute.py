"""`layers/recompute.py` alone: equal to keeping everything, as lazy and as lean as torch's own, noticing misuse."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trilith.layers.recompute import recomputed

ENGINE = Path(__file__).resolve().parents[2] / "engine"


class Part(nn.Module):
    """Two products with something in between; counts its calls and how far they came."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        self.calls: list[str] = []

    def forward(self, x: Tensor, factor: float, mask: Tensor) -> Tensor:
        """x (B, 8), mask (B, 16) bool."""
        self.calls.append("begin")
        y = torch.tanh(self.first(x)).masked_fill(mask, 0.0)
        y = self.second(y * factor)
        self.calls.append("end")
        return y + 1.0


def plain(function: Any, *arguments: Any) -> Any:
    return function(*arguments)


def run(part: Part, how: Any, x: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    part.zero_grad()
    x = x.clone().requires_grad_()
    mask = torch.arange(16).expand(len(x), 16) % 3 == 0
    y = how(part, x, 0.5, mask)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in part.parameters())]  # type: ignore[list-item]


def by_torch(function: Any, *arguments: Any) -> Any:
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def test_equals_keeping_everything() -> None:
    part, x = Part(), torch.randn(4, 8)
    for kept, again in zip(run(part, plain, x), run(part, recomputed, x), strict=True):
        assert torch.equal(kept, again)
    assert part.calls == ["begin", "end", "begin", "end", "begin"], "the second forward stops at the last saved tensor"


def test_keeps_no_more_than_torch() -> None:
    def saved(how: Any) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(Part(), how, torch.randn(4, 8))
        return sum(sizes.values())

    assert saved(recomputed) <= saved(by_torch) < saved(plain)


def test_nested_and_twice() -> None:
    """A part within a part, and a second backward through the same graph."""
    part, x = Part(), torch.randn(4, 8)
    mask = torch.zeros(4, 16, dtype=torch.bool)

    def outer(how: Any, x: Tensor) -> Tensor:
        return how(part, how(part, x, 0.5, mask).sin(), 2.0, mask).sin()

    results = []
    for how in (plain, recomputed):
        part.zero_grad()
        y = how(outer, how, x)
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        results.append([parameter.grad for parameter in part.parameters()])
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)


def test_nothing_outlives_backward() -> None:
    part = Part()
    x = torch.randn(4, 8, requires_grad=True)
    hidden = x * 2
    gone = weakref.ref(hidden)
    loss = recomputed(part, hidden, 0.5, torch.zeros(4, 16, dtype=torch.bool)).sum()
    del hidden
    loss.backward()
    del loss
    assert gone() is None


def test_without_gradients_it_is_a_call() -> None:
    part = Part()
    with torch.no_grad():
        y = recomputed(part, torch.ones(1, 8), 0.5, torch.zeros(1, 16, dtype=torch.bool))
    assert not y.requires_grad and part.calls == ["begin", "end"]


def test_an_argument_changed_in_place_is_noticed() -> None:
    x = torch.randn(4, 8)
    y = recomputed(Part(), x, 0.5, torch.zeros(4, 16, dtype=torch.bool))
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_a_function_that_does_something_else_is_noticed() -> None:
    lengths = [2, 3]
    weight = torch.ones(8, requires_grad=True)

    def changing(x: Tensor) -> Tensor:
        return x[: lengths.pop()] * weight * weight

    y = recomputed(changing, torch.randn(4, 8))
    with pytest.raises(AssertionError, match="in forward"):
        y.sum().backward()


def test_does_not_load_the_compiler() -> None:
    code = (
        "import sys, torch; from trilith.layers.recompute import recomputed; x = torch.ones(2, requires_grad=True);"
        "recomputed(torch.sin, x).sum().backward(); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ENGINE)}, timeout=60)
