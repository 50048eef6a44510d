"""The config section `optimizer` as an optimizer."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from trilith.optim.adagrad import Adagrad, AdagradOptions
from trilith.optim.adamw import Adam, AdamOptions
from trilith.optim.base import OptimizerFactory
from trilith.optim.lamb import Lamb, LambOptions
from trilith.optim.lion import Lion, LionOptions
from trilith.optim.muon import IsMatrix, Muon, MuonOptions, is_hidden_matrix
from trilith.optim.sgd import SGD, SGDOptions
from trilith.optim.whole import ALONE
from trilith.topology import Group


def make_optimizer(config: Any, tp: Group = ALONE, backend: str = "auto") -> OptimizerFactory:
    """A factory for the resolved config section `optimizer`: from flat partitions to an optimizer over them.

    `"Adam"` means AdamW unless `params.adam_w_mode` is false, as in DeepSpeed. `tp`: the tensor-parallel group, over which
    optimizers that treat tensors as a whole communicate. `backend`: which implementation updates (config key
    `kernels.optimizer`).
    """
    return _MAKERS[config.type](config, tp, backend)


def needs_whole_tensors(config: Any) -> bool:
    """Whether the optimizer of the section `optimizer` needs every parameter whole in one partition."""
    return config.type in ("Lamb", "Muon")


def _adam(config: Any, tp: Group, backend: str) -> OptimizerFactory:
    params = config.params
    options = AdamOptions(
        betas=(params.betas[0], params.betas[1]),
        eps=params.eps,
        weight_decay=params.weight_decay,
        decoupled_decay=config.decoupled_decay,
        bias_correction=params.bias_correction,
    )
    return lambda partitions: Adam(partitions, options, backend)


def _sgd(config: Any, tp: Group, backend: str) -> OptimizerFactory:
    params = config.params
    options = SGDOptions(params.momentum, params.dampening, params.nesterov, params.weight_decay)
    return lambda partitions: SGD(partitions, options, backend)


def _lion(config: Any, tp: Group, backend: str) -> OptimizerFactory:
    options = LionOptions((config.params.betas[0], config.params.betas[1]), config.params.weight_decay)
    return lambda partitions: Lion(partitions, options, backend)


def _adagrad(config: Any, tp: Group, backend: str) -> OptimizerFactory:
    params = config.params
    options = AdagradOptions(params.eps, params.weight_decay, params.lr_decay, params.initial_accumulator_value)
    return lambda partitions: Adagrad(partitions, options)


def _lamb(config: Any, tp: Group, backend: str) -> OptimizerFactory:
    params = config.params
    options = LambOptions(
        betas=(params.betas[0], params.betas[1]),
        eps=params.eps,
        weight_decay=params.weight_decay,
        bias_correction=params.bias_correction,
        max_coeff=params.max_coeff,
        min_coeff=params.min_coeff,
        eps_inside_sqrt=params.eps_inside_sqrt,
        always_adapts=params.always_adapt,
    )
    return lambda partitions: Lamb(partitions, options, tp)


def _muon(config: Any, tp: Group, backend: str) -> OptimizerFactory:
    params = config.params
    options = MuonOptions(
        momentum=params.momentum,
        nesterov=params.nesterov,
        weight_decay=params.weight_decay,
        num_iterations=params.ns_steps,
        matches_adamw=params.adjust_lr_fn == "match_rms_adamw",
        low_precision=params.ns_dtype == "bf16",
        lr_factor=1.0 if params.muon_lr is None else params.muon_lr / params.lr,
        adam_lr_factor=1.0 if params.adam_lr is None else params.adam_lr / params.lr,
        adam=AdamOptions((params.betas[0], params.betas[1]), params.eps, params.weight_decay),
        is_matrix=_matrix_rule(config.param_groups),
    )
    return lambda partitions: Muon(partitions, options, tp, backend)


def _matrix_rule(param_groups: Any) -> IsMatrix:
    """Which tensors are orthogonalised: `muon` of the first pattern found in a name, where that says it."""
    compiled = [(re.compile(group.pattern), group.muon) for group in param_groups]

    def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
        said = next((muon for pattern, muon in compiled if pattern.search(name)), None)
        return is_hidden_matrix(name, shape) if said is None else said and len(shape) == 2

    return is_matrix


_MAKERS: MappingProxyType[str, Callable[[Any, Group, str], OptimizerFactory]] = MappingProxyType(
    {
        "AdamW": _adam,
        "Adam": _adam,
        "SGD": _sgd,
        "Lion": _lion,
        "Adagrad": _adagrad,
        "Lamb": _lamb,
        "Muon": _muon,
    }
)
