"""The harness itself: results, the first failure, timeouts, nothing left behind."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.harness import assert_close_named, run_ranks


def rank_sum(rank: int, world_size: int, offset: float) -> torch.Tensor:
    """All-reduce of rank + offset."""
    tensor = torch.full((4,), rank + offset)
    if world_size > 1:
        dist.all_reduce(tensor)
    return tensor


def one_fails(rank: int, world_size: int, bad: int) -> None:
    """Rank `bad` raises while the others wait for it."""
    if rank == bad:
        time.sleep(0.1)
        raise ValueError(f"rank {rank} is broken on purpose")
    dist.barrier()


def one_dies(rank: int, world_size: int) -> None:
    """Rank 1 is killed while the others wait for it."""
    if rank == 1:
        os.kill(os.getpid(), 9)
    dist.barrier()


def hangs(rank: int, world_size: int) -> int:
    """Rank 1 never comes back."""
    if rank == 1:
        time.sleep(600)
    return os.getpid()


def environment(rank: int, world_size: int) -> tuple[int, str | None, str, bool]:
    """Threads, a variable of the test process, the working directory, whether a process group exists."""
    return torch.get_num_threads(), os.environ.get("HARNESS_PROBE"), os.getcwd(), dist.is_initialized()


def test_results_in_rank_order() -> None:
    for world_size in (1, 2, 3):
        expected = torch.full((4,), sum(rank + 0.5 for rank in range(world_size)))
        for result in run_ranks(world_size, rank_sum, 0.5):
            assert torch.equal(result, expected)


def test_eight_ranks_start_fast() -> None:
    run_ranks(1, rank_sum, 0.0)  # the preload, once per session
    start = time.monotonic()
    results = run_ranks(8, rank_sum, 0.0)
    assert time.monotonic() - start < 5  # 0.2 s on an idle machine
    assert all(torch.equal(result, torch.full((4,), 28.0)) for result in results)


@pytest.mark.parametrize("bad", [0, 2])
def test_first_failure_is_named(bad: int) -> None:
    with pytest.raises(AssertionError, match=rf"rank {bad} of 3 failed first[\s\S]*broken on purpose"):
        run_ranks(3, one_fails, bad)


def test_dead_rank_is_named() -> None:
    with pytest.raises(AssertionError, match="rank 1 died: signal SIGKILL"):
        run_ranks(3, one_dies)


def test_timeout_shows_where_a_rank_stands() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"ranks \[1\] of 2 still ran after 1 s[\s\S]*in hangs"):
        run_ranks(2, hangs, timeout_s=1)
    assert time.monotonic() - start < 10


def server_threads(rank: int, world_size: int) -> int:
    """Threads of the fork server, this rank's parent."""
    return len(os.listdir(f"/proc/{os.getppid()}/task"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux")
def test_the_fork_server_has_one_thread() -> None:
    assert run_ranks(1, server_threads) == [1]  # a fork beside other threads may hang in the child


def victims_only(rank: int, world_size: int) -> None:
    """Rank 0 gives rank 1 up, which hangs."""
    if rank == 0:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1")
    time.sleep(600)


def test_a_hanging_rank_is_named_before_its_victims() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[1\] of 2 still ran after 3 s after[\s\S]*in victims_only"):
        run_ranks(2, victims_only)


def test_ranks_see_the_test_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_PROBE", "seen")
    assert run_ranks(2, environment) == [(1, "seen", os.getcwd(), True)] * 2
    assert run_ranks(1, environment) == [(1, "seen", os.getcwd(), False)]


def test_assert_close_named_names_the_first() -> None:
    good = torch.arange(6.0).reshape(2, 3)
    bad = good.clone()
    bad[1, 2] = 7.0
    assert_close_named({"a": (good, good.clone()), "b": (good, good + 1e-14)})
    with pytest.raises(AssertionError, match=r"^b: 1 of 6 elements differ; the largest at \(1, 2\): 7.0"):
        assert_close_named({"a": (good, good), "b": (bad, good), "c": (bad, good)})
    with pytest.raises(AssertionError, match=r"^a: .*\(2, 3\), expected .*\(3, 2\)"):
        assert_close_named({"a": (good, good.reshape(3, 2))})
    with pytest.raises(AssertionError, match=r"^a: 1 of 6 .* nan"):
        assert_close_named({"a": (bad.masked_fill(bad == 7, torch.nan), good)})
