"""Check weights by name, and round them to decimals that sum to one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from tikmix_fast.arguments import require_int
from tikmix_fast.simplex import require_mixtures

__all__ = ["check_names", "checked_weights", "decimals"]


def checked_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """Return the weights divided by their sum, in the same order.

    Raises
    ------
    TypeError, ValueError
        If ``weights`` is not a mapping from names to finite numbers of at least 0 that sum to 1 within 1e-6.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must map names to numbers; got {type(weights).__name__}; use MixtureResult.as_dict()")
    values = {name: float(weight) for name, weight in weights.items()}
    require_mixtures("weights", np.array(list(values.values())), 1e-6)
    total = math.fsum(values.values())
    return {name: value / total for name, value in values.items()}


def check_names(what: str, names: Iterable[str], domains: Iterable[str]) -> None:
    """Raise ValueError unless ``names``, from the argument ``what``, are ``domains`` in any order."""
    if sorted(names) != sorted(domains):
        raise ValueError(f"{what} must name every domain once, {list(domains)}; got {list(names)}")


def decimals(weights: Mapping[str, float], digits: int = 6) -> dict[str, str]:
    """Round weights to decimals that sum to exactly 1; no positive weight becomes 0.

    Parameters
    ----------
    weights : mapping from str to float
        Sum 1.
    digits : int
        Digits after the point, 1 to 15.

    Returns
    -------
    dict of str to str
        Each within 10^-digits of its weight, except that very small ones become 10^-digits, at the cost of the largest.

    Raises
    ------
    TypeError, ValueError
        As `checked_weights`, or if ``digits`` is out of range or too small for that many domains.

    Examples
    --------
    >>> decimals({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 2)
    {'a': '0.34', 'b': '0.33', 'c': '0.33'}
    """
    require_int("digits", digits, 1, 15)
    shares = checked_weights(weights)
    whole = 10**digits
    exact = np.array(list(shares.values())) * whole
    units = np.where((exact > 0) & (exact < 1), 1, np.floor(exact)).astype(np.int64)
    rest = whole - int(units.sum())
    if rest >= 0:
        units[np.argsort(units - exact, kind="stable")[:rest]] += 1
    for _ in range(-rest):
        units[units.argmax()] -= 1
    if (units[exact > 0] < 1).any():
        raise ValueError(f"digits must be more than {digits}, so that each of {len(shares)} domains can be above 0")
    return {
        name: f"{unit // whole}.{unit % whole:0{digits}}" for name, unit in zip(shares, units.tolist(), strict=True)
    }
