"""Rotary positions of queries in the product of queries, keys and values, beside the chain that torch's users write.

The limit counts the tensors that must pass through memory: one in and one out, forward and backward each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import Benchmark
from benchmarks.kernels.limits import fp32_passes
from trilith.kernels import ops
from trilith.layers.position import rotary_tables

SHAPES = ((2, 512, 8, 64), (4, 1024, 16, 64))  # batch, length, heads, features of a head


def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin, as in the models of transformers; cos and sin (S, 1, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def cases(benchmark: Benchmark, rounds: int) -> None:
    """Forward, and forward + backward."""
    for batch, length, heads, features in SHAPES:
        product = torch.randn(batch, length, 3 * heads * features)
        x = product[..., : heads * features].unflatten(-1, (heads, features))
        cos, sin = rotary_tables(torch.arange(length), features, 10000.0, torch.float32)
        wide_cos, wide_sin = (torch.cat((table, table), dim=-1).unsqueeze(1) for table in (cos, sin))
        leaf, dy = x.detach().requires_grad_(), torch.randn(x.shape)
        torch.testing.assert_close(ops.rotary(x, cos, sin), plain(x, wide_cos, wide_sin))
        size = f"{batch} x {length} x {heads} x {features}"
        rows, about = batch * length, {"peer_name": "torch", "goal": 1 / 4, "rounds": rounds}
        benchmark.compare(
            f"rotary forward {size}, eager",
            lambda x=x, tables=(cos, sin): ops.rotary(x, *tables),
            lambda x=x, tables=(wide_cos, wide_sin): plain(x, *tables),
            limit=fp32_passes(rows, heads * features, 2),
            **about,
        )
        benchmark.compare(
            f"rotary forward + backward {size}, eager",
            lambda x=leaf, dy=dy, tables=(cos, sin): torch.autograd.grad(ops.rotary(x, *tables), x, dy),
            lambda x=leaf, dy=dy, tables=(wide_cos, wide_sin): torch.autograd.grad(plain(x, *tables), x, dy),
            limit=fp32_passes(rows, heads * features, 4),
            **about,
        )
