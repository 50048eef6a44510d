"""Native cross-entropy on every instruction set, and the product fused with it; test_ops.py holds the accuracy too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.kernels.native import native, require_same_bits
from trilith.errors import KernelError
from trilith.kernels import ops, reference
from trilith.layers.embedding import VocabularyShard
from trilith.layers.loss import LossSettings, vocab_parallel_cross_entropy
from trilith.topology import Group

pytestmark = native
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def problem(tokens: int, vocab: int, dtype: torch.dtype, size: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(tokens, vocab, generator=generator, dtype=torch.float64) * size
    return logits.to(dtype), torch.randint(vocab, (tokens,), generator=generator)


def whole(vocab: int) -> VocabularyShard:
    return VocabularyShard(0, vocab, vocab, vocab)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 17, 1023, 1024, 1025, 5003])
def test_whole_vocabulary(vocab: int, dtype: torch.dtype, instruction_set: str) -> None:
    logits, labels = problem(5, vocab, dtype, 20.0)
    losses, kept = ops.token_losses(logits, labels)
    scale = torch.rand(5, dtype=losses.dtype)
    leaf = logits.double().requires_grad_()
    truth = functional.cross_entropy(leaf, labels, reduction="none")
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(losses.double(), truth, rtol=tolerance, atol=20 * tolerance)
    expected = torch.autograd.grad(truth, leaf, scale.double())[0]
    gradient = ops.token_loss_gradient(logits, labels, scale, kept)
    torch.testing.assert_close(gradient.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=4 * tolerance)
    own = logits.clone()
    assert torch.equal(ops.token_loss_gradient(own, labels, scale, kept, out=own), gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 1), (3, 50), (40, 1031), (19, 2500)])
def test_linear_cross_entropy(tokens: int, vocab: int, dtype: torch.dtype, instruction_set: str) -> None:
    """Against the product and torch's loss in float64: at most twice the error of the same in `dtype`."""
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(n, 24, generator=generator, dtype=torch.float64).to(dtype) for n in (tokens, vocab))
    labels, mask = torch.randint(vocab, (tokens,), generator=generator), torch.arange(tokens) % 3 != 1
    labels = torch.where(mask, labels, -100)

    def plain(*inputs: Tensor) -> list[Tensor]:
        leaves = [i.detach().requires_grad_() for i in inputs]
        losses = functional.cross_entropy(functional.linear(*leaves), labels, reduction="none", ignore_index=-100)
        return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]

    leaves = [i.detach().requires_grad_() for i in (x, weight)]
    total, losses = ops.linear_cross_entropy(*leaves, labels, mask)
    assert not losses.requires_grad and not losses[~mask].any()
    torch.testing.assert_close(total.detach(), losses.sum(dtype=torch.float64))
    ours = [losses, *torch.autograd.grad(total * 1.0, leaves)]
    for value, other, truth in zip(ours, plain(x, weight), plain(x.double(), weight.double()), strict=True):
        floor = 64 * torch.finfo(dtype).eps if dtype == torch.float64 else torch.finfo(dtype).eps
        limit = max(3 * float((other.double() - truth).norm()), floor * float(truth.norm()) + 1e-12)
        assert float((value.double() - truth).norm()) <= limit


Z_LOSS = 0.3


def z_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Each token's loss, as it is defined."""
    normalisers = logits.double().logsumexp(-1)
    return functional.cross_entropy(logits.double(), labels, reduction="none") + Z_LOSS * normalisers.square()


@pytest.mark.parametrize("backend", ["fused", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_z_loss(dtype: torch.dtype, backend: str) -> None:
    """Of a whole vocabulary, of one in parts on one rank, and fused with the product: values and gradients."""
    logits, labels = problem(7, 301, dtype, 3.0)
    leaf = logits.clone().requires_grad_()
    truth = z_losses(leaf, labels)
    weights = torch.linspace(0.0, 1.0, 7, dtype=torch.float64)
    (expected,) = torch.autograd.grad((truth * weights).sum(), leaf)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    group, how = Group("tp", (0,), 0, None), LossSettings(backend, z_loss=Z_LOSS)
    parted = VocabularyShard(0, 301, 304, 301)  # with padding it takes the way of a split vocabulary
    for shard, columns in ((whole(301), logits), (parted, functional.pad(logits, (0, 3), value=9.0))):
        own = columns.clone().view(1, 7, -1).requires_grad_()
        losses = vocab_parallel_cross_entropy(own, labels.view(1, 7), None, shard, group, how)
        torch.testing.assert_close(losses.double().view(-1), truth.detach(), **tolerance)
        (gradient,) = torch.autograd.grad((losses.double().view(-1) * weights).sum(), own)
        torch.testing.assert_close(gradient.view(7, -1)[:, :301].double(), expected.double(), **tolerance)
    x, weight = torch.randn(7, 5, dtype=dtype), torch.randn(301, 5, dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, weight)]
    total, losses = ops.linear_cross_entropy(*leaves, labels, z_loss=Z_LOSS, backend=backend)
    truth = z_losses(x @ weight.t(), labels)
    torch.testing.assert_close(losses.double(), truth.detach(), **tolerance)
    pairs = zip(torch.autograd.grad(total, leaves), torch.autograd.grad(truth.sum(), leaves), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=tolerance["rtol"] * 10, atol=tolerance["atol"] * 100)


def test_linear_cross_entropy_scales_with_what_comes_back() -> None:
    x, weight = torch.randn(12, 6, requires_grad=True), torch.randn(30, 6, requires_grad=True)
    labels = torch.randint(30, (12,))
    once = torch.autograd.grad(ops.linear_cross_entropy(x, weight, labels)[0], (x, weight))
    twice = torch.autograd.grad(2.0 * ops.linear_cross_entropy(x, weight, labels)[0], (x, weight))
    for one, two in zip(once, twice, strict=True):
        assert torch.equal(2.0 * one, two)
    halved = ops.linear_cross_entropy(x, weight, labels, gradient_scale=0.5)[0]
    for one, two in zip(once, torch.autograd.grad(0.5 * halved, (x, weight)), strict=True):
        assert torch.equal(0.5 * one, two), "the gradient that was expected: no product with it"


def test_linear_cross_entropy_makes_what_is_asked_for() -> None:
    """No gradient without grad mode; of x or of the weight alone where the other needs none."""
    x, weight, labels = torch.randn(12, 6, requires_grad=True), torch.randn(30, 6), torch.randint(30, (12,))
    truth = functional.cross_entropy(x @ weight.t(), labels, reduction="sum")
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        total, _ = ops.linear_cross_entropy(x, weight.requires_grad_(), labels)
    assert not total.requires_grad and all(event.key != "aten::addmm_" for event in profile.key_averages())
    torch.testing.assert_close(total, truth.detach().double(), rtol=1e-6, atol=0.0)  # the truth is summed in fp32
    for one, other in ((x, weight), (weight, x)):
        other.requires_grad_(False), one.requires_grad_()
        total, _ = ops.linear_cross_entropy(x, weight, labels)
        expected = functional.cross_entropy(x @ weight.t(), labels, reduction="sum")
        pair = torch.autograd.grad(total, one)[0], torch.autograd.grad(expected, one)[0]
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_linear_cross_entropy_in_fp16_keeps_small_gradients(scale: float) -> None:
    """A mean's logit gradients lie below fp16's numbers: made for the loss scale they come through."""
    x, weight = (torch.randn(n, 16).half().requires_grad_() for n in (64, 3000))
    labels = torch.randint(3000, (64,))
    truth = functional.cross_entropy(x.double() @ weight.double().t(), labels) * scale
    total, _ = ops.linear_cross_entropy(x, weight, labels, gradient_scale=1.0)
    found = torch.autograd.grad(total * (scale / 64), (x, weight))
    for one, two in zip(found, torch.autograd.grad(truth, (x, weight)), strict=True):
        assert float((one.double() - two).norm()) <= 3e-3 * float(two.norm()) + 1e-6


def test_linear_cross_entropy_backward_twice() -> None:
    x, weight = torch.randn(12, 6, requires_grad=True), torch.randn(30, 6, requires_grad=True)
    total, _ = ops.linear_cross_entropy(x, weight, torch.zeros(12, dtype=torch.int64))
    total.backward(retain_graph=True)
    with pytest.raises(KernelError, match="second time"):
        total.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    logits, labels = problem(40, 5003, dtype)

    def run() -> tuple[Tensor, Tensor]:
        losses, kept = ops.token_losses(logits, labels)
        return losses, ops.token_loss_gradient(logits, labels, torch.ones_like(losses), kept)

    require_same_bits(run)


def test_overwritten_logits_are_noticed() -> None:
    """The gradient in the logits' place: the same bits, and a second backward is an error, not a wrong result."""
    logits, labels = problem(6, 50, torch.float32)
    gradients = []
    for overwrites in (False, True):
        leaf = logits.clone().requires_grad_()
        made = leaf * 1.0
        how = LossSettings(overwrites_logits=overwrites)
        loss = vocab_parallel_cross_entropy(made[None], labels[None], None, whole(50), Group("tp", (0,), 0), how)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
        gradients.append(gradient)
        if overwrites:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.sum().backward()
    assert torch.equal(*gradients)


def test_extremes() -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0], [float("-inf"), 2.0, 1.0], [3.0, float("nan"), 1.0], [0.0, 0.0, 0.0]])
    labels = torch.tensor([0, 1, 0, 2])
    losses, kept = ops.token_losses(logits, labels)
    expected = functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses, expected, equal_nan=True)
    gradient = ops.token_loss_gradient(logits, labels, torch.ones(4), kept)
    leaf = logits.clone().requires_grad_()
    functional.cross_entropy(leaf, labels, reduction="sum").backward()
    torch.testing.assert_close(gradient, leaf.grad, equal_nan=True)


def test_empty() -> None:
    losses, kept = ops.token_losses(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64))
    assert losses.shape == (0,)
    assert ops.token_loss_gradient(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), losses, kept).shape == (0, 7)
    total, losses = ops.linear_cross_entropy(torch.zeros(0, 3), torch.zeros(5, 3), torch.zeros(0, dtype=torch.int64))
    assert total == 0.0 and losses.shape == (0,)


def test_opcheck() -> None:
    logits, labels = problem(4, 9, torch.float32)
    library_ops: Any = torch.ops.trilith
    torch.library.opcheck(library_ops.cross_entropy_terms.default, (logits, labels, None, 0, 9))
    largest, total, _, losses = library_ops.cross_entropy_terms(logits, labels, None, 0, 9)
    torch.library.opcheck(library_ops.logit_max.default, (logits, 9))
    for softmax_scale in (None, losses + 1.0):
        arguments = (logits, labels, largest, total, losses, softmax_scale, 0, 9)
        torch.library.opcheck(library_ops.cross_entropy_gradient.default, arguments)
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    torch.library.opcheck(library_ops.linear_cross_entropy.default, (x, weight, labels, None, 0.5, 0.1, True, True))
    torch.library.opcheck(
        library_ops.linear_cross_entropy.default, (x.detach(), weight, labels, None, 1.0, 0.0, False, True)
    )


def test_compiles_whole() -> None:
    x, weight, labels = torch.randn(8, 6, requires_grad=True), torch.randn(20, 6, requires_grad=True), torch.arange(8)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return ops.linear_cross_entropy(x, weight, labels)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(x, weight), (x, weight))
    for one, two in zip(ours, torch.autograd.grad(loss(x, weight), (x, weight)), strict=True):
        torch.testing.assert_close(one, two)


def test_refusals() -> None:
    logits, labels = problem(4, 9, torch.float32)
    with pytest.raises(KernelError, match=r"labels \(3,\) torch.int64"):
        ops.token_losses(logits, labels[:3])
    with pytest.raises(KernelError, match=r"must be \(T, H\), \(V, H\) and \(T,\)"):
        ops.linear_cross_entropy(torch.zeros(2, 3), torch.zeros(5, 4), labels[:2])
    with pytest.raises(KernelError, match="gradient_scale"):
        ops.linear_cross_entropy(torch.zeros(4, 3), torch.zeros(5, 3), labels, gradient_scale=0.0)
    with pytest.raises(KernelError, match="must be equal"):
        ops.linear_cross_entropy(torch.zeros(4, 3), torch.zeros(5, 3).double(), labels)
    assert reference.local_logit_max(logits, 0).isinf().all()
