"""The two feed-forward layers: GPT's (up, GELU, down) and the gated one of Shazeer 2020 (SwiGLU), F dealt to ranks."""

from __future__ import annotations

from torch import Tensor, nn

from trilith.kernels import ops
from trilith.layers.linear import ColumnParallelLinear, RowParallelLinear
from trilith.layers.placement import Placement


class MLP(nn.Module):
    """down(gelu(up(x))); `ffn_features` counts this rank's F/t, `activation` is `gelu` or `gelu_tanh`."""

    def __init__(self, hidden_size: int, ffn_features: int, activation: str, bias: bool, placement: Placement) -> None:
        super().__init__()
        self.activation = activation
        self.backend = placement.backends.activation
        self.up = ColumnParallelLinear(hidden_size, ffn_features, bias, placement)
        self.down = RowParallelLinear(ffn_features, hidden_size, bias, placement)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S/t or S, H) to the same shape. All ranks of the group must call it."""
        bias = self.up.bias
        if bias is None or not ops.takes("bias_gelu", self.backend, x, bias):
            return self.down(ops.gelu(self.up(x), self.activation, self.backend, owns_gradient=True))
        inner = self.up.without_bias(x)
        return self.down(ops.bias_gelu(inner, bias, self.activation, self.backend, owns_gradient=True))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one product. `ffn_features` is this rank's F/t."""

    def __init__(self, hidden_size: int, ffn_features: int, bias: bool, placement: Placement) -> None:
        super().__init__()
        self.backend = placement.backends.activation
        self.gate_up = ColumnParallelLinear(hidden_size, 2 * ffn_features, bias, placement)
        self.down = RowParallelLinear(ffn_features, hidden_size, bias, placement)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S/t or S, H) to the same shape. All ranks of the group must call it."""
        return self.down(ops.swiglu_packed(self.gate_up(x), self.backend))
