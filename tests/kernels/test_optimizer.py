"""Native optimizer updates beside torch's in float64, on every instruction set; cuts, threads, copies; sums of squares."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from trilith.errors import KernelError
from trilith.kernels import library
from trilith.kernels.ops.optimizer import ADAM, LION, SGD, Arrays, Update, is_native, sum_of_squares, update_arrays

pytestmark = pytest.mark.skipif(library.LIBRARY is None, reason=library.MISSING)
SETS = library.LIBRARY.instruction_sets if library.LIBRARY else ()
MODULE = import_module("trilith.kernels.ops.optimizer")
SIZES = (1, 17, 4096, 4097, 10000)
BETAS = (0.9, 0.95)


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set of this processor in turn."""
    monkeypatch.setattr(MODULE, "CPU", getattr(library.LIBRARY, request.param))
    return request.param


def values(step: int, lr: float, factor: float = 1.0) -> Tensor:
    corrections = [1 - BETAS[0] ** step, (1 - BETAS[1] ** step) ** 0.5]
    return torch.tensor([lr, factor, *corrections, step == 1], dtype=torch.float64)


def drawn(dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in SIZES]


def zeros(dtype: torch.dtype) -> list[Tensor]:
    return [torch.zeros(n, dtype=dtype) for n in SIZES]


def torchs(kind: str, weights: list[Tensor]) -> Any:
    """Torch's optimizer of the same settings as `ours`."""
    if kind == "adamw":
        return torch.optim.AdamW(weights, lr=1e-2, betas=BETAS, weight_decay=0.1, eps=1e-8)
    if kind == "adam":
        return torch.optim.Adam(weights, lr=1e-2, betas=BETAS, weight_decay=0.1, eps=1e-8)
    momentum = {"sgd": 0.0, "momentum": 0.9, "nesterov": 0.9}[kind]
    return torch.optim.SGD(weights, lr=1e-2, momentum=momentum, weight_decay=0.1, nesterov=kind == "nesterov")


def ours(kind: str, step: int, factor: float = 1.0) -> Update:
    given = values(step, 1e-2, factor)
    if kind in ("adam", "adamw"):
        return Update(ADAM, given, BETAS, 0.1, 1e-8, decoupled=kind == "adamw")
    momentum = {"sgd": 0.0, "momentum": 0.9, "nesterov": 0.9}[kind]
    return Update(SGD, given, (momentum, 0.0), 0.1, decoupled=False, nesterov=kind == "nesterov")


def num_moments(kind: str) -> int:
    return {"adam": 2, "adamw": 2, "lion": 1, "sgd": 0, "momentum": 1, "nesterov": 1}[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd", "momentum", "nesterov"])
def test_equals_torch(kind: str, dtype: torch.dtype, instruction_set: str) -> None:
    """Five steps against torch's optimizer in float64: at most twice torch's own error in the same dtype."""
    weights, moments = drawn(dtype, 0), [zeros(dtype) for _ in range(num_moments(kind))]
    plain, exact = [w.clone() for w in weights], [w.double() for w in weights]
    peers = [(x, torchs(kind, x)) for x in (plain, exact)]
    for step in range(1, 6):
        slopes = drawn(dtype, step)
        for parameters, optimizer in peers:
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter.grad = slope.to(parameter.dtype)
            optimizer.step()
        update_arrays(Arrays(weights, slopes, moments), ours(kind, step))
    for mine, other, truth in zip(weights, plain, exact, strict=True):
        floor = 8 * torch.finfo(dtype).eps * float(truth.abs().max())
        assert float((mine.double() - truth).abs().max()) <= max(2 * float((other.double() - truth).abs().max()), floor)


def test_lion(instruction_set: str) -> None:
    """Chen et al. 2023, algorithm 2, written out; a gradient of zero on a moment of zero moves nothing but by decay."""
    weights, moments, slopes = drawn(torch.float64, 0), [zeros(torch.float64)], drawn(torch.float64, 1)
    slopes[1].zero_()
    expected = []
    for w, g in zip(weights, slopes, strict=True):
        expected.append(w * (1 - 1e-2 * 0.1) - 1e-2 * torch.sign(0.1 * g))
    update_arrays(Arrays(weights, slopes, moments), Update(LION, values(1, 1e-2), BETAS, 0.1))
    for mine, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-14, atol=1e-15)
    for mine, slope in zip(moments[0], slopes, strict=True):
        torch.testing.assert_close(mine, (1 - BETAS[1]) * slope, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("moment", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("copy", [None, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_scales_copies_and_clears(
    gradient: torch.dtype, moment: torch.dtype, copy: torch.dtype | None, instruction_set: str
) -> None:
    """In one pass: the factor, the copy in fewer bits, the cleared gradient; the same as apart."""
    apart, slopes = drawn(torch.float32, 0), drawn(gradient, 1)
    together = [w.clone() for w in apart]
    moments = [[zeros(moment), zeros(moment)] for _ in range(2)]
    scaled = [s.float() * 0.25 for s in slopes]
    update_arrays(Arrays(apart, scaled, moments[0]), ours("adamw", 1))
    copies = zeros(copy) if copy else []
    update = ours("adamw", 1, factor=0.25)
    cleared = Update(ADAM, update.values, BETAS, 0.1, 1e-8, clears_gradients=True)
    update_arrays(Arrays(together, slopes, moments[1], copies), cleared)
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))
    assert all(torch.equal(a, b) for one, two in zip(*moments, strict=True) for a, b in zip(one, two, strict=True))
    assert not any(s.any() for s in slopes)
    if copy:
        assert all(torch.equal(c, w.to(copy)) for c, w in zip(copies, together, strict=True))


def trained(cuts: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Weights and moments after three steps on one array that is cut at `cuts`."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9000, generator=generator, dtype=torch.float64).to(dtype)
    moments = [torch.zeros_like(weight), torch.zeros_like(weight)]
    bounds = list(zip([0, *cuts], [*cuts, 9000], strict=True))
    for step in range(1, 4):
        slope = torch.randn(9000, generator=generator, dtype=torch.float64).to(dtype)
        parts = [[x[a:b] for a, b in bounds] for x in (weight, slope, *moments)]
        update_arrays(Arrays(parts[0], parts[1], parts[2:]), ours("adamw", step, factor=0.7))
    return [weight, *moments]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_do_not_depend_on_cut_threads_or_instruction_set(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name in SETS:
        monkeypatch.setattr(MODULE, "CPU", getattr(library.LIBRARY, name))
        for threads, cuts in ((1, []), (2, []), (3, [1, 2, 4096, 5001]), (1, list(range(7, 9000, 331)))):
            torch.set_num_threads(threads)
            found.append(trained(list(cuts), dtype))
    torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_sum_of_squares(dtype: torch.dtype, instruction_set: str) -> None:
    pieces = [x.to(dtype) for x in (*drawn(torch.float64, 3), torch.full((200_003,), 1.0 / 3, dtype=torch.float64))]
    expected = sum(float(x.double().square().sum()) for x in pieces)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(sum_of_squares(pieces))
    torch.set_num_threads(1)
    assert found[0] == found[1] == found[2]
    assert abs(found[0] / expected - 1) < 1e-12


def test_sum_of_squares_is_not_finite_where_an_element_is_not() -> None:
    for bad in (float("inf"), float("nan")):
        x = torch.ones(70_000)
        x[-1] = bad
        assert not torch.tensor(sum_of_squares([x])).isfinite()
    assert sum_of_squares([]) == 0.0 and sum_of_squares([torch.zeros(0)]) == 0.0
    assert sum_of_squares([torch.full((4,), 1e30)]) == pytest.approx(4e60)


def test_what_it_takes() -> None:
    one = [torch.zeros(3)]
    assert is_native(Arrays(one, one, [one, one]))
    assert not is_native(Arrays(one, one, [one, one]), "torch")
    assert not is_native(Arrays(one, [torch.zeros(3, dtype=torch.float64)], [one, one]))
    assert not is_native(Arrays(one, [torch.zeros(6)[::2]], [one, one]))
    with pytest.raises(KernelError, match=r"backend 'fused': weights are torch\.float32, gradients torch\.float64"):
        is_native(Arrays(one, [torch.zeros(3, dtype=torch.float64)], [one, one]), "fused")
    with pytest.raises(KernelError, match="must be parallel"):
        update_arrays(Arrays(one, [torch.zeros(4)], [one, one]), ours("adamw", 1))
