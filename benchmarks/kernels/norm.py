"""LayerNorm and RMSNorm, alone and with the residual's sum, on buffers that are used again, as in a training step.

The limit counts the tensors that must pass through memory: forward 2 (with a residual 4), backward 3 (4).
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

EPS = 1e-5
SHAPES = ((16384, 1024), (4096, 1024), (512, 256))
# Above this size torch's figures are those of fresh pages; ours are compared with a copy instead.
IN_CACHE_ROWS = 4096


def reused(rows: int, width: int, is_rms: bool, has_residual: bool) -> tuple[Callable[[], None], Callable[[], None]]:
    """The native forward and backward into buffers that exist already."""
    x, residual, total, y, dy, dsum, dx = (torch.randn(rows, width) for _ in range(7))
    weight, bias, dweight, dbias = (torch.randn(width) for _ in range(4))
    mean, rstd = torch.empty(rows), torch.empty(rows)
    at = Tensor.data_ptr
    threads = torch.get_num_threads()
    source = total if has_residual else x

    def forward() -> None:
        CPU.norm_forward(
            0, at(x), at(residual) if has_residual else 0, at(weight), 0 if is_rms else at(bias),
            at(total) if has_residual else 0, at(y), 0 if is_rms else at(mean), at(rstd), rows, width, EPS, threads,
        )  # fmt: skip

    def backward() -> None:
        CPU.norm_backward(
            0, at(dy), at(dsum) if has_residual else 0, at(source), at(weight), 0 if is_rms else at(mean), at(rstd), at(dx),
            at(dweight), 0 if is_rms else at(dbias), rows, width, threads,
        )  # fmt: skip

    return forward, backward


def _check(rows: int, width: int) -> None:
    x, residual, dy, dsum = (torch.randn(rows, width, requires_grad=i < 2) for i in range(4))
    weight, bias = torch.randn(width, requires_grad=True), torch.randn(width, requires_grad=True)
    inputs = (x, residual, weight, bias)
    total, y = ops.add_layer_norm(*inputs, EPS)
    ours = (y, *torch.autograd.grad((total, y), inputs, (dsum, dy)))
    total = x + residual
    y = functional.layer_norm(total, weight.shape, weight, bias, EPS)
    theirs = (y, *torch.autograd.grad((total, y), inputs, (dsum, dy)))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def cases(benchmark: Benchmark, rounds: int) -> None:
    """Beside a copy where the tensors are large, beside torch where they stay in the caches."""
    _check(64, 256)
    for rows, width in SHAPES:
        _beside_copy(benchmark, rows, width, rounds)
        if rows <= IN_CACHE_ROWS:
            _beside_torch(benchmark, rows, width, rounds)
    for rows, width in SHAPES:
        _residual(benchmark, rows, width, rounds)


def _beside_copy(benchmark: Benchmark, rows: int, width: int, rounds: int) -> None:
    source, target = torch.randn(rows, width), torch.randn(rows, width)
    for is_rms in (False, True):
        forward, backward = reused(rows, width, is_rms, False)
        for name, run, passes in (("forward", forward, 2), ("backward", backward, 3)):
            benchmark.compare(
                f"{'rms' if is_rms else 'layer'}_norm {name} {rows} x {width}",
                run,
                lambda: target.copy_(source),
                peer_name=f"copy (of {passes}/2 as many bytes: ratio / {passes / 2:g} is the goal's)",
                limit=fp32_passes(rows, width, passes),
                goal=passes / 2 / 0.85 if rows > IN_CACHE_ROWS else None,
                rounds=rounds,
            )


def _beside_torch(benchmark: Benchmark, rows: int, width: int, rounds: int) -> None:
    x, dy, y = torch.randn(rows, width), torch.randn(rows, width), torch.empty(rows, width)
    weight, bias = torch.randn(width), torch.randn(width)
    shape = [width]
    _, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, EPS)
    forward, backward = reused(rows, width, False, False)
    mean_out, rstd_out = torch.empty_like(mean), torch.empty_like(rstd)

    def torch_forward() -> None:
        torch.ops.aten.native_layer_norm.out(x, shape, weight, bias, EPS, out0=y, out1=mean_out, out2=rstd_out)

    def torch_backward() -> None:
        torch.ops.aten.native_layer_norm_backward(dy, x, shape, mean, rstd, weight, bias, [True] * 3)

    pairs = (("forward", forward, torch_forward, 2, 1.0), ("backward", backward, torch_backward, 3, 1 / 1.3))
    for name, ours, theirs, passes, goal in pairs:
        benchmark.compare(
            f"layer_norm {name} {rows} x {width}",
            ours,
            theirs,
            peer_name="torch",
            limit=fp32_passes(rows, width, passes),
            goal=goal,
            rounds=rounds,
        )


def _residual(benchmark: Benchmark, rows: int, width: int, rounds: int) -> None:
    for is_rms in (False, True):
        fused, fused_back = reused(rows, width, is_rms, True)
        norm, norm_back = reused(rows, width, is_rms, False)
        x, residual, total = (torch.randn(rows, width) for _ in range(3))

        def pair(norm: Callable[[], None] = norm, x: Tensor = x, y: Tensor = residual, out: Tensor = total) -> None:
            torch.add(x, y, out=out)
            norm()

        def pair_back(
            back: Callable[[], None] = norm_back, x: Tensor = x, y: Tensor = residual, out: Tensor = total
        ) -> None:
            back()
            torch.add(x, y, out=out)

        name = "rms" if is_rms else "layer"
        for what, ours, theirs in (("forward", fused, pair), ("backward", fused_back, pair_back)):
            benchmark.compare(
                f"add + {name}_norm {what} {rows} x {width}",
                ours,
                theirs,
                peer_name="our own norm beside torch's sum",
                limit=fp32_passes(rows, width, 4),
                goal=1 / 1.3,
                rounds=rounds,
            )
