"""Write files so that a crash leaves either the old or the new content, and detect damage when reading."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["naming", "read_json", "write_bytes", "write_json", "write_sealed_json", "write_text"]


def write_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write ``content`` to a temporary name beside ``path`` and rename it into place.

    Raises
    ------
    OSError
        If the folder is missing or not writable; no temporary file remains.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> write_bytes(folder / "a.bin", b"x").read_bytes()
    b'x'
    """
    target = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private. Give it the permissions that the user's umask gives any other file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` as UTF-8, atomically; see `write_bytes`."""
    return write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write ``value`` as strict JSON (no NaN or infinity), atomically; see `write_bytes`.

    Raises
    ------
    ValueError
        If ``value`` contains a float that JSON cannot express; the file stays as it was.
    """
    return write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_sealed_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> Path:
    """Write an object like `write_json`, with the SHA-256 of its content under "sha256".

    Examples
    --------
    >>> import tempfile, pathlib
    >>> path = write_sealed_json(pathlib.Path(tempfile.mkdtemp()) / "a.json", {"format": "mine", "x": 0.5})
    >>> read_json(path, "mine")
    {'format': 'mine', 'x': 0.5}
    >>> _ = path.write_text(path.read_text().replace("0.5", "0.6"))
    >>> read_json(path, "mine")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: .../a.json: its checksum differs: it is damaged or edited...
    """
    text = json.dumps(content, allow_nan=False)
    # A reader checks the parsed JSON, in which tuples are lists and all keys are strings.
    return write_json(path, {**content, "sha256": _sha256(json.loads(text))})


def read_json(path: str | os.PathLike[str], format: str | None = None, *, sealed: bool = False) -> Any:
    """Read a JSON file. If it is an object with a "format", check its "sha256" and remove that entry.

    Parameters
    ----------
    path : path
    format : str, optional
        Required value of "format".
    sealed : bool
        Whether a checksum is required. Leave it False for files that people write or edit by hand, such as mixtures:
        to edit a file with a checksum, remove its line "sha256".

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is not JSON, cut short, of another format, or its checksum is missing or differs; the message names the
        file.
    """
    with naming(path):
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"is not JSON: {error}") from None
        except ValueError as error:
            raise ValueError(f"is not JSON, or cut short: {error}") from None
        if format is not None and not (isinstance(content, dict) and content.get("format") == format):
            other = content.get("format") if isinstance(content, dict) else None
            raise ValueError(f"is another kind of file: 'format' must be {format!r}; got {other!r}")
        seal = content.pop("sha256", None) if isinstance(content, dict) and "format" in content else None
        if seal is None and sealed:
            raise ValueError("has no checksum: it is damaged, or another program wrote it")
        if seal is not None and seal != _sha256(content):
            raise ValueError(
                "its checksum differs: it is damaged or edited; if you edited it, remove its line 'sha256'"
            )
        return content


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors from the content of a damaged file into a ValueError that names the file."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{os.fspath(path)}: lacks {error.args[0]!r}") from error
    except (ValueError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
