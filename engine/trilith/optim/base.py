"""What every optimizer here is: updates over flat partitions, elementwise in one fused call per parameter group.

An optimizer never sees a module. ZeRO hands it, per unit, the part of the flat master weights that this rank owns, the
gradient beside it, and which runs of elements share multipliers; the state it keeps has the same shape, so that it is
partitioned, saved and resharded like the weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trilith.optim.groups import GroupKey, Segment

_BATCH_NUMEL = 1 << 24


@dataclass(frozen=True)
class FlatPartition:
    """This rank's part of one unit.

    `parameter` (n,): master weights; `gradient` (n,): their gradient, in any dtype; `segments` cover both.
    """

    name: str
    parameter: Tensor
    gradient: Tensor
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class SliceGroup:
    """All slices of one parameter group, over all units: parallel lists of 1-D views."""

    key: GroupKey
    parameters: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    states: Mapping[str, tuple[Tensor, ...]]


class Optimizer(ABC):
    """Elementwise optimizer over flat partitions; children name their state tensors and update one group at a time.

    `scales_by_itself`: whether `_update` divides by `grad_scale`, so that it need not be done before, in another pass.
    """

    state_roles: tuple[str, ...] = ()
    scales_by_itself = True

    def __init__(self, partitions: Sequence[FlatPartition]) -> None:
        self.num_steps = 0
        self.state = tuple({role: torch.zeros_like(p.parameter) for role in self.state_roles} for p in partitions)
        self._groups = _slice_groups(partitions, self.state)
        self._device = partitions[0].parameter.device if partitions else torch.device("cpu")

    @abstractmethod
    def _update(self, group: SliceGroup, gradients: list[Tensor], lr: float, grad_scale: Tensor | None) -> None:
        """Update one group in place; `grad_scale` (fp32 scalar) divides the gradients first."""

    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """Update all slices in place with learning rate `lr`; gradients are divided by `grad_scale` (and may change)."""
        scale = None
        if grad_scale != 1.0:
            scale = torch.full((), grad_scale, dtype=torch.float32, device=self._device)
        for group in self._groups:
            gradients, left = _prepared(group, grad_scale, scale if self.scales_by_itself else None)
            self._update(group, gradients, lr, left)
        self.num_steps += 1

    def read_gradients(self, partitions: Sequence[FlatPartition]) -> None:
        """Take gradients from `partitions` from now on; all else must be as in those that the optimizer was made with."""
        self._groups = _slice_groups(partitions, self.state)

    def state_dict(self) -> dict[str, Any]:
        """The scalars of the state, JSON-able; tensors are in `state`, one dict by role for each partition."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; the tensors are filled in place by whoever loads them."""
        self.num_steps = int(state["num_steps"])


OptimizerFactory = Callable[[Sequence[FlatPartition]], Optimizer]


def _slice_groups(
    partitions: Sequence[FlatPartition], states: Sequence[Mapping[str, Tensor]]
) -> tuple[SliceGroup, ...]:
    keys = sorted({segment.group for partition in partitions for segment in partition.segments})
    roles = list(states[0]) if states else []
    groups = []
    for key in keys:
        found = [(i, slice(s.start, s.stop)) for i, p in enumerate(partitions) for s in p.segments if s.group == key]
        groups.append(
            SliceGroup(
                key,
                tuple(partitions[i].parameter[at] for i, at in found),
                tuple(partitions[i].gradient[at] for i, at in found),
                {role: tuple(states[i][role][at] for i, at in found) for role in roles},
            )
        )
    return tuple(groups)


def _prepared(group: SliceGroup, grad_scale: float, scale: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    """Gradients in the master dtype, and the scale that is left for the fused call.

    The fused kernels take an fp32 scale, which would cost float64 its exactness: there, and where `scale` is None, it is
    applied here. Gradients change only where there is a scale.
    """
    master = group.parameters[0].dtype
    gradients = [g if g.dtype == master else g.to(master) for g in group.gradients]
    if scale is not None and master != torch.float64:
        return gradients, scale
    if grad_scale != 1.0:
        torch._foreach_div_(gradients, grad_scale)
    return gradients, None


def batches(*lists: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Parallel lists of tensors cut into runs, so that what is computed on the way never takes much memory at once."""
    start = numel = 0
    for stop, tensor in enumerate(lists[0]):
        if numel and numel + tensor.numel() > _BATCH_NUMEL:
            yield tuple(list(tensors[start:stop]) for tensors in lists)
            start, numel = stop, 0
        numel += tensor.numel()
    if numel:
        yield tuple(list(tensors[start:]) for tensors in lists)
