"""Optimizers over flat slices against plain textbook versions; the norm; clipping; parameter groups."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trilith.config import load_config, resolve
from trilith.kernels import library
from trilith.optim import base
from trilith.optim.adagrad import Adagrad, AdagradOptions
from trilith.optim.adamw import Adam, AdamOptions
from trilith.optim.base import FlatPartition, Optimizer
from trilith.optim.clip import clip_factor, sum_of_squares
from trilith.optim.groups import Segment, multipliers
from trilith.optim.lion import Lion, LionOptions
from trilith.optim.make import make_optimizer
from trilith.optim.sgd import SGD, SGDOptions

GROUPS = ((1.0, 1.0), (0.5, 0.0))


def partitions(dtype: torch.dtype, grad_dtype: torch.dtype | None = None, sizes: tuple[int, ...] = (40, 7)) -> Any:
    """One partition per size, its first half in group (1, 1), its second in (0.5, 0)."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for i, size in enumerate(sizes):
        parameter = torch.randn(size, dtype=dtype, generator=generator)
        gradient = torch.zeros(size, dtype=grad_dtype or dtype)
        segments = (Segment(0, size // 2, GROUPS[0]), Segment(size // 2, size, GROUPS[1]))
        made.append(FlatPartition(f"unit{i}", parameter, gradient, segments))
    return made


def fill_gradients(parts: list[FlatPartition], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for part in parts:
        part.gradient.copy_(torch.randn(part.gradient.shape, dtype=torch.float64, generator=generator))


def plain_adam(p: Tensor, g: Tensor, state: dict[str, Tensor], t: int, lr: float, decay: float, o: AdamOptions) -> None:
    """Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2."""
    if o.decoupled_decay:
        p -= lr * decay * p
    else:
        g = g + decay * p
    b1, b2 = o.betas
    m, v = state.setdefault("m", torch.zeros_like(p)), state.setdefault("v", torch.zeros_like(p))
    m.mul_(b1).add_((1 - b1) * g)
    v.mul_(b2).add_((1 - b2) * g * g)
    c1, c2 = (1 - b1**t, 1 - b2**t) if o.bias_correction else (1.0, 1.0)
    p -= lr * (m / c1) / ((v / c2).sqrt() + o.eps)


def plain_sgd(p: Tensor, g: Tensor, state: dict[str, Tensor], t: int, lr: float, decay: float, o: SGDOptions) -> None:
    g = g + decay * p
    if o.momentum:
        state["b"] = g.clone() if t == 1 else o.momentum * state["b"] + (1 - o.dampening) * g
        g = g + o.momentum * state["b"] if o.nesterov else state["b"]
    p -= lr * g


def plain_lion(p: Tensor, g: Tensor, state: dict[str, Tensor], t: int, lr: float, decay: float, o: LionOptions) -> None:
    """Chen et al. 2023, algorithm 2."""
    m = state.setdefault("m", torch.zeros_like(p))
    direction = (o.betas[0] * m + (1 - o.betas[0]) * g).sign()
    p -= lr * (direction + decay * p)
    m.mul_(o.betas[1]).add_((1 - o.betas[1]) * g)


def plain_adagrad(p: Tensor, g: Tensor, state: dict[str, Tensor], t: int, lr: float, decay: float, o: Any) -> None:
    """torch.optim.Adagrad's formula."""
    g = g + decay * p
    total = state.setdefault("sum", torch.full_like(p, o.initial_accumulator_value))
    total += g * g
    p -= lr / (1 + (t - 1) * o.lr_decay) * g / (total.sqrt() + o.eps)


def run(optimizer: Optimizer, parts: list[FlatPartition], plain: Any, options: Any, scale: float) -> float:
    """The largest difference between the optimizer and the plain version after four steps."""
    expected = [part.parameter.double().clone() for part in parts]
    states: list[dict[tuple[float, ...], dict[str, Tensor]]] = [{} for _ in parts]
    for step in range(4):
        fill_gradients(parts, step)
        lr = 0.1 / (step + 1)
        for part, target, state in zip(parts, expected, states, strict=True):
            for s in part.segments:
                mine = slice(s.start, s.stop)
                gradient = part.gradient[mine].double() / scale
                lr_mult, decay_mult = s.group
                group_state = state.setdefault(s.group, {})
                decay = options.weight_decay * decay_mult
                plain(target[mine], gradient, group_state, step + 1, lr * lr_mult, decay, options)
        optimizer.step(lr, scale)
    return max(float((p.parameter.double() - e).abs().max()) for p, e in zip(parts, expected, strict=True))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("scale", [1.0, 3.7])
@pytest.mark.parametrize("correction", [True, False])
@pytest.mark.parametrize("decoupled", [True, False])
def test_adam(decoupled: bool, correction: bool, scale: float, backend: str) -> None:
    options = AdamOptions((0.8, 0.95), 1e-6, 0.3, decoupled, correction)
    for dtype, grad_dtype, limit in (
        (torch.float64, torch.float64, 1e-14),
        (torch.float32, torch.float32, 2e-6),
        (torch.float32, torch.bfloat16, 2e-6),
    ):
        parts = partitions(dtype, grad_dtype)
        assert run(Adam(parts, options, backend), parts, plain_adam, options, scale) < limit


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("scale", [1.0, 3.7])
@pytest.mark.parametrize(
    "options",
    [
        SGDOptions(weight_decay=0.1),
        SGDOptions(momentum=0.9, weight_decay=0.1),
        SGDOptions(momentum=0.9, dampening=0.3),
        SGDOptions(momentum=0.9, nesterov=True, weight_decay=0.1),
    ],
)
def test_sgd(options: SGDOptions, scale: float, backend: str) -> None:
    for dtype, limit in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
        parts = partitions(dtype)
        optimizer = SGD(parts, options, backend)
        assert run(optimizer, parts, plain_sgd, options, scale) < limit
        assert optimizer.state_roles == (("momentum_buffer",) if options.momentum else ())


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("scale", [1.0, 3.7])
@pytest.mark.parametrize("batch_numel", [1, 30, 1 << 24])
def test_lion_and_adagrad(batch_numel: int, scale: float, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "BATCH_NUMEL", batch_numel)
    lion = LionOptions((0.8, 0.95), 0.3)
    adagrad = AdagradOptions(eps=1e-6, weight_decay=0.3, lr_decay=0.1, initial_accumulator_value=0.2)
    for dtype, grad_dtype, limit in (
        (torch.float64, torch.float64, 1e-14),
        (torch.float32, torch.float32, 2e-6),
        (torch.float32, torch.bfloat16, 2e-6),
    ):
        parts = partitions(dtype, grad_dtype)
        assert run(Lion(parts, lion, backend), parts, plain_lion, lion, scale) < limit
        parts = partitions(dtype, grad_dtype)
        assert run(Adagrad(parts, adagrad), parts, plain_adagrad, adagrad, scale) < limit


def test_adagrad_is_torchs() -> None:
    parts = partitions(torch.float64, sizes=(9,))
    theirs = torch.nn.Parameter(parts[0].parameter.clone())
    plain = torch.optim.Adagrad([theirs], lr=0.1, lr_decay=0.2, initial_accumulator_value=0.3, eps=1e-7)
    ours = Adagrad(parts, AdagradOptions(1e-7, 0.0, 0.2, 0.3))
    parts[0] = FlatPartition("u", parts[0].parameter, parts[0].gradient, (Segment(0, 9, GROUPS[0]),))
    ours.rebind(parts)
    for step in range(5):
        fill_gradients(parts, step)
        theirs.grad = parts[0].gradient.clone()
        ours.step(0.1)
        plain.step()
    assert torch.allclose(parts[0].parameter, theirs, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", [Adam, SGD, Lion, Adagrad])
def test_gradients_change_only_where_there_is_a_scale(kind: Any) -> None:
    options = {Adam: AdamOptions(), SGD: SGDOptions(0.9), Lion: LionOptions(), Adagrad: AdagradOptions(1e-8, 0.1)}
    parts = partitions(torch.float32)
    fill_gradients(parts, 0)
    before = [part.gradient.clone() for part in parts]
    kind(parts, options[kind]).step(0.1)
    assert all(torch.equal(part.gradient, old) for part, old in zip(parts, before, strict=True))


@pytest.mark.parametrize("kind", [Adam, SGD, Lion, Adagrad])
def test_weights_are_rounded_on_the_way_where_that_is_native(kind: Any) -> None:
    options = {Adam: AdamOptions(), SGD: SGDOptions(0.9), Lion: LionOptions(), Adagrad: AdagradOptions()}[kind]
    parts = [replace(p, weight=torch.zeros(p.parameter.shape, dtype=torch.bfloat16)) for p in partitions(torch.float32)]
    fill_gradients(parts, 0)
    optimizer, is_native = kind(parts, options), kind is not Adagrad and library.CPU is not None
    assert optimizer.step_parts((1,), 0.1) == is_native
    assert parts[0].weight is not None and not parts[0].weight.any()
    if is_native:
        assert parts[1].weight is not None and torch.equal(parts[1].weight, parts[1].parameter.bfloat16())
        optimizer.rebind([parts[0], replace(parts[1], weight=None)])
        assert not optimizer.step_parts((0, 1), 0.1)  # all or nothing
        assert not parts[0].weight.any()


def test_the_same_steps_give_the_same_bits() -> None:
    results = []
    for _ in range(2):
        parts = partitions(torch.float32, sizes=(1000, 33))
        optimizer = Adam(parts, AdamOptions(weight_decay=0.1))
        for step in range(3):
            fill_gradients(parts, step)
            optimizer.step(1e-2, 1.5)
        results.append(torch.cat([part.parameter for part in parts]))
    assert torch.equal(results[0], results[1])


def test_continuing_from_saved_state_gives_the_same_bits() -> None:
    options = AdamOptions(weight_decay=0.1)
    straight = partitions(torch.float32)
    optimizer = Adam(straight, options)
    for step in range(4):
        fill_gradients(straight, step)
        optimizer.step(1e-2)
        if step == 1:
            saved = [part.parameter.clone() for part in straight]
            moments = [{role: t.clone() for role, t in state.items()} for state in optimizer.state]
            scalars = optimizer.state_dict()
    resumed = partitions(torch.float32)
    again = Adam(resumed, options)
    for part, value, state, kept in zip(resumed, saved, again.state, moments, strict=True):
        part.parameter.copy_(value)
        for role in state:
            state[role].copy_(kept[role])
    again.load_state_dict(scalars)
    for step in (2, 3):
        fill_gradients(resumed, step)
        again.step(1e-2)
    for a, b in zip(straight, resumed, strict=True):
        assert torch.equal(a.parameter, b.parameter)


def test_make_optimizer_says_which_decay_is_meant() -> None:
    def made(section: dict[str, Any]) -> Optimizer:
        config = resolve(load_config({"train_batch_size": 1, "optimizer": section}), 1, needs="engine").config
        return make_optimizer(config.optimizer)(partitions(torch.float32))

    params = {"lr": 1e-3, "weight_decay": 0.1, "betas": [0.9, 0.95]}
    adamw, adam = made({"type": "AdamW", "params": params}), made({"type": "Adam", "params": params})
    l2 = made({"type": "Adam", "params": {**params, "adam_w_mode": False}})
    assert isinstance(adamw, Adam) and isinstance(adam, Adam) and isinstance(l2, Adam)
    assert adamw.options == adam.options and adam.options.decoupled_decay
    assert l2.options == AdamOptions((0.9, 0.95), 1e-8, 0.1, False, True)
    sgd = made({"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.9, "nesterov": True}})
    assert isinstance(sgd, SGD) and sgd.options == SGDOptions(0.9, 0.0, True, 0.0)
    lion = made({"type": "lion", "params": {"lr": "auto", "weight_decay": 0.1}})
    assert isinstance(lion, Lion) and lion.options == LionOptions((0.9, 0.99), 0.1)
    adagrad = made({"type": "ADAGRAD", "params": {"lr": 1e-2, "eps": 1e-8, "lr_decay": 0.5}})
    assert isinstance(adagrad, Adagrad) and adagrad.options == AdagradOptions(1e-8, 0.0, 0.5, 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sum_of_squares_is_exact_and_counts_only_the_ranges(dtype: torch.dtype) -> None:
    tensor = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    ranges = [(0, 7), (100, 3300), (3300, 3301), (4000, 5000)]
    expected = sum(float(tensor[lo:hi].double().square().sum()) for lo, hi in ranges)
    found = float(sum_of_squares(tensor, ranges))
    assert found == pytest.approx(expected, rel=1e-14 if dtype == torch.float64 else 1e-6)
    assert float(sum_of_squares(tensor, [])) == 0.0


def test_a_long_sum_keeps_its_digits() -> None:
    tensor = torch.full((1 << 20,), 0.1)
    exact = tensor.numel() * float(tensor[0]) ** 2
    assert float(sum_of_squares(tensor, [(0, tensor.numel())])) == pytest.approx(exact, rel=1e-6)
    # What this avoids: summed in one go, the error grows with the length.
    assert abs(float(torch.dot(tensor, tensor)) / exact - 1) > 1e-6


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("at", [0, 1023, 2500])
def test_what_is_not_finite_comes_through(value: float, at: int) -> None:
    tensor = torch.zeros(2600)
    tensor[at] = value
    assert not math.isfinite(float(sum_of_squares(tensor, [(0, 2600)])))


def test_clip_factor() -> None:
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(4.0, 1.0) == pytest.approx(0.25, rel=1e-6)
    assert clip_factor(4.0, 0.0) == 1.0
    assert clip_factor(math.inf, 1.0) == 0.0
    assert math.isnan(clip_factor(math.nan, 1.0))
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    parameter.grad = torch.tensor([3.0, 4.0, 12.0], dtype=torch.float64)
    norm = torch.nn.utils.clip_grad_norm_([parameter], 2.0)
    expected = torch.tensor([3.0, 4.0, 12.0], dtype=torch.float64) * clip_factor(float(norm), 2.0)
    assert torch.allclose(parameter.grad, expected, rtol=1e-15, atol=0)


def test_multipliers_take_the_first_pattern_that_is_found() -> None:
    group = SimpleNamespace
    group_of = multipliers(
        [
            group(pattern=r"embedding", lr_mult=0.1, weight_decay_mult=None),
            group(pattern=r"\.bias$", lr_mult=1.0, weight_decay_mult=2.0),
            group(pattern=r"bias", lr_mult=9.0, weight_decay_mult=9.0),
        ]
    )
    assert group_of("embedding.tokens.weight", True) == (0.1, 1.0)
    assert group_of("embedding.norm.bias", False) == (0.1, 0.0)
    assert group_of("layers.0.mlp.up.bias", False) == (1.0, 2.0)
    assert group_of("layers.0.mlp.up.weight", True) == (1.0, 1.0)
    assert group_of("layers.0.norm.weight", False) == (1.0, 0.0)
