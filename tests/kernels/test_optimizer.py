"""The optimizers' one pass and the sum of squares: beside torch's and float64, on every instruction set, however cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.native import SETS, native, use
from trilith.errors import KernelError
from trilith.kernels.ops import optimizer
from trilith.kernels.ops.optimizer import Slices

pytestmark = native
BETAS, EPS, DECAY, LR = (0.9, 0.999), 1e-8, 0.1, 1e-2
KINDS = ("adamw", "adam", "lion", "sgd", "nesterov", "plain sgd")
NUM_STATES = {"adamw": 2, "adam": 2, "lion": 1, "sgd": 1, "nesterov": 1, "plain sgd": 0}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Shard:
    """Everything a step reads and writes; lists hold one tensor for each slice."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    states: list[list[Tensor]]
    weights: list[Tensor] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        return [*self.parameters, *self.gradients, *(t for state in self.states for t in state), *self.weights]


def draw(size: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def make(kind: str, sizes: tuple[int, ...], master: torch.dtype, **dtypes: torch.dtype) -> Shard:
    """A shard with zero states; `dtypes`: of gradient, state and weight, where not the master's (weight: none)."""
    parameters = [draw(size, 7 + i).float().to(master) for i, size in enumerate(sizes)]
    gradients = [torch.zeros(size, dtype=dtypes.get("gradient", master)) for size in sizes]
    states = [[torch.zeros(n, dtype=dtypes.get("state", master)) for n in sizes] for _ in range(NUM_STATES[kind])]
    weights = [torch.zeros(size, dtype=dtypes["weight"]) for size in sizes] if "weight" in dtypes else []
    return Shard(parameters, gradients, states, weights)


def fill(shard: Shard, step: int, scale: float = 1.0) -> None:
    for i, gradient in enumerate(shard.gradients):
        gradient.copy_(draw(gradient.numel(), 1000 * step + i, scale).float())


def update(kind: str, shard: Shard, step: int, scale: float = 1.0, **more: Any) -> None:
    """One step, every slice with its own multipliers where there are several."""
    multipliers = torch.tensor([[1.0 / (i + 1), 1.0 - i] for i in range(len(shard.parameters))], dtype=torch.float64)
    slices = Slices(shard.parameters, shard.gradients, shard.states, shard.weights, multipliers)
    betas = BETAS if kind in ("adam", "adamw") else None
    now = optimizer.step_values(LR, grad_scale=scale, step=step, betas=betas)
    if betas:
        optimizer.adam(slices, now, *BETAS, EPS, DECAY, kind == "adamw", **more)
    elif kind == "lion":
        optimizer.lion(slices, now, *BETAS, DECAY, **more)
    else:
        momentum = 0.0 if kind == "plain sgd" else 0.9
        dampening = 0.2 if kind == "sgd" else 0.0
        optimizer.sgd(slices, now, momentum, dampening, DECAY, kind == "nesterov", **more)


def torch_update(kind: str, shard: Shard, step: int) -> None:
    """What torch does with one slice in the master's dtype."""
    p, g = shard.parameters, shard.gradients
    states, steps = shard.states, [torch.tensor(float(step))] * len(p)
    common: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "maximize": False, "grad_scale": None, "found_inf": None}
    if kind in ("adam", "adamw"):
        fused = torch._fused_adamw_ if kind == "adamw" else torch._fused_adam_
        fused(p, g, *states, [], steps, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, amsgrad=False, **common)
    elif kind == "lion":
        direction = torch.lerp(states[0][0], g[0], 1 - BETAS[0]).sign_()
        p[0].mul_(1 - LR * DECAY).add_(direction, alpha=-LR)
        states[0][0].lerp_(g[0], 1 - BETAS[1])
    else:
        is_plain = kind == "plain sgd"
        momentum, dampening = 0.0 if is_plain else 0.9, 0.2 if kind == "sgd" else 0.0
        more = {"momentum": momentum, "dampening": dampening, "nesterov": kind == "nesterov"}
        torch._fused_sgd_(p, g, [] if is_plain else states[0], is_first_step=step == 1, **more, **common)


def bits(shard: Shard) -> list[Tensor]:
    return [tensor.view(BITS[tensor.element_size()]).clone() for tensor in shard.tensors()]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- accuracy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 1000, 4099])
@pytest.mark.parametrize("scale", [1.0, 1e-7, 3e4])
@pytest.mark.parametrize("kind", KINDS)
def test_error_beside_torchs(kind: str, scale: float, size: int, instruction_set: str) -> None:
    for dtype, steps in ((torch.float32, 25), (torch.float64, 5)):
        shards = [make(kind, (size,), d) for d in (dtype, dtype, torch.float64)]
        for step in range(1, steps + 1):
            for shard in shards:
                fill(shard, step, scale)
            update(kind, shards[0], step)
            torch_update(kind, shards[1], step)
            update(kind, shards[2], step, backend="reference")
        truth = shards[2].tensors()
        for ours, theirs, true in zip(shards[0].tensors(), shards[1].tensors(), truth, strict=True):
            own, other = ((t.double() - true).abs().max() for t in (ours, theirs))
            unit = torch.finfo(dtype).eps * true.abs().max()
            units = 1 if dtype == torch.float32 and size > 100 else 8  # the luck of few; the truth's own roundings
            assert own <= 2 * other + units * unit, (kind, dtype, float(own / unit), float(other / unit))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_goes_where_torch_lets_it(kind: str, instruction_set: str) -> None:
    ours, theirs = make(kind, (40,), torch.float32), make(kind, (40,), torch.float32)
    for step in range(1, 4):
        for shard in (ours, theirs):
            fill(shard, step)
            if step == 1:
                shard.gradients[0][:6] = torch.tensor([math.inf, -math.inf, math.nan, 1e30, 0.0, -0.0])
                shard.parameters[0][33:35] = torch.tensor([math.inf, math.nan])
        update(kind, ours, step)
        torch_update(kind, theirs, step)
    for a, b in zip(ours.tensors(), theirs.tensors(), strict=True):
        if kind != "lion":  # whose sign of NaN is 0 in torch
            assert torch.equal(a.isfinite(), b.isfinite())
        assert torch.allclose(a[6:33], b[6:33], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gradient", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_formats(kind: str, weight: torch.dtype, gradient: torch.dtype, instruction_set: str) -> None:
    for master, limit in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        ours, truth = (make(kind, (333, 20), d, gradient=gradient, weight=weight) for d in (master, torch.float64))
        for step in range(1, 4):
            for shard, backend in ((ours, "auto"), (truth, "reference")):
                fill(shard, step, 64.0)
                before = [g.clone() for g in shard.gradients]
                update(kind, shard, step, scale=64.0, zeroes_gradients=step == 3, backend=backend)
                for gradient_now, old in zip(shard.gradients, before, strict=True):
                    assert torch.equal(gradient_now, torch.zeros_like(old) if step == 3 else old)
            for p, copy in zip(ours.parameters, ours.weights, strict=True):
                assert torch.equal(p.to(weight), copy)
        for p, expected in zip(ours.parameters, truth.parameters, strict=True):
            assert (p.double() - expected).abs().max() < limit


@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd"])
def test_moments_in_bf16_are_right_on_average(kind: str) -> None:
    short, long = (make(kind, (20000,), torch.float32, state=d) for d in (torch.bfloat16, torch.float32))
    for step in range(1, 200):
        for shard in (short, long):
            fill(shard, step, 3.0 if step < 20 else 0.1)  # the second moment must be able to fall
            update(kind, shard, step)
    for state, exact in zip(short.states, long.states, strict=True):
        error = (state[0].double() - exact[0].double()) / exact[0].double().abs().mean()
        assert abs(float(error.mean())) < 2e-3
        assert float(error.abs().mean()) < 5e-2


def test_moments_in_bf16_keep_infinity() -> None:
    shard = make("adamw", (40,), torch.float32, state=torch.bfloat16)
    shard.gradients[0][:2] = torch.tensor([math.inf, math.nan])
    update("adamw", shard, 1)
    first, second = (state[0] for state in shard.states)
    assert first[0] == math.inf and second[0] == math.inf and bool(first[1].isnan()) and bool(second[1].isnan())


# --- the same bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_processor_threads_or_cut(
    kind: str, state: torch.dtype, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    size, found = 70001, []
    for name in SETS:
        use(name, monkeypatch)
        for count, cuts in ((1, (0, size)), (2, (0, size)), (2, (0, 1, 18, 40003, 40003, size))):
            threads(count)
            whole = make(kind, (size,), torch.float32, state=state, gradient=torch.bfloat16, weight=torch.float16)
            views = [slice(a, b) for a, b in pairwise(cuts)]
            for step in (1, 2):
                fill(whole, step)
                for at in views:  # one call each, so that all have the same multipliers
                    part = Shard(
                        [whole.parameters[0][at]],
                        [whole.gradients[0][at]],
                        [[s[0][at]] for s in whole.states],
                        [whole.weights[0][at]],
                    )
                    update(kind, part, step, scale=3.0)
            found.append(bits(whole))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_slices_of_one_call_are_those_of_many() -> None:
    sizes = (5, 0, 70000, 16, 3)
    together, alone = make("adamw", sizes, torch.float32), make("adamw", sizes, torch.float32)
    fill(together, 1)
    fill(alone, 1)
    multipliers = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.5, 2.0], [3.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    step = optimizer.step_values(LR, step=1, betas=BETAS)
    slices = Slices(together.parameters, together.gradients, together.states, [], multipliers)
    optimizer.adam(slices, step, *BETAS, EPS, DECAY)
    for i in range(len(sizes)):
        p, g, *states = [[x[i]] for x in (alone.parameters, alone.gradients, *alone.states)]
        optimizer.adam(Slices(p, g, states, [], multipliers[i : i + 1]), step, *BETAS, EPS, DECAY)
    assert all(torch.equal(a, b) for a, b in zip(bits(together), bits(alone), strict=True))


def test_memory_is_looked_up_at_every_step() -> None:
    shard, other = make("adamw", (100,), torch.float32), make("adamw", (100,), torch.float32)
    for step in (1, 2):
        for one in (shard, other):
            fill(one, step)
            update("adamw", one, step)
        kept = [t.clone() for t in shard.tensors()]
        for t in shard.tensors():  # as states on disk come and go
            t.untyped_storage().resize_(0)
        blocker = [torch.full((100,), 9.0) for _ in range(8)]
        for t, value in zip(shard.tensors(), kept, strict=True):
            t.untyped_storage().resize_(t.numel() * t.element_size())
            t.copy_(value)
        assert all(bool((b == 9.0).all()) for b in blocker)
    assert torch.equal(shard.parameters[0], other.parameters[0])


def test_autograd_sees_the_change() -> None:
    shard = make("sgd", (100,), torch.float32, weight=torch.bfloat16)
    before = [t._version for t in shard.tensors()]
    update("sgd", shard, 1)
    after = [t._version for t in shard.tensors()]
    assert [a > b for a, b in zip(after, before, strict=True)] == [True, False, True, True]
    update("sgd", shard, 2, zeroes_gradients=True)
    assert shard.gradients[0]._version > after[1]


# --- sum of squares -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sum_of_squares(dtype: torch.dtype, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    flat = draw(200_000, 3).to(dtype)
    tensors = [flat[:1], flat[1:1], flat[1:70], flat[70:]]
    exact = math.fsum(x * x for x in flat.double().tolist())
    found = set()
    for name in SETS:
        use(name, monkeypatch)
        for count in (1, 2):
            threads(count)
            found.add(float(optimizer.sum_of_squares(tensors)))
    assert len(found) == 1
    assert found.pop() == pytest.approx(exact, rel=1e-14)
    assert float(optimizer.sum_of_squares([])) == 0.0 == float(optimizer.sum_of_squares([flat[:0]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_sum_of_squares_is_finite_if_its_tensors_are(dtype: torch.dtype, value: float, instruction_set: str) -> None:
    big = torch.full((1000,), 1e30, dtype=dtype)
    assert math.isfinite(float(optimizer.sum_of_squares([big])))
    for at in (0, 63, 640, 999):
        broken = big.clone()
        broken[at] = value
        assert not math.isfinite(float(optimizer.sum_of_squares([big, broken])))


# --- what is refused, and torch's forms ---------------------------------------------------------------------------------


def test_refusals() -> None:
    def stepped(**changes: Any) -> None:
        shard = make("adamw", (8, 8), torch.float32)
        for name, value in changes.items():
            setattr(shard, name, value)
        update("adamw", shard, 1)

    eights = [torch.zeros(8), torch.zeros(8)]
    with pytest.raises(KernelError, match="must be contiguous"):
        stepped(gradients=[torch.zeros(16)[::2], torch.zeros(8)])
    with pytest.raises(KernelError, match="as large as their parameters"):
        stepped(gradients=[torch.zeros(8), torch.zeros(9)])
    with pytest.raises(KernelError, match="of one length"):
        stepped(states=[eights, eights[:1]])
    with pytest.raises(KernelError, match="must be fp32 or fp64"):
        stepped(parameters=[t.bfloat16() for t in eights])
    with pytest.raises(KernelError, match="bf16 beside fp32"):
        stepped(states=[eights, [t.double() for t in eights]])
    with pytest.raises(KernelError, match="multipliers"):
        optimizer.lion(Slices(eights, eights, [eights], [], torch.ones(2)), optimizer.step_values(LR), *BETAS, DECAY)
    with pytest.raises(KernelError, match="step"):
        optimizer.lion(Slices(eights, eights, [eights], [], torch.ones(2, 2).double()), torch.ones(6), *BETAS, DECAY)
    assert not optimizer.is_native(eights[0], eights[0], backend="torch")
    with pytest.raises(KernelError, match="fused"):
        optimizer.is_native(eights[0].half(), eights[0], backend="fused")


def library_arguments(kind: str) -> tuple[Any, ...]:
    shard = make(kind, (33, 4), torch.float32, gradient=torch.bfloat16, weight=torch.bfloat16)
    fill(shard, 1)
    multipliers, step = torch.ones(2, 2, dtype=torch.float64), optimizer.step_values(LR, step=1, betas=BETAS)
    return (shard.parameters, shard.gradients, *shard.states, shard.weights, multipliers, step)


def from_lists(p: list[Tensor], g: list[Tensor], *rest: Any) -> tuple[Slices, Tensor]:
    *states, weights, multipliers, step = rest
    return Slices(p, g, states, weights, multipliers), step


def test_opcheck() -> None:
    torch.library.opcheck(optimizer.adam_op, (*library_arguments("adamw"), *BETAS, EPS, DECAY, True, False))
    torch.library.opcheck(optimizer.lion_op, (*library_arguments("lion"), *BETAS, DECAY, True))
    torch.library.opcheck(optimizer.sgd_op, (*library_arguments("sgd"), 0.9, 0.0, DECAY, True, False))
    torch.library.opcheck(optimizer.sum_of_squares_op, ([torch.randn(9), torch.randn(3)],))


def test_meta() -> None:
    on_meta = [[t.to("meta") for t in x] if isinstance(x, list) else x.to("meta") for x in library_arguments("adamw")]
    optimizer.adam(*from_lists(*on_meta), *BETAS, EPS, DECAY)
    assert optimizer.sum_of_squares([torch.empty(3, device="meta")]).shape == ()


@pytest.mark.slow
def test_compiled_as_one_graph() -> None:
    def step(*arguments: Any) -> Tensor:
        optimizer.adam(*from_lists(*arguments), *BETAS, EPS, DECAY)
        return optimizer.sum_of_squares(arguments[0])

    plain, compiled = library_arguments("adamw"), library_arguments("adamw")
    total = step(*plain)
    assert torch.equal(total, torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled))
    for ours, theirs in zip(plain[:5], compiled[:5], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
