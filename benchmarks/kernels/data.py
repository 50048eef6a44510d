"""The index builders of csrc/data beside the loops in Python that they stand for."""

from __future__ import annotations

import numpy as np

from benchmarks.harness import Benchmark
from trilith.data import index
from trilith.kernels.library import LIBRARY, MISSING

NUM_DOCUMENTS, SEQUENCE, BATCH, BLENDED = 200_000, 1024, 64, 20_000
GOAL = 0.1


def cases(benchmark: Benchmark, rounds: int) -> None:
    """A batch's runs, an epoch's index, a blend."""
    if LIBRARY is None:
        benchmark.missing("data", "Python", MISSING)
        return
    generator = np.random.default_rng(3)
    for mean in (2000, 100):
        ends = np.cumsum(generator.integers(1, 2 * mean, NUM_DOCUMENTS), dtype=np.int64)
        positions = generator.integers(0, int(ends[-1]) - SEQUENCE - 1, BATCH)
        ours = index.sample_runs(ends, positions, SEQUENCE + 1)
        theirs = index.sample_runs_in_python(ends, positions, SEQUENCE + 1)
        assert all(
            np.array_equal(getattr(ours, name), getattr(theirs, name)) for name in ("starts", "slots", "offsets")
        )
        benchmark.compare(
            f"runs of {BATCH} samples of {SEQUENCE}, documents of {mean} tokens",
            lambda ends=ends, positions=positions: index.sample_runs(ends, positions, SEQUENCE + 1),
            lambda ends=ends, positions=positions: index.sample_runs_in_python(ends, positions, SEQUENCE + 1),
            peer_name="the loop in Python",
            goal=GOAL,
            rounds=rounds,
        )
        assert np.array_equal(index.sample_index(ends, SEQUENCE), index.sample_index_in_numpy(ends, SEQUENCE))
        benchmark.compare(
            f"sample index of {NUM_DOCUMENTS} documents of {mean} tokens",
            lambda ends=ends: index.sample_index(ends, SEQUENCE),
            lambda ends=ends: index.sample_index_in_numpy(ends, SEQUENCE),
            peer_name="numpy's searchsorted",
            rounds=rounds,
        )
    shares = np.array([0.5, 0.3, 0.2])
    for one, two in zip(index.blend_index(shares, 1000), index.blend_index_in_python(shares, 1000), strict=True):
        assert np.array_equal(one, two)
    benchmark.compare(
        f"blend of 3 data sets, {BLENDED} samples",
        lambda: index.blend_index(shares, BLENDED),
        lambda: index.blend_index_in_python(shares, BLENDED),
        peer_name="the loop in Python",
        goal=GOAL,
        rounds=min(rounds, 20),
    )
