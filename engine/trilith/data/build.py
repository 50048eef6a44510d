"""Text files into a data set: what `trilith data build` does.

Inputs are .txt (one document a file), .jsonl and .jsonl.gz (one object a line, the text under a key) and .parquet
(the text in a column). The result is PREFIX.bin, PREFIX.idx and PREFIX.tokenizer.json. Every bad line is refused by
file and line: text that is silently skipped is never missed until an evaluation is odd.
"""

from __future__ import annotations

import difflib
import gzip
import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trilith.data.indexed import IndexedDatasetWriter, idx_path, token_dtype
from trilith.data.tokenizer import Tokenizer, train_tokenizer
from trilith.errors import DataError

Report = Callable[[str], None]
_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 512
_TRAIN_CHARACTERS = 1 << 30
_REPORT_EVERY_S = 2.0


@dataclass(frozen=True)
class BuildStatistics:
    """What a build wrote. `num_empty` documents had no text and were left out; `num_characters` were encoded."""

    prefix: str
    tokenizer_path: str
    num_inputs: int
    num_documents: int
    num_empty: int
    num_characters: int
    num_tokens: int
    vocab_size: int
    dtype: str
    wall_s: float


def build(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int | None = None,
    json_key: str = "text",
    append_eod: bool = True,
    report: Report | None = None,
) -> BuildStatistics:
    """Tokenise `inputs` into the data set `output_prefix`; each document ends with the end-of-document token.

    Without a `tokenizer` one of `vocab_size` tokens is trained, on an equal share of every input, at most 2^30
    characters in all. `json_key` is the key (JSONL) or column (parquet) of the text, `append_eod=False` leaves the
    end tokens out, `report` receives lines of progress. The pair of files appears whole or not at all. Raises
    DataError with file, line and key. Uses all cores: do not fork this process afterwards.
    """
    started = time.perf_counter()
    paths = [Path(path) for path in inputs]
    check_inputs(paths)
    if tokenizer is None:
        if vocab_size is None:
            raise DataError("data build: give a tokenizer, or the vocabulary size of the one to train")
        if report:
            report(f"training a tokenizer of {vocab_size} tokens")
        tokenizer = train_tokenizer(_training_texts(paths, json_key), vocab_size)
    prefix = Path(output_prefix)
    tokenizer_path = Path(f"{prefix}.tokenizer.json")
    counter = _Counter(report)
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with IndexedDatasetWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer:
            texts = counter.count(text for path in paths for text in read_documents(path, json_key))
            num_tokens = encode_documents(texts, tokenizer, writer, append_eod)
            if counter.num_documents == 0:
                raise DataError(f"data build: the {len(paths)} inputs hold no text")
            # An older data set of this name goes before its tokenizer does: no mixture of the two is ever readable.
            idx_path(prefix).unlink(missing_ok=True)
            tokenizer_path.write_text(tokenizer.to_json(), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{error.filename or idx_path(prefix)}: cannot be written: {error.strerror}") from error
    return BuildStatistics(
        prefix=str(prefix),
        tokenizer_path=str(tokenizer_path),
        num_inputs=len(paths),
        num_documents=counter.num_documents,
        num_empty=counter.num_empty,
        num_characters=counter.num_characters,
        num_tokens=num_tokens,
        vocab_size=tokenizer.vocab_size,
        dtype=token_dtype(tokenizer.vocab_size).name,
        wall_s=time.perf_counter() - started,
    )


class _Counter:
    """Counts the documents that pass, drops the empty ones, reports every two seconds."""

    def __init__(self, report: Report | None) -> None:
        self.num_documents = self.num_empty = self.num_characters = 0
        self._report = report

    def count(self, texts: Iterable[str]) -> Iterator[str]:
        due = time.monotonic() + _REPORT_EVERY_S
        for text in texts:
            if not text:
                self.num_empty += 1
                continue
            self.num_documents += 1
            self.num_characters += len(text)
            if self._report and time.monotonic() > due:
                self._report(f"{self.num_documents} documents, {self.num_characters / 1e6:.1f} M characters")
                due = time.monotonic() + _REPORT_EVERY_S
            yield text


def encode_documents(
    texts: Iterable[str], tokenizer: Tokenizer, writer: IndexedDatasetWriter, append_eod: bool = True
) -> int:
    """Write every text as one document, in order, encoded in batches on all cores; returns the number of tokens."""
    total = 0
    for batch in _batches(texts):
        for ids in tokenizer.encode_batch(batch):
            if append_eod:
                ids.append(tokenizer.eod)
            writer.add_document(ids)
            total += len(ids)
    return total


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _training_texts(paths: Sequence[Path], json_key: str) -> Iterator[str]:
    """The first documents of every input, an equal share each, so that no input shapes the tokenizer alone."""
    share = _TRAIN_CHARACTERS // len(paths)
    for path in paths:
        left = share
        for text in read_documents(path, json_key):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break


def check_inputs(paths: Sequence[Path]) -> None:
    """Raise one DataError that names every input that is missing or of a kind that cannot be read."""
    wrong = []
    for path in paths:
        if not path.is_file():
            hint = "a directory; name the files in it" if path.is_dir() else "no such file"
            wrong.append(f"{path}: {hint}")
        elif not path.name.endswith((".txt", ".jsonl", ".jsonl.gz", ".parquet")):
            wrong.append(f"{path}: inputs are .txt, .jsonl, .jsonl.gz or .parquet")
    if not paths:
        wrong.append("data build: no input")
    if wrong:
        raise DataError("\n".join(wrong))


def read_documents(path: Path, json_key: str = "text") -> Iterator[str]:
    """The documents of one input in order. Raises DataError with file, line (or row) and key."""
    try:
        if path.name.endswith(".txt"):
            yield _decode(path.read_bytes(), str(path))
        elif path.name.endswith(".parquet"):
            yield from _read_parquet(path, json_key)
        else:
            yield from _read_jsonl(path, json_key)
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path}: the compressed data is damaged or cut off: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} = {raw[error.start]:#04x}: the text is not UTF-8") from error


def _read_jsonl(path: Path, key: str) -> Iterator[str]:
    opener: Any = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rb") as stream:
        for number, raw in enumerate(stream, start=1):
            line = _decode(raw, f"{path}:{number}").strip()
            if line:
                yield _text_of_line(line, key, f"{path}:{number}")


def _text_of_line(line: str, key: str, where: str) -> str:
    """The text under `key` of one JSON object."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not a JSON object: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: a line holds a JSON object, not {type(value).__name__}")
    if key not in value:
        raise DataError(f"{where}: no key {key!r}; {_nearest(key, list(value), 'keys')}")
    text = value[key]
    if not isinstance(text, str):
        raise DataError(f"{where}: key {key!r} = {_short(text)}: a document is a string, not {type(text).__name__}")
    if not _is_unicode(text):
        raise DataError(f"{where}: key {key!r}: holds half of a surrogate pair (\\ud800 to \\udfff), not Unicode text")
    return text


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _nearest(key: str, names: Sequence[str], what: str) -> str:
    close = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}the {what} are {', '.join(map(repr, names[:10]))}"


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install 'trilith[data]'") from error
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            if column not in names:
                raise DataError(f"{path}: no column {column!r}; {_nearest(column, names, 'columns')}")
            kind = file.schema_arrow.field(column).type
            value_kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not (pyarrow.types.is_string(value_kind) or pyarrow.types.is_large_string(value_kind)):
                raise DataError(f"{path}: column {column!r} has type {kind}: documents are strings")
            for batch in file.iter_batches(batch_size=_BATCH_DOCUMENTS, columns=[column], use_threads=False):
                for text in batch.column(0).to_pylist():
                    if text is None:
                        raise DataError(f"{path}: row {row}: column {column!r} is null: a document is a string")
                    yield text
                    row += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable parquet file (after row {row}): {error}") from error
