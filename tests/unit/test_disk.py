"""The disk store: what is written comes back, in order; every fault of a disk is named; nothing is left behind."""

from __future__ import annotations

import errno
import gc
import os
import resource
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trilith.errors import OffloadError, TrilithError
from trilith.failpoints import VARIABLE, Failpoints, InjectedFault
from trilith.kernels import library
from trilith.zero import disk_file
from trilith.zero.disk import DiskStore
from trilith.zero.disk_file import BlockFile, Moved

BLOCK = 4096
RANK = 3


@contextmanager
def stored(directory: Path, failpoint: str = "", **changes: Any) -> Iterator[DiskStore]:
    """A store of rank 3 with small blocks, closed at the end unless the test has failed it."""
    settings = {"threads": 2, "block_bytes": BLOCK, "queue_depth": 4, "checksum": True, **changes}
    points = Failpoints.from_environment(RANK, {VARIABLE: failpoint})
    store = DiskStore(directory, RANK, failpoints=points, **settings)
    try:
        yield store
    finally:
        store.close()


def numbers(num_bytes: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def says(error: BaseException, *words: str) -> None:
    assert isinstance(error, OffloadError) and isinstance(error, TrilithError)
    assert all(word in str(error) for word in (f"rank {RANK}", *words)), str(error)


def named_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that makes no files without a name, and knows no direct io."""
    opened = os.open

    def refuse(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, mode)

    monkeypatch.setattr(disk_file.os, "open", refuse)


@pytest.fixture(params=["native", "python"], autouse=True)
def mover(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kinds of threads that move bytes."""
    if request.param == "python":
        monkeypatch.setattr(library, "LIBRARY", None)
    elif library.LIBRARY is None:
        pytest.skip(library.MISSING)
    return str(request.param)


in_python = pytest.mark.parametrize("mover", ["python"], indirect=True)  # csrc/tests/io.cpp has its like


@pytest.fixture(params=["direct", "named, buffered"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to have a file."""
    if request.param != "direct":
        named_only(monkeypatch)
    return str(request.param)


@pytest.mark.parametrize("checksum", [False, True])
def test_tensors_of_any_type_come_back(tmp_path: Path, way: str, checksum: bool) -> None:
    tensors = {
        "weight": torch.randn(37, 111),
        "half": torch.randn(5000).bfloat16(),
        "mask": torch.rand(77) > 0.5,
        "scale": torch.tensor(3.5, dtype=torch.float64),
        "nothing": torch.empty(0, 4),
        "page": torch.randn(2048),
    }
    with stored(tmp_path, checksum=checksum) as store:
        for key, tensor in tensors.items():
            store.reserve(key, tensor.nbytes)
            store.write(key, tensor)
        back = {key: torch.empty_like(tensor) for key, tensor in tensors.items()}
        for ticket in [store.read(key, tensor) for key, tensor in back.items()]:
            ticket.wait()
            assert ticket.is_done
        total = sum(tensor.nbytes for tensor in tensors.values())
        assert (store.bytes_read, store.bytes_written) == (total, total)
        assert store.bytes_reserved == sum(-(-tensor.nbytes // 4096) * 4096 for tensor in tensors.values())
        assert not list(tmp_path.iterdir()), "the file has no name"
    for key, tensor in tensors.items():
        assert torch.equal(tensor, back[key]), key


OPERATIONS = st.lists(st.tuples(st.sampled_from(["write", "read"]), st.integers(0, 3)), max_size=30)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 5 * BLOCK), min_size=4, max_size=4),
    operations=OPERATIONS,
    threads=st.integers(1, 4),
    depth=st.integers(1, 4),
    block_bytes=st.sampled_from([1, BLOCK, 3 * BLOCK]),
)
def test_a_read_sees_the_write_before_it(
    tmp_path: Path, sizes: list[int], operations: list[tuple[str, int]], threads: int, depth: int, block_bytes: int
) -> None:
    """Any interleaving, nothing waited for: each read gets what was written last when it was asked for."""
    reads: list[tuple[Tensor, Tensor]] = []
    with stored(tmp_path, threads=threads, queue_depth=depth, block_bytes=block_bytes) as store:
        latest = [numbers(size, seed) for seed, size in enumerate(sizes)]
        for slot, tensor in enumerate(latest):
            store.reserve(str(slot), tensor.nbytes)
            store.write(str(slot), tensor)
        for seed, (kind, slot) in enumerate(operations):
            if kind == "write":
                latest[slot] = numbers(sizes[slot], 100 + seed)
                store.write(str(slot), latest[slot])
            else:
                reads.append((torch.zeros_like(latest[slot]), latest[slot]))
                store.read(str(slot), reads[-1][0])
        store.wait_all()
    assert all(torch.equal(got, expected) for got, expected in reads)


@in_python
def test_short_transfers_are_continued(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Linux does above 0x7ffff000 bytes, and a signal may at any size: here never more than 5000 bytes a call."""

    def partly(whole: Any, descriptor: int, buffers: list[Any], offset: int) -> int:
        return min(whole(descriptor, [memoryview(buffers[0]).cast("B")[: 2 * BLOCK]], offset), 5000)

    for name in ("preadv", "pwritev"):
        monkeypatch.setattr(disk_file.os, name, partial(partly, getattr(os, name)))
    tensor = numbers(10 * BLOCK + 5)
    with stored(tmp_path, block_bytes=4 * BLOCK) as store:
        store.reserve("unit", tensor.nbytes)
        store.write("unit", tensor)
        back = torch.zeros_like(tensor)
        store.read("unit", back).wait()
    assert torch.equal(back, tensor)


@in_python
def test_a_file_that_ends_inside_a_page(tmp_path: Path) -> None:
    with_page = BlockFile(tmp_path, RANK, 4 * BLOCK)
    assert with_page.allocate(4 * BLOCK) == 0
    tensor = numbers(3 * BLOCK)
    assert with_page.write(tensor.data_ptr(), 3 * BLOCK, 0) == (3 * BLOCK, 0)
    os.ftruncate(with_page._descriptors[0], 2 * BLOCK + 100)
    back = torch.zeros_like(tensor)
    had, number = with_page.read(back.data_ptr(), 3 * BLOCK, 0)
    assert number == 0 and 2 * BLOCK <= had <= 2 * BLOCK + 100
    assert torch.equal(back[:had], tensor[:had])
    with_page.close()


def test_full_disk_is_found_when_space_is_reserved(tmp_path: Path) -> None:
    with stored(tmp_path, capacity_bytes=3 * BLOCK) as store:
        store.reserve("first", BLOCK + 1)
        with pytest.raises(OffloadError) as caught:
            store.reserve("second", 2 * BLOCK)
        says(
            caught.value,
            "cannot reserve 8192 bytes for 'second'",
            "8192 of the capacity of 12288 bytes",
            "Offload less",
        )
        with pytest.raises(OffloadError) as caught, stored(tmp_path) as other:
            other.reserve("huge", 1 << 50)
        says(caught.value, "cannot reserve 1125899906842624 bytes for 'huge'", str(tmp_path), "ENOSPC", "nvme_path")
        store.reserve("third", BLOCK)


def test_a_disk_that_fills_while_space_is_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk gave before it was full is given back; the slots before it are whole."""
    whole = os.posix_fallocate

    def partly(descriptor: int, offset: int, num_bytes: int) -> None:
        whole(descriptor, offset, num_bytes // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tensor = numbers(BLOCK)
    with stored(tmp_path) as store:
        store.reserve("first", BLOCK)
        store.write("first", tensor).wait()
        monkeypatch.setattr(disk_file.os, "posix_fallocate", partly)
        with pytest.raises(OffloadError) as caught:
            store.reserve("second", 8 * BLOCK)
        says(caught.value, "cannot reserve 32768 bytes for 'second'", "4096 bytes are reserved", "ENOSPC", "Free space")
        assert os.fstat(store._file._descriptors[0]).st_size == store.bytes_reserved == BLOCK
        back = torch.zeros_like(tensor)
        store.read("first", back).wait()
    assert torch.equal(tensor, back)


def test_limit_of_the_file_size(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with stored(tmp_path) as store:
        store.reserve("first", BLOCK)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * BLOCK, hard))
        try:
            with pytest.raises(OffloadError) as caught:
                store.reserve("second", 8 * BLOCK)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        says(caught.value, "'second'", "4096 bytes are reserved", "EFBIG", "ulimit -f")
        tensor = numbers(BLOCK)
        store.write("first", tensor).wait()


def test_full_disk_in_a_write(tmp_path: Path) -> None:
    """The failpoint is passed once per block; what failed to be written cannot be read, until it is written again."""
    tensor, back = numbers(4 * BLOCK), torch.zeros(4 * BLOCK, dtype=torch.uint8)
    with stored(tmp_path, f"offload_write:{RANK}:3:full", threads=1, queue_depth=1) as store:
        store.reserve("before", BLOCK)
        store.reserve("unit 5", tensor.nbytes)
        write, read = store.write("unit 5", tensor), store.read("unit 5", back)
        with pytest.raises(OffloadError) as caught:
            write.wait()
        says(caught.value, str(tmp_path), "cannot write 'unit 5' at its byte 8192 of 16384 (offset 12288 of the file)")
        says(caught.value, "0 of 4096 bytes done", "No space left on device (ENOSPC)", "Free space there", "nvme_path")
        with pytest.raises(OffloadError) as caught:
            read.wait()
        says(caught.value, "cannot read 'unit 5', its last write failed", "ENOSPC")
        store.write("unit 5", tensor)
        store.read("unit 5", back).wait()
    assert torch.equal(tensor, back)


@in_python
@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EIO, ("EIO", "dmesg")), (errno.EROFS, ("EROFS", "writable")), (errno.ENODEV, ("ENODEV", "nvme_path"))],
)
@pytest.mark.parametrize("verb", ["write", "read"])
def test_errors_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: tuple[str, ...], verb: str
) -> None:
    with stored(tmp_path) as store:
        tensor = numbers(2 * BLOCK)
        store.reserve("unit", tensor.nbytes)
        store.write("unit", tensor).wait()
        monkeypatch.setattr(store._file, verb, lambda address, num_bytes, offset: Moved(17, number))
        with pytest.raises(OffloadError) as caught:
            getattr(store, verb)("unit", tensor).wait()
        says(caught.value, f"cannot {verb} 'unit'", "17 of 4096 bytes done", *words)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path / "absent", ("ENOENT", "mount its disk")),
        (lambda path: path / "file", ("ENOTDIR", "Set nvme_path to a directory")),
        (lambda path: path / "file" / "below", ("ENOTDIR",)),
        (lambda path: Path("/proc"), ("/proc", "nvme_path")),
    ],
)
def test_a_path_that_holds_no_file(tmp_path: Path, make: Callable[[Path], Path], words: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("")
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OffloadError) as caught, stored(make(tmp_path)):
        pass
    says(caught.value, "cannot make an offload file in", str(make(tmp_path)), *words)
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OffloadError, match=r"EACCES.*writable"), stored(tmp_path):
        pass


@pytest.mark.parametrize("checksum", [False, True])
def test_a_file_cut_short(tmp_path: Path, way: str, checksum: bool) -> None:
    """Found by a read behind the end, and by a write, which would else leave zeros before it."""
    tensor = numbers(3 * BLOCK)
    with stored(tmp_path, checksum=checksum) as store:
        for key in ("first", "second"):
            store.reserve(key, tensor.nbytes)
            store.write(key, tensor).wait()
        os.ftruncate(store._file._descriptors[0], 4 * BLOCK + 100)
        with pytest.raises(OffloadError) as caught:
            store.write("second", tensor).wait()
        says(caught.value, "cannot write 'second'", "the file was cut short")
        store.read("first", torch.empty_like(tensor)).wait()
    with stored(tmp_path, checksum=checksum, threads=1, queue_depth=1) as store:
        store.reserve("only", tensor.nbytes)
        store.write("only", tensor).wait()
        os.ftruncate(store._file._descriptors[0], BLOCK)
        with pytest.raises(OffloadError) as caught:
            store.read("only", tensor).wait()
        says(
            caught.value, "cannot read 'only' at its byte 4096 of 12288", "0 of 4096 bytes done", "cut short", "resume"
        )


def test_a_flipped_bit(tmp_path: Path) -> None:
    tensor = numbers(3 * BLOCK - 7)
    for checksum in (True, False):
        with stored(tmp_path, checksum=checksum) as store:
            store.reserve("other", 10)
            store.reserve("unit 7", tensor.nbytes)
            store.write("unit 7", tensor).wait()
            at = 2 * BLOCK + 300
            os.pwrite(store._file._descriptors[0], bytes([int(tensor[at]) ^ 4]), BLOCK + at)
            back = torch.empty_like(tensor)
            ticket = store.read("unit 7", back)
            if checksum:
                with pytest.raises(OffloadError) as caught:
                    ticket.wait()
                says(caught.value, "'unit 7' came back changed", "4089 bytes from 8192", "dmesg")
            else:
                ticket.wait()
                assert (back != tensor).sum() == 1


def test_errors_do_not_vanish(tmp_path: Path) -> None:
    """Raised to who waits, else by wait_all, else by close; each once."""
    failpoint = f"offload_write:{RANK}:1:raise,offload_write:{RANK}:2:raise,offload_write:{RANK}:3:full"
    tensor = numbers(10)
    with stored(tmp_path, failpoint) as store:
        store.reserve("unit", 10)
        ticket = store.write("unit", tensor)
        with pytest.raises(InjectedFault, match="failpoint offload_write, pass 1"):
            ticket.wait()
        store.wait_all()
        store.write("unit", tensor)
        with pytest.raises(InjectedFault, match="pass 2"):
            store.wait_all()
        store.write("unit", tensor)
        pending = store.read("unit", tensor.clone())
        with pytest.raises(OffloadError, match=r"2 operations failed:\n.*cannot write 'unit'.*\n.*cannot read 'unit'"):
            store.close()
        with pytest.raises(OffloadError, match="cannot read"):
            pending.wait()
        store.close()
        with pytest.raises(AssertionError, match="closed"):
            store.write("unit", tensor)


def offload_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("trilith-offload")]


@in_python
@pytest.mark.parametrize(("threads", "depth"), [(1, 8), (3, 8), (4, 2)])
def test_threads(tmp_path: Path, threads: int, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as asked for, and never more blocks under way than queue_depth; they sleep, and end with the store."""
    lock, now, most = threading.Lock(), 0, 0
    descriptors = len(os.listdir("/proc/self/fd"))
    with stored(tmp_path, threads=threads, queue_depth=depth) as store:
        write = store._file.write

        def counted(address: int, num_bytes: int, offset: int) -> Moved:
            nonlocal now, most
            with lock:
                now, most = now + 1, max(most, now + 1)
            time.sleep(0.01)
            with lock:
                now -= 1
            return write(address, num_bytes, offset)

        monkeypatch.setattr(store._file, "write", counted)
        tensor = numbers(10 * BLOCK)
        for key in "ab":
            store.reserve(key, tensor.nbytes)
            store.write(key, tensor)
        store.wait_all()
        assert most == len(offload_threads()) == min(threads, depth)
        assert all(thread.daemon for thread in offload_threads())
        began = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - began < 0.1
    assert not offload_threads()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_tensor_lives_until_it_is_written(tmp_path: Path) -> None:
    """Though nobody else keeps it; and not much longer."""
    with stored(tmp_path, f"offload_write:{RANK}:1:sleep=0.3") as store:
        for key in ("unit", "other"):
            store.reserve(key, 2 * BLOCK)
        tensor = numbers(2 * BLOCK)
        expected, gone = tensor.clone(), weakref.ref(tensor)
        ticket = store.write("unit", tensor)
        del tensor
        gc.collect()
        assert gone() is not None and not ticket.is_done
        store.read("unit", back := torch.zeros_like(expected)).wait()
        store.write("other", back).wait()
        assert torch.equal(back, expected) and gone() is None


def test_keys_overlap_and_close_finishes(tmp_path: Path) -> None:
    """A slow write holds up the operations of its key only; close waits for what was begun."""
    tensor = numbers(BLOCK)
    with stored(tmp_path, f"offload_write:{RANK}:1:sleep=0.5") as store:
        for key in ("slow", "quick"):
            store.reserve(key, BLOCK)
        slow = store.write("slow", tensor)
        time.sleep(0.1)  # it is the first to pass
        store.write("quick", tensor).wait()
        assert not slow.is_done
        back = torch.zeros_like(tensor)
        read = store.read("slow", back)
        store.close()
        assert slow.is_done and read.is_done
    assert torch.equal(tensor, back)


def test_a_store_does_not_outlive_a_fork(tmp_path: Path) -> None:
    with stored(tmp_path) as store:
        child = os.fork()
        if child == 0:
            code = 0
            try:
                store.reserve("unit", 1)
            except AssertionError:
                code = 7
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
