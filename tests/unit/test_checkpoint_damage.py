"""Damaged, incomplete and poisoned checkpoints: every one is refused, the file named, before a tensor is touched."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint_cases import (
    SHARDS,
    assert_untouched,
    canonical,
    control,
    entries,
    listed,
    seal,
    whole,
    write_two_shards,
)
from trilith.checkpoint import load, newest, save
from trilith.checkpoint.load import SPECS
from trilith.checkpoint.manifest import MANIFEST, ShardFile, hash_file
from trilith.errors import CheckpointError


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks; not to be changed."""
    return write_two_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def damaged(two_shards: Path, tmp_path: Path) -> Path:
    """A copy of `two_shards` to damage."""
    shutil.copytree(two_shards, tmp_path / two_shards.name)
    return tmp_path / two_shards.name


def refused(directory: Path, *named: str) -> None:
    """The checkpoint is refused with a message that names all of `named`, and no tensor is touched."""
    held = entries()
    with pytest.raises(CheckpointError) as caught:
        load(directory, held)
    assert_untouched(held)
    assert all(name in str(caught.value) for name in named), caught.value


def test_incomplete_tensors_are_refused(damaged: Path) -> None:
    """The second rank's file is gone and the manifest, rightly hashed, does not list it."""
    (damaged / SHARDS[1]).unlink()
    seal(damaged, listed(damaged)[:1])
    refused(damaged, "weight/embedding.weight is incomplete: 12 of 28 elements")


def test_truncation_at_every_kind_of_length(damaged: Path) -> None:
    path = damaged / SHARDS[0]
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for length in (0, 1, 7, 8, header - 1, header, header + 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        refused(damaged, str(path), f"{length} bytes", f"says {len(content)}")
    path.write_bytes(content + b"\0")
    refused(damaged, str(path), f"{len(content) + 1} bytes")
    path.write_bytes(content)
    load(damaged, entries())


def test_a_flipped_byte_in_a_shard(damaged: Path) -> None:
    """Every byte of the payload and of the header's beginning, and a sample of the rest: all refused, the file named."""
    path = damaged / SHARDS[1]
    content = path.read_bytes()
    payload = 8 + int.from_bytes(content[:8], "little")
    draw = random.Random(5)
    positions = [*range(40), *range(40, payload, 5), *range(payload, len(content))]
    for position in positions:
        flipped = bytearray(content)
        flipped[position] ^= draw.randint(1, 255) if position % 2 else 1 << draw.randrange(8)
        path.write_bytes(flipped)
        refused(damaged, str(path))


def test_a_flipped_byte_in_the_manifest(damaged: Path) -> None:
    """Whitespace included: a manifest has one text."""
    path = damaged / MANIFEST
    content = path.read_bytes()
    draw = random.Random(6)
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        refused(damaged, str(path))
    for edited in (content + b"\n", content.replace(b'"step": 3', b'"step":  3'), content[:-1], b"", b"[]", b"{}"):
        path.write_bytes(edited)
        refused(damaged, str(path))


def remove_shard(directory: Path) -> str:
    (directory / SHARDS[1]).unlink()
    return f"{directory / SHARDS[1]}: missing"


def add_shard(directory: Path) -> str:
    shutil.copy(directory / SHARDS[1], directory / "rank-00002.safetensors")
    return f"{directory / 'rank-00002.safetensors'}: no part of this checkpoint"


def swap_shards(directory: Path) -> str:
    one, two = (directory / name for name in SHARDS)
    one.rename(directory / "aside")
    two.rename(one)
    (directory / "aside").rename(two)
    return SHARDS[0]


def take_another_step_s_shard(directory: Path) -> str:
    """Of equal length: only the hash tells."""
    path = directory / SHARDS[1]
    stale = save(directory.parent / "stale", 2, entries(1, 2, canonical(seed=1)), {}, control())
    assert (stale / SHARDS[0]).stat().st_size == path.stat().st_size
    shutil.copy(stale / SHARDS[0], path)
    return f"{path}: its bytes differ"


def take_another_layout_s_shard(directory: Path) -> str:
    """What it holds makes no sense here; the message still names the file, not what follows from it."""
    path = directory / SHARDS[1]
    stale = save(directory.parent / "stale", 3, entries(0, 3, canonical()), {}, control())
    shutil.copy(stale / SHARDS[0], path)
    first, second = listed(directory)
    seal(directory, [first, replace(second, num_bytes=path.stat().st_size)])
    return f"{path}: its bytes differ"


def link_shard(directory: Path) -> str:
    shutil.move(directory / SHARDS[1], directory.parent / "elsewhere")
    (directory / SHARDS[1]).symlink_to(directory.parent / "elsewhere")
    return f"{directory / SHARDS[1]}: is a symbolic link"


def link_manifest(directory: Path) -> str:
    shutil.move(directory / MANIFEST, directory.parent / "elsewhere.json")
    (directory / MANIFEST).symlink_to(directory.parent / "elsewhere.json")
    return f"{directory / MANIFEST}: is a symbolic link"


def replace_shard_by_directory(directory: Path) -> str:
    (directory / SHARDS[0]).unlink()
    (directory / SHARDS[0]).mkdir()
    return f"{directory / SHARDS[0]}: missing"


def list_a_shard_twice(directory: Path) -> str:
    files = listed(directory)
    seal(directory, [*files, files[0]])
    return "listed twice"


def list_other_name(name: str) -> Callable[[Path], str]:
    def edit(directory: Path) -> str:
        first, second = listed(directory)
        target = Path(os.path.join(directory, name))
        if not target.exists():
            shutil.copy(directory / SHARDS[1], target)
        seal(directory, [first, replace(second, name=name)])
        return f"files.name = {name!r}"

    return edit


def rename_directory_s_step(directory: Path) -> str:
    seal(directory, listed(directory), step=4)
    return "step = 4: not the step of its directory's name"


def remove_manifest(directory: Path) -> str:
    (directory / MANIFEST).unlink()
    return f"{directory}: no manifest.json"


def newer_version(directory: Path) -> str:
    path = directory / MANIFEST
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    return "version = 2: this Trilith reads version 1"


DAMAGE: tuple[Callable[[Path], str], ...] = (
    remove_shard,
    add_shard,
    swap_shards,
    take_another_step_s_shard,
    take_another_layout_s_shard,
    link_shard,
    link_manifest,
    replace_shard_by_directory,
    list_a_shard_twice,
    rename_directory_s_step,
    remove_manifest,
    newer_version,
    list_other_name("../rank-00001.safetensors"),
    list_other_name("./rank-00001.safetensors"),
    list_other_name("rank-00001.bin"),
)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_wrong_sets_of_files(damaged: Path, damage: Callable[[Path], str]) -> None:
    load(damaged, entries())
    refused(damaged, damage(damaged))


def test_absolute_names_are_refused(damaged: Path) -> None:
    refused(damaged, list_other_name(str(damaged / SHARDS[1]))(damaged))


class Payload:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.trace),))


@pytest.mark.parametrize("form", ["pickle", "torch", "beside", "manifest"])
def test_a_poisoned_pickle_is_never_run(damaged: Path, form: str, tmp_path: Path) -> None:
    """As a listed shard with the right hash, as torch.save writes it, as an extra file, or in the manifest's place."""
    trace = tmp_path / "trace"
    path = damaged / {"beside": "data.pkl", "manifest": MANIFEST}.get(form, SHARDS[0])
    if form == "torch":
        torch.save(Payload(trace), path)
    else:
        path.write_bytes(pickle.dumps(Payload(trace)))
    if form in ("pickle", "torch"):
        files = listed(damaged)
        seal(damaged, [ShardFile(SHARDS[0], path.stat().st_size, hash_file(path)), files[1]])
    refused(damaged, str(path))
    assert newest(tmp_path) == (damaged if form in ("pickle", "torch") else None)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists(), "the payload works"


LIES = (
    {"boxes": [[[0], [5]]]},
    {"boxes": [[[-1], [3]]]},
    {"boxes": [[[0], [3]]]},
    {"boxes": [[[0, 0], [4, 1]]]},
    {"boxes": [[[2], [2]], [[0], [4]]]},
    {"boxes": [[0, 4]]},
    {"boxes": 7},
    {"shape": None},
    {"name": "other"},
    {"role": ["master"]},
)


@pytest.mark.parametrize("changes", LIES, ids=str)
def test_headers_that_lie_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    """What no `save` writes, in a file that the manifest lists with the right hash."""
    description = {"name": "w", "role": "master", "shape": [4], "boxes": [[[0], [4]]]} | changes
    directory = tmp_path / "step-00000003"
    directory.mkdir()
    path = directory / SHARDS[0]
    save_file({"master/w": torch.ones(4)}, path, metadata={SPECS: json.dumps([description])})
    seal(directory, [ShardFile(path.name, path.stat().st_size, hash_file(path))])
    target = whole("w", torch.zeros(4))
    with pytest.raises(CheckpointError) as caught:
        load(directory, [target])
    assert str(path) in str(caught.value)
    assert not target.tensor.any()
