"""GELU with and without a bias and the gated units: on every instruction set, in every form that torch asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.kernels.native import native, require_same_bits
from tests.kernels.test_ops import DTYPES, Op, check_accuracy, draw, evaluate, rows, strided
from trilith.errors import KernelError
from trilith.kernels import ops, reference
from trilith.kernels.ops import activation


def halves(run: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """A gated unit as a function of the product of gate and up."""
    return lambda x: run(*x.chunk(2, dim=-1))


def plain_geglu(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda g, u: F.gelu(g, approximate="none" if kind == "gelu" else "tanh") * u


def packed_rows() -> tuple[tuple[tuple[int, ...], ...], ...]:
    return tuple((((*shape[:-1], 2 * shape[-1])),) for (shape,) in rows())


PAIRS = tuple((shape, shape) for (shape,) in rows())
CASES = (
    *(
        Op(
            f"bias_{kind}",
            lambda x, b, kind=kind: ops.bias_gelu(x, b, kind),
            lambda x, b, kind=kind: reference.bias_gelu(x, b, kind),
            lambda x, b, kind=kind: F.gelu(x + b, approximate="none" if kind == "gelu" else "tanh"),
            rows(lambda h: (h,)),
        )
        for kind in ("gelu", "gelu_tanh")
    ),
    *(
        Op(
            f"geglu_{kind}",
            lambda g, u, kind=kind: ops.geglu(g, u, kind),
            lambda g, u, kind=kind: reference.geglu(g, u, kind),
            plain_geglu(kind),
            PAIRS,
        )
        for kind in ("gelu", "gelu_tanh")
    ),
    Op("gelu", lambda x: ops.gelu(x, "gelu"), lambda x: reference.gelu(x, "gelu"), F.gelu, rows()),
    Op(
        "gelu_tanh",
        lambda x: ops.gelu(x, "gelu_tanh"),
        lambda x: reference.gelu(x, "gelu_tanh"),
        lambda x: F.gelu(x, approximate="tanh"),
        rows(),
    ),
    Op("swiglu", ops.swiglu, reference.swiglu, lambda g, u: F.silu(g) * u, PAIRS),
    Op(
        "swiglu_packed",
        ops.swiglu_packed,
        halves(reference.swiglu),
        halves(lambda g, u: F.silu(g) * u),
        packed_rows(),
    ),
    Op(
        "geglu_packed",
        lambda x: ops.geglu_packed(x, "gelu"),
        halves(lambda g, u: reference.geglu(g, u, "gelu")),
        halves(plain_geglu("gelu")),
        packed_rows(),
    ),
)
BY_NAME = pytest.mark.parametrize("op", CASES, ids=lambda op: op.name)


@BY_NAME
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 6.0])
def test_accuracy(op: Op, dtype: torch.dtype, size: float) -> None:
    for shapes in op.shapes[1:]:  # of a single number plain torch may have no error at all
        inputs = [x * size for x in draw(op, shapes, dtype, "cpu")]
        check_accuracy(op, inputs)
        check_accuracy(op, [strided(x) for x in inputs])


@native
@BY_NAME
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_every_instruction_set(op: Op, dtype: torch.dtype, instruction_set: str) -> None:
    for shapes in op.shapes[1:]:
        check_accuracy(op, draw(op, shapes, dtype, "cpu"))


@native
@BY_NAME
def test_gradcheck(op: Op) -> None:
    leaves = [x.requires_grad_() for x in draw(op, op.shapes[1], torch.float64, "cpu")]
    assert torch.autograd.gradcheck(op.ours, leaves, fast_mode=True)


@native
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh"])
def test_every_float_of_the_curve(kind: str) -> None:
    """Along the whole line: within 4 units in the last place of the largest of x and 1, and of the true slope."""
    x = torch.cat([torch.linspace(-20, 20, 400_001), torch.linspace(-1e-3, 1e-3, 20_001)]).requires_grad_()
    y = ops.gelu(x, kind)
    (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    y = y.detach()
    exact = x.detach().double().requires_grad_()
    truth = reference.gelu(exact, kind)
    (true_slope,) = torch.autograd.grad(truth, exact, torch.ones_like(truth))
    unit = torch.finfo(torch.float32).eps
    assert float(((y - truth.detach()).abs() / exact.detach().abs().clamp(min=1e-30)).max()) < 4 * unit
    assert float((slope - true_slope).abs().max()) < 8 * unit


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu"])
def test_what_is_not_finite_and_what_is_huge(kind: str, dtype: torch.dtype) -> None:
    """As torch in float64, whose fp32 form takes the root of the largest number for infinity."""
    huge = torch.finfo(dtype).max
    values = [0.0, -0.0, 1e-7, -1e-7, 9.99, -9.99, 10.01, -10.01, 86.9, -86.9, 87.1, -87.1, 3e4, -3e4, huge, -huge]
    x = torch.tensor([*values, float("inf"), float("-inf"), float("nan")], dtype=dtype)
    if kind == "silu":
        ours, theirs = ops.swiglu(x, torch.ones_like(x)), F.silu(x.double())
    else:
        ours, theirs = ops.gelu(x, kind), F.gelu(x.double(), approximate="tanh" if kind == "gelu_tanh" else "none")
    torch.testing.assert_close(ours, theirs.to(dtype), equal_nan=True, rtol=1e-2, atol=1e-5)


@native
@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_matter(op: Op, dtype: torch.dtype) -> None:
    wide = tuple((37, 40, *shape[2:]) if len(shape) == 3 else shape for shape in op.shapes[2])
    inputs = draw(op, wide, dtype, "cpu")
    require_same_bits(lambda: evaluate(op.ours, inputs, 0))


@native
def test_large_results_are_written_past_the_caches() -> None:
    """Beyond 16 MB the stores differ; so the results must not, at the end neither."""
    for width in (1024, 1021):
        x = torch.randn(5000, width)
        for kind in ("gelu", "gelu_tanh"):
            assert torch.equal(ops.gelu(x, kind)[-3:], ops.gelu(x[-3:], kind))
        gate_up = torch.randn(5000, 2 * width, requires_grad=True)
        ops.swiglu_packed(gate_up).sum().backward()
        last = gate_up.detach()[-3:].clone().requires_grad_()
        ops.swiglu_packed(last).sum().backward()
        assert gate_up.grad is not None and torch.equal(gate_up.grad[-3:], last.grad)


@native
def test_halves_of_a_product_are_not_copied() -> None:
    """Evenly spaced rows are read where they are; others are made contiguous, with the same result."""
    gate_up = torch.randn(2, 5, 3, 14)
    gate, up = gate_up.chunk(2, dim=-1)
    assert activation._rows(gate) == (gate, 14) and activation._rows(up)[0] is up
    expected = reference.swiglu(gate, up)
    torch.testing.assert_close(ops.swiglu(gate, up), expected)
    torch.testing.assert_close(ops.swiglu_packed(gate_up), expected)
    for uneven in (gate_up[:, ::2], gate_up.transpose(0, 1), gate_up[:1].expand(2, -1, -1, -1), gate_up[..., 1:13]):
        torch.testing.assert_close(ops.swiglu_packed(uneven), halves(reference.swiglu)(uneven))


@native
def test_empty_and_scalar() -> None:
    for shape in ((0, 4), (3, 0), ()):
        x = torch.ones(shape, requires_grad=True)
        ops.gelu(x, "gelu").sum().backward()
        assert x.grad is not None and x.grad.shape == shape
    x, bias = torch.ones(0, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    ops.bias_gelu(x, bias, "gelu").sum().backward()
    assert bias.grad is not None and not bias.grad.any()
    assert ops.swiglu_packed(torch.ones(0, 6)).shape == (0, 3)


def test_refusals() -> None:
    with pytest.raises(KernelError, match="last dim must be even"):
        ops.swiglu_packed(torch.ones(2, 3))
    with pytest.raises(KernelError, match="'quick'"):
        ops.geglu(torch.ones(2), torch.ones(2), "quick")
    with pytest.raises(KernelError, match="backend 'fused'"):
        ops.gelu(torch.ones(2, dtype=torch.int32), "gelu", "fused")


@native
def test_refusals_of_the_native_ops() -> None:
    with pytest.raises(KernelError, match=r"gate \(2,\), up \(3,\)"):
        ops.swiglu(torch.ones(2), torch.ones(3))
    with pytest.raises(KernelError, match="must be x's last dim"):
        ops.bias_gelu(torch.ones(2, 3), torch.ones(2), "gelu")


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_other_backends(backend: str) -> None:
    x, bias = torch.randn(3, 8), torch.randn(8)
    torch.testing.assert_close(ops.bias_gelu(x, bias, "gelu", backend), F.gelu(x + bias))
    torch.testing.assert_close(ops.gelu(x, "gelu_tanh", backend), F.gelu(x, approximate="tanh"))
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(ops.swiglu_packed(x, backend), F.silu(gate) * up)
    torch.testing.assert_close(ops.geglu_packed(x, "gelu", backend), F.gelu(gate) * up)


def library_calls() -> list[tuple[str, Any, tuple[Any, ...]]]:
    x, bias, gate_up = (torch.randn(shape, requires_grad=True) for shape in ((3, 5, 6), (6,), (3, 5, 12)))
    return [
        ("activation", activation.activation_op, (x, None, 0)),
        ("activation with bias", activation.activation_op, (x, bias, 1)),
        ("glu", activation.glu_op, (x, torch.randn(3, 5, 6, requires_grad=True), 2)),
        ("glu_packed", activation.glu_packed_op, (gate_up, 2)),
        ("activation_backward", activation.activation_backward_op, (x.detach(), x.detach(), bias.detach(), 0)),
        ("glu_backward", activation.glu_backward_op, (x.detach(), x.detach(), x.detach(), 0)),
        ("glu_packed_backward", activation.glu_packed_backward_op, (x.detach(), gate_up.detach(), 1)),
    ]


@native
@pytest.mark.parametrize("call", library_calls(), ids=lambda call: call[0])
def test_opcheck(call: tuple[str, Any, tuple[Any, ...]]) -> None:
    torch.library.opcheck(call[1], call[2])


@native
def test_meta_tensors() -> None:
    x = torch.empty(2, 3, 8, device="meta", dtype=torch.bfloat16)
    assert ops.gelu(x, "gelu").shape == x.shape
    assert ops.swiglu_packed(x).shape == (2, 3, 4) and ops.swiglu_packed(x).dtype == torch.bfloat16


@native
@pytest.mark.slow
def test_compiled_as_one_graph() -> None:
    def run(x: Tensor, bias: Tensor) -> Tensor:
        return ops.swiglu_packed(ops.bias_gelu(x, bias, "gelu_tanh")) + ops.geglu_packed(x, "gelu")

    inputs = [torch.randn(4, 5, 16, requires_grad=True), torch.randn(16, requires_grad=True)]
    dy = torch.randn(4, 5, 8)
    found = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        y = function(*inputs)
        found.append((y, *torch.autograd.grad(y, inputs, dy)))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled)
