"""Batches: tokens, labels and mask of given samples, from data sets on disk, a corpus, or nothing at all."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from trilith.data.batch import Batches, DatasetSource, check_data, open_batches, open_tokenizer, prepare_data
from trilith.data.build import build
from trilith.data.indexed import IndexedDataset, IndexedDatasetWriter
from trilith.data.sampler import microbatch_ids, sample_ids_for
from trilith.data.synthetic import SyntheticSource
from trilith.errors import DataError


@dataclass(frozen=True)
class TokenizerSection:
    vocab_size: int = 300
    path: str | None = None


@dataclass(frozen=True)
class DataSection:
    """Stands for `config.data`."""

    corpus: str | None = None
    paths: tuple[str, ...] = ()
    split: tuple[float, ...] = (8, 1, 1)
    seed: int = 5
    cache_directory: str | None = None
    tokenizer: TokenizerSection = field(default_factory=TokenizerSection)
    loss_mask: str = "none"
    reset_attention_mask: bool = False
    eod_token: int | None = None
    max_corpus_bytes: int | None = None


def data_set(prefix: Path, first: int, count: int, dtype: str = "<u2") -> str:
    """`count` documents whose tokens count on from `first`, each closed by a 0."""
    token = first
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for length in range(count):
            writer.add_document([*range(token, token + length), 0])
            token += length
    return str(prefix)


def test_labels_are_tokens_shifted_by_one(tmp_path: Path) -> None:
    data = DataSection(paths=(data_set(tmp_path / "a", 1, 30),), split=(1, 0, 0))
    batches = open_batches(data, 7, 1000, "train")
    assert batches.num_samples == (30 * 29 // 2 + 30 - 1) // 7
    samples = batches.samples(np.arange(20))
    assert samples.tokens.shape == samples.labels.shape == (20, 7) and samples.loss_mask is None
    assert samples.tokens.dtype == samples.labels.dtype == np.int64
    assert np.array_equal(samples.tokens[:, 1:], samples.labels[:, :-1])
    inside = (samples.tokens > 0) & (samples.labels > 0)
    steps = samples.labels - samples.tokens
    assert np.all(steps[inside] == 1), "within a document tokens follow each other"


def test_an_epoch_holds_every_token_once(tmp_path: Path) -> None:
    """Two data sets of different dtype are one stream; an epoch's labels are its tokens but for the first and the tail."""
    paths = (data_set(tmp_path / "a", 1, 12), data_set(tmp_path / "b", 1000, 9, "<i4"))
    batches = open_batches(DataSection(paths=paths, split=(1, 0, 0)), 5, 2000, "train")
    labels = batches.samples(np.arange(batches.num_samples)).labels.ravel()
    everything = np.concatenate([IndexedDataset(p).get(i) for p in paths for i in range(len(IndexedDataset(p)))])
    left = len(everything) - len(labels)
    assert 1 <= left <= 5
    values, counts = np.unique(labels[labels > 0], return_counts=True)
    assert np.all(counts == 1) and set(values.tolist()) <= set(everything.tolist())


def test_splits_share_no_document(tmp_path: Path) -> None:
    data = DataSection(paths=(data_set(tmp_path / "a", 1, 60),), split=(6, 3, 1))
    seen = []
    for split in ("train", "valid", "test"):
        batches = open_batches(data, 4, 5000, split)
        tokens = batches.samples(np.arange(batches.num_samples)).tokens
        seen.append(set(tokens[tokens > 0].tolist()))
    assert all(seen) and not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    other = open_batches(replace(data, seed=6), 4, 5000, "valid")
    tokens = other.samples(np.arange(other.num_samples)).tokens
    drift = seen[1] ^ set(tokens[tokens > 0].tolist())
    assert len(drift) <= 8, "the seed orders a split (and so moves its cut-off tail), it does not choose its documents"


@pytest.mark.parametrize("corpus", ["paths", "synthetic"])
def test_samples_are_the_same_in_every_layout(tmp_path: Path, corpus: str) -> None:
    data = DataSection(corpus="synthetic", loss_mask="eod")
    if corpus == "paths":
        data = DataSection(paths=(data_set(tmp_path / "a", 1, 40),), loss_mask="eod", eod_token=0)
    whole = open_batches(data, 6, 1000, "train").samples(sample_ids_for(3, 12))
    assert whole.loss_mask is not None
    for degree, size in ((1, 12), (2, 3), (3, 4), (4, 1), (6, 2)):
        batches = open_batches(data, 6, 1000, "train")
        for rank in range(degree):
            for microbatch in range(12 // (degree * size)):
                ids = microbatch_ids(36, microbatch, size, rank, degree)
                part = batches.samples(ids)
                assert np.array_equal(part.tokens, whole.tokens[ids - 36])
                assert np.array_equal(part.labels, whole.labels[ids - 36])
                assert part.loss_mask is not None and np.array_equal(part.loss_mask, whole.loss_mask[ids - 36])


def test_loss_mask_leaves_out_end_of_document_labels(tmp_path: Path) -> None:
    data = DataSection(paths=(data_set(tmp_path / "a", 1, 30),), split=(1, 0, 0))
    masked = open_batches(replace(data, loss_mask="eod", eod_token=0), 7, 1000, "train")
    ids = np.arange(50)
    samples = masked.samples(ids)
    assert samples.loss_mask is not None and samples.loss_mask.dtype == np.bool_
    assert np.array_equal(samples.loss_mask, samples.labels != 0)
    assert 0 < masked.count_targets(ids) == samples.loss_mask.sum() < 350
    assert open_batches(data, 7, 1000, "train").count_targets(ids) == 350


def test_documents_are_numbered_up_to_their_last_token(tmp_path: Path) -> None:
    data = DataSection(paths=(data_set(tmp_path / "a", 1, 30),), split=(1, 0, 0))
    numbered = open_batches(replace(data, reset_attention_mask=True, eod_token=0), 7, 1000, "train")
    samples = numbered.samples(np.arange(50))
    assert samples.documents is not None and samples.documents.shape == samples.tokens.shape
    for tokens, documents in zip(samples.tokens, samples.documents, strict=True):
        ended = 0
        for token, document in zip(tokens, documents, strict=True):
            assert document == ended
            ended += int(token == 0)
    plain = open_batches(data, 7, 1000, "train")
    assert plain.samples([3]).documents is None and plain.fingerprint != numbered.fingerprint


def test_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    data = DataSection(paths=(data_set(tmp_path / "a", 1, 30),), split=(1, 0, 0))
    batches = open_batches(data, 7, 400, "train")
    with pytest.raises(DataError, match=r"sample \d+, position \d: token 4\d\d: model\.vocab_size = 400 allows"):
        batches.samples(np.arange(batches.num_samples))
    with pytest.raises(ValueError, match="sample ids"):
        batches.samples([-1])


def test_fingerprint_changes_with_whatever_changes_samples(tmp_path: Path) -> None:
    data = DataSection(paths=(data_set(tmp_path / "a", 1, 30),), split=(1, 0, 0))
    other = data_set(tmp_path / "b", 1, 31)
    variants = (
        (data, 7),
        (data, 8),
        (replace(data, seed=6), 7),
        (replace(data, split=(2, 1, 0)), 7),
        (replace(data, paths=(other,)), 7),
        (replace(data, paths=(*data.paths, other)), 7),
        (replace(data, loss_mask="eod", eod_token=0), 7),
        (replace(data, loss_mask="eod", eod_token=1), 7),
        (DataSection(corpus="synthetic"), 7),
        (DataSection(corpus="synthetic", seed=6), 7),
    )
    prints = [open_batches(d, s, 1000, "train").fingerprint for d, s in variants]
    assert len(set(prints)) == len(prints)
    assert prints == [open_batches(d, s, 1000, "train").fingerprint for d, s in variants]


def test_synthetic_follows_its_recurrence() -> None:
    source = SyntheticSource("train", 512, 97, seed=3)
    windows = source.windows(np.arange(64))
    assert windows.shape == (64, 513) and windows.min() >= 0 and windows.max() < 97
    follow = np.zeros((97, 97), dtype=int)
    np.add.at(follow, (windows[:, :-1].ravel(), windows[:, 1:].ravel()), 1)
    best = follow.argmax(axis=1)
    token = 0
    for _ in range(97):
        token = int(best[token])
    assert token == 0 and len(set(best.tolist())) == 97, "the recurrence runs through every token"
    hits = np.mean(best[windows[:, :-1]] == windows[:, 1:])
    assert 0.92 < hits < 0.96, "about one position in 16 starts anew"
    assert len(set((np.diff(best) % 97).tolist())) == 1, "it is affine"
    assert 0.01 < np.mean(windows == 0) < 0.05
    assert len({tuple(row) for row in windows.tolist()}) == 64


@pytest.mark.parametrize("vocab_size", [2, 3, 64, 50257, 128256])
def test_synthetic_is_a_pure_function(vocab_size: int) -> None:
    source = SyntheticSource("train", 33, vocab_size, seed=1)
    ids = np.array([0, 7, 10**11])
    windows = source.windows(ids)
    assert windows.min() >= 0 and windows.max() < vocab_size
    again = SyntheticSource("train", 33, vocab_size, seed=1)
    assert np.array_equal(again.windows(ids[1:2]), windows[1:2])
    if vocab_size > 3:
        assert not np.array_equal(SyntheticSource("valid", 33, vocab_size, seed=1).windows(ids), windows)
        assert not np.array_equal(SyntheticSource("train", 33, vocab_size, seed=2).windows(ids), windows)


def test_synthetic_is_fixed_for_ever() -> None:
    """Golden losses rest on these numbers."""
    assert SyntheticSource("train", 9, 64, seed=1234).windows(np.array([0, 1])).tolist() == GOLDEN_SYNTHETIC


def test_corpus_gives_batches_and_tokenizer(tmp_path: Path) -> None:
    data = DataSection(corpus="python-stdlib", cache_directory=str(tmp_path), max_corpus_bytes=60_000, loss_mask="eod")
    lines: list[str] = []
    assert prepare_data(data, lines.append) is not None and lines
    with pytest.raises(DataError, match=r"model\.vocab_size = 299: the tokenizer of the corpus has 300 tokens"):
        open_batches(data, 32, 299, "train")
    batches = open_batches(data, 32, 300, "train")
    samples = batches.samples(np.arange(4))
    tokenizer = open_tokenizer(data)
    assert tokenizer is not None and tokenizer.vocab_size == 300 and tokenizer.eod == batches.eod_token == 0
    assert samples.loss_mask is not None and len(tokenizer.decode(samples.tokens[0].tolist())) >= 32


def test_tokenizer_beside_a_data_set_is_found(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("some words and some more words\n" * 20)
    build([text, text], tmp_path / "out", None, vocab_size=265)
    data = DataSection(paths=(str(tmp_path / "out"),), split=(1, 0, 0), loss_mask="eod")
    tokenizer = open_tokenizer(data)
    assert tokenizer is not None and tokenizer.vocab_size == 265
    assert open_batches(data, 4, 265, "train").eod_token == 0
    foreign = DataSection(paths=(data_set(tmp_path / "b", 1, 30),), split=(1, 0, 0), loss_mask="eod")
    assert open_tokenizer(foreign) is None and open_tokenizer(DataSection(corpus="synthetic")) is None
    with pytest.raises(DataError, match=r"set data\.eod_token"):
        open_batches(foreign, 4, 1000, "train")


def test_rules_are_all_reported_at_once(tmp_path: Path) -> None:
    good = data_set(tmp_path / "a", 1, 30)
    assert check_data(DataSection(paths=(good,)), 8, 1000) == []
    assert check_data(DataSection(corpus="synthetic"), 8, 64) == []
    bad = DataSection(
        paths=(good, str(tmp_path / "nowhere")), tokenizer=TokenizerSection(path=str(tmp_path / "none.json"))
    )
    found = check_data(bad, 8, 1000)
    assert [violation.path for violation in found] == ["data.paths[1]", "data.tokenizer.path"]
    assert "nowhere.idx: no such file" in str(found[0])
    (short,) = check_data(DataSection(paths=(good,)), 465, 1000)
    assert "the data sets hold 465 tokens, one sample takes model.sequence_length + 1 = 466" in str(short)
    assert check_data(DataSection(paths=(good,)), 464, 1000) == []
    small = DataSection(corpus="python-stdlib", tokenizer=TokenizerSection(200))
    assert [v.path for v in check_data(small, 8, 300)] == ["data.tokenizer.vocab_size"]
    assert [v.path for v in check_data(DataSection(corpus="synthetic"), 8, 1)] == ["model.vocab_size"]


def test_direct_use_without_a_configuration(tmp_path: Path) -> None:
    dataset = IndexedDataset(data_set(tmp_path / "a", 1, 30))
    source = DatasetSource([dataset], [1, 0, 0], "train", 7, seed=5)
    batches = Batches(source, vocab_size=1000)
    config = open_batches(DataSection(paths=(dataset.prefix,), split=(1, 0, 0)), 7, 1000, "train")
    assert np.array_equal(batches.samples([3]).tokens, config.samples([3]).tokens)
    assert source.num_tokens == dataset.num_tokens


def test_import_is_light() -> None:
    heavy = ("torch", "tokenizers", "pyarrow", "pydantic", "matplotlib")
    code = f"import sys, trilith.data.batch; print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


GOLDEN_SYNTHETIC = [
    [0, 3, 14, 33, 60, 31, 10, 61, 56, 59],
    [0, 3, 42, 29, 24, 27, 38, 57, 46, 1],
]
