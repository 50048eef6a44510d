"""Checkpoints of several ranks: whole or not at all, whoever dies, wherever the disk ends."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint_cases import (
    assert_holds,
    assert_untouched,
    canonical,
    entries,
    listing,
    state,
    view,
    world,
)
from tests.harness import run_ranks
from trilith.checkpoint import load, newest, read_manifest, save, step_directory
from trilith.checkpoint.manifest import published_steps
from trilith.errors import CheckpointError
from trilith.failpoints import Failpoints

FILE_EVENTS = frozenset(
    ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir", "shutil.rmtree")
)


def save_step(rank: int, world_size: int, root: Path, step: int, keep_last: int = 2) -> Path:
    """The checkpoint of `step`, whose values have the step as seed; dies where TRILITH_FAILPOINT says."""
    return save(
        root,
        step,
        entries(rank, world_size, canonical(step)),
        state(step),
        world(rank, world_size),
        keep_last=keep_last,
        failpoints=Failpoints.from_environment(rank),
    )


def save_and_reload(rank: int, world_size: int, root: Path) -> list[str]:
    """Save three steps, load the last into this rank's own layout."""
    for step in (1, 2, 3):
        directory = save_step(rank, world_size, root, step)
    held = entries(rank, world_size)
    load(directory, held)
    assert_holds(held, canonical(3))
    return listing(root)


def assert_intact(root: Path, step: int) -> None:
    """The newest checkpoint is that of `step`, and it loads bit for bit."""
    directory = newest(root)
    assert directory == step_directory(root, step)
    held = entries()
    assert load(directory, held).state == state(step)
    assert_holds(held, canonical(step))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_save_and_any_layout_loads(world_size: int, tmp_path: Path) -> None:
    names = run_ranks(world_size, save_and_reload, tmp_path)
    assert names[0] == ["step-00000002", "step-00000003"]
    assert len(read_manifest(step_directory(tmp_path, 3)).files) == world_size
    for degree in (1, 2, 3):
        for rank in range(degree):
            held = entries(rank, degree)
            load(step_directory(tmp_path, 3), held)
            assert_holds(held, canonical(3))


@pytest.mark.parametrize(
    "point", ["checkpoint_write:0", "checkpoint_write:1", "checkpoint_write:2", "checkpoint_publish:0"]
)
@pytest.mark.parametrize("action", ["kill", "exit"])
def test_a_rank_that_dies(point: str, action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The earlier checkpoint stays the newest; the next attempt publishes and cleans up."""
    run_ranks(3, save_step, tmp_path, 2)
    monkeypatch.setenv("TRILITH_FAILPOINT", f"{point}:1:{action}")
    rank = point[-1]
    with pytest.raises(AssertionError, match=f"rank {rank}.*(SIGKILL|exit code 1)"):
        run_ranks(3, save_step, tmp_path, 3, timeout_s=20)
    assert_intact(tmp_path, 2)
    assert not step_directory(tmp_path, 3).exists()
    monkeypatch.delenv("TRILITH_FAILPOINT")
    run_ranks(3, save_step, tmp_path, 3)
    assert_intact(tmp_path, 3)
    assert listing(tmp_path) == ["step-00000002", "step-00000003"]


def die_at(nth: int, root: Path) -> int:
    """Save step 3 in a child that ends at its `nth` file operation; its exit code: 9, or 0 if it came through."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = itertools.count(1)

    def hook(event: str, _: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and next(seen) == nth:
            os._exit(9)

    sys.addaudithook(hook)
    try:
        save_step(0, 1, root, 3)
        os._exit(0)
    finally:
        os._exit(1)


def die_everywhere(rank: int, world_size: int, root: Path) -> list[int]:
    """Kill a save at each of its file operations in turn; the newest step after each kill."""
    base = root / "base"
    for step in (1, 2):
        save_step(0, 1, base, step)
    newest_steps = []
    for nth in itertools.count(1):
        copy = root / "copy"
        shutil.copytree(base, copy)
        code = die_at(nth, copy)
        assert code in (0, 9), code
        found = newest(copy)
        assert found is not None
        newest_steps.append(read_manifest(found).step)
        assert_intact(copy, newest_steps[-1])
        load(step_directory(copy, 2), entries())
        if code == 0:
            return newest_steps
        save_step(0, 1, copy, 3)
        assert_intact(copy, 3)
        assert published_steps(copy) == [2, 3] and len(listing(copy)) == 2, listing(copy)
        shutil.rmtree(copy)
    raise AssertionError("unreachable")


def test_killed_at_every_file_operation(tmp_path: Path) -> None:
    """Step 2 stays loadable throughout; step 3 is there whole or not at all, and stays once it is there."""
    (steps,) = run_ranks(1, die_everywhere, tmp_path, timeout_s=120)
    assert len(steps) >= 20, "the kills were counted"
    assert steps == sorted(steps) and set(steps) == {2, 3}


def fill_the_disk(rank: int, world_size: int, root: Path, bad: int, limits: list[int]) -> list[str]:
    """For each limit, save step 3 with files of rank `bad` limited to so many bytes; what was raised."""
    raised = []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in limits:
        if rank == bad:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            save_step(rank, world_size, root, 3)
        except CheckpointError as error:
            raised.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if rank == 0:
            assert listing(root) == ["step-00000002"], (limit, listing(root))
    return raised


@pytest.mark.parametrize("bad", [0, 1])
def test_a_full_disk(bad: int, tmp_path: Path) -> None:
    """A limit on the size of files, from nothing to one byte too few: every rank reports the rank that met it."""
    run_ranks(2, save_step, tmp_path, 2)
    size = read_manifest(step_directory(tmp_path, 2)).files[bad].num_bytes
    limits = [0, 1, 7, 8, 100, size // 2, size - 1]
    for errors in run_ranks(2, fill_the_disk, tmp_path, bad, limits):
        assert len(errors) == len(limits)
        assert all(f"rank {bad}: " in error and "step 3 could not be written" in error for error in errors), errors
        assert all("earlier ones are untouched" in error for error in errors)
    assert_intact(tmp_path, 2)
    run_ranks(2, save_step, tmp_path, 3)
    assert_intact(tmp_path, 3)


def fill_the_disk_at_the_manifest(rank: int, world_size: int, root: Path) -> str:
    """Shards fit, the manifest does not."""
    held = entries(rank, world_size, canonical(3))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        save(root, 3, held, {"long": "x" * 30_000}, world(rank, world_size))
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "published"


def test_a_disk_that_is_full_at_the_manifest(tmp_path: Path) -> None:
    run_ranks(2, save_step, tmp_path, 2)
    for error in run_ranks(2, fill_the_disk_at_the_manifest, tmp_path):
        assert "rank 0: OSError" in error and "File too large" in error
    assert listing(tmp_path) == ["step-00000002"]
    assert_intact(tmp_path, 2)


def one_bad_rank(rank: int, world_size: int, root: Path) -> str:
    """A moment of the last rank is not finite."""
    held = entries(rank, world_size, canonical(3))
    if rank == world_size - 1:
        view(held[-2]).view(-1)[0] = float("inf")
    with pytest.raises(CheckpointError) as caught:
        save(root, 3, held, state(3), world(rank, world_size))
    return str(caught.value)


def test_a_state_that_is_not_finite_on_one_rank(tmp_path: Path) -> None:
    errors = run_ranks(3, one_bad_rank, tmp_path)
    assert len(set(errors)) == 1
    assert "rank 2: exp_avg of layers.0.weight: holds NaN or infinity" in errors[0]
    assert listing(tmp_path) == [] and newest(tmp_path) is None


def two_read_a_damaged_file(rank: int, world_size: int, root: Path) -> str:
    """Each rank looks at the files that it needs."""
    held = entries(rank, world_size)
    try:
        load(step_directory(root, 3), held)
    except CheckpointError as error:
        assert_untouched(held)
        return str(error)
    assert_holds(held, canonical(3))
    return ""


def test_ranks_check_what_they_read(tmp_path: Path) -> None:
    """Damage in the file of rank 1 is found by rank 1, which needs it, and named; no rank loads a wrong value."""
    run_ranks(2, save_step, tmp_path, 3)
    path = step_directory(tmp_path, 3) / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)
    first, second = run_ranks(2, two_read_a_damaged_file, tmp_path)
    assert first == "" and f"{path}: its bytes differ" in second
