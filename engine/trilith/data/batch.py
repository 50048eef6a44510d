"""The `data` section of a configuration as arrays: which tokens, labels and mask belong to given consumed samples.

Every rank that needs tokens or labels opens this itself and asks for its own sample indices; nothing travels.
Arrays are numpy; the trainer makes tensors of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trilith.data.build import Report
from trilith.data.corpus import Corpus, StdlibRequest, prepare_in_subprocess
from trilith.data.indexed import IndexedDataset, read_header
from trilith.data.sampler import SPLITS, Ids, TokenStream, as_ids, split_documents
from trilith.data.synthetic import SyntheticSource
from trilith.data.tokenizer import MIN_VOCAB_SIZE, Tokenizer, load_tokenizer
from trilith.errors import DataError, Violation


class TokenizerSettings(Protocol):
    """What this room reads of `data.tokenizer`."""

    @property
    def vocab_size(self) -> int:
        """Tokens of the BPE to train."""

    @property
    def path(self) -> str | None:
        """An existing tokenizer.json."""


class DataSettings(Protocol):
    """What this room reads of the `data` section (`trilith.config`), after "auto" is resolved."""

    @property
    def corpus(self) -> str | None:
        """ "python-stdlib", "synthetic" or None."""

    @property
    def paths(self) -> Sequence[str]:
        """Prefixes of Megatron data sets."""

    @property
    def split(self) -> Sequence[float]:
        """Shares of train, valid and test in documents."""

    @property
    def seed(self) -> int:
        """Seed of the order of samples."""

    @property
    def cache_directory(self) -> str | None:
        """Where prepared corpora are kept; None: the user's cache."""

    @property
    def tokenizer(self) -> TokenizerSettings:
        """The tokenizer of a corpus, or the one that made `paths`."""

    @property
    def loss_mask(self) -> str:
        """ "none" or "eod"."""

    @property
    def reset_attention_mask(self) -> bool:
        """Whether documents are numbered."""

    @property
    def eod_token(self) -> int | None:
        """End-of-document token; None: the tokenizer's."""

    @property
    def max_corpus_bytes(self) -> int | None:
        """Bound on the text of a corpus."""


class TokenSource(Protocol):
    """Windows of sequence_length + 1 tokens by consumed-sample index."""

    sequence_length: int
    fingerprint: str

    @property
    def samples_per_epoch(self) -> int:
        """Samples before the source starts over in another order."""

    def windows(self, ids: Ids) -> npt.NDArray[np.int64]:
        """(n, sequence_length + 1) int64 tokens of the samples `ids` (n,)."""


class DatasetSource:
    """Samples of one split of one or more indexed data sets, whose documents are numbered through.

    Several data sets are blended in proportion to their tokens. `seed` orders documents and samples; `ratio` is
    `data.split`.
    """

    def __init__(
        self, datasets: Sequence[IndexedDataset], ratio: Sequence[float], split: str, sequence_length: int, seed: int
    ) -> None:
        self.sequence_length = sequence_length
        self._datasets = tuple(datasets)
        self._bases = np.cumsum([0, *(dataset.num_documents for dataset in self._datasets)])
        lengths = np.concatenate([dataset.document_lengths for dataset in self._datasets])
        chosen = split_documents(len(lengths), ratio, split)
        self._stream = TokenStream(chosen, lengths[chosen], split, sequence_length, seed)
        digest = hashlib.blake2b(lengths.tobytes(), digest_size=16)
        sizes = [(dataset.dtype.name, dataset.num_documents, dataset.num_tokens) for dataset in self._datasets]
        digest.update(repr((sizes, [float(share) for share in ratio], split, sequence_length, seed)).encode())
        self.fingerprint = digest.hexdigest()

    @property
    def samples_per_epoch(self) -> int:
        """Whole samples of the split."""
        return self._stream.samples_per_epoch

    @property
    def num_tokens(self) -> int:
        """Tokens of the split."""
        return self._stream.num_tokens

    def windows(self, ids: Ids) -> npt.NDArray[np.int64]:
        """(n, sequence_length + 1) int64 tokens of the samples `ids` (n,)."""
        rows = np.empty((len(ids), self.sequence_length + 1), dtype=np.int64)
        runs = self._stream.runs(self._stream.positions(ids))
        which = np.searchsorted(self._bases, runs.slots, side="right") - 1
        documents = runs.slots - self._bases[which]
        ends = np.cumsum(runs.lengths)  # samples lie behind each other, and so do their rows
        flat = rows.reshape(-1)
        for dataset, document, offset, length, end in zip(
            which.tolist(), documents.tolist(), runs.offsets.tolist(), runs.lengths.tolist(), ends.tolist(), strict=True
        ):
            flat[end - length : end] = self._datasets[dataset].get_document(document, offset, length)
        return rows


@dataclass(frozen=True)
class Samples:
    """Rows for the model: `tokens` and `labels` (n, S) int64; `loss_mask` (n, S) bool, True where a label counts, or
    None where all do; `documents` (n, S) int64, which document of its row a token is of, where that is asked for.
    """

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.bool_] | None
    documents: npt.NDArray[np.int64] | None = None


class Batches:
    """Samples of one split by consumed-sample index, with labels and loss mask.

    `vocab_size` is the model's; `loss_mask` "none" or "eod" (labels equal to `eod_token` do not count). With
    `numbers_documents` samples say where documents end: with each `eod_token`.
    `num_samples` is the length of an epoch: indices may exceed it, each epoch has its own order. `fingerprint` changes
    with anything that changes the samples: keep it in a checkpoint and compare on resume.
    """

    def __init__(
        self,
        source: TokenSource,
        vocab_size: int,
        loss_mask: str = "none",
        eod_token: int | None = None,
        numbers_documents: bool = False,
    ) -> None:
        assert loss_mask in ("none", "eod"), loss_mask
        assert (loss_mask == "none" and not numbers_documents) or eod_token is not None
        self.vocab_size = vocab_size
        self.sequence_length = source.sequence_length
        self.eod_token = eod_token
        self.fingerprint = f"{source.fingerprint}-{loss_mask}-{eod_token if loss_mask == 'eod' else ''}"
        if numbers_documents:
            self.fingerprint += f"-documents-{eod_token}"
        self._source, self._masks, self.numbers_documents = source, loss_mask == "eod", numbers_documents

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return self._source.samples_per_epoch

    def samples(self, ids: Any) -> Samples:
        """The samples `ids` (n,) of consumed-sample indices >= 0.

        Raises DataError for a token outside the model's vocabulary.
        """
        wanted = as_ids(ids)
        windows = self._source.windows(wanted)
        if windows.size and (int(windows.min()) < 0 or int(windows.max()) >= self.vocab_size):
            self._refuse_token(wanted, windows)
        labels = np.ascontiguousarray(windows[:, 1:])
        mask = labels != self.eod_token if self._masks else None
        return Samples(np.ascontiguousarray(windows[:, :-1]), labels, mask, self._documents(windows[:, :-1]))

    def _documents(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
        if not self.numbers_documents:
            return None
        ends = (tokens == self.eod_token).astype(np.int64)
        return np.ascontiguousarray(ends.cumsum(axis=1) - ends)

    def count_targets(self, ids: Any) -> int:
        """How many labels of the samples `ids` count: the denominator of the loss, known before the first backward."""
        if not self._masks:
            return len(as_ids(ids)) * self.sequence_length
        return int(np.count_nonzero(self._source.windows(as_ids(ids))[:, 1:] != self.eod_token))

    def _refuse_token(self, ids: Ids, windows: npt.NDArray[np.int64]) -> None:
        row, column = np.argwhere((windows < 0) | (windows >= self.vocab_size))[0].tolist()
        raise DataError(
            f"data: sample {ids[row]}, position {column}: token {windows[row, column]}: model.vocab_size = "
            f"{self.vocab_size} allows [0, {self.vocab_size}). Set it to the size of the tokenizer that made the data"
        )


def check_data(data: DataSettings, sequence_length: int, vocab_size: int) -> list[Violation]:
    """Every rule of this room that a resolved `data` section breaks; what its keys say of each other is config's to check.

    Looks at files, but reads only headers and builds nothing, so it is fast for any size of data. `sequence_length` S
    and `vocab_size` V are the model's.
    """
    found, num_tokens = [], 0
    for index, prefix in enumerate(data.paths):
        try:
            num_tokens += read_header(prefix).num_tokens
        except DataError as error:
            found.append(Violation(f"data.paths[{index}]", prefix, str(error)))
    if data.paths and not found and num_tokens <= sequence_length:
        rule = f"the data sets hold {num_tokens} tokens, one sample takes model.sequence_length + 1 = {sequence_length + 1}"
        found.append(Violation("data.paths", list(data.paths), rule))
    path = data.tokenizer.path
    if path is not None and not Path(path).is_file():
        found.append(Violation("data.tokenizer.path", path, "no such file"))
    size = data.tokenizer.vocab_size
    if data.corpus == "python-stdlib" and path is None and size < MIN_VOCAB_SIZE:
        rule = f"a byte-level tokenizer has at least {MIN_VOCAB_SIZE} tokens: 256 bytes and the end of a document"
        found.append(Violation("data.tokenizer.vocab_size", size, rule))
    if data.corpus == "synthetic" and vocab_size < 2:
        found.append(Violation("model.vocab_size", vocab_size, "synthetic data needs at least 2 tokens"))
    return found


def prepare_data(data: DataSettings, report: Report | None = None) -> Corpus | None:
    """Build what `data` names and does not exist yet, in a child process; None where there is nothing to build.

    Call it before ranks are forked. A second call finds the first one's result. Raises DataError.
    """
    if data.corpus != "python-stdlib":
        return None
    request = StdlibRequest(
        vocab_size=data.tokenizer.vocab_size,
        max_bytes=data.max_corpus_bytes,
        tokenizer_path=data.tokenizer.path,
        eod_token=data.eod_token if data.tokenizer.path is not None else None,
    )
    return prepare_in_subprocess(data.cache_directory, request, report)


def open_tokenizer(data: DataSettings) -> Tokenizer | None:
    """The tokenizer that made the data: the corpus's, `data.tokenizer.path`, or the PREFIX.tokenizer.json beside
    `data.paths[0]`; None where there is none (synthetic data, a foreign data set).
    """
    corpus = prepare_data(data)
    if corpus is not None:
        return load_tokenizer(corpus.tokenizer_path, corpus.eod_token)
    if data.tokenizer.path is not None:
        return load_tokenizer(data.tokenizer.path, data.eod_token)
    beside = Path(f"{data.paths[0]}.tokenizer.json") if data.paths else None
    return load_tokenizer(beside, data.eod_token) if beside is not None and beside.is_file() else None


def open_batches(data: DataSettings, sequence_length: int, vocab_size: int, split: str) -> Batches:
    """The samples of `split` ("train", "valid", "test") that `data` describes.

    `sequence_length` S and `vocab_size` V are the model's. Builds a missing corpus in a child process.
    Raises DataError.
    """
    assert split in SPLITS, split
    eod_token = data.eod_token
    source: TokenSource
    if data.corpus == "synthetic":
        eod_token = 0 if eod_token is None else eod_token
        source = SyntheticSource(split, sequence_length, vocab_size, data.seed, eod_token)
    else:
        corpus = prepare_data(data)
        if corpus is not None:
            if corpus.vocab_size > vocab_size:
                raise DataError(
                    f"model.vocab_size = {vocab_size}: the tokenizer of the corpus has {corpus.vocab_size} tokens "
                    f"({corpus.tokenizer_path})"
                )
            prefixes: Sequence[str] = (corpus.prefix,)
            eod_token = corpus.eod_token if eod_token is None else eod_token
        else:
            prefixes = data.paths
        if not prefixes:
            raise DataError("data: neither data.corpus nor data.paths is given")
        source = DatasetSource(
            [IndexedDataset(prefix) for prefix in prefixes], data.split, split, sequence_length, data.seed
        )
    if (data.loss_mask == "eod" or data.reset_attention_mask) and eod_token is None:
        tokenizer = open_tokenizer(data)
        if tokenizer is None:
            asks = "loss_mask = 'eod'" if data.loss_mask == "eod" else "reset_attention_mask = true"
            raise DataError(f"data.{asks}: set data.eod_token or data.tokenizer.path")
        eod_token = tokenizer.eod
    return Batches(source, vocab_size, data.loss_mask, eod_token, data.reset_attention_mask)
