"""The buffers of one unit on one rank, and how a module's parameters come to be views of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from trilith.models.base import LocalParameter
from trilith.optim.base import FlatPartition
from trilith.optim.clip import sum_of_squares
from trilith.precision import PrecisionPolicy
from trilith.zero.partition import (
    PlacedParameter,
    UnitLayout,
    counted_ranges,
    partition_range,
    partition_segments,
)


class DeclaredModule(Protocol):
    """What ZeRO needs of a module: declared local parameters, and torch's ways to find and replace them."""

    @property
    def local_parameters(self) -> Sequence[LocalParameter]:
        """The parameters, in the order of units; `name` is the path in the module."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As `nn.Module.named_parameters`."""

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """As `nn.Module.named_buffers`."""

    def get_submodule(self, target: str) -> nn.Module:
        """As `nn.Module.get_submodule`."""


@dataclass
class FlatUnit:
    """One unit's flat buffers on this rank, and the module's parameters that are views of them.

    `weight` (numel,) in the parameter dtype, whole on every data rank. `gradient` (numel,) in the accumulation dtype.
    `master` (partition,): the optimizer's weights; where they have the parameter dtype, a view of `weight`, unless
    there are several versions of it.
    `parameters` and `gradient_views` are parallel, in the layout's order. `start`, `stop`: this rank's partition.
    """

    stage: int
    layout: UnitLayout
    start: int
    stop: int
    weight: Tensor
    gradient: Tensor
    master: Tensor
    parameters: tuple[nn.Parameter, ...]
    gradient_views: tuple[Tensor, ...]
    counted: tuple[tuple[int, int], ...]

    @property
    def own_gradient(self) -> Tensor:
        """This rank's partition of the gradient (partition,)."""
        return self.gradient[self.start : self.stop]

    @property
    def own_weight(self) -> Tensor:
        """This rank's partition of the module's weights (partition,)."""
        return self.weight[self.start : self.stop]

    @property
    def has_master(self) -> bool:
        """Whether the master weights are a storage of their own."""
        return self.master.untyped_storage().data_ptr() != self.weight.untyped_storage().data_ptr()

    @property
    def master_role(self) -> str:
        """What a checkpoint calls the master weights: `weight` where rounding them for the module changes no bit."""
        return "weight" if self.master.dtype == self.weight.dtype else "master"

    def attach_gradients(self) -> None:
        """Let autograd accumulate into the flat buffer; only where both have one dtype."""
        for parameter, view in zip(self.parameters, self.gradient_views, strict=True):
            parameter.grad = view

    def collect_gradients(self) -> None:
        """Bring home gradients that left the flat buffer: the user may have set `.grad` to None or to a new tensor."""
        for parameter, view in zip(self.parameters, self.gradient_views, strict=True):
            if parameter.grad is not view:
                if parameter.grad is None:
                    view.zero_()
                else:
                    view.copy_(parameter.grad)
                parameter.grad = view

    def sum_of_squares(self) -> Tensor:
        """Float64 scalar: over the elements of this rank's partition that count here (replica 0)."""
        return sum_of_squares(self.own_gradient, self.counted)

    def partition(self) -> FlatPartition:
        """What the optimizer sees of this unit."""
        segments = partition_segments(self.layout, self.start, self.stop)
        return FlatPartition(f"stage{self.stage}/{self.layout.name}", self.master, self.own_gradient, segments)

    @torch.no_grad()
    def assign(self, offset: int, value: Tensor) -> None:
        """Set the elements from `offset` to the flattened `value`: rounded in `weight`, exactly in `master`."""
        flat = value.detach().reshape(-1)
        self.weight[offset : offset + flat.numel()].copy_(flat)
        if self.has_master:
            start, stop = max(offset, self.start), min(offset + flat.numel(), self.stop)
            if start < stop:
                self.master[start - self.start : stop - self.start].copy_(flat[start - offset : stop - offset])

    @torch.no_grad()
    def round_master(self) -> None:
        """Write this rank's partition of the weights from the master weights."""
        if self.has_master:
            self.own_weight.copy_(self.master)


def make_unit(
    stage: int,
    layout: UnitLayout,
    rank: int,
    module: DeclaredModule,
    device: torch.device,
    policy: PrecisionPolicy,
    *,
    frozen: bool = False,
) -> FlatUnit:
    """Allocate a unit's buffers on `device`, fill them from the module, and point the module's parameters into them.

    `rank`: which partition is this rank's. A `frozen` unit has weights only, in the parameter dtype. A parameter on the
    meta device has no value: it becomes zero until `assign`.
    """
    start, stop = partition_range(layout, rank)
    weight = torch.zeros(layout.numel, dtype=policy.param_dtype, device=device)
    gradient = torch.zeros(0 if frozen else layout.numel, dtype=policy.grad_accum_dtype, device=device)
    master = weight[start:stop]
    if policy.master_dtype != policy.param_dtype and not frozen:
        master = torch.zeros(stop - start, dtype=policy.master_dtype, device=device)
    named = dict(module.named_parameters(remove_duplicate=False))
    unit = FlatUnit(stage, layout, start, stop, weight, gradient, master, (), (), counted_ranges(layout, start, stop))
    parameters = []
    for place in layout.placed:
        old = named[place.parameter.name]
        assert old.shape == place.parameter.shape, (place.parameter.name, old.shape, place.parameter.shape)
        if old.device.type != "meta":
            unit.assign(place.offset, old)
        parameters.append(point_to(module, named, old, buffer_view(weight, place)))
    unit.parameters = tuple(parameters)
    if not frozen:
        unit.gradient_views = tuple(buffer_view(gradient, place) for place in layout.placed)
    return unit


def buffer_view(buffer: Tensor, place: PlacedParameter) -> Tensor:
    """The elements of a flat buffer that a placed parameter takes, in the parameter's shape."""
    return buffer[place.offset : place.stop].view(place.parameter.shape)


def point_to(
    module: DeclaredModule, named: Mapping[str, nn.Parameter], old: nn.Parameter, storage: Tensor
) -> nn.Parameter:
    """Make `storage` the data of the parameter `old` of `module`, under every name it has, and return the parameter.

    A parameter keeps its identity where torch allows it (same kind of device); from the meta device a new one takes its
    place.
    """
    if old.device.type == storage.device.type:
        old.grad = None
        old.data = storage
        return old
    new = nn.Parameter(storage, requires_grad=old.requires_grad)
    for name, parameter in named.items():
        if parameter is old:
            path, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(path), leaf, new)
    return new


def move_buffers(module: DeclaredModule, device: torch.device) -> int:
    """Bring a module's buffers to `device`; returns their bytes."""
    num_bytes = 0
    for name, buffer in module.named_buffers():
        assert buffer.device.type != "meta", f"buffer {name} has no values"
        moved = buffer.to(device)
        if moved is not buffer:
            path, _, leaf = name.rpartition(".")
            module.get_submodule(path)._buffers[leaf] = moved
        num_bytes += moved.numel() * moved.element_size()
    return num_bytes
