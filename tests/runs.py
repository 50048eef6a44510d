"""Training runs for tests: what a rank does, and the curve of a run (loss and gradient norm of every step)."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch

from tests.harness import run_ranks
from trilith import preflight
from trilith.trainer import Place, Trainer

Curve = list[tuple[float, float | None]]


def train(rank: int, world_size: int, content: dict[str, Any], device: str = "cpu") -> Curve:
    """One rank of a run: (loss, gradient norm) of every step."""
    place = Place(rank, world_size, torch.device(device, rank % max(torch.cuda.device_count(), 1)))
    trainer = Trainer(preflight.plan(content), place if device != "cpu" else Place(rank, world_size))
    try:
        records = [trainer.train_step() for _ in range(content["training"]["steps"])]
    finally:
        trainer.close()
    return [(record.loss, record.grad_norm) for record in records]


def run(content: dict[str, Any], timeout_s: float = 120, device: str = "cpu") -> Curve:
    """The curve of a run; every rank must report the same."""
    num_ranks = preflight.plan(content).world_size
    curves = run_ranks(num_ranks, train, content, device, timeout_s=timeout_s, device=device)
    assert all(curve == curves[0] for curve in curves), "ranks disagree on loss or gradient norm"
    return curves[0]


@cache
def _cached(text: str, device: str) -> tuple[tuple[float, float], ...]:
    return tuple(run(json.loads(text), device=device))


def reference(content: dict[str, Any], device: str = "cpu") -> tuple[tuple[float, float], ...]:
    """The curve of a one-process run, computed once per process of the test session."""
    return _cached(json.dumps(content, sort_keys=True), device)


def worst_relative(curve: Any, expected: Any) -> float:
    """The largest relative difference of two curves; they must be of one length."""
    assert len(curve) == len(expected)
    return max(
        abs(a - b) / max(abs(b), 1e-300)
        for x, y in zip(curve, expected, strict=True)
        for a, b in zip(x, y, strict=True)
    )
