"""TiKMiX-M: the annealed search for the best mixture on a fitted `MixtureModel`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy

from tikmix_fast.mixture.direct.bounds import join_bounds
from tikmix_fast.mixture.direct.problem import TOLERANCE, Limit, entropy
from tikmix_fast.mixture.inputs import label, per_domain, read_number, read_prior
from tikmix_fast.mixture.result import MixtureResult
from tikmix_fast.mixture.surrogate.candidates import dirichlet
from tikmix_fast.mixture.surrogate.mixture_model import MixtureModel

Array = NDArray[np.float64]

__all__ = ["tikmix_m"]

# Of what may be chosen from in a round, at most this share is averaged: else few candidates would mean no choice.
_LARGEST_SHARE = 0.1
_STILL = 1e-3


def tikmix_m(
    model: MixtureModel,
    anchor: Mapping[str, float] | MixtureResult | Any,
    *,
    prior: Mapping[str, float] | Any | None = None,
    minimise: bool = False,
    scale: Any = None,
    uniformity: float = 0.0,
    influence: float = 1.0,
    diversity: float = 0.0,
    pareto: bool = True,
    floor: float | Mapping[str, float] | Any = 0.0,
    cap: float | Mapping[str, float] | Any = 1.0,
    rounds: int = 10,
    candidates: int = 10_000,
    top: int = 128,
    concentration: tuple[float, float] | None = None,
    literal_schedule: bool = False,
    seed: int = 0,
) -> MixtureResult:
    """Search the mixture with the best predicted labels, from TiKMiX-D's answer on (arXiv 2508.17677, Algorithm 1).

    In every round candidates are drawn from a Dirichlet distribution around the best mixture so far, and the mean of
    the best of them is where the next round starts. What is minimised is TiKMiX-D's objective with predicted labels
    in the place of its linear influence::

        uniformity * std(P) - influence * sum(P) - diversity * H(w),    P_i = +-label_i(w) / scale_i

    The paper's score is the sum alone, the default here. Then nothing but the data holds the search back from few
    domains: see ``floor``, ``cap`` and ``diversity``.

    Parameters
    ----------
    model : MixtureModel
        Fitted.
    anchor : MixtureResult, mapping from domain name to weight, or array_like [m]
        TiKMiX-D's answer, or the mixture in use. The search starts there, and never leaves a domain whose weight is 0.
        It must lie in the box of the fitted mixtures: beyond, the model knows nothing.
    prior : mapping or array_like [m], optional
        What Pareto compares with; default the anchor.
    minimise : bool
        Whether smaller labels are better, as with losses. Influence is better larger.
    scale : array_like [n], optional
        What each label is divided by, above 0; default its standard deviation over the fitted mixtures. With
        ``labels = S @ w``, ``S.max(axis=1)`` gives TiKMiX-D's objective.
    uniformity, influence, diversity : float
        Weights of the three terms, at least 0, not all 0.
    pareto : bool
        Prefer candidates for which no task is predicted to fare worse than under ``prior``, where there are any.
    floor, cap : float, mapping or array_like [m]
        Least and largest weight of each domain, as in `tikmix_d`; candidates outside are dropped.
    rounds, candidates, top : int
        T, N and k of the paper, which does not give them. The mean is over the best ``top``, but never over more than
        a tenth of the candidates that may be chosen from.
    concentration : (float, float), optional
        Of the Dirichlet distribution in the first and in the last round, log-spaced between; default 2m and 200m.
        More rounds up to a larger one end nearer to a corner of Pareto constraints, where a mean of draws stays inside.
    literal_schedule : bool
        Take the concentrations from large to small, as the paper prints it: it then ends with wide draws. Meant is
        surely the reverse, from wide draws to narrow ones.
    seed : int
        Equal arguments give equal answers.

    Returns
    -------
    MixtureResult
        The best of the anchor and of every round's mean, so never predicted worse than the anchor. ``solver`` is
        ``"search"``, or ``"anchor"`` where the search found nothing better, which ``message`` then says; it also says
        when what was gained is less than the model's cross-validated error. ``nit`` counts the rounds and ``prior`` is
        what Pareto was held against.

    Raises
    ------
    ValueError, TypeError
        If the model is not fitted, the anchor is outside its box or the bounds, or an argument is out of range.

    Warns
    -----
    UserWarning
        If the prior is outside the box, no round drew a candidate within it, or Pareto holds nowhere; the texts are in
        ``result.warnings`` too.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> mixtures = rng.dirichlet(np.ones(3), size=200)
    >>> best = np.array([0.5, 0.3, 0.2])
    >>> model = MixtureModel(kind="gp").fit(mixtures, -((mixtures - best) ** 2).sum(axis=1))
    >>> tikmix_m(model, [0.3, 0.3, 0.4]).weights.round(2).tolist()
    [0.5, 0.3, 0.2]
    """
    if not isinstance(model, MixtureModel):
        raise TypeError(f"model must be a fitted MixtureModel; got {type(model).__name__}")
    low, high = model.low, model.high
    m, domains = len(low), model.domains
    if isinstance(anchor, MixtureResult):
        anchor = anchor.weights if domains is None or anchor.domains is None else anchor.as_dict()
    start = read_prior(anchor, domains, m, name="anchor")
    reference = start if prior is None else read_prior(prior, domains, m)
    uniformity = read_number("uniformity", uniformity)
    influence = read_number("influence", influence)
    diversity = read_number("diversity", diversity)
    if uniformity == influence == diversity == 0:
        raise ValueError("one of uniformity, influence and diversity must be above 0; got 0 for all")
    for name, number in (("rounds", rounds), ("candidates", candidates), ("top", top)):
        if not isinstance(number, (int, np.integer)) or number < 1:
            raise ValueError(f"{name} must be an integer of at least 1; got {number!r}")
    strengths = _schedule(concentration, rounds, m, literal_schedule)
    units = _read_scale(scale, model)
    floors = [Limit("the fitted box's least weight", low), Limit("floor", per_domain("floor", floor, domains, m, 0.0))]
    caps = [Limit("the fitted box's largest weight", high), Limit("cap", per_domain("cap", cap, domains, m, 1.0))]
    lower, upper = join_bounds(floors, caps, start, np.ones(m, dtype=np.bool_), domains)
    outside = np.flatnonzero((start < lower - TOLERANCE) | (start > upper + TOLERANCE))
    if outside.size:
        j = int(outside[0])
        raise ValueError(
            "anchor must lie within the box of the fitted mixtures, the floor and the cap; got"
            f" {start[j]:g} for domain {label(domains, j)}, outside [{lower[j]:g}, {upper[j]:g}]; label mixtures around"
            " the anchor, or change the bounds or the anchor"
        )

    signs = (-1.0 if minimise else 1.0) / units
    required = model.predict(reference[None])[0] * signs - TOLERANCE if pareto else np.full(len(units), -np.inf)
    search = _Search(model, signs, uniformity, influence, diversity, required)
    rng = np.random.default_rng(seed)
    center = best = start
    kept = search.rate(start[None])
    done = hits = 0
    for strength in strengths:
        done += 1
        drawn = dirichlet(rng, strength * center, int(candidates))
        drawn = drawn[((drawn >= lower) & (drawn <= upper)).all(axis=1)]
        if not len(drawn):
            continue
        hits += 1
        rated = search.rate(drawn)
        allowed = np.flatnonzero(rated.harmless) if rated.harmless.any() else np.arange(len(drawn))
        count = min(int(top), max(1, int(_LARGEST_SHARE * len(allowed))))
        chosen = allowed[np.argsort(rated.fun[allowed], kind="stable")[:count]]
        moved = drawn[chosen].mean(axis=0)
        moved /= moved.sum()
        step = float(np.abs(moved - center).sum())
        center = moved
        now = search.rate(center[None])
        if (not now.harmless[0], now.fun[0]) < (not kept.harmless[0], kept.fun[0]):
            best, kept = center, now
        if step < _STILL:
            break

    warned = []
    beyond = ((reference < low - TOLERANCE) | (reference > high + TOLERANCE)).any()
    if pareto and beyond:
        warned.append(
            "prior lies outside the box of the fitted mixtures, where the model knows nothing: what Pareto is held"
            " against is a guess; label mixtures around the prior too, or set pareto=False"
        )
    if not hits:
        warned.append(
            f"none of {candidates} candidates in any round lay within the box of the fitted mixtures; raise"
            " concentration, or fit to mixtures that are spread more widely"
        )
    if not kept.harmless[0]:
        warned.append("no mixture was found for which every task is predicted to fare as well as under the prior")
    for each in warned:
        warnings.warn(each, stacklevel=2)

    first = search.rate(start[None])
    predicted = model.predict(np.stack([best, reference]))
    gains = predicted[0] * search.signs
    terms = {"uniformity": float(gains.std()), "influence": float(gains.sum()), "diversity": entropy(best)}
    moved_at_all = best is not start
    return MixtureResult(
        weights=best,
        prior=reference,
        domains=domains,
        tasks=model.tasks,
        success=bool(hits) and bool(kept.harmless[0]),
        status=0 if hits and kept.harmless[0] else 1,
        message="; ".join([_verdict(model, search, first, kept, moved_at_all), *warned]),
        fun=float(kept.fun[0]),
        nit=done,
        terms=terms,
        predicted=predicted[0],
        predicted_prior=predicted[1],
        effective_domains=math.exp(terms["diversity"]),
        active=(),
        kept=(),
        solver="search" if moved_at_all else "anchor",
        gap=math.nan,
        warnings=tuple(warned),
    )


@dataclass(frozen=True, eq=False)
class _Rated:
    """The objective [N] of mixtures, and whether each serves every task as well as the prior does [N]."""

    fun: Array
    harmless: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class _Search:
    """What is searched for: TiKMiX-D's objective on predicted labels times ``signs`` [n], at least ``required`` [n]."""

    model: MixtureModel
    signs: Array
    uniformity: float
    influence: float
    diversity: float
    required: Array

    def rate(self, mixtures: Array) -> _Rated:
        gains = self.model.predict(mixtures) * self.signs
        fun = self.uniformity * gains.std(axis=1) - self.influence * gains.sum(axis=1)
        fun += self.diversity * xlogy(mixtures, mixtures).sum(axis=1)
        return _Rated(fun, np.asarray((gains >= self.required).all(axis=1)))


def _verdict(model: MixtureModel, search: _Search, first: _Rated, last: _Rated, moved: bool) -> str:
    """Say what TiKMiX-M adds to its anchor."""
    if not moved:
        return "TiKMiX-M adds nothing: no mixture it found is predicted to be better than the anchor, which is returned"
    if not first.harmless[0]:
        return "the anchor harms a task against the prior, the mixture found does not or is better otherwise"
    gain = float(first.fun[0] - last.fun[0])
    error = search.influence * float(np.sqrt(((model.error * search.signs) ** 2).sum()))
    if gain <= error:
        return (
            f"TiKMiX-M adds nothing that is sure: the objective is predicted to fall by {gain:.3g} from the anchor's,"
            f" within the model's cross-validated error of {error:.3g}"
        )
    return (
        f"the objective is predicted to fall by {gain:.3g} from the anchor's, against a cross-validated error of the"
        f" model of {error:.3g}"
    )


def _schedule(given: tuple[float, float] | None, rounds: int, m: int, literal: bool) -> Array:
    ends = (2.0 * m, 200.0 * m) if given is None else tuple(given)
    if len(ends) != 2:
        raise ValueError(f"concentration must be two numbers, of the first and of the last round; got {given!r}")
    first, last = (read_number("concentration", end, positive=True) for end in ends)
    if first > last:
        raise ValueError(
            f"concentration must not fall, from wide draws to narrow ones; got {first:g} to {last:g}; for the paper's"
            " order use literal_schedule=True"
        )
    strengths = np.geomspace(first, last, rounds)
    return strengths[::-1] if literal else strengths


def _read_scale(scale: Any, model: MixtureModel) -> Array:
    if scale is None:
        # A label that never moved tells nothing about mixtures: any unit will do.
        return np.where(model.spread > 0, model.spread, 1.0)
    units = np.array(scale, dtype=np.float64)
    n = len(model.spread)
    if units.shape != (n,) or not (np.isfinite(units) & (units > 0)).all():
        raise ValueError(f"scale must be {n} numbers above 0, one per label; got {scale!r}")
    return units
