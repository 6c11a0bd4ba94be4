"""Text of several domains and tasks that every installation has on its disk, so the demonstration downloads nothing.

A domain is text to train on; a task is text that the model should predict well. Tasks come from other packages than
the domains, or from other sections, and no domain contains a long line of a task. The choice is deterministic: files
come in the order of a hash of their names, up to a fixed number of bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from tikmix_fast.arguments import require_int
from tikmix_fast.demo.sources import DOMAINS, TASKS, MissingError, Section, line_key, stable_hash

__all__ = ["Corpora", "Sequences", "Task", "gather"]

Bytes = NDArray[np.uint8]
_LONG_LINE = 40
"""A line with this many characters identifies its source; shorter ones (``Parameters``) occur everywhere."""

_LONGEST_SECTION = 20_000
"""Most characters from one file, so that no single file dominates a domain."""


@dataclass(frozen=True)
class Task:
    """Text that the model should predict well.

    Attributes
    ----------
    steered : bool
        Whether the mixture is steered for it. The other tasks show what the steering costs elsewhere.
    measure : uint8 [any]
        Text for measuring influence.
    report : uint8 [any]
        Text for reporting losses, and for nothing else.
    """

    steered: bool
    measure: Bytes
    report: Bytes


@dataclass(frozen=True)
class Corpora:
    """All text, by name.

    Attributes
    ----------
    domains : dict of str to uint8 [any]
    tasks : dict of str to Task
    sources : dict of str to str
        Origin of each domain and task, for readers.
    missing : dict of str to str
        Domains and tasks that this installation lacks, each with the reason.
    """

    domains: dict[str, Bytes]
    tasks: dict[str, Task]
    sources: dict[str, str]
    missing: dict[str, str]

    @property
    def steered(self) -> tuple[str, ...]:
        """Names of the steered tasks."""
        return tuple(name for name, task in self.tasks.items() if task.steered)

    @property
    def held_out(self) -> tuple[str, ...]:
        """Names of the other tasks."""
        return tuple(name for name, task in self.tasks.items() if not task.steered)

    def digest(self) -> str:
        """Return a checksum of all text and of the steered tasks: it tells results of different text apart."""
        total = hashlib.sha256()
        for name, text in self.domains.items():
            total.update(f"domain {name} {len(text)}\n".encode() + text.tobytes())
        for name, task in self.tasks.items():
            for text in (task.measure, task.report):
                total.update(f"task {name} {task.steered} {len(text)}\n".encode() + text.tobytes())
        return total.hexdigest()


class Sequences(Dataset[Tensor]):
    """Cut text into sequences of ``length`` bytes and their successors; every byte is the target of at most one.

    Parameters
    ----------
    text : uint8 [any]
    length : int
        Targets per sequence. An item is int64 [length + 1]: the inputs are ``item[:-1]``, the targets ``item[1:]``.

    Raises
    ------
    ValueError
        If the text is shorter than one sequence.

    Examples
    --------
    >>> Sequences(np.frombuffer(b"abcde", dtype=np.uint8), 2)[1].tolist()
    [99, 100, 101]
    """

    def __init__(self, text: Bytes, length: int) -> None:
        require_int("length", length, 1)
        if len(text) <= length:
            raise ValueError(f"text must be longer than one sequence of {length} bytes; got {len(text)} bytes")
        count = (len(text) - 1) // length
        self._items = torch.from_numpy(text[: count * length + 1].astype(np.int64)).unfold(0, length + 1, length)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Tensor:
        return self._items[index]

    def all(self) -> Tensor:
        """Return every item, int64 [len(self), length + 1], without a copy."""
        return self._items


def gather(
    *,
    domain_bytes: int = 1_000_000,
    task_bytes: int = 64_000,
    fewest_bytes: int = 16_000,
    fewest: int = 4,
) -> Corpora:
    """Read every domain and every task.

    A hash of its name assigns every section of a task to ``measure`` or ``report``. Lines of at least 40 characters
    that occur in any ``report`` are removed from every ``measure``; lines that occur in either are removed from every
    domain.

    Parameters
    ----------
    domain_bytes, task_bytes : int
        Most bytes per domain, and for each of a task's ``measure`` and ``report``.
    fewest_bytes : int
        A domain, ``measure`` or ``report`` with fewer bytes counts as missing.
    fewest : int
        Fewest domains, and fewest steered tasks, that make sense together.

    Raises
    ------
    ValueError
        If this installation has fewer than ``fewest``; the message says what is missing and why.

    Notes
    -----
    Reads some 10 MB and parses part of it: a few seconds.
    """
    missing: dict[str, str] = {}
    halves: dict[str, tuple[str, list[Section]]] = {}
    for source in TASKS:
        try:
            report, measure = _deal(source.read(), task_bytes)
        except MissingError as error:
            missing[source.name] = str(error)
        else:
            halves[source.name] = (_join(report, task_bytes), measure)

    reported = {line for report_text, _ in halves.values() for line in _long_lines(report_text)}
    excluded = set(reported)
    tasks: dict[str, Task] = {}
    for source in TASKS:
        if source.name in halves:
            report_text, sections = halves[source.name]
            measure_text = _join(_without(sections, reported), task_bytes)
            excluded |= _long_lines(measure_text)
            tasks[source.name] = Task(source.steered, _encode(measure_text), _encode(report_text))

    domains: dict[str, Bytes] = {}
    for source in DOMAINS:
        try:
            domains[source.name] = _encode(_join(_without(source.read(), excluded), domain_bytes))
        except MissingError as error:
            missing[source.name] = str(error)

    sizes = {name: min(len(task.measure), len(task.report)) for name, task in tasks.items()}
    for name, size in [*sizes.items(), *((name, len(text)) for name, text in domains.items())]:
        if size < fewest_bytes:
            missing[name] = f"only {size} bytes of it are installed, {fewest_bytes} are needed"
    corpora = Corpora(
        domains={name: text for name, text in domains.items() if name not in missing},
        tasks={name: task for name, task in tasks.items() if name not in missing},
        sources={source.name: source.words for source in (*DOMAINS, *TASKS)},
        missing=missing,
    )
    for kind, names in (("domains", tuple(corpora.domains)), ("steered tasks", corpora.steered)):
        if len(names) < fewest:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
            raise ValueError(f"{kind} must be at least {fewest}; this installation has {len(names)} ({reasons})")
    return corpora


def _deal(sections: Iterable[Section], most: int) -> tuple[list[Section], list[Section]]:
    """Assign sections to two halves by the hash of their names, until both have enough."""
    halves: tuple[list[Section], list[Section]] = ([], [])
    sizes = [0, 0]
    for name, text in sections:
        half = stable_hash(f"half of {name}") % 2
        # 1.5 times, because the second half loses the lines that the first one contains.
        if sizes[half] < 1.5 * most:
            halves[half].append((name, text))
            sizes[half] += len(text)
        if min(sizes) >= 1.5 * most:
            break
    return halves


def _long_lines(text: str) -> set[str]:
    return {key for key in map(line_key, text.splitlines()) if len(key) >= _LONG_LINE}


def _without(sections: Iterable[Section], lines: set[str]) -> Iterator[Section]:
    for name, text in sections:
        yield name, "\n".join(line for line in text.splitlines() if line_key(line) not in lines)


def _join(sections: Iterable[Section], most: int) -> str:
    """Join sections until they have ``most`` bytes of UTF-8."""
    parts: list[str] = []
    size = 0
    for _, text in sections:
        parts.append(text[:_LONGEST_SECTION])
        size += len(parts[-1].encode()) + 2
        if size >= most:
            break
    return "\n\n".join(parts).encode()[:most].decode(errors="ignore")


def _encode(text: str) -> Bytes:
    return np.frombuffer(text.encode(), dtype=np.uint8)
