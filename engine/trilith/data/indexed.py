"""Megatron's indexed data sets: `PREFIX.bin` holds tokens, `PREFIX.idx` says where each sequence and document begins.

Byte layout of the .idx (Megatron-LM `megatron/core/datasets/indexed_dataset.py`), all little-endian and unaligned:
9 bytes magic, uint64 version 1, uint8 dtype code, uint64 sequence count S, uint64 document index count D, then
int32[S] tokens per sequence, int64[S] byte offset of each sequence in the .bin, int64[D] document boundaries as
sequence numbers (first 0, last S). The .bin is raw tokens without a header. An index is checked whole when it is
opened: a damaged one is refused by file, field and value here, not met as wrong tokens or a crash in step 40,000.
Nothing is pickled.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_TOKEN_DTYPES: Mapping[int, np.dtype[Any]] = MappingProxyType(
    {
        1: np.dtype("u1"),
        2: np.dtype("i1"),
        3: np.dtype("<i2"),
        4: np.dtype("<i4"),
        5: np.dtype("<i8"),
        8: np.dtype("<u2"),
    }
)
_FLOAT_CODES = MappingProxyType({6: "float64", 7: "float32"})
_CODES: Mapping[np.dtype[Any], int] = MappingProxyType({dtype: code for code, dtype in _TOKEN_DTYPES.items()})
_UINT16_VOCABULARY = 65500
_CHUNK = 1 << 20

Tokens = npt.NDArray[np.integer[Any]]


def bin_path(prefix: str | Path) -> Path:
    """The token file of `prefix`."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The index file of `prefix`."""
    return Path(f"{prefix}.idx")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype Megatron stores tokens in: uint16 if the vocabulary has fewer than 65,500 entries, else int32."""
    return np.dtype("<u2") if vocab_size < _UINT16_VOCABULARY else np.dtype("<i4")


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable (a rename is safe only after this)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class IndexHeader:
    """What the 34 bytes of an .idx header say (token dtype, sequence count, document index count = documents + 1), and
    the number of tokens in the .bin.
    """

    dtype: np.dtype[Any]
    num_sequences: int
    num_boundaries: int
    num_tokens: int

    @property
    def num_bytes(self) -> int:
        """Exact size of the .idx that has this header."""
        return _HEADER.size + 12 * self.num_sequences + 8 * self.num_boundaries


def read_header(prefix: str | Path) -> IndexHeader:
    """Read and check the header of `PREFIX.idx`, its exact size, and that `PREFIX.bin` exists and holds whole tokens.

    Costs the same for any size of data set. Raises DataError with file, field, value and rule.
    """
    path = idx_path(prefix)
    for file in (path, bin_path(prefix)):
        if not file.is_file():
            hint = " Give the prefix without .bin or .idx." if Path(prefix).suffix in (".bin", ".idx") else ""
            raise DataError(f"{file}: no such file; a data set is a pair PREFIX.bin and PREFIX.idx.{hint}")
    try:
        with path.open("rb") as stream:
            raw = stream.read(_HEADER.size)
            idx_bytes = os.fstat(stream.fileno()).st_size
        bin_bytes = bin_path(prefix).stat().st_size
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read: {error.strerror}") from error
    if len(raw) < _HEADER.size:
        raise DataError(f"{path}: size = {idx_bytes} bytes: an index has at least its {_HEADER.size} bytes of header")
    magic, version, code, num_sequences, num_boundaries = _HEADER.unpack(raw)
    if magic != MAGIC:
        raise DataError(f"{path}: magic = {magic!r}: an index starts with {MAGIC!r}; this is another format")
    if version != VERSION:
        raise DataError(f"{path}: version = {version}: only version {VERSION} is known")
    if code in _FLOAT_CODES:
        raise DataError(f"{path}: dtype code = {code} ({_FLOAT_CODES[code]}): tokens are integers")
    if code not in _TOKEN_DTYPES:
        known = ", ".join(f"{key} {dtype.name}" for key, dtype in _TOKEN_DTYPES.items())
        raise DataError(f"{path}: dtype code = {code}: the codes of tokens are {known}")
    dtype = _TOKEN_DTYPES[code]
    header = IndexHeader(dtype, num_sequences, num_boundaries, bin_bytes // dtype.itemsize)
    if num_boundaries < 1:
        raise DataError(f"{path}: document index count = 0: it holds at least the boundary 0")
    if idx_bytes != header.num_bytes:
        _refuse_size(path, header, idx_bytes)
    if bin_bytes % header.dtype.itemsize:
        raise DataError(
            f"{bin_path(prefix)}: size = {bin_bytes} bytes: not a whole number of {header.dtype.name} tokens"
        )
    return header


def _refuse_size(path: Path, header: IndexHeader, idx_bytes: int) -> None:
    counts = f"{header.num_sequences} sequences and {header.num_boundaries} document boundaries"
    if idx_bytes == header.num_bytes + header.num_sequences:
        raise DataError(
            f"{path}: size = {idx_bytes} bytes: one byte a sequence more than {counts} need, so this is a multimodal "
            "data set; only text is supported"
        )
    what = "it is truncated" if idx_bytes < header.num_bytes else "it has bytes that belong to nothing"
    raise DataError(f"{path}: size = {idx_bytes} bytes: {counts} need {header.num_bytes} bytes, {what}; rebuild it")


class IndexedDataset:
    """A .bin/.idx pair, memory-mapped. `len(dataset)` is its number of sequences.

    Opening checks everything but the tokens themselves (`check_tokens` does those) in time linear in the sequences.
    Attributes: `prefix`, `dtype`, `lengths` int32 (sequences,), `documents` int64 (documents + 1,) sequence numbers,
    `num_tokens`. Arrays are read-only views of the files.
    """

    def __init__(self, prefix: str | Path) -> None:
        header = read_header(prefix)
        self.prefix = str(prefix)
        self.dtype = header.dtype
        try:
            raw = np.asarray(np.memmap(idx_path(prefix), dtype=np.uint8, mode="r"))
            self._bin_bytes = bin_path(prefix).stat().st_size
            # An empty file cannot be mapped.
            tokens = (
                np.memmap(bin_path(prefix), dtype=self.dtype, mode="r") if self._bin_bytes else np.empty(0, self.dtype)
            )
        except (OSError, ValueError) as error:
            raise DataError(f"{prefix}: cannot be mapped: {error}") from error
        if raw.size != header.num_bytes:
            raise DataError(f"{idx_path(prefix)}: size = {raw.size} bytes: the file changed while it was opened")
        self._tokens: Tokens = np.asarray(tokens)
        self.num_tokens = int(self._tokens.size)
        ends = np.cumsum([_HEADER.size, 4 * header.num_sequences, 8 * header.num_sequences, 8 * header.num_boundaries])
        parts = [raw[start:stop] for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
        self.lengths: npt.NDArray[np.int32] = parts[0].view("<i4")
        self._pointers: npt.NDArray[np.int64] = parts[1].view("<i8")
        self.documents: npt.NDArray[np.int64] = parts[2].view("<i8")
        self._check_sequences()
        self._check_documents()
        bounds = np.append(self._pointers, np.int64(self._bin_bytes))
        self._document_starts: npt.NDArray[np.int64] = bounds[self.documents] // self.dtype.itemsize

    def _check_sequences(self) -> None:
        """Lengths are not negative, and each byte offset is the running sum of the lengths before it."""
        path, itemsize, total = idx_path(self.prefix), self.dtype.itemsize, 0
        for start in range(0, len(self.lengths), _CHUNK):
            lengths = self.lengths[start : start + _CHUNK].astype(np.int64)
            pointers = self._pointers[start : start + _CHUNK]
            if np.any(lengths < 0):
                at = start + int(np.argmax(lengths < 0))
                raise DataError(f"{path}: length[{at}] = {self.lengths[at]}: a sequence has at least 0 tokens")
            ends = total + np.cumsum(lengths) * itemsize
            expected = np.concatenate(([total], ends[:-1]))
            if np.any(pointers != expected):
                at = int(np.argmax(pointers != expected))
                raise DataError(
                    f"{path}: byte offset[{start + at}] = {pointers[at]}: the sequences before it hold "
                    f"{expected[at]} bytes"
                )
            total = int(ends[-1])
        if total != self._bin_bytes:
            what = "truncated" if self._bin_bytes < total else "too long"
            raise DataError(
                f"{bin_path(self.prefix)}: size = {self._bin_bytes} bytes: the index says {total} bytes, it is {what}"
            )

    def _check_documents(self) -> None:
        """Document boundaries start at 0, never decrease and end at the number of sequences."""
        path, documents = idx_path(self.prefix), self.documents
        if documents[0] != 0:
            raise DataError(f"{path}: document[0] = {documents[0]}: the first boundary is 0")
        if documents[-1] != len(self.lengths):
            raise DataError(
                f"{path}: document[{len(documents) - 1}] = {documents[-1]}: the last boundary is the number of "
                f"sequences, {len(self.lengths)}"
            )
        for start in range(0, len(documents) - 1, _CHUNK):
            # Compared, not subtracted: a damaged boundary may be so large that a difference would wrap around.
            chunk = documents[start : start + _CHUNK + 1]
            falls = chunk[1:] < chunk[:-1]
            if np.any(falls):
                at = start + int(np.argmax(falls)) + 1
                raise DataError(
                    f"{path}: document[{at}] = {documents[at]}: boundaries never decrease, the one before is "
                    f"{documents[at - 1]}"
                )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """Documents; each is one or more sequences that lie next to each other."""
        return len(self.documents) - 1

    @property
    def document_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens per document, int64 (documents,)."""
        return np.diff(self._document_starts)

    def get(self, sequence: int, offset: int = 0, length: int | None = None) -> Tokens:
        """Tokens [offset, offset + length) of a sequence (to its end by default), a read-only view in `dtype`.

        Raises IndexError for a sequence or a range that does not exist.
        """
        if not 0 <= sequence < len(self):
            raise IndexError(f"{self.prefix}: sequence {sequence} of {len(self)}")
        start = int(self._pointers[sequence]) // self.dtype.itemsize
        return self._slice(start, int(self.lengths[sequence]), offset, length)

    def get_document(self, document: int, offset: int = 0, length: int | None = None) -> Tokens:
        """Tokens [offset, offset + length) of a document (to its end by default), a read-only view in `dtype`.

        Raises IndexError for a document or a range that does not exist.
        """
        if not 0 <= document < self.num_documents:
            raise IndexError(f"{self.prefix}: document {document} of {self.num_documents}")
        start, stop = self._document_starts[document : document + 2].tolist()
        return self._slice(start, stop - start, offset, length)

    def _slice(self, start: int, available: int, offset: int, length: int | None) -> Tokens:
        length = available - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > available:
            raise IndexError(f"{self.prefix}: tokens [{offset}, {offset + length}) of {available}")
        return self._tokens[start + offset : start + offset + length]

    def check_tokens(self, vocab_size: int) -> None:
        """Read every token once; raises DataError with the place of the first one outside [0, vocab_size)."""
        for start in range(0, self.num_tokens, _CHUNK):
            chunk = self._tokens[start : start + _CHUNK]
            if int(chunk.min()) >= 0 and int(chunk.max()) < vocab_size:
                continue
            at = start + int(np.argmax((chunk < 0) | (chunk >= vocab_size)))
            sequence = int(np.searchsorted(self._pointers, at * self.dtype.itemsize, side="right")) - 1
            raise DataError(
                f"{bin_path(self.prefix)}: token {at} (in sequence {sequence}) = {self._tokens[at]}: tokens lie in "
                f"[0, {vocab_size}); the data set belongs to another tokenizer or is damaged"
            )


class IndexedDatasetWriter:
    """Writes a .bin/.idx pair that appears whole or not at all; one sequence is one document here.

    Use as a context manager: leaving it publishes the pair (fsync, then the .bin and at last the .idx get their names),
    an exception inside it removes what was written. Raises OSError where the disk refuses.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in _CODES:
            names = ", ".join(known.name for known in _CODES)
            raise DataError(f"{prefix}: token dtype = {self.dtype.name}: tokens are stored as one of {names}")
        self._lengths = array("i")
        self._limits = np.iinfo(self.dtype)
        self._temporary = tuple(
            path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in (bin_path(prefix), idx_path(prefix))
        )
        self._stream = self._temporary[0].open("wb", buffering=1 << 20)

    def add_document(self, tokens: Sequence[int] | Tokens) -> None:
        """Append one document. `tokens` (length,) integers; raises DataError for one that the dtype cannot hold."""
        values = np.asarray(tokens)
        if values.size == 0:
            values = np.empty(0, self.dtype)
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise DataError(f"{self.prefix}: a document is a flat list of integers, not {values.dtype} {values.shape}")
        if values.dtype != self.dtype and values.size:
            low, high = int(values.min()), int(values.max())
            if low < self._limits.min or high > self._limits.max:
                raise DataError(
                    f"{self.prefix}: document {len(self._lengths)} has tokens in [{low}, {high}]: "
                    f"{self.dtype.name} holds [{self._limits.min}, {self._limits.max}]"
                )
        self._stream.write(values.astype(self.dtype, copy=False).tobytes())
        self._lengths.append(len(values))

    def finish(self) -> None:
        """Publish the pair. An older pair of the same name loses its index first, so no mixture is ever readable."""
        temporary_bin, temporary_idx = self._temporary
        _sync_and_close(self._stream)
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.empty(0, np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        pointers = np.concatenate((np.zeros(1, np.int64), ends))[: len(lengths)]
        documents = np.arange(len(lengths) + 1, dtype=np.int64)
        stream = temporary_idx.open("wb")
        stream.write(_HEADER.pack(MAGIC, VERSION, _CODES[self.dtype], len(lengths), len(documents)))
        stream.write(lengths.astype("<i4").tobytes())
        stream.write(pointers.astype("<i8").tobytes())
        stream.write(documents.astype("<i8").tobytes())
        _sync_and_close(stream)
        idx_path(self.prefix).unlink(missing_ok=True)
        temporary_bin.replace(bin_path(self.prefix))
        temporary_idx.replace(idx_path(self.prefix))
        sync_directory(idx_path(self.prefix).parent)

    def abort(self) -> None:
        """Remove what was written; nothing of the prefix has appeared or changed."""
        self._stream.close()
        for path in self._temporary:
            path.unlink(missing_ok=True)

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.finish()
        except BaseException:
            self.abort()
            raise


def _sync_and_close(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
