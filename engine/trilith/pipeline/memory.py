"""How much memory a rank takes, predicted from declarations: weights, gradients, optimizer states, activations. No torch.

Weights and what the optimizer keeps follow from the parameters that a rank holds, activations from the schedule's order of
actions (`simulate.peak_bytes`). Padding of flat buffers, temporaries of ops and messages under way are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from trilith.config import Config
from trilith.models.activations import ActivationBytes, ActivationSetting
from trilith.models.base import UnitDecl, local_parameter, stage_parameters
from trilith.pipeline.action import Schedule
from trilith.pipeline.partition import Cuts
from trilith.pipeline.simulate import peak_bytes

DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2})


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank of a pipeline rank's tensor and data group (the largest of its tensor ranks).

    `parameters` counts elements, one version of each; `versions`: how many of the weights there are (asynchronous
    schedules). `rollback_bytes`: the copy that `postvalidate` keeps. `activation_bytes`: the most at one time.
    """

    parameters: int
    versions: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    rollback_bytes: int
    activation_bytes: int

    @property
    def state_bytes(self) -> int:
        """What is there all the time: everything but activations."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.rollback_bytes

    @property
    def total_bytes(self) -> int:
        """All of it, at the peak."""
        return self.state_bytes + self.activation_bytes


def activation_setting(config: Config) -> ActivationSetting:
    """What a resolved config says about the size of activations."""
    return ActivationSetting(
        batch_size=config.train_micro_batch_size_per_gpu,
        tensor=config.parallel.tensor,
        sequence_parallel=config.parallel.sequence_parallel,
        recompute=config.activation_checkpointing.recompute,
        dtype_bytes=DTYPE_BYTES[config.data_types.param_dtype],
        fused_norm=config.run.device == "cuda",
    )


def rank_memories(
    config: Config,
    units: Sequence[UnitDecl],
    schedule: Schedule,
    cuts: Cuts,
    activations: Sequence[ActivationBytes],
) -> tuple[RankMemory, ...]:
    """The memory of each pipeline rank; `activations[stage]` are those of one microbatch on a stage."""
    peaks = peak_bytes(schedule, [a.after_forward for a in activations], [a.after_input_gradient for a in activations])
    return tuple(
        _rank_memory(config, _num_elements(config, units, schedule, cuts, rank), schedule, rank, int(peak))
        for rank, peak in enumerate(peaks)
    )


def _num_elements(config: Config, units: Sequence[UnitDecl], schedule: Schedule, cuts: Cuts, rank: int) -> int:
    """Elements of the parameters of a pipeline rank, on the tensor rank that holds most of each."""
    count, tensor = 0, config.parallel.tensor
    for stage in schedule.stages_of(rank):
        lo, hi = cuts[stage]
        for declared in stage_parameters(units[lo:hi]):
            count += max(local_parameter(declared, index, tensor).numel for index in range(tensor))
    return count


def _versions(schedule: Schedule, rank: int) -> int:
    """Versions of the weights: one for each microbatch on its way with pipedream, two where gradients are delayed."""
    if schedule.update_every == 0:
        return 1
    return schedule.num_ranks - rank if schedule.name == "pipedream" else 2


def _rank_memory(config: Config, count: int, schedule: Schedule, rank: int, activation_bytes: int) -> RankMemory:
    types, versions, delayed = config.data_types, _versions(schedule, rank), schedule.update_every > 0
    accumulated = DTYPE_BYTES[types.grad_accum_dtype]
    master = max(4, DTYPE_BYTES[types.param_dtype])
    states = {"SGD": int(getattr(config.optimizer.params, "momentum", 0.0) > 0)}.get(config.optimizer.type, 2)
    has_master = delayed or DTYPE_BYTES[types.param_dtype] != master
    share = config.parallel.data * config.parallel.context if config.zero_optimization.stage else 1
    own = -(-count // share)
    return RankMemory(
        parameters=count,
        versions=versions,
        parameter_bytes=versions * count * DTYPE_BYTES[types.param_dtype],
        gradient_bytes=(2 if delayed and schedule.name != "pipedream" else 1) * count * accumulated,
        optimizer_bytes=own * (states + has_master) * master,
        rollback_bytes=own * _rollback_bytes_per_element(config, states, master),
        activation_bytes=activation_bytes,
    )


def _rollback_bytes_per_element(config: Config, states: int, master: int) -> int:
    """Weights and moments, and the gradients that unscaling changes in place; nothing where no step can be wrong."""
    types, fp16 = config.data_types, config.data_types.param_dtype == "fp16"
    skips = fp16 or (types.param_dtype == "bf16" and config.bf16.check_grad_overflow)
    if config.pipeline.optimizer_sync != "postvalidate" or not (config.gradient_clipping > 0.0 or skips):
        return 0
    unscaled = fp16 and config.gradient_clipping > 0.0 and DTYPE_BYTES[types.grad_accum_dtype] == master
    return (states + 1 + unscaled) * master
