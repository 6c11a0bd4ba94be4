"""Draw mixtures to label, in a box around an anchor or from a Dirichlet distribution."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from scipy.stats import qmc

from tikmix_fast.arguments import require_choice, require_int
from tikmix_fast.mixture.inputs import Array, Names, read_number, read_prior

__all__ = ["dirichlet", "draw_mixtures"]

_ROUNDING = 1e-12


def draw_mixtures(
    anchor: Any,
    count: int,
    kind: Literal["lhs", "log_uniform", "dirichlet"] = "lhs",
    *,
    low: float = 0.5,
    high: float = 2.0,
    concentration: float | None = None,
    seed: int = 0,
    max_draws: int = 1_000_000,
    domains: Names = None,
) -> Array:
    """Draw ``count`` mixtures around an anchor, to label them for a `MixtureModel`.

    Parameters
    ----------
    anchor : array_like [m], or mapping with ``domains``
        The mixture in the middle; at least 0, sums to 1. A domain at zero stays at zero.
    count : int
        Number of mixtures.
    kind : {"lhs", "log_uniform", "dirichlet"}
        ``"lhs"``: a Latin hypercube in the box ``anchor * [low, high]``, scaled to sum to 1. New draws replace mixtures
        that left the box (TiKMiX, arXiv 2508.17677), so the result is no exact Latin hypercube. ``"log_uniform"``: the
        same with independent log-uniform factors; two to three times as many stay in the box. ``"dirichlet"``:
        Dirichlet(concentration * anchor), without a box.
    low, high : float
        Factors on the anchor, ``0 <= low <= 1 <= high``; ``low`` above 0 for ``"log_uniform"``.
    concentration : float, optional
        Concentration of the Dirichlet distribution, default m; a larger one draws closer to the anchor.
    seed : int
        Equal arguments give equal mixtures.
    max_draws : int
        The largest number of draws, dropped ones included; never fewer than ``count``.
    domains : tuple of str, optional
        Names, for an anchor given as a mapping.

    Returns
    -------
    float64 [count, m]

    Raises
    ------
    ValueError
        If an argument is out of range, or too few mixtures stay in the box.

    Examples
    --------
    >>> mixtures = draw_mixtures([0.5, 0.3, 0.2], 4)
    >>> mixtures.shape, bool(np.allclose(mixtures.sum(axis=1), 1.0))
    ((4, 3), True)
    """
    center = read_prior(anchor, domains, np.size(anchor) if domains is None else len(domains), name="anchor")
    count = require_int("count", count, 1)
    require_choice("kind", kind, ("lhs", "log_uniform", "dirichlet"))
    rng = np.random.default_rng(seed)
    if kind == "dirichlet":
        strength = len(center) if concentration is None else read_number("concentration", concentration, positive=True)
        return dirichlet(rng, strength * center, count)
    if concentration is not None:
        raise ValueError(f'concentration is for kind="dirichlet" only; got {concentration!r} with kind={kind!r}')
    low = read_number("low", low, positive=kind == "log_uniform", most=1.0)
    high = read_number("high", high)
    if high < 1.0:
        raise ValueError(f"high must be at least 1, so that the box contains the anchor; got {high:g}")
    return _in_box(center, count, kind, low, high, rng, max(max_draws, count))


def dirichlet(rng: np.random.Generator, strengths: Array, count: int) -> Array:
    """Draw [count, m] from Dirichlet(strengths). Unlike numpy, it turns a strength of zero into a weight of zero."""
    drawn = rng.standard_gamma(strengths, size=(count, len(strengths)))
    # If all strengths are tiny, every gamma underflows. In the limit, one domain has all the weight.
    empty = np.flatnonzero(drawn.sum(axis=1) < np.finfo(np.float64).tiny)
    drawn[empty] = 0.0
    drawn[empty, rng.choice(len(strengths), size=len(empty), p=strengths / strengths.sum())] = 1.0
    return np.asarray(drawn / drawn.sum(axis=1, keepdims=True))


def _in_box(center: Array, count: int, kind: str, low: float, high: float, rng: Any, most: int) -> Array:
    lower, upper = low * center, high * center
    batches: list[Array] = []
    inside = drawn = 0
    while inside < count and drawn + count <= most:
        if kind == "lhs":
            raw = lower + (upper - lower) * qmc.LatinHypercube(len(center), seed=rng).random(count)
        else:
            raw = lower * (high / low) ** rng.random((count, len(center)))
        mixtures = raw / raw.sum(axis=1, keepdims=True)
        batches.append(mixtures[((mixtures >= lower - _ROUNDING) & (mixtures <= upper + _ROUNDING)).all(axis=1)])
        inside += len(batches[-1])
        drawn += count
    if inside < count:
        raise ValueError(
            f"only {inside} of {drawn} mixtures stayed in the box anchor * [{low:g}, {high:g}] after scaling to sum to"
            f' 1, and count is {count}; widen low and high, use kind="log_uniform" or "dirichlet", or raise max_draws'
        )
    return np.concatenate(batches)[:count]
