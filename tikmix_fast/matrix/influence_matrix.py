"""The Group Influence matrix with its names and its error bars."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tikmix_fast import files
from tikmix_fast.arguments import require_choice, require_int
from tikmix_fast.matrix.heavy_tails import Tails, heavy_tails
from tikmix_fast.matrix.microbatch_record import Array, MicrobatchRecord
from tikmix_fast.matrix.resampling import SplitHalf, bootstrap_interval, split_half

__all__ = ["InfluenceMatrix"]


_FORMAT = "tikmix_fast.influence_matrix"
_VERSION = 1
_NUMBERS = ("values", "stderr", "stderr_domain", "stderr_task", "dof", "tokens")
_OPTIONAL = ("stderr_projection", "effective_microbatches")


@dataclass(frozen=True, eq=False)
class InfluenceMatrix:
    """Group Influence of m domains on n tasks, ``values[i, j] = <P g_i, g_j>``.

    Positive means that a small step on domain j lowers the loss of task i. Every gradient is a mean per target token,
    so a cell does not depend on the number of measured tokens. A cell without a measurement is NaN.

    Attributes
    ----------
    values : float64 [n, m]
        The influence. Unit: loss of task i per unit step along P times the mean gradient of domain j.
    stderr : float64 [n, m]
        Standard error of ``values``: domain side, task side and projection together. NaN where the domain has fewer
        than two micro-batches, or the task fewer than two splits.
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
        The part of ``stderr`` that comes from random projections; None if the measurement was exact.
    dropped : int
        Micro-batches that were dropped because they were not finite.
    settings : mapping
        Settings of the measurement (preconditioner, reference learning rate, ...), as plain JSON types.
    effective_microbatches : float64 [m] or None
        The number of equally large micro-batches with the same information: (sum N)^2 / sum N^2 of their target
        tokens N.
    record : MicrobatchRecord or None
        The micro-batches in a bounded number of blocks. ``interval(method="bootstrap")``, `split_half` and `tails` need
        it. None in matrices from plain values.

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
    effective_microbatches: Array | None = None
    record: MicrobatchRecord | None = None

    def __post_init__(self) -> None:
        cells = (len(self.tasks), len(self.domains))
        optional = [name for name in _OPTIONAL if getattr(self, name) is not None]
        errors = [name for name in (*_NUMBERS, *optional) if name.startswith("stderr")]
        for name in (*_NUMBERS, "microbatches", *optional):
            _check_array(name, getattr(self, name), cells if name in ("values", "dof", *errors) else cells[1:])
        if self.record is not None and (self.record.n, self.record.m) != cells:
            raise ValueError(f"record must be of {cells} tasks and domains; got {(self.record.n, self.record.m)}")
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
        """Make a matrix from plain numbers. Numbers left out are NaN; names default to ``task0``, ``domain0``.

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
        for kind, names, name in (("task", self.tasks, task), ("domain", self.domains, domain)):
            if name not in names:
                raise KeyError(f"unknown {kind} {name!r}; known: {', '.join(names)}")
        return float(self.values[self.tasks.index(task), self.domains.index(domain)])

    def interval(
        self, level: float = 0.95, *, method: Literal["t", "bootstrap"] = "t", resamples: int = 2000, seed: int = 0
    ) -> tuple[Array, Array]:
        """Return the lower and upper ends [n, m] of each cell's own confidence interval.

        Parameters
        ----------
        level : float
            Share of such intervals that contain the true value.
        method : {"t", "bootstrap"}
            "t": symmetric, from t quantiles with `dof`. "bootstrap": follows a skewed distribution; the domain side is
            resampled in blocks of micro-batches and studentised, the rest uses t quantiles. Domains with fewer than
            eight blocks get the t interval. Costs a few ms per domain.
        resamples, seed : int
            Of the bootstrap.

        Raises
        ------
        ValueError
            If ``level`` is not between 0 and 1, the method is unknown, or there is no record to resample.
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must lie between 0 and 1; got {level!r}")
        require_choice("method", method, ("t", "bootstrap"))
        if method == "bootstrap":
            resamples, record = require_int("resamples", resamples, 2), self._required_record()
            return bootstrap_interval(self.values, self.stderr, self.dof, record, level, resamples, seed)
        from scipy.special import stdtrit

        half = stdtrit(self.dof, 0.5 + level / 2) * self.stderr
        return self.values - half, self.values + half

    def p_values(self) -> Array:
        """Return each cell's two-sided p-value [n, m] of "no influence", using `dof`; NaN where unknown."""
        from scipy.special import stdtr

        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(2 * stdtr(self.dof, -np.abs(self.values) / self.stderr), dtype=np.float64)

    def significant(self, level: float = 0.95, *, correction: Literal["bh"] | None = None) -> NDArray[np.bool_]:
        """Tell whether each cell's influence [n, m] differs from zero; False where the error is unknown.

        Parameters
        ----------
        level : float
            Confidence, as in `interval`: 0.95 allows 5% errors. At least 0.5, so that nobody passes 0.05 by mistake.
        correction : "bh" or None
            None: each cell is tested on its own, so 5 of 100 cells without influence become significant. "bh": at most
            5% of the significant cells are expected to have no influence (Benjamini and Hochberg 1995, over all cells
            with a known error; valid for independent and for positively dependent cells).

        Raises
        ------
        ValueError
            If an argument is out of range.

        Examples
        --------
        >>> matrix = InfluenceMatrix.from_values([[2.5, 1.0, 0.1, 0.2]], stderr=[[1.0, 1.0, 1.0, 1.0]])
        >>> matrix.significant().tolist(), matrix.significant(correction="bh").tolist()
        ([[True, False, False, False]], [[True, False, False, False]])
        >>> matrix.significant(0.97, correction="bh").tolist()
        [[False, False, False, False]]
        """
        if not 0.5 <= level < 1.0:
            raise ValueError(
                f"level must be the confidence, at least 0.5 and below 1; got {level!r}: 0.95 for 5% errors"
            )
        require_choice("correction", correction, ("bh", None))
        if correction is None:
            low, high = self.interval(level)
            return np.asarray((low > 0) | (high < 0))
        from scipy.stats import false_discovery_control

        p = self.p_values()
        known = ~np.isnan(p)
        significant = np.zeros(p.shape, dtype=np.bool_)
        if known.any():
            significant[known] = false_discovery_control(p[known]) < 1 - level
        return significant

    def split_half(self, *, draws: int = 100, seed: int = 0) -> SplitHalf:
        """Return how well two halves of this measurement agree on the order of the domains, and so two whole ones.

        Raises
        ------
        ValueError
            If there is no record, or ``draws`` is below one.
        """
        draws, record = require_int("draws", draws, 1), self._required_record()
        return split_half(record, draws, seed)

    def tails(self) -> Tails:
        """Return where single micro-batches decide a cell, with the winsorised values beside the plain ones.

        If the record's blocks hold several micro-batches, the test looks at blocks.

        Raises
        ------
        ValueError
            If there is no record.
        """
        return heavy_tails(self.values, self._required_record(), self.tasks, self.domains)

    def _required_record(self) -> MicrobatchRecord:
        if self.record is None:
            raise ValueError(
                "the matrix has no record of its micro-batches: it was made from plain values; "
                "measure it with an InfluenceEngine"
            )
        return self.record

    def relative_error(self, side: Literal["both", "domain"] = "both") -> Array:
        """Return each task's error relative to the differences between its domains [n].

        This is the root mean square of `stderr` over the standard deviation of the values, both over domains. With
        ``side="domain"`` it uses `stderr_domain`, the part that more micro-batches of the domains can lower.

        A mixture depends on how the domains differ, so this is the error that matters for it: at 0.3 about 9% of the
        variance between domains is noise, at 1 all of it. NaN for fewer than two measured domains; infinite where the
        values are all equal or an error is unknown.
        """
        require_choice("side", side, ("both", "domain"))
        errors = self.stderr if side == "both" else self.stderr_domain
        measured = ~np.isnan(self.values).any(axis=0)
        if measured.sum() < 2:
            return np.full(len(self.tasks), np.nan)
        noise = np.sqrt((errors[:, measured] ** 2).mean(axis=1))
        spread = self.values[:, measured].std(axis=1, ddof=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.where(np.isnan(noise) | (spread == 0), np.inf, noise / spread))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; a number that is not finite becomes None (unknown) or "inf"."""
        optional = {name: getattr(self, name) for name in _OPTIONAL if getattr(self, name) is not None}
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "tasks": list(self.tasks),
            "domains": list(self.domains),
            **{name: _to_json(getattr(self, name)) for name in _NUMBERS},
            "microbatches": self.microbatches.tolist(),
            "dropped": self.dropped,
            "settings": dict(self.settings),
            **{name: _to_json(numbers) for name, numbers in optional.items()},
            **({} if self.record is None else {"record": self.record.to_dict()}),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> InfluenceMatrix:
        """Read the output of `to_dict`.

        Raises
        ------
        ValueError
            If the content is not an influence matrix, has an unknown version, or lacks a field.
        """
        if not isinstance(content, Mapping) or content.get("format") != _FORMAT:
            raise ValueError(f"not an influence matrix: 'format' must be {_FORMAT!r}")
        if content.get("version") != _VERSION:
            raise ValueError(f"influence matrix version must be {_VERSION}; got {content.get('version')!r}")
        optional = [name for name in _OPTIONAL if content.get(name) is not None]
        try:
            tasks, domains = tuple(content["tasks"]), tuple(content["domains"])
            record = content.get("record")
            return cls(
                tasks=tasks,
                domains=domains,
                microbatches=np.array(content["microbatches"], dtype=np.int64),
                dropped=int(content["dropped"]),
                settings=dict(content["settings"]),
                record=None if record is None else MicrobatchRecord.from_dict(record, len(tasks), len(domains)),
                **{name: _from_json(content[name]) for name in (*_NUMBERS, *optional)},
            )
        except KeyError as error:
            raise ValueError(f"influence matrix lacks the field {error.args[0]!r}") from None
        except TypeError as error:
            raise ValueError(f"influence matrix has a field of the wrong type: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the matrix as JSON with a checksum, atomically, and return the path.

        Raises
        ------
        OSError
            If the folder is missing or not writable.
        """
        return files.write_sealed_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InfluenceMatrix:
        """Read a matrix that `save` wrote, or another program without a checksum.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is not JSON, not an influence matrix, or damaged; the message names the file.
        """
        content = files.read_json(path)
        with files.naming(path):
            return cls.from_dict(content)


def _check_array(name: str, array: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(array, np.ndarray) or array.shape != shape:
        actual = getattr(array, "shape", type(array).__name__)
        raise ValueError(f"{name} must be an array of shape {shape}; got {actual}")


def _to_json(numbers: Any) -> list[Any]:
    def plain(number: Any) -> Any:
        if isinstance(number, list):
            return _to_json(number)
        if math.isnan(number):
            return None
        return number if math.isfinite(number) else ("inf" if number > 0 else "-inf")

    return [plain(each) for each in (numbers.tolist() if isinstance(numbers, np.ndarray) else numbers)]


def _from_json(rows: Any) -> Array:
    def number(cell: Any) -> float:
        return math.nan if cell is None else float(cell)

    return np.array([[*map(number, row)] if isinstance(row, list) else number(row) for row in rows], dtype=np.float64)
