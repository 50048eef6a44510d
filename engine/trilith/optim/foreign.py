"""A torch optimizer that the user made, run over flat slices instead of the parameters it was made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trilith.errors import TrilithError
from trilith.optim.base import ElementwiseOptimizer, FlatPartition, SliceGroup
from trilith.optim.groups import GroupKey, GroupOf

# Their updates act on each element for itself, so that any cut of the parameters gives the same result.
_ELEMENTWISE = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.AdamW,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)


def groups_of_optimizer(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> GroupOf:
    """The index of a parameter's group in the user's optimizer, as a group rule; `named` are the trained parameters.

    Raises TrilithError where the optimizer cannot be run on flat slices, has state already, or lacks a parameter.
    """
    kind = type(optimizer).__name__
    if type(optimizer) not in _ELEMENTWISE:
        names = ", ".join(cls.__name__ for cls in _ELEMENTWISE)
        raise TrilithError(
            f"optimizer = {kind}: weights are partitioned element by element, so its update must treat each element for "
            f"itself, and only of torch's own is that known. Use one of {names}, or the config section `optimizer`"
        )
    if optimizer.state:
        raise TrilithError(f"optimizer = {kind}: it has taken steps already. Hand in a fresh one")
    index = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    missing = [name for name, parameter in named.items() if id(parameter) not in index]
    if missing:
        raise TrilithError(
            f"optimizer = {kind}: parameter {missing[0]} requires a gradient but is in no parameter group "
            f"({len(missing)} such). Add it, or freeze it with requires_grad_(False)"
        )
    keys = {name: (float(index[id(parameter)]),) for name, parameter in named.items()}

    def group_of(name: str, decay: bool) -> GroupKey:
        return keys[name]

    return group_of


class ForeignOptimizer(ElementwiseOptimizer):
    """Runs a torch optimizer over flat partitions; learning rates are those of its own parameter groups.

    The optimizer's groups are taken over: each holds slices of the master weights instead of the module's parameters.
    """

    def __init__(self, partitions: Sequence[FlatPartition], optimizer: torch.optim.Optimizer) -> None:
        super().__init__(partitions)
        self._optimizer = optimizer
        if any(partition.is_swapped for partition in partitions):
            raise TrilithError(
                f"optimizer = {type(optimizer).__name__}: it keeps its states itself, so they cannot live on disk. Use "
                'zero_optimization.offload_optimizer.device "cpu", or the config section `optimizer`'
            )
        self._slices = {
            (part, group.key): tuple(nn.Parameter(slice_) for slice_ in group.parameters)
            for part in range(len(partitions))
            for group in self.groups_of((part,))
        }
        for i, group in enumerate(optimizer.param_groups):
            group["params"] = [p for (_, key), slices in self._slices.items() if key == (float(i),) for p in slices]

    def step_parts(self, parts: tuple[int, ...], lr: float, grad_scale: float = 1.0) -> None:
        """Update slices in place; gradients are divided by `grad_scale` first. `lr` is the user's business."""
        stepped: list[nn.Parameter] = []
        for part in parts:
            for group in self.groups_of((part,)):
                gradients = [g.to(p.dtype) for g, p in zip(group.gradients, group.parameters, strict=True)]
                if grad_scale != 1.0:
                    torch._foreach_div_(gradients, grad_scale)
                for parameter, gradient in zip(self._slices[part, group.key], gradients, strict=True):
                    parameter.grad = gradient
                    stepped.append(parameter)
        self._optimizer.step()
        for parameter in stepped:
            parameter.grad = None

    def _update(self, group: SliceGroup, gradients: list[Tensor], lr: float, grad_scale: Tensor | None) -> None:
        raise AssertionError("a foreign optimizer updates all groups at once")

    def state_dict(self) -> dict[str, Any]:
        """The number of steps; the tensors are the torch optimizer's own."""
        return {"num_steps": self.num_steps}
