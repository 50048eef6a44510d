"""What every optimizer here is: elementwise updates over flat partitions, one fused call per parameter group.

An optimizer never sees a module or a parameter's name. ZeRO hands it, per unit, the part of the flat master weights
that this rank owns, the gradient beside it, and which runs of elements share multipliers; the state it keeps has the same
shape, so that it is partitioned, saved and resharded like the weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trilith.optim.groups import GroupKey, Segment


@dataclass(frozen=True)
class FlatPartition:
    """This rank's part of one unit.

    `parameter` (n,): master weights; `gradient` (n,): their gradient, in any dtype; `segments` cover both. `is_swapped`: it
    comes and goes, with its states; whoever brings them makes those zero that are new.
    """

    name: str
    parameter: Tensor
    gradient: Tensor
    segments: tuple[Segment, ...]
    is_swapped: bool = False


@dataclass(frozen=True)
class SliceGroup:
    """All slices of one parameter group, over all units: parallel lists of 1-D views."""

    key: GroupKey
    parameters: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    states: Mapping[str, tuple[Tensor, ...]]


class Optimizer(ABC):
    """Elementwise optimizer over flat partitions; children name their state tensors and update one group at a time."""

    state_roles: tuple[str, ...] = ()

    def __init__(self, partitions: Sequence[FlatPartition]) -> None:
        self.num_steps = 0
        self.state = tuple({role: _new_state(p) for role in self.state_roles} for p in partitions)
        self._partitions = tuple(partitions)
        self._groups: dict[tuple[int, ...], tuple[SliceGroup, ...]] = {}

    @abstractmethod
    def _update(self, group: SliceGroup, gradients: list[Tensor], lr: float, grad_scale: Tensor | None) -> None:
        """Update one group in place; `grad_scale` (fp32 scalar) divides the gradients first."""

    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """Update all slices in place with learning rate `lr`; gradients are divided by `grad_scale` (and may change)."""
        self.step_parts(tuple(range(len(self._partitions))), lr, grad_scale)
        self.end_step()

    def step_parts(self, parts: tuple[int, ...], lr: float, grad_scale: float = 1.0) -> None:
        """A part of a step: update the partitions of these numbers, all on one device. `end_step` ends it."""
        for group in self.groups_of(parts):
            scale = None
            if grad_scale != 1.0:
                scale = torch.full((), grad_scale, dtype=torch.float32, device=group.parameters[0].device)
            gradients, fused_scale = _prepared(group, grad_scale, scale)
            self._update(group, gradients, lr, fused_scale)

    def end_step(self) -> None:
        """All partitions are updated."""
        self.num_steps += 1

    def groups_of(self, parts: tuple[int, ...]) -> tuple[SliceGroup, ...]:
        """The slices of some partitions, by parameter group."""
        if parts not in self._groups:
            self._groups[parts] = _slice_groups([self._partitions[i] for i in parts], [self.state[i] for i in parts])
        return self._groups[parts]

    def read_gradients(self, partitions: Sequence[FlatPartition]) -> None:
        """Take gradients from `partitions` from now on; all else must be as in those that the optimizer was made with."""
        self._partitions = tuple(partitions)
        self._groups.clear()

    def state_dict(self) -> dict[str, Any]:
        """The scalars of the state, JSON-able; tensors are in `state`, one dict by role for each partition."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; the tensors are filled in place by whoever loads them."""
        self.num_steps = int(state["num_steps"])


OptimizerFactory = Callable[[Sequence[FlatPartition]], Optimizer]


def _new_state(partition: FlatPartition) -> Tensor:
    return (torch.empty_like if partition.is_swapped else torch.zeros_like)(partition.parameter)


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

    The fused kernels take an fp32 scale, which would cost float64 its exactness: there the scale is applied here.
    """
    master = group.parameters[0].dtype
    gradients = [g if g.dtype == master else g.to(master) for g in group.gradients]
    if scale is None or master != torch.float64:
        return gradients, scale
    torch._foreach_div_(gradients, grad_scale)
    return gradients, None
