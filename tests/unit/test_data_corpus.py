"""The standard library as a corpus: built once, whole or not at all, by one process, in a child of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trilith.data import corpus as room
from trilith.data.corpus import (
    Corpus,
    StdlibRequest,
    default_cache_directory,
    find_python_stdlib,
    prepare_in_subprocess,
    prepare_python_stdlib,
    stdlib_files,
)
from trilith.data.indexed import IndexedDataset
from trilith.data.tokenizer import load_tokenizer
from trilith.errors import DataError

REQUEST = StdlibRequest(vocab_size=300, max_bytes=60_000)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Corpus]:
    cache = tmp_path_factory.mktemp("corpus") / "deep" / "cache"
    return cache, prepare_python_stdlib(cache, REQUEST)


def copied(built: tuple[Path, Corpus], target: Path) -> tuple[Path, Path]:
    """A cache of its own for a test that damages it: (cache, corpus directory)."""
    shutil.copytree(built[0], target / "cache")
    return target / "cache", target / "cache" / Path(built[1].prefix).parent.name


def test_corpus_holds_the_files(built: tuple[Path, Corpus]) -> None:
    cache, corpus = built
    dataset, tokenizer = IndexedDataset(corpus.prefix), load_tokenizer(corpus.tokenizer_path)
    root = Path(os.__file__).parent
    names = [name for name, size in stdlib_files(root, REQUEST.max_bytes) if size]
    assert names == sorted(names) and len(names) == corpus.num_documents == len(dataset) > 3
    for i, name in enumerate(names):
        tokens = dataset.get(i).tolist()
        assert tokens[-1] == tokenizer.eod == corpus.eod_token == 0 and 0 not in tokens[:-1]
        assert tokenizer.decode(tokens[:-1]) == (root / name).read_bytes().decode()
    assert corpus.num_tokens == dataset.num_tokens and corpus.vocab_size == tokenizer.vocab_size == 300
    dataset.check_tokens(300)
    assert cache.stat().st_mode & 0o777 == 0o700
    manifest = json.loads((Path(corpus.prefix).parent / "manifest.json").read_text())
    assert manifest["shape"]["max_bytes"] == 60_000 and manifest["files"]["tokenizer.json"]["num_bytes"] > 0


def test_second_call_is_a_cache_hit(built: tuple[Path, Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    cache, corpus = built
    monkeypatch.setattr(room, "_build", lambda *_: pytest.fail("built again"))
    assert prepare_python_stdlib(cache, REQUEST) == corpus == find_python_stdlib(cache, REQUEST)
    assert prepare_in_subprocess(str(cache), REQUEST) == corpus
    assert find_python_stdlib(cache, StdlibRequest(301, 60_000)) is None
    assert find_python_stdlib(cache, StdlibRequest(300, 60_001)) is None


def test_build_is_deterministic(built: tuple[Path, Corpus], tmp_path: Path) -> None:
    again = prepare_in_subprocess(tmp_path, REQUEST)
    for suffix in (".bin", ".idx"):
        assert Path(again.prefix + suffix).read_bytes() == Path(built[1].prefix + suffix).read_bytes()


def test_own_tokenizer_takes_the_place_of_training(built: tuple[Path, Corpus], tmp_path: Path) -> None:
    request = StdlibRequest(9999, 40_000, tokenizer_path=built[1].tokenizer_path, eod_token=5)
    corpus = prepare_python_stdlib(tmp_path, request)
    assert corpus.vocab_size == 300 and corpus.eod_token == 5
    assert IndexedDataset(corpus.prefix).get(0)[-1] == 5
    assert find_python_stdlib(tmp_path, request) == corpus
    assert find_python_stdlib(tmp_path, StdlibRequest(9999, 40_000, built[1].tokenizer_path)) is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "missing", "manifest", "other", "no manifest"])
def test_damaged_cache_is_rebuilt(built: tuple[Path, Corpus], tmp_path: Path, damage: str) -> None:
    cache, directory = copied(built, tmp_path)
    tokens, manifest = directory / "text_document.bin", directory / "manifest.json"
    good = tokens.read_bytes()
    if damage == "truncate":
        tokens.write_bytes(good[:-2])
    elif damage == "flip":
        tokens.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    elif damage == "missing":
        tokens.unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    elif damage == "other":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "shape": {}}))
    else:
        manifest.unlink()
    assert find_python_stdlib(cache, REQUEST) is None
    corpus = prepare_python_stdlib(cache, REQUEST)
    assert Path(corpus.prefix + ".bin").read_bytes() == good


def test_killed_build_leaves_nothing_that_looks_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(room, "_write_durably", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_python_stdlib(tmp_path, REQUEST)
    (leftover,) = tmp_path.glob(".python-stdlib-*.partial")
    assert find_python_stdlib(tmp_path, REQUEST) is None and not list(tmp_path.glob("python-stdlib-*"))
    assert prepare_python_stdlib(tmp_path, REQUEST).vocab_size == 300
    assert not leftover.exists()


def test_only_one_process_builds(tmp_path: Path) -> None:
    lines: list[list[str]] = [[] for _ in range(3)]
    found: list[Corpus | None] = [None] * 3

    def ask(index: int) -> None:
        found[index] = prepare_in_subprocess(tmp_path, REQUEST, lines[index].append)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found[0] is not None and found.count(found[0]) == 3
    assert sum(any("training" in line for line in seen) for seen in lines) == 1
    assert len(list(tmp_path.glob("python-stdlib-*"))) == 1


def test_this_process_stays_free_of_threads(tmp_path: Path) -> None:
    """A process that forks ranks may prepare the corpus: afterwards it has one thread and a forked child can work."""
    code = (
        "import os, sys\n"
        "from trilith.data.corpus import StdlibRequest, prepare_in_subprocess\n"
        "corpus = prepare_in_subprocess(sys.argv[1], StdlibRequest(300, 60_000))\n"
        "assert not os.path.isdir('/proc/self/task') or len(os.listdir('/proc/self/task')) == 1\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    from trilith.data.tokenizer import load_tokenizer\n"
        "    os._exit(0 if load_tokenizer(corpus.tokenizer_path).encode('abc') else 1)\n"
        "sys.exit(os.waitpid(child, 0)[1])\n"
    )
    # numpy's BLAS has threads of its own, which it handles over a fork.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=True, env=environment)


def test_builder_ends_with_its_parent(tmp_path: Path) -> None:
    """SIGKILL of the process that waits for a build leaves no builder behind."""
    arguments = json.dumps({"cache_directory": str(tmp_path), "vocab_size": 4096, "max_bytes": None})
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'trilith.data.corpus', sys.argv[1], str(os.getpid())],\n"
        "                         stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, arguments], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        builder = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)
        killed = time.monotonic()
    try:
        while is_running(builder) and time.monotonic() - killed < 2:
            time.sleep(0.02)
        assert not is_running(builder)
    finally:
        if is_running(builder):
            os.kill(builder, signal.SIGKILL)
    assert find_python_stdlib(tmp_path, StdlibRequest(4096)) is None


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat")
        return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize("prepare", [prepare_python_stdlib, prepare_in_subprocess])
def test_errors_name_the_key(tmp_path: Path, prepare: object) -> None:
    assert callable(prepare)
    with pytest.raises(DataError, match=r"vocab_size = 100: a byte-level"):
        prepare(tmp_path, StdlibRequest(100, 60_000))
    with pytest.raises(DataError, match=r"vocab_size = 65000: the text has only \d+ distinct tokens"):
        prepare(tmp_path, StdlibRequest(65000, 60_000))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"Set data\.cache_directory to"):
        prepare(tmp_path / "file" / "cache", REQUEST)
    with pytest.raises(DataError, match=r"at most data\.max_corpus_bytes = 3 bytes"):
        prepare(tmp_path, StdlibRequest(300, 3))


def test_files_of_a_library(tmp_path: Path) -> None:
    for name in (
        "b.py",
        "a/c.py",
        "site-packages/x.py",
        "a/__pycache__/y.py",
        "lib2to3/tests/data/bad.py",
        "lib2to3/z.py",
        "notes.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x" * len(name))
    assert stdlib_files(tmp_path) == [("a/c.py", 6), ("b.py", 4), ("lib2to3/z.py", 12)]
    assert sum(size for _, size in stdlib_files(tmp_path, 11)) in (4, 6, 10)
    assert stdlib_files(tmp_path, 22) == stdlib_files(tmp_path)


def test_default_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_directory() == tmp_path / "trilith"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_directory() == tmp_path / "home" / ".cache" / "trilith"
