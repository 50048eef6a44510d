"""The config section `optimizer` as an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trilith.optim.adagrad import Adagrad, AdagradOptions
from trilith.optim.adamw import Adam, AdamOptions
from trilith.optim.base import FlatPartition, Optimizer, OptimizerFactory
from trilith.optim.lion import Lion, LionOptions
from trilith.optim.sgd import SGD, SGDOptions


def make_optimizer(config: Any) -> OptimizerFactory:
    """A factory for the resolved config section `optimizer`: from flat partitions to an optimizer over them.

    `"Adam"` means AdamW unless `params.adam_w_mode` is false, as in DeepSpeed.
    """
    params = config.params
    if config.type == "SGD":
        sgd = SGDOptions(params.momentum, params.dampening, params.nesterov, params.weight_decay)
        return lambda partitions: SGD(partitions, sgd)
    if config.type == "Lion":
        lion = LionOptions((params.betas[0], params.betas[1]), params.weight_decay)
        return lambda partitions: Lion(partitions, lion)
    if config.type == "Adagrad":
        adagrad = AdagradOptions(params.eps, params.weight_decay, params.lr_decay, params.initial_accumulator_value)
        return lambda partitions: Adagrad(partitions, adagrad)
    options = AdamOptions(
        betas=(params.betas[0], params.betas[1]),
        eps=params.eps,
        weight_decay=params.weight_decay,
        decoupled_decay=config.decoupled_decay,
        bias_correction=params.bias_correction,
    )

    def make(partitions: Sequence[FlatPartition]) -> Optimizer:
        return Adam(partitions, options)

    return make
