"""A configuration while "auto" is being replaced: dotted access, and a record of what was derived from what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trilith.config.base import AUTO, LARGEST_INT, NotGiven
from trilith.errors import Violation


@dataclass
class Draft:
    """The values of a Config as a tree, changed step by step.

    `given`: what was written, without defaults. `derived`: dotted path -> how its value came about.
    `world_size`, `local_ranks`, `cores`: the machine, None where it is not known.
    """

    tree: dict[str, Any]
    given: dict[str, Any]
    world_size: int | None
    local_ranks: int | None
    cores: int
    derived: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)

    def get(self, path: str) -> Any:
        """The value at dotted `path`; None where a section on the way is absent."""
        return _find(self.tree, path)

    def has(self, path: str) -> bool:
        """Whether `path` exists and is not null."""
        return self.get(path) is not None

    def is_auto(self, path: str) -> bool:
        """Whether `path` exists and is still "auto"."""
        return bool(self.get(path) == AUTO)

    def is_open(self, *paths: str) -> bool:
        """Whether one of `paths` is still "auto", so that nothing can be derived from it."""
        return any(self.is_auto(path) for path in paths)

    def was_given(self, path: str) -> bool:
        """Whether `path` was written, and not as "auto"."""
        return _find(self.given, path) not in (None, AUTO)

    def derive(self, path: str, value: Any, how: str) -> None:
        """Replaces "auto" at `path` by `value`; `how` completes the sentence "derived: ..."."""
        if not self.is_auto(path):
            return
        if isinstance(value, int) and value > LARGEST_INT:
            self.violations.append(Violation(path, value, f"would be larger than 64 bits hold: {how}"))
            return
        *parents, name = path.split(".")
        node = self.tree
        for parent in parents:
            node = node[parent]
        node[name] = value
        self.derived[path] = how

    def refuse(self, path: str, rule: str, fix: str = "") -> None:
        """Records that the value at `path` breaks `rule`."""
        value = self.get(path)
        self.violations.append(Violation(path, NotGiven() if value in (None, AUTO) else value, rule, fix))


def _find(tree: Any, path: str) -> Any:
    for name in path.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree
