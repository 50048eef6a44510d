"""Config -> Resolved: every "auto" replaced by a number, each with where it came from; contradictions named at once.

Each step derives the values of one subject and says which keys it reads, so that a step is left out where one of them
is already known to be wrong. What only the layout of a model over ranks can decide is preflight's, not decided here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from trilith.config.base import AUTO
from trilith.config.batch import MICRO, STEPS, TOTAL, derive_batch
from trilith.config.draft import Draft
from trilith.config.layout_keys import PREFLIGHT_DECIDES, V_SHAPED
from trilith.config.rule import one_of_its_divisors
from trilith.config.rules import check_rules, notes_of, overlap, tainted_by, what_a_run_needs
from trilith.config.schema import Config, Provenance, takes_auto, with_provenance
from trilith.errors import ConfigError, Violation

DEFAULT_LR = 1e-3
DEFAULT_LOG_INTERVAL = 10
_VIRTUAL_STAGES = "pipeline.virtual_stages"
_REPLICATE, _SHARD = "parallel.replicate", "zero_optimization.zero_hpz_partition_size"
_SIZES = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")


@dataclass(frozen=True)
class Resolved:
    """A configuration without "auto".

    `origins`: dotted path -> "file", "--set", "default" or "derived: how". `notes`: what was mapped, ignored, or is
    worth knowing. `world_size`: number of ranks.
    """

    config: Config
    origins: Mapping[str, str]
    notes: tuple[str, ...]
    world_size: int

    def to_json(self) -> dict[str, Any]:
        """The content of config.resolved.json; the same configuration always gives the same text."""
        return {
            "config": self.config.model_dump(mode="json"),
            "origins": dict(self.origins),
            "notes": list(self.notes),
            "world_size": self.world_size,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return (_resolved, (self.config, dict(self.origins), self.notes, self.world_size))


def _resolved(config: Config, origins: dict[str, str], notes: tuple[str, ...], world_size: int) -> Resolved:
    return Resolved(config, MappingProxyType(origins), notes, world_size)


def resolve(
    config: Config,
    world_size: int | None = None,
    *,
    needs: Literal["run", "engine"] = "run",
    local_ranks: int | None = None,
    cores: int | None = None,
    checks: Sequence[Callable[[Config], Iterable[Violation]]] = (),
) -> Resolved:
    """Replaces every "auto" of `config` for `world_size` ranks (None: the product of the degrees).

    What only preflight can decide stays "auto": schedule and partition, and the stages per rank that follow from them.

    needs: "run" demands model, data and training.steps; "engine" (trilith.initialize) leaves them open, `config.model`
    may then be None. local_ranks: ranks on this machine (None: all). cores: of this machine (None: those that this
    process may use). checks: rules of other rooms, run on the configuration when nothing in it is open, so that their
    violations are reported together with those found here. Raises ConfigError with all violations.
    """
    draft = _draft(config, world_size, local_ranks, cores)
    _take_steps(draft, frozenset())
    full, still_open = _finish(draft), _open_keys(draft.tree)
    violations = [*draft.violations, *check_rules(full, tainted_by(draft.violations) | still_open)]
    if needs == "run":
        violations = [*what_a_run_needs(config), *violations]
    if not still_open and (config.model is not None or needs == "engine"):
        known = tainted_by(violations)
        found = [violation for check in checks for violation in check(full)]
        violations += [v for v in found if not any(overlap(v.path, path) for path in known)]
    provenance = config.provenance
    if violations:
        raise ConfigError(provenance.locate(violations), provenance.source)
    origins = _origins(draft, provenance)
    notes = tuple(dict.fromkeys([*provenance.notes, *draft.notes, *notes_of(full, draft.was_given)]))
    degrees = full.parallel
    size = degrees.data * degrees.pipeline * degrees.tensor * degrees.context
    with_provenance(full, Provenance(MappingProxyType(origins), provenance.places, notes, provenance.source))
    return Resolved(full, MappingProxyType(origins), notes, size)


def find_contradictions(config: Config, tainted: frozenset[str]) -> list[Violation]:
    """What `resolve` would refuse, apart from steps and rules that read a key in `tainted`; for `load_config`."""
    draft = _draft(config, None, None, None)
    open_ends = {"parallel.data"} if draft.is_auto("parallel.data") else set()
    _take_steps(draft, tainted | open_ends)
    skip = tainted | tainted_by(draft.violations) | _open_keys(draft.tree)
    return [*draft.violations, *check_rules(_finish(draft), frozenset(skip))]


def _draft(config: Config, world_size: int | None, local_ranks: int | None, cores: int | None) -> Draft:
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tree = config.model_dump(mode="json")
    given = config.model_dump(mode="json", exclude_unset=True)
    return Draft(tree, given, world_size, local_ranks, cores)


def _finish(draft: Draft) -> Config:
    return Config.model_validate(draft.tree)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found.update(_leaves(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = value
    return found


def _open_keys(tree: Mapping[str, Any]) -> frozenset[str]:
    """Keys that are still "auto", but for the stages per rank where a file or a search says how many there are."""
    later = {_VIRTUAL_STAGES} if tree["pipeline"]["schedule"] in PREFLIGHT_DECIDES else set()
    return frozenset(
        path for path, value in _leaves(tree).items() if value == AUTO and takes_auto(path) and path not in later
    )


def _origins(draft: Draft, provenance: Provenance) -> dict[str, str]:
    """Where each value came from, in the order of the schema."""
    given = _leaves(draft.given)
    origins = {}
    for path in _leaves(draft.tree):
        if path in draft.derived:
            origins[path] = f"derived: {draft.derived[path]}"
        else:
            origins[path] = _recorded(path, provenance.origins) or ("file" if path in given else "default")
    return origins


def _recorded(path: str, origins: Mapping[str, str]) -> str:
    """The origin recorded for `path` or a section above it."""
    while path:
        if path in origins:
            return origins[path]
        path = path.rpartition(".")[0]
    return ""


# --- steps ------------------------------------------------------------------------------------------------------------


def _derive_parallel(draft: Draft) -> None:
    pipeline, tensor, context = (draft.get(f"parallel.{axis}") for axis in ("pipeline", "tensor", "context"))
    others, world_size = pipeline * tensor * context, draft.world_size
    product = f"pipeline {pipeline} x tensor {tensor}" + (f" x context {context}" if context > 1 else "")
    if world_size is None:
        draft.derive("parallel.data", 1, "1, because the world size is not given")
    elif draft.is_auto("parallel.data"):
        if world_size >= 1 and world_size % others == 0:
            draft.derive("parallel.data", world_size // others, f"world size {world_size} / ({product})")
        else:
            rule = f"the world size {world_size} is no multiple of {product} = {others}"
            draft.refuse("parallel.data", rule, f"Start {others} ranks or a multiple, or change the degrees.")
    elif draft.get("parallel.data") * others != world_size:
        data = draft.get("parallel.data")
        rule = f"data {data} x {product} = {data * others}, but the world size is {world_size}"
        draft.refuse("parallel.data", rule, f'Use "auto", or start {data * others} ranks.')


def _derive_threads(draft: Draft) -> None:
    degrees = [draft.get(f"parallel.{axis}") for axis in ("data", "pipeline", "tensor", "context")]
    if AUTO in degrees:
        return
    ranks = draft.local_ranks or degrees[0] * degrees[1] * degrees[2] * degrees[3]
    how = f"{draft.cores} cores / {ranks} ranks on this machine, at least 1"
    draft.derive("run.threads", max(1, draft.cores // ranks), how)


def _derive_pipeline(draft: Draft) -> None:
    schedule = draft.get("pipeline.schedule")
    if schedule not in PREFLIGHT_DECIDES:
        stages, shape = (2, "V-shaped") if schedule in V_SHAPED else (1, "not V-shaped")
        draft.derive(_VIRTUAL_STAGES, stages, f"{stages}, because {schedule} is {shape}")
    if schedule == AUTO and not draft.was_given("pipeline.partition"):
        draft.tree["pipeline"]["partition"] = AUTO
        draft.derived["pipeline.partition"] = "auto, because pipeline.schedule is"


def _derive_precision(draft: Draft) -> None:
    dtype = draft.get("data_types.param_dtype")
    if dtype == AUTO and draft.get("fp16.enabled") is True and draft.get("bf16.enabled") is True:
        draft.refuse("bf16.enabled", "fp16.enabled and bf16.enabled are both true", "Keep one of them.")
        return
    for name in ("fp16", "bf16"):
        enabled = draft.get(f"{name}.enabled")
        if enabled is True and dtype not in (AUTO, name):
            rule = f"data_types.param_dtype is {dtype}, but {name}.enabled is true"
            draft.refuse("data_types.param_dtype", rule, f'Remove it, or set {name}.enabled to "auto".')
            return
        if enabled is False and dtype == name:
            rule = f"{name}.enabled is false, but data_types.param_dtype is {name}"
            draft.refuse(f"{name}.enabled", rule, f'Set {name}.enabled to "auto", or choose another param_dtype.')
            return
    on = next((name for name in ("fp16", "bf16") if draft.get(f"{name}.enabled") is True), "")
    draft.derive("data_types.param_dtype", on or "fp32", f"{on}.enabled" if on else "neither fp16 nor bf16 is enabled")
    dtype = draft.get("data_types.param_dtype")
    for name in ("fp16", "bf16"):
        draft.derive(f"{name}.enabled", dtype == name, f"data_types.param_dtype {dtype}")
    wide = "fp64" if dtype == "fp64" else "fp32"
    draft.derive("data_types.grad_accum_dtype", wide, f"{wide} for data_types.param_dtype {dtype}")
    draft.derive("data_types.buffer_dtype", wide, f"{wide} for data_types.param_dtype {dtype}")
    accumulated = draft.get("data_types.grad_accum_dtype")
    draft.derive("communication_data_type", accumulated, f"data_types.grad_accum_dtype {accumulated}")


def ffn_width(family: str, hidden_size: int) -> tuple[int, str]:
    """(inner feed-forward width, how) of `model.ffn_hidden_size: "auto"`; llama's published 8/3 x H is rounded up."""
    if family == "gpt2":
        return 4 * hidden_size, f"4 x hidden_size {hidden_size}"
    block = 256 if hidden_size >= 1024 else 8
    width = -(-8 * hidden_size // (3 * block)) * block
    return width, f"8/3 x hidden_size {hidden_size}, up to a multiple of {block}"


def _derive_model(draft: Draft) -> None:
    if not draft.has("model"):
        return
    family, gpt2 = draft.get("model.family"), draft.get("model.family") == "gpt2"
    draft.derive("model.num_kv_heads", draft.get("model.num_heads"), "model.num_heads")
    draft.derive("model.ffn_hidden_size", *ffn_width(family, draft.get("model.hidden_size")))
    draft.derive("model.tie_embeddings", gpt2, f"{family} {'ties' if gpt2 else 'does not tie'} them")
    dropout = draft.get("model.dropout") if gpt2 else 0.0
    draft.derive("model.attention_dropout", dropout, "model.dropout" if gpt2 else f"0 for {family}")
    draft.derive("model.norm_eps", 1e-5, "1e-5")
    draft.derive("model.activation", "gelu_tanh" if gpt2 else "swiglu", f"of {family}")
    draft.derive("model.linear_bias", gpt2, f"{family} has {'' if gpt2 else 'no '}biases")


def _derive_vocabulary(draft: Draft) -> None:
    if not draft.is_auto("model.vocab_size"):
        return
    if draft.get("data.paths") and not draft.has("data.tokenizer.path"):
        rule = "data.paths hold token ids only, so the size of their vocabulary must be given"
        draft.refuse("model.vocab_size", rule, "Give model.vocab_size, or the tokenizer's file as data.tokenizer.path.")
        return
    if draft.has("data.tokenizer.path") and not draft.was_given("data.tokenizer.vocab_size"):
        rule = "the size of the vocabulary of data.tokenizer.path must be given"
        draft.refuse("model.vocab_size", rule, "Give data.tokenizer.vocab_size or model.vocab_size.")
        return
    draft.derive("model.vocab_size", draft.get("data.tokenizer.vocab_size"), "data.tokenizer.vocab_size")


def _derive_training(draft: Draft) -> None:
    draft.derive("data.seed", draft.get("training.seed"), "training.seed")
    if not draft.is_open(TOTAL):
        draft.derive("training.eval_batch_size", draft.get(TOTAL), TOTAL)
    draft.derive("training.log_interval", draft.get("steps_per_print"), "steps_per_print")
    if draft.is_open("training.log_interval"):
        draft.tree["training"]["log_interval"] = DEFAULT_LOG_INTERVAL
        draft.derived["training.log_interval"] = f"{DEFAULT_LOG_INTERVAL}, because steps_per_print is open, too"
    draft.derive("steps_per_print", draft.get("training.log_interval"), "training.log_interval")
    draft.derive("gradient_clipping", 1.0, "1.0, DeepSpeed's default")
    draft.derive("log_level", "info", "info")


def _derive_optimizer(draft: Draft) -> None:
    warm = draft.get("scheduler.params.warmup_max_lr")
    if draft.was_given("scheduler.params.warmup_max_lr"):
        draft.derive("optimizer.params.lr", warm, "scheduler.params.warmup_max_lr")
    draft.derive("optimizer.params.lr", DEFAULT_LR, f"{DEFAULT_LR:g}, because no other key says it")
    draft.derive("optimizer.params.betas", [0.9, 0.999], "0.9 and 0.999")
    draft.derive("optimizer.params.eps", 1e-8, "1e-8")
    draft.derive("optimizer.params.weight_decay", 0.0, "0, DeepSpeed's default")


def _derive_scheduler(draft: Draft) -> None:
    if not draft.has("scheduler"):
        return
    steps = draft.get("training.steps")
    draft.derive("scheduler.params.warmup_min_lr", 0.0, "0")
    draft.derive("scheduler.params.warmup_max_lr", draft.get("optimizer.params.lr"), "optimizer.params.lr")
    if steps:
        draft.derive("scheduler.params.total_num_steps", steps, f"training.steps {steps}")
        tenth = min(1000, steps // 10)
        how = f"a tenth of training.steps {steps}, at most 1000"
        draft.derive("scheduler.params.warmup_num_steps", tenth, how)
    elif draft.is_open("scheduler.params.total_num_steps"):
        rule = "must be given where training.steps does not say how long training takes"
        draft.refuse("scheduler.params.total_num_steps", rule, "Give it, or training.steps.")
        return
    draft.derive("scheduler.params.warmup_num_steps", 1000, "1000, because training.steps is not given")
    if draft.is_auto("scheduler.params.decay_num_steps"):
        total = draft.get("scheduler.params.total_num_steps")
        draft.derive("scheduler.params.decay_num_steps", total // 10, f"a tenth of total_num_steps {total}")


def _derive_replicas(draft: Draft) -> None:
    data, shard = draft.get("parallel.data"), draft.get(_SHARD)
    if shard == 1:
        return
    if data % shard:
        fix = one_of_its_divisors(data)
        if draft.world_size is None and "parallel.data" in draft.derived:
            fix = "Give the world size, or parallel.data."
        draft.refuse(_SHARD, f"must divide parallel.data {data}", fix)
    elif not draft.was_given(_REPLICATE):
        draft.tree["parallel"]["replicate"] = data // shard
        draft.derived[_REPLICATE] = f"parallel.data {data} / zero_hpz_partition_size {shard}"
    elif draft.get(_REPLICATE) != data // shard:
        rule = f"{_SHARD} {shard} of parallel.data {data} says {data // shard}; both say how many copies there are"
        draft.refuse(_REPLICATE, rule, "Keep one of the two.")


def _derive_zero(draft: Draft) -> None:
    hidden, unknown = draft.get("model.hidden_size"), "because the model is not given here"
    bucket, prefetch, persist = (f"zero_optimization.{name}" for name in _SIZES)
    if hidden:
        draft.derive(bucket, hidden * hidden, f"hidden_size {hidden} squared")
        draft.derive(prefetch, 9 * hidden * hidden // 10, f"0.9 x hidden_size {hidden} squared")
        draft.derive(persist, 10 * hidden, f"10 x hidden_size {hidden}")
    draft.derive(bucket, 500_000_000, f"5e8, {unknown}")
    draft.derive(prefetch, 50_000_000, f"5e7, {unknown}")
    draft.derive(persist, 100_000, f"1e5, {unknown}")
    draft.derive("zero_optimization.overlap_comm", True, "true")


def _derive_directories(draft: Draft) -> None:
    directory = draft.get("run.directory").rstrip("/") or "/"
    draft.derive("checkpoint.directory", os.path.join(directory, "checkpoints"), "run.directory/checkpoints")
    for sink, folder in (("tensorboard", "tensorboard"), ("csv_monitor", "csv")):
        draft.derive(f"{sink}.output_path", os.path.join(directory, folder), f"run.directory/{folder}")
        name = os.path.basename(directory) or "run"
        draft.derive(f"{sink}.job_name", name, "the last part of run.directory")


# (keys that the step reads, the step); later steps read what earlier ones derived.
_DEGREES = ("parallel.data", "parallel.pipeline", "parallel.tensor", "parallel.context")
_STEPS: tuple[tuple[tuple[str, ...], Callable[[Draft], None]], ...] = (
    (_DEGREES[1:], _derive_parallel),
    ((), _derive_threads),
    (("pipeline",), _derive_pipeline),
    (("fp16.enabled", "bf16.enabled", "data_types", "communication_data_type"), _derive_precision),
    (("model",), _derive_model),
    (("model.vocab_size", "data.tokenizer", "data.paths"), _derive_vocabulary),
    ((TOTAL, MICRO, STEPS, "parallel.data"), derive_batch),
    ((), _derive_training),
    (("optimizer", "scheduler"), _derive_optimizer),
    (("optimizer", "scheduler", "training.steps"), _derive_scheduler),
    (("parallel.data", _REPLICATE, _SHARD), _derive_replicas),
    ((), _derive_zero),
    ((), _derive_directories),
)


def _take_steps(draft: Draft, tainted: frozenset[str]) -> None:
    for keys, step in _STEPS:
        bad = tainted | tainted_by(draft.violations)
        if not any(overlap(key, other) for key in keys for other in bad):
            step(draft)
