"""AdamW of 32 M parameters with clipping, unscaling and a bf16 copy, beside torch's; its update and the norm beside memory.

The streams that the goals speak of are C++ loops (`streams.cpp`) that are built here with the machine's compiler.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Benchmark
from benchmarks.kernels.limits import copy_bytes_per_s
from trilith.kernels.ops import optimizer

NUMEL = 1 << 25
BETAS, EPS, DECAY, LR, CLIP, LOSS_SCALE = (0.9, 0.95), 1e-8, 0.1, 1e-3, 1.0, 1024.0
STREAM_GOAL, TORCH_GOAL, DEEPSPEED_GOAL = 1 / 0.9, 1 / 1.25, 1.0


class State:
    """Weights, their gradient, moments, and the module's weights in bf16."""

    def __init__(self, loss_scale: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameter = torch.randn(NUMEL, generator=generator)
        self.gradient = torch.randn(NUMEL, generator=generator).mul_(loss_scale)
        self.first, self.second = torch.zeros(NUMEL), torch.zeros(NUMEL)
        self.weight = torch.empty(NUMEL, dtype=torch.bfloat16)
        self.loss_scale, self.num_steps = loss_scale, 0
        self.multipliers = torch.ones(1, 2, dtype=torch.float64)

    def update(self, factor: float, weights: list[Tensor]) -> None:
        """One native pass; gradients times `factor`."""
        self.num_steps += 1
        step = optimizer.step_values(LR, grad_scale=1.0 / factor, step=self.num_steps, betas=BETAS)
        states = ([self.first], [self.second])
        slices = optimizer.Slices([self.parameter], [self.gradient], states, weights, self.multipliers)
        optimizer.adam(slices, step, *BETAS, EPS, DECAY)

    def native_step(self) -> None:
        """The norm, then everything else in one pass."""
        norm = float(optimizer.sum_of_squares([self.gradient]).sqrt()) / self.loss_scale
        self.update(min(1.0, CLIP / (norm + 1e-6)) / self.loss_scale, [self.weight])

    def torch_stepper(self) -> Callable[[], None]:
        """A step as a torch user writes it, whose gradients need no unscaling."""
        parameter = nn.Parameter(self.parameter)
        parameter.grad = self.gradient
        theirs = torch.optim.AdamW([parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_([parameter], CLIP)
            theirs.step()
            with torch.no_grad():
                self.weight.copy_(parameter)

        return step


def cases(benchmark: Benchmark, rounds: int) -> None:
    """The whole step beside torch's; the update alone beside a stream, torch's and DeepSpeed's; the norm beside a read."""
    rate = copy_bytes_per_s(64 << 20)
    ours, theirs = State(LOSS_SCALE), State(1.0)
    torch_step = theirs.torch_stepper()
    for _ in range(3):
        ours.native_step()
        torch_step()
    torch.testing.assert_close(ours.parameter, theirs.parameter, rtol=1e-5, atol=1e-5)
    about: dict[str, Any] = {"rounds": rounds, "limit": NUMEL * (4 + 28 + 2) / rate}
    benchmark.compare(
        f"AdamW with clip, unscale and bf16 copy, {NUMEL >> 20} M",
        ours.native_step,
        torch_step,
        peer_name="torch clip_grad_norm_ + fused AdamW + copy",
        goal=TORCH_GOAL,
        **about,
    )
    _update_alone(benchmark, ours, theirs, NUMEL * 28 / rate, rounds)
    streams = _streams()
    name, peer = f"sum of squares, {NUMEL >> 20} M", "a loop that reads as much"
    if streams is None:
        benchmark.missing(name, peer, "no C++ compiler")
        return
    at, threads = ours.gradient.data_ptr(), torch.get_num_threads()
    benchmark.compare(
        name,
        lambda: optimizer.sum_of_squares([ours.gradient]),
        lambda: streams.read(ctypes.c_void_p(at), ctypes.c_int64(NUMEL), threads),
        peer_name=peer,
        limit=NUMEL * 4 / rate,
        goal=STREAM_GOAL,
        rounds=rounds,
    )


def _update_alone(benchmark: Benchmark, ours: State, theirs: State, limit: float, rounds: int) -> None:
    parameter = nn.Parameter(theirs.parameter)
    parameter.grad = theirs.gradient
    plain = torch.optim.AdamW([parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
    peers: list[tuple[str, Callable[[], Any] | None, float | None, str]] = [
        ("a stream that reads 4 arrays and writes 3", _adam_shape(theirs), STREAM_GOAL, "no C++ compiler"),
        ("torch fused AdamW", plain.step, None, ""),
        ("DeepSpeedCPUAdam", _deepspeed(parameter), DEEPSPEED_GOAL, "not installed: pip install deepspeed"),
    ]
    for peer, run, goal, why in peers:
        name = f"AdamW update, {NUMEL >> 20} M"
        if run is None:
            benchmark.missing(name, peer, why)
            continue
        about: dict[str, Any] = {"peer_name": peer, "limit": limit, "goal": goal, "rounds": rounds}
        benchmark.compare(name, lambda: ours.update(1.0 / LOSS_SCALE, []), run, **about)


def _deepspeed(parameter: nn.Parameter) -> Callable[[], Any] | None:
    if find_spec("deepspeed") is None:
        return None
    kind = import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
    run: Callable[[], Any] = kind([parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY).step
    return run


def _adam_shape(state: State) -> Callable[[], Any] | None:
    streams = _streams()
    if streams is None:
        return None
    arrays = [torch.zeros_like(state.parameter) for _ in range(4)]
    places = [ctypes.c_void_p(array.data_ptr()) for array in arrays]

    def run(held: list[Tensor] = arrays) -> None:
        streams.adam_shape(*places, ctypes.c_int64(held[0].numel()), torch.get_num_threads())

    return run


def _streams() -> ctypes.CDLL | None:
    """The loops of `streams.cpp`, built for this processor."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    source = Path(__file__).with_name("streams.cpp")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "streams.so"
        flags = ["-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-shared"]
        subprocess.run([compiler, *flags, str(source), "-o", str(target)], check=True)
        return ctypes.CDLL(str(target))
