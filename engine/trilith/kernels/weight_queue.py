"""Weight gradients that do not go through autograd: they wait for the second half of a backward, or go straight where they
are summed.

Zero-bubble schedules (Qi et al. 2023, arXiv 2401.10241) run the gradient of a stage's input first, because the stage
before waits for it, and the gradients of its weights whenever there is nothing better to do. A stage owns a queue and
hands it to its linears (`ops.linear`); in backward each leaves its input and the gradient of its output there. No hook
and no graph surgery: the weight is not an input of the autograd node, so nothing fires before its gradient is there.

In a whole backward the same detour saves passes over memory: autograd makes every gradient in a tensor of its own and
adds it to a buffer that was zeroed before, while here the product may be written into the buffer at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Tracker = Callable[[Tensor], object]
Receiver = Callable[[Tensor, "Deferred"], None]


@dataclass(frozen=True, slots=True)
class Deferred:
    """One product whose weight gradient is still to be computed: x (T, in) and the gradient of y (T, out).

    `versions` are those of x and of the gradient when they were queued: the queue escapes autograd's own check.
    `tracked` keeps what a meter made of the two tensors.
    """

    weight: Tensor
    x: Tensor
    y_gradient: Tensor
    versions: tuple[int, int]
    tracked: object = None

    def gradient(self, out: Tensor | None = None) -> Tensor:
        """The gradient of the weight (out, in), in the dtype of x: bit for bit what autograd computes. `out` takes it."""
        found = (self.x._version, self.y_gradient._version)
        assert found == self.versions, f"a queued tensor was changed in place: versions {found}, queued {self.versions}"
        return torch.mm(self.y_gradient.t(), self.x, out=out)


class WeightQueue:
    """What the linears of one stage put off in the backward that runs now, in the order of backward.

    `anchor` is an input that requires a gradient: without it a first layer, whose x requires none, would have no node.
    While `defers` is False, linears compute their weight gradients in backward as if there were no queue: whoever runs the
    stage sets it before a forward, and before a backward that may compute parts of the forward again.
    `receive`, where it is set, is given the weight and the product of each linear in a backward that does not defer: for
    stages that use each weight in one linear only. Else autograd computes them.
    `tracker`, where it is set, is called with each queued tensor, and what it returns lives as long as the entry.
    """

    def __init__(self, defers: bool = True) -> None:
        self.anchor = torch.empty(0, requires_grad=True)
        self.defers = defers
        self.receive: Receiver | None = None
        self.tracker: Tracker | None = None
        self._items: list[Deferred] = []

    @property
    def takes(self) -> bool:
        """Whether linears bring their weight gradients here."""
        return self.defers or self.receive is not None

    def put(self, weight: Tensor, x: Tensor, y_gradient: Tensor) -> None:
        """Queue a product, or hand it on: x (T, in), gradient of y (T, out); both detached, so that they hold no graph."""
        if not self.defers:
            assert self.receive is not None
            self.receive(weight, Deferred(weight, x, y_gradient, (x._version, y_gradient._version)))
            return
        tracked = None if self.tracker is None else (self.tracker(x), self.tracker(y_gradient))
        self._items.append(Deferred(weight, x, y_gradient, (x._version, y_gradient._version), tracked))

    def take(self) -> list[Deferred]:
        """All that was queued since the last call, first in first out."""
        items, self._items = self._items, []
        return items
