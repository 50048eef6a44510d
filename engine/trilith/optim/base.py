"""What every optimizer here is: updates over flat partitions, elementwise in one fused call per parameter group.

An optimizer never sees a module. ZeRO hands it, per unit, the part of the flat master weights that this rank owns, the
gradient beside it, and which runs of elements share multipliers; the state it keeps has the same shape, so that it is
partitioned, saved and resharded like the weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trilith.kernels.ops import optimizer
from trilith.kernels.ops.optimizer import Clipping, GradScale, Slices
from trilith.optim.groups import GroupKey, Segment
from trilith.sharding import ShardSpec

BATCH_NUMEL = 1 << 24


@dataclass(frozen=True)
class FlatPartition:
    """This rank's part of one unit.

    `parameter` (n,): master weights; `gradient` (n,): their gradient, in any dtype; `segments` cover both. `tensors`, for
    optimizers that need them whole: what lies here of each canonical tensor, offsets counted from the part's beginning;
    the same tensors in the same order on all tensor ranks. `is_swapped`: it comes and goes, with its states; whoever
    brings them makes those zero that are new. `weight` (n,): the module's own weights, in any dtype, where the master
    weights lie beside them and are apart from them: an optimizer may round each update into it on the way.
    """

    name: str
    parameter: Tensor
    gradient: Tensor
    segments: tuple[Segment, ...]
    tensors: tuple[ShardSpec, ...] = ()
    is_swapped: bool = False
    weight: Tensor | None = None


@dataclass(frozen=True)
class SliceGroup:
    """All slices of one parameter group, over all units: parallel lists of 1-D views."""

    key: GroupKey
    parameters: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    states: Mapping[str, tuple[Tensor, ...]]


class Optimizer(ABC):
    """An optimizer over flat partitions; children name their state tensors.

    `state`: by partition one tensor for each role, beginning where the partition does. `needs_whole_tensors`: whether each
    parameter must lie whole in one partition, and partitions must say which `tensors` they hold.
    """

    state_roles: tuple[str, ...] = ()
    needs_whole_tensors = False

    def __init__(self, partitions: Sequence[FlatPartition]) -> None:
        self.num_steps = 0
        self.state = tuple(self._new_state(partition) for partition in partitions)
        self._everything = tuple(range(len(partitions)))

    def _new_state(self, partition: FlatPartition) -> dict[str, Tensor]:
        return {role: blank(partition, partition.parameter) for role in self.state_roles}

    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """Update everything in place with learning rate `lr`; gradients are divided by `grad_scale` first.

        They change only where `grad_scale` is not 1.
        """
        self.step_parts(self._everything, lr, grad_scale)
        self.end_step()

    @abstractmethod
    def step_parts(self, parts: tuple[int, ...], lr: float, grad_scale: float = 1.0) -> bool:
        """A part of a step: update the partitions of these numbers, all on one device. `end_step` ends the step.

        True where the `weight` of each of them was written as well.
        """

    def clips(self, parts: tuple[int, ...]) -> bool:
        """Whether `step_clipped` updates the partitions of these numbers."""
        return False

    def step_clipped(self, parts: tuple[int, ...], lr: float, clipping: Clipping) -> bool:
        """`step_parts`, with gradients clipped by a norm that only their device knows."""
        raise AssertionError(f"{type(self).__name__} clips nothing")

    def end_step(self) -> None:
        """All partitions are updated."""
        self.num_steps += 1

    @abstractmethod
    def rebind(self, partitions: Sequence[FlatPartition]) -> None:
        """Take weights and gradients of `partitions`, and the tensors of `state`, from where they are now.

        All else must be as in the partitions that the optimizer was made with.
        """

    def keeps(self, role: str, name: str) -> bool:
        """Whether the state `role` has a meaning for the canonical tensor `name`; a checkpoint leaves out what has none."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """The scalars of the state, JSON-able; tensors are in `state`, one dict by role for each partition."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; the tensors are filled in place by whoever loads them."""
        self.num_steps = int(state["num_steps"])


class ElementwiseOptimizer(Optimizer):
    """Updates each element for itself, so that any cut of the parameters gives the same result.

    Where there is a native optimizer (`has_kernel`) and it takes the tensors, all slices in one pass, else one group at a
    time. `scales_by_itself`: whether `_update` divides by `grad_scale`, so that it need not be done before, in another
    pass. `backend`: which implementation updates (config key `kernels.optimizer`).
    """

    scales_by_itself = True
    has_kernel = False

    def __init__(self, partitions: Sequence[FlatPartition], backend: str = "auto") -> None:
        super().__init__(partitions)
        self._backend = backend
        self._partitions = tuple(partitions)
        self._groups: dict[tuple[int, ...], tuple[SliceGroup, ...]] = {}
        self._native: dict[tuple[int, ...], Slices | None] = {}

    @abstractmethod
    def _update(self, group: SliceGroup, gradients: list[Tensor], lr: float, grad_scale: Tensor | None) -> None:
        """Update one group in place; `grad_scale` (fp32 scalar) divides the gradients first."""

    def _update_slices(self, slices: Slices, lr: float, grad_scale: GradScale) -> None:
        """Update all slices in place natively; gradients are divided by `grad_scale` on the way, and keep their values."""
        raise AssertionError(f"{type(self).__name__} has no kernel")

    def clips(self, parts: tuple[int, ...]) -> bool:
        """The native optimizers do."""
        return self._native_slices(parts) is not None

    def step_clipped(self, parts: tuple[int, ...], lr: float, clipping: Clipping) -> bool:
        """Natively."""
        slices = self._native_slices(parts)
        assert slices is not None, "asked for without `clips`"
        self._update_slices(slices, lr, clipping)
        return bool(slices.weights)

    def step_parts(self, parts: tuple[int, ...], lr: float, grad_scale: float = 1.0) -> bool:
        """Update the slices of some partitions in place; True where their `weight`s were written."""
        slices = self._native_slices(parts)
        if slices is not None:
            self._update_slices(slices, lr, grad_scale)
            return bool(slices.weights)
        for group in self.groups_of(parts):
            master, scale = group.parameters[0].dtype, None
            if grad_scale != 1.0 and self.scales_by_itself:
                scale = torch.full((), grad_scale, dtype=torch.float32, device=group.parameters[0].device)
            # The fused kernels take an fp32 scale, which would cost float64 its exactness.
            is_left = scale is not None and master != torch.float64
            gradients = unscaled(group.gradients, master, 1.0 if is_left else grad_scale)
            self._update(group, gradients, lr, scale if is_left else None)
        return False

    def _native_slices(self, parts: tuple[int, ...]) -> Slices | None:
        """The slices of some partitions, if the native optimizer takes them."""
        if not self.has_kernel:
            return None
        if parts not in self._native:
            partitions, states = [self._partitions[i] for i in parts], [self.state[i] for i in parts]
            is_native = _are_native(partitions, states, self._backend)
            self._native[parts] = _all_slices(partitions, states) if is_native else None
        return self._native[parts]

    def groups_of(self, parts: tuple[int, ...]) -> tuple[SliceGroup, ...]:
        """The slices of some partitions, by parameter group."""
        if parts not in self._groups:
            self._groups[parts] = _slice_groups([self._partitions[i] for i in parts], [self.state[i] for i in parts])
        return self._groups[parts]

    def rebind(self, partitions: Sequence[FlatPartition]) -> None:
        """Take weights and gradients of `partitions`, and the tensors of `state`, from where they are now."""
        self._partitions = tuple(partitions)
        self._groups.clear()
        self._native.clear()


OptimizerFactory = Callable[[Sequence[FlatPartition]], Optimizer]


def blank(partition: FlatPartition, like: Tensor) -> Tensor:
    """A new state of the shape of `like`: zeros, or nothing yet where the partition is swapped."""
    return (torch.empty_like if partition.is_swapped else torch.zeros_like)(like)


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


def _are_native(partitions: Sequence[FlatPartition], states: Sequence[Mapping[str, Tensor]], backend: str) -> bool:
    return all(
        optimizer.is_native(partition.parameter, partition.gradient, list(state.values()), partition.weight, backend)
        for partition, state in zip(partitions, states, strict=True)
    )


def _all_slices(partitions: Sequence[FlatPartition], states: Sequence[Mapping[str, Tensor]]) -> Slices:
    found = [(i, s, slice(s.start, s.stop)) for i, p in enumerate(partitions) for s in p.segments]
    weights = [p.weight for p in partitions if p.weight is not None]
    is_rounded = len(weights) == len(partitions)
    return Slices(
        tuple(partitions[i].parameter[at] for i, _, at in found),
        tuple(partitions[i].gradient[at] for i, _, at in found),
        [tuple(states[i][role][at] for i, _, at in found) for role in (states[0] if states else ())],
        tuple(weights[i][at] for i, _, at in found) if is_rounded else (),
        torch.tensor([segment.group for _, segment, _ in found], dtype=torch.float64).view(-1, 2),
    )


def unscaled(gradients: Sequence[Tensor], master: torch.dtype, grad_scale: float) -> list[Tensor]:
    """Gradients in the `master` dtype divided by `grad_scale`: in place where they have it, which 1 leaves as they are."""
    converted = [g if g.dtype == master else g.to(master) for g in gradients]
    if grad_scale != 1.0 and converted:
        torch._foreach_div_(converted, grad_scale)
    return converted


def runs(numels: Iterable[int]) -> Iterator[slice]:
    """Cuts a list of tensors of so many elements into runs that are not large together (one tensor may be)."""
    start = stop = numel = 0
    for size in numels:
        if numel and numel + size > BATCH_NUMEL:
            yield slice(start, stop)
            start, numel = stop, 0
        stop, numel = stop + 1, numel + size
    if numel:
        yield slice(start, stop)


def batches(*lists: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Parallel lists of tensors cut into runs, so that what is computed on the way never takes much memory at once."""
    for run in runs(tensor.numel() for tensor in lists[0]):
        yield tuple(list(tensors[run]) for tensors in lists)
