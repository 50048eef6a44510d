"""The buffers of one unit on one rank, and how a module's parameters come to be views of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from trilith.errors import TrilithError
from trilith.kernels.weight_queue import Deferred
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
    partition_tensors,
)
from trilith.zero.placement import ON_DEVICE, Moved, Placement, Tier
from trilith.zero.swap import State, Swapped

HOST = torch.device("cpu")


class DeclaredModule(Protocol):
    """What ZeRO needs of a module: declared local parameters, and torch's ways to find and replace them."""

    @property
    def local_parameters(self) -> Sequence[LocalParameter]:
        """The parameters, in the order of units; `name` is the path in the module."""

    def home_of(self, name: str) -> str:
        """The path of the module whose call brackets every use of the parameter called `name`."""

    def homes(self) -> Sequence[str] | None:
        """The homes in the order in which one forward calls them; None where that is not known."""

    def home(self, path: str) -> nn.Module:
        """The module at `path`, to be hooked."""

    def weightless_backwards(self) -> Collection[str]:
        """Homes whose backward does not read their weights."""

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


@dataclass(frozen=True)
class Keeping:
    """What a rank keeps of a unit. `rank`: which partition is its own.

    `whole_gradient`: over the microbatches of a step, else only its partition. `whole_weight`: always, else between
    `unshard` and `reshard`. A `frozen` unit has no gradient. `placement`: where its parts lie; in host memory they are
    page-locked if `pinned`, and what lies on the device then is rounded in host memory before it goes up.
    """

    rank: int
    whole_gradient: bool = True
    whole_weight: bool = True
    frozen: bool = False
    placement: Placement = ON_DEVICE
    pinned: bool = False


@dataclass
class FlatUnit:
    """One unit's flat buffers on this rank, and the module's parameters that are views of them.

    `weight` (numel,) in the parameter dtype; at stage 3 its storage is empty while the unit is not whole, and `shard`
    (partition,) holds this rank's part. `gradient` in the accumulation dtype: (numel,), or (partition,) where it is
    reduced after every microbatch, then beside the states. `master` (partition,): the optimizer's weights; where they have
    the parameter dtype, a view of `weight` or `shard`, unless there are several versions of it, or they lie elsewhere.
    `parameters`, `weight_views`, `gradient_views` are parallel, in the layout's order. `start`, `stop`: this rank's
    partition. `optimizer_gradient`: where a whole gradient's part is taken to, if the states lie elsewhere; `rounded`
    (partition,): page-locked memory beside the states where weights are rounded that go up to the device.
    `states_swap`, `shard_swap`: master and optimizer states, and the shard, while they live on disk. `moved` counts for
    the whole rank. `written`: the parameters whose gradients come as products: `forget_gradient` need not zero them.
    """

    stage: int
    layout: UnitLayout
    start: int
    stop: int
    weight: Tensor
    gradient: Tensor
    master: Tensor
    parameters: tuple[nn.Parameter, ...]
    weight_views: tuple[Tensor, ...]
    gradient_views: tuple[Tensor, ...]
    counted: tuple[tuple[int, int], ...]
    has_whole_gradient: bool = True
    shard: Tensor | None = None
    placement: Placement = ON_DEVICE
    optimizer_gradient: Tensor | None = None
    rounded: Tensor | None = None
    states_swap: Swapped | None = None
    shard_swap: Swapped | None = None
    moved: Moved = field(default_factory=Moved)
    written: set[int] = field(default_factory=set)

    @property
    def own_gradient(self) -> Tensor:
        """This rank's partition of the gradient (partition,)."""
        return self.gradient[self.start : self.stop] if self.has_whole_gradient else self.gradient

    @property
    def own_weight(self) -> Tensor:
        """This rank's partition of the module's weights (partition,)."""
        return self.weight[self.start : self.stop] if self.shard is None else self.shard

    @property
    def is_frozen(self) -> bool:
        """Whether there is no gradient."""
        return self.gradient.numel() == 0

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are whole only between `unshard` and `reshard`."""
        return self.shard is not None

    @property
    def has_master(self) -> bool:
        """Whether the master weights are a storage of their own."""
        return self.master.untyped_storage()._cdata != self.own_weight.untyped_storage()._cdata

    @property
    def master_role(self) -> str:
        """What a checkpoint calls the master weights: `weight` where rounding them for the module changes no bit."""
        return "weight" if self.master.dtype == self.weight.dtype else "master"

    @property
    def whole_bytes(self) -> int:
        """Bytes of the whole weights."""
        return self.layout.numel * self.weight.element_size()

    def unshard(self) -> Tensor:
        """Give the weights their storage, not filled, and return it to be written to: (numel,).

        Autograd does not see what is written: the values that it saved are there again.
        """
        self.weight.untyped_storage().resize_(self.whole_bytes)
        return self.weight.data

    def read_shard(self, target: Tensor) -> None:
        """Copy this rank's part of the weights from host memory or disk to `target` (partition,) on the device."""
        assert self.shard is not None
        swap = self.shard_swap
        was_open = swap is not None and swap.state is State.PRESENT  # then others may have changed it
        if swap is not None:
            swap.wait()
        target.copy_(self.shard, non_blocking=True)
        self.moved.host_to_device += self.shard.numel() * self.shard.element_size()
        if swap is not None and not was_open:
            swap.drop()

    def show(self) -> None:
        """The weights are whole: let the module's parameters be views of them."""
        for parameter, view in zip(self.parameters, self.weight_views, strict=True):
            parameter.data = view

    def reshard(self) -> None:
        """Free the whole weights. Until they are gathered again the parameters hold NaN, in their shape, without storage.

        What autograd saved shares the buffer's storage, which is empty, and finds its values there when it is filled.
        """
        missing = torch.full((), torch.nan, dtype=self.weight.dtype, device=self.weight.device)
        for parameter, view in zip(self.parameters, self.weight_views, strict=True):
            parameter.data = missing.expand(view.shape)
        try:
            self.weight.untyped_storage().resize_(0)
        except RuntimeError:
            raise TrilithError(
                f"unit {self.layout.name}: its weights cannot be let go, because something outside of torch holds their "
                "memory (`parameter.numpy()`?). Look at a copy instead: `parameter.detach().clone()`"
            ) from None

    @torch.no_grad()
    def collect_weights(self) -> None:
        """Bring home weights that left the flat buffer while they were whole: the user may have set `.data`."""
        for parameter, view in zip(self.parameters, self.weight_views, strict=True):
            if parameter.data_ptr() != view.data_ptr():
                view.data.copy_(parameter.data)
                parameter.data = view

    @torch.no_grad()
    def take_weight(self) -> None:
        """The whole weights were changed: shard and masters follow. A master that rounds to what is there stays exact."""
        own = self.weight.data[self.start : self.stop]
        if self.shard is not None:
            self.shard.copy_(own)
        if self.has_master:
            own = own.to(self.master.device)
            changed = self.master.to(own.dtype) != own
            self.master.copy_(torch.where(changed, own.to(self.master.dtype), self.master))

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

    def add_product(self, index: int, product: Deferred) -> None:
        """Add a product to the gradient of parameter number `index`; after `forget_gradient` the first is written there."""
        parameter, view = self.parameters[index], self.gradient_views[index]
        if view.dtype != product.x.dtype or parameter.grad is view:
            view.add_(product.gradient())
        else:
            before, parameter.grad = parameter.grad, view
            product.gradient(out=view)
            if before is not None:
                view.add_(before)
        if view.dtype == product.x.dtype:
            self.written.add(index)

    def forget_gradient(self) -> None:
        """Make the gradient zero; where it is `written` next, let go of it: `collect_gradients` zeroes what was not."""
        if not self.written:
            self.gradient.zero_()
            return
        rest = []
        for index, view in enumerate(self.gradient_views):
            if index in self.written:
                self.parameters[index].grad = None
            else:
                rest.append(view)
        if rest:
            torch._foreach_zero_(rest)

    def sum_of_squares(self) -> Tensor:
        """Float64 scalar: over the elements of this rank's partition that count here (replica 0)."""
        return sum_of_squares(self.own_gradient, self.counted)

    @property
    def can_be_rounded_early(self) -> bool:
        """Whether the optimizer may round the master weights into the module's as it updates them: they lie together."""
        is_together = self.rounded is not None or self.own_weight.device == self.master.device
        return self.has_master and self.shard_swap is None and is_together

    def partition(self, whole_tensors: bool = False, with_weight: bool = False) -> FlatPartition:
        """What the optimizer sees of this unit; with `whole_tensors` also which tensors lie in it, `with_weight` also the
        module's weights where it may round updates into them."""
        segments = partition_segments(self.layout, self.start, self.stop)
        gradient = self.own_gradient if self.optimizer_gradient is None else self.optimizer_gradient
        name = f"stage{self.stage}/{self.layout.name}"
        tensors = partition_tensors(self.layout, self.start, self.stop) if whole_tensors else ()
        weight = None
        if with_weight and self.can_be_rounded_early:
            weight = self.own_weight if self.rounded is None else self.rounded
        return FlatPartition(name, self.master, gradient, segments, tensors, self.states_swap is not None, weight)

    @torch.no_grad()
    def assign(self, offset: int, value: Tensor) -> None:
        """Set the elements from `offset` to the flattened `value`: rounded in the weights, exactly in `master`."""
        flat = value.detach().reshape(-1)
        if not self.is_sharded:
            self.weight[offset : offset + flat.numel()].copy_(flat)
        start, stop = max(offset, self.start), min(offset + flat.numel(), self.stop)
        if start < stop:
            own = flat[start - offset : stop - offset]
            for part in (
                *([self.shard] if self.shard is not None else []),
                *([self.master] if self.has_master else []),
            ):
                part[start - self.start : stop - self.start].copy_(own)

    @torch.no_grad()
    def round_master(self) -> None:
        """Write this rank's partition of the weights, or of what goes up to them, from the master weights."""
        if self.has_master:
            (self.own_weight if self.rounded is None else self.rounded).copy_(self.master)


def make_unit(
    stage: int,
    layout: UnitLayout,
    keeping: Keeping,
    module: DeclaredModule,
    device: torch.device,
    policy: PrecisionPolicy,
) -> FlatUnit:
    """Allocate a unit's buffers on `device`, fill them from the module, and point the module's parameters into them.

    A frozen unit has weights only, in the parameter dtype. A parameter on the meta device has no value: it becomes zero
    until `assign`. A unit that is not to be whole is not, when this returns.
    """
    start, stop = partition_range(layout, keeping.rank)
    weight = torch.empty(layout.numel, dtype=policy.param_dtype, device=device)
    states, weights = keeping.placement.states, keeping.placement.weights

    def own(tier: Tier, dtype: torch.dtype) -> Tensor:
        where = device if tier is Tier.DEVICE else HOST
        return torch.zeros(stop - start, dtype=dtype, device=where, pin_memory=keeping.pinned and where is HOST)

    shard = None if keeping.whole_weight else own(weights, policy.param_dtype)
    if keeping.whole_weight:
        weight.zero_()
    if keeping.frozen or keeping.whole_gradient:
        num_gradients = 0 if keeping.frozen else layout.numel
        gradient = torch.zeros(num_gradients, dtype=policy.grad_accum_dtype, device=device)
    else:
        gradient = own(states, policy.grad_accum_dtype)
    master = weight[start:stop] if shard is None else shard
    is_elsewhere = states is not Tier.DEVICE and not keeping.frozen
    is_apart = policy.master_dtype != policy.param_dtype or not states is weights is Tier.DEVICE
    if is_apart and not keeping.frozen:
        master = own(states, policy.master_dtype)
    goes_up = keeping.pinned and is_elsewhere and weights is Tier.DEVICE
    views = tuple(buffer_view(weight, place) for place in layout.placed)
    counted = counted_ranges(layout, start, stop)
    unit = FlatUnit(
        *(stage, layout, start, stop, weight, gradient, master, (), views, (), counted, keeping.whole_gradient, shard),
        placement=keeping.placement,
        optimizer_gradient=own(states, policy.grad_accum_dtype) if is_elsewhere and keeping.whole_gradient else None,
        rounded=own(Tier.HOST, policy.param_dtype) if goes_up else None,
    )
    named = dict(module.named_parameters(remove_duplicate=False))
    parameters = []
    for place, view in zip(layout.placed, views, strict=True):
        old = named[place.parameter.name]
        assert old.shape == place.parameter.shape, (place.parameter.name, old.shape, place.parameter.shape)
        if old.device.type != "meta":
            unit.assign(place.offset, old)
        parameters.append(point_to(module, named, old, view))
    unit.parameters = tuple(parameters)
    if not keeping.frozen and keeping.whole_gradient:
        unit.gradient_views = tuple(buffer_view(gradient, place) for place in layout.placed)
    if not keeping.whole_weight:
        unit.reshard()
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


def add_bytes(found: dict[str, int], tier: Tier, category: str, tensors: Sequence[Tensor]) -> None:
    """Count tensors, if there are any, under the category of a tier."""
    if not tensors:
        return
    name = {Tier.DEVICE: category, Tier.HOST: f"host_{category}", Tier.DISK: f"disk_{category}"}[tier]
    found[name] = found.get(name, 0) + bytes_of(tensors)


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of the elements of `tensors`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
