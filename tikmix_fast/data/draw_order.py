"""Choose the domain of each draw: counts follow the weights at every prefix, in a shuffled order.

Let g = 0, 1, 2, ... number the draws since the last change of weights; c_j(g) counts domain j among the first g. Then

    |c_j(g) - w_j g| <= 1 - delta      for every domain j and every g,        delta = 1 / max(4096, 2 m),

because the schedule deals in turns. The k-th draw of domain j (k = 1, 2, ...) is a turn. It opens at the first g with
w_j (g + 1) >= k - 1 + delta, and closes at the first g with w_j g > k - delta. An order of draws keeps the bound if and
only if it draws every turn while the turn is open.

Such an order exists: Tijdeman, The chairman assignment problem (1980), proves that some order keeps the bound
1 - 1 / (2 m - 2) for any weights. Turns are unit jobs with integer release times and deadlines. For such jobs, drawing
the open turn that closes first is optimal: it meets all deadlines if any order does. It never idles either: an order
that keeps the bound has drawn g + 1 turns by g + 1, all open by then, so one of them is left after g draws. The bound
needs nothing else.

That order alone is nearly periodic: with weights 0.9 and 0.1, rank 9 of 10 would draw almost only the second domain. So
a shuffle moves turns, each only where it is open, which preserves the bound. Weights are multiples of 2^-48 and all
arithmetic is on integers, so every machine gets the same order.
"""

from __future__ import annotations

import math

import numpy as np
import torch  # noqa: F401  the native module needs the OpenMP runtime that torch brings
from numpy.typing import NDArray

try:
    from tikmix_fast import _cpu
except ImportError as error:
    from tikmix_fast.ops import available_backends

    raise ImportError(f"MixtureSampler cannot be used: {available_backends()['cpu']}") from error

__all__ = ["BLOCK", "check_counts", "quantize", "schedule_block"]

Ints = NDArray[np.int64]

#: Draws per block; the shuffle never moves a turn across the edge of a block.
BLOCK = 1 << 14

_SCALE_BITS = 48  # k * 2^48 for k up to BLOCK + 1 must fit in an int64
_SCALE = 1 << _SCALE_BITS

# Moves of the shuffle, from coarse to fine: first single turns travel far, then neighbours swap.
_LIFT_SPANS = (512, 128, 32, 16, 8)
_SWAP_STRIDES = (32, 16, 8, 4, *(2, 1) * 6)


def quantize(weights: NDArray[np.float64]) -> Ints:
    """Express weights [m], divided by their sum, in units of 2^-48 that sum to exactly 2^48, by largest remainder.

    Examples
    --------
    >>> [int(share) for share in quantize(np.array([0.5, 0.25, 0.25])) >> 46]
    [2, 1, 1]
    """
    exact = weights * (_SCALE / math.fsum(weights))
    shares = np.floor(exact).astype(np.int64)
    missing = _SCALE - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:missing]] += 1
    return shares


def check_counts(shares: Ints, elapsed: int, counts: Ints) -> None:
    """Raise ValueError unless ``counts`` [m] can be those of the first ``elapsed`` draws under ``shares``."""
    floor, phase = _targets(shares, elapsed)
    ahead = counts - floor
    inside = (ahead >= 0) & (ahead <= 1)
    inside &= np.abs(np.where(inside, ahead, 0) * _SCALE - phase) <= _SCALE - _margin(len(shares))
    if not inside.all() or counts.sum() != elapsed:
        raise ValueError(f"counts must follow the weights within one draw over {elapsed} draws; got {counts.tolist()}")


def schedule_block(shares: Ints, elapsed: int, counts: Ints, seed: int, stream: int) -> NDArray[np.uint16]:
    """Plan the next `BLOCK` draws.

    Parameters
    ----------
    shares : int64 [m]
        Weights as `quantize` gives them.
    elapsed : int
        Draws since these weights began; a multiple of `BLOCK`.
    counts : int64 [m]
        Number of those draws from each domain.
    seed, stream : int
        Key of the random bits, both below 2^64. Every block of a run needs its own ``stream``.

    Returns
    -------
    uint16 [BLOCK]
        The domain of each draw.

    Notes
    -----
    Cost: about 0.5 us per draw, nearly independent of m; memory O(BLOCK + m).
    """
    domain, opens, closes = _turns(shares, elapsed, counts)
    raw = np.random.Philox(key=seed, counter=[0, stream, 0, 0])
    order = _earliest_closing_first(opens, closes, raw)
    _shuffle(order, opens.astype(np.int32), np.minimum(closes, BLOCK).astype(np.int32), raw)
    return domain[order].astype(np.uint16)


def _margin(m: int) -> int:
    return _SCALE // max(4096, 2 * m)


def _targets(shares: Ints, elapsed: int) -> tuple[Ints, Ints]:
    """Split w_j * elapsed into its whole part and the rest in units of 2^-48; Python integers, as they need 90 bits."""
    products = [share * elapsed for share in shares.tolist()]
    floor = np.array([product >> _SCALE_BITS for product in products], dtype=np.int64)
    return floor, np.array([product & (_SCALE - 1) for product in products], dtype=np.int64)


def _turns(shares: Ints, elapsed: int, counts: Ints) -> tuple[Ints, Ints, Ints]:
    """Return domain, opening and closing of every undrawn turn that opens before the end of the block, by domain.

    Times are slots of the block; a turn that opened before the block opens at 0.
    """
    floor, phase = _targets(shares, elapsed)
    margin = _margin(len(shares))
    first = counts - floor + 1  # turn numbers count from the whole part of the target at the start of the block
    last = (phase + shares * BLOCK - margin) // _SCALE + 1
    many = np.where(shares > 0, np.maximum(last - first + 1, 0), 0)
    domain = np.repeat(np.arange(len(shares)), many)
    turn = np.arange(len(domain)) - np.repeat(np.cumsum(many) - many - first, many)
    share, start = shares[domain], turn * _SCALE - phase[domain]
    opens = np.maximum(-((_SCALE - start - margin) // share) - 1, 0)
    closes = (start - margin) // share + 1
    return domain, opens, closes


def _earliest_closing_first(opens: Ints, closes: Ints, raw: np.random.Philox) -> NDArray[np.int32]:
    """Return the turn drawn in each slot [BLOCK]: the open turn that closes first; ties are random."""
    # One integer per turn orders the heap: closing time, 20 random bits, number of the turn. Closing times beyond
    # two blocks become their rank, which needs few bits and has the same order.
    far = closes > 2 * BLOCK
    urgency = np.where(far, 2 * BLOCK, closes)
    urgency[far] += 1 + np.unique(closes[far], return_inverse=True)[1]
    tie = (raw.random_raw(len(opens)) >> np.uint64(44)).astype(np.int64)
    keys = (urgency << 40) | (tie << 20) | np.arange(len(opens))
    arriving = keys[np.argsort(opens.astype(np.uint16), kind="stable")]
    arrived = np.cumsum(np.bincount(opens, minlength=BLOCK))
    drawn = _earliest_first(arriving, arrived)
    return (drawn & ((1 << 20) - 1)).astype(np.int32)


def _earliest_first(arriving: Ints, arrived: Ints) -> Ints:
    """Return for each slot the smallest undrawn key that has arrived by then; ``arrived`` counts arrivals."""
    drawn = np.empty(len(arrived), dtype=np.int64)
    _cpu.earliest_first(
        keys=arriving.ctypes.data, arrived=arrived.ctypes.data, slots=len(arrived), drawn=drawn.ctypes.data
    )
    return drawn


def _shuffle(
    order: NDArray[np.int32], opens: NDArray[np.int32], closes: NDArray[np.int32], raw: np.random.Philox
) -> None:
    """Move turns at random, in place, and only to slots where they are open."""
    for span in _LIFT_SPANS:
        _lift(order, opens, closes, span, raw)
    for stride in _SWAP_STRIDES:
        _swap(order, opens, closes, stride + int(_bits(raw, 1)[0]) % stride, raw)


def _bits(raw: np.random.Philox, n: int) -> NDArray[np.int32]:
    """Draw n random numbers below 2^16, the same on machines of either byte order."""
    return raw.random_raw(-(-n // 4)).astype("<u8").view("<u2")[:n].astype(np.int32)


def _swap(
    order: NDArray[np.int32], opens: NDArray[np.int32], closes: NDArray[np.int32], stride: int, raw: np.random.Philox
) -> None:
    """Swap the turns of slots s and s + stride with probability 1/2, if both stay open."""
    start = int(_bits(raw, 1)[0]) % (2 * stride)
    many = (BLOCK - start) // (2 * stride)
    pairs = order[start : start + many * 2 * stride].reshape(many, 2, stride)
    slot = np.arange(start, start + many * 2 * stride, dtype=np.int32).reshape(many, 2, stride)
    early, late = pairs[:, 0], pairs[:, 1]
    coin = (_bits(raw, many * stride).reshape(many, stride) & 1).astype(bool)
    moved = coin & (opens[late] <= slot[:, 0]) & (closes[early] > slot[:, 1])
    change = (early ^ late) * moved
    early ^= change
    late ^= change


def _lift(
    order: NDArray[np.int32], opens: NDArray[np.int32], closes: NDArray[np.int32], span: int, raw: np.random.Philox
) -> None:
    """Move one turn of each segment of ``span`` slots to a random slot; the turns between move by one slot.

    Swaps cannot move a rare domain among turns of a frequent one, because each of those can move by one slot only.
    """
    start = int(_bits(raw, 1)[0]) % span
    many = (BLOCK - start) // span
    segments = order[start : start + many * span].reshape(many, span)
    turns = np.ascontiguousarray(segments.T)  # [span, many]: numpy reduces fast over the first axis
    base = start + span * np.arange(many, dtype=np.int32)
    first, end = opens[turns] - base, closes[turns] - base  # a turn is open in rows first <= row < end
    row, segment = np.arange(span, dtype=np.int32)[:, None], np.arange(many)
    # Prefer turns that are open for long, as only those can travel.
    preference = (end - first) * (_bits(raw, many * span) >> 1).reshape(span, many)
    chosen = np.argmax(preference, axis=0).astype(np.int32)
    # On its way up the turn passes turns that can move down by one, and the reverse; it stays where it is open.
    wall_above = np.where((end <= row + 1) & (row < chosen), row, -1).max(axis=0)
    wall_below = np.where((first >= row) & (row > chosen), row, span).min(axis=0)
    low = np.maximum(wall_above + 1, first[chosen, segment])
    high = np.minimum(wall_below, end[chosen, segment]) - 1
    target = low + ((_bits(raw, many) * (high - low + 1)) >> 16)
    source = row + ((row >= chosen) & (row < target)) - ((row > target) & (row <= chosen))
    segments[:] = turns[np.where(row == target, chosen, source), segment].T
