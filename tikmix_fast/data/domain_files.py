"""Which files a domain on disk consists of."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from tikmix_fast.data.text_files import TEXT_SUFFIXES
from tikmix_fast.data.token_files import TOKEN_SUFFIXES

__all__ = ["find_files"]

_SUFFIXES = (*TEXT_SUFFIXES, *TOKEN_SUFFIXES)


def find_files(path: str | os.PathLike[str]) -> list[Path]:
    """List the files of a domain, in the order of their paths.

    Parameters
    ----------
    path : path
        A file; a folder, of which all files with a known ending are taken, also those in folders below it, but none
        that is hidden; or a pattern as `glob.glob` takes it, with ``**``.

    Returns
    -------
    list of Path
        All of text (.txt or .jsonl, plain, .gz or .zst; .parquet) or all of tokens (.npy, .bin).

    Raises
    ------
    FileNotFoundError
        If there is no such file or folder.
    ValueError
        If nothing with a known ending is there, or text and tokens both.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for name in ("b.txt", "a.jsonl", "notes.md"):
    ...     _ = (folder / name).write_text("text")
    >>> [file.name for file in find_files(folder)]
    ['a.jsonl', 'b.txt']
    """
    place = Path(path)
    if place.is_dir():
        found = [
            file
            for file in place.rglob("*")
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(place).parts)
        ]
    elif place.exists():
        found = [place]
    else:
        found = [Path(file) for file in glob.glob(os.fspath(path), recursive=True) if Path(file).is_file()]
        if not found:
            raise FileNotFoundError(f"{os.fspath(path)}: no such file or folder, and no file that matches it")
    files = sorted(file for file in found if file.name.endswith(_SUFFIXES))
    if not files:
        raise ValueError(f"{os.fspath(path)}: must hold files that end in {', '.join(_SUFFIXES)}; got none")
    tokens = [file for file in files if file.name.endswith(TOKEN_SUFFIXES)]
    if tokens and len(tokens) < len(files):
        text = next(file for file in files if not file.name.endswith(TOKEN_SUFFIXES))
        raise ValueError(
            f"{os.fspath(path)}: must hold text or tokens, not both; got {text} and {tokens[0]}; name one kind by a "
            f"pattern such as '*{tokens[0].suffix}'"
        )
    return files
