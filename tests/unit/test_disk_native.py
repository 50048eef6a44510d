"""The disk store in the threads of csrc/io: what only they do. All else is tested with both kinds in test_disk.py."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.test_disk import BLOCK, RANK, numbers, stored
from trilith.kernels import library

pytestmark = pytest.mark.skipif(library.LIBRARY is None, reason=library.MISSING)


def native_threads() -> int:
    names = [task / "comm" for task in Path("/proc/self/task").iterdir()]
    return sum(name.read_text() == f"offload-rank{RANK}\n" for name in names)


def test_native_threads(tmp_path: Path) -> None:
    """One for each block that may be under way; they sleep, and end with the store."""
    descriptors = len(os.listdir("/proc/self/fd"))
    with stored(tmp_path, threads=2, queue_depth=5) as store:
        store.reserve("a", 10 * BLOCK)
        store.write("a", numbers(10 * BLOCK)).wait()
        assert native_threads() == 5
        began = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - began < 0.1
    assert native_threads() == 0
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.fixture
def heard_interrupt() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also in a process that was started in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_interrupt")
def test_ctrl_c_is_heard_while_a_transfer_is_waited_for(tmp_path: Path) -> None:
    tensor = numbers(BLOCK)
    with stored(tmp_path, f"offload_write:{RANK}:1:sleep=3") as store:
        store.reserve("slow", BLOCK)
        ticket = store.write("slow", tensor)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            ticket.wait()
        assert time.monotonic() - began < 1.5 and not ticket.is_done
