"""Structure: a JSON tree -> Config, with every unknown key and wrong type as a Violation in the user's words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from trilith.config.base import AUTO, NotGiven, dotted, shown
from trilith.config.deepspeed import UNKNOWN_KEY
from trilith.config.schema import Config, field_infos, sections, takes_auto
from trilith.config.sparse_keys import MODES
from trilith.config.suggest import advice
from trilith.errors import Violation

Path = tuple[str | int, ...]
SPARSE = "sparse_attention"  # the section whose kind stands in `mode`, not in `type`

_DTYPES = MappingProxyType(
    {
        "float32": "fp32",
        "float": "fp32",
        "f32": "fp32",
        "float64": "fp64",
        "double": "fp64",
        "float16": "fp16",
        "half": "fp16",
        "f16": "fp16",
        "bfloat16": "bf16",
        "no": "fp32",
    }
)
_RULES = MappingProxyType(
    {
        "bool_type": "must be true or false",
        "string_type": "must be a string",
        "model_type": "must be an object",
        "model_attributes_type": "must be an object",
        "dict_type": "must be an object",
        "tuple_type": "must be a list",
        "list_type": "must be a list",
        "greater_than": "must be greater than {gt:g}",
        "greater_than_equal": "must be at least {ge:g}",
        "less_than": "must be less than {lt:g}",
        "less_than_equal": "must be at most {le:g}",
        "too_long": "must have {max_length} entries",
        "too_short": "must have {min_length} entries",
    }
)


@dataclass(frozen=True)
class Problem:
    """A structural violation at `path` of the tree; `meant` is the known key that an unknown one most likely means."""

    path: Path
    violation: Violation
    meant: str = ""


def validate(tree: Mapping[str, Any]) -> tuple[Config | None, list[Problem]]:
    """(the Config, []) or (None, everything structurally wrong with `tree`)."""
    try:
        return Config.model_validate(tree), []
    except ValidationError as error:
        problems = [_problem(detail, tree) for detail in error.errors(include_url=False)]
    meant = {problem.meant for problem in problems if problem.meant}
    kept = [p for p in problems if not (p.violation.rule.startswith("is required") and _within(p, meant))]
    return None, kept


def _within(problem: Problem, meant: set[str]) -> bool:
    """Whether a missing key is only misspelt, so that naming the misspelling is enough."""
    path = problem.violation.path
    return any(name == path or path.startswith(f"{name}.") or name.startswith(f"{path}.") for name in meant)


def not_json(value: Any, path: Path = ()) -> Iterator[tuple[Path, Violation]]:
    """What in `value` is no JSON: NaN, infinities, keys that are no strings, other Python objects."""
    if isinstance(value, Mapping):
        for name, child in value.items():
            if isinstance(name, str):
                yield from not_json(child, (*path, name))
            else:
                at = (*path, str(name))
                yield (*path, name), Violation(dotted(at), shown(name), "a key must be a string")
    elif isinstance(value, (list, tuple)):
        for index, child in enumerate(value):
            yield from not_json(child, (*path, index))
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, Violation(dotted(path), value, "must be a finite number")
    elif value is not None and not isinstance(value, (str, int, float, bool)):
        yield path, Violation(dotted(path), shown(value), f"{type(value).__name__} is no JSON value")


def remove(tree: Any, path: Path) -> None:
    """Takes the value at `path` out of `tree`; of a list's entry, the whole list goes."""
    cut = next((i for i, part in enumerate(path) if isinstance(part, int)), len(path))
    node = tree
    for part in path[: cut - 1]:
        node = node.get(part) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.pop(path[cut - 1], None)


def _problem(detail: ErrorDetails, tree: Any) -> Problem:
    path, value, kind = _clean(detail["loc"], tree), detail["input"], detail["type"]
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(path, value, tree)
    if kind == "union_tag_not_found":
        if not isinstance(value, dict):
            return Problem(path, Violation(dotted(path), shown(value), "must be an object"))
        path = (*path, _tag(path))
        return Problem(path, Violation(dotted(path), NotGiven(), _required(dotted(path)), _kinds(path)))
    if kind == "union_tag_invalid":
        path, tag = (*path, _tag(path)), value.get(_tag(path))
        rule, fix = f"must be one of {context['expected_tags']}", _nearest(tag, context["expected_tags"])
        return Problem(path, Violation(dotted(path), shown(tag), rule, fix))
    if kind == "missing":
        if path and isinstance(path[-1], int):
            rule, path = f"has too few entries: {path[-1] + 1} or more are needed", path[:-1]
            return Problem(path, Violation(dotted(path), shown(_at(tree, path)), rule))
        return Problem(path, Violation(dotted(path), NotGiven(), _required(dotted(path))))
    if kind == "literal_error":
        rule = f"must be one of {context['expected']}" + _or_auto(path)
        return Problem(path, Violation(dotted(path), shown(value), rule, _nearest(value, context["expected"])))
    rule = _RULES[kind].format(**context) if kind in _RULES else detail["msg"]
    return Problem(path, Violation(dotted(path), shown(value), rule + _or_auto(path), _unquote(value, kind)))


def _unknown(path: Path, value: Any, tree: Any) -> Problem:
    """An unknown key: what it may have meant, or which kind of section does not take it."""
    name = dotted(path)
    mode = _at(tree, (*path[:1], "mode"))
    if path[0] == SPARSE and name in field_infos() and mode in MODES:
        takes = f"{mode} takes {', '.join(MODES[mode].model_fields)}."
        return Problem(path, Violation(name, shown(value), f"mode {mode} has no such key", takes))
    kind = _at(tree, (*path[:1], "type"))
    if len(path) == 3 and path[1] == "params" and name in field_infos() and isinstance(kind, str):
        takes = f"{kind} takes {', '.join(_parameters(str(path[0]), kind))}."
        return Problem(path, Violation(name, shown(value), f"{kind} has no such parameter", takes))
    fix, meant = advice(name)
    return Problem(path, Violation(name, shown(value), UNKNOWN_KEY, fix), meant)


def _parameters(section: str, kind: str) -> list[str]:
    """Names of the parameters of the optimizer or scheduler `kind`."""
    for model in sections(Config.model_fields[section].annotation):
        if kind in get_args(model.model_fields["type"].annotation):
            (params,) = sections(model.model_fields["params"].annotation)
            return list(params.model_fields)
    return []


def _tag(path: Path) -> str:
    """The key that says of which kind the section at `path` is."""
    return "mode" if path[:1] == (SPARSE,) else "type"


def _kinds(path: Path) -> str:
    section, tag = str(path[0]), str(path[-1])
    names = [
        repr(name)
        for model in sections(Config.model_fields[section].annotation)
        if tag in model.model_fields
        for name in get_args(model.model_fields[tag].annotation)
    ]
    return f"One of {', '.join(names)}."


def _clean(location: tuple[int | str, ...], tree: Any) -> Path:
    """A location of pydantic without the tags of unions, which are no keys."""
    path: list[str | int] = []
    node = tree
    for part in location:
        if isinstance(node, dict) and part not in node and node.get(_tag(tuple(path))) == part:
            continue
        path.append(part)
        if isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, (list, tuple)) and isinstance(part, int) and part < len(node):
            node = node[part]
        else:
            node = None
    return tuple(path)


def _at(tree: Any, path: Path) -> Any:
    for part in path:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def _required(path: str) -> str:
    info = field_infos().get(path)
    return f"is required: {(info.description or '').split('. ')[0].rstrip('.')}" if info else "is required"


def _or_auto(path: Path) -> str:
    return f', or "{AUTO}"' if takes_auto(dotted(path)) else ""


def _nearest(value: Any, expected: str) -> str:
    """A suggestion for a misspelt choice; `expected` is pydantic's list of choices."""
    choices = [choice.strip("' ") for choice in expected.replace(" or ", ", ").split(", ")]
    if not isinstance(value, str):
        return ""
    lowered = {choice.lower(): choice for choice in choices}
    close = get_close_matches(value.lower(), list(lowered), 1, 0.5)
    meant = _DTYPES.get(value.lower().removeprefix("torch."), "")
    if meant in choices:
        return f'Did you mean "{meant}"?'
    return f'Did you mean "{lowered[close[0]]}"?' if close else ""


def _unquote(value: Any, kind: str) -> str:
    """The usual slip of a number or truth value in quotes."""
    if isinstance(value, str) and kind == "bool_type" and value.lower() in ("true", "false"):
        return f"Write it without quotes: {value.lower()}."
    if isinstance(value, str) and kind in ("whole_number", "real_number"):
        try:
            return f"Write it without quotes: {value.strip()}." if math.isfinite(float(value)) else ""
        except ValueError:
            return ""
    return ""
