"""DeepSpeed's keys -> ours: applies the verdicts of `deepspeed_keys` to a configuration before it is validated.

Nothing is dropped without a word: a mapped or ignored key leaves a note, a refused one a violation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any

from trilith.config.base import shown
from trilith.config.deepspeed_keys import REFUSED_TYPES, TABLE, Key, RefusedValue
from trilith.errors import Violation

UNKNOWN_KEY = "unknown key"


@dataclass
class Translation:
    """A configuration in our keys, and what happened on the way.

    `tree`: the configuration. `moved`: our dotted path -> the DeepSpeed path it came from. `notes`: mapped and ignored
    keys. `violations`: refused ones; their values are out of `tree`.
    """

    tree: dict[str, Any]
    moved: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)


def translate(tree: dict[str, Any], own_sections: frozenset[str]) -> Translation:
    """`tree` (changed in place) with every DeepSpeed key of the table mapped, dropped or refused.

    `own_sections` are the top-level keys of `Config`; what is left in another section is an unknown key.
    """
    done = Translation(tree)
    for row in TABLE:
        found, value = take(tree, row.path)
        if found:
            _VERDICTS[row.verdict](row, value, done)
    _refuse_types(done)
    _check_adam_mode(done)
    for section in sorted({row.path.split(".")[0] for row in TABLE if "." in row.path} - own_sections):
        if section in tree:
            done.violations += _leftovers(section, tree.pop(section))
    return done


@cache
def accepted_paths() -> Mapping[str, str]:
    """Paths of all mapped and ignored keys with a description for the schema; in-place conversions are left out."""
    accepted = {}
    for row in TABLE:
        if row.verdict == "refuse" or row.target == row.path:
            continue
        ours = " and ".join(filter(None, (row.target, row.also)))
        fate = f"DeepSpeed's key, taken as {ours}" if ours else "DeepSpeed's key, without effect"
        accepted[row.path] = f"{fate}: {row.why}."
    return MappingProxyType(accepted)


@cache
def refused_paths() -> frozenset[str]:
    """Paths of all refused keys."""
    return frozenset(row.path for row in TABLE if row.verdict == "refuse")


def take(tree: dict[str, Any], path: str) -> tuple[bool, Any]:
    """(True, value) with the value at dotted `path` taken out of `tree`; (False, None) where there is none."""
    *parents, name = path.split(".")
    node: Any = tree
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if not isinstance(node, dict) or name not in node:
        return False, None
    return True, node.pop(name)


def put(tree: dict[str, Any], path: str, value: Any) -> str:
    """Sets the value at dotted `path`, making sections on the way; returns the path that is no section, or ""."""
    *parents, name = path.split(".")
    node = tree
    for depth, parent in enumerate(parents):
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            return ".".join(parents[: depth + 1])
    node[name] = value
    return ""


def _is_one_of(value: Any, options: tuple[Any, ...]) -> bool:
    """Equality as JSON means it: true is not 1."""
    return any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in options)


def _map(row: Key, value: Any, done: Translation) -> None:
    if isinstance(value, dict) and row.keys:
        done.violations += _unknown_inside(row, value)
    if not row.target:
        if value not in (False, None):
            done.notes.append(f"{row.path}: mapped: {row.why}")
        return
    try:
        mapped = row.convert(value) if row.convert else value
    except RefusedValue as refusal:
        done.violations.append(Violation(row.path, shown(value), refusal.rule, refusal.fix))
        return
    if row.target == row.path:
        put(done.tree, row.path, mapped)
        if not _is_one_of(value, (mapped,)):
            done.moved[row.target] = row.path
            done.notes.append(f"{row.path}: {value!r} mapped to {mapped!r}: {row.why}")
        return
    if mapped is not None:
        for target in filter(None, (row.target, row.also)):
            _move(row, value, target, mapped, done)


def _move(row: Key, value: Any, target: str, mapped: Any, done: Translation) -> None:
    """Puts `mapped`, which the row's `value` became, at `target`, unless that says something else already."""
    found, present = take(done.tree, target)
    if found and present != "auto" and not _is_one_of(present, (mapped,)):
        rule = f"{target} says {present!r}; {row.path} is DeepSpeed's key for the same"
        done.violations.append(Violation(row.path, shown(value), rule, f"Keep {target} only."))
        mapped = present
    else:
        done.moved[target] = row.path
        done.notes.append(f"{row.path}: mapped to {target}: {row.why}")
    blocked = put(done.tree, target, mapped)
    if blocked:
        done.violations.append(Violation(row.path, shown(value), f"maps into {blocked}, which is no section"))


def _ignore(row: Key, value: Any, done: Translation) -> None:
    if isinstance(value, dict) and row.keys:
        done.violations += _unknown_inside(row, value)
    done.notes.append(f"{row.path}: ignored: {row.why}")


def _refuse(row: Key, value: Any, done: Translation) -> None:
    if _is_one_of(value, row.off):
        return
    path = row.path
    if row.switch and isinstance(value, dict):
        state = value.get(row.switch)
        if _is_one_of(state, (False, None, "none", "auto")):
            done.violations += _unknown_inside(row, value)
            return
        path, value = f"{row.path}.{row.switch}", state
    done.violations.append(Violation(path, shown(value), row.why, row.instead))


def _unknown_inside(row: Key, value: dict[str, Any]) -> list[Violation]:
    if not row.keys:
        return []
    fix = f"{row.path} takes {', '.join(row.keys)}."
    return [
        Violation(f"{row.path}.{name}", shown(value[name]), UNKNOWN_KEY, fix) for name in value if name not in row.keys
    ]


def _leftovers(path: str, value: Any) -> list[Violation]:
    """What is still in a section that only DeepSpeed has, after its known keys are out."""
    if not isinstance(value, dict):
        return [Violation(path, shown(value), "must be an object")]
    found = []
    for name, child in value.items():
        inner = f"{path}.{name}"
        if any(known.startswith(f"{inner}.") for known in accepted_paths()):
            found += _leftovers(inner, child)
        else:
            found.append(Violation(inner, shown(child), UNKNOWN_KEY))
    return found


def _refuse_types(done: Translation) -> None:
    """Refuses DeepSpeed's optimizers and schedulers that are not built, by name; their section leaves the tree."""
    for section, name, why, instead in REFUSED_TYPES:
        block = done.tree.get(section)
        kind = block.get("type") if isinstance(block, dict) else None
        if isinstance(kind, str) and kind.lower() == name:
            done.violations.append(Violation(f"{section}.type", kind, why, instead))
            del done.tree[section]


def _check_adam_mode(done: Translation) -> None:
    """AdamW always decouples the decay, as in DeepSpeed; a file that says otherwise would be misled."""
    optimizer = done.tree.get("optimizer")
    if not isinstance(optimizer, dict) or optimizer.get("type") != "AdamW":
        return
    found, mode = take(optimizer, "params.adam_w_mode")
    if found and mode is not True:
        rule = "AdamW always has decoupled weight decay"
        fix = 'Use optimizer.type: "Adam" for decay through the gradient.'
        done.violations.append(Violation("optimizer.params.adam_w_mode", shown(mode), rule, fix))


_VERDICTS = MappingProxyType({"map": _map, "ignore": _ignore, "refuse": _refuse})
