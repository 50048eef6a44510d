"""The index builders: equal natively and in Python, and to Megatron's loops, which are written down here."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilith.data import index
from trilith.errors import DataError
from trilith.kernels import library

native = pytest.mark.skipif(library.LIBRARY is None, reason=library.MISSING)
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda lengths: sum(lengths) > 1)


def ends_of(lengths: list[int]) -> index.Ids:
    return np.cumsum(lengths, dtype=np.int64)


def megatron_sample_index(lengths: list[int], sequence_length: int) -> list[tuple[int, int]]:
    """`build_sample_idx` of Megatron-LM's helpers.cpp, for one epoch."""
    found, document, offset = [(0, 0)], 0, 0
    for _ in range((sum(lengths) - 1) // sequence_length):
        remaining = sequence_length + 1
        while remaining:
            available = lengths[document] - offset
            remaining -= available
            if remaining <= 0:
                offset += remaining + available - 1
                remaining = 0
            else:
                document, offset = document + 1, 0
        found.append((document, offset))
    return found


@native
@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, length=st.integers(1, 50), data=st.data())
def test_runs_are_equal(lengths: list[int], length: int, data: st.DataObject) -> None:
    length = min(length, sum(lengths))
    chosen = data.draw(st.lists(st.integers(0, sum(lengths) - length), max_size=9))
    positions, ends = np.array(chosen, dtype=np.int64), ends_of(lengths)
    ours, truth = index.sample_runs(ends, positions, length), index.sample_runs_in_python(ends, positions, length)
    for name in ("starts", "slots", "offsets", "lengths"):
        assert getattr(ours, name).tolist() == getattr(truth, name).tolist(), name
    tokens = np.arange(sum(lengths))
    for position, (low, high) in zip(chosen, pairwise(ours.starts.tolist()), strict=True):
        laid = [
            tokens[(ends[slot - 1] if slot else 0) + offset :][:count]
            for slot, offset, count in zip(
                *(a[low:high] for a in (ours.slots, ours.offsets, ours.lengths)), strict=True
            )
        ]
        assert np.concatenate(laid).tolist() == list(range(position, position + length))


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, sequence_length=st.integers(1, 50))
def test_the_sample_index_is_megatrons(lengths: list[int], sequence_length: int) -> None:
    sequence_length = min(sequence_length, sum(lengths) - 1)
    found = index.sample_index(ends_of(lengths), sequence_length)
    assert np.array_equal(found, index.sample_index_in_numpy(ends_of(lengths), sequence_length))
    starts = [0 if lengths[0] else next(i for i, length in enumerate(lengths) if length)]
    expected = megatron_sample_index(lengths, sequence_length)
    expected[0] = (starts[0], 0)  # Megatron's first sample begins with the first document, be it empty
    assert found.tolist() == [list(place) for place in expected]


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=7), size=st.integers(0, 200))
def test_the_blend_keeps_to_its_shares(weights: list[float], size: int) -> None:
    choices, samples = index.blend_index(weights, size)
    shares = np.asarray(weights) / np.sum(weights)
    truth = index.blend_index_in_python(shares, size)
    assert np.array_equal(choices, truth[0]) and np.array_equal(samples, truth[1])
    for dataset, share in enumerate(shares):
        mine = samples[choices == dataset]
        assert mine.tolist() == list(range(len(mine))), "each sample of a data set once, in order"
        assert abs(len(mine) - share * size) <= len(weights)


def test_what_cannot_be_indexed_is_refused() -> None:
    for weights in ([], [1.0, 0.0], [1.0, -1.0], [float("nan")], [float("inf"), 1.0]):
        with pytest.raises(DataError, match="weights are positive"):
            index.blend_index(weights, 3)
    with pytest.raises(DataError, match="5 tokens: one sample takes 6"):
        index.sample_index(ends_of([2, 3]), 5)
    with pytest.raises(AssertionError):
        index.sample_runs(ends_of([2, 3]), np.array([1], dtype=np.int64), 5)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = index.sample_index(ends_of([3, 0, 9]), 4), index.blend_index([2, 1], 9)
    monkeypatch.delitem(sys.modules, "trilith._kernels", raising=False)
    without = index.sample_index(ends_of([3, 0, 9]), 4), index.blend_index([2, 1], 9)
    assert np.array_equal(with_it[0], without[0])
    assert all(np.array_equal(a, b) for a, b in zip(with_it[1], without[1], strict=True))
    assert index.sample_runs(ends_of([3, 0, 9]), np.array([1], dtype=np.int64), 5).lengths.tolist() == [2, 3]
