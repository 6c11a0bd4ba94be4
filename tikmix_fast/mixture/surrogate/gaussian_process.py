"""A Gaussian process as a surrogate: smooth, and suited to few runs as well as to many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from tikmix_fast.mixture.inputs import Array

__all__ = ["GaussianProcess", "negative_log_posterior"]

# A loss falls like a power of the data, steeply over the first percent. The root stretches that part, and at zero it is
# finite.
_POWER = 0.25
_LEVEL = 10.0  # prior variance of the constant, over that of the labels
_ITERATIONS = 30
_CHUNK = 512
_WIDTH_MEAN, _WIDTH_STD = -3.0, 3.0


@dataclass(frozen=True, eq=False)
class GaussianProcess:
    """Mean of a Gaussian process over x = standardised ``weights ** 0.25``.

    The covariance is the sum of a constant, a linear part, noise, and a rational quadratic with one width per domain,
    ``signal / (1 + sum_j narrowness_j (x_j - y_j)^2)``. The widths and variances maximise the posterior. Far from the
    data the mean approaches the linear function.

    Attributes
    ----------
    points : float64 [N, m]
        x at the fitted mixtures.
    center, spread : float64 [m]
        Mean and standard deviation of ``weights ** 0.25`` over the fitted mixtures.
    narrowness : float64 [m]
    dual : float64 [N]
        Weights of the fitted points times ``signal``, in the labels' unit.
    slope : float64 [m]
    intercept : float
    """

    points: Array
    center: Array
    spread: Array
    narrowness: Array
    dual: Array
    slope: Array
    intercept: float

    @classmethod
    def fit(cls, mixtures: Array, labels: Array) -> GaussianProcess:
        """Fit labels [N] at mixtures [N, m]; costs some 30 Cholesky factorisations [N, N]."""
        center, spread, points = _standardise(mixtures)
        m = mixtures.shape[1]
        level, scale = float(labels.mean()), float(labels.std())
        if not scale > 1e-12 * abs(level):
            zero = np.zeros(m)
            return cls(points, center, spread, zero, np.zeros(len(labels)), zero, level)
        target = (labels - level) / scale
        optimum = minimize(
            negative_log_posterior,
            np.concatenate([np.full(m, _WIDTH_MEAN), [0.0, -4.0, -3.0]]),
            args=(points, target),
            jac=True,
            method="L-BFGS-B",
            bounds=[(-12.0, 6.0)] * m + [(-6.0, 8.0), (-14.0, 1.0), (-12.0, 4.0)],
            options={"maxiter": _ITERATIONS},
        )
        narrowness, (signal, noise, linear) = np.exp(optimum.x[:m]), np.exp(optimum.x[m:])
        kernel = _covariance(points, narrowness, signal, linear)[0]
        dual = cho_solve(cho_factor(kernel + noise * np.eye(len(kernel)), lower=True), target)
        return cls(
            points=points,
            center=center,
            spread=spread,
            narrowness=narrowness,
            dual=scale * signal * dual,
            slope=scale * linear * (points.T @ dual),
            intercept=level + scale * _LEVEL * float(dual.sum()),
        )

    def predict(self, mixtures: Array) -> Array:
        """Return predictions [N]; costs one matrix product, and one division per candidate and fitted point."""
        x = (mixtures**_POWER - self.center) / self.spread
        root = np.sqrt(self.narrowness)
        ours, theirs = x * root, self.points * root
        # One product gives 1 + |a - b|^2.
        left = np.column_stack([-2.0 * ours, np.ones(len(ours)), 1.0 + (ours**2).sum(axis=1)])
        right = np.column_stack([theirs, (theirs**2).sum(axis=1), np.ones(len(theirs))]).T
        predicted = x @ self.slope + self.intercept
        for start in range(0, len(x), _CHUNK):
            distance = left[start : start + _CHUNK] @ right
            predicted[start : start + _CHUNK] += np.reciprocal(distance, out=distance) @ self.dual
        return np.asarray(predicted)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, without the parts that follow from the fitted mixtures."""
        return {
            "narrowness": self.narrowness.tolist(),
            "dual": self.dual.tolist(),
            "slope": self.slope.tolist(),
            "intercept": self.intercept,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], mixtures: Array) -> GaussianProcess:
        """Read the output of `to_dict`, with the fitted mixtures [N, m].

        Raises
        ------
        ValueError
            If a shape does not fit the mixtures, or a number is not finite.
        """
        center, spread, points = _standardise(mixtures)
        narrowness, dual, slope = (
            np.array(content[name], dtype=np.float64) for name in ("narrowness", "dual", "slope")
        )
        n, m = mixtures.shape
        numbers = np.concatenate([narrowness.ravel(), dual.ravel(), slope.ravel(), [float(content["intercept"])]])
        if (narrowness.shape, dual.shape, slope.shape) != ((m,), (n,), (m,)) or not np.isfinite(numbers).all():
            raise ValueError(f"a Gaussian process must hold finite numbers for {n} mixtures of {m} domains")
        if (narrowness < 0).any():
            raise ValueError("narrowness must not be negative")
        return cls(points, center, spread, narrowness, dual, slope, float(content["intercept"]))


def negative_log_posterior(parameters: Array, points: Array, target: Array) -> tuple[float, Array]:
    """Return minus the log marginal likelihood and log prior, up to a constant, and its gradient.

    Parameters
    ----------
    parameters : float64 [m + 3]
        Logarithms of the narrownesses, which have a normal prior, and of the variances of the rational quadratic, the
        noise and the slope.
    points : float64 [N, m]
    target : float64 [N]
    """
    m = points.shape[1]
    narrowness, (signal, noise, linear) = np.exp(parameters[:m]), np.exp(parameters[m:])
    kernel, near = _covariance(points, narrowness, signal, linear)
    factor = cho_factor(kernel + noise * np.eye(len(kernel)), lower=True)
    dual = cho_solve(factor, target)
    deviation = (parameters[:m] - _WIDTH_MEAN) / _WIDTH_STD
    value = 0.5 * target @ dual + np.log(np.diag(factor[0])).sum() + 0.5 * deviation @ deviation
    # d value / d K = -fit / 2
    fit = np.outer(dual, dual) - cho_solve(factor, np.eye(len(kernel)))
    pull = fit * near**2 / signal
    squares = 2.0 * (pull.sum(axis=1) @ points**2 - np.einsum("aj,aj->j", points, pull @ points))
    gradient = np.concatenate(
        [
            0.5 * narrowness * squares + deviation / _WIDTH_STD,
            [
                -0.5 * (fit * near).sum(),
                -0.5 * noise * np.trace(fit),
                -0.5 * linear * np.einsum("aj,aj->", points, fit @ points),
            ],
        ]
    )
    return float(value), gradient


def _covariance(points: Array, narrowness: Array, signal: float, linear: float) -> tuple[Array, Array]:
    """Return the covariance without noise, and its rational quadratic part [N, N]."""
    scaled = points * np.sqrt(narrowness)
    squares = (scaled**2).sum(axis=1)
    distance = np.maximum(squares[:, None] + squares - 2.0 * scaled @ scaled.T, 0.0)
    near = signal / (1.0 + distance)
    return near + linear * (points @ points.T) + _LEVEL, near


def _standardise(mixtures: Array) -> tuple[Array, Array, Array]:
    roots = mixtures**_POWER
    center, spread = roots.mean(axis=0), roots.std(axis=0)
    spread = np.where(spread > 1e-9, spread, 1.0)
    return center, spread, (roots - center) / spread
