"""Small Python values as JSON and back, exactly: what a user's optimizer and scheduler keep besides large tensors."""

from __future__ import annotations

from collections import Counter
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from trilith.errors import CheckpointError


def to_json(value: Any, what: str) -> Any:
    """A value of None, booleans, numbers, strings, tensors of one element, lists, tuples, dicts and Counters.

    `what` names it in errors. Raises CheckpointError for anything else.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, Tensor) and value.numel() == 1:
        dtype = str(value.dtype).removeprefix("torch.")
        return {"tensor": [dtype, list(value.shape), to_json(value.item(), what)]}
    if type(value) is list:
        return [to_json(member, what) for member in value]
    if type(value) is tuple:
        return {"tuple": [to_json(member, what) for member in value]}
    if type(value) in (dict, Counter):
        kind = "dict" if type(value) is dict else "counter"
        return {kind: [[to_json(key, what), to_json(member, what)] for key, member in value.items()]}
    raise CheckpointError(
        f"{what}: holds a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot keep. Only None, "
        "numbers, strings, and lists, tuples and dicts of them can be kept"
    )


def from_json(data: Any) -> Any:
    """The inverse of `to_json`; tensors come back on the CPU."""
    if isinstance(data, list):
        return [from_json(member) for member in data]
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind == "float":
        return float(content)
    if kind == "tensor":
        dtype, shape, number = content
        return torch.full(shape, from_json(number), dtype=getattr(torch, dtype))
    if kind == "tuple":
        return tuple(from_json(member) for member in content)
    pairs = {from_json(key): from_json(member) for key, member in content}
    return Counter(pairs) if kind == "counter" else pairs
