"""Tokenize text files into one token file, once. An interrupted run can be continued."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock
from numpy.typing import ArrayLike, NDArray

from tikmix_fast import files
from tikmix_fast.arguments import require_int
from tikmix_fast.data.text_files import Piece, read_text

__all__ = ["BYTES", "Tokenizer", "tokenize"]

_VERSION = 1
_PROGRESS = "tikmix_fast.tokenizing"
_LOG = logging.getLogger("tikmix_fast")
_CHECKPOINT = 1 << 24
"""Tokens between two saves; a later run continues from the last one."""


@dataclass(frozen=True)
class Tokenizer:
    """How text becomes tokens.

    Attributes
    ----------
    name : str
        Unique: it is part of the key of the token file.
    encode : callable from str to a sequence of int
        Must add no special tokens.
    vocabulary : int
        Every token is below it.
    separator : sequence of int
        Tokens after every document.

    Raises
    ------
    ValueError
        If the name is empty, the vocabulary is not from 1 to 2^32, or a token of the separator is outside it.

    Examples
    --------
    >>> letters = Tokenizer("letters", lambda text: [ord(c) - 97 for c in text], 27, separator=(26,))
    >>> letters.encode("abc")
    [0, 1, 2]
    """

    name: str
    encode: Callable[[str], ArrayLike]
    vocabulary: int
    separator: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name must not be empty: it is part of the key of the token file")
        require_int("vocabulary", self.vocabulary, 1, 1 << 32)
        if not all(0 <= token < self.vocabulary for token in self.separator):
            raise ValueError(f"separator must contain tokens below {self.vocabulary}; got {list(self.separator)}")

    @classmethod
    def from_transformers(cls, tokenizer: Any) -> Tokenizer:
        """Wrap a tokenizer of transformers; its end-of-text token, if it has one, follows every document."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        content = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
        digest = blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        end = tokenizer.eos_token_id

        def encode(text: str) -> list[int]:
            # verbose=False: a document may be longer than the model's context; sequences are cut later.
            ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return ids

        return cls(f"{type(tokenizer).__name__}-{digest}", encode, len(tokenizer), () if end is None else (end,))

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Smallest unsigned dtype for every token."""
        return np.dtype(next(name for name, size in _SIZES.items() if self.vocabulary <= size))


_SIZES = {"<u1": 1 << 8, "<u2": 1 << 16, "<u4": 1 << 32}


def _bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), dtype=np.uint8)


BYTES = Tokenizer("bytes", _bytes, 256, separator=b"\n\n")
"""The bytes of UTF-8; an empty line after every document, as in the texts of `tikmix_fast.demo.corpora`."""


def tokenize(
    sources: Iterable[str | os.PathLike[str]],
    cache: str | os.PathLike[str],
    tokenizer: Tokenizer = BYTES,
    text_column: str = "text",
) -> Path:
    """Write the tokens of text files into one .npy in ``cache``, unless it exists already.

    Parameters
    ----------
    sources : iterable of path
        Files for `read_text`, in the order of the tokens.
    cache : path
        A folder, made if missing. The name of the .npy depends on the sources' paths, sizes and modification times, the
        tokenizer and the column, so a changed source gets a new file.
    tokenizer : Tokenizer
    text_column : str

    Returns
    -------
    Path
        The .npy, one dimension, with the dtype of `Tokenizer.dtype`. It appears when it is complete.

    Raises
    ------
    OSError, ImportError, ValueError
        As `read_text`, or if the tokenizer fails or returns a token beyond its vocabulary; the message names the file
        and the line or row.

    Notes
    -----
    An interrupted run loses at most 2^24 tokens: the next call reads the documents before that point again, but does
    not tokenize them. One process tokenizes; others that want the same tokens wait for it. Memory: that of `read_text`.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.txt").write_text("ab")
    >>> np.load(tokenize([folder / "a.txt"], folder / "cache")).tolist()
    [97, 98, 10, 10]
    """
    paths = [Path(source) for source in sources]
    folder = Path(cache)
    folder.mkdir(parents=True, exist_ok=True)
    key = _key(paths, tokenizer, text_column)
    target = folder / f"tokens-{key}.npy"
    if target.exists():
        return target
    partial, progress, lock = (folder / f".{target.name}.{ending}" for ending in ("partial", "progress", "lock"))
    with FileLock(lock):
        if not target.exists():  # else another process wrote it while this one waited
            try:
                with partial.open("r+b" if partial.exists() else "w+b") as file:
                    _write(file, progress, paths, tokenizer, text_column)
            except ValueError:
                partial.unlink()  # a mended source has another key, so nobody would go on from here
                progress.unlink(missing_ok=True)
                raise
            os.replace(partial, target)
            progress.unlink(missing_ok=True)
    # Whoever still waits for this lock, or makes a new one, finds the target. On Windows, a waiting process keeps it.
    with suppress(OSError):
        lock.unlink()
    return target


def _key(paths: list[Path], tokenizer: Tokenizer, text_column: str) -> str:
    stats = [(str(path.resolve()), path.stat()) for path in paths]
    content = [
        _VERSION,
        [tokenizer.name, tokenizer.vocabulary, list(tokenizer.separator)],
        text_column,
        [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
    ]
    return blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


def _write(file: BinaryIO, progress: Path, paths: list[Path], tokenizer: Tokenizer, text_column: str) -> None:
    dtype = tokenizer.dtype
    done = _resume(file, progress, dtype)
    saved = done["tokens"]
    separator = np.array(list(tokenizer.separator), dtype=dtype)
    for number in range(done["files"], len(paths)):
        pieces = 0
        for piece in read_text(paths[number], text_column):
            pieces += 1
            if pieces <= done["pieces"]:
                continue
            tokens = _encoded(piece, tokenizer)
            file.write(tokens.astype(dtype).tobytes())
            if piece.ends:
                file.write(separator.tobytes())
            done["tokens"] += len(tokens) + (len(separator) if piece.ends else 0)
            if done["tokens"] - saved >= _CHECKPOINT:
                done["pieces"] = pieces
                _flush(file)
                files.write_sealed_json(progress, {"format": _PROGRESS, **done})
                saved = done["tokens"]
        done.update(files=number + 1, pieces=0)
    file.seek(0)
    file.write(_header(dtype, done["tokens"]))
    _flush(file)


def _resume(file: BinaryIO, progress: Path, dtype: np.dtype[np.unsignedinteger]) -> dict[str, int]:
    """Cut the file to the last save, and return how much of the sources it covers."""
    header = _header(dtype, 0)
    done = {"files": 0, "pieces": 0, "tokens": 0}
    if progress.exists():
        try:
            saved = files.read_json(progress, _PROGRESS, sealed=True)
        except ValueError as error:
            _LOG.warning("the sources are tokenized from the beginning: %s", error)
            saved = {"format": _PROGRESS, **done}
        del saved["format"]
        if len(header) + saved["tokens"] * dtype.itemsize <= file.seek(0, os.SEEK_END):
            done = saved
    if not done["tokens"]:
        file.seek(0)
        file.write(header)
    end = len(header) + done["tokens"] * dtype.itemsize
    file.truncate(end)
    file.seek(end)
    return done


def _header(dtype: np.dtype[np.unsignedinteger], count: int) -> bytes:
    """Return the header of a .npy of one dimension: 128 bytes for every count."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": (count,)})
    return header.getvalue()


def _encoded(piece: Piece, tokenizer: Tokenizer) -> NDArray[np.integer]:
    try:
        tokens = np.asarray(tokenizer.encode(piece.text))
    except ValueError as error:
        raise ValueError(f"{piece.where}: the tokenizer {tokenizer.name} refuses the text: {error}") from None
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise ValueError(
            f"{piece.where}: the tokenizer {tokenizer.name} must give a sequence of int; got {tokens.dtype} of shape "
            f"{tokens.shape}"
        )
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < tokenizer.vocabulary):
        raise ValueError(
            f"{piece.where}: the tokenizer {tokenizer.name} must give tokens from 0 to {tokenizer.vocabulary - 1}; got "
            f"{tokens.min()} to {tokens.max()}"
        )
    return tokens


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
