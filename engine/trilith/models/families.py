"""The families by name: their declared units, and the rules a configuration must keep for them. No torch."""

from __future__ import annotations

from trilith.config import Config
from trilith.config.model_keys import ModelConfig
from trilith.errors import Violation
from trilith.models.base import UnitDecl
from trilith.models.gpt2 import declaration as gpt2
from trilith.models.llama import declaration as llama


def declare(model: ModelConfig) -> tuple[UnitDecl, ...]:
    """The units of `model` (resolved: no "auto" left), in pipeline order."""
    match model.family:
        case "gpt2":
            return gpt2.declare(model)
        case "llama":
            return llama.declare(model)


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
