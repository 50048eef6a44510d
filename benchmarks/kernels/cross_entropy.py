"""The loss beside torch's, and the last product fused with it beside its three bare matrix products."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import Benchmark
from benchmarks.kernels.limits import fp32_passes
from trilith.kernels import ops

LOSSES = ((512, 32000), (2048, 32000), (512, 2048))
PRODUCTS = ((2048, 512, 32000), (2048, 1024, 32000))


def cases(benchmark: Benchmark, rounds: int) -> None:
    """Forward and gradient together, as a training step runs them."""
    for tokens, vocab in LOSSES:
        _loss(benchmark, tokens, vocab, rounds)
    for tokens, hidden, vocab in PRODUCTS:
        _product(benchmark, tokens, hidden, vocab, min(rounds, 8))


def _loss(benchmark: Benchmark, tokens: int, vocab: int, rounds: int) -> None:
    logits, labels, scale = (
        torch.randn(tokens, vocab),
        torch.randint(vocab, (tokens,)),
        torch.full((tokens,), 1.0 / tokens),
    )
    leaf = logits.clone().requires_grad_()
    out = torch.empty_like(logits)

    def ours() -> Tensor:
        _, kept = ops.token_losses(logits, labels)
        return ops.token_loss_gradient(logits, labels, scale, kept, out=out)

    def theirs() -> Tensor:
        leaf.grad = None
        functional.cross_entropy(leaf, labels).backward()
        assert leaf.grad is not None
        return leaf.grad

    torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-8)
    benchmark.compare(
        f"cross-entropy forward + gradient {tokens} x {vocab}",
        ours,
        theirs,
        peer_name="torch",
        limit=fp32_passes(tokens, vocab, 3),
        goal=1 / 8 if vocab == 32000 else None,
        rounds=rounds,
    )


def _product(benchmark: Benchmark, tokens: int, hidden: int, vocab: int, rounds: int) -> None:
    x = torch.randn(tokens, hidden, requires_grad=True)
    weight = torch.randn(vocab, hidden).mul_(hidden**-0.5).requires_grad_()
    labels = torch.randint(vocab, (tokens,))
    logits, dx, dweight = torch.empty(tokens, vocab), torch.empty(tokens, hidden), torch.empty(vocab, hidden)

    def ours() -> tuple[Tensor, ...]:
        total, _ = ops.linear_cross_entropy(x, weight, labels)
        return total.detach(), *torch.autograd.grad(total, (x, weight))

    def products() -> None:
        with torch.no_grad():
            torch.mm(x, weight.t(), out=logits)
            torch.mm(logits, weight, out=dx)
            torch.mm(logits.t(), x, out=dweight)

    total = functional.cross_entropy(x @ weight.t(), labels, reduction="sum")
    for one, two in zip(ours(), (total.detach(), *torch.autograd.grad(total, (x, weight))), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3, check_dtype=False)
    benchmark.compare(
        f"linear + cross-entropy, {tokens} tokens, hidden {hidden}, vocabulary {vocab}",
        ours,
        products,
        peer_name="its three bare matrix products",
        goal=1.15,
        rounds=rounds,
        warmup=1,
    )
