"""DeepSpeed's keys: each is ours, mapped, ignored with a note, or refused with a reason; none passes in silence."""

from __future__ import annotations

from typing import Any

import pytest

from tests.broken_configs import edited
from trilith.config import Config, load_config, resolve
from trilith.config.deepspeed_keys import REFUSED_TYPES, TABLE
from trilith.config.schema import field_infos
from trilith.errors import ConfigError

# Every key of DeepSpeed 0.19's documentation and code, by section.
DEEPSPEED_KEYS = {
    "": "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation "
    "steps_per_print wall_clock_breakdown memory_breakdown dump_state log_level vocabulary_size dataloader_drop_last "
    "gradient_clipping prescale_gradients gradient_predivide_factor gradient_allreduce_op sparse_gradients "
    "communication_data_type seq_parallel_communication_data_type disable_allgather zero_allow_untested_optimizer "
    "zero_force_ds_cpu_optimizer graph_harvesting use_data_before_expert_parallelism bfloat16 sequence_parallel_size "
    "torch_autocast amp expert_parallel wandb comet flops_profiler comms_logger elasticity compile autotuning "
    "data_efficiency curriculum_learning progressive_layer_drop eigenvalue sparse_attention compression_training "
    "weight_quantization quantize_training hybrid_engine nebula datastates_ckpt",
    "timers.": "throughput",
    "optimizer.": "type params legacy_fusion",
    "optimizer.params.": "max_grad_norm lr betas eps weight_decay adam_w_mode torch_adam bias_correction amsgrad "
    "max_coeff min_coeff eps_inside_sqrt momentum muon_lr adam_lr ns_method per_head_muon",
    "scheduler.": "type params",
    "scheduler.params.": "warmup_min_lr warmup_max_lr warmup_num_steps warmup_type last_batch_iteration "
    "total_num_steps warmup_min_ratio cos_min_ratio",
    "fp16.": "enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis "
    "min_loss_scale fp16_master_weights_and_grads",
    "bf16.": "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states",
    "data_types.": "grad_accum_dtype param_dtype buffer_dtype",
    "zero_optimization.": "stage contiguous_gradients reduce_scatter allgather_partitions reduce_bucket_size "
    "allgather_bucket_size overlap_comm use_multi_rank_bucket_allreduce load_from_fp32_weights elastic_checkpoint "
    "offload_param offload_optimizer sub_group_size stage3_prefetch_bucket_size stage3_param_persistence_threshold "
    "stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance "
    "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save "
    "stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential "
    "prefetch_bucket_size param_persistence_threshold max_live_parameters max_reuse_distance "
    "ignore_unused_parameters round_robin_gradients zero_hpz_partition_size zero_quantized_weights "
    "zero_quantized_nontrainable_weights zero_quantized_gradients zeropp_loco_param mics_shard_size "
    "mics_hierarchical_params_gather memory_efficient_linear override_module_apply pipeline_loading_checkpoint "
    "log_trace_cache_warnings save_muon_momentum_buffer_in_memory enable_sanity_checks leaf_module zenflow "
    "legacy_stage1 cpu_offload cpu_offload_params cpu_offload_param cpu_offload_use_pin_memory "
    "model_persistence_threshold gather_16bit_weights_on_model_save gather_fp16_weights_on_model_save "
    "module_granularity_threshold use_all_reduce_for_fetch_params allgather_sequential",
    "zero_optimization.offload_param.": "device nvme_path buffer_count buffer_size max_in_cpu pin_memory",
    "zero_optimization.offload_optimizer.": "device nvme_path buffer_count pin_memory pipeline_read pipeline_write "
    "pipeline fast_init ratio super_offload cpuadam_cores_perc",
    "activation_checkpointing.": "partition_activations number_checkpoints contiguous_memory_optimization "
    "synchronize_checkpoint_boundary profile cpu_checkpointing",
    "pipeline.": "stages partition seed_layers activation_checkpoint_interval pipe_partitioned grad_partitioned",
    "tensor_parallel.": "autotp_size tp_overlap_comm preset_model partition_config dtype tp.tp_size tp.tp_grain_size "
    "keep_module_on_host",
    "checkpoint.": "tag_validation load_universal use_node_local_storage parallel_write checkpoint_serialization writer",
    "aio.": "block_size queue_depth intra_op_parallelism thread_count single_submit overlap_events use_gds",
    "tensorboard.": "enabled output_path job_name",
    "csv_monitor.": "enabled output_path job_name",
}
ALL_KEYS = tuple(f"{section}{name}" for section, names in DEEPSPEED_KEYS.items() for name in names.split())
VERDICTS = {row.path: row.verdict for row in TABLE}


def small(**changes: Any) -> dict[str, Any]:
    """A DeepSpeed configuration as users of trilith.initialize give it."""
    return {"train_micro_batch_size_per_gpu": 1, **changes}


def nested(path: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b"."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def refusals(source: Any) -> dict[str, str]:
    """path -> message of all violations of `source`."""
    with pytest.raises(ConfigError) as caught:
        resolve(load_config(source), needs="engine")
    return {violation.path: str(violation) for violation in caught.value.violations}


def accepted(source: Any) -> tuple[Config, str]:
    """(resolved configuration, notes as one text)."""
    resolved = resolve(load_config(source), needs="engine")
    return resolved.config, "\n".join(resolved.notes)


@pytest.mark.parametrize("path", ALL_KEYS)
def test_every_deepspeed_key_has_a_verdict(path: str) -> None:
    assert path in VERDICTS or path in field_infos()


def test_every_verdict_says_why() -> None:
    for row in TABLE:
        assert row.why, row.path
        assert row.verdict != "refuse" or row.instead, row.path


# --- one by one ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [r for r in TABLE if r.verdict == "ignore"], ids=lambda row: row.path)
def test_ignored_keys_leave_a_note(row: Any) -> None:
    source = small(**nested(row.path, {}))
    if row.path.startswith(("optimizer", "scheduler")):
        source["optimizer"] = {"type": "Adam", "params": {"lr": 0.1, row.path.rpartition(".")[2]: True}}
    _, notes = accepted(source)
    assert f"{row.path}: ignored: {row.why}" in notes


@pytest.mark.parametrize(
    "row",
    [r for r in TABLE if r.verdict == "refuse" and not r.path.startswith(("optimizer", "scheduler"))],
    ids=lambda row: row.path,
)
def test_refused_keys_are_refused_unless_they_switch_nothing_on(row: Any) -> None:
    for off in row.off:
        accepted(small(**nested(row.path, off)))
    active: dict[str, Any]
    if row.switch:
        accepted(small(**nested(row.path, {row.switch: False})))
        accepted(small(**nested(row.path, {row.switch: None})))
        active, path = {row.switch: True}, f"{row.path}.{row.switch}"
    else:
        active, path = {"a": 1}, row.path
    found = refusals(small(**nested(row.path, active)))
    assert list(found) == [path]
    assert row.why in found[path] and row.instead in found[path]


@pytest.mark.parametrize(("section", "name", "why", "instead"), REFUSED_TYPES)
def test_refused_types(section: str, name: str, why: str, instead: str) -> None:
    found = refusals(small(**{section: {"type": name.upper(), "params": {"anything": 1}}}))
    assert (
        list(found) == [f"{section}.type"] and why in found[f"{section}.type"] and instead in found[f"{section}.type"]
    )


def value_at(config: Any, path: str) -> Any:
    """The value at a dotted path."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize(
    ("source", "path", "value"),
    [
        ({"bfloat16": {"enabled": True}}, "bf16.enabled", True),
        ({"bf16": {"check_overflow": False}}, "bf16.check_grad_overflow", False),
        ({"zero_optimization": True}, "zero_optimization.stage", 1),
        ({"zero_optimization": False}, "zero_optimization.stage", 0),
        ({"pipeline": {"stages": 2, "partition": "best"}}, "parallel.pipeline", 2),
        ({"pipeline": {"partition": "best"}}, "pipeline.partition", "cost"),
        ({"pipeline": {"activation_checkpoint_interval": 1}}, "activation_checkpointing.recompute", "full"),
        ({"pipeline": {"activation_checkpoint_interval": 0}}, "activation_checkpointing.recompute", "none"),
        ({"pipeline": {"stages": "auto"}}, "parallel.pipeline", 1),
        ({"tensor_parallel": {"autotp_size": 4}}, "parallel.tensor", 4),
        ({"tensor_parallel": {"autotp_size": 0}, "parallel": {"tensor": 2}}, "parallel.tensor", 2),
        ({"tensor_parallel": {"tp": {"tp_size": 2, "tp_grain_size": 1}}}, "parallel.tensor", 2),
        ({"sequence_parallel_size": 1}, "parallel.context", 1),
        ({"optimizer": {"type": "adam", "params": {"lr": 0.1}}}, "optimizer.type", "Adam"),
        ({"tensorboard": {"output_path": "", "job_name": ""}}, "tensorboard.output_path", "runs/default/tensorboard"),
        ({"tensorboard": {"output_path": "logs", "job_name": "a"}}, "tensorboard.output_path", "logs"),
        ({"steps_per_print": 7}, "training.log_interval", 7),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, "data_types.param_dtype", "fp32"),
    ],
)
def test_mapped_values(source: dict[str, Any], path: str, value: Any) -> None:
    assert value_at(accepted(small(**source))[0], path) == value


ZERO = "zero_optimization"


def at_stage_3(**changes: Any) -> dict[str, Any]:
    """A small configuration at ZeRO stage 3 on 8 data ranks."""
    return small(parallel={"data": 8}, zero_optimization={"stage": 3, **changes})


@pytest.mark.parametrize(
    ("changes", "path", "value"),
    [
        ({"cpu_offload": True}, "offload_optimizer.device", "cpu"),
        ({"cpu_offload": False}, "offload_optimizer.device", "none"),
        ({"cpu_offload": None, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer.device", "cpu"),
        ({"cpu_offload_params": True}, "offload_param.device", "cpu"),
        ({"cpu_offload_param": True}, "offload_param.device", "cpu"),
        ({"cpu_offload_use_pin_memory": False}, "offload_optimizer.pin_memory", False),
        ({"cpu_offload_use_pin_memory": False}, "offload_param.pin_memory", False),
        ({"offload_optimizer": {"pipeline": False}}, "offload_optimizer.pipeline_read", False),
        ({"offload_optimizer": {"pipeline": False}}, "offload_optimizer.pipeline_write", False),
        ({"offload_optimizer": {"super_offload": False}}, "offload_optimizer.device", "none"),
        ({"offload_optimizer": None}, "offload_optimizer.device", "none"),
        ({"offload_param": False}, "offload_param.device", "none"),
        ({"offload_param": {"device": None, "nvme_path": None}}, "offload_param.device", "none"),
        ({"offload_param": {"device": "cpu", "buffer_size": 1e8, "max_in_cpu": 1e9}}, "offload_param.device", "cpu"),
        ({"prefetch_bucket_size": 7}, "stage3_prefetch_bucket_size", 7),
        ({"prefetch_bucket_size": "auto"}, "stage3_prefetch_bucket_size", 50_000_000),
        ({"stage3_prefetch_bucket_size": 15099494.4}, "stage3_prefetch_bucket_size", 15_099_494),
        ({"param_persistence_threshold": 7}, "stage3_param_persistence_threshold", 7),
        ({"stage3_param_persistence_threshold": "auto"}, "stage3_param_persistence_threshold", 100_000),
        ({"model_persistence_threshold": 7}, "stage3_model_persistence_threshold", 7),
        ({"max_live_parameters": 7e9}, "stage3_max_live_parameters", 7_000_000_000),
        ({"max_reuse_distance": 7}, "stage3_max_reuse_distance", 7),
        ({"gather_16bit_weights_on_model_save": True}, "stage3_gather_16bit_weights_on_model_save", True),
        ({"gather_fp16_weights_on_model_save": True}, "stage3_gather_16bit_weights_on_model_save", True),
        ({"stage3_gather_fp16_weights_on_model_save": True}, "stage3_gather_16bit_weights_on_model_save", True),
        ({"mics_shard_size": 4}, "zero_hpz_partition_size", 4),
        ({"mics_shard_size": -1}, "zero_hpz_partition_size", 1),
        ({"enable_sanity_checks": True}, "enable_sanity_checks", True),
    ],
)
def test_mapped_values_of_zero(changes: dict[str, Any], path: str, value: Any) -> None:
    assert value_at(accepted(at_stage_3(**changes))[0], f"{ZERO}.{path}") == value


@pytest.mark.parametrize("source", [{"aio": {"thread_count": 3}}, {"zero_optimization": {"aio": {"thread_count": 3}}}])
def test_threads_of_the_disk_have_two_names(source: dict[str, Any]) -> None:
    assert accepted(small(**source))[0].aio.intra_op_parallelism == 3
    found = refusals(small(aio={"thread_count": 3, "intra_op_parallelism": 2}))
    assert "aio.intra_op_parallelism says 2" in found["aio.thread_count"]


def test_a_key_that_stands_for_two_says_so() -> None:
    resolved = resolve(load_config(at_stage_3(cpu_offload_use_pin_memory=False)), needs="engine")
    for section in ("offload_optimizer", "offload_param"):
        path = f"{ZERO}.{section}.pin_memory"
        assert resolved.origins[path] == f"file: mapped from {ZERO}.cpu_offload_use_pin_memory"
        assert f"{ZERO}.cpu_offload_use_pin_memory: mapped to {path}" in "\n".join(resolved.notes)
    mixed = refusals(at_stage_3(offload_optimizer={"pipeline": True, "pipeline_write": False}))
    assert "pipeline_write says False" in mixed[f"{ZERO}.offload_optimizer.pipeline"]


def test_mappings_are_said() -> None:
    source = small(
        bfloat16={"enabled": True}, tensor_parallel={"autotp_size": 2}, zero_optimization=True, dump_state=True
    )
    resolved = resolve(load_config(source), needs="engine")
    assert resolved.origins["parallel.tensor"] == "file: mapped from tensor_parallel.autotp_size"
    assert resolved.origins["bf16.enabled"] == "file: mapped from bfloat16"
    for text in ("bfloat16: mapped to bf16", "zero_optimization: True mapped to {'stage': 1}", "dump_state: mapped"):
        assert text in "\n".join(resolved.notes)


def test_a_key_and_its_alias_must_agree() -> None:
    assert (
        "parallel.tensor says 4"
        in refusals(small(tensor_parallel={"autotp_size": 2}, parallel={"tensor": 4}))["tensor_parallel.autotp_size"]
    )
    accepted(small(tensor_parallel={"autotp_size": 2}, parallel={"tensor": 2}))


@pytest.mark.parametrize(
    ("source", "path", "hint"),
    [
        ({"pipeline": {"partition": "type:transformer"}}, "pipeline.partition", "of a type"),
        ({"pipeline": {"activation_checkpoint_interval": 2}}, "pipeline.activation_checkpoint_interval", "recompute"),
        ({"pipeline": {"partition": "beste"}}, "pipeline.partition", 'must be "cost"'),
        ({"tensor_parallel": {"autotp_size": "two"}}, "parallel.tensor", "whole number"),
        (
            {"tensor_parallel": {"autotp_sise": 2}},
            "tensor_parallel.autotp_sise",
            "Did you mean tensor_parallel.autotp_size?",
        ),
        ({"tensor_parallel": {"tp": {"size": 2}}}, "tensor_parallel.tp.size", "unknown key"),
        ({"tensor_parallel": 2}, "tensor_parallel", "must be an object"),
        ({"aio": {"queue_dept": 8}}, "aio.queue_dept", "Did you mean aio.queue_depth?"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage", "must be one of 0, 1, 2 or 3"),
        (
            {"zero_optimization": {"cpu_offload": "yes"}},
            "zero_optimization.cpu_offload",
            "offload_optimizer.device",
        ),
        (
            {"zero_optimization": {"stage": 1, "cpu_offload": True, "offload_optimizer": {"device": "none"}}},
            "zero_optimization.cpu_offload",
            "offload_optimizer.device says 'none'",
        ),
        (
            {"zero_optimization": {"stage": 3, "mics_shard_size": 2}},
            "zero_optimization.zero_hpz_partition_size",
            "Give the world size, or parallel.data.",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "disk"}}},
            "zero_optimization.offload_optimizer.device",
            "must be one of 'none', 'cpu', 'nvme' or 'auto'",
        ),
        ({"zero_optimization": {"offload_optimizer": True}}, "zero_optimization.offload_optimizer", "be an object"),
        (
            {"zero_optimization": {"zero_quantized_gradients": True}},
            "zero_optimization.zero_quantized_gradients",
            "quantised collectives",
        ),
        (
            {"activation_checkpointing": {"cpu_checkpointing": True}},
            "activation_checkpointing.cpu_checkpointing",
            "full",
        ),
        ({"zero_optimization": {"grad_hooks": True}}, "zero_optimization.grad_hooks", "unknown key"),
        (
            {"zero_optimization": {"offload_param": {"device": "none", "pin_memry": True}}},
            "zero_optimization.offload_param.pin_memry",
            "Did you mean zero_optimization.offload_param.pin_memory?",
        ),
        ({"timers": {"throughput": {"enabld": True}}}, "timers.throughput.enabld", "takes enabled, synchronized"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 0.1, "adam_w_mode": False}}},
            "optimizer.params.adam_w_mode",
            '"Adam"',
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"lr": 0.1, "max_grad_norm": 1.0}}},
            "optimizer.params.max_grad_norm",
            "gradient_clipping",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"last_batch_iteration": 5}}},
            "scheduler.params.last_batch_iteration",
            "checkpoint",
        ),
    ],
)
def test_refused_values(source: dict[str, Any], path: str, hint: str) -> None:
    found = refusals(small(**source))
    assert list(found) == [path] and hint in found[path]


# --- whole configurations as they are published --------------------------------------------------------------------------


def test_pipeline_tutorial() -> None:
    config, notes = accepted(
        {
            "train_batch_size": 256,
            "train_micro_batch_size_per_gpu": 8,
            "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.9, 0.999], "eps": 1e-8}},
            "steps_per_print": 10,
            "wall_clock_breakdown": False,
        }
    )
    assert config.gradient_accumulation_steps == 32 and config.optimizer.decoupled_decay
    assert "decoupled (AdamW)" in notes


def test_trainer_with_auto_everywhere_at_stage_1() -> None:
    source = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16,
                 "hysteresis": 2, "min_loss_scale": 1},
        "bf16": {"enabled": "auto"},
        "amp": {"enabled": "auto", "opt_level": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto",
                                                         "warmup_num_steps": "auto", "total_num_steps": 5000}},
        "zero_optimization": {"stage": 1, "allgather_partitions": True, "allgather_bucket_size": 2e8,
                              "overlap_comm": True, "reduce_scatter": True, "reduce_bucket_size": "auto",
                              "contiguous_gradients": True},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 4,
        "wall_clock_breakdown": False,
    }  # fmt: skip
    config, notes = accepted(source)
    assert config.optimizer.params.lr == 1e-3 and config.gradient_clipping == 1.0
    assert config.scheduler is not None and config.scheduler.params.warmup_max_lr == 1e-3  # type: ignore[union-attr]
    assert config.zero_optimization.reduce_bucket_size == 500_000_000 and config.train_batch_size == 4
    assert notes.count("ignored") == 4


def test_zero_3_on_nvme_as_published() -> None:
    """The example that trainers' documentation gives for ZeRO-Infinity, `aio` inside zero_optimization included."""
    source = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16,
                 "hysteresis": 2, "min_loss_scale": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto",
                                                    "warmup_num_steps": "auto"}},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True, "buffer_count": 4,
                                  "fast_init": False},
            "offload_param": {"device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True, "buffer_count": 5,
                              "buffer_size": 1e8, "max_in_cpu": 1e9},
            "aio": {"block_size": 262144, "queue_depth": 32, "thread_count": 1, "single_submit": False,
                    "overlap_events": True},
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 4,
        "wall_clock_breakdown": False,
    }  # fmt: skip
    config, notes = accepted(source)
    zero = config.zero_optimization
    assert (zero.stage, zero.offload_optimizer.device, zero.offload_param.device) == (3, "nvme", "nvme")
    assert zero.offload_optimizer.nvme_path == zero.offload_param.nvme_path == "/local_nvme"
    assert (zero.offload_optimizer.buffer_count, zero.offload_param.max_in_cpu) == (4, 1_000_000_000)
    assert (zero.stage3_prefetch_bucket_size, zero.stage3_param_persistence_threshold) == (50_000_000, 100_000)
    assert zero.stage3_gather_16bit_weights_on_model_save and zero.reduce_bucket_size == 500_000_000
    assert (config.aio.block_size, config.aio.queue_depth, config.aio.intra_op_parallelism) == (262_144, 32, 1)
    assert notes.count("ignored") == 6 and "has no effect" not in notes


def test_zero_2_with_the_old_names_of_offload() -> None:
    source = {
        "train_batch_size": 16,
        "steps_per_print": 100,
        "fp16": {"enabled": True, "loss_scale": 0},
        "zero_optimization": {"stage": 2, "cpu_offload": True, "contiguous_gradients": True, "overlap_comm": True,
                              "reduce_bucket_size": 5e7, "allgather_bucket_size": 5e7},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    config, notes = accepted(source)
    zero = config.zero_optimization
    assert (zero.stage, zero.offload_optimizer.device, zero.reduce_bucket_size) == (2, "cpu", 50_000_000)
    assert f"{ZERO}.cpu_offload: mapped to {ZERO}.offload_optimizer.device" in notes


def test_what_is_not_built_is_refused_key_by_key() -> None:
    source = {
        "train_batch_size": 32,
        "bf16": {"enabled": True, "immediate_grad_update": True},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "nvme", "nvme_path": "/local", "buffer_count": 4, "fast_init": False},
            "offload_param": {"device": "cpu", "pin_memory": True, "max_in_cpu": 1e9},
            "sub_group_size": 1e9,
            "stage3_prefetch_bucket_size": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
            "zero_hpz_partition_size": 1,
            "zero_quantized_weights": True,
        },
        "aio": {"block_size": 1048576, "queue_depth": 8, "thread_count": 1, "single_submit": False},
        "flops_profiler": {"enabled": True, "profile_step": 1},
        "wandb": {"enabled": False, "project": "p"},
        "elasticity": {"enabled": True, "max_train_batch_size": 2000, "micro_batch_sizes": [2, 4]},
        "sparse_attention": {"mode": "fixed", "block": 16},
        "gradient_clippin": 1.0,
    }
    assert sorted(refusals(source)) == [
        "elasticity.enabled",
        "flops_profiler.enabled",
        "gradient_clippin",
        "sparse_attention",
        "zero_optimization.zero_quantized_weights",
    ]


def test_gpt_with_fp16_and_everything_off() -> None:
    config, notes = accepted(
        edited(
            {
                "fp16": {"enabled": True, "loss_scale": 0, "loss_scale_window": 500, "hysteresis": 2},
                "gradient_clipping": 1.0,
                "prescale_gradients": False,
                "sparse_gradients": False,
                "zero_allow_untested_optimizer": True,
                "activation_checkpointing": {"partition_activations": False, "number_checkpoints": 24},
                "amp": {"enabled": False},
                "curriculum_learning": {"enabled": False, "curriculum_type": "seqlen"},
                "checkpoint": {"tag_validation": "Warn", "load_universal": False},
                "timers": {"throughput": {"enabled": True}},
                "tensorboard": {"enabled": True, "output_path": "", "job_name": "DeepSpeedJobName"},
                "autotuning": {"enabled": False, "fast": True},
                "compile": {"deepcompile": False},
            }
        )
    )
    assert config.data_types.param_dtype == "fp16" and config.data_types.grad_accum_dtype == "fp32"
    assert "checkpoint.tag_validation: mapped" in notes and "timers.throughput: mapped" in notes
