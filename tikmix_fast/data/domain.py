"""Open the files of a domain, text or tokens, as a dataset of sequences."""

from __future__ import annotations

import os
from pathlib import Path

from numpy.typing import DTypeLike

from tikmix_fast.data.domain_files import find_files
from tikmix_fast.data.token_files import TOKEN_SUFFIXES, TokenSequences
from tikmix_fast.data.tokenizing import BYTES, Tokenizer, tokenize

__all__ = ["open_domain"]


def open_domain(
    path: str | os.PathLike[str],
    length: int,
    tokenizer: Tokenizer = BYTES,
    text_column: str = "text",
    *,
    cache: str | os.PathLike[str] | None = None,
    dtype: DTypeLike | None = None,
    vocabulary: int | None = None,
) -> TokenSequences:
    """Open a file, a folder, or all files that match a pattern, as one dataset.

    Parameters
    ----------
    path : path
        Text (.txt, .jsonl, both also .gz or .zst; .parquet) or tokens (.npy, .bin); see `find_files`.
    length : int
        Targets per sequence; an item is int64 [length + 1].
    tokenizer : Tokenizer
        For text only; token files need none.
    text_column : str
        Name of the text in .jsonl and .parquet files.
    cache : path
        Needed for text: the folder that stores its tokens. Choose a fast disk and a folder outside the domain.
    dtype : integer dtype, optional
        For .bin files, which do not state it.
    vocabulary : int, optional
        Size of the model's vocabulary: reading a sequence checks that every token is below it. None: the size of the
        tokenizer's vocabulary for text; no upper limit for tokens.

    Returns
    -------
    TokenSequences
        Combine several in a `ConcatDataset` for a `MixtureSampler`.

    Raises
    ------
    OSError, ImportError
        If a file cannot be opened, or needs pyarrow, which is missing.
    ValueError
        If no file matches, one is empty or damaged, or all together are shorter than one sequence; the message names
        the file, and the line or row if there is one.

    Notes
    -----
    The first call tokenizes text; later calls find the tokens in ``cache``. Memory: that of the longest document. See
    `tokenize` and `TokenSequences`.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.txt").write_text("hello world")
    >>> bytes(open_domain(folder / "a.txt", 4, cache=folder / "cache")[1].tolist())
    b'o wor'
    """
    files = find_files(path)
    if files[0].name.endswith(TOKEN_SUFFIXES):
        return TokenSequences(files, length, dtype=dtype, vocabulary=vocabulary)
    if cache is None:
        raise ValueError(f"{os.fspath(path)}: cache must be a folder for the tokens of this text; got None")
    if Path(path).is_dir() and Path(path).resolve() in (Path(cache).resolve(), *Path(cache).resolve().parents):
        raise ValueError(f"{os.fspath(path)}: cache must lie outside the domain, or become part of it; got {cache}")
    tokens = tokenize(files, cache, tokenizer, text_column)
    try:
        return TokenSequences([tokens], length, vocabulary=tokenizer.vocabulary if vocabulary is None else vocabulary)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None
