"""A torch optimizer that the user made, run over flat slices instead of the parameters it was made for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trilith.errors import TrilithError
from trilith.optim.base import ElementwiseOptimizer, FlatPartition, SliceGroup
from trilith.optim.groups import GroupKey, GroupOf
from trilith.optim.state_values import from_json, to_json

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
    Its state tensors become slices, too, of one tensor per role and partition, so that they are saved and cut anew as
    those of every optimizer.
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

    def step_parts(self, parts: tuple[int, ...], lr: float, grad_scale: float = 1.0) -> bool:
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
        self._take_over(parts)
        return False

    def _update(self, group: SliceGroup, gradients: list[Tensor], lr: float, grad_scale: Tensor | None) -> None:
        raise AssertionError("a foreign optimizer updates all groups at once")

    # ---- state --------------------------------------------------------------------------------------------------

    def _parts(self) -> Iterator[tuple[int, GroupKey, slice, nn.Parameter]]:
        """(partition, group, place in the partition, parameter) of every slice."""
        for (index, key), slices in self._slices.items():
            places = [slice(s.start, s.stop) for s in self._partitions[index].segments if s.group == key]
            for at, parameter in zip(places, slices, strict=True):
                yield index, key, at, parameter

    def _take_over(self, parts: tuple[int, ...]) -> None:
        """Make the state tensors that the optimizer has made for some partitions slices of ours."""
        for index, _, at, parameter in self._parts():
            if index in parts:
                state = self._optimizer.state[parameter]
                for role, value in state.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        own = self._room(index, role, value.dtype)[at]
                        if own.data_ptr() != value.data_ptr():
                            state[role] = own.copy_(value)

    def _room(self, index: int, role: str, dtype: torch.dtype) -> Tensor:
        """The tensor that holds the states of one role of a partition."""
        parameter = self._partitions[index].parameter
        if role not in self.state[index]:
            self.state[index][role] = torch.zeros_like(parameter, dtype=dtype)
        return self.state[index][role]

    def make_room(self, state: Mapping[str, Any]) -> None:
        """Have a tensor for every role of a merged `state_dict`, on every rank, to be saved or filled."""
        for group in state["groups"]:
            for role, dtype in group["roles"].items():
                for index in range(len(self._partitions)):
                    self._room(index, role, getattr(torch, dtype))

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, and of each group its options and what is no tensor of the weights' size; JSON-able.

        A rank knows nothing of groups it has no slice of: see `merged`.
        """
        groups = []
        for i, group in enumerate(self._optimizer.param_groups):
            options = {name: value for name, value in group.items() if name != "params"}
            first = next((parameter for _, key, _, parameter in self._parts() if key == (float(i),)), None)
            roles, others = {}, {}
            for role, value in ({} if first is None else self._optimizer.state.get(first, {})).items():
                assert first is not None
                if isinstance(value, Tensor) and value.shape == first.shape:
                    roles[role] = str(value.dtype).removeprefix("torch.")
                else:
                    others[role] = value
            what = f"optimizer = {type(self._optimizer).__name__}"
            groups.append({"options": to_json(options, what), "roles": roles, "others": to_json(others, what)})
        return {"num_steps": self.num_steps, "kind": type(self._optimizer).__name__, "groups": groups}

    @staticmethod
    def merged(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The `state_dict`s of all ranks as one: every group as a rank that has a slice of it knows it."""
        groups = [
            next((group for group in members if group["roles"] or group["others"] != {"dict": []}), members[0])
            for members in zip(*(state["groups"] for state in states), strict=True)
        ]
        return {**states[0], "groups": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a merged `state_dict()`, whose tensors `make_room` has made; options of groups, too.

        Raises TrilithError for the state of another optimizer.
        """
        mine, saved = self._optimizer.param_groups, state.get("groups", [])
        if state.get("kind") != type(self._optimizer).__name__ or len(saved) != len(mine):
            raise TrilithError(
                f"optimizer = {type(self._optimizer).__name__} with {len(mine)} groups: the checkpoint is "
                f"of {state.get('kind', 'the config section `optimizer`')} with {len(saved)}. Use that of the "
                "run that saved it"
            )
        super().load_state_dict(state)
        for i, (group, kept) in enumerate(zip(mine, saved, strict=True)):
            for name, value in from_json(kept["options"]).items():
                if isinstance(group.get(name), Tensor):
                    group[name].fill_(float(value))
                else:
                    group[name] = value
            moves = bool(group.get("fused") or group.get("capturable"))
            for index, key, at, parameter in self._parts():
                if key != (float(i),):
                    continue
                others = from_json(kept["others"])
                for role, value in others.items():
                    if isinstance(value, Tensor) and moves:
                        others[role] = value.to(parameter.device)
                self._optimizer.state[parameter] = {
                    **others,
                    **{role: self.state[index][role][at] for role in kept["roles"]},
                }
