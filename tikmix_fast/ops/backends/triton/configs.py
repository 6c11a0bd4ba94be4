"""The configurations to try for the Triton kernels, and the choice of one of them.

A configuration changes the order of float32 sums, so the choice must not change from call to call. The first call of a
kind makes it by timing and keeps it in Triton's own cache, where later runs and other ranks find it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import triton
from triton.runtime.cache import get_cache_manager
from triton.runtime.errors import OutOfResources

__all__ = [
    "INTERPRETED",
    "TUNING_VARIABLE",
    "Product",
    "Tile",
    "bucket",
    "capability",
    "choose",
    "multiprocessors",
    "product_configs",
    "tile_configs",
]

TUNING_VARIABLE = "TIKMIX_FAST_TRITON_TUNE"
"""The environment variable: set to 0, every call takes the first configuration."""

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter. Their decorator reads it once, when they are imported."""

# Few, so that every program has several tiles even in small tests.
_INTERPRETED_PROGRAMS = 3

_log = logging.getLogger("tikmix_fast.ops")


@dataclass(frozen=True)
class Tile:
    """How a kernel forms gradients.

    Attributes
    ----------
    block_o, block_i : int
        Size of the tile of the gradient that a program holds in registers.
    block_t : int
        Rows multiplied at a time.
    warps, stages : int
        Warps per program, and blocks of rows in flight.
    """

    block_o: int
    block_i: int
    block_t: int
    warps: int
    stages: int

    def sums(self) -> int:
        """Return how many numbers of the tile a thread holds."""
        return self.block_o * self.block_i // (32 * self.warps)

    def shared_bytes(self, element_bytes: int) -> int:
        """Return the shared memory of the blocks of rows in flight."""
        return self.stages * self.block_t * (self.block_o + self.block_i) * element_bytes


@dataclass(frozen=True)
class Product:
    """How a program multiplies a panel with the queries: numbers at a time, warps, and blocks in flight."""

    block: int
    warps: int
    stages: int


C = TypeVar("C")

# By the instruction that multiplies: Hopper's wgmma, the older mma, or, for float32, mostly plain multiplications.
# Without tuning, the first that fits is taken. The tests compile the first ones: none spills a register in its loop.
_TILES = {
    "wgmma": (Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 4)),
    "mma": (Tile(128, 64, 32, 8, 4), Tile(128, 64, 64, 8, 3), Tile(128, 128, 32, 8, 3), Tile(64, 64, 64, 4, 3)),
    "float": (Tile(64, 64, 16, 8, 3), Tile(64, 64, 32, 8, 2)),
}
# The most float32 sums that a thread can hold beside the registers that it computes with.
_MOST_SUMS = 128
_PRODUCTS = {
    2: (Product(128, 4, 4), Product(256, 4, 3), Product(64, 4, 4)),
    4: (Product(32, 4, 3), Product(32, 4, 2)),
}


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return a GPU's compute capability; the interpreter behaves like Hopper."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many programs run side by side, one per multiprocessor."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def tile_configs(device: torch.device, element_bytes: int, with_total: bool) -> tuple[Tile, ...]:
    """Return the tiles to try, those that fit into a device's shared memory and registers. The first is the default.

    Parameters
    ----------
    device : torch.device
    element_bytes : int
        Bytes of a number that is multiplied, 2 or 4.
    with_total : bool
        Whether the registers hold the total of all domains too.
    """
    if device.type != "cuda":
        return (Tile(64, 64, 64, 4, 2),)
    kind = "float" if element_bytes == 4 else "wgmma" if capability(device)[0] in (9, 10) else "mma"
    properties: Any = torch.cuda.get_device_properties(device)
    shared = properties.shared_memory_per_block_optin
    return tuple(
        tile
        for tile in _TILES[kind]
        if tile.shared_bytes(element_bytes) <= shared and tile.sums() * (1 + with_total) <= _MOST_SUMS
    )


@functools.cache
def product_configs(device: torch.device, element_bytes: int) -> tuple[Product, ...]:
    """Return the configurations to try for a panel of this element size. The first is the default."""
    return _PRODUCTS[element_bytes] if device.type == "cuda" else (Product(128, 4, 1),)


def bucket(size: int) -> int:
    """Return the number of bits of a size, so that calls of about one size share a configuration."""
    return size.bit_length()


_chosen: dict[str, object] = {}


def choose(key: tuple[object, ...], device: torch.device, candidates: Sequence[C], run: Callable[[C], object]) -> C:
    """Return the fastest configuration, which the first call with this key measures.

    Parameters
    ----------
    key : tuple
        Everything that the best configuration depends on, except the GPU and Triton's version.
    candidates : sequence
        The first is the default. It must fit every device: it is taken in the interpreter, while a CUDA graph is
        captured, and where the environment variable forbids timing.
    run : callable
        Runs the kernel on memory of its own.
    """
    if device.type != "cuda" or len(candidates) == 1:
        return candidates[0]
    name = json.dumps([*map(str, key), torch.cuda.get_device_name(device), triton.__version__])
    if name not in _chosen:
        if os.environ.get(TUNING_VARIABLE) == "0" or torch.cuda.is_current_stream_capturing():
            return candidates[0]
        _chosen[name] = candidates[_fastest(name, candidates, run)]
    return _chosen[name]  # type: ignore[return-value]


def _fastest(name: str, candidates: Sequence[C], run: Callable[[C], object]) -> int:
    cache = get_cache_manager(hashlib.sha256((name + repr(candidates)).encode()).hexdigest())
    earlier = cache.get_file("tikmix_fast.json")
    if earlier is not None:
        with open(earlier) as file:
            return int(json.load(file)["fastest"])
    times = [_time(candidate, run) for candidate in candidates]
    fastest = times.index(min(times))
    _log.info("%s: %s of %s", name, candidates[fastest], dict(zip(map(str, candidates), times, strict=True)))
    cache.put(json.dumps({"call": name, "milliseconds": times, "fastest": fastest}), "tikmix_fast.json", binary=False)
    return fastest


def _time(candidate: C, run: Callable[[C], object]) -> float:
    try:
        return float(triton.testing.do_bench(lambda: run(candidate), warmup=5, rep=20))
    except OutOfResources as error:
        _log.info("%s does not fit this GPU: %s", candidate, error)
        return math.inf
