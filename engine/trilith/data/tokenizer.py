"""Byte-level BPE: any text in, token numbers out, and back without loss (Sennrich et al. 2016; bytes as in GPT-2).

The `tokenizers` library does the work; this module fixes how: 256 bytes as the base alphabet, so that nothing is
unknown, the end-of-document token first, and an exact vocabulary size. The same text gives the same file.
A tokenizer.json of another origin (GPT-2, Llama) is read too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trilith.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
_END_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>")
_NUM_BYTES = 256
MIN_VOCAB_SIZE = _NUM_BYTES + 1


class Tokenizer:
    """Text to token numbers and back. `vocab_size` is one more than the largest token, `eod` the end-of-document token.

    Text that spells a special token is encoded as plain text: only `eod` itself ends a document.
    """

    def __init__(self, backend: Any, eod: int) -> None:
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eod = eod
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token numbers of `text`, without an end-of-document token. Uses the calling thread only."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token numbers of several texts, on all cores: do not fork this process afterwards."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token numbers; those outside the vocabulary (a model's may be padded) are left out."""
        known = [int(token) for token in ids if 0 <= token < self.vocab_size]
        return str(self._backend.decode(known, skip_special_tokens=False))

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        return str(self._backend.to_str(pretty=True))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of exactly `vocab_size` tokens: the end-of-document token 0, the 256 bytes, then merges.

    Deterministic in the text. Runs on all cores: do not fork this process afterwards. Raises DataError where the size
    cannot be reached.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"data.tokenizer.vocab_size = {vocab_size}: a byte-level tokenizer has at least {MIN_VOCAB_SIZE} tokens "
            "(256 bytes and the end of a document)"
        )
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    reached = backend.get_vocab_size(with_added_tokens=True)
    if reached != vocab_size:
        raise DataError(
            f"data.tokenizer.vocab_size = {vocab_size}: the text has only {reached} distinct tokens. "
            f"Set it to {reached} or less, or give more text"
        )
    assert backend.token_to_id(END_OF_DOCUMENT) == 0
    return Tokenizer(backend, 0)


def load_tokenizer(path: str | Path, eod_token: int | None = None) -> Tokenizer:
    """Read a tokenizer.json. `eod_token` names the end-of-document token where the file's is none of the usual ones.

    Raises DataError with the file and the cause.
    """
    from tokenizers import Tokenizer as Backend

    try:
        text = Path(path).read_text(encoding="utf-8")
        json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not a JSON file: {error}"
        raise DataError(f"{path}: {reason}; data.tokenizer.path names a tokenizer.json") from error
    try:
        backend = Backend.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path}: not a tokenizer.json of the `tokenizers` library: {error}") from error
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise DataError(f"{path}: the vocabulary is empty")
    if eod_token is None:
        eod_token = next((vocabulary[name] for name in _END_NAMES if name in vocabulary), None)
    if eod_token is None:
        names = ", ".join(_END_NAMES)
        raise DataError(f"{path}: no end-of-document token (none of {names}). Set data.eod_token to its number")
    if not 0 <= eod_token <= max(vocabulary.values()):
        raise DataError(f"data.eod_token = {eod_token}: {path} has the tokens 0 to {max(vocabulary.values())}")
    return Tokenizer(backend, eod_token)
