"""What the jobs of a worker share: how they note progress, errors and the Python that runs them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

__all__ = ["Save", "Trying", "in_one_line", "interpreter", "take_death"]

Save = Callable[[dict[str, Any]], object]
Trying = Callable[[str], object]


def take_death(content: dict[str, Any]) -> dict[str, Any] | None:
    """Remove and return what an earlier process was trying when it died, with ``why``; None if none died."""
    trying = content.pop("trying", None)
    return {"why": "no reason known", **trying} if trying else None


def in_one_line(error: BaseException, length: int = 600) -> str:
    """Return type and message of an error in one line.

    Examples
    --------
    >>> in_one_line(ValueError("a\\n  b"))
    'ValueError: a b'
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[:length]}"


def interpreter() -> list[str]:
    """Return the command of a Python like this one, with ``-S`` if this one has it."""
    return [sys.executable, *(["-S"] if sys.flags.no_site else [])]
