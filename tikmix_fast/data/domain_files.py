"""Find the files of a domain on disk."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from tikmix_fast.data.text_files import TEXT_SUFFIXES
from tikmix_fast.data.token_files import TOKEN_SUFFIXES

__all__ = ["find_files"]

_SUFFIXES = (*TEXT_SUFFIXES, *TOKEN_SUFFIXES)


def find_files(path: str | os.PathLike[str]) -> list[Path]:
    """List the files of a domain, sorted by path.

    Parameters
    ----------
    path : path
        A file; a folder, which stands for all its files with a known ending, subfolders included and hidden files left
        out; or a pattern for `glob.glob`, where ``**`` matches subfolders.

    Returns
    -------
    list of Path
        Either all text (.txt or .jsonl, plain, .gz or .zst; .parquet) or all tokens (.npy, .bin).

    Raises
    ------
    FileNotFoundError
        If there is no such file or folder, and nothing matches.
    ValueError
        If no file has a known ending, or there are both text and tokens.

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
        candidates = [
            file
            for file in place.rglob("*")
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(place).parts)
        ]
    elif place.exists():
        candidates = [place]
    else:
        candidates = [Path(file) for file in glob.glob(os.fspath(path), recursive=True) if Path(file).is_file()]
        if not candidates:
            raise FileNotFoundError(f"{os.fspath(path)}: no such file or folder, and no file matches the pattern")
    files = sorted(file for file in candidates if file.name.endswith(_SUFFIXES))
    if not files:
        raise ValueError(f"{os.fspath(path)}: must be or contain files that end in {', '.join(_SUFFIXES)}; got none")
    tokens = [file for file in files if file.name.endswith(TOKEN_SUFFIXES)]
    if tokens and len(tokens) < len(files):
        text = next(file for file in files if not file.name.endswith(TOKEN_SUFFIXES))
        raise ValueError(
            f"{os.fspath(path)}: must contain text or tokens, not both; got {text} and {tokens[0]}; choose one kind "
            f"by a pattern such as '*{tokens[0].suffix}'"
        )
    return files
