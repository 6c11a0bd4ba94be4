"""A domain on disk as a dataset of sequences, whatever its files are."""

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
    """Open a file, a folder or all files that match a pattern as one dataset.

    Parameters
    ----------
    path : path
        Text (.txt, .jsonl, both also .gz or .zst; .parquet) or tokens (.npy, .bin); see `find_files`.
    length : int
        Targets per sequence; an item is int64 [length + 1].
    tokenizer : Tokenizer
        For text. Tokens are taken as they are.
    text_column : str
        Of .jsonl and .parquet.
    cache : path
        For text: the folder in which its tokens are kept, best on a fast disk beside what the run writes; not within
        the domain.
    dtype : integer dtype, optional
        For .bin files, which do not tell.
    vocabulary : int, optional
        Tokens the model knows: each must be below; None: only below the tokenizer's own. Looked at when a sequence is
        read.

    Returns
    -------
    TokenSequences
        For a `ConcatDataset` with a `MixtureSampler` over it.

    Raises
    ------
    OSError, ImportError
        If files cannot be opened, or pyarrow is needed and missing.
    ValueError
        If there are no such files, one is empty or damaged, or all are shorter than one sequence; the message names
        the file, and the line or row where there is one.

    Notes
    -----
    Text is tokenized once, which takes as long as the tokenizer does, and needs no more memory than its longest
    document. See `tokenize` and `TokenSequences`.

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
        raise ValueError(f"{os.fspath(path)}: cache must be a folder in which the tokens of text are kept; got None")
    if Path(path).is_dir() and Path(path).resolve() in (Path(cache).resolve(), *Path(cache).resolve().parents):
        raise ValueError(
            f"{os.fspath(path)}: cache must not lie in the domain, of which it would be a part; got {cache}"
        )
    tokens = tokenize(files, cache, tokenizer, text_column)
    try:
        return TokenSequences([tokens], length, vocabulary=tokenizer.vocabulary if vocabulary is None else vocabulary)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None
