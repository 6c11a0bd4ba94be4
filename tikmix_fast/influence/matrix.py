"""The Group Influence matrix with its names and its error bars. No torch here: the mixture layer reads it too."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tikmix_fast import files

__all__ = ["InfluenceMatrix"]

Array = NDArray[np.float64]

_FORMAT = "tikmix_fast.influence_matrix"
_VERSION = 1


@dataclass(frozen=True, eq=False)
class InfluenceMatrix:
    """Group Influence of m domains on n tasks, ``values[i, j] = <P g_i, g_j>``.

    Positive means that a small step on domain j lowers the loss of task i. Every gradient is a mean per target token,
    so a cell does not depend on how many tokens were measured. A cell that was never measured is NaN.

    Attributes
    ----------
    values : float64 [n, m]
        The influence. Unit: loss of task i per unit step along P times the mean gradient of domain j.
    stderr : float64 [n, m]
        Standard error of ``values``: domain side, task side and projection together. NaN where either side had fewer
        than two micro-batches.
    tokens : float64 [m]
        Target tokens measured per domain.
    tasks, domains : tuple of str
        Names of the rows and of the columns.
    stderr_domain, stderr_task : float64 [n, m]
        Two parts of ``stderr``: sampling of the domain's batches, and of the task's.
    dof : float64 [n, m]
        Degrees of freedom of ``stderr`` (Welch-Satterthwaite), for t quantiles.
    microbatches : int64 [m]
        Measured micro-batches in which the domain had a target token.
    stderr_projection : float64 [n, m] or None
        The part of ``stderr`` that comes from measuring through random projections; None = measured exactly.
    dropped : int
        Micro-batches dropped because they were not finite.
    settings : mapping
        How it was measured (preconditioner, reference learning rate, ...), plain JSON types.

    Raises
    ------
    ValueError
        If shapes disagree, names repeat, or a standard error is negative.

    Examples
    --------
    >>> matrix = InfluenceMatrix.from_values([[1.0, -0.5]], tasks=["qa"], domains=["web", "noise"])
    >>> matrix["qa", "noise"]
    -0.5
    """

    values: Array
    stderr: Array
    tokens: Array
    tasks: tuple[str, ...]
    domains: tuple[str, ...]
    stderr_domain: Array
    stderr_task: Array
    dof: Array
    microbatches: NDArray[np.int64]
    dropped: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    stderr_projection: Array | None = None

    def __post_init__(self) -> None:
        cells = (len(self.tasks), len(self.domains))
        errors = ["stderr", "stderr_domain", "stderr_task"]
        if self.stderr_projection is not None:
            errors.append("stderr_projection")
        for name in ("values", *errors, "dof"):
            _check_array(name, getattr(self, name), cells)
        _check_array("tokens", self.tokens, cells[1:])
        _check_array("microbatches", self.microbatches, cells[1:])
        for name in ("tasks", "domains"):
            names = getattr(self, name)
            if not all(isinstance(each, str) and each for each in names):
                raise ValueError(f"{name} must be non-empty strings; got {names!r}")
            if len(set(names)) != len(names):
                raise ValueError(f"{name} must be unique; got {names!r}")
        for name in (*errors, "tokens"):
            if (getattr(self, name) < 0).any():
                raise ValueError(f"{name} must not be negative")

    @classmethod
    def from_values(
        cls,
        values: Any,
        *,
        tasks: Any = None,
        domains: Any = None,
        stderr: Any = None,
        tokens: Any = None,
        settings: Mapping[str, Any] | None = None,
    ) -> InfluenceMatrix:
        """Make a matrix from plain numbers; what is not given is unknown (NaN), names default to ``task0``,
        ``domain0``.

        Parameters
        ----------
        values : array_like [n, m]
        tasks, domains : sequence of str, optional
        stderr : array_like [n, m], optional
            Taken as the domain side's error, with unlimited degrees of freedom.
        tokens : array_like [m], optional
        settings : mapping, optional
        """
        cells = np.array(values, dtype=np.float64)
        if cells.ndim != 2:
            raise ValueError(f"values must have shape [n, m]; got {cells.shape}")
        n, m = cells.shape
        unknown = np.full((n, m), np.nan)
        error = unknown if stderr is None else np.array(stderr, dtype=np.float64)
        return cls(
            values=cells,
            stderr=error,
            tokens=np.full(m, np.nan) if tokens is None else np.array(tokens, dtype=np.float64),
            tasks=tuple(f"task{i}" for i in range(n)) if tasks is None else tuple(tasks),
            domains=tuple(f"domain{j}" for j in range(m)) if domains is None else tuple(domains),
            stderr_domain=error.copy(),
            stderr_task=unknown.copy(),
            dof=unknown.copy() if stderr is None else np.full((n, m), np.inf),
            microbatches=np.zeros(m, dtype=np.int64),
            settings=dict(settings or {}),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Number of tasks and of domains, (n, m)."""
        return len(self.tasks), len(self.domains)

    def __getitem__(self, cell: tuple[str, str]) -> float:
        """Return one influence by the names of its task and its domain."""
        task, domain = cell
        for name, names, wanted in (("task", self.tasks, task), ("domain", self.domains, domain)):
            if wanted not in names:
                raise KeyError(f"unknown {name} {wanted!r}; known: {', '.join(names)}")
        return float(self.values[self.tasks.index(task), self.domains.index(domain)])

    def interval(self, level: float = 0.95) -> tuple[Array, Array]:
        """Return the lower and upper ends [n, m] of the confidence interval, by t quantiles with `dof`.

        Raises
        ------
        ValueError
            If ``level`` is not between 0 and 1.
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must lie between 0 and 1; got {level!r}")
        from scipy.special import stdtrit

        half = stdtrit(self.dof, 0.5 + level / 2) * self.stderr
        return self.values - half, self.values + half

    def significant(self, level: float = 0.95) -> NDArray[np.bool_]:
        """Tell for each cell [n, m] whether its confidence interval excludes zero; False where the error is unknown."""
        low, high = self.interval(level)
        return np.asarray((low > 0) | (high < 0))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; a number that is not finite becomes None (unknown) or "inf"."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "tasks": list(self.tasks),
            "domains": list(self.domains),
            "values": _to_json(self.values),
            "stderr": _to_json(self.stderr),
            "stderr_domain": _to_json(self.stderr_domain),
            "stderr_task": _to_json(self.stderr_task),
            **({} if self.stderr_projection is None else {"stderr_projection": _to_json(self.stderr_projection)}),
            "dof": _to_json(self.dof),
            "tokens": _to_json(self.tokens),
            "microbatches": self.microbatches.tolist(),
            "dropped": self.dropped,
            "settings": dict(self.settings),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> InfluenceMatrix:
        """Read what `to_dict` wrote.

        Raises
        ------
        ValueError
            If the content is not an influence matrix, is of an unknown version, or lacks a field.
        """
        if not isinstance(content, Mapping) or content.get("format") != _FORMAT:
            raise ValueError(f"not an influence matrix: 'format' must be {_FORMAT!r}")
        if content.get("version") != _VERSION:
            raise ValueError(f"influence matrix version must be {_VERSION}; got {content.get('version')!r}")
        try:
            return cls(
                values=_from_json(content["values"]),
                stderr=_from_json(content["stderr"]),
                tokens=_from_json(content["tokens"]),
                tasks=tuple(content["tasks"]),
                domains=tuple(content["domains"]),
                stderr_domain=_from_json(content["stderr_domain"]),
                stderr_task=_from_json(content["stderr_task"]),
                dof=_from_json(content["dof"]),
                microbatches=np.array(content["microbatches"], dtype=np.int64),
                dropped=int(content["dropped"]),
                settings=dict(content["settings"]),
                stderr_projection=_from_json(content["stderr_projection"]) if "stderr_projection" in content else None,
            )
        except KeyError as error:
            raise ValueError(f"influence matrix lacks the field {error.args[0]!r}") from None
        except TypeError as error:
            raise ValueError(f"influence matrix has a field of the wrong type: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the matrix as JSON, atomically; returns the path.

        Raises
        ------
        OSError
            If the folder is missing or not writable.
        """
        return files.write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InfluenceMatrix:
        """Read a matrix that `save` wrote.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is not JSON or not an influence matrix; the message names it.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None


def _check_array(name: str, array: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(array, np.ndarray) or array.shape != shape:
        raise ValueError(
            f"{name} must be an array of shape {shape}; got {getattr(array, 'shape', type(array).__name__)}"
        )


def _to_json(array: Array) -> list[Any]:
    def one(number: float) -> Any:
        if np.isnan(number):
            return None
        return float(number) if np.isfinite(number) else ("inf" if number > 0 else "-inf")

    return [one(row) if array.ndim == 1 else [one(cell) for cell in row] for row in array]


def _from_json(rows: Any) -> Array:
    def one(cell: Any) -> float:
        return float("nan") if cell is None else float(cell)

    return np.array(
        [[one(cell) for cell in row] if isinstance(row, list) else one(row) for row in rows], dtype=np.float64
    )
