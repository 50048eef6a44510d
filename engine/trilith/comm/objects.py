"""Small values between ranks, as JSON: nothing is ever unpickled."""

from __future__ import annotations

import json
from typing import Any

import torch

from trilith.comm.collectives import all_gather, broadcast
from trilith.topology import Group

CPU = torch.device("cpu")


def _bytes(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _value(data: torch.Tensor) -> Any:
    return json.loads(bytes(data.numpy()))


def gather_objects(value: Any, group: Group) -> list[Any]:
    """Every rank's `value` in the order of ranks; all ranks of the group (a gloo group: `control`) must call.

    `value` is what JSON can say: None, booleans, numbers (also nan and inf), strings, lists, dicts with string keys.
    Tuples come back as lists, with one rank too. Raises TypeError for anything else.
    """
    data = _bytes(value)
    length = torch.tensor([data.numel()])
    lengths = torch.empty(group.size, dtype=torch.int64)
    all_gather(lengths, length, group)
    longest = int(lengths.max())
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: data.numel()] = data
    gathered = torch.empty(group.size * longest, dtype=torch.uint8)
    all_gather(gathered, padded, group)
    rows = gathered.view(group.size, longest)
    return [_value(row[: int(count)]) for row, count in zip(rows, lengths, strict=True)]


def broadcast_object(value: Any, source_index: int, group: Group, device: torch.device = CPU) -> Any:
    """The `value` of rank `source_index` of the group on every rank; what JSON can say, as in `gather_objects`.

    `device`: where the group's tensors must lie: anywhere for gloo, on this rank's GPU for nccl.
    """
    is_source = group.index == source_index
    data = _bytes(value).to(device) if is_source else torch.empty(0, dtype=torch.uint8, device=device)
    length = torch.tensor([data.numel()], device=device)
    broadcast(length, source_index, group)
    if not is_source:
        data = torch.empty(int(length), dtype=torch.uint8, device=device)
    broadcast(data, source_index, group)
    return _value(data.cpu())
