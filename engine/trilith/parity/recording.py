"""What a run wrote down, and how the parts that ranks hold become canonical tensors again.

A recording is a directory: safetensors files with what ranks computed, as it lies locally, and one JSON index per rank
that says which boxes of which canonical tensors each stored tensor holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trilith.sharding import Box, Piece, ShardSpec, contiguous_strides, copies, whole

WEIGHT, ACTIVATION, LOSS, GRADIENT, GRADIENT_NORM = "weight", "activation", "loss", "gradient", "gradient norm"


@dataclass(frozen=True)
class Key:
    """Which canonical tensor of a run: `step` counts from 1, 0 is before the first; `sample` is the consumed-sample
    index of an activation, else None."""

    kind: str
    step: int
    name: str
    sample: int | None = None


@dataclass(frozen=True)
class Part:
    """What one rank holds of a canonical tensor: boxes (`spec`) of the tensor `stored` in `file`.

    `largest`: the largest finite magnitude in the stored tensor, which may hold more than this part.
    """

    key: Key
    rank: int
    stage: int
    microbatch: int | None
    file: str
    stored: str
    largest: float
    spec: ShardSpec

    def to_json(self) -> dict[str, Any]:
        """This part in a rank's index."""
        return {
            **vars(self.key),
            "stage": self.stage,
            "microbatch": self.microbatch,
            "file": self.file,
            "stored": self.stored,
            "largest": self.largest,
            "shape": self.spec.shape,
            "pieces": [[p.box.start, p.box.stop, p.offset, p.strides] for p in self.spec.pieces],
        }

    @classmethod
    def from_json(cls, rank: int, data: Mapping[str, Any]) -> Part:
        """The inverse of `to_json`."""
        key = Key(data["kind"], data["step"], data["name"], data["sample"])
        own = {name: data[name] for name in ("stage", "microbatch", "file", "stored", "largest")}
        pieces = tuple(
            Piece(Box(tuple(start), tuple(stop)), offset, tuple(strides))
            for start, stop, offset, strides in data["pieces"]
        )
        return cls(key=key, rank=rank, spec=ShardSpec(key.name, tuple(data["shape"]), pieces, key.kind), **own)

    def holds(self, index: Sequence[int]) -> bool:
        """Whether the element `index` of the canonical tensor lies here."""
        return any(
            all(a <= i < b for i, a, b in zip(index, piece.box.start, piece.box.stop, strict=True))
            for piece in self.spec.pieces
        )


@dataclass(frozen=True)
class Disagreement:
    """Where replicas of a tensor differ most: at `index`, `part` has `value`, and `first`, a part that was read before,
    has `first_value`."""

    error: float
    index: tuple[int, ...]
    part: Part
    value: float
    first: Part
    first_value: float


@dataclass(frozen=True)
class Whole:
    """A canonical tensor, put together from `parts`; where several hold an element, the value of the first of them."""

    values: Tensor
    parts: tuple[Part, ...]
    disagreement: Disagreement | None

    def holder(self, index: Sequence[int]) -> Part:
        """The part whose value stands at `index`."""
        return next(part for part in self.parts if part.holds(index))


class Recording:
    """One side's recording. `lrs[i]`: the learning rate of step i + 1; `data`: fingerprint of the samples."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        found: dict[Key, list[Part]] = {}
        for path in sorted(directory.glob("rank-*.json")):
            index = json.loads(path.read_text())
            self.lrs: tuple[float, ...] = tuple(index["lrs"])
            self.data: str = index["data"]
            for line in index["parts"]:
                part = Part.from_json(index["rank"], line)
                found.setdefault(part.key, []).append(part)
        self.parts: Mapping[Key, tuple[Part, ...]] = {key: tuple(parts) for key, parts in found.items()}

    def assemble(self, key: Key) -> Whole:
        """The canonical tensor `key` on the CPU, in the dtype in which it was recorded."""
        parts = self.parts.get(key, ())
        assert parts, f"{self.directory} holds no {key}"
        spec = parts[0].spec
        target = ShardSpec(spec.name, spec.shape, (Piece(whole(spec.shape), 0, contiguous_strides(spec.shape)),))
        values, disagreement = torch.empty(0), None
        filled = torch.zeros(spec.shape, dtype=torch.bool)
        for number, part in enumerate(parts):
            stored = self._read(part)
            if number == 0:
                values = torch.zeros(spec.shape, dtype=stored.dtype)
            for copy in copies(part.spec, target):
                have = stored.as_strided(copy.shape, copy.source_strides, copy.source_offset)
                region = tuple(slice(a, b) for a, b in zip(copy.box.start, copy.box.stop, strict=True))
                place, known = values[region], filled[region]
                if bool(known.any()) and not torch.equal(have, place):
                    found = _disagreement(have, place, known, copy.box.start, parts[: number + 1])
                    if found is not None and (disagreement is None or found.error > disagreement.error):
                        disagreement = found
                place.copy_(torch.where(known, place, have))
                known.fill_(True)
        assert bool(filled.all()), f"{self.directory}: {int((~filled).sum())} elements of {key} were not recorded"
        return Whole(values, parts, disagreement)

    def fill(self, key: Key, spec: ShardSpec, storage: Tensor) -> None:
        """Copy what `spec` holds of the canonical tensor `key` into the 1-D `storage`; of replicas, the first one's."""
        for part in reversed(self.parts[key]):
            plan = copies(part.spec, spec)
            stored = self._read(part) if plan else storage
            for copy in plan:
                have = stored.as_strided(copy.shape, copy.source_strides, copy.source_offset)
                storage.as_strided(copy.shape, copy.target_strides, copy.target_offset).copy_(have)

    def _read(self, part: Part) -> Tensor:
        with safe_open(self.directory / part.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(part.stored)
        return tensor


def difference(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| in float64: 0 where both are NaN or the same infinity, infinite where only one is finite or a number."""
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    return (a - b).abs().nan_to_num(nan=inf, posinf=inf).masked_fill(same, 0.0)


def unravel(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The index in a row-major tensor of `shape` of its element number `flat`."""
    index = []
    for extent in reversed(shape):
        flat, at = divmod(flat, extent)
        index.append(at)
    return tuple(reversed(index))


def _disagreement(
    have: Tensor, place: Tensor, known: Tensor, start: Sequence[int], parts: Sequence[Part]
) -> Disagreement | None:
    """The largest difference between `have`, of the last of `parts`, and what stands at `known` elements of `place`."""
    error = difference(have, place).masked_fill(~known, 0.0).flatten()
    at = int(error.argmax())
    if float(error[at]) == 0.0:
        return None
    local = unravel(at, have.shape)
    index = tuple(a + b for a, b in zip(start, local, strict=True))
    first = next(part for part in parts if part.holds(index))
    return Disagreement(float(error[at]), index, parts[-1], float(have[local]), first, float(place[local]))
