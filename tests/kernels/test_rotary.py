"""Rotary positions: tables of both shapes, views of the packed product, every instruction set and form."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from tests.kernels.native import native, require_same_bits
from tests.kernels.test_ops import DTYPES, Op, check_accuracy, draw, evaluate, plain_rotary
from trilith.errors import KernelError
from trilith.kernels import ops, reference

rotary = importlib.import_module("trilith.kernels.ops.rotary")  # `ops.rotary` is the function
SIZES = ((2, 7, 3, 6), (1, 5, 2, 64), (3, 4, 1, 26), (2, 3, 5, 128))
SHARED = Op(
    "rotary",
    ops.rotary,
    reference.rotary,
    plain_rotary,
    tuple(((b, s, n, d), (s, d // 2), (s, d // 2)) for b, s, n, d in SIZES),
    tables=2,
)
OWN = Op(
    "rotary of own positions",
    ops.rotary,
    reference.rotary,
    plain_rotary,
    tuple(((b, s, n, d), (b, s, d // 2), (b, s, d // 2)) for b, s, n, d in SIZES),
    tables=2,
)
BOTH = pytest.mark.parametrize("op", [SHARED, OWN], ids=lambda op: op.name)


def packed_view(x: Tensor) -> Tensor:
    """The same values, as the heads in the middle of a wider product."""
    batch, length, heads, dim = x.shape
    wide = x.new_zeros(batch, length, (heads + 3) * dim)
    view = wide[..., dim : (heads + 1) * dim].unflatten(-1, (heads, dim))
    view.copy_(x)
    return view


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(op: Op, dtype: torch.dtype) -> None:
    for shapes in op.shapes:
        x, cos, sin = draw(op, shapes, dtype, "cpu")
        check_accuracy(op, [x, cos, sin])
        check_accuracy(op, [packed_view(x), cos, sin])


@native
@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_every_instruction_set(op: Op, dtype: torch.dtype, instruction_set: str) -> None:
    for shapes in op.shapes:
        check_accuracy(op, draw(op, shapes, dtype, "cpu"))


@BOTH
def test_gradients_of_gradients(op: Op) -> None:
    x, cos, sin = draw(op, op.shapes[0], torch.float64, "cpu")
    x.requires_grad_()
    assert torch.autograd.gradcheck(op.ours, (x, cos, sin))
    assert torch.autograd.gradgradcheck(op.ours, (x, cos, sin))


@native
def test_views_are_read_where_they_are() -> None:
    """A view of the product gives what its copy gives, and the result is contiguous."""
    x, cos, sin = draw(SHARED, SHARED.shapes[1], torch.float32, "cpu")
    for view in (packed_view(x), x.transpose(1, 2).contiguous().transpose(1, 2), x[:, :, :1].expand(-1, -1, 4, -1)):
        turned = ops.rotary(view, cos, sin)
        assert turned.is_contiguous() and torch.equal(turned, ops.rotary(view.clone(), cos, sin))


@native
def test_threads_do_not_matter() -> None:
    inputs = draw(SHARED, ((3, 97, 4, 32), (97, 16), (97, 16)), torch.float32, "cpu")
    require_same_bits(lambda: evaluate(ops.rotary, inputs, 2))


@native
def test_empty() -> None:
    for shape in ((0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)):
        table = torch.ones(shape[1], 4)
        assert ops.rotary(torch.ones(shape), table, table).shape == shape


@native
def test_refusals() -> None:
    x, table = torch.ones(2, 5, 3, 8), torch.ones(5, 4)
    for cos, sin in ((table[:4], table[:4]), (table, table[:4]), (table.expand(3, 5, 4),) * 2):
        with pytest.raises(KernelError, match=r"must be \(B, S, N, D\)"):
            ops.rotary(x, cos, sin)
    with pytest.raises(KernelError, match=r"tables are torch\.float64"):
        ops.rotary(x, table.double(), table.double(), "fused")


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_other_backends(backend: str) -> None:
    for op in (SHARED, OWN):
        x, cos, sin = draw(op, op.shapes[1], torch.float32, "cpu")
        torch.testing.assert_close(ops.rotary(x, cos, sin, backend), ops.rotary(x, cos, sin))


@native
def test_opcheck_and_meta() -> None:
    x, cos, sin = draw(SHARED, SHARED.shapes[0], torch.float32, "cpu")
    torch.library.opcheck(rotary.rotary_op, (x.requires_grad_(), cos, sin, False))
    torch.library.opcheck(rotary.rotary_op, (packed_view(x.detach()), cos, sin, True))
    assert ops.rotary(x.to("meta"), cos.to("meta"), sin.to("meta")).shape == x.shape


@native
@pytest.mark.slow
def test_compiled_as_one_graph() -> None:
    x, cos, sin = draw(SHARED, SHARED.shapes[0], torch.float32, "cpu")
    x.requires_grad_()
    compiled = torch.compile(ops.rotary, fullgraph=True, backend="aot_eager")
    dy, found = torch.randn(x.shape), []
    for function in (ops.rotary, compiled):
        y = function(x, cos, sin)
        found.append((y, *torch.autograd.grad(y, x, dy)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
