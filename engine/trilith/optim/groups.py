"""Which multipliers of learning rate and weight decay a tensor gets, and runs of elements that share them. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Sortable key of a parameter group. For our own optimizers: (factor on the learning rate, factor on the weight decay).
GroupKey = tuple[float, ...]
# (canonical name of a tensor, whether weight decay applies to it by default) -> its group
GroupOf = Callable[[str, bool], GroupKey]


@dataclass(frozen=True)
class Segment:
    """Elements [start, stop) of a flat buffer that belong to one parameter group."""

    start: int
    stop: int
    group: GroupKey


def multipliers(param_groups: Sequence[Any] = ()) -> GroupOf:
    """The rule of the config list `optimizer.param_groups` (`.pattern`, `.lr_mult`, `.weight_decay_mult`).

    The first pattern found in a tensor's canonical name applies. Where it says nothing about weight decay, or none is
    found, norms and biases are not decayed and everything else is.
    """
    compiled = [(re.compile(group.pattern), group.lr_mult, group.weight_decay_mult) for group in param_groups]

    def group_of(name: str, decay: bool) -> GroupKey:
        for pattern, lr_mult, decay_mult in compiled:
            if pattern.search(name):
                return (lr_mult, float(decay) if decay_mult is None else decay_mult)
        return (1.0, float(decay))

    return group_of
