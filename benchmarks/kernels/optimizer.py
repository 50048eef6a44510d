"""AdamW of 32 M parameters with clipping, unscaling and a bf16 copy, beside torch's; its update beside a stream."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.harness import Benchmark
from benchmarks.kernels.limits import copy_bytes_per_s
from trilith.kernels.ops.optimizer import ADAM, SGD, Arrays, Update, sum_of_squares, update_arrays

NUMEL = 1 << 25
BETAS, EPS, DECAY, LR, SCALE, CLIP = (0.9, 0.95), 1e-8, 0.1, 1e-4, 1024.0, 1.0


class State:
    """Weights, gradient, moments and a bf16 copy."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(NUMEL, generator=generator)
        self.slope = torch.randn(NUMEL, generator=generator) * SCALE
        self.moments = [torch.zeros(NUMEL), torch.zeros(NUMEL)]
        self.copy = torch.empty(NUMEL, dtype=torch.bfloat16)
        self.steps = 0


def native_step(state: State) -> None:
    """Norm, then everything else in one pass."""
    state.steps += 1
    norm = sum_of_squares([state.slope]) ** 0.5 / SCALE
    factor = min(1.0, CLIP / (norm + 1e-6)) / SCALE
    corrections = [1 - BETAS[0] ** state.steps, (1 - BETAS[1] ** state.steps) ** 0.5]
    values = torch.tensor([LR, factor, *corrections, state.steps == 1], dtype=torch.float64)
    arrays = Arrays([state.weight], [state.slope], [[m] for m in state.moments], [state.copy])
    update_arrays(arrays, Update(ADAM, values, BETAS, DECAY, EPS))


def torch_stepper(state: State) -> Callable[[], None]:
    """The way a torch user does it: unscale, clip, fused AdamW, cast."""
    parameter = torch.nn.Parameter(state.weight)
    optimizer = torch.optim.AdamW([parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
    slope = state.slope.clone()

    def step() -> None:
        parameter.grad = slope
        slope.mul_(1.0 / SCALE)
        torch.nn.utils.clip_grad_norm_([parameter], CLIP)
        optimizer.step()
        with torch.no_grad():
            state.copy.copy_(parameter)

    return step


def cases(benchmark: Benchmark, rounds: int) -> None:
    """The whole step, the update alone beside the stream, the norm alone beside a read."""
    ours, theirs = State(), State()
    step = torch_stepper(theirs)
    native_step(ours)
    step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-6)
    rate = copy_bytes_per_s(64 << 20)
    benchmark.compare(
        f"AdamW + clip + unscale + bf16 copy, {NUMEL >> 20} M",
        lambda: native_step(ours),
        step,
        peer_name="torch clip_grad_norm_ + fused AdamW + copy",
        limit=NUMEL * (4 + 28 + 2) / rate,
        goal=1 / 1.25,
        rounds=rounds,
    )
    values = torch.tensor([LR, 1.0, 0.5, 0.5, 0.0], dtype=torch.float64)
    arrays = Arrays([ours.weight], [ours.slope], [[m] for m in ours.moments])
    update = Update(ADAM, values, BETAS, DECAY, EPS)
    benchmark.compare(
        f"AdamW update alone, {NUMEL >> 20} M",
        lambda: update_arrays(arrays, update),
        _stream(),
        peer_name="an Adam-shaped stream (reads 4 arrays, writes 3)",
        limit=NUMEL * 28 / rate,
        goal=1 / 0.9,
        rounds=rounds,
    )
    parameter = torch.nn.Parameter(theirs.weight)
    parameter.grad = theirs.slope
    optimizer = torch.optim.AdamW([parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
    benchmark.compare(
        f"AdamW update alone, {NUMEL >> 20} M",
        lambda: update_arrays(arrays, update),
        optimizer.step,
        peer_name="torch fused AdamW",
        limit=NUMEL * 28 / rate,
        rounds=rounds,
    )
    benchmark.compare(
        f"sum of squares, {NUMEL >> 20} M",
        lambda: sum_of_squares([ours.slope]),
        lambda: torch.linalg.vector_norm(ours.slope),
        peer_name="torch vector_norm",
        limit=NUMEL * 4 / rate,
        rounds=rounds,
    )


def _stream() -> Callable[[], None]:
    """As many bytes with next to no arithmetic: momentum SGD (reads 3 arrays, writes 2) on 28 / 20 of the elements."""
    numel = NUMEL * 28 // 20
    weight, slope, moment = torch.zeros(numel), torch.zeros(numel), torch.zeros(numel)
    arrays = Arrays([weight], [slope], [[moment]])
    update = Update(SGD, torch.tensor([LR, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64), (0.9, 0.0), decoupled=False)
    return lambda: update_arrays(arrays, update)
