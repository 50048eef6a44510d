"""Writing a checkpoint: shards first, then a vote, then the manifest, then one rename.

A kill at any instant leaves either the whole new checkpoint or none of it; the previous ones are only removed after the
new one is published. A rank that cannot write makes every rank report the same failure; no half-written file stays.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trilith import comm
from trilith.checkpoint.load import SPECS, Entry, key_of, spec_to_json
from trilith.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    ShardFile,
    fsync_directory,
    hash_file,
    published_steps,
    read_manifest,
    step_directory,
)
from trilith.errors import CheckpointError
from trilith.failpoints import Failpoints
from trilith.sharding import ShardSpec, contiguous_strides
from trilith.topology import Group


def save(
    root: Path,
    step: int,
    entries: Sequence[Entry],
    state: Mapping[str, Any],
    control: Group,
    *,
    keep_last: int = 2,
    failpoints: Failpoints | None = None,
) -> Path:
    """Write the checkpoint of `step` under `root` and return its directory. Every rank of `control` must call it.

    Each rank hands in what it owns; only pieces with replica 0 are written. `state` must be the same JSON-able value on
    every rank (rank 0's is kept). The newest `keep_last` checkpoints stay.
    Raises CheckpointError on every rank if any rank failed; then nothing is published and nothing is left behind.
    """
    directory = step_directory(root, step)
    attempt = comm.broadcast_object(secrets.token_hex(4), 0, control)
    draft = directory.with_name(f"{directory.name}.tmp-{attempt}")
    failpoints = failpoints or Failpoints()
    failure, files = "", []
    try:
        draft.mkdir(parents=True, exist_ok=True)
        files = _write_shard(draft, control.index, entries, failpoints)
    except Exception as error:  # whatever it was, the others wait for this rank's vote
        failure = _text(control.index, error)
    reports = comm.gather_objects({"failure": failure, "files": files}, control)
    failures = [report["failure"] for report in reports if report["failure"]]
    if not failures and control.index == 0:
        listed = tuple(ShardFile(**file) for report in reports for file in report["files"])
        try:
            failpoints.hit("checkpoint_publish")
            _publish(draft, directory, Manifest(step, state, listed))
        except Exception as error:
            failures = [_text(0, error)]
    failures = comm.broadcast_object(failures, 0, control)
    if control.index == 0:
        if failures:
            shutil.rmtree(draft, ignore_errors=True)
        else:
            _retire(root, step, keep_last)
    if failures:
        raise CheckpointError(
            f"{directory}: the checkpoint of step {step} could not be written; earlier ones are untouched: "
            + "; ".join(failures)
        )
    return directory


def _text(rank: int, error: Exception) -> str:
    kind = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
    return f"rank {rank}: {kind}{error}"


def _write_shard(draft: Path, rank: int, entries: Sequence[Entry], failpoints: Failpoints) -> list[dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    specs: list[dict[str, Any]] = []
    for entry in entries:
        kept, tensor = _owned(entry)
        if not kept.pieces:
            continue
        if kept.role != "buffer" and not bool(torch.isfinite(tensor).all()):  # a mask may well hold infinity
            raise CheckpointError(
                f"{kept.role} of {kept.name}: holds NaN or infinity; such a state is not published. "
                "Resume from the last checkpoint with a lower learning rate or a lower loss scale"
            )
        assert key_of(kept) not in tensors, key_of(kept)
        tensors[key_of(kept)] = tensor
        specs.append(spec_to_json(kept))
    if not tensors:
        return []
    path = draft / f"rank-{rank:05d}.safetensors"
    failpoints.hit("checkpoint_write")
    save_file(tensors, path, metadata={SPECS: json.dumps(specs)})
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return [{"name": path.name, "num_bytes": path.stat().st_size, "hash": hash_file(path)}]


def _owned(entry: Entry) -> tuple[ShardSpec, Tensor]:
    """The pieces that count (replica 0), packed one after the other, and their spec in that packing: (spec, 1-D)."""
    pieces, parts, offset = [], [], 0
    for piece in entry.spec.pieces:
        if piece.replica == 0:
            base = int(entry.tensor.storage_offset())
            parts.append(entry.tensor.as_strided(piece.box.shape, piece.strides, base + piece.offset))
            pieces.append(replace(piece, offset=offset, strides=contiguous_strides(piece.box.shape)))
            offset += piece.box.numel
    if not pieces:
        return replace(entry.spec, pieces=()), entry.tensor[:0]
    packed = torch.cat([part.reshape(-1) for part in parts]).cpu()
    return replace(entry.spec, pieces=tuple(pieces)), packed


def _publish(draft: Path, directory: Path, manifest: Manifest) -> None:
    with (draft / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    fsync_directory(draft)
    read_manifest(draft)  # what cannot be read back is not published
    if _is_valid(directory):
        if read_manifest(directory).files != manifest.files:
            raise CheckpointError(
                f"{directory}: holds another run's checkpoint of this step. Choose another checkpoint.directory, "
                "or set checkpoint.resume to continue that run"
            )
        # The same run came to this step again, with the same bits: what is published stays.
        shutil.rmtree(draft)
        return
    if directory.exists():
        _remove(directory)
    draft.rename(directory)
    fsync_directory(directory.parent)


def _is_valid(directory: Path) -> bool:
    try:
        read_manifest(directory)
    except CheckpointError:
        return False
    return True


def _remove(directory: Path) -> None:
    """Take a checkpoint away under a draft's name first: a kill in here leaves nothing half-removed for good."""
    aside = directory.with_name(f"{directory.name}.tmp-{secrets.token_hex(4)}")
    directory.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _retire(root: Path, step: int, keep_last: int) -> None:
    """Remove what is older than the newest `keep_last` valid checkpoints, and drafts that an earlier attempt left.

    A damaged checkpoint takes no valid one's place, nor do later steps, which this run has yet to reach.
    """
    published = published_steps(root)
    valid = [one for one in published if one <= step and _is_valid(step_directory(root, one))]
    if len(valid) >= keep_last:
        for old in published:
            if old < valid[-keep_last]:
                with suppress(OSError):
                    _remove(step_directory(root, old))
    for draft in root.glob("step-*.tmp-*"):
        shutil.rmtree(draft, ignore_errors=True)
