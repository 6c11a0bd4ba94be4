"""Files of fitted Fisher matrices."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from tikmix_fast.influence.preconditioners.curvature import Basis
from tikmix_fast.tensor_files import read_tensors, write_tensors

__all__ = ["read_fisher", "write_fisher"]

_FORMAT = "tikmix_fast.fisher"
_VERSION = 1


def write_fisher(
    path: str | os.PathLike[str], kind: str, squares: Mapping[str, Tensor], bases: Mapping[str, Basis], tokens: int
) -> None:
    """Write a safetensors file, atomically.

    Parameters
    ----------
    path : path-like
    kind : str
        The name of the preconditioner.
    squares : mapping of str to Tensor
        Sums of squared gradients in the basis, by the name of the parameter.
    bases : mapping of str to Basis
    tokens : int
        The target tokens in the sums.
    """
    tensors = {f"squares/{name}": value.contiguous() for name, value in squares.items()}
    for name, basis in bases.items():
        for side, vectors in (("rows", basis.rows), ("columns", basis.columns)):
            if vectors is not None:
                tensors[f"{side}/{name}"] = vectors.contiguous()
    write_tensors(path, _FORMAT, tensors, {"version": _VERSION, "kind": kind, "tokens": tokens})


def read_fisher(
    path: str | os.PathLike[str], kind: str, writer: str, device: torch.device | str
) -> tuple[dict[str, Tensor], dict[str, Basis], int]:
    """Return the squares, bases and tokens that `write_fisher` wrote; ``writer`` is the class to name in messages.

    Raises
    ------
    ValueError
        If the file is of another kind or version, or damaged.
    """
    path = os.fspath(path)
    try:
        tensors, about = read_tensors(path, _FORMAT, device=device)
    except ValueError as error:
        raise ValueError(f"{error} (it is no file that {writer}.save wrote)") from None
    identity = {"version": _VERSION, "kind": kind}
    content = {key: about.get(key) for key in identity} if isinstance(about, dict) else about
    if content != identity or not isinstance(about["tokens"], int) or about["tokens"] < 1:
        raise ValueError(f"{path!r} is no file that {writer}.save wrote: it says {about!r}")
    parts: dict[str, dict[str, Tensor]] = {"squares": {}, "rows": {}, "columns": {}}
    for key, value in tensors.items():
        part, _, name = key.partition("/")
        if part not in parts or not bool(torch.isfinite(value).all()):
            raise ValueError(f"{path!r} is damaged: {key!r} is unknown or not finite")
        parts[part][name] = value
    squares, bases = parts["squares"], {}
    for name in {**parts["rows"], **parts["columns"]}:
        basis = bases[name] = Basis(parts["rows"].get(name), parts["columns"].get(name))
        shape = squares[name].shape if name in squares else ()
        for axis, vectors in ((0, basis.rows), (1, basis.columns)):
            if vectors is not None and (len(shape) != 2 or vectors.shape != (shape[axis], shape[axis])):
                raise ValueError(f"{path!r} is damaged: the basis of {name!r} does not fit its shape")
    return squares, bases, about["tokens"]
