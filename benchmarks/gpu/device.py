"""The device of the GPU benchmarks: a GPU, or a CPU in a rehearsal that shows that everything runs."""

from __future__ import annotations

import csv
import io
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

__all__ = ["Cuda", "Device", "Rehearsal", "Stopwatch", "find_device", "read_smi"]

Answer = TypeVar("Answer")

_WATCHED = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
_FIXED = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
# The GPU waits this long before the timed work: the host gets ahead of it, so launches come without gaps.
_HEAD_START_CYCLES = 400_000


class Stopwatch(Protocol):
    """Time between two points of the device's work; readable once the device has passed both."""

    def start(self) -> None:
        """Mark the first point."""

    def stop(self) -> None:
        """Mark the second point."""

    def seconds(self) -> float:
        """Return the time between them."""


class Device(Protocol):
    """A device, and how to measure methods on it.

    Attributes
    ----------
    where : torch.device
    cache_bytes : int
        Size of the last-level cache; inputs must be larger if they shall come from memory.
    """

    where: torch.device
    cache_bytes: int

    def describe(self) -> dict[str, Any]:
        """Return facts about the device as plain JSON types, with ``name``."""

    def synchronize(self) -> None:
        """Wait until all work is done."""

    def stopwatch(self) -> Stopwatch:
        """Return a new stopwatch."""

    def peak_growth(self, function: Callable[[], Answer]) -> tuple[Answer, int | None]:
        """Call, and return the answer and the peak growth of allocated memory in bytes (None if unknown)."""

    def capture(self, function: Callable[[], object]) -> Callable[[], object]:
        """Return a function that replays the device's work of ``function``."""

    def watch_clocks(self) -> Any:
        """Return a context whose dict holds, at its end, the medians of clocks and power inside."""


class _Events:
    def __init__(self) -> None:
        self._start, self._stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def start(self) -> None:
        torch.cuda._sleep(_HEAD_START_CYCLES)
        self._start.record()

    def stop(self) -> None:
        self._stop.record()

    def seconds(self) -> float:
        return float(self._start.elapsed_time(self._stop)) / 1e3


class Cuda:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.where = torch.device("cuda", torch.cuda.current_device())
        self._properties: Any = torch.cuda.get_device_properties(self.where)
        self.cache_bytes = int(getattr(self._properties, "L2_cache_size", 64 << 20))

    def describe(self) -> dict[str, Any]:
        """Return name, capability, memory, driver, highest clocks and power limit."""
        properties = self._properties
        return {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": self.cache_bytes,
            "cuda": torch.version.cuda,
            **(read_smi(_FIXED) or {}),
        }

    def synchronize(self) -> None:
        """Wait until all work is done."""
        torch.cuda.synchronize(self.where)

    def stopwatch(self) -> Stopwatch:
        """Return a pair of CUDA events."""
        return _Events()

    def peak_growth(self, function: Callable[[], Answer]) -> tuple[Answer, int | None]:
        """Measure what torch allocated: our kernels take no other memory."""
        torch.cuda.reset_peak_memory_stats(self.where)
        before = torch.cuda.memory_allocated(self.where)
        answer = function()
        return answer, torch.cuda.max_memory_allocated(self.where) - before

    def capture(self, function: Callable[[], object]) -> Callable[[], object]:
        """Capture a CUDA graph; its memory lives as long as the returned function.

        Raises
        ------
        RuntimeError
            If the work makes the host wait and so cannot be captured.
        """
        stream = torch.cuda.Stream(self.where)
        stream.wait_stream(torch.cuda.current_stream(self.where))
        with torch.cuda.stream(stream):
            function()  # one-time work stays out of the graph
        torch.cuda.current_stream(self.where).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function()

        def replay() -> object:
            graph.replay()
            return outputs

        return replay

    @contextmanager
    def watch_clocks(self) -> Iterator[dict[str, Any]]:
        """Let nvidia-smi read the clocks four times a second."""
        medians: dict[str, Any] = {}
        command = [*_smi_command(_WATCHED), "-lms", "250"]
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            yield medians
            return
        try:
            yield medians
        finally:
            process.terminate()
            output = process.communicate()[0]
            rows = [row for row in csv.reader(io.StringIO(output)) if len(row) == len(_WATCHED)]
            if not rows:  # it printed nothing; the clocks take a while to fall
                medians.update(read_smi(_WATCHED) or {})
            for name, column in zip(_WATCHED, zip(*rows, strict=True), strict=False):
                numbers = sorted(number for number in map(_number, column) if isinstance(number, float))
                if numbers:
                    medians[name] = numbers[len(numbers) // 2]


class _WallClock:
    def start(self) -> None:
        self._start = time.perf_counter()

    def stop(self) -> None:
        self._stop = time.perf_counter()

    def seconds(self) -> float:
        return self._stop - self._start


class Rehearsal:
    """A CPU in place of the GPU: the same path with small sizes. Its numbers mean nothing."""

    where = torch.device("cpu")
    cache_bytes = 1 << 12

    def describe(self) -> dict[str, Any]:
        """Return a name that no result has."""
        return {"name": "rehearsal"}

    def synchronize(self) -> None:
        """Do nothing: a CPU has finished when a function returns."""

    def stopwatch(self) -> Stopwatch:
        """Return a wall clock."""
        return _WallClock()

    def peak_growth(self, function: Callable[[], Answer]) -> tuple[Answer, int | None]:
        """Call; the memory is unknown."""
        return function(), None

    def capture(self, function: Callable[[], object]) -> Callable[[], object]:
        """Return the function itself."""
        return function

    @contextmanager
    def watch_clocks(self) -> Iterator[dict[str, Any]]:
        """Watch nothing."""
        yield {}


def find_device(rehearse: bool = False) -> Device:
    """Return the current GPU, or the rehearsal's stand-in.

    Raises
    ------
    RuntimeError
        If there is no GPU.
    """
    if rehearse:
        return Rehearsal()
    if not torch.cuda.is_available():
        raise RuntimeError(f"no CUDA device is visible to torch {torch.__version__}")
    return Cuda()


def _smi_command(fields: tuple[str, ...]) -> list[str]:
    # nvidia-smi numbers the GPUs without regard to CUDA_VISIBLE_DEVICES.
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    return [
        "nvidia-smi",
        f"--id={torch.cuda.current_device() if uuid is None else f'GPU-{uuid}'}",
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader,nounits",
    ]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text.strip()


def read_smi(fields: tuple[str, ...]) -> dict[str, float | str] | None:
    """Return what nvidia-smi says about the current device, or None if it does not answer."""
    try:
        done = subprocess.run(_smi_command(fields), capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    row = next(csv.reader(io.StringIO(done.stdout)), [])
    if done.returncode or len(row) != len(fields):
        return None
    return {name: _number(text) for name, text in zip(fields, row, strict=True)}
