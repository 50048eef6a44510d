"""config.resolve: every "auto" becomes a value with an origin; arithmetic is exact; contradictions are all named."""

from __future__ import annotations

import itertools
import json
import pickle
from typing import Any

import pytest

from tests.broken_configs import edited, valid_config
from trilith.config import Config, load_config, resolve
from trilith.config.base import AUTO
from trilith.config.batch import MICRO, STEPS, TOTAL, derive_batch
from trilith.config.draft import Draft
from trilith.config.resolve import ffn_width
from trilith.errors import ConfigError, Violation


def resolved(changes: dict[str, Any], world_size: int | None = None, without: str = "") -> Config:
    """The resolved configuration of `valid_config` with `changes`."""
    return resolve(load_config(edited(changes, without)), world_size).config


def violations(changes: dict[str, Any], world_size: int | None = None) -> dict[str, str]:
    """path -> message of what is wrong with `valid_config` and `changes`."""
    with pytest.raises(ConfigError) as caught:
        resolved(changes, world_size)
    return {violation.path: str(violation) for violation in caught.value.violations}


# --- the batch rule ----------------------------------------------------------------------------------------------------


def batch(total: int | None, micro: int | None, steps: int | None, data: int) -> tuple[int, ...] | None:
    """(total, micro, steps) by the batch rule, None where it is refused; None: not given."""
    values: dict[str, Any] = {
        TOTAL: total or AUTO,
        MICRO: micro or AUTO,
        STEPS: steps or AUTO,
        "parallel": {"data": data},
    }
    draft = Draft(values, {}, None, None, 1)
    derive_batch(draft)
    if not draft.violations:
        return values[TOTAL], values[MICRO], values[STEPS]
    assert [violation.path for violation in draft.violations] == [TOTAL]
    return None


def test_batch_rule_against_brute_force() -> None:
    options = (None, 1, 2, 3, 4, 6, 12)
    for total, micro, steps, data in itertools.product(options, options, options, (1, 2, 3)):
        # What is open of the accumulation is 1 where the total or the microbatch is open, too.
        open_steps = [1] if total is None or micro is None else range(1, 13)
        fits = [
            (t, m, a)
            for m in ([micro] if micro else range(1, 13))
            for a in ([steps] if steps else open_steps)
            for t in [total or m * a * data]
            if t == m * a * data and (total or micro)
        ]
        assert len(fits) <= 1
        assert batch(total, micro, steps, data) == (fits[0] if fits else None), (total, micro, steps, data)


def test_the_message_shows_numbers_rule_and_ways_out() -> None:
    text = violations({"train_batch_size": 36, "train_micro_batch_size_per_gpu": 4})["train_batch_size"]
    for part in ("36", "4 x parallel.data 2 = 8", "train_batch_size 32 or 40", "train_micro_batch_size_per_gpu 3 or 6"):
        assert part in text
    for total, micro in ((32, 4), (40, 4), (36, 3), (36, 6)):
        resolved({"train_batch_size": total, "train_micro_batch_size_per_gpu": micro})


def test_the_origin_shows_the_arithmetic() -> None:
    origins = resolve(load_config(valid_config())).origins
    assert origins["gradient_accumulation_steps"] == "derived: train_batch_size 16 / (micro 2 x data 2)"


def test_numbers_beyond_64_bits_are_refused() -> None:
    changes = {"train_batch_size": AUTO, "train_micro_batch_size_per_gpu": 2**62, "gradient_accumulation_steps": 2**62}
    assert "64 bits" in violations(changes)["train_batch_size"]


# --- degrees -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "data"), [(None, 1), (4, 1), (8, 2), (16, 4)])
def test_data_degree_from_world_size(world_size: int | None, data: int) -> None:
    source = edited({"parallel.data": AUTO})
    result = resolve(load_config(source), world_size)
    assert result.config.parallel.data == data and result.world_size == 4 * data


def test_world_size_is_the_product() -> None:
    assert resolve(load_config(valid_config())).world_size == 8
    assert resolve(load_config(valid_config()), 8).world_size == 8


@pytest.mark.parametrize("world_size", [0, -4, 2, 6])
def test_world_size_that_does_not_fit(world_size: int) -> None:
    assert (
        "no multiple of pipeline 2 x tensor 2 = 4" in violations({"parallel.data": AUTO}, world_size)["parallel.data"]
    )
    assert f"the world size is {world_size}" in violations({}, world_size)["parallel.data"]


def test_a_wrong_world_size_is_not_blamed_on_the_batch() -> None:
    assert list(violations({"parallel.data": AUTO, "train_batch_size": 15}, 6)) == ["parallel.data"]


@pytest.mark.parametrize(("cores", "local", "threads"), [(2, None, 1), (64, None, 8), (64, 2, 32), (3, 2, 1)])
def test_threads(cores: int, local: int | None, threads: int) -> None:
    result = resolve(load_config(valid_config()), cores=cores, local_ranks=local)
    assert result.config.run.threads == threads
    assert f"{cores} cores / {local or 8} ranks" in result.origins["run.threads"]


# --- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "param", "accumulated"),
    [
        ({}, "fp32", "fp32"),
        ({"bf16.enabled": True}, "bf16", "fp32"),
        ({"fp16.enabled": True, "bf16.enabled": False}, "fp16", "fp32"),
        ({"data_types.param_dtype": "fp16"}, "fp16", "fp32"),
        ({"data_types.param_dtype": "fp64"}, "fp64", "fp64"),
        ({"bf16.enabled": True, "data_types.grad_accum_dtype": "bf16"}, "bf16", "bf16"),
    ],
)
def test_number_formats(changes: dict[str, Any], param: str, accumulated: str) -> None:
    config = resolved(changes)
    assert (config.data_types.param_dtype, config.data_types.grad_accum_dtype) == (param, accumulated)
    assert config.communication_data_type == accumulated
    assert (config.fp16.enabled, config.bf16.enabled) == (param == "fp16", param == "bf16")


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"fp16.enabled": True, "bf16.enabled": True}, "bf16.enabled"),
        ({"fp16.enabled": False, "data_types.param_dtype": "fp16"}, "fp16.enabled"),
        ({"bf16.enabled": True, "data_types.param_dtype": "fp64"}, "data_types.param_dtype"),
        ({"data_types.param_dtype": "fp64", "data_types.grad_accum_dtype": "fp32"}, "data_types.grad_accum_dtype"),
        ({"bf16.enabled": True, "data_types.grad_accum_dtype": "fp16"}, "data_types.grad_accum_dtype"),
        ({"communication_data_type": "fp64"}, "communication_data_type"),
        ({"fp16.enabled": True, "fp16.min_loss_scale": 0}, "fp16.min_loss_scale"),
        ({"fp16.enabled": True, "fp16.initial_scale_power": 2, "fp16.min_loss_scale": 8}, "fp16.min_loss_scale"),
    ],
)
def test_number_formats_that_contradict(changes: dict[str, Any], path: str) -> None:
    assert list(violations(changes)) == [path]


# --- model, data, training ---------------------------------------------------------------------------------------------


def test_model_by_family() -> None:
    gpt2 = resolved({"model.dropout": 0.1}).model
    llama = resolved({"model.dropout": 0.1, "model.family": "llama"}).model
    assert (gpt2.ffn_hidden_size, gpt2.tie_embeddings, gpt2.attention_dropout) == (128, True, 0.1)
    assert (llama.ffn_hidden_size, llama.tie_embeddings, llama.attention_dropout) == (88, False, 0.0)
    assert (gpt2.activation, llama.activation, gpt2.linear_bias, llama.linear_bias) == (
        "gelu_tanh",
        "swiglu",
        True,
        False,
    )
    assert gpt2.num_kv_heads == llama.num_kv_heads == 4 and gpt2.norm_eps == 1e-5


def test_ffn_of_published_llamas() -> None:
    assert ffn_width("llama", 4096)[0] == 11008 and ffn_width("llama", 5120)[0] == 13824
    for hidden in range(1, 3000):
        width, block = ffn_width("llama", hidden)[0], 256 if hidden >= 1024 else 8
        assert width % block == 0 and 0 <= 3 * width - 8 * hidden < 3 * block


def test_vocabulary() -> None:
    without = "model.vocab_size"
    assert resolved({}, without=without).model.vocab_size == 4096
    corpus = {"data": {"corpus": "python-stdlib", "tokenizer": {"vocab_size": 300}}}
    assert resolved(corpus, without=without).model.vocab_size == 300
    assert resolved({**corpus, "model.vocab_size": 512}).model.vocab_size == 512
    loaded = {"data": {"paths": ["a"], "tokenizer": {"path": "t.json", "vocab_size": 500}}}
    assert resolved(loaded, without=without).model.vocab_size == 500
    for data in ({"paths": ["a"]}, {"paths": ["a"], "tokenizer": {"path": "t.json"}}):
        assert "must be given" in violations({"data": data, "model.vocab_size": AUTO})["model.vocab_size"]


def test_training_autos() -> None:
    config = resolved({"run.directory": "runs/x/", "training.seed": 7, "zero_optimization.reduce_bucket_size": AUTO})
    assert config.data.seed == 7 and config.training.eval_batch_size == 16
    assert config.checkpoint.directory == "runs/x/checkpoints" and config.tensorboard.job_name == "x"
    assert config.zero_optimization.reduce_bucket_size == 32 * 32 and config.zero_optimization.overlap_comm is True
    assert (config.training.log_interval, config.steps_per_print, config.gradient_clipping) == (10, 10, 1.0)
    assert resolved({"training.log_interval": 3}).steps_per_print == 3
    assert list(violations({"training.log_interval": 3, "steps_per_print": 4})) == ["steps_per_print"]


def test_optimizer_autos() -> None:
    params: Any = resolved(
        {"optimizer.params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), AUTO)}
    ).optimizer.params
    assert (params.lr, params.betas, params.eps, params.weight_decay) == (1e-3, (0.9, 0.999), 1e-8, 0.0)
    warm = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02}}, "optimizer.params.lr": AUTO}
    assert resolved(warm).optimizer.params.lr == 0.02
    assert resolved({}, without="optimizer").optimizer.type == "AdamW"


@pytest.mark.parametrize(
    ("kind", "params", "expected"),
    [
        ("WarmupLR", {}, {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-3, "warmup_num_steps": 1000, "warmup_type": "log"}),
        (
            "WarmupDecayLR",
            {"warmup_num_steps": AUTO},
            {"total_num_steps": 20, "warmup_num_steps": 2, "warmup_max_lr": 1e-3},
        ),
        (
            "WarmupCosineLR",
            {"warmup_num_steps": 5},
            {"total_num_steps": 20, "cos_min_ratio": 1e-4, "warmup_type": "log"},
        ),
        ("Constant", {}, {"warmup_num_steps": 0}),
        ("WSD", {"warmup_num_steps": AUTO}, {"warmup_num_steps": 2, "decay_num_steps": 2, "total_num_steps": 20}),
    ],
)
def test_scheduler_autos(kind: str, params: dict[str, Any], expected: dict[str, Any]) -> None:
    scheduler = resolved({"scheduler": {"type": kind, "params": params}}).scheduler
    assert scheduler is not None and scheduler.type == kind
    assert expected.items() <= scheduler.params.model_dump().items()


def test_schedule_without_a_length() -> None:
    source = {"train_batch_size": 1, "scheduler": {"type": "WarmupDecayLR"}}
    with pytest.raises(ConfigError, match=r"scheduler\.params\.total_num_steps = \(not given\)"):
        resolve(load_config(source), needs="engine")


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"model.family": "llama", "model.hidden_size": 36, "model.num_heads": 12}, "model.num_heads"),
        ({"model.family": "llama", "model.activation": "gelu"}, "model.activation"),
        ({"data.eod_token": 64}, "data.eod_token"),
        ({"data": {"paths": ["a"], "loss_mask": "eod"}}, "data.eod_token"),
        ({"data.split": [0, 1, 1]}, "data.split"),
        ({"data.split": [1, 0, 0], "training.eval_interval": 5}, "data.split"),
        ({"training.generate_tokens": 5}, "training.generate_tokens"),
        ({"parallel.replicate": 4}, "parallel.replicate"),
        (
            {"scheduler": {"type": "WSD", "params": {"warmup_num_steps": 15, "decay_num_steps": 6}}},
            "scheduler.params.decay_num_steps",
        ),
    ],
)
def test_contradictions(changes: dict[str, Any], path: str) -> None:
    assert list(violations(changes)) == [path]


def test_all_contradictions_at_once() -> None:
    changes = {"train_batch_size": 15, "model.num_heads": 5, "pipeline.schedule_file": "a", "parallel.context": 2}
    assert set(violations({**changes, "fp16.enabled": True, "bf16.enabled": True})) == {*changes, "bf16.enabled"}


# --- ZeRO --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [32, 100, 4096, 12288])
def test_sizes_of_zero_3(hidden: int) -> None:
    sizes = ("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    source = edited({"model.hidden_size": hidden, "zero_optimization": {"stage": 3, **dict.fromkeys(sizes, AUTO)}})
    result = resolve(load_config(source))
    zero = result.config.zero_optimization
    assert zero.stage3_prefetch_bucket_size == hidden * hidden - -(-hidden * hidden // 10)
    assert zero.stage3_param_persistence_threshold == 10 * hidden
    assert result.origins[f"zero_optimization.{sizes[0]}"] == f"derived: 0.9 x hidden_size {hidden} squared"
    assert result.origins[f"zero_optimization.{sizes[1]}"] == f"derived: 10 x hidden_size {hidden}"


@pytest.mark.parametrize(("data", "shard", "replicate"), [(8, 1, 1), (8, 2, 4), (8, 8, 1), (6, 3, 2)])
def test_replicas_from_the_size_of_a_partition(data: int, shard: int, replicate: int) -> None:
    changes = {
        "parallel": {"data": AUTO},
        "train_batch_size": 2 * data,
        "zero_optimization": {"stage": 2, "zero_hpz_partition_size": shard},
    }
    first = resolve(load_config(edited(changes)), data)
    assert first.config.parallel.replicate == replicate
    assert (first.world_size, first.config.parallel.data) == (data, data)
    if shard > 1:
        assert first.origins["parallel.replicate"] == f"derived: parallel.data {data} / zero_hpz_partition_size {shard}"
        assert f"partitioned among {shard} ranks only (HSDP)" in "\n".join(first.notes)
    again = resolve(load_config(first.to_json()["config"]), data)
    assert again.config == first.config


def test_replicas_as_given() -> None:
    given = {"parallel": {"data": 8, "replicate": 4}, "zero_optimization.stage": 3}
    assert resolved(given).parallel.replicate == 4
    assert resolved(given | {"zero_optimization.zero_hpz_partition_size": 2}).parallel.replicate == 4
    wrong = violations(given | {"zero_optimization.zero_hpz_partition_size": 4})
    assert "says 2" in wrong["parallel.replicate"] and len(wrong) == 1
    assert "One of 1, 2, 4, 8." in violations(given | {"parallel.replicate": 3})["parallel.replicate"]


def test_every_schedule_that_flushes_takes_zero_3_and_offload() -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    for schedule in ("gpipe", "1f1b", "zb_h1", "zb_v", "dualpipe_v", AUTO):
        config = resolved({"zero_optimization": zero, "pipeline": {"schedule": schedule}})
        assert config.zero_optimization.offload_param.device == "cpu"
    assert set(violations({"zero_optimization": zero, "pipeline.schedule": "pipedream_2bw"})) == {
        "zero_optimization.stage",
        "zero_optimization.offload_optimizer.device",
        "zero_optimization.offload_param.device",
    }


def test_automatic_offload_within_a_limit() -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": AUTO}, "offload_param": {"device": AUTO}}
    config = resolved({"zero_optimization": zero, "pipeline.memory_limit_bytes": 10**9})
    assert config.zero_optimization.offload_optimizer.device == config.zero_optimization.offload_param.device == AUTO
    assert len(violations({"zero_optimization": zero})) == 2


def test_postvalidation_takes_back_what_lies_in_memory() -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "nvme", "nvme_path": "a"}}
    resolved({"zero_optimization": zero, "pipeline.optimizer_sync": "postvalidate"})


@pytest.mark.parametrize(
    ("zero", "note"),
    [
        ({"stage": 2, "stage3_max_live_parameters": 5}, "stage3_max_live_parameters: has no effect at stage 2"),
        ({"stage": 0, "max_reuse_distance": 5}, "stage3_max_reuse_distance: has no effect at stage 0"),
        ({"stage": 1, "stage3_backward_prefetch": "post"}, "stage3_backward_prefetch: has no effect at stage 1"),
        ({"stage": 1, "reduce_interval": "step"}, "reduce_interval: has no effect at stage 1"),
        ({"stage": 0, "reduce_interval": "auto"}, "reduce_interval: has no effect at stage 0"),
        ({"stage": 2, "offload_optimizer": {"ratio": 0.5}}, "offload_optimizer.ratio: has no effect"),
        (
            {"stage": 3, "offload_param": {"device": "cpu", "nvme_path": "a"}},
            "offload_param.nvme_path: has no effect while device is cpu",
        ),
        ({"stage": 0, "zero_hpz_partition_size": 1}, "parallel.replicate: has no effect at zero_optimization.stage 0"),
    ],
)
def test_notes_of_what_has_no_effect(zero: dict[str, Any], note: str) -> None:
    source = edited({"zero_optimization": zero, "parallel.replicate": 2})
    assert note in "\n".join(resolve(load_config(source)).notes)


def test_no_note_where_there_is_an_effect() -> None:
    zero = {
        "stage": 3,
        "stage3_max_live_parameters": 5,
        "reduce_interval": "step",
        "offload_optimizer": {"device": "nvme", "nvme_path": "a", "ratio": 0.5},
    }
    notes = resolve(load_config(edited({"zero_optimization": zero}))).notes
    assert not [note for note in notes if "zero_optimization" in note]


# --- the result --------------------------------------------------------------------------------------------------------


def test_nothing_is_left_open_and_everything_has_an_origin() -> None:
    result = resolve(load_config(edited({"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 1}}})))
    assert list(result.origins) == list(leaves(result.to_json()["config"]))
    open_keys = {path for path, value in leaves(result.to_json()["config"]).items() if value == AUTO}
    assert open_keys == {"run.device", "kernels.backend"}  # a choice that each rank makes, not a derived value
    kinds = {origin.split(":")[0] for origin in result.origins.values()}
    assert kinds == {"file", "default", "derived"}


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value of everything that is no object."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


@pytest.mark.parametrize("world_size", [None, 8])
def test_resolved_configuration_loads_and_resolves_to_itself(world_size: int | None, tmp_path: Any) -> None:
    first = resolve(load_config(edited({"bf16.enabled": True, "optimizer.type": "Adam"})), world_size)
    again = resolve(load_config(first.to_json()["config"]), world_size)
    assert again.config == first.config and again.world_size == first.world_size
    path = tmp_path / "config.resolved.json"
    path.write_text(json.dumps(first.to_json()))
    assert resolve(load_config(path), world_size).config == first.config
    assert resolve(load_config(path, ["training.steps=3"])).config.training.steps == 3
    assert resolve(first.config, world_size).to_json() == first.to_json()
    assert pickle.loads(pickle.dumps(first)).to_json() == first.to_json()


def test_the_same_input_gives_the_same_text() -> None:
    texts = {json.dumps(resolve(load_config(valid_config())).to_json()) for _ in range(3)}
    assert len(texts) == 1


def test_engine_needs_no_model() -> None:
    source = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    result = resolve(load_config(source), 2, needs="engine")
    assert result.config.model is None and result.config.train_batch_size == 8
    assert resolve(load_config(result.to_json()["config"]), 2, needs="engine").config == result.config
    with pytest.raises(ConfigError) as caught:
        resolve(load_config(source), 2)
    assert {v.path for v in caught.value.violations} == {"model", "data", "training.steps"}


def test_notes() -> None:
    source = edited({"parallel": {"sequence_parallel": True}, "model.rope_theta": 5.0, "optimizer.type": "Adam"})
    source["scheduler"] = {"type": "WarmupDecayLR", "params": {"total_num_steps": 10, "warmup_num_steps": 2}}
    source["optimizer"]["params"]["lr"] = 0.5
    notes = "\n".join(resolve(load_config(source)).notes)
    for text in (
        "sequence_parallel: has no effect with parallel.tensor 1",
        "gradient_clipping: 1 is on by default",
        "decoupled (AdamW)",
        'warmup_type: "log" by default',
        "warmup_max_lr: 0.001 takes the place of optimizer.params.lr 0.5",
        "rope_theta: has no effect in family gpt2",
        "total_num_steps: 10 ends before training.steps 20",
    ):
        assert text in notes


def test_rules_of_other_rooms_are_reported_together() -> None:
    def check(config: Config) -> list[Violation]:
        return [
            Violation("model.num_layers", config.model.num_layers, "is not to my taste"),
            Violation("model.num_heads", config.model.num_heads, "is known to be wrong already"),
        ]

    config = load_config(edited({"model.num_heads": 5}))
    with pytest.raises(ConfigError) as caught:
        resolve(config, checks=[check])
    assert [v.path for v in caught.value.violations] == ["model.num_heads", "model.num_layers"]
