"""What the machine allows: bytes a second of a copy, measured in the same run as what it limits."""

from __future__ import annotations

import torch

from benchmarks.harness import timed

_REPEATS = 15


def copy_bytes_per_s(num_bytes: int) -> float:
    """The best rate, bytes read plus bytes written, of a copy between buffers of `num_bytes` that exist already."""
    source, target = torch.ones(num_bytes // 4), torch.ones(num_bytes // 4)
    return 2 * num_bytes / min(timed(lambda: target.copy_(source)) for _ in range(_REPEATS))


def fp32_passes(rows: int, width: int, count: float) -> float:
    """Seconds that `count` passes over an fp32 tensor (rows, width) take at the copy's rate for such tensors."""
    num_bytes = rows * width * 4
    return count * num_bytes / copy_bytes_per_s(num_bytes)
