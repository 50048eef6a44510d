"""What one layer hands to the next, taken apart for the way between ranks and put together again.

A value is a tensor, int, float, bool, str or None, or a tuple, list or dict of values. Its *form* says how it is nested
and where tensors and numbers stand; two values of one form differ in tensors and numbers only. A form is made of lists,
strings and the like, so that it can travel as JSON and be compared.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from trilith.errors import TrilithError

Form = Any
Scalar = int | float | bool

_TENSOR, _TUPLE, _LIST, _DICT, _CONSTANT = "tensor", "tuple", "list", "dict", "constant"
_INT64 = range(-(2**63), 2**63)


def take_apart(value: Any, what: str) -> tuple[list[Tensor], list[Scalar], Form]:
    """The tensors and the numbers of a value, each in order, and its form. `what` names the value in errors.

    Raises TrilithError for a type that a value may not have; a subclass of dict or tuple is one: it would come back as a
    plain dict or tuple, but only where a stage ends.
    """
    tensors: list[Tensor] = []
    scalars: list[Scalar] = []

    def form_of(part: Any) -> Form:
        kind = type(part)
        if isinstance(part, Tensor):
            tensors.append(part)
            return _TENSOR
        if kind in (int, float, bool):
            if kind is int and part not in _INT64:
                raise TrilithError(f"{what}: the number {part} does not fit into 64 bits. Hand it over as a tensor")
            scalars.append(part)
            return kind.__name__
        if part is None or kind is str:
            return [_CONSTANT, part]
        if kind in (tuple, list):
            return [_TUPLE if kind is tuple else _LIST, [form_of(member) for member in part]]
        if kind is dict and all(type(key) in (str, int) for key in part):
            return [_DICT, [[key, form_of(member)] for key, member in part.items()]]
        raise TrilithError(
            f"{what}: holds a {kind.__module__}.{kind.__qualname__}. Between layers pass tensors, numbers, strings and "
            "None, or tuples, lists and dicts (with keys of type str or int) of them"
        )

    return tensors, scalars, form_of(value)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in tuples, lists, mappings and dataclasses, however nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from tensors_in(member)
    elif isinstance(value, (tuple, list)):
        for member in value:
            yield from tensors_in(member)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def put_together(form: Form, tensors: Sequence[Tensor], scalars: Sequence[Scalar]) -> Any:
    """The value of which `take_apart` made these."""
    next_tensor, next_scalar = iter(tensors), iter(scalars)
    value = _value_of(form, next_tensor, next_scalar)
    assert next(next_tensor, None) is None and next(next_scalar, None) is None, form
    return value


def _value_of(form: Form, tensors: Iterator[Tensor], scalars: Iterator[Scalar]) -> Any:
    if form == _TENSOR:
        return next(tensors)
    if isinstance(form, str):
        return next(scalars)
    kind, content = form
    if kind == _CONSTANT:
        return content
    if kind == _DICT:
        return {key: _value_of(member, tensors, scalars) for key, member in content}
    members = [_value_of(member, tensors, scalars) for member in content]
    return tuple(members) if kind == _TUPLE else members


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The value with `function` applied to every tensor in tuples, lists and dicts; other objects stay as they are."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(function, member) for member in value)
    if type(value) is dict:
        return {key: map_tensors(function, member) for key, member in value.items()}
    return value


def scalars_to_tensor(scalars: Sequence[Scalar], device: torch.device) -> Tensor:
    """Numbers as int64 (n,), floats by their bits: exact, and without a gradient."""
    words = [struct.unpack("<q", struct.pack("<d", s))[0] if isinstance(s, float) else int(s) for s in scalars]
    return torch.tensor(words, dtype=torch.int64, device=device)


def scalars_from_tensor(words: Tensor, form: Form) -> list[Scalar]:
    """The numbers again, with the types that the form says. Waits for the device."""
    found: list[Scalar] = []
    for word, kind in zip(words.tolist(), _scalar_kinds(form), strict=True):
        number = struct.unpack("<d", struct.pack("<q", word))[0] if kind == "float" else word
        found.append(bool(word) if kind == "bool" else number)
    return found


def _scalar_kinds(form: Form) -> Iterator[str]:
    if isinstance(form, str):
        if form != _TENSOR:
            yield form
    elif form[0] == _DICT:
        for _, member in form[1]:
            yield from _scalar_kinds(member)
    elif form[0] != _CONSTANT:
        for member in form[1]:
            yield from _scalar_kinds(member)
