"""Keys of random streams: fixed for ever, distinct for distinct sites, independent of the process."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from trilith.rng import stream_key

KEYS = (
    (0xCA0829E7, 0x0AD091A1),
    (0x4AF84C4C, 0xD1A1DE6D),
    (0xDD940EF0, 0x1C09D63D),
    (0x55B43A5A, 0xCDB1EC5F),
)


def test_keys_are_fixed() -> None:
    """A change of these values changes every run: initial weights, data order, dropout."""
    assert stream_key(1234, "init", "embedding.weight") == KEYS[0]
    assert stream_key(0) == KEYS[1]
    assert stream_key(-1, "dropout", "layers.3.mlp", 7) == KEYS[2]
    assert stream_key(2**80, "größe") == KEYS[3]


def test_sites_never_share_an_encoding() -> None:
    sites: list[tuple[str | int, ...]] = [
        (),
        ("",),
        ("", ""),
        ("a", "b"),
        ("ab",),
        ("ab", ""),
        ("", "ab"),
        (1,),
        ("1",),
        (1, 2),
        (12,),
        ("1", 2),
        (1, "2"),
        (-1,),
        ("a\0b",),
        ("i\1",),
    ]
    keys = [stream_key(seed, *site) for seed in (0, 1, 12) for site in sites]
    assert len(set(keys)) == len(keys)


def test_words_look_random() -> None:
    """Each of the 64 bits is set in about half of the keys, also between neighbouring sites."""
    keys = [stream_key(3, "site", number) for number in range(2000)]
    assert all(0 <= word < 2**32 for key in keys for word in key)
    for word, bit in itertools.product(range(2), range(32)):
        share = sum(key[word] >> bit & 1 for key in keys) / len(keys)
        assert abs(share - 0.5) < 0.06


def test_same_in_another_process() -> None:
    code = "from trilith.rng import stream_key; print(stream_key(5, 'x', 2))"
    command = [sys.executable, "-c", code]
    outputs = {
        subprocess.run(
            command,
            env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout.strip()
        for seed in ("0", "1")
    }
    assert outputs == {str(stream_key(5, "x", 2))}


@pytest.mark.parametrize("part", [True, 1.5, None, b"x", ("a",)])
def test_other_types_are_refused(part: object) -> None:
    with pytest.raises(TypeError, match="stream_key"):
        stream_key(0, part)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="stream_key"):
        stream_key(part)  # type: ignore[arg-type]
