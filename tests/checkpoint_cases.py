"""A small training state in any layout, for tests of checkpoints: canonical tensors, and a rank's part of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilith.checkpoint import Entry, Manifest, save
from trilith.checkpoint.manifest import MANIFEST, ShardFile
from trilith.sharding import Box, Piece, ShardSpec, contiguous_strides
from trilith.topology import Group

SHAPES = {"embedding.weight": (7, 4), "layers.0.bias": (5,), "layers.0.weight": (6, 3, 2), "scale": ()}
ROLES = {"weight": torch.bfloat16, "master": torch.float32, "exp_avg": torch.float64}
STATE = {
    "train": {"step": 3, "tokens": 2**60 + 1, "lr": 0.1 + 0.2},
    "names": ["a", "ä\u2028"],
    "nested": {"x": [None, True]},
}
UNTOUCHED = -77.0
SHARDS = ("rank-00000.safetensors", "rank-00001.safetensors")


def control() -> Group:
    """The control group of one process."""
    return Group("control", (0,), 0)


def world(rank: int, world_size: int) -> Group:
    """The control group over the ranks of a harness case."""
    if world_size == 1:
        return control()
    return Group("control", tuple(range(world_size)), rank, torch.distributed.group.WORLD, "gloo")


def canonical(seed: int = 0) -> dict[tuple[str, str], Tensor]:
    """(role, name) -> the whole tensor; the values of one seed are the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (role, name): torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for role, dtype in ROLES.items()
        for name, shape in SHAPES.items()
    }


def rows(extent: int, rank: int, degree: int) -> tuple[int, int]:
    """Rows of rank `rank` of `degree`, as even as they go."""
    return rank * extent // degree, (rank + 1) * extent // degree


def entries(rank: int = 0, degree: int = 1, fill: dict[tuple[str, str], Tensor] | None = None) -> list[Entry]:
    """What a rank keeps: its rows of every tensor of a role one after the other in one storage, with gaps.

    Filled from canonical values, or with UNTOUCHED. The scalar lies on every rank; rank 0's counts.
    """
    made = []
    for role, dtype in ROLES.items():
        storage = torch.full((200,), UNTOUCHED, dtype=dtype)
        offset = 3
        for name, shape in SHAPES.items():
            box, replica = Box((), ()), rank
            if shape:
                lo, hi = rows(shape[0], rank, degree)
                box, replica = Box((lo, *(0,) * (len(shape) - 1)), (hi, *shape[1:])), 0
            if box.numel:
                piece = Piece(box, offset, contiguous_strides(box.shape), replica)
                made.append(Entry(ShardSpec(name, shape, (piece,), role), storage))
                if fill is not None:
                    view(made[-1]).copy_(fill[role, name][where(box)])
                offset += box.numel + 2
    return made


def where(box: Box) -> tuple[slice, ...]:
    """The box as an index."""
    return tuple(slice(lo, hi) for lo, hi in zip(box.start, box.stop, strict=True))


def view(entry: Entry) -> Tensor:
    """The elements of an entry of one piece, in their shape."""
    (piece,) = entry.spec.pieces
    return entry.tensor.as_strided(piece.box.shape, piece.strides, piece.offset)


def assert_holds(held: Sequence[Entry], values: dict[tuple[str, str], Tensor]) -> None:
    """Every entry has the canonical values, bit for bit, and nothing else in its storage was touched."""
    for tensor in {id(entry.tensor): entry.tensor for entry in held}.values():
        expected = torch.full_like(tensor, UNTOUCHED)
        for entry in held:
            if entry.tensor is tensor:
                whole = values[entry.spec.role, entry.spec.name]
                view(Entry(entry.spec, expected)).copy_(whole[where(entry.spec.pieces[0].box)])
        assert torch.equal(tensor, expected), held[0].spec.role


def assert_untouched(held: Sequence[Entry]) -> None:
    """Nothing was written into any entry."""
    assert all(bool((entry.tensor == UNTOUCHED).all()) for entry in held)


def listing(root: Path) -> list[str]:
    """Names under `root`, sorted."""
    return sorted(path.name for path in root.iterdir())


def state(step: int) -> dict[str, Any]:
    """The scalar state of a step."""
    return {**STATE, "train": {**STATE["train"], "step": step}}  # type: ignore[dict-item]


def whole(name: str, tensor: Tensor) -> Entry:
    """A 1-D master tensor of its own, all on this rank."""
    piece = Piece(Box((0,), (tensor.numel(),)), 0, (1,))
    return Entry(ShardSpec(name, (tensor.numel(),), (piece,), "master"), tensor)


def listed(directory: Path) -> list[ShardFile]:
    """What a manifest lists, not checked."""
    return [ShardFile(**file) for file in json.loads((directory / MANIFEST).read_text())["files"]]


def seal(directory: Path, files: Sequence[ShardFile], step: int = 3) -> None:
    """Write a manifest whose own hash is right, whatever it lists."""
    (directory / MANIFEST).write_text(Manifest(step, STATE, tuple(files)).to_json(), encoding="utf-8")


def write_two_shards(root: Path) -> Path:
    """The checkpoint of step 3 of two ranks, made in one process: each rank's file as that rank writes it."""
    directory = root / "step-00000003"
    directory.mkdir()
    files = []
    for rank, name in enumerate(SHARDS):
        alone = save(root / str(rank), 3, entries(rank, 2, canonical()), {}, control())
        (alone / SHARDS[0]).rename(directory / name)
        files.append(replace(listed(alone)[0], name=name))
    seal(directory, files)
    return directory
