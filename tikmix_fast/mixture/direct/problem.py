"""The convex problem of TiKMiX-D: scaled influence, objective, and constraints with their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy

from tikmix_fast.arguments import require_choice
from tikmix_fast.mixture.direct.tilt import capped_tilt
from tikmix_fast.mixture.inputs import Array, Names, label

Norm = Literal["max", "maxabs", "std"]

__all__ = [
    "TOLERANCE",
    "Limit",
    "Norm",
    "Problem",
    "Solution",
    "entropy",
    "kl_divergence",
    "objective_terms",
    "row_scale",
]

TOLERANCE = 1e-9
"""The largest violation of a constraint in a returned mixture; Pareto in the normalised scale, KL in nats."""

_SMALL_ROW = 1e-3


@dataclass(frozen=True, eq=False)
class Limit:
    """One kind of bound on the weights [m], under the caller's name for it."""

    name: str
    bound: Array


@dataclass(frozen=True, eq=False)
class Problem:
    """Minimise ``uniformity * std(A w) + cost @ w - diversity * H(w)`` over the feasible mixtures w.

    Attributes
    ----------
    scaled : float64 [n, m]
        A: influence divided by the positive scale of its row.
    cost : float64 [m]
        Linear cost; for TiKMiX-D, minus the influence weight times the column sums of A.
    prior : float64 [m]
    lower, upper : float64 [m]
        The tightest bounds on the weights; equal where a domain is fixed.
    pareto : bool
        Whether ``A w >= A prior`` must hold for every task.
    max_kl : float or None
        Largest KL(w || prior), in nats. Domains with prior zero must then have ``upper`` zero.
    """

    scaled: Array
    cost: Array
    prior: Array
    lower: Array
    upper: Array
    uniformity: float
    diversity: float
    pareto: bool = True
    max_kl: float | None = None
    tasks: Names = None

    @property
    def shape(self) -> tuple[int, int]:
        """Number of tasks and of domains."""
        n, m = self.scaled.shape
        return n, m

    @property
    def required(self) -> Array:
        """Scaled influence of the prior [n], the least that Pareto allows for each task."""
        return self.scaled @ self.prior

    @property
    def contested(self) -> NDArray[np.bool_]:
        """Tasks [n] that Pareto constrains: all but those for which all free domains have the same influence."""
        gain = self.scaled[:, self.lower < self.upper]
        if not self.pareto or not gain.shape[1]:
            return np.zeros(len(gain), dtype=np.bool_)
        return np.asarray(np.ptp(gain, axis=1) > 1e-12)

    def objective(self, weights: Array) -> float:
        """Return the objective at the weights."""
        spread = self.uniformity * float((self.scaled @ weights).std()) if self.uniformity else 0.0
        return spread + float(self.cost @ weights) - self.diversity * entropy(weights)

    def only_mixture(self) -> Solution | None:
        """Return the mixture if the bounds allow only one."""
        for bound in (self.lower, self.upper):
            if abs(bound.sum() - 1.0) <= 1e-12:
                return Solution(bound / bound.sum(), True, 0.0, 0, "the bounds allow one mixture only")
        return None

    def nearest(self, logits: Array) -> Array:
        """Return the mixture within the bounds with the least KL divergence from ``exp(logits)``."""
        return capped_tilt(logits, self.lower, self.upper)[0]

    def nearest_to_prior(self) -> Array:
        """Return the mixture within the bounds nearest to the prior, which is the prior itself if it keeps them."""
        if (self.lower <= self.prior).all() and (self.prior <= self.upper).all():
            return self.prior.copy()
        return self.nearest(np.log(np.maximum(self.prior, np.finfo(np.float64).tiny)))

    def violations(self, weights: Array) -> list[str]:
        """Name every constraint that the weights violate by more than `TOLERANCE`, the worst task first."""
        if not np.isfinite(weights).all():
            return ["weights are not finite"]
        violations = []
        if abs(weights.sum() - 1.0) > TOLERANCE:
            violations.append(f"weights sum to {weights.sum():.12g}")
        outside = float(np.maximum(self.lower - weights, weights - self.upper).max())
        if outside > TOLERANCE:
            violations.append(f"a weight leaves its bounds by {outside:.2g}")
        if self.pareto:
            short = self.required - self.scaled @ weights
            violations += [
                f"pareto: task {label(self.tasks, i)} loses {short[i]:.2g} (normalised) against the prior"
                for i in np.argsort(-short, kind="stable")
                if short[i] > TOLERANCE
            ]
        if self.max_kl is not None:
            divergence = kl_divergence(weights, self.prior)
            if divergence > self.max_kl + TOLERANCE:
                violations.append(f"max_kl: KL divergence from the prior is {divergence:.6g}, above {self.max_kl:g}")
        return violations


@dataclass(frozen=True, eq=False)
class Solution:
    """The unchecked answer of a solver.

    Attributes
    ----------
    weights : float64 [m]
    converged : bool
        Whether the solver's own criterion is met.
    gap : float
        Bound on, or estimate of, the objective's distance from the optimum.
    nit : int
    message : str
    """

    weights: Array
    converged: bool
    gap: float
    nit: int
    message: str


def entropy(weights: Array) -> float:
    """Return -sum(w log w) in nats."""
    return -float(xlogy(weights, weights).sum())


def objective_terms(gain: Array, weights: Array) -> dict[str, float]:
    """Return the objective's three terms before their factors, given the scaled influence of the weights [n]."""
    return {"uniformity": float(gain.std()), "influence": float(gain.sum()), "diversity": entropy(weights)}


def kl_divergence(weights: Array, prior: Array) -> float:
    """Return KL(weights || prior) in nats; infinite where a weight is positive and its prior zero."""
    if (weights[prior == 0] > 0).any():
        return float("inf")
    positive = prior > 0
    return float((xlogy(weights[positive], weights[positive]) - weights[positive] * np.log(prior[positive])).sum())


def row_scale(values: Array, norm: Norm, tasks: Names) -> tuple[Array, list[str]]:
    """Return the positive scale of each row [n], and a warning for each row that cannot use ``norm``.

    ``"max"`` is the paper's ``max_j S_ij`` (Eq. 9). If that is negative, the division reverses the task's sign and the
    solver would maximise its harm; if it is tiny, the row outweighs all others. The scale of such rows, and of rows
    with as small a standard deviation under ``"std"``, is ``max_j |S_ij|``. A row of zeros has scale 1.

    Raises
    ------
    ValueError
        If ``norm`` is unknown.
    """
    require_choice("norm", norm, ("max", "maxabs", "std"))
    if not values.shape[1]:
        return np.ones(len(values)), []
    largest = np.abs(values).max(axis=1)
    safe = np.where(largest > 0, largest, 1.0)
    relative = values / safe[:, None]
    scale = {"max": relative.max(axis=1), "maxabs": np.ones(len(values)), "std": relative.std(axis=1)}[norm]
    small = scale <= _SMALL_ROW
    warned = [
        f"task {label(tasks, i)}: the row's {norm} is {scale[i] * largest[i]:.3g} against a largest magnitude of"
        f" {largest[i]:.3g}; the row is normalised by the latter"
        for i in np.flatnonzero(small & (largest > 0))
    ]
    return safe * np.where(small, 1.0, scale), warned
