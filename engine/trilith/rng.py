"""Makes the keys of random streams: one stream per (seed, site), wherever and however often the site is computed.

Random numbers belong to the model, not to the layout (`kernels/stream.py` turns a key and global indices into
numbers). A key therefore depends on the run's seed and on canonical names only: never on a rank, a microbatch or the
order of calls.
"""

from __future__ import annotations

import hashlib


def stream_key(seed: int, *site: str | int) -> tuple[int, int]:
    """The two 32-bit words that key the Philox stream of `site`, e.g. `stream_key(seed, "dropout", "layers.3.mlp")`.

    The words are the first and the last four bytes (little-endian) of an 8-byte BLAKE2b digest. What is hashed is the
    seed and then each part of the site, every one written as a tag (`i` or `s`), its length in bytes as 8 little-endian
    bytes, and its bytes (an integer in decimal ASCII, a string in UTF-8), so that no two sites share an encoding.

    Raises TypeError for a part that is neither a string nor an integer (a bool is refused: `True` is not the site 1).
    """
    digest = hashlib.blake2b(b"".join(_encode(part) for part in (seed, *site)), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _encode(part: str | int) -> bytes:
    """One part of a site as tag, length and content."""
    if isinstance(part, bool) or not isinstance(part, (str, int)):
        raise TypeError(
            f"stream_key: {part!r} is a {type(part).__name__}; a seed is an int, a site is made of str and int"
        )
    tag, content = (b"s", part.encode()) if isinstance(part, str) else (b"i", str(part).encode())
    return tag + len(content).to_bytes(8, "little") + content
