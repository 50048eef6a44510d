"""Learnable tokens without a file: a pure function of (seed, split, sample index), for tests and benchmarks.

A sample is a noisy affine recurrence modulo the vocabulary, x' = (a x + b) mod V with one (a, b) per seed. With
probability 1/16 a position starts anew, with the end-of-document token (one time in four) or a uniform token. A model
that has learnt the recurrence pays only for the restarts: the loss falls from ln V to about 0.27 + 0.05 ln V nats.
"""

from __future__ import annotations

import hashlib
from math import gcd

import numpy as np
import numpy.typing as npt

from trilith.data.sampler import Ids, hash_indices, key64, mix64

_RESTART = 1 << 28  # of 2^32: one position in 16
_EOD = 1 << 30  # of 2^32: one restart in four


class SyntheticSource:
    """Windows of sequence_length + 1 synthetic tokens. Attributes: `samples_per_epoch` (so many that it never repeats),
    `fingerprint`.
    """

    samples_per_epoch = 1 << 40

    def __init__(self, split: str, sequence_length: int, vocab_size: int, seed: int, eod_token: int = 0) -> None:
        assert vocab_size >= 2, vocab_size
        self.sequence_length, self.vocab_size, self.eod_token = sequence_length, vocab_size, eod_token
        self._key = key64(seed, "data.synthetic", split)
        multiplier, increment = _full_period(seed, vocab_size)
        self._powers, self._sums = _affine_powers(multiplier, increment, vocab_size, sequence_length + 1)
        text = f"synthetic/{split}/{sequence_length}/{vocab_size}/{seed}/{eod_token}"
        self.fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def windows(self, ids: Ids) -> npt.NDArray[np.int64]:
        """Tokens of the samples `ids` (n,); (n, sequence_length + 1) int64 in [0, vocab_size)."""
        at = np.arange(self.sequence_length + 1, dtype=np.int64)
        rows = hash_indices(self._key, ids)[:, None]
        noise = mix64(rows + hash_indices(self._key, at)[None, :])
        restarts = (noise & np.uint64(0xFFFFFFFF)) < np.uint64(_RESTART)
        restarts[:, 0] = True
        origin = np.maximum.accumulate(np.where(restarts, at, 0), axis=1)
        fresh = mix64(noise)
        values = ((fresh >> np.uint64(32)) % np.uint64(self.vocab_size)).astype(np.int64)
        values = np.where((fresh & np.uint64(0xFFFFFFFF)) < np.uint64(_EOD), self.eod_token, values)
        start = np.take_along_axis(values, origin, axis=1)
        return (self._powers[at - origin] * start + self._sums[at - origin]) % self.vocab_size


def _full_period(seed: int, modulus: int) -> tuple[int, int]:
    """(a, b) of the seed for which x -> (a x + b) mod modulus runs through every token (Hull and Dobell 1962): b is
    coprime to the modulus, and a - 1 is divisible by its prime factors, and by 4 if it is.
    """
    increment = 1 + int(key64(seed, "data.synthetic.increment") % np.uint64(modulus))
    while gcd(increment, modulus) != 1:
        increment += 1
    factor = next(f for f in range(1, modulus + 1) if modulus % f == 0 and pow(f, 64, modulus) == 0)
    if modulus % 4 == 0 and factor % 4 != 0:
        factor *= 2
    choice = int(key64(seed, "data.synthetic.multiplier") % np.uint64(modulus // factor))
    return 1 + factor * choice, increment % modulus


def _affine_powers(multiplier: int, increment: int, modulus: int, count: int) -> tuple[Ids, Ids]:
    """(p, q): k applications of x -> multiplier x + increment are x -> p[k] x + q[k], all modulo `modulus`."""
    powers, sums = [1 % modulus], [0]
    for _ in range(count - 1):
        powers.append(powers[-1] * multiplier % modulus)
        sums.append((sums[-1] * multiplier + increment) % modulus)
    return np.array(powers, dtype=np.int64), np.array(sums, dtype=np.int64)
