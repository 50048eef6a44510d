"""A user's `nn.Linear` whose weight gradient can wait, for schedules that split backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilith.kernels import ops
from trilith.kernels.weight_queue import WeightQueue


class DeferredLinear(nn.Linear):
    """`nn.Linear` through `ops.linear`: the product for the weight gradient goes to `queue`; None: as nn.Linear."""

    queue: WeightQueue | None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out). Under autocast, which gives x and the product other dtypes, nothing waits."""
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return ops.linear(x, self.weight, self.bias, self.queue)


def defer_linears(module: nn.Module, queue: WeightQueue) -> list[DeferredLinear]:
    """Put a DeferredLinear in the place of every descendant of `module` that is exactly an `nn.Linear`; returns them.

    Each has the parameters, hooks and mode of the one that it replaces, and stands wherever that one stood. What stays:
    subclasses of nn.Linear, which may compute something else, and those whose weight is computed from other parameters.
    A DeferredLinear of an earlier engine is replaced, too.
    """
    made: dict[nn.Module, DeferredLinear] = {}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if not isinstance(child, nn.Linear) or type(child) not in (nn.Linear, DeferredLinear):
                continue
            if child._parameters.get("weight") is not None:
                if child not in made:
                    made[child] = _deferred(child, queue)
                parent._modules[name] = made[child]
    return list(made.values())


def _deferred(linear: nn.Linear, queue: WeightQueue) -> DeferredLinear:
    deferred = DeferredLinear.__new__(DeferredLinear)
    deferred.__dict__ = dict(linear.__dict__)
    deferred.queue = queue
    return deferred
