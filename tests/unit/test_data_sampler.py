"""The order of samples: a pure function of (seed, consumed samples), the same in every layout."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilith.data.sampler import (
    SPLITS,
    Permutation,
    TokenStream,
    as_ids,
    hash_indices,
    key64,
    microbatch_ids,
    sample_ids_for,
    split_documents,
)
from trilith.errors import DataError


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40))
def test_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    image = Permutation.keyed(size, seed, epoch)(np.arange(size))
    assert np.array_equal(np.sort(image), np.arange(size))


def test_permutation_is_computed_per_index() -> None:
    permute = Permutation.keyed(10**15, 7, "x")
    ids = np.array([0, 1, 5, 10**15 - 1, 123456789])
    whole = permute(ids)
    assert [int(permute(ids[i : i + 1])[0]) for i in range(len(ids))] == whole.tolist()
    assert whole.min() >= 0 and whole.max() < 10**15 and len(set(whole.tolist())) == len(ids)
    assert ids.tolist() == [0, 1, 5, 10**15 - 1, 123456789], "the argument is not changed"


def plain_mix64(word: int) -> int:
    """SplitMix64's finaliser in Python integers."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def plain_key(seed: int, *site: str | int) -> int:
    """A key as `rng.stream_key` defines it: BLAKE2b of tagged, length-prefixed parts."""
    text = b""
    for part in (seed, *site):
        raw = str(part).encode()
        text += (b"s" if isinstance(part, str) else b"i") + len(raw).to_bytes(8, "little") + raw
    low, high = struct.unpack("<II", hashlib.blake2b(text, digest_size=8).digest())
    return int(high << 32 | low)


def plain_permutation(index: int, size: int, seed: int, *site: str | int) -> int:
    """One image of the keyed permutation in Python integers: a Feistel network with cycle walking."""
    half = ((size - 1).bit_length() + 1) // 2
    while True:
        left, right = index >> half, index % 2**half
        for turn in range(8):
            word = (right + 0x9E3779B97F4A7C15) % 2**64 ^ plain_key(seed, *site, turn)
            left, right = right, left ^ plain_mix64(word) % 2**half
        index = left << half | right
        if index < size:
            return index


def test_order_is_fixed_for_ever() -> None:
    """These numbers must not change: a run's data order would change on resume."""
    assert Permutation.keyed(10, 1, "golden")(np.arange(10)).tolist() == [6, 0, 1, 7, 9, 3, 2, 5, 8, 4]
    hashes = [int(word) for word in hash_indices(key64(1, "golden"), np.arange(2))]
    assert hashes == [1186867200327697933, 17607292257437979009]
    assert stream().positions(np.arange(6)).tolist() == [160, 168, 144, 80, 184, 104]


@pytest.mark.parametrize("size", [1, 2, 3, 17, 1000, 2**40 + 7])
def test_permutation_equals_plain_integers(size: int) -> None:
    ids = np.unique(np.array([0, 1, 2, 5, 16, 999, size // 2, size - 1]) % size)
    expected = [plain_permutation(int(i), size, 11, "site", 3) for i in ids]
    assert Permutation.keyed(size, 11, "site", 3)(ids).tolist() == expected


def test_permutation_scatters() -> None:
    """Neighbours are not sent to neighbours, and positions are hit evenly over keys."""
    size = 10007
    image = Permutation.keyed(size, 3)(np.arange(size))
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(image))) == pytest.approx(size / 3, rel=0.05)
    first = Counter(int(Permutation.keyed(5, seed)(np.arange(1))[0]) for seed in range(1000))
    assert set(first) == set(range(5)) and all(140 <= count <= 260 for count in first.values())


def stream(seed: int = 1, sequence_length: int = 8, split: str = "train") -> TokenStream:
    lengths = np.array([5, 0, 40, 1, 17, 100, 3, 33])
    return TokenStream(np.arange(8) * 10, lengths, split, sequence_length, seed)


def test_three_epochs_visit_every_sample_once_each_in_another_order() -> None:
    tokens = stream()
    n = tokens.samples_per_epoch
    assert n == (199 - 1) // 8 == 24
    epochs = tokens.positions(np.arange(3 * n)).reshape(3, n)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == [8 * k for k in range(n)]
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3


def test_resume_from_any_index() -> None:
    tokens = stream()
    whole = tokens.positions(np.arange(100)).tolist()
    for start in range(100):
        assert stream().positions(np.arange(start, 100)).tolist() == whole[start:]
    assert tokens.positions(np.array([10**12])).shape == (1,)


def test_order_depends_on_seed_and_split() -> None:
    ids = np.arange(24)
    orders = {tuple(stream(seed, split=s).positions(ids).tolist()) for seed in (1, 2) for s in ("train", "valid")}
    assert len(orders) == 4


def test_runs_cover_the_stream_in_document_order() -> None:
    tokens = stream()
    found = tokens.runs(8 * np.arange(24))
    runs_of = [list(zip(*(part[low:high].tolist() for part in (found.slots, found.offsets, found.lengths)), strict=True))
               for low, high in pairwise(found.starts.tolist())]  # fmt: skip
    laid = [run for runs in runs_of for run in runs]
    assert all(length > 0 for _, _, length in laid)
    seen: dict[int, list[int]] = {}
    for k in range(24):
        assert sum(length for _, _, length in runs_of[k]) == 9
        for document, offset, length in runs_of[k]:
            seen.setdefault(document, []).extend(range(offset, offset + length))
    # Neighbouring samples share one token: every other token of the 193 that are covered is seen once.
    total = Counter((document, offset) for document, offsets in seen.items() for offset in offsets)
    assert len(total) == 24 * 8 + 1 and sorted(total.values()) == [1] * (24 * 8 + 1 - 23) + [2] * 23
    order = list(dict.fromkeys(document for document, _, _ in laid))
    assert order != sorted(order), "documents are in a seeded order"
    assert 10 not in order, "an empty document is passed over"


def test_a_split_without_a_sample_is_refused() -> None:
    assert stream(sequence_length=198).samples_per_epoch == 1
    with pytest.raises(DataError, match=r"split 'valid' holds 199 tokens in 8 documents: .* \+ 1 = 200.*data\.split"):
        stream(sequence_length=199, split="valid")
    with pytest.raises(DataError, match="holds 0 tokens in 0 documents"):
        TokenStream(np.arange(0), np.arange(0), "test", 4, 1)


@settings(max_examples=200, deadline=None)
@given(count=st.integers(0, 500), ratio=st.tuples(*[st.integers(0, 1000)] * 3).filter(any), other=st.integers(0, 10))
def test_splits_part_the_documents(count: int, ratio: tuple[int, int, int], other: int) -> None:
    parts = [split_documents(count, ratio, split) for split in SPLITS]
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    for part, share in zip(parts, ratio, strict=True):
        assert np.array_equal(part, np.sort(part))
        if share == 0:
            assert len(part) == 0
        elif count >= 3:
            assert len(part) >= 1
            assert abs(len(part) - count * share / sum(ratio)) <= 2 + 1


def test_split_is_scattered_over_the_documents() -> None:
    held_out = split_documents(1000, [900, 100, 0], "valid")
    assert len(held_out) == 100 and 350 < held_out.mean() < 650 and held_out.max() - held_out.min() > 800


@pytest.mark.parametrize("ratio", [[1, 2], [0, 0, 0], [1, -1, 1], [1, float("nan"), 1]])
def test_bad_ratio_is_refused(ratio: list[float]) -> None:
    with pytest.raises(DataError, match=r"data\.split"):
        split_documents(10, ratio, "train")


@pytest.mark.parametrize("step", [0, 1, 977])
def test_ids_of_a_step_are_the_same_in_every_layout(step: int) -> None:
    batch = 24
    expected = sample_ids_for(step, batch).tolist()
    assert expected == list(range(step * batch, (step + 1) * batch))
    for degree in (1, 2, 3, 4, 8):
        for size in (1, 2, 3, 4, 6, 12, 24):
            if batch % (degree * size):
                continue
            read: list[int] = []
            for rank in range(degree):
                for microbatch in range(batch // (degree * size)):
                    ids = microbatch_ids(step * batch, microbatch, size, rank, degree)
                    assert ids.shape == (size,) and ids.dtype == np.int64
                    assert ids[0] == step * batch + (microbatch * degree + rank) * size
                    read.extend(ids.tolist())
            assert Counter(read) == Counter(expected), (degree, size)


def test_sample_ids_are_checked() -> None:
    assert as_ids([3, 1]).tolist() == [3, 1]
    for bad in ([-1], [[1]], 3):
        with pytest.raises(ValueError, match="sample ids"):
            as_ids(bad)
