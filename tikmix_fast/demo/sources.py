"""Texts of an ordinary installation: packages, docstrings, licences, the language reference, generated sums."""

from __future__ import annotations

import ast
import base64
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

__all__ = ["DOMAINS", "TASKS", "MissingError", "Section", "Source", "line_key", "stable_hash"]

Section = tuple[str, str]
"""A name that is the same on every machine, and its text."""

# fmt: off
_PACKAGES = (
    "torch", "numpy", "scipy", "lightgbm", "triton", "typer", "rich", "matplotlib", "safetensors", "sympy",
    "networkx", "jinja2", "mpmath", "fsspec", "filelock", "setuptools", "pillow", "fonttools", "contourpy",
    "kiwisolver", "pyparsing", "pygments", "markdown-it-py", "click", "packaging", "python-dateutil", "cycler",
    "typing_extensions", "shellingham", "MarkupSafe", "mdurl", "pip",
)
# fmt: on
"""The run-time dependencies and their dependencies. Other installed packages must not change the text."""


@dataclass(frozen=True)
class Source:
    """Where the text of a domain or task comes from.

    Attributes
    ----------
    name : str
    words : str
        The origin, for readers.
    read : callable
        Returns an iterator over sections; it raises `MissingError` if the installation lacks them.
    steered : bool
        Whether the mixture is steered for this task; False for domains.
    """

    name: str
    words: str
    read: Callable[[], Iterator[Section]]
    steered: bool = False


class MissingError(Exception):
    """The installation lacks a source; the message says what."""


def stable_hash(name: str) -> int:
    """Return a 64-bit hash that is the same in every process and on every machine."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")


def line_key(line: str) -> str:
    """Return a line with every run of white space as one blank."""
    return " ".join(line.split())


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingError(f"the package {package} is not installed")
    return Path(spec.submodule_search_locations[0])


def _files(root: Path, pattern: str, skip: Iterable[str] = ()) -> Iterator[Section]:
    """Read the files below ``root`` in the order of their hashes; leave out paths with a part in ``skip``."""
    excluded = {"test", "tests", "testing", "_vendor", "__pycache__", *skip}
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob(pattern)}
    for name in sorted(paths, key=stable_hash):
        if excluded.isdisjoint(name.split("/")):
            yield f"{root.name}/{name}", paths[name].read_text(encoding="utf-8", errors="ignore")


def _package_files(package: str, pattern: str, below: str = ".", skip: Iterable[str] = ()) -> Iterator[Section]:
    return _files(_folder(package) / below, pattern, skip)


def _standard_library() -> Iterator[Section]:
    # Leave out other people's packages, tables, generated code, and modules that some distributions do not ship.
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
        except (SyntaxError, ValueError):  # the file is for another Python, or has null bytes
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
        raise MissingError("the module pydoc_data is not installed") from None
    for name in sorted(topics, key=stable_hash):
        if (stable_hash(f"held out {name}") % 4 == 0) == held_out:
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
        # Some packages put their whole history into the description, so split it by chapters.
        for number, chapter in enumerate(text.split("\n\n\n")):
            yield f"{distribution.name} {number}", chapter


def _licences() -> Iterator[Section]:
    known: set[str] = set()
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
                key = line_key(paragraph)
                # Most packages repeat the same few licences.
                if key not in known:
                    known.add(key)
                    yield key[:80], paragraph


def _sums(held_out: bool) -> Iterator[Section]:
    random = np.random.default_rng(17)
    for number in range(2_000):
        left, right = random.integers(0, 1000, (2, 100))
        mine = (left % 4 == 0) == held_out
        yield f"sums {number}", "\n".join(f"{a}+{b}={a + b}" for a, b in zip(left[mine], right[mine], strict=True))


def _noise() -> Iterator[Section]:
    random = np.random.default_rng(19)
    for number in range(200):
        yield f"noise {number}", base64.encodebytes(random.bytes(12_000)).decode()


DOMAINS = (
    Source("python", "source of the standard library", _standard_library),
    Source("docstrings", "docstrings of scipy", partial(_docstrings, "scipy")),
    Source("reference", "sections of the Python language reference", partial(_language_reference, False)),
    Source("stubs", "type stubs of torch", partial(_package_files, "torch", "*.pyi")),
    Source("c++", "headers of torch", partial(_package_files, "torch", "*.h", "include", ("ops", "pybind11", "fmt"))),
    Source("licences", "licence texts of installed packages", _licences),
    Source("fonts", "font metrics of matplotlib", partial(_package_files, "matplotlib", "*.afm", "mpl-data")),
    Source("sums", "generated sums", partial(_sums, False)),
    Source("noise", "random bytes in base64", _noise),
)

TASKS = (
    Source("numpy docs", "docstrings of numpy", partial(_docstrings, "numpy"), steered=True),
    Source("torch docs", "docstrings of torch", partial(_docstrings, "torch"), steered=True),
    Source("matplotlib", "source of matplotlib", partial(_package_files, "matplotlib", "*.py"), steered=True),
    Source("fonttools", "source of fontTools", partial(_package_files, "fontTools", "*.py"), steered=True),
    Source("readmes", "descriptions of installed packages", _readmes, steered=True),
    Source("networkx docs", "docstrings of networkx", partial(_docstrings, "networkx")),
    Source("sympy", "source of sympy", partial(_package_files, "sympy", "*.py")),
    Source("reference", "other sections of the reference", partial(_language_reference, True)),
    Source("pybind11", "headers of pybind11", partial(_package_files, "torch", "*.h", "include/pybind11")),
    Source("sums", "other generated sums", partial(_sums, True)),
)
