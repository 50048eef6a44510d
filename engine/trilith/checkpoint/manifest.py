"""The manifest of a checkpoint: what a reader trusts, and how it knows that nothing is missing or altered.

Layout of a checkpoint: `step-00000100/manifest.json` and one `rank-00000.safetensors` per writing rank. A directory
without a valid manifest does not count; the newest is the highest step with one, never a pointer file or a time stamp.
Tensors live in safetensors, everything else in JSON; nothing is pickled. The manifest hashes every shard file and itself.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from trilith.errors import CheckpointError

FORMAT, VERSION = "trilith-checkpoint", 1
MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"rank-\d{5,}\.safetensors")
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class ShardFile:
    """One shard file: its name in the directory, its length and the XXH3-128 of its bytes."""

    name: str
    num_bytes: int
    hash: str


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds: the step, the run's scalar state and layout, and every shard file."""

    step: int
    state: Mapping[str, Any]
    files: tuple[ShardFile, ...]

    def to_json(self) -> str:
        """The manifest's text, with a hash of itself; one content has one text."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "state": dict(self.state),
            "files": [asdict(file) for file in self.files],
        }
        return _render({**content, "hash": xxhash.xxh3_128_hexdigest(_render(content).encode())})


def _render(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False)


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies under `root`."""
    return root / f"step-{step:08d}"


def hash_file(path: Path) -> str:
    """XXH3-128 of a file's bytes, as hex."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def fsync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(directory: Path) -> Manifest:
    """Read and validate a checkpoint's manifest, and that the files it names, and no others, are there with their length.

    Raises CheckpointError naming the file and what is wrong with it.
    """
    try:
        manifest = _parse(directory / MANIFEST)
        _check_files(directory, manifest)
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: no {MANIFEST}: not a checkpoint, or one that was never finished") from None
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error}") from error
    named = _STEP.fullmatch(directory.name)
    if named and int(named.group(1)) != manifest.step:
        raise CheckpointError(f"{directory / MANIFEST}: step = {manifest.step}: not the step of its directory's name")
    return manifest


def _parse(path: Path) -> Manifest:
    if path.is_symlink():
        raise CheckpointError(f"{path}: is a symbolic link; a checkpoint holds its files itself")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format is not {FORMAT!r}")
    if content.get("version") != VERSION:
        raise CheckpointError(f"{path}: version = {content.get('version')!r}: this Trilith reads version {VERSION}")
    try:
        files = tuple(ShardFile(f["name"], int(f["num_bytes"]), f["hash"]) for f in content["files"])
        manifest = Manifest(int(content["step"]), content["state"], files)
        is_whole = manifest.to_json() == text
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: a field is missing or of the wrong type: {error!r}") from error
    if not is_whole:
        raise CheckpointError(f"{path}: its bytes differ from what was saved (hash mismatch)")
    return manifest


def _check_files(directory: Path, manifest: Manifest) -> None:
    names = [file.name for file in manifest.files]
    if len(set(names)) != len(names):
        raise CheckpointError(f"{directory / MANIFEST}: a file is listed twice")
    for file in manifest.files:
        if not _FILE.fullmatch(file.name):
            raise CheckpointError(f"{directory / MANIFEST}: files.name = {file.name!r}: not a shard file's name")
        shard = directory / file.name
        if shard.is_symlink():
            raise CheckpointError(f"{shard}: is a symbolic link; a checkpoint holds its files itself")
        if not shard.is_file():
            raise CheckpointError(f"{shard}: missing, though the manifest lists it")
        if shard.stat().st_size != file.num_bytes:
            raise CheckpointError(
                f"{shard}: {shard.stat().st_size} bytes, the manifest says {file.num_bytes}: cut short or replaced"
            )
    others = sorted({entry.name for entry in directory.iterdir()} - {*names, MANIFEST})
    if others:
        raise CheckpointError(
            f"{directory / others[0]}: no part of this checkpoint, though it lies there. Move it away"
        )


def published_steps(root: Path) -> list[int]:
    """Steps under `root` that have a manifest file, ascending."""
    if not root.is_dir():
        return []
    found = (_STEP.fullmatch(entry.name) for entry in root.iterdir() if (entry / MANIFEST).is_file())
    return sorted(int(match.group(1)) for match in found if match)


def candidates(root: Path, report: Callable[[str], object] | None = None) -> list[Path]:
    """The checkpoints under `root` whose manifest is valid, newest first.

    `report` is told of every one that is passed over, and why.
    """
    found = []
    for step in reversed(published_steps(root)):
        try:
            read_manifest(step_directory(root, step))
        except CheckpointError as error:
            if report is not None:
                report(f"checkpoint passed over: {error}")
        else:
            found.append(step_directory(root, step))
    return found


def newest(root: Path) -> Path | None:
    """The newest checkpoint under `root` whose manifest is valid, or None."""
    return next(iter(candidates(root)), None)
