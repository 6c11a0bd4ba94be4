"""A linear surrogate, for domains that do not interact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tikmix_fast.mixture.inputs import Array

__all__ = ["Ridge"]

_PENALTIES = np.logspace(-10, 2, 49)


@dataclass(frozen=True, eq=False)
class Ridge:
    """Ridge regression on the weights; the leave-one-out error, in closed form, chooses the penalty.

    Attributes
    ----------
    coefficients : float64 [m]
    intercept : float
    """

    coefficients: Array
    intercept: float

    @classmethod
    def fit(cls, mixtures: Array, labels: Array) -> Ridge:
        """Fit labels [N] at mixtures [N, m]; penalties are relative to the largest eigenvalue of the covariance."""
        center, level = mixtures.mean(axis=0), labels.mean()
        left, singular, right = np.linalg.svd(mixtures - center, full_matrices=False)
        squares = singular**2
        if not squares.max() > 0:
            return cls(np.zeros(mixtures.shape[1]), float(level))
        turned = left.T @ (labels - level)
        best, chosen = np.inf, squares
        for penalty in _PENALTIES * squares.max():
            shrunk = squares / (squares + penalty)
            leverage = 1 / len(labels) + left**2 @ shrunk
            residual = (labels - level - left @ (shrunk * turned)) / np.maximum(1 - leverage, 1e-12)
            error = float((residual**2).sum())
            if error < best:
                best, chosen = error, singular / (squares + penalty)
        coefficients = right.T @ (chosen * turned)
        return cls(coefficients, float(level - center @ coefficients))

    def predict(self, mixtures: Array) -> Array:
        """Return predictions [N]."""
        return np.asarray(mixtures @ self.coefficients + self.intercept)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"coefficients": self.coefficients.tolist(), "intercept": self.intercept}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], mixtures: Array) -> Ridge:
        """Read the output of `to_dict`.

        Raises
        ------
        ValueError
            If the shape does not fit the mixtures [N, m], or a number is not finite.
        """
        ridge = cls(np.array(content["coefficients"], dtype=np.float64), float(content["intercept"]))
        if (
            ridge.coefficients.shape != (mixtures.shape[1],)
            or not np.isfinite([*ridge.coefficients, ridge.intercept]).all()
        ):
            raise ValueError(
                f"ridge must hold {mixtures.shape[1]} finite coefficients; got shape {ridge.coefficients.shape}"
            )
        return ridge
