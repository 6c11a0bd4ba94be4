"""Text of several domains that any installation already has on its disk: nothing is downloaded.

A domain is what one can train on, a task what one wants to be good at. Tasks come from other packages than the
domains, or from other sections, and no long line of a task's text occurs in a domain. The choice is deterministic:
files are taken in the order of a hash of their names, up to a fixed number of bytes.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.metadata
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["Corpora", "Sequences", "Task", "gather"]

Bytes = NDArray[np.uint8]
Section = tuple[str, str]
"""A name that is the same on every machine, and its text."""

_LONG_LINE = 40
"""Characters from which on a line tells where it comes from; shorter ones (``Parameters``) occur everywhere."""

_LONGEST_SECTION = 20_000
"""Characters taken from one file, so that no single file makes up a domain."""

# fmt: off
_PACKAGES = (
    "torch", "numpy", "scipy", "lightgbm", "triton", "typer", "rich", "matplotlib", "safetensors", "sympy",
    "networkx", "jinja2", "mpmath", "fsspec", "filelock", "setuptools", "pillow", "fonttools", "contourpy",
    "kiwisolver", "pyparsing", "pygments", "markdown-it-py", "click", "packaging", "python-dateutil", "cycler",
    "typing_extensions", "shellingham", "MarkupSafe", "mdurl", "pip",
)
# fmt: on
"""The run-time dependencies and theirs; what else is installed must not change the text."""


@dataclass(frozen=True)
class Task:
    """Text that the model is wanted to be good at.

    Attributes
    ----------
    steered : bool
        Whether the mixture is steered for it; the other tasks show what that costs elsewhere.
    measure : uint8 [any]
        Text on which influence may be measured.
    report : uint8 [any]
        Text on which losses are reported, and nothing else is done.
    """

    steered: bool
    measure: Bytes
    report: Bytes


@dataclass(frozen=True)
class Corpora:
    """The gathered text, by name.

    Attributes
    ----------
    domains : dict of str to uint8 [any]
    tasks : dict of str to Task
    sources : dict of str to str
        Where each domain and each task comes from, in words.
    missing : dict of str to str
        Domains and tasks that this installation lacks, with the reason.
    """

    domains: dict[str, Bytes]
    tasks: dict[str, Task]
    sources: dict[str, str]
    missing: dict[str, str]

    @property
    def steered(self) -> tuple[str, ...]:
        """Names of the tasks that the mixture is steered for."""
        return tuple(name for name, task in self.tasks.items() if task.steered)

    @property
    def held_out(self) -> tuple[str, ...]:
        """Names of the tasks that the mixture is not steered for."""
        return tuple(name for name, task in self.tasks.items() if not task.steered)

    def digest(self) -> str:
        """Return a checksum of all text and of which tasks are steered, for results to say what they are of."""
        total = hashlib.sha256()
        for name, text in self.domains.items():
            total.update(f"domain {name} {len(text)}\n".encode() + text.tobytes())
        for name, task in self.tasks.items():
            for text in (task.measure, task.report):
                total.update(f"task {name} {task.steered} {len(text)}\n".encode() + text.tobytes())
        return total.hexdigest()


class Sequences(Dataset[Tensor]):
    """Cut text into sequences of ``length`` bytes and their successors; no byte is the target of two of them.

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
        if length < 1:
            raise ValueError(f"length must be positive; got {length}")
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


@dataclass(frozen=True)
class _Source:
    name: str
    words: str
    read: Callable[[], Iterator[Section]]
    steered: bool = False


class _MissingError(Exception):
    """The installation lacks a source; the message says what."""


def gather(
    *,
    domain_bytes: int = 1_000_000,
    task_bytes: int = 64_000,
    fewest_bytes: int = 16_000,
    fewest: int = 4,
) -> Corpora:
    """Read every domain and every task.

    A task's sections are dealt to ``measure`` and ``report`` by a hash of their names. Then lines of at least 40
    characters that the report text holds are dropped from the measuring text, and those that either holds from every
    domain.

    Parameters
    ----------
    domain_bytes, task_bytes : int
        Most bytes per domain, and per task for each of ``measure`` and ``report``.
    fewest_bytes : int
        A domain or a half of a task with less than this counts as missing.
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
    reported: set[str] = set()
    halves: dict[str, tuple[str, list[Section]]] = {}
    for source in _TASKS:
        try:
            report, measure = _deal(source.read(), task_bytes)
        except _MissingError as error:
            missing[source.name] = str(error)
            continue
        halves[source.name] = (_join(report, task_bytes), measure)
        reported |= _long_lines(halves[source.name][0])

    tasks: dict[str, Task] = {}
    kept_from_training = set(reported)
    for source in _TASKS:
        if source.name in halves:
            text, sections = halves[source.name]
            measured = _join(_without(sections, reported), task_bytes)
            kept_from_training |= _long_lines(measured)
            tasks[source.name] = Task(source.steered, _encode(measured), _encode(text))

    domains: dict[str, Bytes] = {}
    for source in _DOMAINS:
        try:
            domains[source.name] = _encode(_join(_without(source.read(), kept_from_training), domain_bytes))
        except _MissingError as error:
            missing[source.name] = str(error)

    for name, size in [(name, min(len(task.measure), len(task.report))) for name, task in tasks.items()] + [
        (name, len(text)) for name, text in domains.items()
    ]:
        if size < fewest_bytes:
            missing[name] = f"only {size} bytes of it are installed, {fewest_bytes} are needed"
    found = Corpora(
        domains={name: text for name, text in domains.items() if name not in missing},
        tasks={name: task for name, task in tasks.items() if name not in missing},
        sources={source.name: source.words for source in (*_DOMAINS, *_TASKS)},
        missing=missing,
    )
    for what, names in (("domains", tuple(found.domains)), ("steered tasks", found.steered)):
        if len(names) < fewest:
            lacking = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
            raise ValueError(f"{what} must be at least {fewest}; this installation has {len(names)} ({lacking})")
    return found


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")


def _deal(sections: Iterable[Section], most: int) -> tuple[list[Section], list[Section]]:
    """Deal sections to two halves by the hash of their names, until both have enough."""
    halves: tuple[list[Section], list[Section]] = ([], [])
    sizes = [0, 0]
    for name, text in sections:
        half = _hash(f"half of {name}") % 2
        # Half as much again: the second half loses the lines that the first one holds.
        if sizes[half] < 1.5 * most:
            halves[half].append((name, text))
            sizes[half] += len(text)
        if min(sizes) >= 1.5 * most:
            break
    return halves


def _line_key(line: str) -> str:
    return " ".join(line.split())


def _long_lines(text: str) -> set[str]:
    return {key for key in map(_line_key, text.splitlines()) if len(key) >= _LONG_LINE}


def _without(sections: Iterable[Section], lines: set[str]) -> Iterator[Section]:
    for name, text in sections:
        yield name, "\n".join(line for line in text.splitlines() if _line_key(line) not in lines)


def _join(sections: Iterable[Section], most: int) -> str:
    """Put sections together until they make ``most`` bytes of UTF-8."""
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


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise _MissingError(f"the package {package} is not installed")
    return Path(spec.submodule_search_locations[0])


def _files(root: Path, pattern: str, skip: Iterable[str] = ()) -> Iterator[Section]:
    """Read the files below ``root`` in hash order, without those that have a name in ``skip`` on their path."""
    unwanted = {"test", "tests", "testing", "_vendor", "__pycache__", *skip}
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob(pattern)}
    for name in sorted(paths, key=_hash):
        if unwanted.isdisjoint(name.split("/")):
            yield f"{root.name}/{name}", paths[name].read_text(encoding="utf-8", errors="ignore")


def _package_files(package: str, pattern: str, below: str = ".", skip: Iterable[str] = ()) -> Iterator[Section]:
    return _files(_folder(package) / below, pattern, skip)


def _standard_library() -> Iterator[Section]:
    # Other people's packages, tables, generated code, and what some distributions leave out.
    skip = (
        "site-packages",
        "dist-packages",
        "encodings",
        "pydoc_data",
        "lib2to3",
        "idlelib",
        "turtledemo",
        "ensurepip",
    )
    return _files(Path(sysconfig.get_path("stdlib")), "*.py", skip)


def _docstrings(package: str) -> Iterator[Section]:
    for name, source in _package_files(package, "*.py"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, ValueError):  # written for another Python, or with null bytes
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) > 200:
                    yield f"{name}:{getattr(node, 'name', '')}", text


def _language_reference(held_out: bool) -> Iterator[Section]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise _MissingError("the module pydoc_data is not installed") from None
    for name in sorted(topics, key=_hash):
        if (_hash(f"held out {name}") % 4 == 0) == held_out:
            yield name, topics[name]


def _distributions() -> Iterator[importlib.metadata.Distribution]:
    for name in _PACKAGES:
        try:
            yield importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def _readmes() -> Iterator[Section]:
    for distribution in _distributions():
        text = str(distribution.metadata.json.get("description", ""))
        # By chapters: some packages put their whole history into the description.
        for number, chapter in enumerate(text.split("\n\n\n")):
            yield f"{distribution.name} {number}", chapter


def _licences() -> Iterator[Section]:
    seen: set[str] = set()
    for distribution in _distributions():
        for file in sorted(distribution.files or (), key=str):
            if "licen" not in file.name.lower() and "copying" not in file.name.lower():
                continue
            if file.suffix not in ("", ".txt", ".md", ".rst"):
                continue
            path = Path(str(file.locate()))
            if not path.is_file():
                continue
            for paragraph in path.read_text(encoding="utf-8", errors="ignore").split("\n\n"):
                key = _line_key(paragraph)
                # Most packages repeat the same few licences.
                if key not in seen:
                    seen.add(key)
                    yield key[:80], paragraph


def _sums(held_out: bool) -> Iterator[Section]:
    random = np.random.default_rng(17)
    for number in range(2_000):
        left, right = random.integers(0, 1000, (2, 100))
        kept = (left % 4 == 0) == held_out
        yield f"sums {number}", "\n".join(f"{a}+{b}={a + b}" for a, b in zip(left[kept], right[kept], strict=True))


def _noise() -> Iterator[Section]:
    random = np.random.default_rng(19)
    for number in range(200):
        yield f"noise {number}", base64.encodebytes(random.bytes(12_000)).decode()


_DOMAINS = (
    _Source("python", "source of the standard library", _standard_library),
    _Source("docstrings", "docstrings of scipy", partial(_docstrings, "scipy")),
    _Source("reference", "sections of the Python language reference", partial(_language_reference, False)),
    _Source("stubs", "type stubs of torch", partial(_package_files, "torch", "*.pyi")),
    _Source("c++", "headers of torch", partial(_package_files, "torch", "*.h", "include", ("ops", "pybind11", "fmt"))),
    _Source("licences", "licence texts of installed packages", _licences),
    _Source("fonts", "font metrics of matplotlib", partial(_package_files, "matplotlib", "*.afm", "mpl-data")),
    _Source("sums", "generated sums", partial(_sums, False)),
    _Source("noise", "random bytes in base64", _noise),
)

_TASKS = (
    _Source("numpy docs", "docstrings of numpy", partial(_docstrings, "numpy"), steered=True),
    _Source("torch docs", "docstrings of torch", partial(_docstrings, "torch"), steered=True),
    _Source("matplotlib", "source of matplotlib", partial(_package_files, "matplotlib", "*.py"), steered=True),
    _Source("fonttools", "source of fontTools", partial(_package_files, "fontTools", "*.py"), steered=True),
    _Source("readmes", "descriptions of installed packages", _readmes, steered=True),
    _Source("networkx docs", "docstrings of networkx", partial(_docstrings, "networkx")),
    _Source("sympy", "source of sympy", partial(_package_files, "sympy", "*.py")),
    _Source("reference", "other sections of the reference", partial(_language_reference, True)),
    _Source("pybind11", "headers of pybind11", partial(_package_files, "torch", "*.h", "include/pybind11")),
    _Source("sums", "other generated sums", partial(_sums, True)),
)
