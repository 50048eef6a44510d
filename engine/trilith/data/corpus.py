"""The corpus every Python machine already holds: the source files of its standard library, about 31 MB of text.

One document per file, in the order of relative paths; files that are not UTF-8 and empty ones are left out, and so
are `site-packages` and the deliberately broken sources of lib2to3's tests. The BPE is trained on the whole corpus:
that takes about 4 s on 2 cores for 31 MB, the tokenising 6 s, so a subset would save little and cost compression.

The result is cached: a directory whose name is a hash of everything that shapes it. It is built once under a lock, in
a directory of another name that is renamed when complete, so that a killed build leaves nothing that looks finished.
`tokenizers` starts threads that do not survive a fork: a process that will fork ranks calls `prepare_in_subprocess`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock

from trilith.data.build import Report, encode_documents
from trilith.data.indexed import IndexedDatasetWriter, sync_directory, token_dtype
from trilith.data.tokenizer import load_tokenizer, train_tokenizer
from trilith.errors import DataError

_BUILDER_VERSION = 1
_FORMAT = "trilith-corpus"
_MANIFEST = "manifest.json"
_PREFIX = "text_document"
_FILES = (f"{_PREFIX}.bin", f"{_PREFIX}.idx", "tokenizer.json")
_SKIPPED = ("site-packages", "dist-packages", "__pycache__", "lib2to3/tests/data")


@dataclass(frozen=True)
class StdlibRequest:
    """What shapes the corpus: vocabulary size of the BPE to train, at most `max_bytes` of source (None: all), or an
    existing tokenizer.json in place of training, with its end-of-document token where that is not one of the usual.
    """

    vocab_size: int
    max_bytes: int | None = None
    tokenizer_path: str | None = None
    eod_token: int | None = None


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus: data set prefix, tokenizer.json, and counts."""

    prefix: str
    tokenizer_path: str
    vocab_size: int
    eod_token: int
    num_documents: int
    num_tokens: int


def default_cache_directory() -> Path:
    """`$XDG_CACHE_HOME/trilith`, or `~/.cache/trilith`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "trilith"


def stdlib_files(root: Path, max_bytes: int | None = None) -> list[tuple[str, int]]:
    """(relative path, bytes) of the source files under `root`, sorted by path.

    With `max_bytes` files are taken in the order of a hash of their paths, as long as they fit: a subset of every part
    of the library that is the same on every machine with these files.
    """
    found: list[tuple[str, int]] = []
    for folder, folders, names in os.walk(root):
        here = Path(folder).relative_to(root)
        folders[:] = [name for name in folders if not (here / name).as_posix().endswith(_SKIPPED)]
        for name in names:
            path = Path(folder, name)
            if name.endswith(".py") and path.is_file():
                found.append(((here / name).as_posix(), path.stat().st_size))
    if max_bytes is not None:
        chosen, total = [], 0
        for name, size in sorted(found, key=lambda item: hashlib.blake2b(item[0].encode("utf-8", "replace")).digest()):
            if total + size <= max_bytes:
                chosen.append((name, size))
                total += size
        found = chosen
    found.sort()
    if not any(size for _, size in found):
        limit = "" if max_bytes is None else f" of at most data.max_corpus_bytes = {max_bytes} bytes"
        raise DataError(f"data.corpus = 'python-stdlib': {root} holds no .py files{limit}; use data.paths instead")
    return found


class _Location:
    """Where a request's corpus lies, and the list of files it is made of."""

    def __init__(self, cache_directory: str | Path | None, request: StdlibRequest) -> None:
        self.request = request
        self.cache = Path(cache_directory).expanduser() if cache_directory else default_cache_directory()
        self.root = Path(sysconfig.get_paths()["stdlib"])
        self.files = stdlib_files(self.root, request.max_bytes)
        tokenizer = None
        if request.tokenizer_path is not None:
            tokenizer = load_tokenizer(request.tokenizer_path, request.eod_token)
        shape = {
            "builder_version": _BUILDER_VERSION,
            "python": platform.python_version(),
            "tokenizers": metadata.version("tokenizers"),
            "vocab_size": request.vocab_size,
            "max_bytes": request.max_bytes,
            "tokenizer": tokenizer and [hashlib.blake2b(tokenizer.to_json().encode()).hexdigest(), tokenizer.eod],
            "files_blake2b": hashlib.blake2b(json.dumps(self.files).encode(), digest_size=16).hexdigest(),
        }
        self.shape: dict[str, Any] = shape
        key = hashlib.blake2b(json.dumps(shape, sort_keys=True).encode(), digest_size=8).hexdigest()
        self.directory = self.cache / f"python-stdlib-{key}"
        self.partial = self.cache / f".python-stdlib-{key}.partial"
        self.lock = self.cache / f".python-stdlib-{key}.lock"


def find_python_stdlib(cache_directory: str | Path | None, request: StdlibRequest) -> Corpus | None:
    """The corpus if it is in the cache, whole and unaltered; None where it must be built. Starts no threads."""
    return _read_cache(_Location(cache_directory, request))


def prepare_python_stdlib(
    cache_directory: str | Path | None, request: StdlibRequest, report: Report | None = None
) -> Corpus:
    """The corpus, built in this process if the cache (None: the user's) does not hold it; others wait for the builder.

    `report` receives lines of progress. Building uses all cores through threads: do not fork this process afterwards.
    Raises DataError.
    """
    where = _Location(cache_directory, request)
    found = _read_cache(where)
    if found:
        return found
    try:
        where.cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(where.lock):
            return _read_cache(where) or _build(where, report or (lambda line: None))
    except OSError as error:
        raise DataError(
            f"{error.filename or where.cache}: {error.strerror or error}: the corpus is kept there. Set "
            "data.cache_directory to a directory that can be written and has space"
        ) from error


def prepare_in_subprocess(
    cache_directory: str | Path | None, request: StdlibRequest, report: Report | None = None
) -> Corpus:
    """As `prepare_python_stdlib`, but built in a child process: this process starts no threads and may fork later.

    The child ends with this process, however that ends. Raises DataError.
    """
    found = find_python_stdlib(cache_directory, request)
    if found:
        return found
    arguments = {"cache_directory": cache_directory and str(cache_directory), **asdict(request)}
    command = [sys.executable, "-P", "-m", "trilith.data.corpus", json.dumps(arguments), str(os.getpid())]
    source_root = str(Path(__file__).resolve().parents[2])
    search_path = os.pathsep.join(filter(None, (source_root, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": search_path},
        )
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if report:
                    report(line.rstrip("\n"))
            status = child.wait()
        finally:
            child.kill()
            child.wait()
        errors.seek(0)
        text = errors.read().strip()
    if status == 2:
        raise DataError(text)
    found = find_python_stdlib(cache_directory, request) if status == 0 else None
    if found is None:
        raise DataError(f"data.corpus = 'python-stdlib': the builder ended with status {status}\n{text}".rstrip())
    return found


def _read_cache(where: _Location) -> Corpus | None:
    """The cached corpus if its manifest fits and every file has the length and hash that stand there."""
    try:
        manifest = json.loads((where.directory / _MANIFEST).read_text(encoding="utf-8"))
        if (manifest["format"], manifest["shape"]) != (_FORMAT, where.shape):
            return None
        for name in _FILES:
            path, expected = where.directory / name, manifest["files"][name]
            if path.stat().st_size != expected["num_bytes"] or _hash_file(path) != expected["xxh3_128"]:
                return None
        return Corpus(
            prefix=str(where.directory / _PREFIX),
            tokenizer_path=str(where.directory / "tokenizer.json"),
            **{name: int(manifest[name]) for name in ("vocab_size", "eod_token", "num_documents", "num_tokens")},
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(where: _Location, report: Report) -> Corpus:
    """Build the corpus in a directory of another name and rename it. The caller holds the lock."""
    started = time.perf_counter()
    for leftover in (where.partial, where.directory):
        if leftover.exists():
            shutil.rmtree(leftover)
    where.partial.mkdir(mode=0o700)
    texts, num_skipped = _read_texts(where)
    num_characters = sum(map(len, texts))
    report(f"python-stdlib: {len(texts)} files, {num_characters / 1e6:.1f} M characters")
    if where.request.tokenizer_path is not None:
        tokenizer = load_tokenizer(where.request.tokenizer_path, where.request.eod_token)
    else:
        report(f"python-stdlib: training a tokenizer of {where.request.vocab_size} tokens")
        tokenizer = train_tokenizer(texts, where.request.vocab_size)
    report("python-stdlib: tokenising")
    with IndexedDatasetWriter(where.partial / _PREFIX, token_dtype(tokenizer.vocab_size)) as writer:
        num_tokens = encode_documents(texts, tokenizer, writer)
    _write_durably(where.partial / "tokenizer.json", tokenizer.to_json())
    manifest = {
        "format": _FORMAT,
        "shape": where.shape,
        "vocab_size": tokenizer.vocab_size,
        "eod_token": tokenizer.eod,
        "num_documents": len(texts),
        "num_skipped": num_skipped,
        "num_characters": num_characters,
        "num_tokens": num_tokens,
        "wall_s": round(time.perf_counter() - started, 3),
        "files": {
            name: {
                "num_bytes": (where.partial / name).stat().st_size,
                "xxh3_128": _hash_file(where.partial / name),
            }
            for name in _FILES
        },
    }
    _write_durably(where.partial / _MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
    sync_directory(where.partial)
    where.partial.rename(where.directory)
    sync_directory(where.cache)
    report(f"python-stdlib: {num_tokens} tokens in {manifest['wall_s']:.1f} s, kept in {where.directory}")
    built = _read_cache(where)
    assert built is not None, where.directory
    return built


def _read_texts(where: _Location) -> tuple[list[str], int]:
    """The texts of the files in order, and how many files were left out as empty or not UTF-8."""
    texts = []
    for name, _ in where.files:
        try:
            text = (where.root / name).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            texts.append(text)
    return texts, len(where.files) - len(texts)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _hash_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _end_with_parent(parent: int) -> None:
    """End this process when `parent` is no longer its parent: a build must not outlive a killed run."""
    while os.getppid() == parent:
        time.sleep(0.25)
    os._exit(1)


def main(arguments: Sequence[str]) -> int:
    """Entry of the child of `prepare_in_subprocess`: a JSON object of its arguments, and the parent's process id.

    Prints progress; exit code 2 and the text on stderr for a DataError.
    """
    parser = argparse.ArgumentParser(prog="trilith.data.corpus", description=main.__doc__)
    parser.add_argument("request", type=json.loads)
    parser.add_argument("parent", type=int)
    options = parser.parse_args(arguments)
    threading.Thread(target=_end_with_parent, args=(options.parent,), daemon=True).start()
    cache_directory = options.request.pop("cache_directory")
    try:
        prepare_python_stdlib(
            cache_directory, StdlibRequest(**options.request), report=lambda line: print(line, flush=True)
        )
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
