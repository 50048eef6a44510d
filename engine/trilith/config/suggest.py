"""The nearest key to one that does not exist: in its section, under another engine's name, or in another section."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from types import MappingProxyType

from trilith.config.deepspeed import accepted_paths
from trilith.config.schema import known_paths

# Names that other engines use, and words that people write, for keys of ours.
SYNONYMS = MappingProxyType(
    {
        name: path
        for path, names in (
            ("optimizer.params.lr", "learning_rate lr base_lr max_lr"),
            ("optimizer.params.betas", "adam_betas adam_beta1 adam_beta2 beta1 beta2 beta"),
            ("optimizer.params.eps", "adam_eps adam_epsilon epsilon"),
            ("optimizer.params.weight_decay", "wd decay"),
            ("optimizer.type", "optimizer_type optimizer_name optim"),
            ("scheduler.type", "lr_scheduler scheduler_type lr_scheduler_type lr_decay_style"),
            ("scheduler.params.warmup_num_steps", "warmup warmup_steps warmup_iters lr_warmup_iters"),
            ("gradient_clipping", "max_grad_norm clip_grad clip grad_clip gradient_clip_val"),
            ("train_batch_size", "global_batch_size batch_size total_batch_size batch"),
            (
                "train_micro_batch_size_per_gpu",
                "micro_batch_size microbatch_size per_device_train_batch_size train_micro_batch_size micro_batch",
            ),
            ("gradient_accumulation_steps", "grad_accum gas num_microbatches microbatches accumulation_steps"),
            ("zero_optimization.stage", "zero_stage zero zero_level"),
            ("zero_optimization.offload_optimizer.device", "offload_optimizer_device optimizer_offload"),
            ("zero_optimization.offload_param.device", "offload_param_device param_offload"),
            ("zero_optimization.stage3_backward_prefetch", "backward_prefetch"),
            ("zero_optimization.stage3_gather_16bit_weights_on_model_save", "zero3_save_16bit_model"),
            ("parallel.replicate", "dp_replicate data_parallel_replicate_degree num_replicas hsdp"),
            ("zero_optimization.zero_hpz_partition_size", "dp_shard data_parallel_shard_degree"),
            ("parallel.tensor", "tensor_model_parallel_size tensor_parallel_size tp tp_size tp_degree"),
            ("parallel.pipeline", "pipeline_model_parallel_size pipeline_parallel_size pp pp_size pp_degree"),
            ("parallel.data", "data_parallel_size dp dp_size dp_degree world_size"),
            ("parallel.context", "context_parallel_size cp cp_size cp_degree"),
            ("parallel.sequence_parallel", "sp enable_sequence_parallel"),
            ("parallel.timeout_s", "timeout distributed_timeout_minutes"),
            ("pipeline.virtual_stages", "virtual num_virtual_stages virtual_pipeline_model_parallel_size interleave"),
            ("model.num_layers", "n_layer n_layers layers num_hidden_layers depth"),
            ("model.hidden_size", "n_embd d_model hidden hidden_dim dim width"),
            ("model.num_heads", "n_head n_heads heads num_attention_heads"),
            ("model.num_kv_heads", "n_kv_heads num_query_groups num_key_value_heads kv_heads"),
            ("model.ffn_hidden_size", "ffn intermediate_size ffn_dim d_ff n_inner mlp_size"),
            ("model.sequence_length", "seq_length seq_len max_seq_len block_size n_positions n_ctx context_length"),
            ("model.vocab_size", "vocab n_vocab padded_vocab_size"),
            ("model.tie_embeddings", "tie_word_embeddings tied untie_embeddings_and_output_weights"),
            ("model.dropout", "hidden_dropout resid_pdrop embd_pdrop"),
            ("model.attention_dropout", "attn_pdrop attn_dropout"),
            ("model.norm_eps", "layernorm_epsilon layer_norm_epsilon rms_norm_eps norm_epsilon"),
            ("model.init_std", "init_method_std initializer_range"),
            ("model.family", "model_type architecture arch"),
            ("training.steps", "train_iters max_steps num_steps iterations epochs num_train_epochs"),
            ("training.seed", "random_seed"),
            ("training.eval_batches", "eval_iters"),
            ("checkpoint.save_interval", "save_steps save_every"),
            ("checkpoint.directory", "save save_dir output_dir checkpoint_dir"),
            ("run.directory", "out_dir run_dir workdir"),
            ("activation_checkpointing.recompute", "gradient_checkpointing recompute_granularity"),
            ("data_types.param_dtype", "dtype precision torch_dtype mixed_precision"),
            ("data.paths", "data_path dataset data_paths"),
            ("data.corpus", "corpora dataset_name"),
        )
        for name in names.split()
    }
)


def nearest_key(path: str) -> str:
    """The known path that the writer of the unknown dotted `path` most likely meant; "" if none is near.

    A near name in the same section comes first, then another engine's name for a key, then the same name in another
    section, then names that are near at all.
    """
    candidates = known_paths()
    if "[" in path:
        section = path[: path.index("[")]
        return _close(path.rpartition(".")[2], _children(section, candidates), f"{section}[...]", 0.6)
    section, _, name = path.rpartition(".")
    siblings = _children(section, candidates)
    for folded in siblings:
        if folded.lower() == name.lower().replace("-", "_"):
            return _join(section, folded)
    found = _close(name, siblings, section, 0.8)
    if found:
        return found
    plain = name.lower().replace("-", "_").strip("_")
    if plain in SYNONYMS and SYNONYMS[plain] != path:
        return SYNONYMS[plain]
    elsewhere = [known for known in candidates if known.rpartition(".")[2] == plain]
    if elsewhere:
        return min(elsewhere, key=lambda known: (known.startswith(("scheduler", "data.")), known.count("."), known))
    found = _close(name, siblings, section, 0.6)
    if found:
        return found
    leaves = {known.rpartition(".")[2]: known for known in reversed(candidates)}
    close = get_close_matches(plain, sorted(leaves), 1, 0.8)
    return leaves[close[0]] if close else ""


def advice(path: str) -> tuple[str, str]:
    """(what to do about the unknown key at `path`, the path it most likely means or "")."""
    if path in known_paths():  # a key with dots in its name, or one that another kind of the section has
        return f"Sections are nested objects; on the command line it is --set {path}=VALUE.", path
    near = nearest_key(path)
    if near:
        return f"Did you mean {near}?", near
    section = path.rpartition(".")[0].partition("[")[0]
    siblings = _children(section, known_paths())
    if section and siblings:
        ours = [name for name in siblings if _join(section, name) not in accepted_paths()]
        return f"{section} takes {', '.join(ours)}.", ""
    return "configs/schema.json lists all keys.", ""


def _children(section: str, paths: Iterable[str]) -> list[str]:
    prefix = f"{section}." if section else ""
    return sorted({p[len(prefix) :].partition(".")[0] for p in paths if p.startswith(prefix) and p != prefix})


def _close(name: str, siblings: list[str], section: str, cutoff: float) -> str:
    close = get_close_matches(name.lower(), siblings, 1, cutoff)
    return _join(section, close[0]) if close else ""


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name
