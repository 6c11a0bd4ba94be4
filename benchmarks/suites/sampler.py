"""The speed and the memory of the sampler."""

from __future__ import annotations

import time
import tracemalloc
from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from tikmix_fast.benchmarking.interleaved import interleave
from tikmix_fast.data.sampler import MixtureSampler

__all__ = ["measure_sampler"]


def measure_sampler(
    domains: int = 64, samples: int = 10**9, draws: int = 10**6, *, rounds: int = 10, seconds: float | None = None
) -> dict[str, Any]:
    """Check proportions and that no index repeats, then time draws and trace memory.

    Parameters
    ----------
    domains : int
    samples : int
        Samples of all domains together; the domains are uneven.
    draws : int
        Draws per timed round.
    rounds, seconds
        As in `interleave`.

    Returns
    -------
    dict
        Plain JSON types: ``rows`` with draws per second (one rank, and a rank of 8 by its own draws), and ``memory``:
        the peak that Python and numpy allocate for a sampler and its draws, for few and many samples and domains.

    Raises
    ------
    AssertionError
        If a domain's share of the draws is off by a draw or more, or an index comes twice.
    """
    lengths, weights = _corpora(domains, samples)
    _check(lengths, weights, min(draws, int(lengths.min())))
    ranks = {"one rank": 1, "a rank of 8, its own draws": 8}
    streams: dict[str, Iterator[int]] = {
        name: iter(MixtureSampler(lengths.tolist(), weights, world_size=size)) for name, size in ranks.items()
    }
    functions = {name: partial(_draw, stream, draws) for name, stream in streams.items()}
    timings = interleave(functions, rounds, seconds=seconds)
    rows = []
    for name in ranks:
        summary = timings.summary(name, "one rank")
        rows.append({"method": name, "ours": True, "draws_per_second": draws / summary["seconds"], **summary})
    start = time.perf_counter()
    MixtureSampler(lengths.tolist(), weights)
    construction = time.perf_counter() - start
    return {
        "case": f"{domains} domains, {samples:.0e} samples in all",
        "rows": rows,
        "construction_seconds": construction,
        "memory": [
            {"domains": m, "samples": s, "peak_bytes": _peak(m, s, min(draws, 10**5))}
            for m, s in ((domains, samples), (domains, samples // 1000), (16 * domains, samples))
        ],
        "skipped": {},
    }


def _draw(stream: Iterator[int], draws: int) -> None:
    deque(islice(stream, draws), maxlen=0)  # the fastest way to run an iterator


def _corpora(domains: int, samples: int) -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    lengths = 1 + random.multinomial(samples - domains, random.dirichlet(np.full(domains, 5.0)))
    return lengths, random.dirichlet(np.full(domains, 5.0))


def _check(lengths: Any, weights: Any, draws: int) -> None:
    drawn = np.fromiter(iter(MixtureSampler(lengths.tolist(), weights, num_samples=draws)), dtype=np.int64, count=draws)
    if len(np.unique(drawn)) != draws:
        raise AssertionError(f"the sampler repeated an index within {draws} draws")
    counts = np.bincount(np.searchsorted(np.cumsum(lengths), drawn, side="right"), minlength=len(lengths))
    worst = np.abs(counts - weights * draws).max()
    if not worst < 1:
        raise AssertionError(f"a domain is {worst:.2f} draws off its weight after {draws} draws")


def _peak(domains: int, samples: int, draws: int) -> int:
    lengths, weights = _corpora(domains, max(samples, 2 * domains))
    given = lengths.tolist()
    tracemalloc.start()
    try:
        _draw(iter(MixtureSampler(given, weights)), draws)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
