"""Which data rank owns each parameter, where an optimizer needs tensors whole. Pure, no torch.

A norm or a matrix product over a whole tensor cannot be had from a cut of the flat buffer. So each parameter goes to one
owner, whole, as in the distributed Muon of Jordan et al. 2024; owners are chosen by longest-processing-time bin packing
(Graham 1969): the largest parameter first, always to the rank with the least so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from trilith.models.base import LocalParameter


class Owners:
    """Deals the parameters of a rank's units, one unit after the other, to `degree` data ranks.

    `loads`: elements that each has so far; what one unit leaves uneven, the next ones even out, so that over all units no
    two ranks are further apart than the largest parameter. `tied_units` are dealt as if they came first: their choice is
    the same in every stage that holds them, whatever else the stage holds.
    """

    def __init__(self, degree: int, tied_units: frozenset[str] = frozenset()) -> None:
        self.degree = degree
        self.loads = [0] * degree
        self._tied_units = tied_units

    def deal(self, unit: str, members: Sequence[LocalParameter]) -> list[int]:
        """The owner of each of the `unit`'s parameters, and counts them in.

        Sizes are those of the whole canonical tensors, so that all tensor ranks choose alike.
        """
        sizes = [sum(prod(spec.shape) for spec in parameter.specs) for parameter in members]
        loads = [0] * self.degree if unit in self._tied_units else list(self.loads)
        owners = [0] * len(members)
        for i in sorted(range(len(members)), key=lambda i: (-sizes[i], i)):
            owners[i] = min(range(self.degree), key=lambda rank: (loads[rank], rank))
            loads[owners[i]] += sizes[i]
            self.loads[owners[i]] += sizes[i]
        return owners
