"""Checks of plain arguments: the same words for the same mistake in every room."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any

__all__ = ["require_choice", "require_int"]


def require_int(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Return ``value`` as an int; numpy's integers count, bools and floats do not.

    Parameters
    ----------
    name : str
        The argument, for the message.
    value
        What the caller got.
    least, most : int, optional
        The range, both ends included; ``most`` needs ``least``.

    Raises
    ------
    ValueError
        If it is no integer, or out of the range.

    Examples
    --------
    >>> require_int("batch", 8, 1)
    8
    >>> require_int("batch", 2.0, 1)
    Traceback (most recent call last):
    ValueError: batch must be an int of at least 1; got 2.0
    >>> require_int("rank", 4, 0, 3)
    Traceback (most recent call last):
    ValueError: rank must be an int from 0 to 3; got 4
    """
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        span = "" if least is None else f" of at least {least}" if most is None else f" from {least} to {most}"
        raise ValueError(f"{name} must be an int{span}; got {value!r}")
    return number


def require_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``.

    Examples
    --------
    >>> require_choice("kind", "c", ("a", "b"))
    Traceback (most recent call last):
    ValueError: kind must be one of 'a', 'b'; got 'c'
    """
    if value not in (options := tuple(choices)):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}; got {value!r}")
