"""The disk store's transfers: the threads of csrc/io beside Python's own, on the disk that holds the temporary directory.

256 MB in 8 tensors, blocks and depth as the config's defaults, with and without checksums; once with the main thread
asleep, as while a CPU waits for a GPU, once with it running Python, which holds the interpreter's lock. Direct io passes
the page cache, so each round moves all bytes to or from the device (a virtual disk may cache on its host). The limit: eight
plain threads that move the same blocks from and to aligned memory, without copies.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Benchmark
from trilith.failpoints import Failpoints
from trilith.kernels.library import LIBRARY, MISSING
from trilith.zero.disk import DiskStore
from trilith.zero.disk_threads import ThreadTransfers

NUM_BYTES, NUM_TENSORS, BLOCK, DEPTH = 256 << 20, 8, 1 << 20, 8
THREADS = (1, 2)
BUSY_ROUNDS = 5  # Python's threads take seconds there


@contextmanager
def opened(directory: Path, in_python: bool, threads: int, checksum: bool) -> Iterator[DiskStore]:
    """A store whose slots are reserved."""
    store = DiskStore(directory, 0, threads=threads, block_bytes=BLOCK, queue_depth=DEPTH, checksum=checksum)
    if in_python:
        store._transfers.close()
        store._transfers = ThreadTransfers(store._file, threads, DEPTH, BLOCK, "python-threads", Failpoints())
    for index in range(NUM_TENSORS):
        store.reserve(str(index), NUM_BYTES // NUM_TENSORS)
    try:
        yield store
    finally:
        store.close()


def written(store: DiskStore, tensors: list[Tensor], busy: bool) -> None:
    """Write all and wait."""
    finish([store.write(str(index), tensor) for index, tensor in enumerate(tensors)], busy)


def read(store: DiskStore, tensors: list[Tensor], busy: bool) -> None:
    """Read all and wait."""
    finish([store.read(str(index), tensor) for index, tensor in enumerate(tensors)], busy)


def finish(tickets: list, busy: bool) -> None:
    """Wait for the tickets; with `busy` by running Python meanwhile."""
    while busy and not all(ticket.is_done for ticket in tickets):
        sum(range(20000))
    for ticket in tickets:
        ticket.wait()


def plain(directory: Path) -> tuple[float, float]:
    """Seconds to write and to read the same bytes with nothing in between, the best of three."""
    with tempfile.TemporaryFile(dir=directory) as file, mmap.mmap(-1, NUM_BYTES) as memory:
        os.posix_fallocate(file.fileno(), 0, NUM_BYTES)
        descriptor = file.fileno()
        with suppress(OSError):
            descriptor = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR | os.O_DIRECT)
        best = []
        for call in (os.pwritev, os.preadv):
            best.append(min(_plain_round(call, descriptor, memory) for _ in range(3)))
        if descriptor != file.fileno():
            os.close(descriptor)
        return best[0], best[1]


def _plain_round(call: Callable[..., int], descriptor: int, memory: mmap.mmap) -> float:
    def move(first: int) -> None:
        with memoryview(memory) as view:
            for start in range(first * BLOCK, NUM_BYTES, DEPTH * BLOCK):
                assert call(descriptor, [view[start : start + BLOCK]], start) == BLOCK

    threads = [threading.Thread(target=move, args=(index,)) for index in range(DEPTH)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def cases(benchmark: Benchmark, rounds: int) -> None:
    """Writes and reads by both kinds of threads."""
    if LIBRARY is None:
        benchmark.missing("io", "Python's threads", MISSING)
        return
    source = [torch.randint(0, 256, (NUM_BYTES // NUM_TENSORS,), dtype=torch.uint8) for _ in range(NUM_TENSORS)]
    target = [torch.zeros_like(tensor) for tensor in source]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        limits = plain(directory)
        for threads in THREADS:
            for checksum in (False, True):
                with (
                    opened(directory, False, threads, checksum) as ours,
                    opened(directory, True, threads, checksum) as theirs,
                ):
                    for store in (ours, theirs):
                        written(store, source, False)
                        read(store, target, False)
                        assert all(torch.equal(a, b) for a, b in zip(source, target, strict=True))
                    for busy in (False, True):
                        for index, (verb, move, tensors) in enumerate(
                            (("write", written, source), ("read", read, target))
                        ):
                            benchmark.compare(
                                f"io {verb} 256 MB, {threads} threads{', checksum' if checksum else ''}"
                                f"{', Python busy' if busy else ''}",
                                lambda move=move, tensors=tensors, busy=busy: move(ours, tensors, busy),
                                lambda move=move, tensors=tensors, busy=busy: move(theirs, tensors, busy),
                                peer_name="Python's threads",
                                limit=limits[index],
                                rounds=min(rounds, BUSY_ROUNDS) if busy else rounds,
                                warmup=1,
                            )
