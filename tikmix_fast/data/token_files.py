"""Sequences from token files of any size; only the requested tokens are read."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor
from torch.utils.data import Dataset

from tikmix_fast.arguments import require_int

__all__ = ["TOKEN_SUFFIXES", "TokenFile", "TokenSequences"]

TOKEN_SUFFIXES = (".npy", ".bin")

_INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "int64")
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_HEADER = struct.Struct("<9sQBQQ")
_INDEX_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


@dataclass(frozen=True)
class TokenFile:
    """Layout of one token file.

    Attributes
    ----------
    path : Path
    dtype : numpy.dtype
    start : int
        Bytes before the first token.
    count : int
        Number of tokens.
    """

    path: Path
    dtype: np.dtype[np.integer]
    start: int
    count: int

    @classmethod
    def open(cls, path: str | os.PathLike[str], dtype: DTypeLike | None = None) -> TokenFile:
        """Read a file's header and check its size.

        Parameters
        ----------
        path : path
            .npy: one dimension of integers. .bin: only tokens, as nanoGPT writes them; or Megatron's tokens with their
            .idx beside them, which gives the dtype and the number of tokens.
        dtype : integer dtype, optional
            Needed for a .bin without .idx; little-endian. If the file states a dtype, both must agree.

        Raises
        ------
        OSError
            If the file cannot be opened.
        ValueError
            If it is empty, damaged or cut short, or has another dtype; the message names the file.

        Notes
        -----
        Source of the .idx format: Megatron-LM, ``megatron/core/datasets/indexed_dataset.py``.
        """
        place = Path(path)
        if place.suffix not in TOKEN_SUFFIXES:
            raise ValueError(f"{place}: must end in one of {', '.join(TOKEN_SUFFIXES)}")
        size = place.stat().st_size
        if size == 0:
            raise ValueError(f"{place}: must contain tokens; remove it from the domain")
        stated = None if dtype is None else _checked(np.dtype(dtype).newbyteorder("<"), "dtype")
        index = place.with_suffix(".idx")
        if place.suffix == ".npy":
            file = _npy(place)
        elif index.exists():
            file = _indexed(place, index)
        elif stated is None:
            raise ValueError(
                f"{place}: dtype must be stated (--token-dtype), since a .bin file does not contain it; it is 'uint16' "
                "in most files of nanoGPT; a Megatron .bin needs its .idx beside it"
            )
        else:
            if size % stated.itemsize:
                raise ValueError(
                    f"{place}: its size must be a multiple of {stated.itemsize}, for {stated}; got {size} bytes; it is "
                    "cut short or has another dtype"
                )
            file = cls(place, stated, 0, size // stated.itemsize)
        if stated is not None and file.dtype != stated:
            raise ValueError(f"{place}: dtype must be that of the file, {file.dtype}; got {stated}; leave dtype out")
        if file.count == 0:
            raise ValueError(f"{place}: must contain tokens; remove it from the domain")
        if size < file.start + file.count * file.dtype.itemsize:
            raise ValueError(f"{place}: must contain {file.count} tokens of {file.dtype}; it is cut short")
        return file

    def read(self, first: int, count: int) -> NDArray[np.integer]:
        """Return tokens first, ..., first + count - 1."""
        offset = self.start + first * self.dtype.itemsize
        tokens = np.fromfile(self.path, self.dtype, count, offset=offset)
        if len(tokens) != count:
            raise ValueError(f"{self.path}: must still have {self.count} tokens; it became shorter")
        return tokens


class TokenSequences(Dataset[Tensor]):
    """Join the tokens of files and cut them into sequences; every token is the target of at most one sequence.

    Parameters
    ----------
    files : sequence of TokenFile or path
        In this order, without separators between them.
    length : int
        Targets per sequence. An item is int64 [length + 1]: the inputs are ``item[:-1]``, the targets ``item[1:]``.
    dtype : integer dtype, optional
        For .bin files that do not state it; see `TokenFile.open`.
    vocabulary : int, optional
        Reading a sequence checks that every token is from 0 to ``vocabulary`` - 1; None: that it is not negative.

    Raises
    ------
    OSError, ValueError
        If a file cannot be used, or all together are shorter than one sequence. When an item is read: if a token is
        outside the vocabulary, or the file became shorter; the message names file and position.

    Notes
    -----
    Memory: some 100 bytes per file, and the item. Reading a sequence takes some tens of us from the system's cache.
    Files are neither mapped nor kept open: a map would count every page it ever read as this process's memory, and
    would crash the process if a file were cut short; many open shards would exceed the limit of open files.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "a.bin"
    >>> np.arange(10, dtype="<u2").tofile(file)
    >>> data = TokenSequences([file], 4, dtype="uint16")
    >>> len(data), data[1].tolist()
    (2, [4, 5, 6, 7, 8])
    """

    def __init__(
        self,
        files: Sequence[TokenFile | str | os.PathLike[str]],
        length: int,
        *,
        dtype: DTypeLike | None = None,
        vocabulary: int | None = None,
    ) -> None:
        length = require_int("length", length, 1)
        if vocabulary is not None:
            vocabulary = require_int("vocabulary", vocabulary, 1)
        if not files:
            raise ValueError("files must contain at least one file; got none")
        self.files = [file if isinstance(file, TokenFile) else TokenFile.open(file, dtype) for file in files]
        self.length = length
        self.vocabulary = vocabulary
        self._ends = np.cumsum([file.count for file in self.files], dtype=np.int64)
        if self.tokens <= length:
            raise ValueError(
                f"{self.files[0].path}{' and the files after it' if len(self.files) > 1 else ''}: must contain more "
                f"than one sequence of {length} tokens; got {self.tokens}; use a shorter length or leave the domain out"
            )

    @property
    def tokens(self) -> int:
        """Number of tokens in all files."""
        return int(self._ends[-1])

    def __len__(self) -> int:
        return (self.tokens - 1) // self.length

    def __getitem__(self, index: int) -> Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be below {len(self)}; got {index}")
        at = index % len(self) * self.length
        item = np.empty(self.length + 1, dtype=np.int64)
        filled = 0
        for number in range(int(np.searchsorted(self._ends, at, side="right")), len(self.files)):
            file = self.files[number]
            first = at + filled - (int(self._ends[number]) - file.count)
            part = file.read(first, min(file.count - first, len(item) - filled))
            self._check(file, first, part)
            item[filled : filled + len(part)] = part
            filled += len(part)
            if filled == len(item):
                break
        return torch.from_numpy(item)

    def _check(self, file: TokenFile, first: int, part: NDArray[np.integer]) -> None:
        wrong = part < 0
        if self.vocabulary is not None:
            wrong |= part >= self.vocabulary
        if wrong.any():
            place = int(wrong.argmax())
            limit = "not negative" if self.vocabulary is None else f"from 0 to {self.vocabulary - 1}"
            raise ValueError(
                f"{file.path}, token {first + place}: must be {limit}; got {part[place]}; another "
                f"tokenizer wrote the file, or its dtype is not {file.dtype}"
            )


def _checked(dtype: np.dtype[np.generic], name: str) -> np.dtype[np.integer]:
    if dtype.name not in _INTEGERS:
        raise ValueError(f"{name} must be one of {', '.join(_INTEGERS)}; got {dtype}")
    return dtype  # type: ignore[return-value]


def _npy(path: Path) -> TokenFile:
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        # numpy parses the header as a Python literal, and tokenizes the header of old files: hence so many error types.
        except (ValueError, TypeError, EOFError, SyntaxError, TokenError, RecursionError, MemoryError) as error:
            raise ValueError(f"{path}: must be a .npy file; it is damaged or of another kind: {error}") from None
        if len(shape) != 1:
            raise ValueError(f"{path}: must have one dimension; got shape {shape}")
        return TokenFile(path, _checked(dtype, f"{path}: the dtype"), file.tell(), shape[0])


def _indexed(path: Path, index: Path) -> TokenFile:
    with index.open("rb") as file:
        header = file.read(_INDEX_HEADER.size)
        if len(header) < _INDEX_HEADER.size:
            raise ValueError(f"{index}: must have a header of {_INDEX_HEADER.size} bytes; it is cut short")
        magic, version, code, sequences, _ = _INDEX_HEADER.unpack(header)
        if magic != _INDEX_MAGIC or version != 1 or code not in _INDEX_DTYPES:
            raise ValueError(f"{index}: must be a Megatron index of version 1 for integers")
    if index.stat().st_size < _INDEX_HEADER.size + 12 * sequences:  # an int32 length and an int64 offset each
        raise ValueError(f"{index}: must describe {sequences} sequences; it is cut short")
    count = 0
    if sequences:
        lengths = np.memmap(index, "<i4", "r", _INDEX_HEADER.size, (sequences,))
        count = int(lengths.sum(dtype=np.int64))
    dtype: np.dtype[np.integer] = np.dtype(_INDEX_DTYPES[code])
    if path.stat().st_size != count * dtype.itemsize:
        raise ValueError(
            f"{path}: must contain {count} tokens of {dtype}, as {index.name} states; got {path.stat().st_size} bytes"
        )
    return TokenFile(path, dtype, 0, count)
