"""What a rule of the configuration is; `rules` and `zero_rules` hold them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trilith.config.schema import Config
from trilith.errors import Violation

_MOST_SHOWN = 12


@dataclass(frozen=True)
class Rule:
    """`check` gives the violations of one rule; `keys` are the keys (or sections) that it reads."""

    keys: tuple[str, ...]
    check: Callable[[Config], list[Violation]]


def one_of_its_divisors(number: int) -> str:
    """Advice for a key that must divide `number`, with its smallest divisors."""
    fits = [str(count) for count in range(1, min(number, 1024) + 1) if number % count == 0]
    return f"One of {', '.join(fits[:_MOST_SHOWN])}."
