"""Who is blamed: lost peers are recognised, and the earliest failure that is not a consequence is the cause."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trilith_launcher.cause import Ended, choose_cause
from trilith_launcher.context import RankContext
from trilith_launcher.elastic import JoinedRank, elastic_error, join_from_environment
from trilith_launcher.failure import ErrorRecord, describe_exception, exit_code_of, is_lost_peer, read_record
from trilith_launcher.position import Position, PositionBoard

CLOSED = "[pair.cc:553] Connection closed by peer [127.0.0.1]:19622"
TIMED_OUT = "[unbound_buffer.cc:81] Timed out waiting 1000ms for recv operation to complete"
S = 1_000_000_000  # a second in nanoseconds


class DistStoreError(RuntimeError):
    """Named as torch's."""


def chained(first: Exception, then: Exception, explicit: bool = True) -> Exception:
    try:
        try:
            raise first
        except Exception as error:
            if explicit:
                raise then from error
            raise then  # noqa: B904 - an error met while handling the first
    except Exception as error:
        return error


@pytest.mark.parametrize(
    ("exception", "lost"),
    [
        (RuntimeError(CLOSED), True),
        (RuntimeError(TIMED_OUT), True),
        (RuntimeError("[Rank 0]: Rank 3 failed to pass monitoredBarrier in 5000 ms"), True),
        (DistStoreError("anything"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionResetError("Connection reset by peer"), False),
        (ValueError(CLOSED), False),
        (chained(RuntimeError(CLOSED), KeyError("send of stage 3")), True),
        (chained(ValueError("mine"), RuntimeError(CLOSED), explicit=False), False),
    ],
)
def test_lost_peers_are_recognised(exception: Exception, lost: bool) -> None:
    assert is_lost_peer(exception) is lost


@pytest.mark.parametrize(
    ("exception", "code"),
    [(ValueError(), 1), (SystemExit(), 0), (SystemExit(3), 3), (SystemExit("text"), 1), (SystemExit(-1), 255)],
)
def test_exit_codes(exception: BaseException, code: int) -> None:
    assert exit_code_of(exception) == code


def test_position_and_record_reach_the_launcher(tmp_path: Path) -> None:
    board = PositionBoard.create(tmp_path / "positions", 2)
    assert board.read_all() == (Position(), Position())
    context = RankContext(1, PositionBoard(tmp_path / "positions", 2), tmp_path / "error")
    assert read_record(tmp_path / "error") is None
    context.position(step=12, stage=1)
    context.position(phase="überlang" * 20)
    assert board.read(0) == Position()
    assert (board.read(1).step, board.read(1).stage, board.read(1).phase[:8]) == (12, 1, "überlang")
    context.position(phase="reduce")
    assert str(board.read(1)) == "stage 1, step 12, reduce"
    first = context.record_failure(ValueError("one"))
    context.record_failure(RuntimeError("two"))
    assert read_record(tmp_path / "error") == first and first.message == "one"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("error")] == ["error"]


def told(rank: int, exception: BaseException, when: float) -> ErrorRecord:
    record = describe_exception(exception, rank, Position(step=2))
    return ErrorRecord(**{**record.__dict__, "monotonic_ns": int(when * S)})


def ended(rank: int, returncode: int, when: float, signalled: float | None = None) -> Ended:
    return Ended(rank, returncode, int(when * S), None if signalled is None else int(signalled * S))


@pytest.mark.parametrize(
    ("ends", "records", "rank", "what", "code"),
    [
        pytest.param(
            [ended(0, 1, 1.1), ended(1, 1, 1.4)],
            [told(0, RuntimeError(CLOSED), 1.0), told(1, ValueError("mine"), 1.3)],
            *(1, "ValueError: mine", 1),
            id="an error of its own before an earlier lost peer",
        ),
        pytest.param(
            [ended(0, 1, 1.1), ended(1, 1, 1.4)],
            [told(0, KeyError("later"), 1.05), told(1, ValueError("sooner"), 1.0)],
            *(1, "ValueError: sooner", 1),
            id="the earliest error, not the first to end",
        ),
        pytest.param(
            [ended(0, 1, 1.0), ended(1, -9, 1.02)],
            [told(0, RuntimeError("an unknown complaint about rank 1"), 1.0)],
            *(1, "killed by SIGKILL (signal 9; often the out-of-memory killer)", 137),
            id="a kill that was noticed a little late",
        ),
        pytest.param(
            [ended(0, 1, 1.0), ended(1, -9, 3.0)],
            [told(0, ValueError("mine"), 1.0)],
            *(0, "ValueError: mine", 1),
            id="an error long before a kill",
        ),
        pytest.param(
            [ended(0, -signal.SIGABRT, 1.0), ended(1, 1, 1.4)],
            [told(1, ValueError("mine"), 1.3)],
            *(1, "ValueError: mine", 1),
            id="a watchdog's abort is a consequence",
        ),
        pytest.param(
            [ended(0, -signal.SIGABRT, 1.2), ended(1, 1, 1.1)],
            [told(1, RuntimeError(CLOSED), 1.0)],
            *(0, "killed by SIGABRT (signal 6)", 134),
            id="an abort among lost peers is the cause",
        ),
        pytest.param(
            [ended(0, 1, 1.0), ended(1, -15, 1.6, 1.5), ended(2, -9, 2.1, 1.5)],
            [told(0, RuntimeError(CLOSED), 0.9)],
            *(2, "did not answer, and ended only by SIGKILL: it was stopped, or stuck in the kernel", 1),
            id="signals of the launcher are no cause, a stopped rank is",
        ),
        pytest.param(
            [ended(0, 1, 1.0), ended(1, -15, 1.6, 1.5), ended(2, 1, 1.1)],
            [told(0, RuntimeError(TIMED_OUT), 0.9), told(2, RuntimeError(CLOSED), 0.9)],
            *(1, "did not answer its peers in time", 1),
            id="the rank that the others waited for",
        ),
        pytest.param(
            [ended(0, 1, 1.3), ended(1, 1, 1.2)],
            [told(0, RuntimeError(CLOSED), 1.1), told(1, RuntimeError(CLOSED), 1.0)],
            *(1, f"RuntimeError: {CLOSED}", 1),
            id="only lost peers: the earliest",
        ),
        pytest.param(
            [ended(0, 1, 1.0), ended(1, 3, 1.6, 1.5)],
            [told(0, SystemExit(7), 0.9), told(1, ValueError("torn down"), 1.55)],
            *(0, "sys.exit(7)", 7),
            id="what follows the launcher's signals is no cause",
        ),
    ],
)
def test_cause(ends: list[Ended], records: list[ErrorRecord], rank: int, what: str, code: int) -> None:
    positions = [Position(step=5)] * len(ends)
    cause = choose_cause(ends, {record.rank: record for record in records}, positions, {})
    assert cause is not None
    assert (cause.rank, cause.what, cause.exit_code) == (rank, what, code)


def test_no_cause_where_all_is_well() -> None:
    assert choose_cause([ended(0, 0, 1.0), ended(1, 0, 2.0)], {}, [Position()] * 2, {}) is None


def test_joining_from_the_environment() -> None:
    assert join_from_environment({}) is None
    joined = join_from_environment({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    assert joined == JoinedRank(3, 4, 1, None)
    for environment in ({"RANK": "0"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}):
        with pytest.raises(ValueError, match="RANK"):
            join_from_environment(environment)


def run_joined_apart(joined: str, kind: str) -> subprocess.CompletedProcess[str]:
    """A process that joins as `joined` and fails as `kind` says."""
    code = f"""
from pathlib import Path
from trilith_launcher import JoinedRank, run_joined
print("code", run_joined({joined}, "tests.faults.plain_targets:fail", {{"kinds": {{"2": {kind!r}}}}}))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=20)


def test_a_joined_rank_fails_in_elastics_format(tmp_path: Path) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    path = tmp_path / "error.json"
    run = run_joined_apart(f"JoinedRank(2, 4, 0, Path({str(path)!r}))", "user error")
    assert (run.returncode, run.stdout, run.stderr) == (1, "", "")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(path))
    told = ChildFailedError("trilith", {2: failure}).format_msg()
    assert "rank 2 (stage 2, step 3, reduce): DataError: data.paths = ['missing']: no such file" in told
    assert "Traceback" not in told, "an error of the user's"


def test_a_lost_peer_is_dated_after_the_rank_it_lost() -> None:
    """torch elastic blames the smallest time stamp, in whole seconds."""
    victim = describe_exception(RuntimeError(CLOSED), 0, Position())
    cause = describe_exception(ValueError("mine"), 1, Position())
    stamps = [int(elastic_error(record)["message"]["extraInfo"]["timestamp"]) for record in (victim, cause)]
    assert stamps[0] > stamps[1]


def test_a_joined_rank_without_an_error_file() -> None:
    run = run_joined_apart("JoinedRank(2, 4, 0, None)", "exit with text")
    assert run.returncode == 1
    assert run.stderr.startswith("rank 2 (stage 2, step 3, reduce): SystemExit: no more work")
    assert run_joined_apart("JoinedRank(2, 4, 0, None)", "end").stdout == "code 0\n"
