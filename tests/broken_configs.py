"""Broken configurations as users write them, each with the key that the one message about it must name.

Unit tests load and resolve them; the command-line tests run `trilith check` on the same files. Cases of stage "preflight"
are well formed: only the layout over ranks shows that they cannot run.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class BrokenConfig:
    """`source`: the text of the file, a mapping to write as JSON, or None for a file that does not exist.

    `key`: the path that the message names. `hint`: text that its advice contains. `stage`: who refuses it.
    """

    name: str
    source: str | Mapping[str, Any] | None
    key: str
    hint: str = ""
    stage: str = "config"

    def write(self, directory: Path) -> Path:
        """Puts the case into `directory` and returns the file's path."""
        path = directory / f"{self.name}.json"
        if self.source is not None:
            text = self.source if isinstance(self.source, str) else json.dumps(self.source, indent=1)
            path.write_text(text, encoding="utf-8")
        return path


def valid_config() -> dict[str, Any]:
    """A small configuration in which nothing is wrong: data 2 x pipeline 2 x tensor 2."""
    return {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_type": "linear"}},
        "zero_optimization": {"stage": 1},
        "parallel": {"data": 2, "pipeline": 2, "tensor": 2},
        "pipeline": {"schedule": "1f1b"},
        "model": {
            "family": "gpt2",
            "num_layers": 4,
            "hidden_size": 32,
            "num_heads": 4,
            "sequence_length": 16,
            "vocab_size": 64,
        },
        "data": {"corpus": "synthetic"},
        "training": {"steps": 20},
    }


def edited(changes: Mapping[str, Any], without: str = "") -> dict[str, Any]:
    """`valid_config` with values set by dotted path, and one key left out."""
    tree = valid_config()
    for path, value in changes.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = copy.deepcopy(value)
    if without:
        *parents, name = without.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        del node[name]
    return tree


def _wrong(name: str, key: str, value: Any, hint: str = "") -> BrokenConfig:
    """One value set that makes the same key wrong."""
    return BrokenConfig(name, edited({key: value}), key, hint)


def _preflight(name: str, key: str, changes: Mapping[str, Any]) -> BrokenConfig:
    return BrokenConfig(name, edited(changes), key, stage="preflight")


def _text(old: str, new: str) -> str:
    text = json.dumps(valid_config(), indent=1)
    assert old in text
    return text.replace(old, new, 1)


SGD = {"type": "SGD", "params": {"lr": 0.1, "nesterov": True}}

FILES = (
    BrokenConfig("missing_file", None, "CONFIG", "no such file"),
    BrokenConfig("empty_file", "", ":1:1", "empty"),
    BrokenConfig("trailing_comma", '{\n "training": {"steps": 20},\n}\n', ":3:1", "comma"),
    BrokenConfig("comment", '{\n // steps\n "training": {"steps": 20}\n}\n', ":2:2", "no comments"),
    BrokenConfig("single_quotes", "{'training': {'steps': 20}}", ":1:2", "double quotes"),
    BrokenConfig("python_true", '{"wall_clock_breakdown": True}', ":1:26", "true, false and null"),
    BrokenConfig("cut_short", '{"training": {"steps": 20}', ":1:27", "not closed"),
    BrokenConfig("a_list", "[1, 2]", "a_list.json", "one JSON object"),
    BrokenConfig("duplicate_key", _text('"steps": 20', '"steps": 20, "steps": 30'), "training.steps", "duplicate"),
    BrokenConfig("not_a_number", _text('"lr": 0.001', '"lr": NaN'), "optimizer.params.lr", "finite"),
    BrokenConfig("infinity", _text('"steps": 20', '"steps": 1e999'), "training.steps", "finite"),
)

TYPOS = (
    _wrong("typo_in_section", "parallel.tensr", 2, "Did you mean parallel.tensor?"),
    _wrong("typo_at_top", "train_batch_sise", 16, "Did you mean train_batch_size?"),
    BrokenConfig(
        "typo_in_section_name",
        edited({"modle": valid_config()["model"]}, without="model"),
        "modle",
        "Did you mean model?",
    ),
    BrokenConfig(
        "typo_in_required_key",
        edited({"model.num_layer": 4}, without="model.num_layers"),
        "model.num_layer",
        "Did you mean model.num_layers?",
    ),
    _wrong("key_of_another_engine", "learning_rate", 1e-3, "Did you mean optimizer.params.lr?"),
    _wrong("section_folded_into_name", "zero_stage", 1, "Did you mean zero_optimization.stage?"),
    _wrong("key_in_wrong_section", "parallel.schedule", "1f1b", "Did you mean pipeline.schedule?"),
    _wrong("key_of_another_optimizer", "optimizer.params.momentum", 0.9, "AdamW takes lr, betas"),
    _wrong("typo_in_choice", "pipeline.schedule", "1fb1", 'Did you mean "1f1b"?'),
    _wrong("dtype_spelt_out", "data_types.param_dtype", "bfloat16", 'Did you mean "bf16"?'),
    _wrong("unknown_optimizer", "optimizer.type", "AdamX", "must be one of 'AdamW'"),
)

TYPES = (
    _wrong("number_in_quotes", "training.steps", "20", "Write it without quotes: 20."),
    _wrong("fractional_count", "model.num_layers", 4.5, "whole number"),
    _wrong("bool_for_count", "parallel.tensor", True, "whole number"),
    _wrong("bool_in_quotes", "parallel.sequence_parallel", "true", "Write it without quotes: true."),
    _wrong("section_is_a_number", "model", 4, "must be an object"),
    _wrong("zero_degree", "parallel.pipeline", 0, "at least 1"),
    _wrong("negative_seed", "training.seed", -1, "at least 0"),
    _wrong("dropout_of_one", "model.dropout", 1.0, "less than 1"),
    BrokenConfig("beta_out_of_range", edited({"optimizer.params.betas": [0.9, 1.5]}), "optimizer.params.betas[1]"),
    _wrong("auto_where_none_is", "training.steps", "auto", "whole number"),
    BrokenConfig("missing_heads", edited({}, without="model.num_heads"), "model.num_heads", "is required"),
    BrokenConfig("missing_lr", edited({}, without="optimizer.params.lr"), "optimizer.params.lr", "is required"),
    BrokenConfig("missing_model", edited({}, without="model"), "model", "is required"),
    BrokenConfig("missing_steps", edited({}, without="training"), "training.steps", "at least 1"),
    BrokenConfig("missing_data", edited({}, without="data"), "data", "data.corpus"),
)

BATCH = (
    _wrong("indivisible_batch", "train_batch_size", 15, "train_batch_size 12 or 16"),
    BrokenConfig(
        "batch_product",
        edited({"gradient_accumulation_steps": 3}),
        "train_batch_size",
        "train_batch_size 12, or gradient_accumulation_steps 4",
    ),
    BrokenConfig(
        "no_batch",
        edited({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}),
        "train_batch_size",
        "Give train_batch_size or train_micro_batch_size_per_gpu",
    ),
    _wrong("indivisible_evaluation_batch", "training.eval_batch_size", 6, "Use 4 or 8."),
)

CONTRADICTIONS = (
    BrokenConfig("two_half_precisions", edited({"fp16.enabled": True, "bf16.enabled": True}), "bf16.enabled"),
    BrokenConfig(
        "dtype_against_switch",
        edited({"fp16.enabled": True, "data_types.param_dtype": "bf16"}),
        "data_types.param_dtype",
    ),
    BrokenConfig(
        "narrow_accumulation",
        edited({"data_types.grad_accum_dtype": "bf16"}),
        "data_types.grad_accum_dtype",
    ),
    _wrong("indivisible_heads", "model.num_heads", 5, "hidden_size 30 or 35"),
    _wrong("indivisible_kv_heads", "model.num_kv_heads", 3, "One of 1, 2, 4."),
    BrokenConfig(
        "virtual_stages_without_pipeline",
        edited({"pipeline": {"schedule": "interleaved_1f1b", "virtual_stages": 2}, "parallel.pipeline": 1}),
        "pipeline.virtual_stages",
    ),
    BrokenConfig("two_data_sources", edited({"data.paths": ["a"]}), "data.paths", "Keep one."),
    BrokenConfig(
        "data_set_without_vocabulary",
        edited({"data": {"paths": ["a"]}}, without="model.vocab_size"),
        "model.vocab_size",
    ),
    BrokenConfig(
        "vocabulary_too_small",
        edited({"data": {"corpus": "python-stdlib"}}),
        "model.vocab_size",
        "data.tokenizer.vocab_size 4096",
    ),
    BrokenConfig("nesterov_without_momentum", edited({"optimizer": SGD}), "optimizer.params.nesterov"),
    _wrong("warmup_downwards", "scheduler.params.warmup_min_lr", 0.5),
    BrokenConfig(
        "warmup_too_long",
        edited({"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 30}}}),
        "scheduler.params.warmup_num_steps",
        "total_num_steps 20",
    ),
    BrokenConfig("swiglu_in_gpt2", edited({"model.activation": "swiglu"}), "model.activation"),
    _wrong("context_parallel", "parallel.context", 2, "only 1"),
    _wrong("indivisible_replicas", "parallel.replicate", 3, "One of 1, 2."),
)

PIPEDREAM = {"pipeline.schedule": "pipedream", "gradient_clipping": 0, "model.tie_embeddings": False}

SCHEDULES = (
    BrokenConfig(
        "schedule_without_its_file", edited({"pipeline.schedule": "file"}), "pipeline.schedule_file", "Give the file"
    ),
    _wrong("file_without_its_schedule", "pipeline.schedule_file", "mine.txt", 'set pipeline.schedule to "file"'),
    BrokenConfig(
        "pipedream_clips", edited(PIPEDREAM | {"gradient_clipping": 1.0}), "gradient_clipping", "Set it to 0."
    ),
    BrokenConfig(
        "pipedream_ties",
        edited(PIPEDREAM | {"model.tie_embeddings": "auto"}),
        "model.tie_embeddings",
        "Set it to false.",
    ),
    BrokenConfig("pipedream_scales", edited(PIPEDREAM | {"fp16.enabled": True}), "fp16.loss_scale", "fixed"),
    BrokenConfig(
        "pipedream_skips", edited(PIPEDREAM | {"bf16.enabled": True}), "bf16.check_grad_overflow", "Set it to false."
    ),
    BrokenConfig(
        "postvalidation_of_nothing",
        edited({"pipeline.schedule": "pipedream_2bw", "pipeline.optimizer_sync": "postvalidate"}),
        "pipeline.optimizer_sync",
        'Use "step".',
    ),
    _wrong("memory_limit_of_nothing", "pipeline.memory_limit_bytes", 0, "at least 1"),
)

TO_CPU = {"zero_optimization.offload_optimizer": {"device": "cpu", "pin_memory": True}}
TO_DISK = {"zero_optimization.offload_optimizer": {"device": "nvme", "nvme_path": "/local_nvme"}}

ZERO = (
    _wrong("zero_4", "zero_optimization.stage", 4, "must be one of 0, 1, 2 or 3"),
    _wrong("typo_in_offload", "zero_optimization.offload_param.devise", "cpu", "offload_param.device?"),
    _wrong("typo_in_offload_device", "zero_optimization.offload_param.device", "nvm", 'Did you mean "nvme"?'),
    _wrong("more_than_all_offloaded", "zero_optimization.offload_optimizer.ratio", 1.5, "at most 1"),
    BrokenConfig(
        "offload_of_whole_states",
        edited(TO_CPU | {"zero_optimization.stage": 0}),
        "zero_optimization.offload_optimizer.device",
        "Use stage 1, 2 or 3",
    ),
    BrokenConfig(
        "offload_of_whole_weights",
        edited({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}),
        "zero_optimization.offload_param.device",
        "Use stage 3",
    ),
    BrokenConfig(
        "disk_without_a_path",
        edited({"zero_optimization.offload_optimizer": {"device": "nvme"}}),
        "zero_optimization.offload_optimizer.nvme_path",
        "Give a directory",
    ),
    BrokenConfig(
        "automatic_offload_without_a_limit",
        edited({"zero_optimization": {"stage": 3, "offload_param": {"device": "auto"}}}),
        "zero_optimization.offload_param.device",
        "Give pipeline.memory_limit_bytes",
    ),
    BrokenConfig(
        "pipedream_partitions_gradients",
        edited(PIPEDREAM | {"zero_optimization.stage": 2}),
        "zero_optimization.stage",
        "Use stage 0 or 1",
    ),
    BrokenConfig(
        "two_versions_of_partitioned_weights",
        edited({"pipeline.schedule": "pipedream_2bw", "zero_optimization.stage": 3}),
        "zero_optimization.stage",
        "Use stage 0 or 1",
    ),
    BrokenConfig(
        "two_versions_offloaded",
        edited(TO_CPU | {"pipeline.schedule": "pipedream_2bw"}),
        "zero_optimization.offload_optimizer.device",
        "several versions",
    ),
    BrokenConfig(
        "postvalidation_of_states_on_disk",
        edited(TO_DISK | {"pipeline.optimizer_sync": "postvalidate"}),
        "pipeline.optimizer_sync",
        'Use "step"',
    ),
    _wrong("indivisible_partition", "zero_optimization.zero_hpz_partition_size", 3, "must divide parallel.data 2"),
    BrokenConfig(
        "two_numbers_of_replicas",
        edited({"parallel.replicate": 2, "zero_optimization.zero_hpz_partition_size": 2}),
        "parallel.replicate",
        "Keep one of the two.",
    ),
)

BLOCKS = {"model.sequence_length": 128, "sparse_attention.mode": "bigbird"}

SPARSE = (
    BrokenConfig(
        "typo_in_mode", edited(BLOCKS | {"sparse_attention.mode": "bigbrid"}), "sparse_attention.mode", "bigbird"
    ),
    BrokenConfig(
        "key_of_another_mode",
        edited(BLOCKS | {"sparse_attention.num_local_blocks": 8}),
        "sparse_attention.num_local_blocks",
        "bigbird takes mode, block",
    ),
    BrokenConfig("uneven_block", edited(BLOCKS | {"sparse_attention.block": 48}), "sparse_attention.block", "Use 16"),
    BrokenConfig(
        "causal_family_looks_ahead",
        edited(BLOCKS | {"sparse_attention.attention": "bidirectional"}),
        "sparse_attention.attention",
        "is causal",
    ),
)

REFUSED = (
    _wrong("quantised_weights", "zero_optimization.zero_quantized_weights", True, "quantised collectives"),
    _wrong("super_offload", "zero_optimization.offload_optimizer.super_offload", True, "SuperOffload"),
    _wrong("activations_on_the_cpu", "activation_checkpointing.cpu_checkpointing", True, "stay on the device"),
    _wrong("direct_storage", "aio.use_gds", True, "host memory"),
    _wrong("apex", "amp.enabled", True, "bf16.enabled"),
    _wrong("one_bit_adam", "optimizer.type", "OneBitAdam", "AdamW"),
    _wrong("typo_in_deepspeed_block", "flops_profiler.profil_step", 3, "profile_step"),
)

PREFLIGHT = (
    _preflight("heads_over_tensor", "model.num_heads", {"parallel": {"tensor": 8}}),
    _preflight("ffn_over_tensor", "model.ffn_hidden_size", {"model.ffn_hidden_size": 33}),
    _preflight(
        "sequence_over_tensor",
        "model.sequence_length",
        {"parallel.sequence_parallel": True, "model.sequence_length": 15},
    ),
    _preflight("more_stages_than_layers", "model.num_layers", {"parallel": {"pipeline": 8}}),
    _preflight("partition_of_other_length", "pipeline.partition", {"pipeline.partition": [1, 1, 2]}),
    _preflight("partition_of_other_sum", "pipeline.partition", {"pipeline.partition": [1, 2]}),
    _preflight("virtual_stages_without_interleaving", "pipeline.virtual_stages", {"pipeline.virtual_stages": 2}),
    _preflight(
        "one_stage_a_rank_in_a_v",
        "pipeline.virtual_stages",
        {"pipeline.schedule": "zb_v", "pipeline.virtual_stages": 1},
    ),
    _preflight(
        "too_few_microbatches",
        "gradient_accumulation_steps",
        {"pipeline.schedule": "zb_h2", "train_batch_size": 4},
    ),
    _preflight(
        "too_few_microbatches_for_two_versions",
        "gradient_accumulation_steps",
        {"pipeline.schedule": "pipedream_2bw", "train_batch_size": 4},
    ),
    _preflight(
        "no_such_schedule_file",
        "pipeline.schedule_file",
        {"pipeline.schedule": "file", "pipeline.schedule_file": "there/is/none.txt"},
    ),
    _preflight("memory_limit", "pipeline.memory_limit_bytes", {"pipeline.memory_limit_bytes": 1000}),
    _preflight(
        "memory_limit_of_a_search",
        "pipeline.memory_limit_bytes",
        {"pipeline.memory_limit_bytes": 1000, "pipeline.schedule": "auto"},
    ),
)

BROKEN_CONFIGS: tuple[BrokenConfig, ...] = (
    *FILES,
    *TYPOS,
    *TYPES,
    *BATCH,
    *CONTRADICTIONS,
    *SCHEDULES,
    *ZERO,
    *SPARSE,
    *REFUSED,
    *PREFLIGHT,
)
