"""Time the work of a device in turn, by its own clock; the method of `tikmix_fast.benchmarking.interleaved`."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.gpu.device import Device, Stopwatch
from tikmix_fast.benchmarking.interleaved import Timings

__all__ = ["time_in_turn"]

Runs = Sequence[Callable[[], object]]


def time_in_turn(
    device: Device,
    functions: Mapping[str, Runs],
    *,
    rounds: int = 20,
    seconds: float | None = None,
    warm_up: int = 2,
    seed: int = 0,
) -> Timings:
    """Time one call of every function per round, in an order drawn anew for every round.

    Parameters
    ----------
    device : Device
    functions : mapping of str to sequence of callable
        The same work on several sets of inputs, which take turns, so that inputs come from memory and not from a cache.
    rounds : int
    seconds : float, optional
        Begin no further round after this time, warm-up included; 6 rounds are run whatever they take, or ``rounds`` if
        that is less.
    warm_up : int
        Rounds that are run before and not counted.
    seed : int
        Of the orders.

    Returns
    -------
    Timings
        ``wall`` is the device's time; ``cpu`` the time that the host took to launch the work.

    Raises
    ------
    ValueError
        If there is no function or no round.
    """
    if not functions or rounds < 1:
        raise ValueError(f"there must be a function and a round; got {len(functions)} and {rounds}")
    names = list(functions)
    random = np.random.default_rng(seed)
    wall: dict[str, list[float]] = {name: [] for name in names}
    host: dict[str, list[float]] = {name: [] for name in names}
    end = None if seconds is None else time.perf_counter() + seconds
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for each in range(-warm_up, rounds):
            if end is not None and each >= min(6, rounds) and time.perf_counter() > end:
                break
            watches: dict[str, Stopwatch] = {}
            for index in random.permutation(len(names)):
                name = names[index]
                runs = functions[name]
                watch = watches[name] = device.stopwatch()
                watch.start()
                start = time.perf_counter()
                runs[each % len(runs)]()
                launched = time.perf_counter() - start
                watch.stop()
                if each >= 0:
                    host[name].append(launched)
            device.synchronize()
            if each >= 0:
                for name, watch in watches.items():
                    wall[name].append(watch.seconds())
    finally:
        if collecting:
            gc.enable()
    return Timings(*({name: np.array(each) for name, each in times.items()} for times in (wall, host)))
