"""Reading a checkpoint into any layout: every shard file says what it holds, box intersection does the rest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trilith.checkpoint.manifest import Manifest, hash_file, read_manifest
from trilith.errors import CheckpointError
from trilith.sharding import Box, Piece, ShardSpec, copies

SPECS = "trilith.shards"


@dataclass(frozen=True)
class Entry:
    """A canonical tensor's part on this rank: `tensor` is 1-D, and `spec` says which boxes lie where in it.

    The role (`master`, `exp_avg`, ...) stands in the spec; role and name identify the saved tensor.
    """

    spec: ShardSpec
    tensor: Tensor


def spec_to_json(spec: ShardSpec) -> dict[str, Any]:
    """A ShardSpec as JSON-able data."""
    pieces = [[p.box.start, p.box.stop, p.offset, p.strides] for p in spec.pieces]
    return {"name": spec.name, "role": spec.role, "shape": spec.shape, "pieces": pieces}


def spec_from_json(data: dict[str, Any]) -> ShardSpec:
    """The inverse of `spec_to_json`."""
    pieces = tuple(
        Piece(Box(tuple(start), tuple(stop)), int(offset), tuple(strides))
        for start, stop, offset, strides in data["pieces"]
    )
    return ShardSpec(data["name"], tuple(data["shape"]), pieces, data["role"])


def load(directory: Path, entries: Sequence[Entry]) -> Manifest:
    """Fill every entry's tensor in place from the checkpoint in `directory`, written by any layout.

    No communication: each rank reads the files that hold parts of what it needs, after their hashes have been checked
    against the manifest. Nothing is written into a tensor before every needed file has been found intact.
    Raises CheckpointError naming the tensor that is missing, has another shape or dtype, or the damaged file.
    """
    manifest = read_manifest(directory)
    saved = _index(directory, manifest)
    plan: dict[str, list[tuple[Entry, str, ShardSpec]]] = {}
    for entry in entries:
        key = f"{entry.spec.role}/{entry.spec.name}"
        holders = saved.get(key)
        if holders is None:
            raise CheckpointError(f"{directory}: holds no {entry.spec.role} of {entry.spec.name}")
        covered = 0
        for file, spec in holders:
            if spec.shape != entry.spec.shape:
                raise CheckpointError(
                    f"{directory}: {entry.spec.name} has shape {list(spec.shape)} in the checkpoint, "
                    f"{list(entry.spec.shape)} in this run: the model section of the config differs"
                )
            found = sum(_numel(copy.shape) for copy in copies(spec, entry.spec))
            if found:
                plan.setdefault(file, []).append((entry, key, spec))
            covered += found
        if covered != entry.spec.numel:
            raise CheckpointError(f"{directory}: {key} is incomplete: {covered} of {entry.spec.numel} elements found")
    hashes = {file.name: file.hash for file in manifest.files}
    for name in plan:
        if hash_file(directory / name) != hashes[name]:
            raise CheckpointError(f"{directory / name}: its bytes differ from what was saved (hash mismatch)")
    for name, wanted in plan.items():
        with safe_open(directory / name, framework="pt") as file:
            for entry, key, spec in wanted:
                _copy(file.get_tensor(key), spec, entry, directory / name)
    return manifest


def _index(directory: Path, manifest: Manifest) -> dict[str, list[tuple[str, ShardSpec]]]:
    """Which files hold parts of which `role/name`."""
    saved: dict[str, list[tuple[str, ShardSpec]]] = {}
    for file in manifest.files:
        path = directory / file.name
        try:
            with safe_open(path, framework="pt") as shard:
                specs = json.loads((shard.metadata() or {})[SPECS])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: its header cannot be read: {error}") from error
        for key, spec in specs.items():
            saved.setdefault(key, []).append((file.name, spec_from_json(spec)))
    return saved


def _copy(source: Tensor, spec: ShardSpec, entry: Entry, path: Path) -> None:
    if source.dtype != entry.tensor.dtype:
        raise CheckpointError(
            f"{path}: {spec.role} of {spec.name} is {source.dtype}, this run keeps {entry.tensor.dtype}: "
            "data_types and the precision of the two runs must agree"
        )
    base = entry.tensor.storage_offset()
    with torch.no_grad():
        for copy in copies(spec, entry.spec):
            part = source.as_strided(copy.shape, copy.source_strides, copy.source_offset)
            target = entry.tensor.as_strided(copy.shape, copy.target_strides, base + copy.target_offset)
            target.copy_(part)


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for extent in shape:
        numel *= extent
    return numel
