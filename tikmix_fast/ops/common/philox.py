"""Random bits that depend on a seed and a place only: Philox4x32-10, in torch for any device and in native code."""

from __future__ import annotations

import torch
from torch import Tensor

from tikmix_fast.ops.backends.cpu import cpu
from tikmix_fast.ops.backends.cpu.sketch import write_random_words

__all__ = ["philox4x32", "random_words"]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def _multiply(factor: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low words of a product of 32-bit words, without leaving int64."""
    low = (words & 0xFFFF) * factor
    high = (words >> 16) * factor + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def philox4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Encrypt counters with ten rounds of Philox4x32.

    Parameters
    ----------
    counter : int64 Tensor [..., 4]
        Words in ``0 ... 2**32 - 1``.
    key : tuple of int
        Two words of the same range.

    Returns
    -------
    int64 Tensor [..., 4]
        Random words of the same range, equal on every device.

    Notes
    -----
    Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Examples
    --------
    >>> import torch
    >>> [hex(word) for word in philox4x32(torch.zeros(4, dtype=torch.int64), (0, 0)).tolist()]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    words = list(counter.unbind(-1))
    keys = list(key)
    for _ in range(_ROUNDS):
        (high_0, low_0), (high_2, low_2) = (_multiply(m, words[i]) for m, i in zip(_MULTIPLIERS, (0, 2), strict=True))
        words = [high_2 ^ words[1] ^ keys[0], low_2, high_0 ^ words[3] ^ keys[1], low_0]
        keys = [(k + step) & _WORD for k, step in zip(keys, _KEY_STEPS, strict=True)]
    return torch.stack(words, -1)


def random_words(seed: int, stream: int, rows: int, columns: int, *, first_row: int = 0) -> Tensor:
    """Draw the random words of a rectangle of places on the CPU, in native code where there is some.

    Parameters
    ----------
    seed, stream : int
        In ``0 ... 2**64 - 1``; the key is the seed, and the stream is the upper half of every counter.
    rows, columns : int
        Size of the rectangle. Place (r, c) has the counter ``(c, first_row + r, stream's low word, high word)``.
    first_row : int

    Returns
    -------
    int64 Tensor [rows, columns, 4]
        Words in ``0 ... 2**32 - 1``. A smaller rectangle holds the same words as that part of a larger one.

    Examples
    --------
    >>> wide, narrow = random_words(7, 1, 2, 5), random_words(7, 1, 2, 3)
    >>> bool((wide[:, :3] == narrow).all())
    True
    """
    if cpu.unavailable() is None:
        words = torch.empty(rows, columns, 4, dtype=torch.int64, device="cpu")
        write_random_words(seed, stream, first_row, words)
        return words
    return random_words_in_torch(seed, stream, rows, columns, first_row=first_row)


def random_words_in_torch(seed: int, stream: int, rows: int, columns: int, *, first_row: int = 0) -> Tensor:
    """Draw what `random_words` draws, in plain torch."""
    counter = torch.empty(rows, columns, 4, dtype=torch.int64, device="cpu")
    counter[..., 0] = torch.arange(columns, device="cpu")
    counter[..., 1] = torch.arange(first_row, first_row + rows, device="cpu")[:, None]
    counter[..., 2] = stream & _WORD
    counter[..., 3] = stream >> 32
    return philox4x32(counter, (seed & _WORD, seed >> 32))
