"""What tells one row's text from another's: a fingerprint, and word shingles.

Responsibility: hashes of texts that are the same on every machine, and the bands
by which similar texts find each other. Does not know which rows are kept.
"""

from __future__ import annotations

import functools
import hashlib
import re
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Words of a shingle.
SIZE = 3
FINGERPRINT_BYTES = 16
# Hash functions of a signature, in bands of equally many.
_FUNCTIONS = 128
# Share of the pairs at the threshold that must meet in some band.
_RECALL = 0.99
# Scripts without spaces between words count a character as a word.
_ALONE = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")

Shingles = npt.NDArray[np.uint32]


def fingerprint(texts: Sequence[str]) -> bytes:
    """16 bytes that equal texts share, and no others do."""
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=FINGERPRINT_BYTES).digest()


def shingles(text: str) -> Shingles:
    """The set of a text's word shingles, each a hash, sorted.

    Case and punctuation don't count. A text of fewer words than a shingle has is
    one shingle; a text without words has none.
    """
    words = [zlib.crc32(word.encode()) for word in _WORD.findall(text.lower())]
    if not words:
        return np.empty(0, dtype=np.uint32)
    hashed = np.array(words, dtype=np.uint64)
    size = min(SIZE, len(words))
    mixed = np.zeros(len(words) - size + 1, dtype=np.uint64)
    for offset in range(size):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + hashed[offset : offset + len(mixed)]
        mixed ^= mixed >> np.uint64(29)
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


def band_shape(threshold: float) -> tuple[int, int]:
    """(bands, hash functions of each) that find pairs of that similarity.

    Two sets of Jaccard similarity s share a band of r functions with
    probability s^r, and one of b bands with 1 - (1 - s^r)^b (Leskovec, Rajaraman
    and Ullman, Mining of Massive Datasets, 3.4). As many functions as keep that
    at `_RECALL` for the threshold.
    """
    for functions in range(_FUNCTIONS, 1, -1):
        count = _FUNCTIONS // functions
        if 1 - (1 - threshold**functions) ** count >= _RECALL:
            return count, functions
    return _FUNCTIONS, 1


def bands(
    found: Shingles, sizes: npt.NDArray[np.int32], threshold: float
) -> npt.NDArray[np.uint64]:
    """MinHash signatures (Broder, 1997), hashed by bands.

    Args:
        found: shingles of several texts, one after the other.
        sizes: shingles of each text.
        threshold: Jaccard similarity of the pairs to be found.

    Returns:
        uint64, shape (texts, bands); zeros for a text without shingles.
    """
    count, functions = band_shape(threshold)
    made = np.zeros((len(sizes), count), dtype=np.uint64)
    full = sizes > 0
    starts = (np.cumsum(sizes) - sizes)[full]
    if not len(starts):
        return made
    wide = found.astype(np.uint64)
    for number, (factor, shift) in enumerate(_functions()[: count * functions]):
        least = np.minimum.reduceat((wide * factor + shift) >> np.uint64(32), starts)
        band = made[full, number // functions]
        band = (band ^ least) * np.uint64(0x9E3779B97F4A7C15)
        made[full, number // functions] = band ^ (band >> np.uint64(31))
    return made


@functools.cache
def _functions() -> tuple[tuple[np.uint64, np.uint64], ...]:
    """Multiply-shift hash functions (Dietzfelbinger et al., 1997), the same for ever."""
    numbers = []
    for number in range(2 * _FUNCTIONS):
        digest = hashlib.blake2b(f"minhash {number}".encode(), digest_size=8).digest()
        numbers.append(int.from_bytes(digest, "little"))
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return tuple((np.uint64(factor | 1), np.uint64(shift)) for factor, shift in pairs)
