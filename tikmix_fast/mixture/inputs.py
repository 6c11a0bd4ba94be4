"""Read the caller's arguments: the matrix with its names, numbers per domain matched by name, and mixtures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.simplex import require_mixtures

Array = NDArray[np.float64]
Names = tuple[str, ...] | None

__all__ = [
    "Array",
    "Names",
    "label",
    "per_domain",
    "read_floats",
    "read_matrix",
    "read_mixtures",
    "read_names",
    "read_number",
    "read_objective",
    "read_prior",
]

# Sums off by no more than this are rounding: the weights stay as they were given.
_ROUNDING = 1e-13


def label(names: Names, index: SupportsIndex) -> str:
    """Return how a message names one row or column: its name if it has one, else its index."""
    return repr(names[index]) if names else str(int(index))


def read_matrix(matrix: Any) -> tuple[Array, NDArray[np.bool_], Names, Names]:
    """Return the influence [n, m] with zeros where unmeasured, which domains are measured [m], tasks and domains.

    Raises
    ------
    ValueError
        If the matrix is not [n, m] with n, m >= 1, holds an infinity, or a domain is measured for some tasks only.
    """
    named = isinstance(matrix, InfluenceMatrix)
    values = read_floats("matrix", matrix.values if named else matrix)
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


def read_names(name: str, value: Any, count: int | None = None) -> tuple[str, ...]:
    """Return names as a tuple; TypeError or ValueError unless they are ``count`` different non-empty strings."""
    names = () if isinstance(value, str) else tuple(value)
    if isinstance(value, str) or not all(isinstance(each, str) for each in names):
        raise TypeError(f"{name} must be a sequence of strings; got {value!r}")
    if not names or "" in names or len(set(names)) != len(names) or len(names) != (count or len(names)):
        raise ValueError(f"{name} must be {count or 'one or more'} different non-empty strings; got {names!r}")
    return names


def read_number(name: str, value: Any, *, positive: bool = False, most: float = np.inf) -> float:
    """Return one finite number, at least 0 (above 0 if ``positive``) and at most ``most``, or raise naming it."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number; got {value!r}") from None
    if not np.isfinite(number) or number < 0 or number > most or (positive and number == 0):
        limit = f" and at most {most:g}" if np.isfinite(most) else ""
        raise ValueError(f"{name} must be {'above 0' if positive else 'at least 0'}{limit}, and finite; got {value!r}")
    return number


def read_objective(uniformity: Any, influence: Any, diversity: Any) -> tuple[float, float, float]:
    """Return the factors of the objective's three terms; TypeError or ValueError if one is bad, or all are 0."""
    uniformity, influence = read_number("uniformity", uniformity), read_number("influence", influence)
    diversity = read_number("diversity", diversity)
    if uniformity == influence == diversity == 0:
        raise ValueError("one of uniformity, influence and diversity must be above 0; got 0 for all")
    return uniformity, influence, diversity


def per_domain(name: str, value: Any, domains: Names, count: int, default: float | None = None) -> Array:
    """Return one non-negative number per domain [count] from a mapping by name, an array, or a number for all.

    Parameters
    ----------
    default : float, optional
        For domains that a mapping does not name. It also allows one number for all domains. Without a default every
        domain needs a number.

    Raises
    ------
    TypeError, ValueError
        Naming the unknown or missing domains, the wrong length, or the number that is negative or NaN.
    """
    if isinstance(value, Mapping):
        if domains is None:
            raise ValueError(
                f"{name} must be an array of {count} numbers: a plain matrix has no domain names; got a mapping"
            )
        unknown = [key for key in value if key not in domains]
        missing = [] if default is not None else [key for key in domains if key not in value]
        if unknown or missing:
            wrong = [f"{word} {names}" for word, names in (("unknown", unknown), ("missing", missing)) if names]
            raise ValueError(f"{name} must name the matrix's domains; got {' and '.join(wrong)}")
        value = [value.get(key, default) for key in domains]
    numbers = read_floats(name, value)
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
        As `per_domain`, or if the sum is not 1 within 1e-6.
    """
    weights = per_domain(name, prior, domains, count)
    require_mixtures(name, weights, 1e-6)
    total = float(weights.sum())
    return weights if abs(total - 1.0) <= _ROUNDING else weights / total


def read_mixtures(name: str, value: Any, count: int | None = None) -> Array:
    """Return mixtures [N, count], each scaled to sum to 1; sums may be off by 0.01, as in rounded tables.

    Raises
    ------
    TypeError, ValueError
        If there are none, the number of domains is another, or a row is not a mixture; the message names the row.
    """
    mixtures = read_floats(name, value)
    if mixtures.ndim != 2 or 0 in mixtures.shape or (count is not None and mixtures.shape[1] != count):
        m = "m" if count is None else str(count)
        raise ValueError(f"{name} must have shape [N, {m}], one mixture a row; got {mixtures.shape}")
    require_mixtures(name, mixtures, 0.01)
    return np.asarray(mixtures / mixtures.sum(axis=1)[:, None])


def read_floats(name: str, value: Any) -> Array:
    """Return an array of float64, or raise TypeError naming the argument."""
    try:
        return np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must hold numbers; got {type(value).__name__}") from None
