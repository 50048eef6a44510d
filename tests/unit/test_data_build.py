"""`trilith data build`: text, JSONL and parquet into a data set; every bad line refused by file, line and key."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from trilith.data.build import build, read_documents
from trilith.data.indexed import IndexedDataset
from trilith.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from trilith.errors import DataError

TEXTS = ("the first text", "zweiter Text: äöü 漢字", "line one\nline two\r\n", "<|endoftext|> is only text")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 257)


def jsonl(path: Path, texts: tuple[str, ...] = TEXTS, key: str = "text") -> Path:
    lines = "\n\n".join(json.dumps({"id": i, key: text}) for i, text in enumerate(texts))
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def parquet(path: Path, column: str = "text", kind: str = "string") -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    values = pyarrow.array(TEXTS, pyarrow.large_string() if kind == "large_string" else pyarrow.string())
    if kind == "dictionary":
        values = values.dictionary_encode()
    writer.write_table(pyarrow.table({"id": list(range(len(TEXTS))), column: values}), path)
    return path


def documents(prefix: Path, tokenizer: Tokenizer) -> list[str]:
    dataset = IndexedDataset(prefix)
    assert all(dataset.get(i)[-1] == tokenizer.eod for i in range(len(dataset)))
    return [tokenizer.decode(dataset.get(i)[:-1].tolist()) for i in range(len(dataset))]


def test_every_kind_of_input(tmp_path: Path, tokenizer: Tokenizer) -> None:
    inputs = [jsonl(tmp_path / "a.jsonl"), jsonl(tmp_path / "b.jsonl.gz"), parquet(tmp_path / "c.parquet")]
    (tmp_path / "d.txt").write_bytes(TEXTS[2].encode())
    statistics = build([*inputs, tmp_path / "d.txt"], tmp_path / "new" / "out", tokenizer)
    assert documents(tmp_path / "new" / "out", tokenizer) == [*TEXTS * 3, TEXTS[2]]
    assert statistics.num_documents == 13 and statistics.num_inputs == 4 and statistics.num_empty == 0
    assert statistics.num_characters == 3 * sum(map(len, TEXTS)) + len(TEXTS[2])
    assert statistics.num_tokens == IndexedDataset(statistics.prefix).num_tokens
    assert statistics.dtype == "uint16" and statistics.vocab_size == 257 and statistics.wall_s > 0
    assert load_tokenizer(statistics.tokenizer_path).encode("x") == tokenizer.encode("x")
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["out.bin", "out.idx", "out.tokenizer.json"]


@pytest.mark.parametrize("kind", ["large_string", "dictionary"])
def test_parquet_string_types(tmp_path: Path, kind: str) -> None:
    assert list(read_documents(parquet(tmp_path / "a.parquet", kind=kind))) == list(TEXTS)


def test_key_end_tokens_and_empty_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = jsonl(tmp_path / "a.jsonl", ("ab", "", "c"), key="body")
    statistics = build([path], tmp_path / "out", tokenizer, json_key="body", append_eod=False)
    assert statistics.num_documents == 2 and statistics.num_empty == 1 and statistics.num_tokens == 3
    assert IndexedDataset(tmp_path / "out").lengths.tolist() == [2, 1]


def test_trains_a_tokenizer_where_none_is_given(tmp_path: Path) -> None:
    inputs = [jsonl(tmp_path / "a.jsonl"), jsonl(tmp_path / "b.jsonl", TEXTS[:2])]
    lines: list[str] = []
    statistics = build(inputs, tmp_path / "out", None, vocab_size=280, report=lines.append)
    trained = load_tokenizer(statistics.tokenizer_path)
    assert trained.vocab_size == statistics.vocab_size == 280 and "280" in lines[0]
    assert documents(tmp_path / "out", trained) == [*TEXTS, *TEXTS[:2]]
    with pytest.raises(DataError, match="give a tokenizer, or the vocabulary size"):
        build(inputs, tmp_path / "out", None)


LINES: tuple[tuple[bytes, str], ...] = (
    (b'{"text": "a"}\n{"text": "b"\n', r"a\.jsonl:2: not a JSON object: .* at column \d+"),
    (b'{"text": "a"}\n\n["b"]\n', r"a\.jsonl:3: a line holds a JSON object, not list"),
    (b'{"Text": "a", "n": 1}\n', r"a\.jsonl:1: no key 'text'; did you mean 'Text'\? the keys are 'Text', 'n'"),
    (b'{"text": 12}\n', r"a\.jsonl:1: key 'text' = 12: a document is a string, not int"),
    (b'{"text": null}\n', r"a\.jsonl:1: key 'text' = None: a document is a string, not NoneType"),
    (b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl:2: byte 10 = 0xff: the text is not UTF-8"),
    (b'{"text": "a\\ud800"}\n', r"a\.jsonl:1: key 'text': holds half of a surrogate pair"),
    (b"[" * 200_000 + b"\n", r"a\.jsonl:1: not a JSON object"),
    (b'{"text": ' + b"1" * 5000 + b"}\n", r"a\.jsonl:1: not a JSON object"),
)


@pytest.mark.parametrize(("content", "text"), LINES, ids=range(len(LINES)))
def test_bad_lines_are_named(tmp_path: Path, tokenizer: Tokenizer, content: bytes, text: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=text):
        build([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"], "nothing is left of a failed build"


def test_bad_inputs_are_all_named_before_any_work(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError) as caught:
        build([tmp_path / "none.txt", tmp_path / "a.csv", tmp_path], tmp_path / "out", tokenizer)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "none.txt: no such file" in lines[0] and "inputs are .txt" in lines[1] and "a directory" in lines[2]
    with pytest.raises(DataError, match="no input"):
        build([], tmp_path / "out", tokenizer)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="the 1 inputs hold no text"):
        build([tmp_path / "empty.txt"], tmp_path / "out", tokenizer)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    packed = gzip.compress(b'{"text": "a"}\n' * 1000)
    for content in (packed[:-20], b"plain", packed[:15] + b"\xff\xff\xff" + packed[18:]):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.jsonl\.gz"):
            list(read_documents(tmp_path / "a.jsonl.gz"))
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"a\.txt: byte 3 = 0xff: the text is not UTF-8"):
        list(read_documents(tmp_path / "a.txt"))


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", column="body")
    with pytest.raises(DataError, match=r"a\.parquet: no column 'text'; .*the columns are 'id', 'body'"):
        list(read_documents(path))
    with pytest.raises(DataError, match=r"a\.parquet: column 'id' has type int64: documents are strings"):
        list(read_documents(path, "id"))
    raw = path.read_bytes()
    for content in (b"", b"PAR1", raw[:-10], raw[:4] + b"\xff" * 260 + raw[264:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet"):
            list(read_documents(path, "body"))
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    writer.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(DataError, match=r"a\.parquet: row 1: column 'text' is null"):
        list(read_documents(path))


def test_unwritable_output_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(DataError, match=r"a\.txt.*: cannot be written"):
        build([tmp_path / "a.txt"], tmp_path / "a.txt" / "out", tokenizer)
