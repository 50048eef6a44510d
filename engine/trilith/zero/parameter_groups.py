"""How parameters are dealt to groups with options of their own, and which optimizer runs over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trilith.config import Config
from trilith.errors import TrilithError
from trilith.kernels.backends import chosen
from trilith.optim.foreign import ForeignOptimizer, groups_of_optimizer
from trilith.optim.groups import GroupKey, GroupOf, multipliers
from trilith.optim.make import make_optimizer, needs_whole_tensors
from trilith.zero.declared import Declared
from trilith.zero.sharded import Sharding

ModelParameters = Iterable[nn.Parameter] | Iterable[Mapping[str, Any]]
_OPTIONS = frozenset({"params", "lr", "weight_decay", "name"})


@dataclass(frozen=True)
class Given:
    """What the user hands in besides the model: an optimizer, or parameter groups for the config's; a scheduler."""

    optimizer: torch.optim.Optimizer | None = None
    lr_scheduler: Any = None
    model_parameters: ModelParameters | None = None


def sharding_for(declared: Declared, module: nn.Module, config: Config, given: Given) -> Sharding:
    """What ZeRO must know of the model and its optimizer. Raises TrilithError for what cannot be trained so."""
    units = tuple(dict.fromkeys(parameter.flat_unit for parameter in declared.local_parameters))
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    optimizer = given.optimizer
    if optimizer is None:
        rule = multipliers(config.optimizer.param_groups)
        if given.model_parameters is not None:
            rule = groups_of_parameters(given.model_parameters, trained, config, rule)
        whole = needs_whole_tensors(config.optimizer)
        factory = make_optimizer(config.optimizer, backend=chosen(config.kernels).optimizer)
        return Sharding(units, frozenset(), rule, factory, whole_tensors=whole)
    if given.model_parameters is not None:
        raise TrilithError("model_parameters: an own optimizer has its parameters already. Hand in one of the two")
    own = groups_of_optimizer(optimizer, trained)
    return Sharding(
        units,
        frozenset(),
        lambda name, decay: own(name, decay) if name in trained else (0.0,),
        lambda partitions: ForeignOptimizer(partitions, optimizer),
    )


def groups_of_parameters(
    given: ModelParameters, trained: Mapping[str, nn.Parameter], config: Config, rule: GroupOf
) -> GroupOf:
    """The rule of parameter groups as torch's optimizers take them, for the config's optimizer.

    A group's `lr` and `weight_decay` take the place of the config's, as multiples of it, so that a schedule scales them
    along; what a group does not say, `rule` says. Raises TrilithError for other options and for a parameter left out.
    """
    members = list(given)
    groups: list[Mapping[str, Any]] = []
    if all(isinstance(member, Mapping) for member in members):
        groups = [member for member in members if isinstance(member, Mapping)]
    else:
        groups = [{"params": members}]
    found: dict[int, Mapping[str, Any]] = {}
    for number, group in enumerate(groups):
        others = sorted(set(group) - _OPTIONS)
        if others:
            raise TrilithError(
                f"model_parameters[{number}].{others[0]}: the config's optimizer takes lr and weight_decay per group. "
                "Leave it out, or hand in an own optimizer"
            )
        params = group["params"]
        found.update((id(p), group) for p in ([params] if isinstance(params, nn.Parameter) else params))
    missing = [name for name, parameter in trained.items() if id(parameter) not in found]
    if missing:
        raise TrilithError(
            f"model_parameters: parameter {missing[0]} requires a gradient but is in none of the groups ({len(missing)} "
            "such). Add it, or freeze it with requires_grad_(False)"
        )
    group_by_name = {name: found[id(parameter)] for name, parameter in trained.items()}
    base = config.optimizer.params

    def group_of(name: str, decay: bool) -> GroupKey:
        lr_mult, decay_mult = rule(name, decay)
        group = group_by_name.get(name, {})
        if "lr" in group:
            lr_mult = _multiple("lr", float(group["lr"]), base.lr)
        if "weight_decay" in group:
            decay_mult = _multiple("weight_decay", float(group["weight_decay"]), base.weight_decay)
        return (lr_mult, decay_mult)

    return group_of


def _multiple(name: str, value: float, base: float) -> float:
    if value and not base:
        raise TrilithError(
            f"model_parameters: {name} = {value}: is kept as a multiple of optimizer.params.{name}, which is 0"
        )
    return value / base if base else 0.0
