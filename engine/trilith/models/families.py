"""The families by name: their declared units, and the rules a configuration must keep for them. No torch."""

from __future__ import annotations

from dataclasses import replace

from trilith.config import Config
from trilith.config.model_keys import ModelConfig
from trilith.config.sparse_keys import DenseBlocks
from trilith.errors import Violation
from trilith.layers.sparsity import causal_density
from trilith.models.base import UnitDecl
from trilith.models.gpt2 import declaration as gpt2
from trilith.models.llama import declaration as llama


def declare(model: ModelConfig, density: float = 1.0) -> tuple[UnitDecl, ...]:
    """The units of `model` (resolved: no "auto" left), in pipeline order.

    `density`: the share of attention's blocks that are computed, and counted in the FLOPs (`attention_density`).
    """
    match model.family:
        case "gpt2":
            units = gpt2.declare(model)
        case "llama":
            units = llama.declare(model)
    return tuple(replace(unit, attention_flops=unit.attention_flops * density) for unit in units)


def attention_density(config: Config) -> float:
    """The share of the blocks of scores that causality allows which `sparse_attention` keeps; 1 without it."""
    sparse, model = config.sparse_attention, config.model
    if sparse is None:
        return 1.0
    return causal_density(sparse, model.num_heads, model.sequence_length // sparse.block, config.training.seed)


def describe_attention(config: Config, is_native: bool) -> list[str]:
    """What is left of attention where it is block-sparse, as lines of `trilith check`; `is_native`: our op runs."""
    sparse = config.sparse_attention
    if sparse is None:
        return []
    masks = (
        "" if is_native or isinstance(sparse, DenseBlocks) else "; torch's ops compute all of them, and mask the others"
    )
    share = f"{attention_density(config):.1%} of the causal blocks of {sparse.block} tokens are live"
    return [f"attention    {sparse.mode}, {share}{masks}"]


def rules(config: Config) -> list[Violation]:
    """Every rule of tensor and sequence parallelism that the resolved `config` breaks.

    Rules of the model alone (heads and width, rotary pairs, activation) are the config's own. The vocabulary and
    key/value heads go with every degree.
    """
    model, parallel, found = config.model, config.parallel, []
    split = {"num_heads": model.num_heads, "ffn_hidden_size": model.ffn_hidden_size}
    if parallel.sequence_parallel:
        split["sequence_length"] = model.sequence_length
    for key, value in split.items():
        if value % parallel.tensor:
            cause = " (parallel.sequence_parallel is on)" if key == "sequence_length" else ""
            rule = f"must be a multiple of parallel.tensor = {parallel.tensor}{cause}"
            multiple = -(-value // parallel.tensor) * parallel.tensor
            fix = f"Set it to {multiple}, or parallel.tensor to one of {_small_divisors(value)}"
            found.append(Violation(f"model.{key}", value, rule, fix))
    return found


def _small_divisors(value: int) -> str:
    """The first few divisors of `value` as text: degrees that would do."""
    found = [str(divisor) for divisor in range(1, min(value, 64) + 1) if value % divisor == 0]
    return ", ".join(found)
