"""Which tokens the n-th consumed sample holds: a pure function of (seed, n), the same in every layout. No torch.

The position of a run in its data is one integer, the number of samples consumed. A split (train, valid, test) is a
set of documents; laid end to end in a seeded order they form one stream of tokens, cut into samples of
sequence_length + 1 tokens that overlap by one (the label of a sample's last token is the first token of the next, as
in Megatron-LM's `gpt_dataset.py`). Epoch e visits the samples in the order of a keyed permutation that is computed per
index, so nothing is materialised, any index costs the same, and a resume needs no state: a Feistel network with cycle
walking (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.data.index import Runs, sample_runs
from trilith.errors import DataError
from trilith.rng import stream_key

SPLITS = ("train", "valid", "test")
_ROUNDS = 8

Ids = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


def key64(seed: int, *site: str | int) -> np.uint64:
    """One 64-bit key of a random stream (`trilith.rng.stream_key` as a single word)."""
    low, high = stream_key(seed, *site)
    return np.uint64(high << 32 | low)


def mix64(words: Words) -> Words:
    """A bijection of 64-bit words that scatters its input (the finaliser of SplitMix64, Steele et al. 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def hash_indices(key: np.uint64, indices: Ids) -> Words:
    """One pseudo-random 64-bit word per index. `indices` any shape, >= 0; equal on every machine and numpy version."""
    return mix64(mix64(indices.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)) ^ key)


@dataclass(frozen=True)
class Permutation:
    """A keyed bijection of [0, size), computed per index.

    A Feistel network of 8 rounds permutes the smallest [0, 4^h) that holds the domain; an image outside [0, size) is
    sent through again until it falls inside, fewer than four times on average.
    """

    size: int
    keys: tuple[int, ...]

    @staticmethod
    def keyed(size: int, seed: int, *site: str | int) -> Permutation:
        """The permutation of [0, size) of a random stream."""
        assert size >= 1, size
        return Permutation(size, tuple(int(key64(seed, *site, turn)) for turn in range(_ROUNDS)))

    def __call__(self, indices: Ids) -> Ids:
        """Images of `indices`, (n,) int64 in [0, size); (n,) int64."""
        half_bits = np.uint64(((self.size - 1).bit_length() + 1) // 2)
        words = np.array(indices, dtype=np.uint64)
        pending = np.arange(len(words))
        while len(pending):
            words[pending] = self._network(words[pending], half_bits)
            pending = pending[words[pending] >= np.uint64(self.size)]
        return words.astype(np.int64)

    def _network(self, words: Words, half_bits: np.uint64) -> Words:
        mask = (np.uint64(1) << half_bits) - np.uint64(1)
        left, right = words >> half_bits, words & mask
        for key in self.keys:
            left, right = right, left ^ (mix64(right + np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(key)) & mask)
        return (left << half_bits) | right


def split_documents(num_documents: int, ratio: Sequence[float], split: str) -> Ids:
    """Document numbers of `split`, ascending, (n,) int64.

    `ratio` gives the shares of train, valid and test in documents (`[969, 30, 1]`). Which documents are held out is a
    property of the data set and the ratio alone, not of a run's seed, so that evaluation losses of two runs compare. A
    split with a share above 0 gets at least one document where there are enough.
    """
    shares = np.asarray(ratio, dtype=np.float64)
    if shares.shape != (len(SPLITS),) or not np.all(np.isfinite(shares)) or shares.min() < 0 or shares.sum() <= 0:
        raise DataError(f"data.split = {list(ratio)}: three shares (train, valid, test) >= 0, not all 0")
    bounds = [0, *np.rint(np.cumsum(shares) / shares.sum() * num_documents).astype(np.int64).tolist()]
    wanted = int(np.count_nonzero(shares))
    if num_documents >= wanted:
        for at in range(len(SPLITS)):
            bounds[at + 1] = max(bounds[at + 1], bounds[at] + int(shares[at] > 0))
        after = 0
        for at in reversed(range(len(SPLITS))):
            bounds[at + 1] = min(bounds[at + 1], num_documents - after)
            after += int(shares[at] > 0)
    index = SPLITS.index(split)
    order = np.argsort(hash_indices(key64(0, "data.split"), np.arange(num_documents)), kind="stable")
    return np.sort(order[bounds[index] : bounds[index + 1]])


class TokenStream:
    """The samples of one split: documents in a seeded order, laid end to end, cut and permuted anew every epoch.

    `documents` (n,) int64 document numbers of the split, `lengths` (n,) int64 their tokens. Attributes:
    `samples_per_epoch`, `num_tokens`. Raises DataError where the split does not hold one whole sample.
    """

    def __init__(self, documents: Ids, lengths: Ids, split: str, sequence_length: int, seed: int) -> None:
        self.split, self.sequence_length, self.seed = split, sequence_length, seed
        self.num_tokens = int(lengths.sum())
        self.samples_per_epoch = max(self.num_tokens - 1, 0) // sequence_length
        if self.samples_per_epoch < 1:
            raise DataError(
                f"data: split {split!r} holds {self.num_tokens} tokens in {len(documents)} documents: one sample takes "
                f"model.sequence_length + 1 = {sequence_length + 1}. Give {split!r} a larger share in data.split, more "
                "data, or a shorter model.sequence_length"
            )
        order = np.argsort(hash_indices(key64(seed, "data.documents", split), documents), kind="stable")
        self._documents = documents[order]
        self._ends: Ids = np.cumsum(lengths[order], dtype=np.int64)

    def positions(self, sample_ids: Ids) -> Ids:
        """Where the samples start in the stream. `sample_ids` (n,) int64 consumed-sample indices >= 0; (n,) int64.

        Indices never wrap: index i belongs to epoch i // samples_per_epoch, and every epoch has its own order.
        """
        epochs, within = np.divmod(sample_ids, self.samples_per_epoch)
        slots = np.empty_like(within)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            permute = Permutation.keyed(self.samples_per_epoch, self.seed, "data.order", self.split, epoch)
            slots[chosen] = permute(within[chosen])
        return slots * self.sequence_length

    def runs(self, positions: Ids) -> Runs:
        """The document parts that make up the sequence_length + 1 tokens from each of `positions` (n,) of the stream on.

        The `slots` are document numbers here.
        """
        runs = sample_runs(self._ends, positions, self.sequence_length + 1)
        return replace(runs, slots=self._documents[runs.slots])


def sample_ids_for(step: int, batch_size: int) -> Ids:
    """Consumed-sample indices of step `step` (from 0) with a global batch of `batch_size`; (batch_size,) int64."""
    return np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)


def microbatch_ids(consumed: int, microbatch: int, size: int, data_rank: int, data_degree: int) -> Ids:
    """Consumed-sample indices that data rank `data_rank` of `data_degree` reads for microbatch `microbatch` of a step.

    `consumed` samples were consumed before the step, `size` is the microbatch size B; (B,) int64. Over all microbatches
    and data ranks the indices of a step are [consumed, consumed + batch), each once, however the batch is cut.
    """
    start = consumed + (microbatch * data_degree + data_rank) * size
    return np.arange(start, start + size, dtype=np.int64)


def as_ids(values: Any) -> Ids:
    """`values` as (n,) int64 sample indices; raises ValueError for a negative one or another shape."""
    ids = np.asarray(values, dtype=np.int64)
    if ids.ndim != 1 or (ids.size and int(ids.min()) < 0):
        raise ValueError(f"sample ids are (n,) and >= 0, not {ids.shape} {ids[ids < 0][:3].tolist()}")
    return ids
