"""Read what the caller gave: the matrix with its names, and numbers per domain, matched by name."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from tikmix_fast.matrix.influence_matrix import InfluenceMatrix

Array = NDArray[np.float64]
Names = tuple[str, ...] | None

__all__ = ["label", "per_domain", "read_matrix", "read_mixtures", "read_number", "read_prior", "read_whole"]


def label(names: Names, index: SupportsIndex) -> str:
    """Name one row or column in a message: its name where there is one, else its index."""
    return repr(names[index]) if names else str(int(index))


def read_matrix(matrix: Any) -> tuple[Array, NDArray[np.bool_], Names, Names]:
    """Return the influence [n, m] with zeros where unmeasured, which domains are measured [m], tasks and domains.

    Raises
    ------
    ValueError
        If the matrix is not [n, m] with n, m >= 1, holds an infinity, or a domain is measured for some tasks only.
    """
    named = isinstance(matrix, InfluenceMatrix)
    values = _floats("matrix", matrix.values if named else matrix)
    tasks: Names = matrix.tasks if named else None
    domains: Names = matrix.domains if named else None
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"matrix must have shape [n, m] with at least one task and one domain; got {values.shape}")
    if np.isinf(values).any():
        i, j = np.argwhere(np.isinf(values))[0]
        raise ValueError(
            f"matrix must be finite or NaN; got infinity at task {label(tasks, i)}, domain {label(domains, j)}"
        )
    unknown = np.isnan(values)
    partly = np.flatnonzero(unknown.any(0) & ~unknown.all(0))
    if partly.size:
        j = int(partly[0])
        missing = ", ".join(label(tasks, i) for i in np.flatnonzero(unknown[:, j]))
        raise ValueError(
            f"a domain must be measured for all tasks or for none (a column of NaN); got domain {label(domains, j)}"
            f" without task(s) {missing}; measure them, or drop the task or the domain"
        )
    return np.where(unknown, 0.0, values), np.asarray(~unknown.any(0)), tasks, domains


def read_number(name: str, given: Any, *, positive: bool = False, most: float = np.inf) -> float:
    """Return one finite number, at least 0 (above 0 if ``positive``) and at most ``most``, or raise naming it."""
    try:
        number = float(given)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number; got {given!r}") from None
    if not np.isfinite(number) or number < 0 or number > most or (positive and number == 0):
        limit = f" and at most {most:g}" if np.isfinite(most) else ""
        raise ValueError(f"{name} must be {'above 0' if positive else 'at least 0'}{limit}, and finite; got {given!r}")
    return number


def read_whole(name: str, given: Any, least: int) -> int:
    """Return a whole number of at least ``least``, or raise naming it."""
    try:
        number = operator.index(given)
    except TypeError:
        raise TypeError(f"{name} must be an int; got {given!r}") from None
    if isinstance(given, (bool, np.bool_)) or number < least:
        raise ValueError(f"{name} must be an int of at least {least}; got {given!r}")
    return number


def per_domain(name: str, given: Any, domains: Names, count: int, default: float | None = None) -> Array:
    """Return one non-negative number per domain [count] from a mapping by name, an array, or a number for all.

    Parameters
    ----------
    default : float, optional
        For domains that a mapping does not name, and permission to give one number for all. Without it every domain
        must be given.

    Raises
    ------
    TypeError, ValueError
        Naming the unknown or missing domains, the wrong length, or the number that is negative or NaN.
    """
    if isinstance(given, Mapping):
        if domains is None:
            raise ValueError(
                f"{name} must be an array of {count} numbers: a plain matrix has no domain names; got a mapping"
            )
        unknown = [key for key in given if key not in domains]
        missing = [] if default is not None else [key for key in domains if key not in given]
        if unknown or missing:
            wrong = [f"{word} {names}" for word, names in (("unknown", unknown), ("missing", missing)) if names]
            raise ValueError(f"{name} must name the matrix's domains; got {' and '.join(wrong)}")
        given = [given.get(key, default) for key in domains]
    numbers = _floats(name, given)
    if numbers.ndim == 0 and default is not None:
        numbers = np.full(count, float(numbers))
    if numbers.shape != (count,):
        advice = "; give a mapping by domain name" if domains else ""
        raise ValueError(f"{name} must have one number per domain, {count}; got shape {numbers.shape}{advice}")
    wrong_at = np.flatnonzero(~(numbers >= 0))
    if wrong_at.size:
        j = int(wrong_at[0])
        raise ValueError(f"{name} must be at least 0; got {numbers[j]} for domain {label(domains, j)}")
    return numbers


def read_prior(prior: Any, domains: Names, count: int, name: str = "prior") -> Array:
    """Return a mixture [count], scaled to sum to 1.

    Raises
    ------
    TypeError, ValueError
        As `per_domain`, or if it does not sum to 1 within 1e-6.
    """
    weights = per_domain(name, prior, domains, count)
    total = float(weights.sum())
    if not abs(total - 1.0) <= 1e-6:
        raise ValueError(f"{name} must sum to 1 within 1e-6; got {total:g}; divide it by its sum (token counts too)")
    return weights / total


def read_mixtures(name: str, given: Any, count: int | None = None) -> Array:
    """Return mixtures [N, count], each scaled to sum to 1; sums may be off by 0.01, as in tables that were rounded.

    Raises
    ------
    TypeError, ValueError
        If there are none, the number of domains is another, or a row is not a mixture; the message names the row.
    """
    mixtures = _floats(name, given)
    wanted = "m" if count is None else str(count)
    if mixtures.ndim != 2 or 0 in mixtures.shape or (count is not None and mixtures.shape[1] != count):
        raise ValueError(f"{name} must have shape [N, {wanted}], one mixture a row; got {mixtures.shape}")
    sums = mixtures.sum(axis=1)
    wrong = np.flatnonzero(~((mixtures >= 0).all(axis=1) & (np.abs(sums - 1.0) <= 0.01)))
    if wrong.size:
        row = int(wrong[0])
        raise ValueError(
            f"{name} must be at least 0 and sum to 1 within 0.01 in every row; got row {row} with sum {sums[row]:g} and"
            f" least weight {mixtures[row].min():g}; divide each row by its sum"
        )
    return np.asarray(mixtures / sums[:, None])


def _floats(name: str, given: Any) -> Array:
    try:
        return np.array(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must hold numbers; got {type(given).__name__}") from None
