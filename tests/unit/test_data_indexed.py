"""Megatron's .bin/.idx: written byte for byte as the layout table says, read back, and refused when damaged."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trilith.data.indexed import (
    MAGIC,
    IndexedDataset,
    IndexedDatasetWriter,
    bin_path,
    idx_path,
    read_header,
    token_dtype,
)
from trilith.errors import DataError

DOCUMENTS: tuple[list[int], ...] = ([5, 6, 7], [8], [], [9, 10, 11, 12])


def write(prefix: Path, dtype: str = "<u2") -> Path:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    return prefix


def index_bytes(
    lengths: list[int],
    documents: list[int],
    *,
    magic: bytes = MAGIC,
    version: int = 1,
    code: int = 8,
    itemsize: int = 2,
    pointers: list[int] | None = None,
) -> bytes:
    """An .idx put together from the layout table, apart from the code under test."""
    if pointers is None:
        pointers = [sum(lengths[:i]) * itemsize for i in range(len(lengths))]
    return b"".join(
        (
            magic,
            struct.pack("<Q", version),
            struct.pack("<B", code),
            struct.pack("<Q", len(lengths)),
            struct.pack("<Q", len(documents)),
            struct.pack(f"<{len(lengths)}i", *lengths),
            struct.pack(f"<{len(pointers)}q", *pointers),
            struct.pack(f"<{len(documents)}q", *documents),
        )
    )


def place(prefix: Path, index: bytes, tokens: bytes) -> Path:
    idx_path(prefix).write_bytes(index)
    bin_path(prefix).write_bytes(tokens)
    return prefix


def test_written_bytes_equal_the_layout_table(tmp_path: Path) -> None:
    write(tmp_path / "a")
    golden = bytes.fromhex(
        "4d4d49444944580000"  # MMIDIDX and two zero bytes
        "0100000000000000"  # version 1
        "08"  # uint16
        "0400000000000000"  # 4 sequences
        "0500000000000000"  # 5 boundaries
        "03000000010000000000000004000000"  # tokens per sequence
        "0000000000000000060000000000000008000000000000000800000000000000"  # byte offsets
        "00000000000000000100000000000000020000000000000003000000000000000400000000000000"  # documents
    )
    assert idx_path(tmp_path / "a").read_bytes() == golden == index_bytes([3, 1, 0, 4], [0, 1, 2, 3, 4])
    assert bin_path(tmp_path / "a").read_bytes() == struct.pack("<8H", 5, 6, 7, 8, 9, 10, 11, 12)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", "<i4", "<i8", "<u2"])
def test_round_trip(tmp_path: Path, dtype: str) -> None:
    dataset = IndexedDataset(write(tmp_path / "a", dtype))
    assert dataset.dtype == np.dtype(dtype)
    assert [dataset.get(i).tolist() for i in range(len(dataset))] == list(DOCUMENTS)
    assert [dataset.get_document(i).tolist() for i in range(dataset.num_documents)] == list(DOCUMENTS)
    assert dataset.lengths.tolist() == [3, 1, 0, 4] and dataset.num_tokens == 8
    assert dataset.document_lengths.tolist() == [3, 1, 0, 4] and dataset.documents.tolist() == [0, 1, 2, 3, 4]
    assert dataset.get(3, 1, 2).tolist() == [10, 11] and dataset.get(3, 4).tolist() == []
    for sequence, offset, length in ((4, 0, None), (-1, 0, None), (3, 5, None), (3, 1, 4), (0, -1, 1), (0, 1, -1)):
        with pytest.raises(IndexError):
            dataset.get(sequence, offset, length)
    with pytest.raises(IndexError):
        dataset.get_document(4)


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    """A Megatron user may have split documents into sentences: a document is then a run of sequences."""
    prefix = place(tmp_path / "a", index_bytes([2, 1, 3], [0, 2, 2, 3]), struct.pack("<6H", *range(6)))
    dataset = IndexedDataset(prefix)
    assert dataset.document_lengths.tolist() == [3, 0, 3]
    assert dataset.get_document(0).tolist() == [0, 1, 2] and dataset.get_document(2, 1).tolist() == [4, 5]
    assert dataset.get(1).tolist() == [2]


def test_empty_data_set_opens(tmp_path: Path) -> None:
    dataset = IndexedDataset(place(tmp_path / "a", index_bytes([], [0]), b""))
    assert len(dataset) == dataset.num_documents == dataset.num_tokens == 0
    dataset.check_tokens(1)


def test_token_dtype_of_megatron() -> None:
    assert [token_dtype(v).name for v in (2, 65499, 65500, 128256)] == ["uint16", "uint16", "int32", "int32"]


TOKENS = struct.pack("<4H", 1, 2, 3, 4)
GOOD: dict[str, Any] = {"lengths": [3, 1], "documents": [0, 1, 2]}
DAMAGE: tuple[tuple[dict[str, Any], str], ...] = (
    ({"magic": b"TNTIDX\x00\x00\x00"}, r"a\.idx: magic = b'TNTIDX"),
    ({"version": 2}, r"a\.idx: version = 2: only version 1"),
    ({"code": 7}, r"a\.idx: dtype code = 7 \(float32\): tokens are integers"),
    ({"code": 6}, r"dtype code = 6 \(float64\)"),
    ({"code": 9}, r"dtype code = 9: the codes of tokens are 1 uint8"),
    ({"code": 5}, r"a\.idx: byte offset\[1\] = 6: the sequences before it hold 24 bytes"),
    ({"pointers": [0, 4]}, r"byte offset\[1\] = 4: the sequences before it hold 6 bytes"),
    ({"pointers": [2, 6]}, r"byte offset\[0\] = 2"),
    ({"pointers": [0, -(2**62)]}, r"byte offset\[1\] = -4611686018427387904"),
    ({"lengths": [3, -1]}, r"length\[1\] = -1: a sequence has at least 0"),
    ({"lengths": [3, 2]}, r"a\.bin: size = 8 bytes: the index says 10 bytes, it is truncated"),
    ({"lengths": [3, 0]}, r"a\.bin: size = 8 bytes: the index says 6 bytes, it is too long"),
    ({"documents": [1, 1, 2]}, r"document\[0\] = 1: the first boundary is 0"),
    ({"documents": [0, 1, 3]}, r"document\[2\] = 3: the last boundary is the number of sequences, 2"),
    ({"documents": [0, 2, 1, 2]}, r"document\[2\] = 1: boundaries never decrease, the one before is 2"),
    ({"documents": [0, 2**62, -(2**62), 2]}, r"document\[2\] = -4611686018427387904: boundaries never"),
    ({"documents": []}, r"document index count = 0"),
)


@pytest.mark.parametrize(("change", "text"), DAMAGE, ids=lambda v: v if isinstance(v, str) else "")
def test_damage_is_refused_by_file_field_and_value(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    IndexedDataset(place(tmp_path / "a", index_bytes(**GOOD), TOKENS))
    with pytest.raises(DataError, match=text):
        IndexedDataset(place(tmp_path / "a", index_bytes(**{**GOOD, **change}), TOKENS))


def test_wrong_sizes_are_refused(tmp_path: Path) -> None:
    index, prefix = index_bytes(**GOOD), tmp_path / "a"
    for changed, tokens, text in (
        (index[:20], TOKENS, "size = 20 bytes: an index has at least its 34 bytes of header"),
        (index[:-1], TOKENS, "truncated; rebuild it"),
        (index + b"x", TOKENS, "bytes that belong to nothing"),
        (index + b"xx", TOKENS, "multimodal"),
        (b"", TOKENS, "size = 0 bytes"),
        (index, TOKENS[:-1], r"a\.bin: size = 7 bytes: not a whole number of uint16 tokens"),
        (index, b"", r"a\.bin: size = 0 bytes: the index says 8"),
    ):
        with pytest.raises(DataError, match=text):
            IndexedDataset(place(prefix, changed, tokens))
    huge = struct.pack("<9sQBQQ", MAGIC, 1, 8, 2**63, 2**63)
    with pytest.raises(DataError, match="9223372036854775808 sequences"):
        IndexedDataset(place(prefix, huge, TOKENS))


def test_missing_files_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with pytest.raises(DataError, match=r"b\.idx: no such file"):
        IndexedDataset(tmp_path / "b")
    with pytest.raises(DataError, match=r"Give the prefix without \.bin or \.idx"):
        read_header(tmp_path / "a.bin")
    bin_path(tmp_path / "a").unlink()
    with pytest.raises(DataError, match=r"a\.bin: no such file"):
        read_header(tmp_path / "a")


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_index_is_refused_or_consistent(tmp_path: Path, data: st.DataObject) -> None:
    """1,000 corruptions of a good index: DataError, or a data set all of whose tokens can be read."""
    raw = bytearray(index_bytes([3, 1, 0, 4], [0, 2, 2, 4]))
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(("bits", "bytes", "header", "cut", "grow")))
        at = data.draw(st.integers(0, len(raw) - 1)) if raw else 0
        if kind == "bits" and raw:
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "bytes":
            raw[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
        elif kind == "header" and len(raw) >= 34:
            at = data.draw(st.sampled_from((0, 9, 17, 18, 26)))
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del raw[at:]
        else:
            raw += data.draw(st.binary(max_size=24))
    prefix = place(tmp_path / "fuzz", bytes(raw), struct.pack("<8H", *range(8)))
    try:
        dataset = IndexedDataset(prefix)
    except DataError as error:
        assert "fuzz." in str(error)
        return
    assert sum(len(dataset.get(i)) for i in range(len(dataset))) == dataset.num_tokens
    assert sum(len(dataset.get_document(i)) for i in range(dataset.num_documents)) == dataset.num_tokens
    assert dataset.num_tokens * dataset.dtype.itemsize == 16


def test_check_tokens_names_the_place(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "a", "<i4"))
    dataset.check_tokens(13)
    with pytest.raises(DataError, match=r"a\.bin: token 7 \(in sequence 3\) = 12: tokens lie in \[0, 12\)"):
        dataset.check_tokens(12)
    with pytest.raises(DataError, match=r"token 3 \(in sequence 1\) = 8"):
        dataset.check_tokens(8)
    negative = place(tmp_path / "b", index_bytes([2], [0, 1], code=4, itemsize=4), struct.pack("<2i", 1, -5))
    with pytest.raises(DataError, match=r"token 1 \(in sequence 0\) = -5"):
        IndexedDataset(negative).check_tokens(100)


def test_writer_refuses_what_the_dtype_cannot_hold(tmp_path: Path) -> None:
    for tokens, text in (
        ([1, 65536], r"document 1 has tokens in \[1, 65536\]: uint16 holds \[0, 65535\]"),
        ([-1], r"tokens in \[-1, -1\]"),
        ([0.5], "flat list of integers"),
        ([[1, 2]], "flat list of integers"),
    ):
        with pytest.raises(DataError, match=text), IndexedDatasetWriter(tmp_path / "a", "<u2") as writer:
            writer.add_document([1])
            writer.add_document(tokens)  # type: ignore[arg-type]
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="token dtype = float32"):
        IndexedDatasetWriter(tmp_path / "a", "f4")


def test_pair_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write(tmp_path / "a")
    before = idx_path(prefix).read_bytes()
    with pytest.raises(RuntimeError), IndexedDatasetWriter(prefix, "<u2") as writer:
        writer.add_document([1])
        raise RuntimeError("killed before the end")
    assert idx_path(prefix).read_bytes() == before and len(list(tmp_path.iterdir())) == 2

    renamed: list[str] = []
    replace = Path.replace

    def stop_at_the_index(self: Path, target: Path) -> Path:
        renamed.append(target.name)
        if target.suffix == ".idx":
            raise OSError(5, "injected", str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stop_at_the_index)
    with pytest.raises(OSError), IndexedDatasetWriter(prefix, "<u2") as writer:
        writer.add_document([1])
    assert renamed == ["a.bin", "a.idx"]
    with pytest.raises(DataError, match=r"a\.idx: no such file"):
        IndexedDataset(prefix)
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
