"""GELU and SwiGLU beside torch's, on buffers that are used again and, through autograd, on fresh ones.

The limit counts the tensors that must pass through memory: GELU forward 2, backward 3; SwiGLU forward and backward 8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import Benchmark
from benchmarks.kernels.limits import fp32_passes
from trilith.kernels import ops
from trilith.kernels.library import CPU

SHAPES = ((1024, 1024), (4096, 4096))
KINDS = (("gelu_tanh", "tanh", 1 / 4), ("gelu", "none", None))  # the goal is stated for the tanh form
SWIGLU_GOAL = 1 / 2.5


def cases(benchmark: Benchmark, rounds: int) -> None:
    """GELU in both forms, SwiGLU on the product of gate and up and on the two alone."""
    for rows, width in SHAPES:
        for kind, approximate, goal in KINDS:
            _gelu_reused(benchmark, rows, width, kind, approximate, goal, rounds)
            _gelu_step(benchmark, rows, width, kind, approximate, goal, rounds)
        _swiglu(benchmark, rows, width, rounds)


def _gelu_reused(
    benchmark: Benchmark, rows: int, width: int, kind: str, approximate: str, goal: float | None, rounds: int
) -> None:
    x, dy, y, dx = (torch.randn(rows, width) for _ in range(4))
    code, threads, at = ("gelu", "gelu_tanh").index(kind), torch.get_num_threads(), Tensor.data_ptr

    def forward() -> None:
        CPU.activation_forward(0, code, at(x), 0, at(y), rows, width, threads)

    def backward() -> None:
        CPU.activation_backward(0, code, at(dy), at(x), 0, at(dx), 0, rows, width, threads)

    def torch_forward() -> None:
        torch.ops.aten.gelu.out(x, approximate=approximate, out=y)

    def torch_backward() -> None:
        torch.ops.aten.gelu_backward.grad_input(dy, x, approximate=approximate, grad_input=dx)

    for ours, theirs, result in ((forward, torch_forward, y), (backward, torch_backward, dx)):
        ours()
        kept = result.clone()
        theirs()
        torch.testing.assert_close(kept, result)
    for what, ours, theirs, passes in (
        ("forward", forward, torch_forward, 2),
        ("backward", backward, torch_backward, 3),
    ):
        benchmark.compare(
            f"{kind} {what} {rows} x {width}",
            ours,
            theirs,
            peer_name="torch",
            limit=fp32_passes(rows, width, passes),
            goal=goal,
            rounds=rounds,
        )


def _gelu_step(
    benchmark: Benchmark, rows: int, width: int, kind: str, approximate: str, goal: float | None, rounds: int
) -> None:
    x, dy = torch.randn(rows, width, requires_grad=True), torch.randn(rows, width)
    _compare_steps(
        benchmark,
        f"{kind} forward + backward {rows} x {width}, eager",
        [x],
        dy,
        lambda x: ops.gelu(x, kind),
        lambda x: functional.gelu(x, approximate=approximate),
        limit=fp32_passes(rows, width, 5),
        goal=goal,
        rounds=rounds,
    )


def _swiglu(benchmark: Benchmark, rows: int, width: int, rounds: int) -> None:
    gate_up, gate, up = (torch.randn(rows, n * width, requires_grad=True) for n in (2, 1, 1))
    dy = torch.randn(rows, width)

    def torch_packed(gate_up: Tensor) -> Tensor:
        return _torch_swiglu(*gate_up.chunk(2, dim=-1))

    about = {"limit": fp32_passes(rows, width, 8), "goal": SWIGLU_GOAL, "rounds": rounds}
    name = f"swiglu forward + backward {rows} x {width}, eager"
    _compare_steps(benchmark, f"{name}, of one product", [gate_up], dy, ops.swiglu_packed, torch_packed, **about)
    _compare_steps(benchmark, name, [gate, up], dy, ops.swiglu, _torch_swiglu, **about)


def _torch_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def _compare_steps(
    benchmark: Benchmark,
    case: str,
    leaves: list[Tensor],
    dy: Tensor,
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    **about: object,
) -> None:
    """Forward and backward of both, after equal results."""

    def step(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves), leaves, dy)

    for one, two in zip(step(ours), step(theirs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    benchmark.compare(case, lambda: step(ours), lambda: step(theirs), peer_name="torch", **about)
