"""A product whose weight gradient waits in a queue: the same bits as autograd's, nothing fired early, no graph kept."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.nn import functional

from trilith.kernels import ops
from trilith.kernels.weight_queue import WeightQueue
from trilith.layers.recompute import recomputed


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 5), (1, 64, 5)])
def test_bits_of_autograd(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    x, weight, b = random(*shape, dtype=dtype), random(6, 5, dtype=dtype), random(6, dtype=dtype) if bias else None
    upstream = random(*shape[:-1], 6, dtype=dtype)
    leaves = [t.clone().requires_grad_() for t in (x, weight, b) if t is not None]
    functional.linear(*leaves).backward(upstream)
    queue = WeightQueue()
    mine = [t.clone().requires_grad_() for t in (x, weight, b) if t is not None]
    y = ops.linear(*mine, queue=queue)
    assert torch.equal(y, functional.linear(x, weight, b))
    y.backward(upstream)
    assert mine[1].grad is None, "the weight's gradient waits"
    (item,) = queue.take()
    assert item.weight is mine[1]
    assert torch.equal(mine[0].grad, leaves[0].grad) and torch.equal(item.gradient(), leaves[1].grad)
    if bias:
        assert torch.equal(mine[2].grad, leaves[2].grad)


def test_no_hook_of_the_weight_fires_in_backward() -> None:
    weight = random(4, 3).requires_grad_()
    fired = []
    weight.register_post_accumulate_grad_hook(lambda parameter: fired.append("post"))
    weight.register_hook(lambda gradient: fired.append("hook"))
    ops.linear(random(2, 3).requires_grad_(), weight, queue=WeightQueue()).sum().backward()
    assert not fired


def test_a_first_layer_without_input_gradient_is_queued_too() -> None:
    queue, weight, x = WeightQueue(), random(4, 3).requires_grad_(), random(2, 3)
    ops.linear(x, weight, queue=queue).square().sum().backward()
    (item,) = queue.take()
    torch.testing.assert_close(item.gradient(), 2 * (x @ weight.detach().t()).t() @ x)


def test_frozen_weights_and_no_grad_queue_nothing() -> None:
    queue, x = WeightQueue(), random(2, 3).requires_grad_()
    ops.linear(x, random(4, 3), queue=queue).sum().backward()
    with torch.no_grad():
        assert not ops.linear(x, random(4, 3).requires_grad_(), queue=queue).requires_grad
    assert x.grad is not None and queue.take() == []


def test_a_changed_tensor_is_noticed() -> None:
    queue, x = WeightQueue(), random(2, 3).requires_grad_()
    ops.linear(x, random(4, 3).requires_grad_(), queue=queue).sum().backward()
    x.data.add_(0)  # keeps the version
    (item,) = queue.take()
    item.gradient()
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(AssertionError, match="changed in place"):
        item.gradient()


def test_queued_tensors_hold_no_graph() -> None:
    class Marker:
        pass

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, marker: Marker) -> torch.Tensor:
            ctx.marker = marker
            return x + 1

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
            return gradients[0], None

    queue, marker = WeightQueue(), Marker()
    alive = weakref.ref(marker)
    hidden = Node.apply(random(2, 3).requires_grad_(), marker)
    ops.linear(hidden, random(4, 3).requires_grad_(), queue=queue).sum().backward()
    del hidden, marker
    gc.collect()
    assert alive() is None, "the queue keeps the graph of the stage alive"
    assert not queue.take()[0].x.requires_grad


def test_under_recompute_each_product_is_queued_once() -> None:
    queue, weight = WeightQueue(), random(3, 3).requires_grad_()
    plain_weight, x = weight.detach().clone().requires_grad_(), random(2, 3)

    def twice(function, value):  # type: ignore[no-untyped-def]
        return function(torch.tanh(function(value)))

    mine = x.clone().requires_grad_()
    recomputed(lambda v: twice(lambda u: ops.linear(u, weight, queue=queue), v), mine).square().sum().backward()
    theirs = x.clone().requires_grad_()
    twice(lambda u: functional.linear(u, plain_weight), theirs).square().sum().backward()
    items = queue.take()
    assert len(items) == 2
    assert torch.equal(mine.grad, theirs.grad)
    torch.testing.assert_close(sum(item.gradient() for item in items), plain_weight.grad)


def test_a_tracker_sees_what_the_queue_holds() -> None:
    queue, seen = WeightQueue(), []
    queue.tracker = lambda tensor: seen.append(tuple(tensor.shape))
    ops.linear(random(2, 5, 3).requires_grad_(), random(4, 3).requires_grad_(), queue=queue).sum().backward()
    assert seen == [(10, 3), (10, 4)]


def test_a_queue_that_does_not_defer_hands_products_on() -> None:
    queue, weight, got = WeightQueue(defers=False), random(4, 3).requires_grad_(), []
    assert not queue.takes
    ops.linear(random(2, 3), weight, queue=queue).sum().backward()
    assert weight.grad is not None, "nobody takes it: autograd does"
    weight.grad = None
    queue.receive = lambda parameter, product: got.append((parameter, product.gradient()))
    x = random(2, 3).requires_grad_()
    ops.linear(x, weight, queue=queue).square().sum().backward()
    ((parameter, gradient),) = got
    assert parameter is weight and weight.grad is None and queue.take() == []
    torch.testing.assert_close(gradient, (2 * (x @ weight.t()).t() @ x).detach())
    out = torch.full((4, 3), torch.nan)
    queue.receive = lambda parameter, product: product.gradient(out=out)
    ops.linear(x, weight, queue=queue).square().sum().backward()
    assert torch.equal(out, gradient)
