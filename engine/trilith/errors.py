"""Every error that is the user's to mend is a TrilithError; its text names the thing, the value, the rule and the fix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Violation:
    """One broken rule of a configuration.

    `path` is the dotted key (`parallel.tensor`), `value` what stands there, `rule` what must hold, `fix` what to write.
    """

    path: str
    value: Any
    rule: str
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.path} = {self.value!r}: {self.rule}"
        return f"{text}. {self.fix}" if self.fix else text


class TrilithError(Exception):
    """Base of all errors that a user can cause and mend."""


class ConfigError(TrilithError):
    """The configuration breaks one or more rules; `violations` lists them all."""

    def __init__(self, violations: Sequence[Violation], source: str = "") -> None:
        self.violations = tuple(violations)
        self.source = source
        count = len(self.violations)
        head = f"{source or 'config'}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n".join([head, *(f"  {violation}" for violation in self.violations)]))

    def __reduce__(self) -> tuple[Any, ...]:
        return (ConfigError, (self.violations, self.source))


class TopologyError(TrilithError):
    """Ranks, degrees or process groups do not fit together."""


class ScheduleError(TrilithError):
    """A pipeline schedule is not well formed, or cannot run."""


class CheckpointError(TrilithError):
    """A checkpoint is missing, damaged, or does not belong to this run."""


class DataError(TrilithError):
    """A data set, index or tokenizer file is missing or malformed."""


class KernelError(TrilithError):
    """A kernel was called with arguments it cannot serve."""


class OffloadError(TrilithError):
    """Offloaded bytes cannot be put away on a disk, or do not come back as they were."""
