"""Keys of `zero_optimization` and `aio`: what data-parallel ranks partition, and what lies in host memory or on disk.

Names and defaults are DeepSpeed's where it has the key.
"""

from __future__ import annotations

from typing import Annotated, Literal

from trilith.config.base import Auto, Bool, ConfigModel, Count, CountOrZero, Fraction, Text, WholeNumber, key

Stage = Annotated[Literal[0, 1, 2, 3], WholeNumber]
Tier = Literal["none", "cpu", "nvme", "auto"]
NO_CAP = 2**63 - 1


class OffloadOptimizerConfig(ConfigModel):
    """Where master weights and optimizer states lie, and where the optimizer steps."""

    device: Tier = key(
        "none",
        "none: with the weights; cpu: in host memory, stepped there; nvme: in files under nvme_path, stepped in host "
        "memory; auto: on the device as far as pipeline.memory_limit_bytes allows, by measured first steps, the rest in "
        "host memory.",
    )
    nvme_path: Text | None = key(
        None,
        "Directory on a fast disk, which must exist; each rank keeps a file of its own in it, without a name. For nvme.",
    )
    ratio: Fraction = key(1.0, "Share of the optimizer's elements that is offloaded, by whole units.", "0 to 1")
    pin_memory: Bool = key(True, "Page-locked host memory, from which a GPU copies while it computes.")
    buffer_count: Count = key(4, "Units that are in host memory at once on their way from and to the disk.", "units")
    pipeline_read: Bool = key(True, "Read the next units from disk while one is stepped.")
    pipeline_write: Bool = key(True, "Write units back to disk while the next are stepped.")


class OffloadParamConfig(ConfigModel):
    """Where this rank's share of the weights lies between uses; stage 3 only."""

    device: Tier = key(
        "none",
        "none: on the device; cpu: in host memory; nvme: in files under nvme_path; auto: as offload_optimizer.device.",
    )
    nvme_path: Text | None = key(
        None,
        "Directory on a fast disk, which must exist; each rank keeps a file of its own in it, without a name. For nvme.",
    )
    pin_memory: Bool = key(True, "Page-locked host memory, from which a GPU copies while it computes.")
    buffer_count: Count = key(5, "Units that are in host memory at once on their way from and to the disk.", "units")
    max_in_cpu: CountOrZero = key(
        1_000_000_000,
        "With device nvme: elements that stay in host memory, so that they need not be read.",
        "elements",
    )


class ZeroConfig(ConfigModel):
    """What data-parallel ranks partition among themselves (Rajbhandari et al. 2020), and what they offload."""

    stage: Stage = key(
        0,
        "What is partitioned: 0 nothing, 1 optimizer states and master weights, 2 gradients, too, 3 weights, too.",
    )
    reduce_bucket_size: Auto[CountOrZero] = key(
        500_000_000,
        "Gradients of units are reduced together up to this size. auto: model.hidden_size squared.",
        "elements",
    )
    overlap_comm: Auto[Bool] = key("auto", "Reduce gradients while backward runs. auto: true.")
    reduce_interval: Literal["microbatch", "step", "auto"] = key(
        "microbatch",
        "When gradients go to the ranks that own them, at stages 2 and 3: after each microbatch, so that they are never "
        "whole on a rank for longer than a unit's bucket ((m + 1) x parameters of traffic for m microbatches), or once "
        "a step (2 x). auto: once a step for as many units as pipeline.memory_limit_bytes allows, all without a limit.",
    )
    stage3_prefetch_bucket_size: Auto[CountOrZero] = key(
        50_000_000,
        "Elements that are gathered ahead of use, one unit at least; 0: none. auto: 0.9 x model.hidden_size squared.",
        "elements",
    )
    stage3_backward_prefetch: Literal["pre", "post"] = key(
        "pre",
        "When the next unit's weights are asked for in backward: before the gradients of the one at hand are computed "
        "(faster), or after (one unit less at a time). FSDP's BACKWARD_PRE and BACKWARD_POST.",
    )
    stage3_param_persistence_threshold: Auto[CountOrZero] = key(
        100_000,
        "Parameters of at most so many elements stay whole on every rank. auto: 10 x model.hidden_size.",
        "elements",
    )
    stage3_model_persistence_threshold: CountOrZero = key(
        NO_CAP, "Most elements of a rank that stay whole for being small; the smallest come first.", "elements"
    )
    stage3_max_live_parameters: CountOrZero = key(
        1_000_000_000,
        "Most elements that are whole at one time, those that stay whole for being small not counted; at least the unit "
        "at work.",
        "elements",
    )
    stage3_max_reuse_distance: CountOrZero = key(
        1_000_000_000,
        "Weights that are used again only after so many elements of others are let go, whatever the cap allows.",
        "elements",
    )
    stage3_gather_16bit_weights_on_model_save: Bool = key(
        False, "save_16bit_model writes the whole model, gathered on rank 0; at stage 3 it refuses without it."
    )
    zero_hpz_partition_size: Count = key(
        1,
        "Ranks that share a partition, the others hold copies of it (HSDP): parallel.replicate is parallel.data / this. 1: "
        "as parallel.replicate says.",
        "ranks",
    )
    offload_optimizer: OffloadOptimizerConfig = key(OffloadOptimizerConfig(), "Master weights and optimizer states.")
    offload_param: OffloadParamConfig = key(OffloadParamConfig(), "Weights between uses; stage 3 only.")
    enable_sanity_checks: Bool = key(
        False, "Slow checks: whatever comes back from disk is compared with the checksum of what was written."
    )


class AioConfig(ConfigModel):
    """How offloaded files are read and written."""

    block_size: Count = key(1_048_576, "Bytes of one read or write.", "bytes")
    queue_depth: Count = key(8, "Blocks that are under way at once.", "blocks")
    intra_op_parallelism: Count = key(1, "Cores that copying and checking of blocks may take.", "threads")
