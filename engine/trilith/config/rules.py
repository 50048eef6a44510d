"""Rules that only the configuration itself decides: pure functions of a resolved Config that return what is broken.

Rules that need the layout (heads over tensor ranks, layers over stages, microbatches of a schedule) live in the rooms
that own the layout; preflight runs both kinds. A rule says which keys it reads: it is left out where one of them is already
known to be wrong, so that one mistake gives one message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MappingProxyType

from trilith.config.base import NotGiven
from trilith.config.layout_keys import ASYNCHRONOUS, FROM_FILE
from trilith.config.model_keys import ModelConfig
from trilith.config.rule import Rule, one_of_its_divisors
from trilith.config.schema import Config
from trilith.config.sparse_rules import SPARSE_RULES, sparse_notes
from trilith.config.training_keys import AdamConfig, SGDConfig, WarmupDecayLRConfig, WarmupLRConfig, WSDConfig
from trilith.config.zero_rules import ZERO_RULES, zero_notes
from trilith.errors import Violation

_WIDTH = MappingProxyType({"fp16": 16, "bf16": 16, "fp32": 32, "fp64": 64})


def heads_divide_width(config: Config) -> list[Violation]:
    """hidden_size is a multiple of num_heads."""
    hidden, heads = config.model.hidden_size, config.model.num_heads
    if hidden % heads == 0:
        return []
    below, above = hidden // heads * heads, -(-hidden // heads) * heads
    fix = f"Use hidden_size {f'{below} or ' if below else ''}{above}, or another num_heads."
    return [Violation("model.num_heads", heads, f"must divide model.hidden_size {hidden}", fix)]


def kv_heads_divide_heads(config: Config) -> list[Violation]:
    """num_heads is a multiple of num_kv_heads: every key/value head serves equally many query heads."""
    heads, kv_heads = config.model.num_heads, config.model.num_kv_heads
    if heads % kv_heads == 0:
        return []
    rule = f"must divide model.num_heads {heads}"
    return [Violation("model.num_kv_heads", kv_heads, rule, one_of_its_divisors(heads))]


def rotary_pairs(config: Config) -> list[Violation]:
    """Rotary positions turn pairs of features, so the head dimension is even."""
    model = config.model
    if model.family != "llama" or model.hidden_size % model.num_heads or model.hidden_size // model.num_heads % 2 == 0:
        return []
    dim = model.hidden_size // model.num_heads
    rule = f"gives heads of {dim} features; rotary positions need an even number"
    return [Violation("model.num_heads", model.num_heads, rule)]


def activation_of_family(config: Config) -> list[Violation]:
    """Llama's feed-forward layer is gated (swiglu), GPT-2's is not."""
    model = config.model
    if (model.family == "llama") == (model.activation == "swiglu"):
        return []
    fits = '"swiglu"' if model.family == "llama" else '"gelu_tanh" or "gelu"'
    return [Violation("model.activation", model.activation, f"model.family {model.family} needs {fits}")]


def one_data_source(config: Config) -> list[Violation]:
    """Samples come from a corpus or from data sets, not both."""
    if config.data.corpus is None or not config.data.paths:
        return []
    rule = f"data.corpus {config.data.corpus!r} is given, too; samples come from one of the two"
    return [Violation("data.paths", config.data.paths, rule, "Keep one.")]


def vocabulary_holds_tokens(config: Config) -> list[Violation]:
    """Every token id of the tokenizer, and the end-of-document token, has a row in the embedding."""
    data, vocab_size, found = config.data, config.model.vocab_size, []
    trained = data.corpus == "python-stdlib" and data.tokenizer.path is None
    if trained and data.tokenizer.vocab_size > vocab_size:
        rule = f"is smaller than data.tokenizer.vocab_size {data.tokenizer.vocab_size}"
        found.append(Violation("model.vocab_size", vocab_size, rule, 'Use "auto".'))
    if data.eod_token is not None and data.eod_token >= vocab_size:
        found.append(Violation("data.eod_token", data.eod_token, f"must be less than model.vocab_size {vocab_size}"))
    return found


def masks_know_their_token(config: Config) -> list[Violation]:
    """Data sets without a tokenizer do not say which token ends a document."""
    data = config.data
    asks = "data.loss_mask is eod" if data.loss_mask == "eod" else "data.reset_attention_mask is true"
    needs_it = data.loss_mask == "eod" or data.reset_attention_mask
    if not needs_it or data.eod_token is not None or not data.paths or data.tokenizer.path:
        return []
    rule = f"is not given, but {asks} and no tokenizer says which token ends a document"
    return [Violation("data.eod_token", NotGiven(), rule, "Give the token id.")]


def split_has_samples(config: Config) -> list[Violation]:
    """Training has a share of the documents, and evaluation has one if the run evaluates."""
    train, evaluation, _ = config.data.split
    if train <= 0.0:
        return [Violation("data.split", config.data.split, "the share of training, its first entry, must be above 0")]
    if config.training.eval_interval and evaluation <= 0.0:
        rule = "the share of evaluation, its second entry, must be above 0 where training.eval_interval is"
        return [Violation("data.split", config.data.split, rule)]
    return []


def compile_fits(config: Config) -> list[Violation]:
    """torch.compile takes blocks that run on one rank each, of a model that the engine builds."""
    if not config.compile.enabled:
        return []
    if config.model is None:
        rule = "compiles the blocks of the models that a config describes"
        return [Violation("compile.enabled", True, rule, "Compile your module before you hand it to initialize.")]
    if config.parallel.tensor > 1:
        rule = f"cannot be with parallel.tensor {config.parallel.tensor}: blocks communicate inside"
        return [Violation("compile.enabled", True, rule, "Set parallel.tensor to 1, or leave compile off.")]
    if config.activation_checkpointing.recompute == "selective":
        rule = 'cannot be with activation_checkpointing.recompute "selective": the compiler chooses what it keeps'
        return [Violation("compile.enabled", True, rule, 'Use "none" or "full".')]
    return []


def sample_needs_text(config: Config) -> list[Violation]:
    """A generated sample needs a tokenizer to write and read text."""
    data, tokens = config.data, config.training.generate_tokens
    if not tokens or data.tokenizer.path or data.corpus == "python-stdlib" or not (data.corpus or data.paths):
        return []
    rule = "needs a tokenizer, which this data does not have"
    return [Violation("training.generate_tokens", tokens, rule, "Use 0, or give data.tokenizer.path.")]


def evaluation_batch_divides(config: Config) -> list[Violation]:
    """An evaluation batch is a whole number of microbatches on every data rank."""
    size, micro, data = config.training.eval_batch_size, config.train_micro_batch_size_per_gpu, config.parallel.data
    unit = micro * data
    if size % unit == 0:
        return []
    rule = f"must be a multiple of train_micro_batch_size_per_gpu {micro} x parallel.data {data} = {unit}"
    below = size // unit * unit
    return [Violation("training.eval_batch_size", size, rule, f"Use {f'{below} or ' if below else ''}{below + unit}.")]


def axes_not_built(config: Config) -> list[Violation]:
    """Context parallelism is not built yet."""
    context = config.parallel.context
    return [Violation("parallel.context", context, "only 1 is built yet", "Use 1.")] if context != 1 else []


def interleaving_needs_ranks(config: Config) -> list[Violation]:
    """Stages are interleaved over more than one pipeline rank."""
    pipeline = config.pipeline
    if pipeline.schedule != "interleaved_1f1b" or pipeline.virtual_stages == 1 or config.parallel.pipeline > 1:
        return []
    rule = "is above 1, but parallel.pipeline is 1: there is nothing to interleave"
    return [Violation("pipeline.virtual_stages", pipeline.virtual_stages, rule, "Use 1.")]


def file_of_a_schedule(config: Config) -> list[Violation]:
    """A schedule comes from a file where that is asked for, and only there."""
    schedule, path = config.pipeline.schedule, config.pipeline.schedule_file
    if (schedule == FROM_FILE) == (path is not None):
        return []
    if path is None:
        rule = f'is not given, but pipeline.schedule is "{FROM_FILE}"'
        return [Violation("pipeline.schedule_file", NotGiven(), rule, "Give the file, or name a schedule.")]
    rule = f'has no effect while pipeline.schedule is "{schedule}"'
    fix = f'Remove it, or set pipeline.schedule to "{FROM_FILE}".'
    return [Violation("pipeline.schedule_file", path, rule, fix)]


def each_stage_updates_alone(config: Config) -> list[Violation]:
    """Under pipedream a stage steps as soon as it has a gradient: nothing may need all stages of one step."""
    if config.pipeline.schedule != "pipedream":
        return []
    why, found = "pipeline.schedule pipedream updates each stage alone, without", []
    if config.gradient_clipping > 0.0:
        rule = f"{why} a global norm to clip by"
        found.append(Violation("gradient_clipping", config.gradient_clipping, rule, "Set it to 0."))
    if config.fp16.enabled and config.fp16.loss_scale == 0.0:
        fix = "Set a fixed fp16.loss_scale, or use bf16."
        found.append(Violation("fp16.loss_scale", 0.0, f"{why} the overflows of all that a dynamic scale follows", fix))
    if config.bf16.enabled and config.bf16.check_grad_overflow:
        rule = f"{why} the overflows of all stages that a skipped step needs"
        found.append(Violation("bf16.check_grad_overflow", True, rule, "Set it to false."))
    return found


def tied_weights_update_together(config: Config) -> list[Violation]:
    """Under pipedream the copies of a tied weight on two ranks would be updated at different times."""
    pipeline = config.parallel.pipeline
    if config.pipeline.schedule != "pipedream" or not config.model.tie_embeddings or pipeline == 1:
        return []
    rule = "pipeline.schedule pipedream updates each stage alone, so the first and the last cannot share a weight"
    return [Violation("model.tie_embeddings", True, rule, "Set it to false.")]


def postvalidation_has_a_step(config: Config) -> list[Violation]:
    """An optimizer step can be validated afterwards only where there is one a step, over all stages."""
    if config.pipeline.optimizer_sync == "step" or config.pipeline.schedule not in ASYNCHRONOUS:
        return []
    rule = f"pipeline.schedule {config.pipeline.schedule} never waits for all stages, so there is nothing to gain"
    return [Violation("pipeline.optimizer_sync", config.pipeline.optimizer_sync, rule, 'Use "step".')]


def gradients_not_narrower(config: Config) -> list[Violation]:
    """Gradients are accumulated in the weights' format or a wider one, and reduced in no wider one than that."""
    found, types, sent = [], config.data_types, config.communication_data_type
    if _WIDTH[types.grad_accum_dtype] < _WIDTH[types.param_dtype] or {types.grad_accum_dtype, types.param_dtype} == {
        "fp16",
        "bf16",
    }:
        rule = f"loses what data_types.param_dtype {types.param_dtype} holds"
        fix = f'Use "auto" or "{types.param_dtype}".'
        found.append(Violation("data_types.grad_accum_dtype", types.grad_accum_dtype, rule, fix))
    elif _WIDTH[sent] > _WIDTH[types.grad_accum_dtype]:
        rule = f"is wider than data_types.grad_accum_dtype {types.grad_accum_dtype} and would gain nothing"
        found.append(Violation("communication_data_type", sent, rule, 'Use "auto".'))
    return found


def loss_scale_has_a_floor(config: Config) -> list[Violation]:
    """A dynamic loss scale stays above 0 and starts above its floor."""
    fp16 = config.fp16
    if fp16.loss_scale != 0.0:
        return []
    if fp16.min_loss_scale <= 0.0:
        rule = "must be greater than 0 while fp16.loss_scale is 0 (dynamic)"
        return [Violation("fp16.min_loss_scale", fp16.min_loss_scale, rule)]
    if fp16.min_loss_scale > 2.0**fp16.initial_scale_power:
        rule = f"is above the initial scale 2^{fp16.initial_scale_power}"
        return [Violation("fp16.min_loss_scale", fp16.min_loss_scale, rule)]
    return []


def nesterov_has_momentum(config: Config) -> list[Violation]:
    """Nesterov's look-ahead needs momentum and no dampening (as torch.optim.SGD)."""
    if not isinstance(config.optimizer, SGDConfig) or not config.optimizer.params.nesterov:
        return []
    params = config.optimizer.params
    if params.momentum > 0.0 and params.dampening == 0.0:
        return []
    rule = f"needs momentum above 0 (is {params.momentum:g}) and dampening 0 (is {params.dampening:g})"
    return [Violation("optimizer.params.nesterov", True, rule)]


def warmup_rises(config: Config) -> list[Violation]:
    """A warm-up goes up."""
    scheduler = config.scheduler
    if not isinstance(scheduler, (WarmupLRConfig, WarmupDecayLRConfig)):
        return []
    low, high = scheduler.params.warmup_min_lr, scheduler.params.warmup_max_lr
    if low <= high:
        return []
    rule = f"must not be above scheduler.params.warmup_max_lr {high:g}"
    return [Violation("scheduler.params.warmup_min_lr", low, rule)]


def schedule_fits_its_length(config: Config) -> list[Violation]:
    """Warm-up and decay fit into total_num_steps."""
    scheduler = config.scheduler
    total = getattr(scheduler.params, "total_num_steps", None) if scheduler is not None else None
    if scheduler is None or total is None:
        return []
    warmup = scheduler.params.warmup_num_steps
    decay = scheduler.params.decay_num_steps if isinstance(scheduler, WSDConfig) else 0
    if warmup > total:
        rule = f"must not be above scheduler.params.total_num_steps {total}"
        fix = 'Use "auto", or a longer schedule.'
        return [Violation("scheduler.params.warmup_num_steps", warmup, rule, fix)]
    if warmup + decay > total:
        rule = f"with warmup_num_steps {warmup} exceeds scheduler.params.total_num_steps {total}"
        return [Violation("scheduler.params.decay_num_steps", decay, rule, f"Use at most {total - warmup}.")]
    return []


def one_rhythm_of_progress(config: Config) -> list[Violation]:
    """steps_per_print is DeepSpeed's name of training.log_interval; both may stand there if they agree."""
    ours, theirs = config.training.log_interval, config.steps_per_print
    if ours == theirs:
        return []
    rule = f"training.log_interval says {ours}; both are the interval of progress lines"
    return [Violation("steps_per_print", theirs, rule, "Keep one.")]


RULES: tuple[Rule, ...] = (
    Rule(("model.hidden_size", "model.num_heads"), heads_divide_width),
    Rule(("model.num_heads", "model.num_kv_heads"), kv_heads_divide_heads),
    Rule(("model.family", "model.hidden_size", "model.num_heads"), rotary_pairs),
    Rule(("model.family", "model.activation"), activation_of_family),
    Rule(("data.corpus", "data.paths"), one_data_source),
    Rule(("model.vocab_size", "data.corpus", "data.tokenizer", "data.eod_token"), vocabulary_holds_tokens),
    Rule(
        ("data.loss_mask", "data.reset_attention_mask", "data.eod_token", "data.paths", "data.tokenizer"),
        masks_know_their_token,
    ),
    Rule(("data.split", "training.eval_interval"), split_has_samples),
    Rule(("compile", "parallel.tensor", "activation_checkpointing.recompute"), compile_fits),
    Rule(("training.generate_tokens", "data.corpus", "data.paths", "data.tokenizer"), sample_needs_text),
    Rule(
        ("train_batch_size", "training.eval_batch_size", "train_micro_batch_size_per_gpu", "parallel.data"),
        evaluation_batch_divides,
    ),
    Rule(("parallel.context",), axes_not_built),
    Rule(("pipeline.virtual_stages", "pipeline.schedule", "parallel.pipeline"), interleaving_needs_ranks),
    Rule(("pipeline.schedule", "pipeline.schedule_file"), file_of_a_schedule),
    Rule(("pipeline.schedule", "gradient_clipping", "fp16", "bf16"), each_stage_updates_alone),
    Rule(("pipeline.schedule", "model.tie_embeddings", "parallel.pipeline"), tied_weights_update_together),
    Rule(("pipeline.schedule", "pipeline.optimizer_sync"), postvalidation_has_a_step),
    Rule(("data_types", "communication_data_type", "fp16.enabled", "bf16.enabled"), gradients_not_narrower),
    Rule(("fp16.loss_scale", "fp16.min_loss_scale", "fp16.initial_scale_power"), loss_scale_has_a_floor),
    Rule(("optimizer",), nesterov_has_momentum),
    Rule(("scheduler", "optimizer.params.lr"), warmup_rises),
    Rule(("scheduler", "training.steps"), schedule_fits_its_length),
    Rule(("training.log_interval", "steps_per_print"), one_rhythm_of_progress),
    *SPARSE_RULES,
    *ZERO_RULES,
)


def check_rules(config: Config, tainted: Iterable[str] = ()) -> list[Violation]:
    """Violations of all rules that read no key in `tainted` (dotted paths that are open or known to be wrong)."""
    tainted = tuple(tainted)
    found: list[Violation] = []
    for rule in RULES:
        about_model = any(key.startswith("model") for key in rule.keys)
        if (config.model is None and about_model) or any(overlap(k, t) for k in rule.keys for t in tainted):
            continue
        found += rule.check(config)
    return found


def overlap(path: str, other: str) -> bool:
    """Whether one of two dotted paths is the other, or a section that holds it."""
    return path == other or path.startswith(f"{other}.") or other.startswith(f"{path}.")


def tainted_by(violations: Iterable[Violation]) -> frozenset[str]:
    """The paths that `violations` name."""
    return frozenset(violation.path for violation in violations)


def what_a_run_needs(config: Config) -> list[Violation]:
    """What a training run lacks: a model, data, and its length. trilith.initialize needs none of them."""
    found = []
    if config.model is None:
        fix = "Give at least family, num_layers, hidden_size, num_heads and sequence_length."
        found.append(Violation("model", NotGiven(), "is required: the transformer to train", fix))
    if config.data.corpus is None and not config.data.paths:
        fix = 'Give data.corpus ("python-stdlib" or "synthetic") or data.paths.'
        found.append(Violation("data", NotGiven(), "says nowhere where samples come from", fix))
    if config.training.steps < 1:
        given = config.training.steps if "steps" in config.training.model_fields_set else NotGiven()
        found.append(Violation("training.steps", given, "must be at least 1: the number of optimizer steps"))
    return found


def notes_of(config: Config, was_given: Callable[[str], bool]) -> list[str]:
    """What is allowed but worth a line; `was_given` tells whether a path was written, not defaulted."""
    notes = []
    if config.parallel.sequence_parallel and config.parallel.tensor == 1:
        notes.append("parallel.sequence_parallel: has no effect with parallel.tensor 1")
    notes += _pipeline_notes(config)
    notes += sparse_notes(config, was_given)
    notes += zero_notes(config)
    if isinstance(config.optimizer, AdamConfig):
        kind = "decoupled (AdamW)" if config.optimizer.decoupled_decay else "added to the gradient (L2)"
        notes.append(f"optimizer: Adam with weight decay {kind}; optimizer.params.adam_w_mode chooses")
    if not was_given("gradient_clipping") and config.gradient_clipping:
        notes.append(
            f"gradient_clipping: {config.gradient_clipping:g} is on by default, as in DeepSpeed; 0 turns it off"
        )
    scheduler = config.scheduler
    if getattr(getattr(scheduler, "params", None), "warmup_type", "") == "log" and not was_given(
        "scheduler.params.warmup_type"
    ):
        notes.append('scheduler.params.warmup_type: "log" by default, as in DeepSpeed; it rises fast at first')
    base_lr = config.optimizer.params.lr
    if isinstance(scheduler, (WarmupLRConfig, WarmupDecayLRConfig)) and scheduler.params.warmup_max_lr != base_lr:
        high = scheduler.params.warmup_max_lr
        notes.append(f"scheduler.params.warmup_max_lr: {high:g} takes the place of optimizer.params.lr {base_lr:g}")
    rope_theta = ModelConfig.model_fields["rope_theta"].default
    if config.model is not None and config.model.family != "llama" and config.model.rope_theta != rope_theta:
        notes.append(f"model.rope_theta: has no effect in family {config.model.family}")
    total = getattr(getattr(scheduler, "params", None), "total_num_steps", None)
    if total is not None and 0 < total < config.training.steps:
        notes.append(f"scheduler.params.total_num_steps: {total} ends before training.steps {config.training.steps}")
    return notes


def _pipeline_notes(config: Config) -> list[str]:
    pipeline, notes = config.pipeline, []
    if pipeline.schedule in ASYNCHRONOUS:
        notes.append(
            f"pipeline.schedule: {pipeline.schedule} changes the mathematics: gradients are taken at older weights than "
            "those that they update"
        )
    if pipeline.schedule == "pipedream" and config.parallel.pipeline > 1:
        notes.append(
            f"pipeline.schedule: pipedream begins anew, with the newest weights on all stages, {_drains(config)}: "
            "draining at other steps changes the result"
        )
    if pipeline.optimizer_sync == "postvalidate" and config.parallel.pipeline == 1:
        notes.append("pipeline.optimizer_sync: postvalidate gains nothing with parallel.pipeline 1")
    return notes


def _drains(config: Config) -> str:
    """When a run empties its pipeline."""
    if config.model is None:
        return "with every call of train_batch and train_batches"
    evaluation, save = config.training.eval_interval, config.checkpoint.save_interval
    drains = [
        *([f"every {evaluation} steps (training.eval_interval)"] if evaluation else []),
        *([f"every {save} steps (checkpoint.save_interval)"] if save else []),
    ]
    return " and ".join(drains) or "only where it starts (training.eval_interval and checkpoint.save_interval are off)"
