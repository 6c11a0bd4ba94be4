"""Write and read tensors, and JSON about them, in one safetensors file with a checksum."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tikmix_fast import files

__all__ = ["digest", "read_state", "read_tensors", "write_tensors"]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names and contents as hexadecimal digits.

    Examples
    --------
    >>> digest({"a": torch.zeros(2)}) == digest({"a": torch.zeros(2)}), digest({"a": torch.zeros(2)}) == digest({})
    (True, False)
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def write_tensors(path: str | os.PathLike[str], format: str, tensors: Mapping[str, Tensor], about: Any) -> Path:
    """Write tensors, and ``about`` as JSON, to a safetensors file, atomically.

    Tensors that share memory are written separately. Memory: a copy of the tensors on the CPU, and the size of the
    file.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = write_tensors(f"{folder}/a.safetensors", "mine", {"a": torch.zeros(2)}, {"step": 3})
    ...     read_tensors(path, "mine")
    ({'a': tensor([0., 0.])}, {'step': 3})
    """
    words = json.dumps(about, allow_nan=False)
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    metadata = {"format": format, "about": words, "sha256": _seal(copies, words)}
    return files.write_bytes(path, safetensors.torch.save(copies, metadata))


def read_tensors(
    path: str | os.PathLike[str], format: str, *, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], Any]:
    """Read what `write_tensors` wrote.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is not a safetensors file, cut short, of another format, or its checksum differs; the message names it.
    """
    with open(path, "rb"):
        pass  # raises OSError; below, an OSError means damage
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        raise ValueError(f"{os.fspath(path)}: is damaged, cut short or of another kind: {error}") from None
    if (other := metadata.get("format")) != format:
        raise ValueError(f"{os.fspath(path)}: is another kind of file: 'format' must be {format!r}; got {other!r}")
    words = metadata.get("about", "")
    if metadata.get("sha256") != _seal(tensors, words):
        raise ValueError(f"{os.fspath(path)}: its checksum differs: it is damaged")
    with files.naming(path):
        return {name: value.to(device) for name, value in tensors.items()}, json.loads(words)


def read_state(
    path: str | os.PathLike[str], format: str, of: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the state of an interrupted run, whose entry "of" must be that of this run.

    Raises
    ------
    OSError, ValueError
        As `read_tensors`, or if entries of "of" differ; the message names them, and the way out.
    """
    advice = "delete it to start again, or use another folder"
    try:
        tensors, content = read_tensors(path, format)
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from None
    differ = [name for name, value in of.items() if content["of"].get(name) != value]
    if differ:
        raise ValueError(
            f"{os.fspath(path)}: belongs to an interrupted run with other {' and '.join(differ)}: {advice}"
        )
    return tensors, content


def _seal(tensors: Mapping[str, Tensor], words: str) -> str:
    return hashlib.sha256(f"{digest(tensors)} {words}".encode()).hexdigest()
