"""The verdict on every DeepSpeed key that is not a key of ours: mapped, ignored, or refused, and why. Data only.

Keys that mean the same here (`train_batch_size`, `fp16.enabled`, ...) are fields of `Config` and not in this table.
A refused key is still taken where its value switches nothing on (`off`, or a block whose `switch` is off), because
public configurations are full of such values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from trilith.config.sparse_keys import of_its_mode


class RefusedValue(Exception):
    """Raised by a conversion for a value that has no counterpart; carries the rule and the fix."""

    def __init__(self, rule: str, fix: str) -> None:
        super().__init__(rule, fix)
        self.rule, self.fix = rule, fix


@dataclass(frozen=True)
class Key:
    """One row: what happens to the DeepSpeed key at `path`.

    map: its value, after `convert`, moves to `target`, and to `also` where it stands for two keys of ours (None from
    `convert`: it says nothing and is dropped).
    ignore: dropped with a note that says `why`.
    refuse: a violation with `why` and what to do `instead`, unless the value is in `off` or the block's `switch` is
    off.
    `keys` lists what a free-form block may hold, so that a typo inside is found; empty: anything.
    """

    path: str
    verdict: Literal["map", "ignore", "refuse"]
    why: str
    instead: str = ""
    target: str = ""
    also: str = ""
    convert: Callable[[Any], Any] | None = None
    off: tuple[Any, ...] = (False, None)
    switch: str = ""
    keys: tuple[str, ...] = ()


def _map(path: str, target: str, why: str, convert: Callable[[Any], Any] | None = None) -> Key:
    return Key(path, "map", why, target=target, convert=convert)


def _ignore(path: str, why: str, *keys: str) -> Key:
    return Key(path, "ignore", why, keys=keys)


def _refuse(path: str, why: str, instead: str, off: tuple[Any, ...] = (False, None)) -> Key:
    return Key(path, "refuse", why, instead, off=off)


def _refuse_block(path: str, why: str, instead: str, *keys: str, switch: str = "enabled") -> Key:
    return Key(path, "refuse", why, instead, off=(False, None, {}), switch=switch, keys=keys)


def _switch_to_stage(value: Any) -> Any:
    if isinstance(value, bool):
        return {"stage": int(value)}
    return value


def _num_stages(value: Any) -> Any:
    return None if value == "auto" else value


def _partition(value: Any) -> Any:
    if isinstance(value, str) and value.lower() == "best":
        return "cost"
    if isinstance(value, str) and value.lower().startswith("type:"):
        raise RefusedValue(
            "stages are not cut at layers of a type",
            'Use "cost", "uniform", "parameters", or the number of layers of each stage as a list.',
        )
    return value


def _checkpoint_interval(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value not in (0, 1):
        raise RefusedValue(
            "recompute is set for every layer alike; only 0 and 1 have a counterpart",
            'Use activation_checkpointing.recompute: "none", "selective" or "full".',
        )
    return "full" if value == 1 else None


def _tensor_degree(value: Any) -> Any:
    return None if value == 0 and not isinstance(value, bool) else value


def _own_directory(value: Any) -> Any:
    return "auto" if value == "" else value


def _spelling(value: Any) -> Any:
    known = {name.lower(): name for name in ("Adam", "AdamW", "SGD", "Lion", "Adagrad", "Lamb", "Muon")}
    return known.get(value.lower(), value) if isinstance(value, str) else value


def _section(value: Any) -> Any:
    """A section that is written as null or false has its defaults."""
    return {} if value is None or value is False else value


def _device(value: Any) -> Any:
    return "none" if value is None else value


def _to_cpu(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return "cpu" if value else None
    raise RefusedValue("must be true or false", "Use offload_optimizer.device and offload_param.device.")


def _whole_elements(value: Any) -> Any:
    return math.floor(value) if isinstance(value, float) else value


def _group_size(value: Any) -> Any:
    """MiCS is off at -1."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
        return None
    return value


_NO_MOE = "mixtures of experts are not built yet"
_INTERNAL = "an internal of DeepSpeed without counterpart here"
_HYPER = "changes the training method and is not part of this engine"
_STAGE_3_NAMES = (
    *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold"),
    *("max_live_parameters", "max_reuse_distance", "gather_16bit_weights_on_model_save"),
)
_STAGE_3_IGNORED = (
    ("module_granularity_threshold", "a unit, the weights that are gathered together, is a block of the model"),
    ("use_all_reduce_for_fetch_params", "weights are always gathered with all-gather"),
    ("allgather_sequential", "a unit lies in one flat buffer and is gathered at once, not weight by weight"),
)
_NO_QUANTISED = "quantised collectives (ZeRO++) are not built"

TOP_LEVEL = (
    _refuse("managed_gradient_accumulation", "the engine finds the step's boundary itself", "Remove it.", (True, None)),
    _map("dump_state", "", "the resolved configuration is always written to run.directory/config.resolved.json"),
    Key(
        "timers.throughput",
        "map",
        "throughput is always measured and in every record of metrics.jsonl",
        keys=("enabled", "synchronized"),
    ),
    _ignore("vocabulary_size", "DeepSpeed only warns by it; model.vocab_size sets the vocabulary"),
    _map("dataloader_drop_last", "", "the sampler has no partial last batch, so nothing is ever dropped"),
    _refuse(
        "prescale_gradients",
        "the loss is divided by the step's number of target tokens before backward, gradients are not scaled again",
        "Remove it.",
    ),
    _refuse(
        "gradient_predivide_factor",
        "the loss is divided by the step's number of target tokens before backward, gradients are not scaled again",
        "Remove it.",
        (1, None),
    ),
    _refuse(
        "gradient_allreduce_op",
        "the step's loss is a mean over its target tokens in every layout",
        'Remove it, or write "mean".',
        ("mean", None),
    ),
    _refuse("sparse_gradients", "gradients of embeddings are dense here", "Remove it."),
    _refuse(
        "seq_parallel_communication_data_type",
        "sequence-parallel collectives run in the dtype of the activations",
        "Remove it; data_types.param_dtype sets that dtype.",
        ("fp32", None),
    ),
    _refuse("disable_allgather", "a legacy switch without counterpart", "Remove it."),
    _map("zero_allow_untested_optimizer", "", "every optimizer of this engine runs under ZeRO"),
    _ignore("zero_force_ds_cpu_optimizer", "every optimizer steps on the CPU what is offloaded"),
    _refuse("graph_harvesting", "CUDA graphs are not built yet", "Remove it."),
    _refuse("use_data_before_expert_parallelism", _NO_MOE, "Remove it."),
    _map("sequence_parallel_size", "parallel.context", "the number of ranks that share a sequence"),
    _map("bfloat16", "bf16", "the old name of bf16"),
    _map("zero_optimization", "zero_optimization", "the old form: true is stage 1, false stage 0", _switch_to_stage),
    _map("zero_optimization.aio", "aio", "a section of its own; published examples have it here"),
    _map(
        *("sparse_attention", "sparse_attention", "fixed where it names no mode, without the defaults of other modes"),
        convert=of_its_mode,
    ),
)

OPTIMIZER = (
    _map("optimizer.type", "optimizer.type", "spelled our way", _spelling),
    _refuse("optimizer.legacy_fusion", "a legacy switch without counterpart", "Remove it."),
    _refuse(
        "optimizer.params.max_grad_norm",
        "gradients are clipped by the engine, not by the optimizer",
        "Use gradient_clipping.",
        (0, None),
    ),
    _refuse("optimizer.params.amsgrad", "AMSGrad is not built", "Remove it."),
    _ignore("optimizer.params.torch_adam", "which implementation runs does not change the result"),
    _ignore("optimizer.params.ns_method", "which form of the iteration runs changes the result by rounding only"),
    _refuse("optimizer.params.per_head_muon", "matrices are orthogonalised whole", "Remove it."),
    _refuse(
        "scheduler.params.last_batch_iteration",
        "the step comes from the checkpoint",
        'Remove it; checkpoint.resume: "auto" continues a run.',
        (-1, None),
    ),
)

PRECISION = (
    _refuse("fp16.auto_cast", "inputs are token ids, there is nothing to cast", "Remove it."),
    _refuse("fp16.fp16_master_weights_and_grads", "master weights are fp32", "Remove it."),
    _ignore("bf16.immediate_grad_update", "gradients are always added to the accumulation buffer as they appear"),
    _map("bf16.check_overflow", "bf16.check_grad_overflow", "the old name"),
    _refuse("bf16.bf16_master_weights_and_grads", "master weights are fp32", "Remove it."),
    _refuse("bf16.bf16_optimizer_states", "optimizer states are fp32", "Remove it."),
    _refuse_block(
        *("torch_autocast", "autocast is not used: weights have one dtype", "Use bf16.enabled.", "enabled"),
        *("dtype", "lower_precision_safe_modules"),
    ),
    _refuse_block("amp", "Apex mixed precision is not supported", "Use bf16.enabled, or fp16.enabled."),
)

_ZERO = "zero_optimization"
_OPTIMIZER, _PARAM = f"{_ZERO}.offload_optimizer", f"{_ZERO}.offload_param"
OFFLOAD = (
    *(
        row
        for section in (_OPTIMIZER, _PARAM)
        for row in (
            _map(section, section, "nothing is offloaded", _section),
            _map(f"{section}.device", f"{section}.device", "nothing is offloaded", _device),
            _ignore(f"{section}.buffer_size", "a buffer has the size of a unit"),
        )
    ),
    Key(
        f"{_OPTIMIZER}.pipeline",
        "map",
        "it stands for both",
        target=f"{_OPTIMIZER}.pipeline_read",
        also=f"{_OPTIMIZER}.pipeline_write",
    ),
    _ignore(f"{_OPTIMIZER}.fast_init", "how files are first written does not change what they hold"),
    _ignore(f"{_OPTIMIZER}.cpuadam_cores_perc", "run.threads sets the threads of a rank"),
    _refuse(f"{_OPTIMIZER}.super_offload", "SuperOffload is not part of this engine", "Remove it."),
    _map(f"{_ZERO}.cpu_offload", f"{_OPTIMIZER}.device", "the old form: true is cpu", _to_cpu),
    _map(f"{_ZERO}.cpu_offload_params", f"{_PARAM}.device", "the old form: true is cpu", _to_cpu),
    _map(f"{_ZERO}.cpu_offload_param", f"{_PARAM}.device", "the old form: true is cpu", _to_cpu),
    Key(
        f"{_ZERO}.cpu_offload_use_pin_memory",
        "map",
        "the old form, for both",
        target=f"{_OPTIMIZER}.pin_memory",
        also=f"{_PARAM}.pin_memory",
    ),
    _map("aio.thread_count", "aio.intra_op_parallelism", "the name in DeepSpeed's documentation"),
    _ignore("aio.single_submit", "aio.queue_depth alone says how many blocks are under way"),
    _ignore("aio.overlap_events", "aio.queue_depth alone says how many blocks are under way"),
    _refuse("aio.use_gds", "files are read into host memory, not straight into a GPU's", "Remove it."),
)

STAGE_3 = (
    *(_map(f"{_ZERO}.{name}", f"{_ZERO}.stage3_{name}", "the short name") for name in _STAGE_3_NAMES),
    _map(
        *(f"{_ZERO}.stage3_prefetch_bucket_size", f"{_ZERO}.stage3_prefetch_bucket_size", "rounded down"),
        convert=_whole_elements,
    ),
    *(
        _map(f"{_ZERO}.{old}", f"{_ZERO}.stage3_gather_16bit_weights_on_model_save", "the old name")
        for old in ("stage3_gather_fp16_weights_on_model_save", "gather_fp16_weights_on_model_save")
    ),
    *(_ignore(f"{_ZERO}.{prefix}{name}", why) for name, why in _STAGE_3_IGNORED for prefix in ("stage3_", "")),
    _ignore(f"{_ZERO}.memory_efficient_linear", "no layer is replaced: the schedule says when a unit is whole"),
    _ignore(f"{_ZERO}.override_module_apply", "no module is patched, so nothing needs to be overridden"),
    _ignore(
        *(f"{_ZERO}.leaf_module", "a unit, the weights that are gathered together, is a block of the model"),
        *("classes", "names", "name_suffixes"),
    ),
    _map(
        *(f"{_ZERO}.mics_shard_size", f"{_ZERO}.zero_hpz_partition_size", "ranks that share a partition (HSDP)"),
        convert=_group_size,
    ),
    _refuse(
        f"{_ZERO}.mics_hierarchical_params_gather",
        "weights are gathered in one step over the ranks that share a partition, not node by node",
        "Remove it.",
    ),
    *(
        _refuse(f"{_ZERO}.{name}", _NO_QUANTISED, "Remove it.", (False, None, {}))
        for name in (
            *("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"),
            "zeropp_loco_param",
        )
    ),
)

ZERO = (
    *OFFLOAD,
    *STAGE_3,
    _ignore("zero_optimization.contiguous_gradients", "gradients always lie in one flat buffer per unit"),
    _ignore(
        "zero_optimization.reduce_scatter", "from stage 1 on, gradients are always reduced to the rank that owns them"
    ),
    _ignore("zero_optimization.allgather_partitions", "weights are always gathered with all-gather"),
    _ignore("zero_optimization.allgather_bucket_size", "weights are gathered unit by unit"),
    _ignore("zero_optimization.use_multi_rank_bucket_allreduce", _INTERNAL),
    _refuse(
        "zero_optimization.load_from_fp32_weights",
        "a resume always continues from the fp32 master weights, bit for bit",
        "Remove it.",
        (True, None),
    ),
    _refuse("zero_optimization.elastic_checkpoint", "a legacy format", "Remove it."),
    _ignore("zero_optimization.sub_group_size", "the optimizer steps unit by unit, and a unit is a block of the model"),
    _refuse(
        "zero_optimization.ignore_unused_parameters",
        "the check that every parameter is used is not built yet",
        "Remove it.",
        (True, None),
    ),
    _ignore("zero_optimization.round_robin_gradients", "every rank owns an equal part of each unit's gradients"),
    _ignore("zero_optimization.pipeline_loading_checkpoint", _INTERNAL),
    _ignore("zero_optimization.log_trace_cache_warnings", _INTERNAL),
    _ignore(
        "zero_optimization.save_muon_momentum_buffer_in_memory",
        "optimizer states lie where zero_optimization.offload_optimizer says",
    ),
    _refuse("zero_optimization.zenflow", "ZenFlow is not part of this engine", "Remove it.", (None, {})),
    _refuse("zero_optimization.legacy_stage1", "a legacy switch without counterpart", "Remove it."),
)

LAYOUT = (
    _refuse(
        "activation_checkpointing.partition_activations",
        "kept activations are not partitioned on their own",
        "Use parallel.sequence_parallel, which holds 1/tensor of them.",
    ),
    _ignore("activation_checkpointing.number_checkpoints", "it only sizes DeepSpeed's contiguous buffers"),
    _ignore("activation_checkpointing.contiguous_memory_optimization", _INTERNAL),
    _ignore("activation_checkpointing.synchronize_checkpoint_boundary", _INTERNAL),
    _refuse("activation_checkpointing.profile", "recompute is not timed on its own", "Use wall_clock_breakdown."),
    _refuse(
        "activation_checkpointing.cpu_checkpointing",
        "kept activations stay on the device; weights and optimizer states can be offloaded",
        'Use recompute: "full".',
    ),
    _map("pipeline.stages", "parallel.pipeline", "the number of pipeline ranks", _num_stages),
    _map("pipeline.partition", "pipeline.partition", '"best" is "cost" here', _partition),
    _refuse(
        "pipeline.seed_layers",
        "initial weights are the same in every layout without it",
        "Remove it; training.seed sets them.",
    ),
    _map(
        *("pipeline.activation_checkpoint_interval", "activation_checkpointing.recompute", "1 is full, 0 none"),
        convert=_checkpoint_interval,
    ),
    _ignore("pipeline.pipe_partitioned", "parallel.sequence_parallel sends 1/tensor of an activation"),
    _ignore("pipeline.grad_partitioned", "parallel.sequence_parallel sends 1/tensor of a gradient"),
    _map("tensor_parallel.autotp_size", "parallel.tensor", "the tensor-parallel degree", _tensor_degree),
    _map("tensor_parallel.tp.tp_size", "parallel.tensor", "the tensor-parallel degree"),
    _ignore("tensor_parallel.tp.tp_grain_size", "what can be split is known from the model's declaration"),
    _refuse("tensor_parallel.tp_overlap_comm", "not built yet", "Remove it."),
    _refuse("tensor_parallel.preset_model", "the model's family brings its plan", "Use model.family.", (None, "")),
    _refuse("tensor_parallel.partition_config", "the model's family brings its plan", "Use model.family.", (None, {})),
    _ignore("tensor_parallel.dtype", "data_types.param_dtype sets the dtype"),
    _refuse(
        "tensor_parallel.keep_module_on_host",
        "a rank makes only its own part of the weights, so the whole module lies nowhere",
        "Remove it; zero_optimization.offload_param keeps weights in host memory.",
    ),
    _refuse_block("expert_parallel", _NO_MOE, "Remove it."),
)

CHECKPOINT = (
    _map("checkpoint.tag_validation", "", "ranks that disagree about a checkpoint always fail"),
    _refuse("checkpoint.load_universal", "loading into another layout is not built yet", "Resume in the same layout."),
    _refuse("checkpoint.use_node_local_storage", "not built yet", "Use a checkpoint.directory that all ranks share."),
    _ignore("checkpoint.parallel_write", "every rank always writes its own part", "pipeline_stage"),
    _ignore("checkpoint.checkpoint_serialization", "checkpoints are always safetensors and JSON"),
    _refuse_block(
        *("checkpoint.writer", "asynchronous saving is not built yet", "Remove it.", "type", "decoupled"),
        *("io_buffer_size", "io_buffer_double", "io_multiplier", "show_statistics", "data_parallel"),
        switch="decoupled",
    ),
)

_SINKS = "Use tensorboard or csv_monitor; metrics.jsonl is always written."
MONITOR = (
    *(
        _map(f"{section}.{name}", f"{section}.{name}", '"" is the run\'s own directory', _own_directory)
        for section in ("tensorboard", "csv_monitor")
        for name in ("output_path", "job_name")
    ),
    _refuse_block("wandb", "Weights & Biases is not built yet", _SINKS, "enabled", "group", "team", "project"),
    _refuse_block("comet", "Comet is not supported", _SINKS),
    _refuse_block(
        *("flops_profiler", "the profiler is not built yet", "Achieved FLOP/s and MFU are in every record."),
        *("enabled", "profile_step", "module_depth", "top_modules", "detailed", "output_file"),
        "recompute_fwd_factor",
    ),
    _refuse_block(
        *("comms_logger", "logging of single collectives is not built yet", "Use wall_clock_breakdown."),
        *("enabled", "verbose", "prof_all", "debug", "prof_ops"),
    ),
)

_NO_QUANTISATION = "quantisation is not built yet"
METHODS = (
    _refuse_block(
        *("elasticity", "elastic batch sizes are not built yet", "Set train_batch_size.", "enabled"),
        *("max_train_batch_size", "micro_batch_sizes", "min_gpus", "max_gpus", "min_time", "prefer_larger_batch"),
        *("ignore_non_elastic_batch_info", "num_gpus_per_node", "model_parallel_size", "version"),
    ),
    _refuse("compile.kwargs", "options of the backend are not passed on", "Use compile.mode.", (None, {})),
    _refuse("compile.deepcompile", "collectives are not compiled", "Use compile.enabled.", (False, None)),
    _refuse("compile.passes", "they belong to compile.deepcompile", "Use compile.enabled.", (None, [])),
    _refuse_block("autotuning", "tuning by trial runs is not supported", "Use `trilith check` to compare layouts."),
    _refuse_block("data_efficiency", _HYPER, "Remove it."),
    _refuse_block("curriculum_learning", _HYPER, "Remove it; model.sequence_length is fixed."),
    _refuse_block("progressive_layer_drop", _HYPER, "Remove it."),
    _refuse_block("eigenvalue", _HYPER, "Remove it."),
    _refuse("compression_training", _NO_QUANTISATION, "Remove it.", (None, {}, False)),
    _refuse("weight_quantization", _NO_QUANTISATION, "Remove it.", (None, {}, False)),
    _refuse_block("quantize_training", _NO_QUANTISATION, "Remove it."),
    _refuse_block("hybrid_engine", "this engine trains, it does not serve", "Remove it."),
    _refuse_block("nebula", "a storage service", "Use checkpoint.directory."),
    _refuse("datastates_ckpt", "an external checkpoint engine", "Use checkpoint.directory.", (None, {}, False)),
)

TABLE: tuple[Key, ...] = (
    *TOP_LEVEL,
    *OPTIMIZER,
    *PRECISION,
    *ZERO,
    *LAYOUT,
    *CHECKPOINT,
    *MONITOR,
    *METHODS,
)

# (section, type in lower case, why, instead)
REFUSED_TYPES: tuple[tuple[str, str, str, str], ...] = (
    *(
        ("optimizer", name.lower(), f"{name} compresses gradients and is not supported", f"Use {instead}.")
        for name, instead in (("OneBitAdam", "AdamW"), ("ZeroOneAdam", "AdamW"), ("OneBitLamb", "Lamb"))
    ),
    *(
        ("optimizer", name.lower(), f"{name} needs the muP parametrisation, which is not supported", f"Use {instead}.")
        for name, instead in (("MuAdam", "Adam"), ("MuAdamW", "AdamW"), ("MuSGD", "SGD"))
    ),
    ("scheduler", "lrrangetest", "a learning-rate sweep is not a training schedule", "Use one of the Warmup types."),
    ("scheduler", "onecycle", "OneCycle is not supported", "Use WarmupCosineLR."),
)
