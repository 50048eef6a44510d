"""The native random stream and dropout: the same bits as torch's version, on every instruction set and thread count.

tests/unit/test_stream.py holds both to the specification.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.native import SETS, native, use
from tests.kernels.test_ops import DTYPES, KEY, Op, check_accuracy, draw, evaluate
from trilith.errors import KernelError
from trilith.kernels import ops, reference, stream
from trilith.sharding import Box, whole

dropout = importlib.import_module("trilith.kernels.ops.dropout")  # `ops.dropout` is the function
pytestmark = native


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads may be changed within."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normal_numbers(instruction_set: str, dtype: torch.dtype, threads: None) -> None:
    """Whole tensors and boxes, also with thin rows and with starts that differ mod 4."""
    shapes = (
        ((70_001,), Box((3,), (70_000,))),
        ((301, 203), Box((1, 2), (301, 201))),
        ((40, 9), Box((0, 8), (40, 9))),
        ((5, 7, 11), Box((1, 2, 3), (4, 7, 9))),
        ((1 << 20, 1 << 20), Box(((1 << 20) - 2, 5), (1 << 20, 29))),
    )
    for shape, box in shapes:
        for count in (1, 2):
            torch.set_num_threads(count)
            ours, theirs = (
                stream.fill_box(KEY, shape, box, "normal", 0.02, dtype, "cpu", backend)
                for backend in ("fused", "torch")
            )
            assert torch.equal(ours, theirs)


def test_masks(instruction_set: str, threads: None) -> None:
    samples, positions = torch.tensor([5, 2**32 + 1, 2**47]), torch.arange(40) * 7
    for count in (1, 2):
        torch.set_num_threads(count)
        for lo, hi in ((0, 1), (3, 2061), (1024, 3072), (7, 1031), (9, 9)):
            ours, theirs = (
                stream.dropout_keep(KEY, samples, positions, (lo, hi), 0.3, backend) for backend in ("fused", "torch")
            )
            assert torch.equal(ours, theirs)
        ours, theirs = (
            stream.attention_keep(KEY, samples, (5, 9), positions, (3, 1100), 0.3, backend)
            for backend in ("fused", "torch")
        )
        assert torch.equal(ours, theirs)


def test_refusals_of_the_stream() -> None:
    samples, positions = torch.arange(2), torch.arange(3)
    with pytest.raises(KernelError, match="sample_ids"):
        stream.dropout_keep(KEY, samples.int(), positions, (0, 8), 0.1)
    with pytest.raises(KernelError, match="positions"):
        stream.dropout_keep(KEY, samples, positions.expand(3, 3), (0, 8), 0.1)
    with pytest.raises(KernelError, match=r"must be \(Q,\)"):
        stream.attention_keep(KEY, samples, (0, 1), positions.expand(2, 3), (0, 8), 0.1)
    with pytest.raises(KernelError, match="must be on the CPU"):
        stream.fill_box(KEY, (4,), whole((4,)), "normal", 1.0, torch.float32, "meta", "fused")


# --- dropout ------------------------------------------------------------------------------------------------------------

P = 0.3


def places(x: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Sample ids beyond 32 bits, a position of its own for each token, features that begin within a block of eight."""
    samples = torch.arange(x.shape[0]) + 2**32 - 1
    positions = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2]).flip(1)
    return samples, positions, (3, 3 + x.shape[2])


def ours(x: Tensor, residual: Tensor, *bias: Tensor) -> Tensor:
    return ops.dropout_add(x, residual, P, KEY, *places(x), *bias, backend="fused")


def truth(x: Tensor, residual: Tensor, *bias: Tensor) -> Tensor:
    return residual + reference.dropout(sum(bias, x), P, KEY, *places(x))


def plain(x: Tensor, residual: Tensor, *bias: Tensor) -> Tensor:
    keep = stream.dropout_keep(KEY, *places(x), P, "torch")
    return residual + sum(bias, x) * keep * stream.keep_scale(P)


SHAPES = ((3, 5, 7), (2, 9, 130), (1, 3, 1031), (4, 40, 64))
CASES = (
    Op("dropout_add", ours, truth, plain, tuple((s, s) for s in SHAPES)),
    Op("dropout_add with bias", ours, truth, plain, tuple((s, s, s[-1:]) for s in SHAPES)),
)
BY_NAME = pytest.mark.parametrize("op", CASES, ids=lambda op: op.name)


@BY_NAME
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_add(op: Op, dtype: torch.dtype, instruction_set: str) -> None:
    for shapes in op.shapes:
        check_accuracy(op, draw(op, shapes, dtype, "cpu"))


@BY_NAME
def test_gradients_of_gradients(op: Op) -> None:
    leaves = [x.requires_grad_() for x in draw(op, op.shapes[0], torch.float64, "cpu")]
    assert torch.autograd.gradcheck(op.ours, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(op.ours, leaves, fast_mode=True)


@pytest.mark.parametrize("op", [CASES[1]], ids=["bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sets_and_threads_do_not_matter(
    op: Op, dtype: torch.dtype, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout is the same bits everywhere; nothing in it is fused."""
    inputs, found = draw(op, ((5, 60, 100), (5, 60, 100), (100,)), dtype, "cpu"), []
    for name in SETS:
        use(name, monkeypatch)
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(evaluate(op.ours, inputs, 0))
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_nothing_but_indices_is_kept() -> None:
    x, residual = (torch.randn(2, 5, 64, requires_grad=True) for _ in range(2))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        ours(x, residual)
    assert all(t.dtype == torch.int64 for t in kept)


def test_what_is_not_finite_stays_so() -> None:
    """As torch, which multiplies by zero or the scale."""
    x = torch.full((1, 2, 64), float("inf"))
    y = ops.dropout(x, P, KEY, *places(x))
    keep = stream.dropout_keep(KEY, *places(x), P)
    assert y[keep].isinf().all() and y[~keep].isnan().all()


def test_large_results_are_written_past_the_caches() -> None:
    x = torch.randn(2, 2100, 1024)
    samples, positions = torch.arange(2), torch.arange(2100)
    for width in (1024, 1021):
        part = x[..., :width].contiguous()
        y = ops.dropout(part, P, KEY, samples, positions, (0, width))
        assert torch.equal(y, ops.dropout(part, P, KEY, samples, positions, (0, width), backend="torch"))


def test_empty_and_off() -> None:
    samples, positions = torch.arange(2), torch.arange(3)
    x = torch.randn(2, 3, 8)
    assert torch.equal(ops.dropout_add(x, x, 0.0, KEY, samples, positions, (0, 8)), x + x)
    assert torch.equal(
        ops.dropout_add(x, x, P, KEY, samples, positions, (0, 8), bias=x[0, 0], training=False), x + (x + x[0, 0])
    )
    assert ops.dropout(x[:0], P, KEY, samples[:0], positions, (0, 8)).shape == (0, 3, 8)
    assert ops.dropout(x[..., :0], P, KEY, samples, positions, (4, 4)).shape == (2, 3, 0)


def test_refusals() -> None:
    x, samples, positions = torch.randn(2, 3, 8), torch.arange(2), torch.arange(3)
    for arguments in ((samples, positions, (0, 7)), (samples[:1], positions, (0, 8)), (samples, positions[:2], (0, 8))):
        with pytest.raises(KernelError, match=r"must be \(B, S, F\)"):
            ops.dropout(x, P, KEY, *arguments)
    with pytest.raises(KernelError, match="must be int64"):
        ops.dropout(x, P, KEY, samples.int(), positions, (0, 8))
    with pytest.raises(KernelError, match=r"residual \(2, 3, 4\)"):
        ops.dropout_add(x, x[..., :4], P, KEY, samples, positions, (0, 8))
    with pytest.raises(KernelError, match=r"bias \(2, 3, 8\)"):
        ops.dropout_add(x, x, P, KEY, samples, positions, (0, 8), bias=x)
    with pytest.raises(KernelError, match="backend 'fused'"):
        ops.dropout(x.int(), P, KEY, samples, positions, (0, 8), backend="fused")


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_other_backends(backend: str) -> None:
    x, residual, bias = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(8)
    arguments = (P, KEY, torch.arange(2), torch.arange(3), (5, 13), bias)
    torch.testing.assert_close(
        ops.dropout_add(x, residual, *arguments, backend=backend), ops.dropout_add(x, residual, *arguments)
    )


def library_call() -> tuple[Any, ...]:
    x, residual, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 8), (2, 3, 8), (8,)))
    return x, bias, residual, torch.arange(2), torch.arange(3), 5, *KEY, stream.threshold(P)


def test_opcheck_and_meta() -> None:
    torch.library.opcheck(dropout.dropout_op, library_call())
    x, _, residual, samples, positions, *rest = library_call()
    torch.library.opcheck(dropout.dropout_op, (x, None, None, samples, positions, *rest))
    meta = [t.to("meta") for t in (x, residual, samples, positions)]
    y = ops.dropout_add(*meta[:2], P, KEY, *meta[2:], (0, 8))
    assert y.shape == x.shape and y.is_meta


@pytest.mark.slow
def test_compiled_as_one_graph() -> None:
    x, bias, residual, samples, positions, *_ = library_call()

    def run(x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
        return ops.dropout_add(x, residual, P, KEY, samples, positions, (5, 13), bias)

    dy, found = torch.randn(x.shape), []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        y = function(x, residual, bias)
        found.append((y, *torch.autograd.grad(y, (x, residual, bias), dy)))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled)
