"""Causal attention beside torch's blocked attention, on heads that lie as in a packed product of queries, keys and values.

The limit is the rate of a matrix product here and now, for 4 S^2 D / 2 operations a head forward and 10 backward.
"""

from __future__ import annotations

import torch

from benchmarks.harness import Benchmark, matmul_flops_per_s
from trilith.kernels.mask import CAUSAL
from trilith.kernels.ops import attention as public
from trilith.kernels.ops.attention import _backward, _forward, _How

SHAPES = ((4, 128, 8, 32), (4, 128, 8, 64), (4, 256, 8, 64), (4, 512, 8, 64), (1, 1024, 8, 64), (1, 2048, 8, 64))


def cases(benchmark: Benchmark, rounds: int) -> None:
    """Forward and backward at each shape (batch, sequence, heads, features)."""
    rate = matmul_flops_per_s(torch.float32, torch.device("cpu"))
    aten = torch.ops.aten
    for batch, length, heads, features in SHAPES:
        q, k, v = torch.randn(batch, length, 3, heads, features).unbind(2)
        dout = torch.randn(batch, length, heads, features)
        turned = [x.transpose(1, 2) for x in (q, k, v)]
        how = _How(CAUSAL, tuple(range(heads)), 0.0, (0, 0), None, 0)
        out, lse = _forward(q, k, v, how)
        into = [torch.empty_like(x) for x in (q, k, v)]
        torch_out, torch_lse = aten._scaled_dot_product_flash_attention_for_cpu(*turned, 0.0, True)
        theirs = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout.transpose(1, 2), *turned, torch_out, torch_lse, 0.0, True
        )
        _backward(dout, q, k, v, out, lse, how, tuple(into))
        torch.testing.assert_close(public(q, k, v), torch_out.transpose(1, 2), rtol=1e-4, atol=1e-4)
        for one, two in zip(into, theirs, strict=True):
            torch.testing.assert_close(one, two.transpose(1, 2), rtol=1e-3, atol=1e-3)
        square = 2 * batch * heads * length * length * features
        goal = 1 / 1.3 if length <= 512 else 1.0
        name = f"B{batch} S{length} N{heads} D{features}"
        benchmark.compare(
            f"attention forward {name}",
            lambda q=q, k=k, v=v, how=how: _forward(q, k, v, how),
            lambda turned=turned: aten._scaled_dot_product_flash_attention_for_cpu(*turned, 0.0, True),
            peer_name="torch SDPA",
            limit=square / rate,
            goal=goal,
            rounds=rounds,
        )
        benchmark.compare(
            f"attention backward {name}",
            lambda a=(dout, q, k, v, out, lse, how): _backward(*a, into=tuple(torch.empty_like(x) for x in a[1:4])),
            lambda a=(*turned, torch_out, torch_lse), dout=dout: (
                aten._scaled_dot_product_flash_attention_for_cpu_backward(dout.transpose(1, 2), *a, 0.0, True)
            ),
            peer_name="torch SDPA",
            limit=2.5 * square / rate,
            goal=goal,
            rounds=rounds,
        )
