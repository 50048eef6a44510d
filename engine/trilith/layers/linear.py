"""Linear layers split over tensor ranks (Shoeybi et al. 2019, section 3): by output features, then by input features.

A pair of them needs one communication before the first and one after the second. Their communication and its backward
belong to `Placement.enter` and `Placement.leave`; every matrix product goes through `ops.linear`.
"""

from __future__ import annotations

from torch import Tensor, nn

from trilith.kernels import ops
from trilith.layers.placement import Placement


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the rows of W dealt to ranks: whole features in, this rank's features out.

    `out_features` counts this rank's rows (ranks may differ, as with shared key/value heads); W is (out, in).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, placement: Placement) -> None:
        super().__init__()
        self.placement = placement
        self.weight = placement.parameter(out_features, in_features)
        self.bias = placement.parameter(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, S/t or S, in) of the sequence region to (B, S, out). All ranks of the group must call it."""
        return self._product(x, self.bias)

    def without_bias(self, x: Tensor) -> Tensor:
        """As `forward`, for a caller that adds the bias on its way."""
        return self._product(x, None)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return ops.linear(self.placement.enter(x), self.weight, bias, self.placement.queue)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the columns of W dealt to ranks: this rank's features in, whole features out.

    `in_features` counts this rank's columns; W is (out, in). The bias is whole on each rank and added once, after
    the sum.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, placement: Placement) -> None:
        super().__init__()
        self.placement = placement
        self.weight = placement.parameter(out_features, in_features)
        self.bias = placement.parameter(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, in) to (B, S/t or S, out) of the sequence region. All ranks of the group must call it."""
        if self.placement.group.size == 1:  # nothing is summed: the product adds the bias on its way
            return ops.linear(x, self.weight, self.bias, self.placement.queue)
        y = self.placement.leave(ops.linear(x, self.weight, queue=self.placement.queue))
        return y if self.bias is None else y + self.bias
