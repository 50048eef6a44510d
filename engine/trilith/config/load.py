"""JSON text or a mapping, with overrides -> Config; everything wrong with it at once, in one ConfigError."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trilith.config.base import Excerpt, LocatedViolation, dotted, shown
from trilith.config.deepspeed import put, refused_paths, translate
from trilith.config.json_text import DEEPEST, depth, parse_value, read_document
from trilith.config.resolve import find_contradictions
from trilith.config.rules import overlap
from trilith.config.schema import Config, Provenance, known_paths, with_provenance
from trilith.config.suggest import advice
from trilith.config.validate import not_json, remove, validate
from trilith.errors import ConfigError, Violation

SET = "--set"
_RESOLVED_FILE = frozenset({"config", "origins", "notes", "world_size"})

# Values for required keys that are wrong in the file, so that the rest of it can still be judged.
_STAND_INS = MappingProxyType(
    {
        "model.family": "gpt2",
        "model.num_layers": 1,
        "model.hidden_size": 1,
        "model.num_heads": 1,
        "model.sequence_length": 1,
        "optimizer.params.lr": 1e-3,
    }
)


@dataclass
class _Input:
    """A configuration on its way in: the tree, and per dotted path where it stands and how it came there."""

    tree: dict[str, Any]
    source: str
    places: dict[str, str] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    meant: set[str] = field(default_factory=set)


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The configuration in the JSON file `source` (or the mapping), with `overrides` such as "parallel.tensor=2".

    The value of an override is JSON where it parses as JSON, else a string. A file that `resolve` wrote
    (config.resolved.json) is taken, too. Raises ConfigError with all violations: text that is no JSON (alone),
    duplicate and unknown keys, wrong types, NaN, refused DeepSpeed keys, and the contradictions that can be judged
    beside them.
    """
    given = _read(source)
    _unwrap(given)
    for override in overrides:
        _apply(override, given)
    _drop_what_is_no_json(given)
    _translate(given)
    config, problems = validate(given.tree)
    removed = {violation.path for violation in given.violations}
    for problem in problems:
        missing_because_removed = problem.violation.rule.startswith("is required") and any(
            path and overlap(problem.violation.path, path) for path in removed | given.meant
        )
        if not missing_because_removed:
            given.violations.append(problem.violation)
        given.meant.add(problem.meant)
        remove(given.tree, problem.path)
    provenance = Provenance(
        MappingProxyType(given.origins), MappingProxyType(given.places), tuple(given.notes), given.source
    )
    if given.violations:
        given.violations += _contradictions_beside(given)
        raise ConfigError(provenance.locate(given.violations), given.source)
    assert config is not None
    return with_provenance(config, provenance)


def _read(source: str | Path | Mapping[str, Any]) -> _Input:
    if isinstance(source, Mapping):
        if _too_deep(source):
            raise ConfigError([Violation("config", Excerpt("{...}"), f"is nested deeper than {DEEPEST} levels")])
        return _Input(_plain(source), "")
    document = read_document(Path(source))
    if not isinstance(document.value, dict):
        rule = "must be one JSON object: { ... }"
        raise ConfigError([Violation(document.name, shown(document.value), rule)], document.name)
    places = {path: f"{document.name}:{line}" for path, line in document.lines.items()}
    return _Input(document.value, document.name, places, violations=list(document.violations))


def _plain(value: Any) -> Any:
    """`value` with mappings as dicts and sequences as lists, so that it can be edited; other objects stay."""
    if isinstance(value, Mapping):
        return {name: _plain(child) for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child) for child in value]
    return str(value) if isinstance(value, Path) else value


def _too_deep(source: Mapping[str, Any]) -> bool:
    """Also true of a mapping that contains itself."""
    try:
        return depth(_plain(source)) > DEEPEST
    except RecursionError:
        return True


def _unwrap(given: _Input) -> None:
    """Takes the configuration out of a config.resolved.json; forgets "$schema", which is for editors."""
    inner = given.tree.get("config")
    if isinstance(inner, dict) and set(given.tree) <= _RESOLVED_FILE:
        given.tree = inner
        prefix = "config."
        given.places = {
            path.removeprefix(prefix): place for path, place in given.places.items() if path.startswith(prefix)
        }
    given.tree.pop("$schema", None)


def _apply(override: str, given: _Input) -> None:
    """Sets the key of one "a.b=value"; an unknown key is a violation at once, so that it can be blamed on --set."""
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not path:
        rule, fix = "must be KEY=VALUE", "For example --set training.steps=20."
        given.violations.append(LocatedViolation(path or SET, shown(override), rule, fix, SET))
        return
    if path not in known_paths() and not _is_refused(path):
        fix, meant = advice(path)
        given.meant.add(meant)
        given.violations.append(LocatedViolation(path, shown(text), "unknown key", fix, SET))
        return
    try:
        value = parse_value(text, SET)
    except ConfigError:
        value = text
    blocked = put(given.tree, path, value)
    if blocked:
        rule = f"{blocked} is no section in this configuration"
        given.violations.append(LocatedViolation(path, shown(text), rule, f"Set {blocked} as a whole.", SET))
        return
    for known in [known for known in given.places if known == path or known.startswith((f"{path}.", f"{path}["))]:
        del given.places[known]
    given.origins[path] = given.places[path] = SET


def _is_refused(path: str) -> bool:
    """Whether `path` is a DeepSpeed key of the table, or inside a block of it: `translate` says what becomes of it."""
    return any(path == known or path.startswith(f"{known}.") for known in refused_paths())


def _drop_what_is_no_json(given: _Input) -> None:
    for path, violation in list(not_json(given.tree)):
        given.violations.append(violation)
        remove(given.tree, path)


def _translate(given: _Input) -> None:
    """DeepSpeed's keys become ours; each mapped key keeps its line, and says in `origins` where it came from."""
    done = translate(given.tree, frozenset(Config.model_fields))
    for violation in done.violations:
        if violation.rule == "unknown key" and not violation.fix:
            fix, meant = advice(violation.path)
            given.meant.add(meant)
            violation = Violation(violation.path, violation.value, violation.rule, fix)
        given.violations.append(violation)
    given.notes += done.notes
    for ours, theirs in done.moved.items():
        from_set = given.origins.get(theirs) == SET
        if ours != theirs:
            _move(given.places, theirs, ours)
        origin = SET if from_set else "file"
        given.origins[ours] = f"{origin}: mapped from {theirs}" if ours != theirs else f"{origin}: mapped"


def _move(places: dict[str, str], theirs: str, ours: str) -> None:
    for path in [path for path in places if path == theirs or path.startswith(f"{theirs}.")]:
        places.setdefault(ours + path[len(theirs) :], places[path])


def _contradictions_beside(given: _Input) -> list[Violation]:
    """Broken rules of the keys that are well formed, where the rest can be judged without the others."""
    tainted = {violation.path for violation in given.violations} | given.meant - {""}
    tree = copy.deepcopy(given.tree)
    _, problems = validate(tree)
    for problem in problems:
        path = dotted(problem.path)
        tainted.add(path)
        if path in _STAND_INS:
            put(tree, path, _STAND_INS[path])
        elif path.startswith(("optimizer", "scheduler", "sparse_attention")):
            tree.pop(path.split(".")[0], None)
            tainted.add(path.split(".")[0])
        else:
            remove(tree, problem.path)
    config, problems = validate(tree)
    return find_contradictions(config, frozenset(tainted)) if config is not None and not problems else []
