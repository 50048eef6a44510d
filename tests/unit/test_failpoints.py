"""Failpoints act on the pass, rank and name they are armed for, and nonsense is refused by name."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from trilith.errors import ConfigError
from trilith.failpoints import REGISTERED, VARIABLE, Failpoints, InjectedFault, parse


def armed(text: str, rank: int = 0) -> Failpoints:
    return Failpoints.from_environment(rank, {VARIABLE: text})


def test_raises_on_its_pass_only() -> None:
    points = armed("forward:0:3:raise")
    points.hit("forward")
    points.hit("evaluate")
    points.hit("forward")
    with pytest.raises(InjectedFault, match="failpoint forward, pass 3"):
        points.hit("forward")
    points.hit("forward")


def test_ranks_and_several_points() -> None:
    text = "forward:1:1:raise, build:*:2:raise,build:*:1:sleep=0.05"
    other = armed(text, rank=0)
    other.hit("forward")
    began = time.monotonic()
    other.hit("build")
    assert time.monotonic() - began >= 0.05
    with pytest.raises(InjectedFault):
        other.hit("build")
    with pytest.raises(InjectedFault):
        armed(text, rank=1).hit("forward")


def test_unarmed_is_cheap_and_needs_a_registered_name() -> None:
    points = Failpoints.from_environment(0, {})
    for name in REGISTERED:
        points.hit(name)
    began = time.perf_counter()
    for _ in range(10_000):
        points.hit("forward")
    assert time.perf_counter() - began < 0.1
    with pytest.raises(AssertionError):
        points.hit("foreward")


def test_a_full_disk() -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        armed("checkpoint_write:0:1:full").hit("checkpoint_write")
    assert caught.value.errno == errno.ENOSPC


def process_that_hits(action: str) -> subprocess.Popen[bytes]:
    code = "from trilith.failpoints import Failpoints; Failpoints.from_environment(0).hit('build'); print('on')"
    environment = {VARIABLE: f"build:0:1:{action}", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)


@pytest.mark.parametrize(("action", "returncode"), [("kill", -signal.SIGKILL), ("exit", 1)])
def test_actions_that_end_a_process(action: str, returncode: int) -> None:
    with process_that_hits(action) as process:
        assert process.communicate(timeout=10)[0] == b""
        assert process.returncode == returncode


def test_a_stopped_process_goes_on_when_told() -> None:
    with process_that_hits("stop") as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=10)[0] == b"on\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("forward:0:1", "3 fields"),
        ("foreward:0:1:raise", "no failpoint is named 'foreward'"),
        ("forward:-1:1:raise", "rank '-1'"),
        ("forward:0:0:raise", "pass '0'"),
        ("forward:0:1:explode", "unknown action 'explode'"),
        ("forward:0:1:sleep", "unknown action 'sleep'"),
        ("forward:0:1:kill=3", "unknown action 'kill=3'"),
        ("forward:0:1:sleep=nan", "cannot sleep"),
        ("forward:0:1:sleep=x", "could not convert"),
    ],
)
def test_nonsense_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse(f"forward:0:1:kill,{text},{text}")
    assert len(caught.value.violations) == 2 and VARIABLE in str(caught.value)
