"""Dropout and initial normal numbers from the layout-invariant stream, beside torch's generators.

The masks differ, because torch's are not a function of the model; their shares are compared. The limit of dropout counts
the tensors that must pass through memory, that of a mask its bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import Benchmark
from benchmarks.kernels.limits import fp32_passes
from trilith.kernels import ops, stream
from trilith.sharding import whole

KEY, P = (7, 9), 0.1
SHAPES = ((2, 512, 1024), (8, 512, 1024))  # batch, length, features: 4 and 16 MB
WEIGHT = (2048, 2048)


def cases(benchmark: Benchmark, rounds: int) -> None:
    """Masks, dropout alone and with the residual's sum, and a weight's initial values."""
    for shape in SHAPES:
        _dropout(benchmark, shape, rounds)
    ours = stream.fill_box(KEY, WEIGHT, whole(WEIGHT), "normal", 0.02, torch.float32, "cpu")
    assert abs(float(ours.std()) - 0.02) < 1e-4
    target = torch.empty(WEIGHT)
    benchmark.compare(
        f"initial normal numbers {WEIGHT[0]} x {WEIGHT[1]}",
        lambda: stream.fill_box(KEY, WEIGHT, whole(WEIGHT), "normal", 0.02, torch.float32, "cpu"),
        lambda: target.normal_(0.0, 0.02),
        peer_name="torch's normal_",
        limit=fp32_passes(*WEIGHT, 1),
        rounds=rounds,
    )


def _dropout(benchmark: Benchmark, shape: tuple[int, int, int], rounds: int) -> None:
    batch, length, width = shape
    samples, positions, features = torch.arange(batch), torch.arange(length), (0, width)
    x, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
    dy = torch.randn(shape)
    keep = stream.dropout_keep(KEY, samples, positions, features, P)
    assert abs(float(keep.float().mean()) - (1 - P)) < 1e-2
    size = " x ".join(map(str, shape))

    def ours(x: Tensor) -> Tensor:
        return ops.dropout(x, P, KEY, samples, positions, features)

    def fused() -> tuple[Tensor, ...]:
        y = ops.dropout_add(x, residual, P, KEY, samples, positions, features)
        return torch.autograd.grad(y, (x, residual), dy)

    def torch_sum() -> tuple[Tensor, ...]:
        return torch.autograd.grad(residual + functional.dropout(x, P), (x, residual), dy)

    plain = x.detach()
    pairs = (
        ("dropout mask", lambda: stream.dropout_keep(KEY, samples, positions, features, P), 0.25, 1 / 10),
        ("dropout forward", lambda: ours(plain), 2, None),
    )
    for name, run, passes, goal in pairs:
        benchmark.compare(
            f"{name} {size}",
            run,
            lambda: functional.dropout(plain, P),
            peer_name="torch's dropout",
            limit=fp32_passes(batch * length, width, 1) * passes,
            goal=goal,
            rounds=rounds,
        )
    benchmark.compare(
        f"residual + dropout, forward + backward {size}, eager",
        fused,
        torch_sum,
        peer_name="torch",
        limit=fp32_passes(batch * length, width, 5),
        rounds=rounds,
    )
