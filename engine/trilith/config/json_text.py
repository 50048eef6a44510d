"""Strict JSON: one value per key, no NaN, errors with line and column, and the line of every key.

The standard library parses; a second pass over the then well-formed text notes where each key stands and which are
given twice.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from trilith.config.base import Excerpt, dotted
from trilith.errors import ConfigError, Violation

LARGEST_FILE_BYTES = 4 * 2**20
DEEPEST = 64

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+')


@dataclass(frozen=True)
class Document:
    """A parsed file: the value, the file's name, the line of each dotted path, and the keys given twice."""

    value: Any
    name: str
    lines: Mapping[str, int]
    violations: tuple[Violation, ...]


def read_document(path: Path) -> Document:
    """Reads and parses the file at `path`; ConfigError where it cannot be read or is not JSON."""
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE_BYTES:
            limit = f"a configuration is at most {LARGEST_FILE_BYTES} bytes, this file has {size}"
            raise _unreadable(path, limit, "Is it the right file?")
        data = path.read_bytes()
    except FileNotFoundError:
        raise _unreadable(path, "no such file", _nearest_file(path)) from None
    except IsADirectoryError:
        raise _unreadable(path, "is a directory", "Name the JSON file in it.") from None
    except (OSError, ValueError) as problem:
        raise _unreadable(path, f"cannot be read: {getattr(problem, 'strerror', None) or problem}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        rule = f"is not UTF-8 text: byte {problem.start} is 0x{data[problem.start]:02x}"
        raise _unreadable(path, rule, "Save it as UTF-8.") from None
    return parse(text, path.name)


def parse(text: str, name: str) -> Document:
    """Parses `text`; `name` is what messages call it. ConfigError, alone, where it is not JSON."""
    value = parse_value(text, name)
    lines, doubles = _positions(text)
    violations = tuple(
        Violation(path, Excerpt("(given twice)"), f"duplicate key, on lines {first} and {second}", "Keep one.")
        for path, first, second in doubles
    )
    return Document(value, name, lines, violations)


def parse_value(text: str, name: str) -> Any:
    """The value of a JSON text; NaN and infinities are let through, for the caller to name their key."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as problem:
        where = f"{name}:{problem.lineno}:{problem.colno}"
        line = text.splitlines()[problem.lineno - 1].strip() if text.strip() else ""
        rule = f"is not valid JSON: {problem.msg}"
        raise ConfigError([Violation(where, Excerpt(repr(line[:80])), rule, _hint(text, problem))], name) from None
    except (RecursionError, ValueError) as problem:
        why = "nested too deep" if isinstance(problem, RecursionError) else "a number has too many digits"
        raise ConfigError([Violation(name, Excerpt(repr(text[:40])), f"is not taken: {why}")], name) from None
    if depth(value) > DEEPEST:
        rule = f"is nested deeper than {DEEPEST} levels"
        raise ConfigError([Violation(name, Excerpt(repr(text[:40])), rule)], name)
    return value


def depth(value: Any) -> int:
    """Levels of nesting of a JSON value, counted without recursion."""
    level, layer = 0, [value]
    while layer:
        level += 1
        layer = [
            child
            for node in layer
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    return level


def _unreadable(path: Path, rule: str, fix: str = "") -> ConfigError:
    return ConfigError([Violation("CONFIG", str(path), rule, fix)], path.name or str(path))


def _nearest_file(path: Path) -> str:
    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix == ".json")
    except OSError:
        return f"There is no directory {path.parent} either."
    close = get_close_matches(path.name, names, 1, 0.5)
    return f"Did you mean {path.parent / close[0]}?" if close else "Check the path."


def _hint(text: str, problem: json.JSONDecodeError) -> str:
    """What a writer most likely did at the place where parsing stopped."""
    if not text.strip():
        return "The file is empty."
    before, after = text[: problem.pos].rstrip(), text[problem.pos :].lstrip()
    if after.startswith(("//", "/*", "#")):
        return "JSON has no comments."
    if after.startswith("'"):
        return "Strings and keys stand in double quotes."
    if (before.endswith(",") and after[:1] in ("}", "]")) or (after.startswith(",") and after[1:].lstrip()[:1] in "}]"):
        return "Remove the comma after the last entry."
    if after.startswith(("True", "False", "None")):
        return "JSON writes true, false and null."
    if not after:
        return "The text ends too early: a bracket or brace is not closed."
    if problem.msg == "Extra data":
        return "Only one object may stand in the file."
    return ""


def _positions(text: str) -> tuple[dict[str, int], list[tuple[str, int, int]]]:
    """(line of each dotted path, [(path, first line, second line) of each key given twice]) of well-formed JSON."""
    starts = [0] + [match.end() for match in re.finditer(r"\n", text)]
    lines: dict[str, int] = {}
    doubles: list[tuple[str, int, int]] = []
    path: list[str | int] = []  # one entry per open object or list: the key or index we are at
    seen: list[set[str] | None] = []  # one entry per open object (the keys so far) or list (None)
    at_key = False
    for token in _TOKEN.finditer(text):
        mark = token.group()
        if mark in "{[":
            path.append("" if mark == "{" else 0)
            seen.append(set() if mark == "{" else None)
            at_key = mark == "{"
        elif mark in "}]":
            path.pop()
            seen.pop()
            at_key = False
        elif mark == ",":
            at_key = seen[-1] is not None
            if not at_key:
                path[-1] = int(path[-1]) + 1
        elif at_key:
            keys = seen[-1]
            assert keys is not None
            path[-1] = name = json.loads(mark)
            where, line = dotted(tuple(path)), bisect_right(starts, token.start())
            if name in keys:
                doubles.append((where, lines[where], line))
            keys.add(name)
            lines[where] = line
            at_key = False
    return lines, doubles
