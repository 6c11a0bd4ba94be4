"""Shuffles that are computed, not stored: a keyed bijection on [0, N) for any N. Pure numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_LENGTH", "mix", "permute"]

Words = NDArray[np.uint64]

#: Lengths are at most 2^53: beyond, a float64 no longer tells the number of bits exactly.
MAX_LENGTH = 1 << 53

# Over 400000 keys, 8 rounds give each order of 3 items its share within 2%, of 4 within 3%, of 5 within 7%; 6 rounds
# are three times worse. From 33 items on, the joint places of two items pass a chi-square test at that size.
_ROUNDS = 8


def mix(word: Words) -> Words:
    """Scramble 64-bit words one-to-one, so that neighbours become unrelated (the finalizer of SplitMix64).

    Examples
    --------
    >>> hex(mix(np.array([1], dtype=np.uint64))[0])
    '0x5692161d100b05e5'
    """
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def permute(position: Words, length: Words, key: Words) -> Words:
    """Return where a shuffle of ``length`` items puts each position; every key is another shuffle.

    Parameters
    ----------
    position, length, key : uint64 [n]
        Position in [0, length), number of items (1 to 2^53), and key of the shuffle, for each element on its own.

    Returns
    -------
    uint64 [n]
        For a fixed length and key, position -> result is a bijection on [0, length).

    Notes
    -----
    Each round multiplies by an odd number, adds, and folds the upper half of the bits onto the lower one: three
    bijections on the b-bit words, 2^b being the smallest power of two >= length. A result outside of [0, length) goes
    through again until it is inside (cycle walking), which stays a bijection and takes less than two passes on
    average. About 80 ns per element; no memory per item.

    Examples
    --------
    >>> three = np.full(3, 3, dtype=np.uint64)
    >>> sorted(permute(np.arange(3, dtype=np.uint64), three, three).tolist())
    [0, 1, 2]
    """
    bits = np.frexp((length - np.uint64(1)).astype(np.float64))[1].astype(np.uint64)
    result = _scramble(position, bits, key)
    outside = np.flatnonzero(result >= length)
    while outside.size:
        again = _scramble(result[outside], bits[outside], key[outside])
        result[outside] = again
        outside = outside[again >= length[outside]]
    return result


def _scramble(word: Words, bits: Words, key: Words) -> Words:
    mask = (np.uint64(1) << bits) - np.uint64(1)
    half = (bits + np.uint64(1)) >> np.uint64(1)
    for _ in range(_ROUNDS):
        key = key * np.uint64(0xD1342543DE82EF95) + np.uint64(0x9E3779B97F4A7C15)
        odd = (key ^ (key >> np.uint64(32))) | np.uint64(1)
        word = (word * odd + (key >> np.uint64(40))) & mask
        word = word ^ (word >> half)
    return word
