"""The disk store leaves nothing behind, however its process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_disk import named_only, stored
from trilith.errors import OffloadError
from trilith.failpoints import VARIABLE
from trilith.zero.disk import disk_budget

CHILD = """
import sys, time, torch
from trilith.failpoints import Failpoints
from trilith.zero.disk import DiskStore
store = DiskStore(sys.argv[1], 3, threads=2, block_bytes=4096, queue_depth=4, checksum=True,
                  failpoints=Failpoints.from_environment(3))
tensor = torch.zeros(1 << 20)
store.reserve("unit", tensor.nbytes)
store.write("unit", tensor).wait()
print("written", flush=True)
time.sleep(60)
"""
NAMED = """
import errno, os
opened = os.open
def refuse(path, flags, mode=0o777):
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        raise OSError(errno.EOPNOTSUPP, "")
    return opened(path, flags, mode)
os.open = refuse
"""


@pytest.mark.parametrize("prelude", ["", NAMED], ids=["nameless", "unlinked"])
@pytest.mark.parametrize("failpoint", ["", "offload_write:3:100:kill"], ids=["idle", "writing"])
def test_a_kill_leaves_nothing(tmp_path: Path, prelude: str, failpoint: str) -> None:
    environment = {**os.environ, VARIABLE: failpoint, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", prelude + CHILD, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        if not failpoint:
            assert child.stdout.readline() == "written\n"
            child.kill()
        child.wait(timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert not list(tmp_path.iterdir())


def test_stale_files_of_dead_processes_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what has our name, is a file, and whose process is gone."""
    with subprocess.Popen(["true"]) as gone:
        pass
    stale = f"trilith-offload-rank00001-{gone.pid}-00c0ffee"
    kept = [f"trilith-offload-rank00001-{os.getpid()}-00c0ffee", "trilith-offload-rank00001", f"my-{stale}"]
    for name in (stale, *kept):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / stale.replace("c0ffee", "facade")).mkdir()
    named_only(monkeypatch)
    with stored(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*kept, stale.replace("c0ffee", "facade")}


def test_disk_budget(tmp_path: Path) -> None:
    assert 0 < disk_budget(tmp_path) < 1 << 60
    with pytest.raises(OffloadError, match=r"offload to .*absent: .*ENOENT.*Make the directory"):
        disk_budget(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(OffloadError, match="ENOTDIR"):
        disk_budget(tmp_path / "file")
