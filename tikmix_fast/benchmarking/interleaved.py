"""Time several functions in turn: other work on the machine then slows all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Timings", "collector_off", "interleave", "median_interval", "turns"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Timings:
    """Seconds of every function in every round.

    Attributes
    ----------
    wall : dict of str to float64 [rounds]
        Elapsed time.
    cpu : dict of str to float64 [rounds]
        Time of all threads of this process. Threads that spin count too.
    """

    wall: dict[str, Array]
    cpu: dict[str, Array]

    @classmethod
    def of(cls, wall: Mapping[str, Sequence[float]], cpu: Mapping[str, Sequence[float]]) -> Timings:
        """Make timings from lists of seconds."""
        return cls(*({name: np.array(each) for name, each in times.items()} for times in (wall, cpu)))

    @property
    def rounds(self) -> int:
        """How many times every function was timed."""
        return len(next(iter(self.wall.values())))

    def ratio(self, name: str, base: str) -> float:
        """Return the median wall time of ``name`` over that of ``base``."""
        return float(np.median(self.wall[name]) / np.median(self.wall[base]))

    def summary(self, name: str, base: str) -> dict[str, Any]:
        """Return the summary of one function as plain JSON types, times in seconds.

        Returns
        -------
        dict
            ``seconds`` and ``cpu_seconds`` (medians over the rounds), ``quartiles`` [2], ``rounds``, ``ratio`` (median
            over the median of ``base``), ``ratio_interval`` (95 % interval of the median of the ratios within each
            round; None below 6 rounds).
        """
        wall = self.wall[name]
        interval = median_interval(wall / self.wall[base])
        return {
            "seconds": float(np.median(wall)),
            "quartiles": np.quantile(wall, [0.25, 0.75]).tolist(),
            "cpu_seconds": float(np.median(self.cpu[name])),
            "rounds": self.rounds,
            "ratio": self.ratio(name, base),
            "ratio_interval": None if interval is None else list(interval),
        }


def interleave(
    functions: Mapping[str, Callable[[], object]],
    rounds: int = 20,
    warm_up: int = 1,
    seconds: float | None = None,
    seed: int = 0,
) -> Timings:
    """Time every function once per round, in an order drawn anew for every round.

    Parameters
    ----------
    functions : mapping of str to callable
        Each must finish its work before it returns.
    rounds : int
        At least 1.
    warm_up : int
        Rounds that run first and do not count.
    seconds : float, optional
        Start no further round after this time, warm-up included. 3 rounds (or ``rounds``, if fewer) run in any case.
    seed : int
        Seed of the orders.

    Raises
    ------
    ValueError
        If there is no function or no round.

    Examples
    --------
    >>> timings = interleave({"a": lambda: sum(range(100)), "b": lambda: None}, rounds=3)
    >>> timings.rounds, sorted(timings.wall)
    (3, ['a', 'b'])
    """
    wall: dict[str, list[float]] = {name: [] for name in functions}
    cpu: dict[str, list[float]] = {name: [] for name in functions}
    with collector_off():
        for each, order in turns(list(functions), rounds, warm_up, seconds, least=3, seed=seed):
            for name in order:
                start_cpu, start = time.process_time(), time.perf_counter()
                functions[name]()
                elapsed, elapsed_cpu = time.perf_counter() - start, time.process_time() - start_cpu
                if each >= 0:
                    wall[name].append(elapsed)
                    cpu[name].append(elapsed_cpu)
    return Timings.of(wall, cpu)


@contextmanager
def collector_off() -> Iterator[None]:
    """Collect garbage, then keep the collector off, as timeit does: a collection would fall on whoever is running."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def turns(
    names: Sequence[str], rounds: int, warm_up: int, seconds: float | None, *, least: int, seed: int
) -> Iterator[tuple[int, list[str]]]:
    """Iterate over rounds: the number of each, negative for a warm-up, and the names in an order drawn anew.

    Parameters
    ----------
    names : sequence of str
    rounds, warm_up : int
    seconds : float or None
        Start no further round after this time, warm-up included, once ``least`` rounds are over.
    least : int
    seed : int
        Seed of the orders.

    Raises
    ------
    ValueError
        If there is no name or no round.
    """
    if not names:
        raise ValueError("functions must hold at least one entry; got none")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {rounds}")
    random = np.random.default_rng(seed)
    end = None if seconds is None else time.perf_counter() + seconds
    for each in range(-warm_up, rounds):
        if end is not None and each >= min(least, rounds) and time.perf_counter() > end:
            return
        yield each, [names[index] for index in random.permutation(len(names))]


def median_interval(values: Array, confidence: float = 0.95) -> tuple[float, float] | None:
    """Return an interval that holds the median with at least this confidence, for any distribution.

    Its ends are two order statistics (binomial, at probability 1/2), so outliers do not widen it. None if there are too
    few values for such an interval: fewer than 6 at 95 %.

    Examples
    --------
    >>> median_interval(np.arange(20.0))
    (5.0, 14.0)
    >>> median_interval(np.arange(5.0)) is None
    True
    """
    from scipy.stats import binom

    count = len(values)
    below = int(binom.ppf((1 - confidence) / 2, count, 0.5))  # one more than the smallest values to cut off
    if below == 0:
        return None
    ordered = np.sort(values)
    return float(ordered[below - 1]), float(ordered[count - below])
