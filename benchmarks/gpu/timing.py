"""Time the work of a device in turn, by the device's own clock, as `tikmix_fast.benchmarking.interleaved` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from benchmarks.gpu.device import Device, Stopwatch
from tikmix_fast.benchmarking.interleaved import Timings, collector_off, turns

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
        The same work on several sets of inputs. The sets take turns, so inputs come from memory and not from a cache.
    rounds : int
    seconds : float, optional
        Start no further round after this time, warm-up included. 6 rounds (or ``rounds``, if fewer) run in any case.
    warm_up : int
        Rounds that run first and do not count.
    seed : int
        Seed of the orders.

    Returns
    -------
    Timings
        ``wall`` is the device's time; ``cpu`` is the time in which the host launched the work.

    Raises
    ------
    ValueError
        If there is no function or no round.
    """
    wall: dict[str, list[float]] = {name: [] for name in functions}
    host: dict[str, list[float]] = {name: [] for name in functions}
    with collector_off():
        for each, order in turns(list(functions), rounds, warm_up, seconds, least=6, seed=seed):
            watches: dict[str, Stopwatch] = {}
            for name in order:
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
    return Timings.of(wall, host)
