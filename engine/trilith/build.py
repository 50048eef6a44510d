"""From declarations to this rank's stages: modules on the meta device, storage by ZeRO, values box by box.

The initial value of element i of a canonical tensor is a function of (seed, name, i), so every layout starts from the same
weights, and no rank ever holds more of a tensor than its own part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from trilith.config import Config
from trilith.kernels.backends import chosen
from trilith.kernels.stream import fill_box
from trilith.kernels.weight_queue import WeightQueue
from trilith.models.base import LocalParameter, UnitDecl
from trilith.models.stage import StageModel, StageOptions, build_stage
from trilith.pipeline.action import Schedule
from trilith.precision import PrecisionPolicy
from trilith.rng import stream_key
from trilith.topology import Topology
from trilith.zero.sharded import ShardedModel


def build_stages(
    config: Config,
    stages: Sequence[Sequence[UnitDecl]],
    schedule: Schedule,
    topology: Topology,
    policy: PrecisionPolicy,
) -> dict[int, StageModel]:
    """This rank's stages (index -> module), on the meta device, placed as `schedule` has them.

    Each has a queue for its weight gradients: to be deferred, or to go straight where they are summed.
    """
    return {
        index: build_stage(
            config.model,
            stages[index],
            topology,
            StageOptions(
                recompute=config.activation_checkpointing.recompute,
                seed=config.training.seed,
                sequence_parallel=config.parallel.sequence_parallel,
                dtype=policy.param_dtype,
                queue=WeightQueue(defers=schedule.splits_backward),
                backends=chosen(config.kernels),
                fused_loss=config.kernels.fused_loss,
                z_loss=config.training.z_loss,
                sparse=config.sparse_attention,
                compiles=(config.compile.backend, config.compile.mode) if config.compile.enabled else None,
            ),
        )
        for index in schedule.stages_of(topology.coordinate("pp"))
    }


def initialise(model: ShardedModel, stages: Mapping[int, StageModel], policy: PrecisionPolicy, seed: int) -> None:
    """Give every local parameter its initial values; padding is zero."""
    for index, stage in stages.items():
        for parameter in stage.local_parameters:
            model.assign(index, parameter.name, initial_value(parameter, policy.master_dtype, seed, model.device))


def initial_value(parameter: LocalParameter, dtype: torch.dtype, seed: int, device: torch.device) -> torch.Tensor:
    """The initial value of a local parameter, `parameter.shape` in `dtype`."""
    flat = torch.zeros(parameter.numel, dtype=dtype, device=device)
    for spec, init in zip(parameter.specs, parameter.inits, strict=True):
        key = stream_key(seed, "init", spec.name)
        for piece in spec.pieces:
            value = fill_box(key, spec.shape, piece.box, init.kind, init.std, dtype, device)
            flat.as_strided(piece.box.shape, piece.strides, piece.offset).copy_(value)
    return flat.view(parameter.shape)
