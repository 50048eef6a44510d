"""Random streams against their published vectors, an independent numpy version, the exact distribution and themselves."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch

from trilith.errors import KernelError
from trilith.kernels import stream
from trilith.sharding import Box, whole

KEY = (0x0BADCAFE, 0x12345678)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = ["auto", "torch"]  # the native library where it was built, and torch's ops
FULL = 0xFFFFFFFF
# Random123, tests/kat_vectors: counter, key, result.
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL,) * 4, (FULL, FULL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)

NORMALS = (
    "-0x1.0222f8a9efe7ep+1",
    "0x1.f6c4261204fb3p-3",
    "-0x1.06824c11da815p+0",
    "0x1.625cabd3b9773p+0",
    "-0x1.50c014dbbeb66p-2",
    "-0x1.0fc85f6cdbbddp-4",
    "-0x1.53f0f3f878026p-1",
    "0x1.4681df5355536p-2",
)
DROPOUT_BITS = "11001011110101000011010111001010"
ATTENTION_BITS = "01001101000000111010001011010010"


def numpy_philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of counters (n, 4), in uint64."""
    c = counter.astype(np.uint64).T.copy()
    mask, k = np.uint64(FULL), list(key)
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        c = np.stack(
            [(p1 >> shift) ^ c[1] ^ np.uint64(k[0]), p1 & mask, (p0 >> shift) ^ c[3] ^ np.uint64(k[1]), p0 & mask]
        )
        k = [(k[0] + 0x9E3779B9) & FULL, (k[1] + 0xBB67AE85) & FULL]
    return c.T


def numpy_inverse_normal(word: np.ndarray) -> np.ndarray:
    """The normal number of 32-bit words, by the specification in the docstring of kernels/stream.py."""
    u = (word.astype(np.float64) + 0.5) / 4294967296.0
    q = u - 0.5
    r = 0.180625 - q * q
    centre = (q * (((59.109374720 * r + 159.29113202) * r + 50.434271938) * r + 3.3871327179)) / (
        ((67.187563600 * r + 78.757757664) * r + 17.895169469) * r + 1.0
    )
    mantissa, exponent = np.frexp(0.5 - np.abs(q))
    low = mantissa < float.fromhex("0x1.6a09e667f3bcdp-1")
    mantissa, exponent = np.where(low, 2.0 * mantissa, mantissa), np.where(low, exponent - 1, exponent)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    y = s * s
    series = ((((2 / 11 * y + 2 / 9) * y + 2 / 7) * y + 2 / 5) * y + 2 / 3) * y + 2.0
    log = exponent * float.fromhex("0x1.62e42fefa39efp-1") + s * series
    root = -log * 0.1674 + 1.289
    for _ in range(3):
        root = (root + -log / root) * 0.5
    t = root - 1.6
    far = (((0.17023821103 * t + 1.3067284816) * t + 2.7568153900) * t + 1.4234372777) / (
        (0.12021132975 * t + 0.73700164250) * t + 1.0
    )
    return np.where(np.abs(q) <= 0.425, centre, np.copysign(far, q))


def numpy_words(indices: np.ndarray) -> np.ndarray:
    block = indices >> 2
    nought = np.zeros_like(block)
    words = numpy_philox(np.stack([block & FULL, block >> 32, nought, nought], axis=1), KEY)
    return words[np.arange(len(indices)), indices & 3]


@pytest.mark.parametrize("device", DEVICES)
def test_published_vectors(device: str) -> None:
    for counter, key, expected in KNOWN:
        words = stream.philox4x32(tuple(torch.tensor([c], device=device) for c in counter), key)  # type: ignore[arg-type]
        assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize("device", DEVICES)
def test_philox_broadcasts_and_equals_numpy(device: str) -> None:
    generator = np.random.default_rng(0)
    parts = [generator.integers(0, 2**32, size) for size in ((5, 1, 1), (1, 7, 1), (5, 1, 1), (1, 1, 11))]
    counter = np.stack(np.broadcast_arrays(*parts), axis=-1).reshape(-1, 4)
    words = stream.philox4x32(tuple(torch.tensor(part, device=device) for part in parts), KEY)  # type: ignore[arg-type]
    ours = torch.stack(words, dim=-1).reshape(-1, 4).cpu().numpy()
    assert np.array_equal(ours, numpy_philox(counter, KEY).astype(np.int64))


# --- normal numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_normal_equals_numpy_bit_for_bit(device: str) -> None:
    """Nothing is fused and nothing is approximated by a library, in vector loops and in their remainders."""
    indices = np.arange(150_001, dtype=np.int64) * 3
    ours = stream.normal(KEY, torch.tensor(indices, device=device)).cpu().numpy()
    assert np.array_equal(ours, numpy_inverse_normal(numpy_words(indices)))


@pytest.mark.parametrize("device", DEVICES)
def test_inverse_normal_at_its_edges(device: str) -> None:
    """The ends of the range, and around the change of formula at |q| = 0.425."""
    edge = round(0.925 * 2**32)
    words = np.array([*range(40), *range(edge - 40, edge + 40), 2**31 - 1, 2**31, *range(2**32 - 40, 2**32)])
    words = np.concatenate([words, FULL - words])
    centred = stream._centred(torch.tensor(words - 2**31, device=device))
    ours = stream._inverse_normal(centred).cpu().numpy()
    assert np.array_equal(ours, numpy_inverse_normal(words))
    assert np.array_equal(ours[: len(words) // 2], -ours[len(words) // 2 :])
    exact = [NormalDist().inv_cdf((int(word) + 0.5) / 2**32) for word in words]
    assert np.abs(ours - exact).max() < 1e-6


def test_normal_is_the_normal_distribution() -> None:
    count = 1 << 20
    sample = stream.fill_box(KEY, (count,), whole((count,)), "normal", 1.0, torch.float64, "cpu").numpy()
    exact = [NormalDist().inv_cdf((int(w) + 0.5) / 2**32) for w in numpy_words(np.arange(20_000))]
    assert np.abs(sample[:20_000] - exact).max() < 1e-6
    error = count**-0.5
    assert abs(sample.mean()) < 4 * error
    assert abs(sample.var() - 1.0) < 4 * 2**0.5 * error
    assert abs((sample**3).mean()) < 4 * 15**0.5 * error
    assert abs((sample**4).mean() - 3.0) < 4 * 96**0.5 * error
    for distance in (1, 2, 3, 4, 1024):
        assert abs((sample[distance:] * sample[:-distance]).mean()) < 4 * error
    other = stream.fill_box((KEY[0], KEY[1] + 1), (count,), whole((count,)), "normal", 1.0, torch.float64, "cpu")
    assert abs((sample * other.numpy()).mean()) < 4 * error


def test_values_are_fixed() -> None:
    """A change of these changes every model's initial weights."""
    values = stream.normal((1, 2), torch.tensor([0, 1, 2, 3, 4, 2**32, 2**34, 2**40 + 5]))
    assert [float(value).hex() for value in values] == list(NORMALS)


BOXES = (
    ((), Box((), ())),
    ((1,), Box((0,), (1,))),
    ((1000,), Box((1,), (998,))),
    ((37, 50), Box((3, 7), (36, 44))),
    ((37, 52), Box((0, 13), (37, 39))),
    ((64, 48), Box((16, 0), (32, 48))),
    ((40, 9), Box((0, 8), (40, 9))),
    ((5, 7, 11), Box((1, 2, 3), (4, 7, 9))),
    ((5, 8, 12), Box((1, 0, 4), (4, 8, 8))),
    ((5, 7, 11), Box((2, 3, 0), (4, 5, 11))),
    ((3, 4, 5, 6), Box((1, 1, 0, 0), (2, 3, 5, 6))),
    ((6, 6), Box((2, 3), (2, 6))),
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("piece", [None, 16])
@pytest.mark.parametrize(("shape", "box"), BOXES, ids=str)
def test_any_box_is_the_slice_of_the_whole(
    backend: str, shape: tuple[int, ...], box: Box, piece: int | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a tensor is cut and worked through, each element keeps its value."""
    numel = whole(shape).numel
    everything = stream.normal(KEY, torch.arange(numel, device=device)).mul(0.02).float().view(shape)
    if piece is not None:
        monkeypatch.setattr(stream, "_CPU_PIECE", piece)
        monkeypatch.setattr(stream, "_GPU_PIECE", piece)
    ours = stream.fill_box(KEY, shape, box, "normal", 0.02, torch.float32, device, backend=backend)
    part = everything[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))]
    assert ours.shape == box.shape and ours.is_contiguous()
    assert torch.equal(ours, part)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_boxes_cross_pieces(backend: str) -> None:
    shape = (301, 1003)
    everything = stream.fill_box(KEY, shape, whole(shape), "normal", 1.0, torch.float64, "cpu", backend=backend)
    assert torch.equal(everything.view(-1), stream.normal(KEY, torch.arange(everything.numel())))
    part = stream.fill_box(KEY, shape, Box((1, 2), (301, 1001)), "normal", 1.0, torch.float64, "cpu", backend=backend)
    assert torch.equal(part, everything[1:, 2:1001])


@pytest.mark.parametrize("backend", BACKENDS)
def test_indices_beyond_32_bits(backend: str) -> None:
    """A tensor of 2^40 elements: the second counter word counts."""
    side = 1 << 20
    box = Box((side - 2, side - 9), (side, side))
    ours = stream.fill_box(KEY, (side, side), box, "normal", 1.0, torch.float64, "cpu", backend=backend)
    rows, columns = np.arange(side - 2, side)[:, None], np.arange(side - 9, side)
    indices = (rows * side + columns).reshape(-1)
    assert np.array_equal(ours.numpy().reshape(-1), numpy_inverse_normal(numpy_words(indices)))
    beyond = torch.tensor([0, 1 << 34, 1 << 35])
    assert len(set(stream.normal(KEY, beyond).tolist())) == 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_the_rounded_master(backend: str, dtype: torch.dtype) -> None:
    shape = (64, 513)
    master = stream.fill_box(KEY, shape, whole(shape), "normal", 0.02, torch.float32, "cpu", backend=backend)
    assert torch.equal(
        stream.fill_box(KEY, shape, whole(shape), "normal", 0.02, dtype, "cpu", backend=backend), master.to(dtype)
    )
    exact = stream.fill_box(KEY, shape, whole(shape), "normal", 1.0, torch.float64, "cpu", backend=backend)
    assert torch.equal(master, (exact * 0.02).to(torch.float32))


def test_constants_and_unknown_kinds() -> None:
    box = Box((1, 0), (3, 2))
    assert torch.equal(
        stream.fill_box(KEY, (3, 2), box, "ones", 0.0, torch.bfloat16, "cpu"), torch.ones(2, 2).bfloat16()
    )
    assert torch.equal(
        stream.fill_box(KEY, (3, 2), box, "zeros", 0.0, torch.float64, "cpu"), torch.zeros(2, 2).double()
    )
    with pytest.raises(KernelError, match="'uniform'"):
        stream.fill_box(KEY, (3, 2), box, "uniform", 1.0, torch.float32, "cpu")


# --- dropout ------------------------------------------------------------------------------------------------------


def numpy_keep(high: np.ndarray, middle: np.ndarray, low: np.ndarray, last: np.ndarray, p: float) -> np.ndarray:
    """Decision of each (counter words 0 to 2, feature or key position): one call each, by the specification."""
    high, middle, low, last = (
        np.asarray(part, dtype=np.int64) for part in np.broadcast_arrays(high, middle, low, last)
    )
    counter = np.stack([high, middle, low, last >> 3], axis=-1).reshape(-1, 4)
    words = numpy_philox(counter, KEY)
    decision = last.reshape(-1) & 7
    word = words[np.arange(len(words)), decision >> 1]
    half = np.where(decision & 1, word >> np.uint64(16), word & np.uint64(0xFFFF))
    return (half >= round(p * 65536)).reshape(last.shape)


SAMPLES = (0, 7, 2**32 + 7, 2**47 + 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", DEVICES)
def test_dropout_follows_the_specification(backend: str, device: str) -> None:
    samples, positions = np.array(SAMPLES), np.array([0, 1, 5, 70_000])
    ours = stream.dropout_keep(
        KEY, torch.tensor(samples, device=device), torch.tensor(positions, device=device), (3, 29), 0.3, backend=backend
    )
    s, x, f = samples[:, None, None], positions[:, None], np.arange(3, 29)
    assert np.array_equal(ours.cpu().numpy(), numpy_keep(s >> 32, x, s & FULL, f, 0.3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", DEVICES)
def test_attention_follows_the_specification(backend: str, device: str) -> None:
    samples, queries = np.array(SAMPLES), np.array([2, 3, 900])
    ours = stream.attention_keep(
        KEY,
        torch.tensor(samples, device=device),
        (2, 5),
        torch.tensor(queries, device=device),
        (1, 20),
        0.3,
        backend=backend,
    )
    s, h = samples[:, None, None, None], np.arange(2, 5)[:, None, None]
    expected = numpy_keep(h + ((s >> 32) << 16), queries[:, None], s & FULL, np.arange(1, 20), 0.3)
    assert np.array_equal(ours.cpu().numpy(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("piece", [None, 4])
def test_sub_ranges_of_dropout(backend: str, device: str, piece: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = torch.arange(5, device=device) * 3 + 2**33
    positions = torch.arange(13, device=device)
    everything = stream.dropout_keep(KEY, samples, positions, (0, 45), 0.4, backend=backend)
    assert everything.shape == (5, 13, 45) and everything.dtype == torch.bool
    if piece is not None:
        monkeypatch.setattr(stream, "_CPU_PIECE", piece)
        monkeypatch.setattr(stream, "_GPU_PIECE", piece)
    for lo, hi in ((0, 45), (8, 24), (3, 5), (7, 9), (13, 45), (44, 45), (5, 5)):
        some = torch.tensor([4, 1], device=device)
        part = stream.dropout_keep(KEY, samples[some], positions[4:9], (lo, hi), 0.4, backend=backend)
        assert torch.equal(part, everything[some, 4:9, lo:hi])
    own = torch.stack([positions.flip(0), positions, positions, positions, positions])
    per_sample = stream.dropout_keep(KEY, samples, own, (2, 30), 0.4, backend=backend)
    assert torch.equal(per_sample[0], everything[0, :, 2:30].flip(0))
    assert torch.equal(per_sample[1:], everything[1:, :, 2:30])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("piece", [None, 4])
def test_sub_ranges_of_attention(backend: str, device: str, piece: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, places = torch.arange(3, device=device) + 2**32 - 1, torch.arange(27, device=device)
    everything = stream.attention_keep(KEY, samples, (0, 6), places, (0, 27), 0.4, backend=backend)
    assert everything.shape == (3, 6, 27, 27)
    if piece is not None:
        monkeypatch.setattr(stream, "_CPU_PIECE", piece)
        monkeypatch.setattr(stream, "_GPU_PIECE", piece)
    part = stream.attention_keep(KEY, samples[1:2], (2, 4), places[5:20], (3, 22), 0.4, backend=backend)
    assert torch.equal(part, everything[1:2, 2:4, 5:20, 3:22])
    for keys in (places, places[4:11], torch.tensor([26, 0, 9, 8, 9], device=device), places[:0]):
        part = stream.attention_keep(KEY, samples, (5, 6), places[3:], keys, 0.4, backend=backend)
        assert torch.equal(part, everything[:, 5:6, 3:].index_select(3, keys))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_are_fixed(backend: str) -> None:
    """A change of these changes every run with dropout."""
    sample, position = torch.tensor([3]), torch.tensor([5])
    kept = stream.dropout_keep((1, 2), sample, position, (0, 32), 0.5, backend=backend).view(-1)
    assert "".join(str(int(bit)) for bit in kept) == DROPOUT_BITS
    kept = stream.attention_keep((1, 2), sample, (4, 5), position, (0, 32), 0.5, backend=backend).view(-1)
    assert "".join(str(int(bit)) for bit in kept) == ATTENTION_BITS


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_are_independent(backend: str) -> None:
    """The share kept is 1 - p, over the whole and per feature; neighbours, sites and samples do not go together."""
    samples, positions, p = torch.arange(16), torch.arange(64), 0.1
    keep = stream.dropout_keep(KEY, samples, positions, (0, 512), p, backend=backend).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(float(keep.mean()) - (1 - p)) < 5 * deviation * keep.numel() ** -0.5
    assert float((keep.mean(dim=(0, 1)) - (1 - p)).abs().max()) < 5 * deviation * (16 * 64) ** -0.5
    centred = (keep - (1 - p)) / deviation
    limit = 5 * keep.numel() ** -0.5
    other = stream.dropout_keep((KEY[0] + 1, KEY[1]), samples, positions, (0, 512), p, backend=backend).double()
    assert abs(float((centred * (other - (1 - p)) / deviation).mean())) < limit
    for dim in range(3):
        for distance in (1, 2, 8):
            assert abs(float((centred * centred.roll(distance, dim)).mean())) < limit


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_and_bounds(backend: str) -> None:
    assert stream.keep_scale(0.0) == 1.0 and stream.keep_scale(0.5) == 2.0
    assert stream.keep_scale(0.1) == 65536 / (65536 - 6554)
    samples, positions = torch.arange(4), torch.arange(64)
    assert stream.dropout_keep(KEY, samples, positions, (0, 64), 0.0, backend=backend).all()
    rare = stream.dropout_keep(KEY, samples, positions, (0, 64), 1 - 2**-16, backend=backend)
    assert rare.sum() < 8
    for p in (1.0, 1.5, -0.1, 0.999999):
        with pytest.raises(KernelError, match="dropout probability"):
            stream.keep_scale(p)
        with pytest.raises(KernelError, match="dropout probability"):
            stream.dropout_keep(KEY, samples, positions, (0, 64), p, backend=backend)
