"""Checkpoints on one process: bitwise round trips, what does not fit, which ones stay, what cannot be saved."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint_cases import (
    SHARDS,
    assert_holds,
    assert_untouched,
    canonical,
    control,
    entries,
    listing,
    state,
    view,
    whole,
    write_two_shards,
)
from trilith.checkpoint import Entry, candidates, load, newest, read_manifest, save, step_directory
from trilith.checkpoint.manifest import MANIFEST, published_steps
from trilith.errors import CheckpointError
from trilith.failpoints import Failpoints

VALUES = canonical()


def write(root: Path, step: int = 3, keep_last: int = 2, seed: int = 0, held: list[Entry] | None = None) -> Path:
    """A checkpoint by one rank that holds everything."""
    held = entries(fill=canonical(seed)) if held is None else held
    return save(root, step, held, state(step), control(), keep_last=keep_last)


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks; not to be changed."""
    return write_two_shards(tmp_path_factory.mktemp("shards"))


# ---- what is saved comes back -------------------------------------------------------------------------------------


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    directory = write(tmp_path / "runs" / "checkpoints")
    assert directory == tmp_path / "runs" / "checkpoints" / "step-00000003"
    held = entries()
    manifest = load(directory, held)
    assert_holds(held, VALUES)
    assert manifest == read_manifest(directory)
    assert (manifest.step, manifest.state) == (3, state(3))
    assert listing(directory) == [MANIFEST, SHARDS[0]]
    assert newest(tmp_path / "runs" / "checkpoints") == directory


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_any_layout_reads_it(two_shards: Path, degree: int) -> None:
    for rank in range(degree):
        held = entries(rank, degree)
        load(two_shards, held)
        assert_holds(held, VALUES)


def test_special_values_and_integers(tmp_path: Path) -> None:
    """Negative zero, subnormal and extreme numbers keep their bits; integers are saved, too."""
    numbers = torch.tensor([-0.0, 1e-45, 3.4e38, -3.4e38, 1.0, 0.1])
    counts = torch.tensor([2**62, -1, 0], dtype=torch.int64)
    held = [whole("w", numbers), whole("n", counts)]
    directory = write(tmp_path, held=held)
    back = [whole("w", torch.zeros(6)), whole("n", torch.zeros(3, dtype=torch.int64))]
    load(directory, back)
    assert torch.equal(back[0].tensor.view(torch.int32), numbers.view(torch.int32))
    assert torch.equal(back[1].tensor, counts)


def test_entries_may_be_views_of_a_larger_storage(tmp_path: Path) -> None:
    """ZeRO's partitions are slices: offsets count from where the entry's tensor begins."""
    storage = torch.arange(12.0)
    directory = write(tmp_path, held=[whole("w", storage[4:9])])
    target = torch.zeros(12)
    load(directory, [whole("w", target[6:11])])
    assert target.tolist() == [0.0] * 6 + [4.0, 5.0, 6.0, 7.0, 8.0, 0.0]


def test_only_replica_0_is_written(tmp_path: Path) -> None:
    entry = whole("w", torch.ones(4))
    copy = replace(entry, spec=replace(entry.spec, pieces=(replace(entry.spec.pieces[0], replica=1),)))
    directory = write(tmp_path, held=[copy])
    assert listing(directory) == [MANIFEST]
    assert "holds no master of w" in refused_entries(directory, [entry])


def refused_entries(directory: Path, held: list[Entry]) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(directory, held)
    return str(caught.value)


def test_the_version_before_the_newest_is_the_newest_where_there_was_one(tmp_path: Path) -> None:
    """Rounded to what the reader keeps; but a checkpoint that has the role must have all of it."""
    numbers = torch.tensor([1 / 3, -2.0, 1e30, -0.0])
    before = [as_role(name, "previous", torch.zeros(4, dtype=torch.bfloat16)) for name in ("a", "b")]
    saved = [as_role("a", "master", numbers), as_role("b", "master", -numbers)]
    load(write(tmp_path / "one", held=saved), before)
    assert torch.equal(before[0].tensor, numbers.bfloat16()) and torch.equal(before[1].tensor, -numbers.bfloat16())
    torn = write(tmp_path / "torn", held=[*saved, before[0]])
    assert "holds no previous of b, only master. Use optimizer and data_types" in refused_entries(torn, before)


def as_role(name: str, role: str, tensor: torch.Tensor) -> Entry:
    entry = whole(name, tensor)
    return replace(entry, spec=entry.spec.with_role(role))


# ---- what does not fit is refused by name -------------------------------------------------------------------------


def other(**changes: Any) -> list[Entry]:
    """The usual entries, untouched, but the last one's spec or tensor changed."""
    held = entries()
    tensor = changes.pop("tensor", held[-2].tensor)
    held[-2] = Entry(replace(held[-2].spec, **changes), tensor)
    return held


def test_what_this_run_lacks_or_keeps_otherwise(two_shards: Path) -> None:
    for held, *named in (
        (other(role="exp_avg_sq"), "holds no exp_avg_sq of layers.0.weight, only exp_avg"),
        (other(name="layers.9.weight"), "holds no exp_avg of layers.9.weight, nor anything else of it. Use the model"),
        (other(shape=(6, 3, 4)), "layers.0.weight has shape [6, 3, 2]", "[6, 3, 4] in this run", "model section"),
        (other(tensor=torch.full((200,), -77.0)), "exp_avg of layers.0.weight is torch.float64", "torch.float32"),
    ):
        message = refused_entries(two_shards, held)
        assert all(text in message for text in named), message
        assert_untouched(held)


# ---- which one is the newest, and which ones stay -----------------------------------------------------------------


def test_newest_passes_over_what_is_damaged(tmp_path: Path) -> None:
    for step in (5, 10, 123456789):
        write(tmp_path, step, keep_last=9)
    (tmp_path / "step-00000200").mkdir()
    (tmp_path / "step-x").mkdir()
    (tmp_path / "notes.txt").write_text("step-00000999")
    assert published_steps(tmp_path) == [5, 10, 123456789]
    assert newest(tmp_path) == step_directory(tmp_path, 123456789)
    (step_directory(tmp_path, 123456789) / SHARDS[0]).write_bytes(b"")
    told: list[str] = []
    assert candidates(tmp_path, told.append) == [step_directory(tmp_path, 10), step_directory(tmp_path, 5)]
    assert len(told) == 1 and "passed over" in told[0] and "step-123456789" in told[0] and "0 bytes" in told[0]
    for step in (5, 10):
        (step_directory(tmp_path, step) / MANIFEST).unlink()
    assert newest(tmp_path) is None
    assert newest(tmp_path / "nowhere") is None and published_steps(tmp_path / "nowhere") == []


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_newest_few_stay(tmp_path: Path, keep_last: int) -> None:
    for step in range(1, 6):
        write(tmp_path, step, keep_last)
        assert published_steps(tmp_path) == list(range(max(1, step - keep_last + 1), step + 1))
    for step in published_steps(tmp_path):
        load(step_directory(tmp_path, step), entries())


def test_damaged_checkpoints_take_no_place(tmp_path: Path) -> None:
    """A run that fell back from a damaged step 9 to step 2 keeps two good ones, and reaches step 9 again."""
    for step in (1, 2, 9):
        write(tmp_path, step, keep_last=3)
    (step_directory(tmp_path, 9) / SHARDS[0]).write_bytes(b"cut")
    write(tmp_path, 3, keep_last=1)
    assert newest(tmp_path) == step_directory(tmp_path, 3)
    write(tmp_path, 4, keep_last=2)
    assert published_steps(tmp_path) == [3, 4, 9]
    write(tmp_path, 9, keep_last=2)
    held = entries()
    load(step_directory(tmp_path, 9), held)
    assert_holds(held, VALUES)
    assert published_steps(tmp_path) == [4, 9]


def test_drafts_of_earlier_attempts_go_and_are_never_mixed_in(tmp_path: Path) -> None:
    stale = tmp_path / "step-00000003.tmp-1"
    stale.mkdir()
    (stale / "rank-00007.safetensors").write_bytes(b"stale")
    directory = write(tmp_path)
    assert listing(tmp_path) == [directory.name]
    assert listing(directory) == [MANIFEST, SHARDS[0]]


def test_the_same_step_again(tmp_path: Path) -> None:
    """The same bits: what is published stays. Other bits: another run's, refused, and nothing is lost."""
    first = write(tmp_path)
    inode = (first / MANIFEST).stat().st_ino
    assert write(tmp_path) == first
    assert (first / MANIFEST).stat().st_ino == inode and listing(tmp_path) == [first.name]
    with pytest.raises(CheckpointError, match="another run's checkpoint"):
        write(tmp_path, seed=1)
    assert listing(tmp_path) == [first.name]
    held = entries()
    load(first, held)
    assert_holds(held, VALUES)


# ---- what cannot be saved -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_states_that_are_not_finite_are_not_published(tmp_path: Path, value: float) -> None:
    good = write(tmp_path, 2)
    held = entries(fill=VALUES)
    view(held[6]).view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=re.escape("master of layers.0.weight: holds NaN or infinity")):
        write(tmp_path, 3, held=held)
    assert newest(tmp_path) == good and listing(tmp_path) == [good.name]


def test_padding_that_is_not_finite_does_not_matter(tmp_path: Path) -> None:
    """What no piece holds is not saved, so it is not looked at."""
    held = entries(fill=VALUES)
    held[0].tensor[0] = float("nan")
    load(write(tmp_path, held=held), entries())


@pytest.mark.parametrize("wrong", [{"loss": float("nan")}, {"x": object()}])
def test_states_that_json_cannot_say(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="step 3 could not be written"):
        save(tmp_path, 3, entries(fill=VALUES), wrong, control())
    assert listing(tmp_path) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"could not be written.*rank 0: NotADirectoryError"):
        write(tmp_path / "file" / "checkpoints")


@pytest.mark.parametrize("name", ["checkpoint_write", "checkpoint_publish"])
def test_an_error_at_a_failpoint_leaves_nothing(tmp_path: Path, name: str) -> None:
    write(tmp_path, 2)
    points = Failpoints.from_environment(0, {"TRILITH_FAILPOINT": f"{name}:0:1:raise"})
    with pytest.raises(CheckpointError, match=f"InjectedFault: failpoint {name}"):
        save(tmp_path, 3, entries(fill=VALUES), state(3), control(), failpoints=points)
    assert listing(tmp_path) == ["step-00000002"]


def test_everything_is_durable_before_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut could lose: files and the draft directory are fsynced before the rename, the parent after it."""
    events: list[tuple[str, frozenset[int]]] = []
    fsync, rename = os.fsync, Path.rename

    def watched_fsync(handle: int) -> None:
        fsync(handle)
        events.append(("fsync", frozenset((os.fstat(handle).st_ino,))))

    def watched_rename(path: Path, target: Path) -> Path:
        inodes = {entry.stat().st_ino for entry in (path, *path.iterdir())}
        events.append(("rename", frozenset(inodes)))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    write(tmp_path)
    (at,) = (i for i, (kind, _) in enumerate(events) if kind == "rename")
    durable = frozenset().union(*(inodes for _, inodes in events[:at]))
    assert len(events[at][1]) == 3 and events[at][1] <= durable
    assert events[at + 1 :] == [("fsync", frozenset((tmp_path.stat().st_ino,)))]
