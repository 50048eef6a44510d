"""A whole training step of GPT on the native ops, beside its bare matrix products and beside a hand-written loop in torch.

Both run in one process, so that they have the same allocator settings; losses and gradient norms over several steps are
equal first. The bare products are those with weights (three for each linear and for the head), into buffers that exist.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.harness import Benchmark
from benchmarks.step import Pair, config

LAYERS, SAMPLES, LENGTH, VOCABULARY = 4, 4, 128, 2048
# In fp32, between kernels that sum in different orders, over five steps that each build on the last.
RTOL = 5e-5


def products(hidden: int) -> Callable[[], None]:
    """The matrix products with weights of one step, forward and backward."""
    tokens = SAMPLES * LENGTH
    linears = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)] * LAYERS
    buffers = []
    for fan_in, fan_out in [*linears, (hidden, VOCABULARY)]:
        shapes = ((tokens, fan_in), (fan_out, fan_in), (tokens, fan_out))
        buffers.append(tuple(torch.randn(shape) for shape in shapes * 2))

    def run() -> None:
        for x, weight, y, *_ in buffers:
            torch.mm(x, weight.t(), out=y)
        for x, weight, dy, dx, dweight, _ in reversed(buffers):
            torch.mm(dy, weight, out=dx)
            torch.mm(dy.t(), x, out=dweight)

    return run


def cases(benchmark: Benchmark, rounds: int) -> None:
    """Hidden 256 and 512."""
    for hidden in (256, 512):
        pair = Pair(config(hidden, LAYERS, SAMPLES, 1, 0.0))
        worst = pair.check_equal()
        assert worst < RTOL, f"results differ: {worst}"
        bare = products(hidden)
        name = f"GPT step, hidden {hidden}, {LAYERS} layers, {SAMPLES * LENGTH} tokens"
        benchmark.compare(
            name, pair.engine.train_step, bare, peer_name="its bare matrix products", goal=1.2, rounds=rounds
        )
        benchmark.compare(
            name, pair.engine.train_step, pair.plain_step, peer_name="torch eager", goal=1 / 1.15, rounds=rounds
        )
