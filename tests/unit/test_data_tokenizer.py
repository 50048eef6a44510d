"""The byte-level BPE: nothing is lost, sizes are exact, the same text gives the same tokenizer."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilith.data.tokenizer import END_OF_DOCUMENT, Tokenizer, load_tokenizer, train_tokenizer
from trilith.errors import DataError

TEXTS = tuple(Path(__file__).parent.joinpath(name).read_text() for name in ("test_data_tokenizer.py", "__init__.py"))


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 400)


def test_vocabulary_is_exact_and_starts_with_the_end_token() -> None:
    assert tokenizer().vocab_size == 400 and tokenizer().eod == 0
    vocabulary = json.loads(tokenizer().to_json())["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(400)) and vocabulary[END_OF_DOCUMENT] == 0
    assert tokenizer().decode([0]) == END_OF_DOCUMENT


def test_training_is_deterministic() -> None:
    assert train_tokenizer(TEXTS, 400).to_json() == tokenizer().to_json()


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text: str) -> None:
    ids = tokenizer().encode(text)
    assert tokenizer().decode(ids) == text
    assert all(0 < token < 400 for token in ids)
    assert tokenizer().encode_batch([text, "x"])[0] == ids


def test_text_cannot_end_a_document() -> None:
    text = f"a{END_OF_DOCUMENT}b"
    assert 0 not in tokenizer().encode(text) and tokenizer().decode(tokenizer().encode(text)) == text


def test_tokens_outside_the_vocabulary_are_left_out() -> None:
    ids = tokenizer().encode("abc")
    assert tokenizer().decode([*ids, 400, 10**9, -1]) == "abc"


def test_sizes_that_cannot_be_reached_are_refused() -> None:
    with pytest.raises(DataError, match=r"vocab_size = 256: a byte-level tokenizer has at least 257"):
        train_tokenizer(TEXTS, 256)
    with pytest.raises(DataError, match=r"vocab_size = 900: the text has only (\d+) distinct tokens"):
        train_tokenizer(["abab abab"], 900)
    assert train_tokenizer([], 257).decode(train_tokenizer([], 257).encode("é")) == "é"


def test_saved_tokenizer_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer().to_json())
    loaded = load_tokenizer(path)
    assert loaded.vocab_size == 400 and loaded.eod == 0
    text = f"def f(x): return x  # {END_OF_DOCUMENT}"
    assert loaded.encode(text) == tokenizer().encode(text)
    assert load_tokenizer(path, eod_token=7).eod == 7


def foreign(tmp_path: Path, end: str) -> Path:
    """A tokenizer.json of another maker: other special names, a post-processor, truncation and padding."""
    content = json.loads(tokenizer().to_json())
    content["model"]["vocab"][end] = content["model"]["vocab"].pop(END_OF_DOCUMENT)
    content["added_tokens"][0]["content"] = end
    content["added_tokens"].append({**content["added_tokens"][0], "id": 409, "content": "<bos>"})
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": end,
    }
    path = tmp_path / "foreign.json"
    path.write_text(json.dumps(content))
    return path


def test_foreign_tokenizer_is_read(tmp_path: Path) -> None:
    loaded = load_tokenizer(foreign(tmp_path, "</s>"))
    assert loaded.eod == 0
    assert loaded.encode("a long enough text") == tokenizer().encode("a long enough text"), "no truncation, no padding"
    with pytest.raises(DataError, match=r"no end-of-document token .* Set data\.eod_token"):
        load_tokenizer(foreign(tmp_path, "<stop>"))
    assert load_tokenizer(foreign(tmp_path, "<stop>"), eod_token=0).eod == 0
    with pytest.raises(DataError, match=r"data\.eod_token = 4000"):
        load_tokenizer(foreign(tmp_path, "</s>"), eod_token=4000)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"not json", "not a JSON file"),
        (b"\xff\xfe", "not a JSON file"),
        (b"[" * 100_000, "not a JSON file"),
        (b"{}", "not a tokenizer.json"),
        (b"\x80\x04\x95pickle", "not a JSON file"),
        (b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "tokenizer.json|the vocabulary is empty"),
    ],
)
def test_damaged_tokenizer_is_refused(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.json: .*({text})"):
        load_tokenizer(path)


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: No such file or directory; data\.tokenizer\.path"):
        load_tokenizer(tmp_path / "none.json")
