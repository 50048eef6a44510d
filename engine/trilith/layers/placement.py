"""Where a layer's parameters live and whom the layer talks to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trilith import comm
from trilith.kernels.backends import DEFAULT, Backends
from trilith.kernels.weight_queue import WeightQueue
from trilith.topology import Group


@dataclass(frozen=True)
class Placement:
    """The tensor-parallel group of a layer, and the dtype and device of its parameters.

    With `sequence_parallel` the activations outside the pairs of linears are split over `group` along S. `queue` is
    where the stage's linears leave their weight gradients, None for autograd. `backends`: what the
    ops run on.
    """

    group: Group
    sequence_parallel: bool
    dtype: torch.dtype
    device: torch.device
    queue: WeightQueue | None = None
    backends: Backends = DEFAULT

    def parameter(self, *shape: int) -> nn.Parameter:
        """A parameter of the local `shape`, not initialised."""
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device))

    def enter(self, x: Tensor) -> Tensor:
        """From the sequence region into a parallel one: (B, S/t or S, H) to (B, S, H). All of `group` call it."""
        if self.sequence_parallel:
            return comm.gather_along(x, self.group, 1)
        return comm.copy_to(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """Sums the ranks' partial (B, S, H) and returns what the sequence region holds. All of `group` call it."""
        if self.sequence_parallel:
            return comm.scatter_sum_along(x, self.group, 1)
        return comm.reduce_from(x, self.group)

    def region_slice(self, length: int) -> slice:
        """Which of the `length` positions of S this rank holds in the sequence region."""
        if not self.sequence_parallel:
            return slice(0, length)
        assert length % self.group.size == 0, (length, self.group.size)
        held = length // self.group.size
        return slice(self.group.index * held, (self.group.index + 1) * held)
