"""Indices over documents: which tokens a sample holds, where each sample begins, which data set of a blend it comes from.

What Megatron-LM's `helpers.cpp` builds (`build_sample_idx`, `build_blending_indices`). Each function has its meaning in
numpy or plain Python here, and the same loop in csrc/data, to the last bit. The native one is taken where the library is
loaded already (`kernels/library.py` loads it, after torch): this room loads neither.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.errors import DataError

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Runs:
    """Consecutive tokens that make up samples: sample i has the runs [starts[i], starts[i + 1]), and run r is lengths[r]
    tokens of document slots[r] from its token offsets[r] on. `starts` (samples + 1,), the others (runs,); int64.
    """

    starts: Ids
    slots: Ids
    offsets: Ids
    lengths: Ids


def sample_runs(ends: Ids, positions: Ids, length: int) -> Runs:
    """The runs of `length` tokens from each of `positions` (n,) of a stream of documents on.

    `ends` (documents,) int64: where each document ends in the stream, never decreasing. Samples lie within the last.
    """
    _check(ends, positions, length)
    native = _native()
    if native is None:
        return sample_runs_in_python(ends, positions, length)
    ends, positions = np.ascontiguousarray(ends), np.ascontiguousarray(positions)
    starts = np.empty(len(positions) + 1, dtype=np.int64)
    # Mostly a sample has few runs; where the guess is too small the count is known after the first call.
    capacity, count = 4 * len(positions), -1
    while count < 0 or count > capacity:
        capacity = max(count, capacity)
        table = np.empty((3, capacity), dtype=np.int64)
        found = [_address(table) + 8 * capacity * row for row in range(3)]
        inputs = (_address(ends), len(ends), _address(positions), len(positions))
        count = native.sample_runs(*inputs, length, capacity, _address(starts), *found)
    slots, offsets, lengths = table[:, :count]
    return Runs(starts, slots, offsets, lengths)


def sample_runs_in_python(ends: Ids, positions: Ids, length: int) -> Runs:
    """What `sample_runs` means."""
    starts, runs = [0], []
    for position in positions.tolist():
        missing, at = length, int(np.searchsorted(ends, position, side="right"))
        while missing:
            start = int(ends[at - 1]) if at else 0
            count = min(int(ends[at]) - position, missing)
            if count:
                runs.append((at, position - start, count))
            position, missing, at = position + count, missing - count, at + 1
        starts.append(len(runs))
    slots, offsets, lengths = np.array(runs, dtype=np.int64).reshape(-1, 3).T
    return Runs(np.array(starts, dtype=np.int64), slots, offsets, lengths)


def sample_index(ends: Ids, sequence_length: int) -> Ids:
    """Where every sample of an epoch begins, and where the last one ends: (samples + 1, 2) int64 document and offset.

    Samples are `sequence_length` + 1 tokens that overlap by one; `ends` as in `sample_runs`.
    """
    num_tokens = int(ends[-1]) if len(ends) else 0
    if sequence_length < 1 or num_tokens <= sequence_length:
        raise DataError(f"a sample index of {num_tokens} tokens: one sample takes {sequence_length + 1}")
    count = (num_tokens - 1) // sequence_length + 1
    native = _native()
    if native is None:
        return sample_index_in_numpy(ends, sequence_length)
    ends = np.ascontiguousarray(ends)
    slots, offsets = np.empty((2, count), dtype=np.int64)
    native.sample_starts(_address(ends), len(ends), sequence_length, count, _address(slots), _address(offsets))
    return np.stack((slots, offsets), axis=1)


def sample_index_in_numpy(ends: Ids, sequence_length: int) -> Ids:
    """What `sample_index` means."""
    positions = np.arange((int(ends[-1]) - 1) // sequence_length + 1, dtype=np.int64) * sequence_length
    slots = np.searchsorted(ends, positions, side="right")
    return np.stack((slots, positions - np.concatenate(([0], ends))[slots]), axis=1)


def blend_index(weights: Sequence[float], size: int) -> tuple[npt.NDArray[np.int16], Ids]:
    """The data set of each of `size` samples of a blend, and the sample's number within it: (size,) int16 and int64.

    Each sample comes from the data set that is furthest behind its share, the first of them where several are. `weights`
    are positive, of any sum. Raises DataError for others.
    """
    shares = np.asarray(weights, dtype=np.float64)
    if (
        shares.ndim != 1
        or not 1 <= len(shares) <= 2**15 - 1
        or not np.all((shares > 0) & np.isfinite(shares))
        or size < 0
    ):
        raise DataError(
            f"a blend of {size} samples with weights {list(weights)[:8]}: weights are positive, one a data set"
        )
    shares = shares / shares.sum()
    native = _native()
    if native is None:
        return blend_index_in_python(shares, size)
    choices, samples = np.empty(size, dtype=np.int16), np.empty(size, dtype=np.int64)
    native.blend(_address(shares), len(shares), size, _address(choices), _address(samples))
    return choices, samples


def blend_index_in_python(shares: npt.NDArray[np.float64], size: int) -> tuple[npt.NDArray[np.int16], Ids]:
    """What `blend_index` means, for `shares` that sum to 1."""
    taken = np.zeros(len(shares), dtype=np.int64)
    choices, samples = np.empty(size, dtype=np.int16), np.empty(size, dtype=np.int64)
    for i in range(size):
        furthest = int(np.argmax(shares * float(max(i, 1)) - taken))
        choices[i], samples[i] = furthest, taken[furthest]
        taken[furthest] += 1
    return choices, samples


def _check(ends: Ids, positions: Ids, length: int) -> None:
    assert ends.dtype == positions.dtype == np.int64 and length >= 0, (ends.dtype, positions.dtype, length)
    if len(positions):
        low, high = int(positions.min()), int(positions.max())
        assert low >= 0 and high + length <= (int(ends[-1]) if len(ends) else 0), (low, high, length)


def _native() -> Any:
    kernels = sys.modules.get("trilith._kernels")
    return None if kernels is None else kernels.data


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.ctypes.data)
