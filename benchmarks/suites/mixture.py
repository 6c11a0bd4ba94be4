"""The time of TiKMiX-D."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np

from tikmix_fast.benchmarking.interleaved import interleave
from tikmix_fast.mixture.direct.tikmix_d import tikmix_d
from tikmix_fast.mixture.result import MixtureResult

__all__ = ["SHAPES", "TINY_SHAPES", "make_problem", "measure_mixture"]

SHAPES = ((26, 9), (1000, 32))
"""Numbers of domains and tasks for which the project has goals."""

TINY_SHAPES = ((6, 3),)

_DEFAULT: Literal["auto"] = "auto"
_SOLVERS: tuple[Literal["auto", "slsqp", "interior"], ...] = (_DEFAULT, "slsqp", "interior")
_SLSQP_LIMIT = 128


def make_problem(domains: int, tasks: int, seed: int = 0) -> tuple[Any, Any]:
    """Draw influence [n, m] with a mean per domain, like that of measured matrices, and a prior [m]."""
    random = np.random.default_rng(seed)
    matrix = 1 + random.normal(size=domains) + random.normal(size=(tasks, domains))
    return matrix, random.dirichlet(np.full(domains, 5.0))


def measure_mixture(
    domains: int, tasks: int, *, rounds: int = 20, seconds: float | None = None, diversity: float = 0.3
) -> dict[str, Any]:
    """Check that the solvers succeed and agree, then time them in turn; ratios are to the default choice.

    Returns
    -------
    dict
        Plain JSON types: the case, ``rows`` (one per solver) and ``skipped``.

    Raises
    ------
    AssertionError
        If a solver fails its checks, or the objectives differ by more than 1e-6.
    """
    matrix, prior = make_problem(domains, tasks)
    solvers = [name for name in _SOLVERS if name != "slsqp" or domains <= _SLSQP_LIMIT]
    functions: dict[str, Callable[[], MixtureResult]] = {
        name: partial(tikmix_d, matrix, prior, diversity=diversity, solver=name) for name in solvers
    }
    results = {name: solve() for name, solve in functions.items()}
    best = min(result.fun for result in results.values())
    for name, result in results.items():
        if not result.success:
            raise AssertionError(f"{name} fails at m={domains} n={tasks}: {result.message}")
        if not result.fun - best <= 1e-6 * max(1.0, abs(best)):
            raise AssertionError(f"{name} stops {result.fun - best:.2e} above the best objective, {best!r}")
    timings = interleave(functions, rounds, seconds=seconds)
    return {
        "case": f"m={domains} n={tasks}",
        "rows": [
            {
                "method": name,
                "ours": True,
                "objective_above_best": results[name].fun - best,
                **timings.summary(name, _DEFAULT),
            }
            for name in solvers
        ],
        "skipped": {}
        if "slsqp" in solvers
        else {"slsqp": "it does not converge at such sizes, and the default does not choose it"},
    }
