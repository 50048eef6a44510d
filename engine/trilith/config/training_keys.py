"""Keys of the sections `optimizer`, `scheduler`, `fp16`, `bf16`, `data_types`; names and defaults are DeepSpeed's."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from trilith.config.base import (
    Auto,
    BelowOne,
    Bool,
    ConfigModel,
    Count,
    CountOrZero,
    Fraction,
    NotNegative,
    Positive,
    Power,
    Text,
    key,
)

DtypeName = Literal["fp32", "bf16", "fp16", "fp64"]


def _is_pattern(value: str) -> str:
    """Refuses what is no regular expression."""
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as problem:
        raise PydanticCustomError("pattern", "must be a regular expression ({why})", {"why": str(problem)}) from None
    return value


_LR = "Learning rate. auto: scheduler.params.warmup_max_lr if that is given, else 1e-3."
Pattern = Annotated[Text, AfterValidator(_is_pattern)]


class ParamGroup(ConfigModel):
    """Multipliers for the tensors whose name a pattern finds."""

    pattern: Pattern = key(
        ...,
        "Regular expression searched in a tensor's canonical name; the first group that matches a tensor applies.",
    )
    lr_mult: NotNegative = key(1.0, "Factor on the learning rate.")
    weight_decay_mult: NotNegative | None = key(
        None, "Factor on the weight decay; null: 1, but 0 for norms and biases, as without a group."
    )


class MuonParamGroup(ParamGroup):
    """Multipliers for the tensors whose name a pattern finds, and whether they are orthogonalised."""

    muon: Bool | None = key(
        None,
        "true: Muon for a matrix, false: AdamW; null: Muon unless it is an embedding or the output projection.",
    )


class AdamWParams(ConfigModel):
    """Parameters of AdamW."""

    lr: Auto[NotNegative] = key(..., _LR)
    betas: Auto[tuple[BelowOne, BelowOne]] = key(
        (0.9, 0.999), "Decay rates of the two moments. auto: [0.9, 0.999].", "0 to below 1"
    )
    eps: Auto[NotNegative] = key(1e-8, "Added to the root of the second moment. auto: 1e-8.")
    weight_decay: Auto[NotNegative] = key(
        0.0, "Weight decay; not applied to norms and biases unless a param_group says so. auto: 0."
    )
    bias_correction: Bool = key(True, "Correct the moments for their start at zero.")


class AdamParams(AdamWParams):
    """Parameters of Adam."""

    adam_w_mode: Bool = key(
        True,
        "true: decoupled weight decay, so Adam means AdamW, as in DeepSpeed; false: decay is added to the gradient.",
    )


class SGDParams(ConfigModel):
    """Parameters of SGD."""

    lr: Auto[NotNegative] = key(..., _LR)
    momentum: BelowOne = key(0.0, "Factor of the running sum of gradients.", "0 to below 1")
    dampening: Fraction = key(0.0, "The gradient enters the running sum times 1 - dampening.", "0 to 1")
    nesterov: Bool = key(False, "Nesterov momentum; needs momentum above 0 and dampening 0.")
    weight_decay: Auto[NotNegative] = key(
        0.0, "Weight decay, added to the gradient; not applied to norms and biases. auto: 0."
    )


class LionParams(ConfigModel):
    """Parameters of Lion."""

    lr: Auto[NotNegative] = key(..., _LR)
    betas: tuple[BelowOne, BelowOne] = key(
        (0.9, 0.99), "Weight of the momentum in the step's direction, and its decay rate.", "0 to below 1"
    )
    weight_decay: Auto[NotNegative] = key(
        0.0, "Weight decay; not applied to norms and biases unless a param_group says so. auto: 0."
    )


class AdagradParams(ConfigModel):
    """Parameters of Adagrad."""

    lr: Auto[NotNegative] = key(..., _LR)
    eps: Positive = key(1e-10, "Added to the root of the sum of squares.")
    weight_decay: Auto[NotNegative] = key(
        0.0, "Weight decay, added to the gradient; not applied to norms and biases. auto: 0."
    )
    lr_decay: NotNegative = key(0.0, "The learning rate of step t = 0, 1, ... is divided by 1 + t * lr_decay.")
    initial_accumulator_value: NotNegative = key(0.0, "Where the sum of squares starts.")


class LambParams(ConfigModel):
    """Parameters of LAMB."""

    lr: Auto[NotNegative] = key(..., _LR)
    betas: Auto[tuple[BelowOne, BelowOne]] = key(
        (0.9, 0.999), "Decay rates of the two moments. auto: [0.9, 0.999].", "0 to below 1"
    )
    eps: Auto[Positive] = key(1e-8, "Added to the root of the second moment. auto: 1e-8.")
    weight_decay: Auto[NotNegative] = key(
        0.0, "Weight decay; not applied to norms and biases unless a param_group says so. auto: 0."
    )
    bias_correction: Bool = key(True, "Correct the size of a step for the start of the moments at zero.")
    max_coeff: Positive = key(10.0, "Upper bound of the norm of a tensor over that of its step.")
    min_coeff: NotNegative = key(0.01, "Lower bound of that ratio; at most max_coeff.")
    eps_inside_sqrt: Bool = key(False, "Add eps to the second moment, before the root is taken.")
    always_adapt: Bool = key(
        True, "Scale the steps of tensors without weight decay too, as DeepSpeed; false: their ratio is 1."
    )

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> LambParams:
        if self.min_coeff > self.max_coeff:
            raise PydanticCustomError("bounds", "must have min_coeff at most max_coeff")
        return self


class MuonParams(ConfigModel):
    """Parameters of Muon, and of the AdamW that steps what is no hidden matrix."""

    lr: Auto[Positive] = key(..., _LR)
    muon_lr: NotNegative | None = key(None, "Learning rate of hidden matrices; scheduled like lr. null: lr.")
    adam_lr: NotNegative | None = key(None, "Learning rate of everything else; scheduled like lr. null: lr.")
    momentum: BelowOne = key(0.95, "Decay rate of the momentum of matrices.", "0 to below 1")
    nesterov: Bool = key(True, "Look ahead: mix the gradient into the momentum once more.")
    weight_decay: Auto[NotNegative] = key(
        0.0, "Decoupled weight decay of both; not applied to norms and biases unless a param_group says so. auto: 0."
    )
    ns_steps: Count = key(5, "Newton-Schulz iterations.", "iterations")
    ns_dtype: Literal["fp32", "bf16"] = key(
        "fp32", "What a matrix is orthogonalised in; fp64 where the weights are fp64. bf16 is faster on a GPU."
    )
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = key(
        "original",
        "Factor on a matrix's step. original: sqrt(max(1, rows / columns)); match_rms_adamw: 0.2 sqrt(max(rows, columns)), "
        "so that lr and weight_decay of AdamW fit.",
    )
    betas: tuple[BelowOne, BelowOne] = key((0.9, 0.95), "AdamW: decay rates of the two moments.", "0 to below 1")
    eps: Positive = key(1e-10, "AdamW: added to the root of the second moment.")


class AdamWConfig(ConfigModel):
    """AdamW (Loshchilov & Hutter 2019): decoupled weight decay."""

    type: Literal["AdamW"] = key(..., "Kind of optimizer.")
    params: AdamWParams = key(..., "Parameters of the optimizer.")
    param_groups: tuple[ParamGroup, ...] = key((), "Multipliers by name pattern.")

    @property
    def decoupled_decay(self) -> bool:
        """Whether decay acts on the weight (AdamW), not through the gradient."""
        return True


class AdamConfig(ConfigModel):
    """Adam (Kingma & Ba 2015), with the weight decay that `params.adam_w_mode` says."""

    type: Literal["Adam"] = key(..., "Kind of optimizer.")
    params: AdamParams = key(..., "Parameters of the optimizer.")
    param_groups: tuple[ParamGroup, ...] = key((), "Multipliers by name pattern.")

    @property
    def decoupled_decay(self) -> bool:
        """Whether decay acts on the weight (AdamW), not through the gradient."""
        return self.params.adam_w_mode


class SGDConfig(ConfigModel):
    """Stochastic gradient descent with momentum."""

    type: Literal["SGD"] = key(..., "Kind of optimizer.")
    params: SGDParams = key(..., "Parameters of the optimizer.")
    param_groups: tuple[ParamGroup, ...] = key((), "Multipliers by name pattern.")

    @property
    def decoupled_decay(self) -> bool:
        """Whether decay acts on the weight (AdamW), not through the gradient."""
        return False


class LionConfig(ConfigModel):
    """Lion (Chen et al. 2023): steps by the sign of the momentum, with decoupled weight decay."""

    type: Literal["Lion"] = key(..., "Kind of optimizer.")
    params: LionParams = key(..., "Parameters of the optimizer.")
    param_groups: tuple[ParamGroup, ...] = key((), "Multipliers by name pattern.")


class AdagradConfig(ConfigModel):
    """Adagrad (Duchi et al. 2011), as torch.optim.Adagrad."""

    type: Literal["Adagrad"] = key(..., "Kind of optimizer.")
    params: AdagradParams = key(..., "Parameters of the optimizer.")
    param_groups: tuple[ParamGroup, ...] = key((), "Multipliers by name pattern.")


class LambConfig(ConfigModel):
    """LAMB (You et al. 2020), in the form of DeepSpeed: Adam's step, scaled to the norm of each tensor."""

    type: Literal["Lamb"] = key(..., "Kind of optimizer.")
    params: LambParams = key(..., "Parameters of the optimizer.")
    param_groups: tuple[ParamGroup, ...] = key((), "Multipliers by name pattern.")


class MuonConfig(ConfigModel):
    """Muon (Jordan et al. 2024) for matrices inside the model, AdamW for everything else."""

    type: Literal["Muon"] = key(..., "Kind of optimizer.")
    params: MuonParams = key(..., "Parameters of the optimizer.")
    param_groups: tuple[MuonParamGroup, ...] = key((), "Multipliers by name pattern.")


OptimizerConfig = Annotated[
    AdamWConfig | AdamConfig | SGDConfig | LionConfig | AdagradConfig | LambConfig | MuonConfig,
    Field(discriminator="type"),
]

WarmupType = Literal["log", "linear"]
_WARMUP_STEPS = "Steps of the warm-up. auto: a tenth of training.steps, at most 1000."
_TOTAL_STEPS = "Steps after which the schedule has ended. auto: training.steps."
_WARMUP_TYPE = "Shape of the warm-up: log (DeepSpeed's default; fast at first) or linear."


class WarmupLRParams(ConfigModel):
    """Parameters of WarmupLR."""

    warmup_min_lr: Auto[NotNegative] = key(0.0, "Learning rate of the first step. auto: 0.")
    warmup_max_lr: Auto[NotNegative] = key("auto", "Learning rate after the warm-up. auto: optimizer.params.lr.")
    warmup_num_steps: Auto[CountOrZero] = key(1000, _WARMUP_STEPS, "steps")
    warmup_type: WarmupType = key("log", _WARMUP_TYPE)


class WarmupDecayLRParams(ConfigModel):
    """Parameters of WarmupDecayLR."""

    total_num_steps: Auto[Count] = key("auto", _TOTAL_STEPS, "steps")
    warmup_min_lr: Auto[NotNegative] = key(0.0, "Learning rate of the first step. auto: 0.")
    warmup_max_lr: Auto[NotNegative] = key(
        0.001, "Learning rate after the warm-up; the default is DeepSpeed's. auto: optimizer.params.lr."
    )
    warmup_num_steps: Auto[CountOrZero] = key(1000, _WARMUP_STEPS, "steps")
    warmup_type: WarmupType = key("log", _WARMUP_TYPE)


class WarmupCosineLRParams(ConfigModel):
    """Parameters of WarmupCosineLR; ratios are fractions of optimizer.params.lr."""

    total_num_steps: Auto[Count] = key("auto", _TOTAL_STEPS, "steps")
    warmup_min_ratio: Fraction = key(0.0, "Learning rate of the first step.", "fraction of optimizer.params.lr")
    warmup_num_steps: Auto[CountOrZero] = key(1000, _WARMUP_STEPS, "steps")
    cos_min_ratio: Fraction = key(1e-4, "Learning rate at the end.", "fraction of optimizer.params.lr")
    warmup_type: WarmupType = key("log", _WARMUP_TYPE)


class ConstantParams(ConfigModel):
    """Parameters of Constant."""

    warmup_num_steps: Auto[CountOrZero] = key(0, "Steps of the linear warm-up from 0; 0: none.", "steps")


class WSDParams(ConfigModel):
    """Parameters of WSD."""

    total_num_steps: Auto[Count] = key("auto", _TOTAL_STEPS, "steps")
    warmup_num_steps: Auto[CountOrZero] = key(
        0, "Steps of the linear warm-up from 0. auto: a tenth of training.steps, at most 1000.", "steps"
    )
    decay_num_steps: Auto[CountOrZero] = key(
        "auto", "Steps of the linear decay at the end. auto: a tenth of total_num_steps.", "steps"
    )
    min_lr_ratio: Fraction = key(0.0, "Learning rate at the end.", "fraction of optimizer.params.lr")


class WarmupLRConfig(ConfigModel):
    """Warm-up, then constant."""

    type: Literal["WarmupLR"] = key(..., "Kind of schedule.")
    params: WarmupLRParams = key(WarmupLRParams(), "Parameters of the schedule.")


class WarmupDecayLRConfig(ConfigModel):
    """Warm-up, then linear decay to 0."""

    type: Literal["WarmupDecayLR"] = key(..., "Kind of schedule.")
    params: WarmupDecayLRParams = key(WarmupDecayLRParams(), "Parameters of the schedule.")


class WarmupCosineLRConfig(ConfigModel):
    """Warm-up, then half a cosine down to `cos_min_ratio`."""

    type: Literal["WarmupCosineLR"] = key(..., "Kind of schedule.")
    params: WarmupCosineLRParams = key(WarmupCosineLRParams(), "Parameters of the schedule.")


class ConstantConfig(ConfigModel):
    """The optimizer's learning rate, after an optional linear warm-up."""

    type: Literal["Constant"] = key(..., "Kind of schedule.")
    params: ConstantParams = key(ConstantParams(), "Parameters of the schedule.")


class WSDConfig(ConfigModel):
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM)."""

    type: Literal["WSD"] = key(..., "Kind of schedule.")
    params: WSDParams = key(WSDParams(), "Parameters of the schedule.")


SchedulerConfig = Annotated[
    WarmupLRConfig | WarmupDecayLRConfig | WarmupCosineLRConfig | ConstantConfig | WSDConfig,
    Field(discriminator="type"),
]


class Fp16Config(ConfigModel):
    """Half precision with loss scaling; master weights are fp32."""

    enabled: Auto[Bool] = key("auto", "Train in fp16. auto: true where data_types.param_dtype is fp16, else false.")
    loss_scale: NotNegative = key(0.0, "Fixed loss scale; 0: dynamic.")
    initial_scale_power: Power = key(16, "The dynamic scale starts at 2 to this power.", "power of 2")
    loss_scale_window: Count = key(1000, "Steps without overflow after which the scale doubles.", "steps")
    hysteresis: Count = key(2, "Overflows that are let pass before the scale halves.", "overflows")
    consecutive_hysteresis: Bool = key(False, "Every step without overflow refills the hysteresis.")
    min_loss_scale: NotNegative = key(
        1.0, "The dynamic scale does not fall below it; above 0 when the scale is dynamic."
    )


class Bf16Config(ConfigModel):
    """bfloat16; master weights are fp32, no loss scaling."""

    enabled: Auto[Bool] = key("auto", "Train in bf16. auto: true where data_types.param_dtype is bf16, else false.")
    check_grad_overflow: Bool = key(True, "Skip a step whose gradients are not finite.")


class DataTypesConfig(ConfigModel):
    """Number formats."""

    param_dtype: Auto[DtypeName] = key(
        "auto", "Weights and activations. auto: fp16 or bf16 where that is enabled, else fp32."
    )
    grad_accum_dtype: Auto[DtypeName] = key(
        "auto", "Accumulated gradients. auto: fp32; fp64 where param_dtype is fp64."
    )
    buffer_dtype: Auto[DtypeName] = key(
        "auto", "Floating-point buffers of a trilith.initialize module. auto: fp32; fp64 where param_dtype is fp64."
    )
