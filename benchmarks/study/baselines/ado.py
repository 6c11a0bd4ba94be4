"""ADO (arXiv 2410.11820): draw more of the domains whose scaling law still falls."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.signal import savgol_filter

from benchmarks.study.training import Array, Method, Study, Trainee

__all__ = ["ADO", "at_least", "fit_scaling_law", "slope"]

# fmt: off
_LEAST = 0.01            # probability of a domain
_SMOOTHING = 0.9         # of the shares drawn (credit), and of the average mixture in the one used
_LEAST_EXPONENT = 0.05
_HUBER = 1e-3            # in log loss
_WINDOW, _ORDER = 101, 3 # of the filter on training losses
_STRIDE = 10             # steps between two points of a fit
_STARTS = 4
# fmt: on


class ADO(Method):
    """Weights in proportion to prior * sqrt(credit) * slope of each domain's scaling law, smoothed.

    As in the authors' code, laws exp(e) + exp(a) / D^alpha describe the filtered training loss over all samples so far,
    and are refitted now and then. The credit is h (1 - h) of the recent shares h, the prior is the natural mixture, the
    least probability is 0.01, and nine tenths come from the average mixture so far. ADO knows no task. The authors keep
    the irreducible loss above exp(0.5) nats per token; losses here are per byte and often lower, so there is no bound.
    """

    def __init__(self, study: Study) -> None:
        super().__init__(study.problem.natural)
        self._prior = study.problem.natural
        self._shares = self._prior
        self._average = self._prior
        self._settings = study.settings
        self._batch = study.main.batch
        self._losses: list[Array] = []
        self._laws: Array | None = None

    def observe(self, step: int, domains: NDArray[np.int64], losses: Array) -> None:
        """Note the loss and share of every domain, and refit every ``ado_refit`` steps."""
        counts = np.bincount(domains, minlength=len(self._prior))
        self._shares = _SMOOTHING * self._shares + (1 - _SMOOTHING) * counts / counts.sum()
        row = self._losses[-1].copy() if self._losses else np.full(len(counts), losses.mean())
        present = counts > 0
        row[present] = np.bincount(domains, losses, len(counts))[present] / counts[present]
        self._losses.append(row)
        settings = self._settings
        if step > settings.ado_start and step % settings.ado_refit == 0:
            self._laws = self._fit()
            self.log.append({"step": step, "laws": self._laws.tolist()})
        if self._laws is not None:
            target = self._prior * np.sqrt(self._shares * (1 - self._shares)) * slope(self._laws, step * self._batch)
            target = at_least(target / target.sum(), _LEAST)
            self.weights = _SMOOTHING * self._average + (1 - _SMOOTHING) * target
            self._average = self._average + (target - self._average) / (step + 1)

    def update(self, arm: Trainee) -> Array | None:
        """Return the mixture every ``update_every`` steps, once there are laws."""
        return None if self._laws is None or arm.step % self._settings.update_every else self.weights

    def _fit(self) -> Array:
        losses = np.array(self._losses)
        window = min(_WINDOW, (len(losses) - 1) // 2 * 2 + 1)
        fitted = slice(self._settings.ado_start, None, _STRIDE)
        smooth = savgol_filter(losses, window, min(_ORDER, window - 1), axis=0)[fitted]
        samples = (self._batch * np.arange(1.0, len(losses) + 1))[fitted]
        return np.array([fit_scaling_law(samples, each) for each in smooth.T])


def fit_scaling_law(samples: Array, losses: Array) -> Array:
    """Fit losses = exp(e) + exp(a) / samples^alpha with the authors' Huber loss and bounds; return (a, e, alpha)."""
    logs, target = np.log(samples), np.log(losses)

    def cost(law: Array) -> tuple[float, Array]:
        a, e, alpha = law
        power = a - alpha * logs
        prediction = np.logaddexp(power, e)
        share = np.exp(power - prediction)  # of the falling part
        off = prediction - target
        size = np.abs(off)
        pull = np.clip(off, -_HUBER, _HUBER)
        value = np.where(size > _HUBER, _HUBER * (size - 0.5 * _HUBER), 0.5 * off**2).sum()
        scale = 1 / (_HUBER * len(off))  # the solver's tolerances are absolute
        return float(value * scale), scale * np.array(
            [(pull * share).sum(), (pull * (1 - share)).sum(), -(pull * share * logs).sum()]
        )

    grid = np.array(np.meshgrid(np.arange(-2, 6.5), np.arange(-3, 2, 0.5), np.arange(0, 0.8, 0.1))).reshape(3, -1).T
    first = np.argsort([cost(law)[0] for law in grid], kind="stable")[:_STARTS]
    bounds = [(None, 6.5), (None, None), (0.001, 0.8)]
    fits = [minimize(cost, grid[start], jac=True, method="L-BFGS-B", bounds=bounds) for start in first]
    return np.asarray(min(fits, key=lambda fit: fit.fun).x)


def slope(laws: Array, samples: float) -> Array:
    """Return how fast each loss still falls per sample: alpha * (loss - irreducible loss) / samples."""
    a, _, alpha = laws.T
    return np.asarray(np.maximum(alpha, _LEAST_EXPONENT) * np.exp(a) / samples ** (alpha + 1))


def at_least(weights: Array, least: float) -> Array:
    """Raise every weight to ``least`` and divide by the sum."""
    raised = np.maximum(weights, least)
    return np.asarray(raised / raised.sum())
