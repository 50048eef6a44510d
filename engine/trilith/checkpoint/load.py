"""Reading a checkpoint into any layout: every shard file says what it holds, box intersection does the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trilith.checkpoint.manifest import Manifest, hash_file, read_manifest
from trilith.errors import CheckpointError
from trilith.sharding import Box, Piece, ShardSpec, contiguous_strides, copies

SPECS = "trilith.shards"
PREVIOUS = "previous"  # role of the weights before the newest, which `pipedream_2bw` goes on with
# What takes the place of a role that a checkpoint has nothing of: where there was one version, the newest is that before.
SUBSTITUTES: Mapping[str, tuple[str, ...]] = MappingProxyType({PREVIOUS: ("master", "weight")})
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "U8": torch.uint8,
    }
)


@dataclass(frozen=True)
class Entry:
    """A canonical tensor's part on this rank: `tensor` is 1-D, and `spec` says which boxes lie where in it.

    The role (`master`, `exp_avg`, ...) stands in the spec; role and name identify the saved tensor.
    """

    spec: ShardSpec
    tensor: Tensor


@dataclass(frozen=True)
class Saved:
    """A part of a canonical tensor in a checkpoint: the shard file, the boxes it holds, and its dtype."""

    file: str
    spec: ShardSpec
    dtype: torch.dtype


def key_of(spec: ShardSpec) -> str:
    """The name of a tensor in shard files: role/name."""
    return f"{spec.role}/{spec.name}"


def spec_to_json(spec: ShardSpec) -> dict[str, Any]:
    """A ShardSpec as JSON-able data. Its pieces lie packed, one after the other, so that their boxes say it all."""
    boxes = [[piece.box.start, piece.box.stop] for piece in spec.pieces]
    return {"name": spec.name, "role": spec.role, "shape": spec.shape, "boxes": boxes}


def spec_from_json(data: dict[str, Any]) -> ShardSpec:
    """The inverse of `spec_to_json`. Raises ValueError for a box that does not lie in the tensor."""
    shape, pieces, offset = tuple(data["shape"]), [], 0
    for start, stop in data["boxes"]:
        if not all(0 <= lo < hi <= extent for lo, hi, extent in zip(start, stop, shape, strict=True)):
            raise ValueError(f"{data['name']}: box {start} to {stop} of a tensor of shape {list(shape)}")
        box = Box(tuple(start), tuple(stop))
        pieces.append(Piece(box, offset, contiguous_strides(box.shape)))
        offset += box.numel
    return ShardSpec(data["name"], shape, tuple(pieces), data["role"])


def load(directory: Path, entries: Sequence[Entry]) -> Manifest:
    """Fill every entry's tensor in place from the checkpoint in `directory`, written by any layout and schedule.

    No communication: each rank reads the files that hold parts of what it needs, after their hashes have been checked
    against the manifest. `SUBSTITUTES` are rounded to the dtype of the entry. Nothing is written into a tensor before
    every needed file has been found intact and fitting.
    Raises CheckpointError naming the tensor that is missing, has another shape or dtype, or the damaged file.
    """
    manifest = read_manifest(directory)
    try:
        plan = _plan(directory, manifest, entries)
    except Exception:
        _check_hashes(directory, manifest, [file.name for file in manifest.files])
        raise  # a damaged header would have been the better explanation
    _check_hashes(directory, manifest, list(plan))
    for name, wanted in plan.items():
        with safe_open(directory / name, framework="pt") as file:
            for entry, saved in wanted:
                _copy(file.get_tensor(key_of(saved.spec)), saved.spec, entry)
    return manifest


def _plan(directory: Path, manifest: Manifest, entries: Sequence[Entry]) -> dict[str, list[tuple[Entry, Saved]]]:
    """What to take from which file, after finding that every element of every entry is there and fits."""
    saved = _index(directory, manifest)
    roles = {part.spec.role for parts in saved.values() for part in parts}
    plan: dict[str, list[tuple[Entry, Saved]]] = {}
    for entry in entries:
        key = _saved_key(entry.spec, saved, roles)
        if key is None:
            raise CheckpointError(f"{directory}: {_lack(entry.spec, saved)}")
        covered = 0
        for part in saved[key]:
            _check_fit(directory / part.file, part, entry)
            found = sum(prod(copy.shape) for copy in copies(part.spec, entry.spec))
            if found:
                plan.setdefault(part.file, []).append((entry, part))
            covered += found
        if covered != entry.spec.numel:
            raise CheckpointError(
                f"{directory}: {key} is incomplete: {covered} of {entry.spec.numel} elements found. Use another checkpoint"
            )
    return plan


def _saved_key(spec: ShardSpec, saved: Mapping[str, Sequence[Saved]], roles: set[str]) -> str | None:
    """What an entry is filled from: its own role, or the substitute of a role that was not saved at all; None: nothing."""
    own = key_of(spec)
    others = () if spec.role in roles else SUBSTITUTES.get(spec.role, ())
    return next((key for key in (own, *(key_of(spec.with_role(role)) for role in others)) if key in saved), None)


def _lack(spec: ShardSpec, saved: Mapping[str, Sequence[Saved]]) -> str:
    """What is missing, and which keys of the config decide about it."""
    kept = sorted(parts[0].spec.role for parts in saved.values() if parts[0].spec.name == spec.name)
    missing = f"holds no {spec.role} of {spec.name}"
    if not kept:
        return f"{missing}, nor anything else of it. Use the model of the run that saved it"
    return f"{missing}, only {', '.join(kept)}. Use optimizer and data_types of the run that saved it"


def _check_fit(path: Path, saved: Saved, entry: Entry) -> None:
    """Whether what was saved has the shape and the dtype of what this run keeps."""
    spec = entry.spec
    if saved.spec.shape != spec.shape:
        raise CheckpointError(
            f"{path}: {spec.name} has shape {list(saved.spec.shape)} in the checkpoint, {list(spec.shape)} in this run: "
            "the model section of the config differs"
        )
    if saved.dtype != entry.tensor.dtype and saved.spec.role == spec.role:
        raise CheckpointError(
            f"{path}: {spec.role} of {spec.name} is {saved.dtype}, this run keeps {entry.tensor.dtype}: "
            "data_types and the precision of the two runs must agree"
        )


def _check_hashes(directory: Path, manifest: Manifest, names: Sequence[str]) -> None:
    hashes = {file.name: file.hash for file in manifest.files}
    for name in names:
        try:
            found = hash_file(directory / name)
        except OSError as error:
            raise CheckpointError(f"{directory / name}: cannot be read: {error}") from error
        if found != hashes[name]:
            raise CheckpointError(f"{directory / name}: its bytes differ from what was saved (hash mismatch)")


def _index(directory: Path, manifest: Manifest) -> dict[str, list[Saved]]:
    """Which files hold parts of which `role/name`."""
    saved: dict[str, list[Saved]] = {}
    for file in manifest.files:
        path = directory / file.name
        try:
            with safe_open(path, framework="pt") as shard:
                for data in json.loads((shard.metadata() or {})[SPECS]):
                    spec = spec_from_json(data)
                    key = key_of(spec)
                    kept = shard.get_slice(key)
                    if kept.get_shape() != [spec.numel]:
                        raise ValueError(f"{key}: {kept.get_shape()} elements, its boxes hold {spec.numel}")
                    saved.setdefault(key, []).append(Saved(file.name, spec, DTYPES[kept.get_dtype()]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: its header cannot be read: {error!r}") from error
    return saved


def _copy(source: Tensor, spec: ShardSpec, entry: Entry) -> None:
    base = entry.tensor.storage_offset()
    with torch.no_grad():
        for copy in copies(spec, entry.spec):
            part = source.as_strided(copy.shape, copy.source_strides, copy.source_offset)
            target = entry.tensor.as_strided(copy.shape, copy.target_strides, base + copy.target_offset)
            target.copy_(part)
