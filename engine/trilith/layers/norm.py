"""LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019) over the last dim, in the sequence region.

Their parameters are whole on each tensor rank. The ops compute in float32 where the input is a half dtype.
"""

from __future__ import annotations

from torch import Tensor, nn

from trilith.kernels import ops
from trilith.layers.placement import Placement


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias."""

    def __init__(self, hidden_size: int, eps: float, placement: Placement) -> None:
        super().__init__()
        self.eps = eps
        self.backend = placement.backends.norm
        self.weight = placement.parameter(hidden_size)
        self.bias = placement.parameter(hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) to (..., H), same dtype."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps, self.backend)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x + residual and its norm, all (..., H)."""
        return ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps, self.backend)


class RMSNorm(nn.Module):
    """x / sqrt(mean of squares + eps) * weight."""

    def __init__(self, hidden_size: int, eps: float, placement: Placement) -> None:
        super().__init__()
        self.eps = eps
        self.backend = placement.backends.norm
        self.weight = placement.parameter(hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) to (..., H), same dtype."""
        return ops.rms_norm(x, self.weight, self.eps, self.backend)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x + residual and its norm, all (..., H)."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps, self.backend)
