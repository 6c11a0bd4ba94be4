"""A random sample of sequences from a local file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tikmix_fast.training.checkpoint import Encoder

__all__ = ["read_documents", "sample_sequences"]


def read_documents(path: str | os.PathLike[str]) -> list[str]:
    """Return the documents of a file: a text file is one, a ``.jsonl`` file has one per line under "text".

    Raises
    ------
    ValueError
        If it is not UTF-8, or a line is not an object with a string "text".
    """
    place = Path(path)
    try:
        content = place.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(place)!r} is not UTF-8: {error}") from None
    if place.suffix != ".jsonl":
        return [content] if content.strip() else []
    return [text for text in _texts(place, content) if text.strip()]


def sample_sequences(
    documents: list[str],
    encode: Encoder,
    *,
    rows: int,
    length: int,
    vocabulary: int,
    separator: int | None,
    seed: tuple[int, ...],
) -> Tensor:
    """Return at most ``rows`` sequences [rows, length] of token ids, drawn without replacement.

    Documents come in random order, each ended by the separator, until there are enough tokens; these are cut into
    sequences, of which some are chosen. Nothing is padded, what is left over at the end is not used.

    Raises
    ------
    ValueError
        If there is not even one sequence, or a token is not in the vocabulary.
    """
    random = np.random.default_rng(seed)
    parts: list[list[int]] = []
    have = 0
    for index in random.permutation(len(documents)):
        parts.append([*encode(documents[index]), *([] if separator is None else [separator])])
        have += len(parts[-1])
        if have >= rows * length:
            break
    tokens = np.fromiter((token for part in parts for token in part), dtype=np.int64, count=have)
    if have < length:
        raise ValueError(f"it has {have} tokens, and one sequence needs {length}: give more text or a smaller length")
    if tokens.max() >= vocabulary:
        raise ValueError(
            f"the tokenizer gives token {tokens.max()}, but the model knows {vocabulary}: it is another model's"
        )
    sequences = tokens[: have // length * length].reshape(-1, length)
    chosen = random.permutation(len(sequences))[:rows]
    return torch.from_numpy(sequences[chosen])


def _texts(place: Path, content: str) -> Iterator[str]:
    # Not splitlines: it also cuts at separators that JSON strings may hold.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{str(place)!r}, line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError(f'{str(place)!r}, line {number} must be an object with a string "text"')
        yield record["text"]
