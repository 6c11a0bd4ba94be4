"""Read text files document by document, never a whole file at once."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from tikmix_fast.data.optional_packages import optional

__all__ = ["TEXT_SUFFIXES", "Piece", "read_text"]

TEXT_SUFFIXES = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")

_BLOCK = 1 << 20
_ROWS = 256


class Piece(NamedTuple):
    """A document, or a part of one that is too long to read at once.

    Attributes
    ----------
    text : str
        Not empty.
    where : str
        File and line, or file and row; both count from 1.
    ends : bool
        Whether this is the end of the document.
    """

    text: str
    where: str
    ends: bool


def read_text(path: str | os.PathLike[str], text_column: str = "text") -> Iterator[Piece]:
    """Yield the documents of one file, except empty ones.

    Parameters
    ----------
    path : path
        .txt: one document, in pieces of about 1 MiB that end at a line end. .jsonl: one document per line, an object
        with ``text_column``. Both may be compressed, .gz or .zst. .parquet: one document per row.
    text_column : str

    Raises
    ------
    OSError
        If the file cannot be opened.
    ValueError
        If the file is damaged, cut short, not UTF-8 or not JSON, lacks the column, or contains no text; the message
        names the file and the line or row.
    ImportError
        If the file is .zst or .parquet and pyarrow is missing.

    Notes
    -----
    Memory: two pieces of a .txt; one line of a .jsonl; 256 rows and some tens of MB of a .parquet, even if the file
    has a single row group.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "a.jsonl"
    >>> _ = file.write_text('{"text": "one"}\\n{"text": "two"}\\n')
    >>> [(piece.text, piece.where.partition("a.jsonl")[2]) for piece in read_text(file)]
    [('one', ':1'), ('two', ':2')]
    """
    place = Path(path)
    if not place.name.endswith(TEXT_SUFFIXES):
        raise ValueError(f"{place}: must end in one of {', '.join(TEXT_SUFFIXES)}")
    if place.suffix == ".parquet":
        pieces = _rows(place, text_column)
    elif ".jsonl" in place.suffixes[-2:]:
        pieces = _objects(place, text_column)
    else:
        pieces = _plain(place)
    empty = True
    for piece in pieces:
        if piece.text:
            empty = False
            yield piece
    if empty:
        raise ValueError(f"{place}: must contain text; remove it from the domain")


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if path.suffix == ".zst":
        # The package zstandard does not notice that a file was cut short; pyarrow does.
        arrow = optional("pyarrow", "reading .zst files")
        return cast(BinaryIO, io.BufferedReader(arrow.CompressedInputStream(arrow.OSFile(str(path)), "zstd")))
    return path.open("rb")


def _blocks(path: Path, read: Callable[[BinaryIO], bytes]) -> Iterator[tuple[int, bytes]]:
    """Call ``read`` until nothing is left; yield the line number at which each block begins, and the block."""
    line = 1
    with _open(path) as file:
        while True:
            try:
                block = read(file)
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{path}:{line}: the file is damaged or cut short: {error}") from None
            if not block:
                return
            yield line, block
            line += block.count(b"\n")


def _plain(path: Path) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    blocks = _blocks(path, lambda file: file.read(_BLOCK) + file.readline(_BLOCK))
    line, block = next(blocks, (1, b""))
    while block:
        following_line, following = next(blocks, (0, b""))
        try:
            text = decoder.decode(block, not following)
        except UnicodeDecodeError as error:
            wrong = line + error.object[: error.start].count(b"\n")
            raise _not_utf8(f"{path}:{wrong}", error) from None
        yield Piece(text, f"{path}:{line}", not following)
        line, block = following_line, following


def _objects(path: Path, column: str) -> Iterator[Piece]:
    for line, raw in _blocks(path, lambda file: file.readline()):
        where = f"{path}:{line}"
        try:
            content = raw.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(where, error) from None
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: must be one JSON object; {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: must be one JSON object; got {type(row).__name__}")
        if column not in row:
            raise ValueError(_lacking(where, column, list(row)))
        yield Piece(_string(row[column], where, column), where, True)


def _rows(path: Path, column: str) -> Iterator[Piece]:
    arrow = optional("pyarrow", "reading .parquet files")
    parquet = optional("pyarrow.parquet", "reading .parquet files")
    with path.open("rb"):
        pass  # raises OSError, which pyarrow would also raise for a damaged file
    row = 0
    try:
        # Without these options pyarrow reads whole row groups, and a file may consist of a single one.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BLOCK) as file:
            if column not in file.schema_arrow.names:
                raise KeyError(_lacking(str(path), column, file.schema_arrow.names))
            for batch in file.iter_batches(_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    where = f"{path}, row {row}"
                    yield Piece(_string(value, where, column), where, True)
    except KeyError as error:
        raise ValueError(error.args[0]) from None
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, row {row + 1}: the file is damaged, cut short or not parquet: {error}") from None


def _string(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column!r} must be a string; got {type(value).__name__}")
    return value


def _lacking(where: str, column: str, names: list[str]) -> str:
    return f"{where}: must have the column {column!r}; got {names}; set text_column to one of them"


def _not_utf8(where: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{where}: must be UTF-8; {error.reason}; convert the file")
