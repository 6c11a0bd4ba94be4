"""What a mixture solver returns: the weights, and how they came about."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

__all__ = ["MixtureResult", "plain_types"]


@dataclass(frozen=True, eq=False)
class MixtureResult:
    """A mixture, with scipy's names for how the optimisation went.

    Attributes
    ----------
    weights : float64 [m]
        The mixture; sums to 1. Checked against every constraint if ``success``, else the prior.
    prior : float64 [m]
        The mixture it started from.
    domains, tasks : tuple of str or None
        Names, where the matrix has them.
    success : bool
    status : int
        0: solved. 1: no solver found a mixture that passed the checks, ``weights`` is the prior.
    message : str
        What happened, in words.
    fun : float
        The objective at ``weights``, ``uniformity * std - influence * sum - diversity * entropy``; lower is better.
    nit : int
        Iterations of the solver.
    terms : mapping
        The three terms at ``weights`` before their factors: ``"uniformity"`` (std over tasks of the normalised
        influence), ``"influence"`` (its sum), ``"diversity"`` (entropy of the weights, nats).
    predicted, predicted_prior : float64 [n]
        Predicted influence ``S @ weights`` and ``S @ prior`` per task, in the matrix's unit; positive lowers the loss.
        Domains that were never measured are left out of both. By `tikmix_m`: the predicted labels, as they were fitted.
    effective_domains : float
        exp(entropy): m for uniform weights, 1 for a single domain.
    active : tuple of str
        Constraints that hold with equality, such as ``"pareto: qa"``, ``"cap: web"``, ``"max_kl"``.
    kept : tuple of str or of int
        Domains that were never measured and keep their prior weight; names where there are names, else indices.
    solver : str
        The solver that found the weights: ``"slsqp"``, ``"interior"``, or ``"none"`` where the prior is returned. By
        `tikmix_m`: ``"search"``, or ``"anchor"`` where its search adds nothing.
    gap : float
        What ``fun`` may be above the optimum, before smoothing and confidence: a bound for ``"interior"``, the
        disagreement of two starts for ``"slsqp"``, else NaN.
    warnings : tuple of str
        Also given through `warnings.warn`.
    known : float64 [m] or None
        With ``confidence``: the share of its way to the solved weight that each domain was allowed.

    Raises
    ------
    ValueError
        If ``weights`` is not a mixture.
    """

    weights: Array
    prior: Array
    domains: tuple[str, ...] | None
    tasks: tuple[str, ...] | None
    success: bool
    status: int
    message: str
    fun: float
    nit: int
    terms: Mapping[str, float]
    predicted: Array
    predicted_prior: Array
    effective_domains: float
    active: tuple[str, ...]
    kept: tuple[str | int, ...]
    solver: str
    gap: float
    warnings: tuple[str, ...]
    known: Array | None = None

    def __post_init__(self) -> None:
        if not (self.weights.ndim == 1 and (self.weights >= 0).all() and abs(self.weights.sum() - 1.0) <= 1e-9):
            raise ValueError(f"weights must be a mixture, at least 0 and summing to 1; got {self.weights!r}")

    def as_dict(self) -> dict[str, float]:
        """Return the weights by domain name.

        Raises
        ------
        ValueError
            If the matrix had no names.
        """
        if self.domains is None:
            raise ValueError("the matrix had no domain names; use weights, or solve from an InfluenceMatrix")
        return dict(zip(self.domains, self.weights.tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return every field as plain JSON types; a number that is not finite becomes None."""
        return {field.name: plain_types(getattr(self, field.name)) for field in fields(self)}


def plain_types(value: Any) -> Any:
    """Return arrays, sequences and mappings of numbers and strings as JSON types; not finite numbers become None."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain_types(each) for each in value]
    if isinstance(value, Mapping):
        return {key: plain_types(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
