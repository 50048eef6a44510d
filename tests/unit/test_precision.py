"""The dtype policy, and the loss scaler against sequences of overflows worked out by hand from DeepSpeed's rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trilith.config import load_config, resolve
from trilith.errors import TrilithError
from trilith.precision import LossScaler, PrecisionPolicy


def config(**sections: Any) -> Any:
    return resolve(load_config({"train_batch_size": 1, **sections}), 1, needs="engine").config


def scales(scaler: LossScaler, overflows: str) -> list[float]:
    """The scale after each step; x marks an overflow."""
    found = []
    for mark in overflows:
        scaler.update(mark == "x")
        found.append(scaler.loss_scale)
    return found


def test_policies() -> None:
    plain = PrecisionPolicy.from_config(config())
    assert plain == PrecisionPolicy()
    exact = PrecisionPolicy.from_config(config(data_types={"param_dtype": "fp64"}))
    assert {exact.param_dtype, exact.grad_accum_dtype, exact.reduce_dtype, exact.master_dtype} == {torch.float64}
    half = PrecisionPolicy.from_config(config(fp16={"enabled": True}))
    assert (half.param_dtype, half.grad_accum_dtype, half.master_dtype) == (torch.float16, torch.float32, torch.float32)
    assert half.check_overflow and half.scales_loss
    brain = PrecisionPolicy.from_config(config(bf16={"enabled": True}, communication_data_type="bf16"))
    assert (brain.param_dtype, brain.reduce_dtype) == (torch.bfloat16, torch.bfloat16)
    assert brain.check_overflow and not brain.scales_loss
    unchecked = PrecisionPolicy.from_config(config(bf16={"enabled": True, "check_grad_overflow": False}))
    assert not unchecked.check_overflow


def test_hysteresis_is_used_up_then_the_scale_halves() -> None:
    scaler = LossScaler(dynamic=True, scale=16, window=4, hysteresis=2)
    # One overflow is let pass; the allowance stays used up over good steps until the window is full.
    assert scales(scaler, "xx.x") == [16, 8, 8, 4]


def test_the_window_counts_from_the_last_overflow() -> None:
    scaler = LossScaler(dynamic=True, scale=16, window=3, hysteresis=1)
    assert scales(scaler, "x......x....") == [8, 8, 8, 16, 16, 16, 32, 16, 16, 16, 32, 32]


def test_without_any_overflow_the_scale_doubles_every_window() -> None:
    scaler = LossScaler(dynamic=True, scale=1, window=2, hysteresis=2)
    assert scales(scaler, "......") == [1, 2, 2, 4, 4, 8]


def test_growth_refills_the_hysteresis() -> None:
    scaler = LossScaler(dynamic=True, scale=16, window=2, hysteresis=2)
    assert scales(scaler, "xx...xx") == [16, 8, 8, 16, 16, 16, 8]


def test_consecutive_hysteresis_is_refilled_by_every_good_step() -> None:
    strict = LossScaler(dynamic=True, scale=16, window=100, hysteresis=2)
    mild = LossScaler(dynamic=True, scale=16, window=100, hysteresis=2, consecutive_hysteresis=True)
    assert scales(strict, "x.x.x") == [16, 16, 8, 8, 4]
    assert scales(mild, "x.x.xx") == [16, 16, 16, 16, 16, 8]


def test_the_floor_is_reached_and_then_refused() -> None:
    scaler = LossScaler(dynamic=True, scale=6, window=100, hysteresis=1, min_scale=2)
    assert scales(scaler, "xx") == [3, 2]
    with pytest.raises(TrilithError, match=r"fp16\.min_loss_scale"):
        scaler.update(True)


def test_static_scales_never_move() -> None:
    assert scales(LossScaler.constant(128.0), "x.x") == [128, 128, 128]
    assert LossScaler.from_config(config()).loss_scale == 1.0
    assert LossScaler.from_config(config(bf16={"enabled": True})).loss_scale == 1.0
    static = LossScaler.from_config(config(fp16={"enabled": True, "loss_scale": 512}))
    assert (static.dynamic, static.loss_scale) == (False, 512.0)


def test_from_config_and_resume() -> None:
    section = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 3, "hysteresis": 2}
    straight = LossScaler.from_config(config(fp16=section))
    assert straight.loss_scale == 16.0
    pattern = "x..x....xx...."
    expected = scales(straight, pattern)
    for cut in range(len(pattern)):
        first = LossScaler.from_config(config(fp16=section))
        head = scales(first, pattern[:cut])
        second = LossScaler.from_config(config(fp16=section))
        second.load_state_dict(first.state_dict())
        assert head + scales(second, pattern[cut:]) == expected
