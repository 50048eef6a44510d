"""Learning rates: DeepSpeed's numbers step by step, and our own schedules at their corners."""

from __future__ import annotations

from math import cos, log, pi
from types import SimpleNamespace
from typing import Any

import pytest

from trilith.config import load_config, resolve
from trilith.optim.lr import constant, make_lr, warmup_cosine_lr, warmup_lr, wsd


def schedule(kind: str, base_lr: float = 1.0, **params: Any) -> list[float]:
    lr = make_lr(SimpleNamespace(type=kind, params=SimpleNamespace(**params)), base_lr)
    return [lr(step) for step in range(12)]


def test_warmup_log_by_hand() -> None:
    lrs = schedule("WarmupLR", warmup_min_lr=0.0, warmup_max_lr=1.0, warmup_num_steps=4, warmup_type="log")
    # Iterations -1 and 0 both give the minimum; iteration 3 reaches the maximum.
    assert lrs == pytest.approx([0, 0, 0.5, log(3) / log(4), 1, 1, 1, 1, 1, 1, 1, 1], abs=1e-15)


def test_warmup_linear_by_hand() -> None:
    lrs = schedule("WarmupLR", warmup_min_lr=0.2, warmup_max_lr=1.0, warmup_num_steps=4, warmup_type="linear")
    assert lrs == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1, 1], abs=1e-15)


def test_warmup_of_fewer_than_two_steps_takes_two() -> None:
    for steps in (0, 1, 2):
        assert warmup_lr(1, 0.0, 1.0, steps) == 0.0
        assert warmup_lr(2, 0.0, 1.0, steps) == pytest.approx(1.0)
        assert warmup_lr(2, 0.0, 1.0, steps, "linear") == 0.5


def test_warmup_decay_by_hand() -> None:
    lrs = schedule(
        "WarmupDecayLR",
        warmup_min_lr=0.0,
        warmup_max_lr=2.0,
        warmup_num_steps=2,
        warmup_type="linear",
        total_num_steps=6,
    )
    # iteration:    -1  0  1  2    3    4    5   6  7 ...
    assert lrs == pytest.approx([0, 0, 1, 2.0, 1.5, 1.0, 0.5, 0, 0, 0, 0, 0], abs=1e-15)


def test_warmup_cosine_by_hand() -> None:
    lrs = schedule(
        "WarmupCosineLR",
        base_lr=10.0,
        warmup_min_ratio=0.1,
        warmup_num_steps=2,
        warmup_type="linear",
        total_num_steps=6,
        cos_min_ratio=0.2,
    )
    falling = [10 * (0.2 + 0.8 * (1 + cos(pi * k / 4)) / 2) for k in (1, 2, 3, 4)]
    # The first step runs at 0 whatever the minimum ratio, because the scheduler has not started.
    assert lrs == pytest.approx([0, 1, 5.5, *falling, 2, 2, 2, 2, 2], abs=1e-14)


def test_cosine_stays_at_its_floor() -> None:
    floor = warmup_cosine_lr(100, 1.0, 50, 10, cos_min_ratio=0.3)
    assert floor == pytest.approx(0.3)
    assert warmup_cosine_lr(10_000, 1.0, 50, 10, cos_min_ratio=0.3) == floor


def test_constant_and_none() -> None:
    assert make_lr(None, 0.3)(0) == make_lr(None, 0.3)(1000) == 0.3
    assert [constant(step, 1.0, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert schedule("Constant", warmup_num_steps=0) == [1.0] * 12


def test_warmup_stable_decay() -> None:
    lrs = schedule("WSD", warmup_num_steps=2, total_num_steps=10, decay_num_steps=4, min_lr_ratio=0.2)
    assert lrs == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
    assert wsd(9, 1.0, 0, 10, 0) == 1.0


def test_from_a_config_file() -> None:
    config = resolve(
        load_config(
            {
                "train_batch_size": 2,
                "training": {"steps": 100},
                "optimizer": {"type": "AdamW", "params": {"lr": 0.5}},
                "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
            }
        ),
        1,
        needs="engine",
    ).config
    lr = make_lr(config.scheduler, config.optimizer.params.lr)
    assert lr(0) == lr(1) == 0.0
    assert lr(5) == pytest.approx(0.5 * log(5) / log(10))
    assert lr(50) == 0.5
