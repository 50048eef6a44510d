"""Learning rates: pure functions of the number of optimizer steps done. No torch.

`WarmupLR`, `WarmupDecayLR` and `WarmupCosineLR` give the very numbers that DeepSpeed applies
(`deepspeed/runtime/lr_schedules.py`). There the schedule is advanced after each optimizer step that was not skipped, and
before the first it stands at iteration -1. So the step with index t = 0, 1, 2, ... runs at

    t = 0: the value at iteration -1, which is `warmup_min_lr` (for the cosine: 0, whatever `warmup_min_ratio` says)
    t > 0: the formula at iteration t - 1

and a warm-up from 0 spends its first two steps at 0, since log(0 + 1) = 0. Skipped steps (fp16 overflow) do not count.
`Constant` and `WSD` are ours and have no such offset: step t of a warm-up of W steps runs at (t + 1) / W.
"""

from __future__ import annotations

from collections.abc import Callable
from math import cos, log, pi
from typing import Any

LearningRate = Callable[[int], float]


def make_lr(scheduler: Any, base_lr: float) -> LearningRate:
    """The learning rate as a function of the optimizer steps done so far.

    `scheduler` is the resolved config section `scheduler` (`.type`, `.params`), or None for a constant rate; `base_lr` is
    `optimizer.params.lr`. Parameter groups multiply what it returns by their `lr_mult`.
    """
    if scheduler is None:
        return lambda step: base_lr
    p = scheduler.params
    if scheduler.type == "Constant":
        return lambda step: constant(step, base_lr, p.warmup_num_steps)
    if scheduler.type == "WSD":
        return lambda step: wsd(step, base_lr, p.warmup_num_steps, p.total_num_steps, p.decay_num_steps, p.min_lr_ratio)
    if scheduler.type == "WarmupCosineLR":
        return lambda step: warmup_cosine_lr(
            step,
            base_lr,
            p.total_num_steps,
            p.warmup_num_steps,
            warmup_min_ratio=p.warmup_min_ratio,
            cos_min_ratio=p.cos_min_ratio,
            warmup_type=p.warmup_type,
        )
    total = p.total_num_steps if scheduler.type == "WarmupDecayLR" else None
    return lambda step: warmup_lr(
        step, p.warmup_min_lr, p.warmup_max_lr, p.warmup_num_steps, p.warmup_type, total_num_steps=total
    )


def warmup_lr(
    step: int,
    min_lr: float,
    max_lr: float,
    warmup_num_steps: int,
    warmup_type: str = "log",
    *,
    total_num_steps: int | None = None,
) -> float:
    """DeepSpeed's WarmupLR; with `total_num_steps` its WarmupDecayLR: a linear fall to `min_lr` at that iteration."""
    iteration = step - 1
    if iteration < 0:
        return min_lr
    warmup = max(2, warmup_num_steps)
    if iteration < warmup:
        gamma = _warmup_gamma(iteration, warmup, warmup_type)
    elif total_num_steps is None:
        gamma = 1.0
    else:
        gamma = max(0.0, (total_num_steps - iteration) / max(1.0, total_num_steps - warmup))
    return min_lr + (max_lr - min_lr) * gamma


def warmup_cosine_lr(
    step: int,
    base_lr: float,
    total_num_steps: int,
    warmup_num_steps: int,
    *,
    warmup_min_ratio: float = 0.0,
    cos_min_ratio: float = 1e-4,
    warmup_type: str = "log",
) -> float:
    """DeepSpeed's WarmupCosineLR: from `warmup_min_ratio` up to `base_lr`, then half a cosine down to `cos_min_ratio`.

    From the iteration `total_num_steps - 1` on it stays at `cos_min_ratio` of `base_lr`.
    """
    iteration = step - 1
    if iteration < 0:
        return 0.0
    warmup = max(2, warmup_num_steps)
    if iteration < warmup:
        gamma = _warmup_gamma(iteration, warmup, warmup_type)
        return base_lr * (warmup_min_ratio + gamma * (1.0 - warmup_min_ratio))
    progress = min(1.0, (iteration - warmup + 1) / max(1, total_num_steps - warmup))
    ratio = cos_min_ratio + (1.0 - cos_min_ratio) * (1 + cos(pi * progress)) / 2
    return base_lr * max(0.0, ratio)


def _warmup_gamma(iteration: int, warmup: int, warmup_type: str) -> float:
    if warmup_type == "log":
        return 1.0 / log(warmup) * log(iteration + 1)
    return iteration / warmup


def constant(step: int, base_lr: float, warmup_num_steps: int = 0) -> float:
    """`base_lr`, after a linear warm-up from 0."""
    return base_lr * min(1.0, (step + 1) / warmup_num_steps) if warmup_num_steps else base_lr


def wsd(
    step: int,
    base_lr: float,
    warmup_num_steps: int,
    total_num_steps: int,
    decay_num_steps: int,
    min_lr_ratio: float = 0.0,
) -> float:
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM): a linear fall over the last `decay_num_steps` steps.

    The last step of the run, `total_num_steps - 1`, is the first at `min_lr_ratio` of `base_lr`; later ones stay there.
    """
    lr = constant(step, base_lr, warmup_num_steps)
    done = step + 1 - (total_num_steps - decay_num_steps)
    if done <= 0:
        return lr
    left = max(0.0, 1.0 - done / decay_num_steps) if decay_num_steps else 0.0
    return lr * (min_lr_ratio + (1.0 - min_lr_ratio) * left)
