"""Time several functions in turn, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Timings", "interleave", "median_interval"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Timings:
    """Seconds of every function in every round.

    Attributes
    ----------
    wall : dict of str to float64 [rounds]
        Elapsed time.
    cpu : dict of str to float64 [rounds]
        Time of all threads of this process; more than ``wall`` times the cores that worked if threads spin.
    """

    wall: dict[str, Array]
    cpu: dict[str, Array]

    @property
    def rounds(self) -> int:
        """How many times every function was timed."""
        return len(next(iter(self.wall.values())))

    def ratio(self, name: str, base: str) -> float:
        """Return the median wall time of ``name`` over that of ``base``."""
        return float(np.median(self.wall[name]) / np.median(self.wall[base]))

    def summary(self, name: str, base: str) -> dict[str, Any]:
        """Return what a result keeps of one function, as plain JSON types, times in seconds.

        Returns
        -------
        dict
            ``seconds``, ``quartiles`` [2] and ``cpu_seconds`` (medians over the rounds), ``rounds``, ``ratio`` (of the
            medians, to ``base``), ``ratio_interval`` (95 % interval of the median of the ratios within each round;
            None below 6 rounds).
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
        Must finish their work before they return.
    rounds : int
        At least 1.
    warm_up : int
        Rounds that are run before and not counted.
    seconds : float, optional
        Begin no further round after this time, warm-up included; 3 rounds are run whatever they take, or ``rounds`` if
        that is less.
    seed : int
        Of the orders.

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
    if not functions:
        raise ValueError("functions must hold at least one entry; got none")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {rounds}")
    names = list(functions)
    random = np.random.default_rng(seed)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    end = None if seconds is None else time.perf_counter() + seconds
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # as timeit does: a collection would fall on whoever is running
    try:
        for each in range(-warm_up, rounds):
            if end is not None and each >= min(3, rounds) and time.perf_counter() > end:
                break
            for index in random.permutation(len(names)):
                name = names[index]
                start_cpu, start = time.process_time(), time.perf_counter()
                functions[name]()
                elapsed, elapsed_cpu = time.perf_counter() - start, time.process_time() - start_cpu
                if each >= 0:
                    wall[name].append(elapsed)
                    cpu[name].append(elapsed_cpu)
    finally:
        if collecting:
            gc.enable()
    return Timings(*({name: np.array(each) for name, each in times.items()} for times in (wall, cpu)))


def median_interval(values: Array, confidence: float = 0.95) -> tuple[float, float] | None:
    """Return an interval that holds the median with at least this confidence, whatever the distribution.

    It lies between two order statistics (binomial, at probability 1/2), so that outliers do not widen it. None where
    there are too few values for any such interval: fewer than 6 at 95 %.

    Examples
    --------
    >>> median_interval(np.arange(20.0))
    (5.0, 14.0)
    >>> median_interval(np.arange(5.0)) is None
    True
    """
    from scipy.stats import binom

    count = len(values)
    below = int(
        binom.ppf((1 - confidence) / 2, count, 0.5)
    )  # this many of the smallest values may be cut off, less one
    if below == 0:
        return None
    ordered = np.sort(values)
    return float(ordered[below - 1]), float(ordered[count - below])
