"""A user's `nn.Linear` whose weight gradient can wait, for schedules that split backward."""

from __future__ import annotations

from collections import Counter

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

    A weight that `module` has under several names waits nowhere: autograd sums the gradients of one backward before it
    adds them to those of earlier ones, and in halves they would be added in another order.
    """
    uses = Counter(parameter for _, parameter in module.named_parameters(remove_duplicate=False))
    made: dict[nn.Module, DeferredLinear] = {}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if not isinstance(child, nn.Linear) or type(child) not in (nn.Linear, DeferredLinear):
                continue
            weight = child._parameters.get("weight")
            if weight is None:
                continue
            if uses[weight] > 1:
                if isinstance(child, DeferredLinear):
                    child.queue = None
                continue
            made[child] = parent._modules[name] = _deferred(child, queue)
    return list(made.values())


def _deferred(linear: nn.Linear, queue: WeightQueue) -> DeferredLinear:
    deferred = DeferredLinear.__new__(DeferredLinear)
    deferred.__dict__ = dict(linear.__dict__)
    deferred.queue = queue
    return deferred
