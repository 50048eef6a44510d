"""Rotary position tables: feature pair i at position p turns by p theta^(-2i/D) (Su et al. 2021, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (S, D/2) at global `positions` (S,) int64, float64 where activations are, else float32.

    Angles are made in float64: in float32 position 100,000 would already be off by a hundredth of a radian.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.to(torch.float64).unsqueeze(-1) * theta**-exponents
    table_dtype = dtype if dtype == torch.float64 else torch.float32
    return angles.cos().to(table_dtype), angles.sin().to(table_dtype)
