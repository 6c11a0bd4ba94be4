"""The result of a mixture solver: the weights, and how it found them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from tikmix_fast.mixture.inputs import Array
from tikmix_fast.simplex import require_mixtures

__all__ = ["MixtureResult", "plain_types"]


@dataclass(frozen=True, eq=False)
class MixtureResult:
    """A mixture, with scipy's names for the course of the optimisation.

    Attributes
    ----------
    weights : float64 [m]
        The mixture; sums to 1. It passed the check of every constraint if ``success``; else it is the prior.
    prior : float64 [m]
        The mixture before.
    domains, tasks : tuple of str or None
        Names, where the matrix has them.
    success : bool
    status : int
        0: solved. 1: no solver found a mixture that passes the checks, and ``weights`` is the prior.
    message : str
        The course in words.
    fun : float
        The objective at ``weights``, ``uniformity * std - influence * sum - diversity * entropy``; lower is better.
    nit : int
        Iterations of the solver.
    terms : mapping
        The three terms at ``weights`` before their factors: ``"uniformity"`` (std over tasks of the normalised
        influence), ``"influence"`` (its sum), ``"diversity"`` (entropy of the weights, nats).
    predicted, predicted_prior : float64 [n]
        Predicted influence ``S @ weights`` and ``S @ prior`` per task, in the matrix's unit; positive lowers the loss.
        Both leave out unmeasured domains. `tikmix_m` puts the predicted labels here, in the labels' unit.
    effective_domains : float
        exp(entropy): m for uniform weights, 1 for a single domain.
    active : tuple of str
        Constraints that hold with equality, for example ``"pareto: qa"``, ``"cap: web"``, ``"max_kl"``.
    kept : tuple of str or of int
        Unmeasured domains, which keep their prior weight: names where the matrix has them, else indices.
    solver : str
        The solver that found the weights: ``"slsqp"``, ``"interior"``, or ``"none"`` if they are the prior. From
        `tikmix_m`: ``"search"``, or ``"anchor"`` if its search adds nothing.
    gap : float
        Distance of ``fun`` from the optimum, before smoothing and confidence: a bound for ``"interior"``, the
        disagreement of two starts for ``"slsqp"``, else NaN.
    warnings : tuple of str
        The texts that `warnings.warn` got too.
    known : float64 [m] or None
        With ``confidence``: the share of its way to the solved weight that each domain may move.

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
        if self.weights.ndim != 1:
            raise ValueError(f"weights must have shape [m]; got {self.weights.shape}")
        require_mixtures("weights", self.weights, 1e-9)

    def as_dict(self) -> dict[str, float]:
        """Return the weights by domain name.

        Raises
        ------
        ValueError
            If the matrix had no names.
        """
        if self.domains is None:
            raise ValueError("the matrix must have domain names; it had none: use weights, or pass an InfluenceMatrix")
        return dict(zip(self.domains, self.weights.tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON types; a number that is not finite becomes None."""
        return {field.name: plain_types(getattr(self, field.name)) for field in fields(self)}


def plain_types(value: Any) -> Any:
    """Return arrays, sequences and mappings as JSON types; a number that is not finite becomes None."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain_types(each) for each in value]
    if isinstance(value, Mapping):
        return {key: plain_types(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
