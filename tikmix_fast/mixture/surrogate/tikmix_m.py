"""TiKMiX-M: the annealed search for the best mixture on a fitted `MixtureModel`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy

from tikmix_fast.arguments import require_int
from tikmix_fast.mixture.direct.bounds import join_bounds, require_within
from tikmix_fast.mixture.direct.problem import TOLERANCE, Limit, objective_terms
from tikmix_fast.mixture.inputs import Array, per_domain, read_number, read_objective, read_prior
from tikmix_fast.mixture.result import MixtureResult
from tikmix_fast.mixture.surrogate.candidates import dirichlet
from tikmix_fast.mixture.surrogate.mixture_model import MixtureModel

__all__ = ["tikmix_m"]

# The largest share of a round's eligible candidates that the mean includes; a larger one would not select.
_LARGEST_SHARE = 0.1
_STILL = 1e-3  # a step of the centre below this ends the search


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

    Each round draws candidates from a Dirichlet distribution around a centre; the mean of the best ones is the next
    centre. The search minimises TiKMiX-D's objective with predicted labels in place of its linear influence::

        uniformity * std(P) - influence * sum(P) - diversity * H(w),    P_i = +-label_i(w) / scale_i

    The paper's score is the sum alone, the default here. With it, only the box of the fitted mixtures keeps the search
    from concentrating on few domains: see ``floor``, ``cap`` and ``diversity``.

    Parameters
    ----------
    model : MixtureModel
        Fitted.
    anchor : MixtureResult, mapping from domain name to weight, or array_like [m]
        TiKMiX-D's answer, or the mixture in use. The search starts there, and a domain with weight 0 stays at 0. It
        must lie in the box of the fitted mixtures, because the model has no data outside.
    prior : mapping or array_like [m], optional
        The mixture that Pareto compares with; default the anchor.
    minimise : bool
        Whether smaller labels are better, as for losses. Larger influence is better.
    scale : array_like [n], optional
        Divisor of each label, above 0; default its standard deviation over the fitted mixtures. With
        ``labels = S @ w``, ``S.max(axis=1)`` gives TiKMiX-D's objective.
    uniformity, influence, diversity : float
        Weights of the three terms, at least 0, not all 0.
    pareto : bool
        Prefer candidates, if there are any, for which no task is predicted to fare worse than under ``prior``.
    floor, cap : float, mapping or array_like [m]
        Least and largest weight of each domain, as in `tikmix_d`; the search drops candidates outside.
    rounds, candidates, top : int
        T, N and k of the paper, which does not state them. The mean is over the best ``top``, but never over more than
        a tenth of the eligible candidates.
    concentration : (float, float), optional
        Concentration of the Dirichlet distribution in the first and in the last round, log-spaced between; default 2m
        and 200m. A mean of draws stays inside a corner of Pareto constraints; more rounds up to a larger concentration
        end nearer to it.
    literal_schedule : bool
        Use the concentrations from large to small, as printed in the paper, and so end with wide draws. The paper
        probably means the reverse, from wide draws to narrow ones.
    seed : int
        Equal arguments give equal answers.

    Returns
    -------
    MixtureResult
        The best of the anchor and of every round's mean, so its prediction is never worse than the anchor's.
        ``solver`` is ``"search"``, or ``"anchor"`` if the search found nothing better. ``message`` says so, and also
        says when the gain is below the model's cross-validated error. ``nit`` counts the rounds; ``prior`` is the
        mixture that Pareto compares with.

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
    factors = read_objective(uniformity, influence, diversity)
    rounds, candidates = require_int("rounds", rounds, 1), require_int("candidates", candidates, 1)
    top = require_int("top", top, 1)
    strengths = _schedule(concentration, rounds, m, literal_schedule)
    units = _read_scale(scale, model)
    floors = [Limit("the fitted box's least weight", low), Limit("floor", per_domain("floor", floor, domains, m, 0.0))]
    caps = [Limit("the fitted box's largest weight", high), Limit("cap", per_domain("cap", cap, domains, m, 1.0))]
    lower, upper = join_bounds(floors, caps, start, np.ones(m, dtype=np.bool_), domains)
    message = "anchor must lie within the box of the fitted mixtures (label mixtures around it), the floor and the cap"
    require_within(start, lower, upper, domains, message)

    signs = (-1.0 if minimise else 1.0) / units
    required = model.predict(reference[None])[0] * signs - TOLERANCE if pareto else np.full(len(units), -np.inf)
    search = _Search(model, signs, *factors, required, lower, upper)
    found = search.run(start, strengths, candidates, top, np.random.default_rng(seed))
    warned = []
    if pareto and ((reference < low - TOLERANCE) | (reference > high + TOLERANCE)).any():
        warned.append(
            "prior lies outside the box of the fitted mixtures, where the model has no data, so the level that Pareto"
            " asks for is a guess; label mixtures around the prior too, or set pareto=False"
        )
    if not found.hits:
        warned.append(
            f"none of {candidates} candidates in any round lay within the box of the fitted mixtures; raise"
            " concentration, or fit to mixtures that are spread more widely"
        )
    if not found.rated.harmless[0]:
        warned.append("no mixture was found for which every task is predicted to fare as well as under the prior")
    for each in warned:
        warnings.warn(each, stacklevel=2)
    return _result(search, start, reference, found, warned)


def _result(search: _Search, start: Array, reference: Array, found: _Found, warned: Sequence[str]) -> MixtureResult:
    predicted = search.model.predict(np.stack([found.weights, reference]))
    terms = objective_terms(predicted[0] * search.signs, found.weights)
    success = found.hits > 0 and bool(found.rated.harmless[0])
    return MixtureResult(
        weights=found.weights,
        prior=reference,
        domains=search.model.domains,
        tasks=search.model.tasks,
        success=success,
        status=int(not success),
        message="; ".join([_verdict(search, start, found), *warned]),
        fun=float(found.rated.fun[0]),
        nit=found.rounds,
        terms=terms,
        predicted=predicted[0],
        predicted_prior=predicted[1],
        effective_domains=math.exp(terms["diversity"]),
        active=(),
        kept=(),
        solver="search" if found.moved else "anchor",
        gap=math.nan,
        warnings=tuple(warned),
    )


@dataclass(frozen=True, eq=False)
class _Rated:
    """The objective [N] of mixtures, and whether each serves every task as well as the prior does [N]."""

    fun: Array
    harmless: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class _Found:
    """The best mixture [m] of a search, its rating, and the numbers of all rounds and of rounds with candidates."""

    weights: Array
    rated: _Rated
    moved: bool
    rounds: int
    hits: int


@dataclass(frozen=True, eq=False)
class _Search:
    """TiKMiX-D's objective on predicted labels times ``signs`` [n], which must be at least ``required`` [n]."""

    model: MixtureModel
    signs: Array
    uniformity: float
    influence: float
    diversity: float
    required: Array
    lower: Array
    upper: Array

    def rate(self, mixtures: Array) -> _Rated:
        gains = self.model.predict(mixtures) * self.signs
        fun = self.uniformity * gains.std(axis=1) - self.influence * gains.sum(axis=1)
        fun += self.diversity * xlogy(mixtures, mixtures).sum(axis=1)
        return _Rated(fun, np.asarray((gains >= self.required).all(axis=1)))

    def run(self, start: Array, strengths: Array, candidates: int, top: int, rng: np.random.Generator) -> _Found:
        center = start
        best = _Found(start, self.rate(start[None]), False, 0, 0)
        rounds = hits = 0
        for strength in strengths:
            rounds += 1
            drawn = dirichlet(rng, strength * center, candidates)
            drawn = drawn[((drawn >= self.lower) & (drawn <= self.upper)).all(axis=1)]
            if not len(drawn):
                continue
            hits += 1
            before, center = center, self._mean_of_best(drawn, top)
            rated = self.rate(center[None])
            if (not rated.harmless[0], rated.fun[0]) < (not best.rated.harmless[0], best.rated.fun[0]):
                best = _Found(center, rated, True, 0, 0)
            if np.abs(center - before).sum() < _STILL:
                break
        return replace(best, rounds=rounds, hits=hits)

    def _mean_of_best(self, drawn: Array, top: int) -> Array:
        rated = self.rate(drawn)
        eligible = np.flatnonzero(rated.harmless) if rated.harmless.any() else np.arange(len(drawn))
        count = min(top, max(1, int(_LARGEST_SHARE * len(eligible))))
        chosen = eligible[np.argsort(rated.fun[eligible], kind="stable")[:count]]
        mean = drawn[chosen].mean(axis=0)
        return np.asarray(mean / mean.sum())


def _verdict(search: _Search, start: Array, found: _Found) -> str:
    """Say what TiKMiX-M adds to its anchor."""
    if not found.moved:
        return "TiKMiX-M adds nothing: no mixture it found is predicted to be better than the anchor, which is returned"
    first = search.rate(start[None])
    if not first.harmless[0]:
        return "the anchor harms a task against the prior, the mixture found does not or is better otherwise"
    gain = float(first.fun[0] - found.rated.fun[0])
    error = search.influence * float(np.sqrt(((search.model.error * search.signs) ** 2).sum()))
    if gain <= error:
        return (
            f"TiKMiX-M adds nothing certain: the objective is predicted to fall by {gain:.3g} from the anchor's,"
            f" within the model's cross-validated error of {error:.3g}"
        )
    return (
        f"the objective is predicted to fall by {gain:.3g} from the anchor's, against a cross-validated error of the"
        f" model of {error:.3g}"
    )


def _schedule(given: tuple[float, float] | None, rounds: int, m: int, literal: bool) -> Array:
    ends = (2.0 * m, 200.0 * m) if given is None else tuple(given)
    if len(ends) != 2:
        raise ValueError(f"concentration must be two numbers, for the first and the last round; got {given!r}")
    first, last = (read_number("concentration", end, positive=True) for end in ends)
    if first > last:
        raise ValueError(
            f"concentration must not fall from the first round to the last; got {first:g} to {last:g}; for the paper's"
            " order use literal_schedule=True"
        )
    strengths = np.geomspace(first, last, rounds)
    return strengths[::-1] if literal else strengths


def _read_scale(scale: Any, model: MixtureModel) -> Array:
    if scale is None:
        # A constant label does not depend on the mixture: any unit will do.
        return np.where(model.spread > 0, model.spread, 1.0)
    units = np.array(scale, dtype=np.float64)
    n = len(model.spread)
    if units.shape != (n,) or not (np.isfinite(units) & (units > 0)).all():
        raise ValueError(f"scale must be {n} numbers above 0, one per label; got {scale!r}")
    return units
