"""The schedule of a training run: a warm-up mixture, and at every boundary a new one from measured influence."""

from __future__ import annotations

import inspect
import os
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tikmix_fast import files
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.mixture.direct.problem import TOLERANCE
from tikmix_fast.mixture.direct.tikmix_d import tikmix_d
from tikmix_fast.mixture.direct.tilt import capped_tilt
from tikmix_fast.mixture.inputs import per_domain, read_number, read_prior, read_whole
from tikmix_fast.mixture.result import MixtureResult
from tikmix_fast.mixture.schedule.decision import Decision
from tikmix_fast.mixture.schedule.gain import Gain, expected_gain
from tikmix_fast.mixture.schedule.stability import RankAgreement, rank_agreement

Array = NDArray[np.float64]
Solver = Callable[[InfluenceMatrix, dict[str, float]], MixtureResult]

__all__ = ["DynamicMixture", "Solver"]

_FORMAT = "tikmix_fast.dynamic_mixture"
_VERSION = 1
_ROUNDING = 1e-12
_OWN_OPTIONS = ("supply", "stage_tokens", "max_epochs")


class DynamicMixture:
    """Decide at each boundary of a training run which mixture the next stage is trained on.

    The run begins with a warm-up mixture. At each boundary the caller measures Group Influence at the current weights;
    a solver proposes a mixture, and it is taken if its predicted gain is large enough against the error of what was
    measured. The schedule holds no model and no sampler: it pairs with ``MixtureSampler.set_weights`` and with any
    trainer.

    Parameters
    ----------
    domains : iterable of str
        Names of the domains.
    steps : int
        Length of the run, in any unit that grows with the tokens trained on: optimizer steps, samples, tokens.
    stages : int
        Equal parts of the run. 5 and 2 are the paper's two readings; 1 never measures.
    boundaries : sequence of int, optional
        Rising steps at which the mixture may change, instead of equal stages; 0 measures before the first step.
    warm_up : mapping from domain name to weight, or array_like [m], optional
        The mixture before the first boundary. None: uniform, or as even as the supply allows.
    solver : callable, optional
        ``solver(matrix, prior) -> MixtureResult`` with the prior by domain name. None: `tikmix_d`.
    options : mapping, optional
        Keyword arguments of `tikmix_d`, such as ``{"diversity": 0.3, "smoothing": 0.3}``.
    minimum_gain : float
        Standard errors beyond what noise alone reaches (`Gain.excess`) that the predicted gain must have for the
        mixture to change; 1 lets fewer than one change in ten through where there is no influence at all. 0 takes every
        solution. Above 0 needs matrices with standard errors, and a change for the sake of diversity alone, which gains
        nothing, is not made.
    skip_agreement : float, optional
        Between 0 and 1. After a boundary at which the gain was below ``minimum_gain`` and the ranks of the domains
        agreed with those measured before (mean Spearman over tasks at least this), the next one is passed over: nothing
        is measured there. It never changes weights.
    supply : mapping or array_like [m], optional
        Tokens that each domain has; ``inf`` for no limit. Needs ``run_tokens``. No mixture is taken that would go
        through a domain more than ``max_epochs`` times by the end of the run, if it were kept until then: a mixture
        that was allowed once always is.
    run_tokens : float, optional
        Tokens of the whole run.
    max_epochs : float
        How often the supply may be gone through.

    Attributes
    ----------
    domains : tuple of str
    steps : int
    boundaries : tuple of int
    history : tuple of Decision
        All decisions so far.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described. Options are tried at once, on an influence of zero, so that a mistake in
        them shows now and not at the first boundary.

    Notes
    -----
    A mixture that is kept is kept as it is, also where ``floor`` or ``cap`` among the options would exclude it.

    The gain is what S predicts, linear in the weights, whatever the solver. One that sees interactions, such as
    TiKMiX-M, should weigh what it found against its own error, and leave ``minimum_gain`` at 0.

    Examples
    --------
    >>> schedule = DynamicMixture(
    ...     ["web", "code"], steps=10, stages=2, warm_up={"web": 0.7, "code": 0.3}, minimum_gain=1
    ... )
    >>> def measure():
    ...     return InfluenceMatrix.from_values(
    ...         [[1.0, 3.0]], tasks=["qa"], domains=["web", "code"], stderr=[[0.1, 0.1]]
    ...     )
    >>> for step in range(schedule.steps):
    ...     if schedule.due(step):
    ...         decision = schedule.update(step, measure())
    ...         print(step, {name: round(weight, 3) for name, weight in decision.weights.items()})
    ...         print(decision.reason)
    5 {'web': 0.339, 'code': 0.661}
    changed: the gain is 13.1 standard errors beyond noise, the minimum is 1
    """

    def __init__(
        self,
        domains: Iterable[str],
        steps: int,
        stages: int = 5,
        *,
        boundaries: Sequence[int] | None = None,
        warm_up: Mapping[str, float] | Any = None,
        solver: Solver | None = None,
        options: Mapping[str, Any] | None = None,
        minimum_gain: float = 0.0,
        skip_agreement: float | None = None,
        supply: Mapping[str, float] | Any = None,
        run_tokens: float | None = None,
        max_epochs: float = 1.0,
    ) -> None:
        self.domains = _names(domains)
        self.steps = read_whole("steps", steps, 1)
        self.boundaries = _equal(self.steps, stages) if boundaries is None else _given(self.steps, boundaries)
        self._supply = self._shares(supply, run_tokens, max_epochs)
        self._warm_up = self._first_mixture(warm_up)
        self._minimum_gain = read_number("minimum_gain", minimum_gain)
        self._skip_agreement = None if skip_agreement is None else read_number("skip_agreement", skip_agreement, most=1)
        if skip_agreement is not None and not self._minimum_gain:
            raise ValueError("skip_agreement needs a minimum_gain above 0: without one every gain is enough; got 0")
        if solver is not None and options is not None:
            raise ValueError("options are tikmix_d's, so give either a solver or options; bind them to the solver")
        if solver is not None and not callable(solver):
            raise TypeError(f"solver must be callable, solver(matrix, prior) -> MixtureResult; got {solver!r}")
        self._solver = solver
        self._options = dict(options or {})
        self.history: tuple[Decision, ...] = ()
        self._try_options()

    @property
    def weights(self) -> dict[str, float]:
        """The mixture in use, by domain."""
        return dict(self.history[-1].weights if self.history else self._warm_up)

    @property
    def stage(self) -> int:
        """Stage of the last decision; 0 is the warm-up."""
        return self.history[-1].stage if self.history else 0

    def due(self, step: int) -> bool:
        """Tell whether influence is to be measured before ``step`` is trained on, and `update` called.

        It stays true until then, so a loop that does not meet a boundary exactly meets it late.
        """
        passed = bisect_right(self.boundaries, step) - self.stage
        skipped = 1 if self.history and self.history[-1].skips_next else 0
        return step < self.steps and passed > skipped

    def caps(self, step: int) -> dict[str, float]:
        """Return the largest weight of each domain that its supply lasts for, if held from ``step`` to the end.

        Raises
        ------
        TypeError, ValueError
            If ``step`` is no step of the run, or one before the last decision, which has used supply since.
        """
        if read_whole("step", step, 0) >= self.steps:
            raise ValueError(f"step must be below steps, {self.steps}; got {step}")
        if self.history and step < self.history[-1].step:
            raise ValueError(f"step must be at least that of the last decision, {self.history[-1].step}; got {step}")
        left = np.minimum(self._left(step) / (1 - step / self.steps), 1.0)
        return dict(zip(self.domains, left.tolist(), strict=True))

    def update(self, step: int, matrix: InfluenceMatrix | Any) -> Decision:
        """Decide on the mixture from ``step`` on, by the influence measured there; returns the new end of `history`.

        Parameters
        ----------
        step : int
            With ``due(step)``.
        matrix : InfluenceMatrix or array_like [n, m]
            An InfluenceMatrix of the schedule's domains in any order; the tasks may differ from stage to stage. An
            array has the schedule's order.

        Raises
        ------
        TypeError, ValueError
            If nothing is due at ``step``, or the matrix, or what the solver returns, does not fit. Whatever is raised,
            also by the solver, the schedule is as it was before.
        """
        if not self.due(read_whole("step", step, 0)):
            raise ValueError(f"step must be one at which an update is due; got {step}: {self._next_due()}")
        measured = self._read(matrix)
        result = self._solve(step, measured)
        solved = self._read_weights(step, result, measured)
        order = [measured.domains.index(name) for name in self.domains]
        mixtures = (self.weights, solved)
        before, proposed = (np.array([mixture[name] for name in measured.domains]) for mixture in mixtures)
        gain = expected_gain(measured, proposed, before)
        influence = measured.values[:, order]
        reliability = np.full(len(measured.tasks), np.nan) if measured.record is None else measured.split_half().whole
        ranks = self._agreement(measured.tasks, influence, reliability)
        moves = bool(np.abs(proposed - before).max() > TOLERANCE)
        changed, reason = self._judge(result, gain, moves)
        skips = result.success and self._stable(gain, ranks)
        if skips:
            reason += f"; the ranks are those of stage {self.stage}, so the next boundary is skipped"
        decision = Decision(
            stage=bisect_right(self.boundaries, step),
            step=step,
            weights=solved if changed else self.weights,
            changed=changed,
            reason=reason,
            solved=solved,
            gain=gain,
            ranks=ranks,
            skips_next=skips,
            fun=float(result.fun),
            terms=dict(result.terms),
            success=bool(result.success),
            message=result.message,
            warnings=tuple(result.warnings),
            tasks=measured.tasks,
            influence=influence,
            reliability=reliability,
        )
        self.history = (*self.history, decision)
        return decision

    def state_dict(self) -> dict[str, Any]:
        """Return everything that was decided, and the run it belongs to, as plain JSON types."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            **self._run(),
            "history": [decision.to_dict() for decision in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: what is decided next is what an uninterrupted schedule of the same arguments decides.

        The solver, its options and the thresholds are not part of the state: they are those this schedule was made
        with.

        Raises
        ------
        TypeError, ValueError
            If the state is damaged, or is of another run; the schedule is then unchanged.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping, as state_dict returns; got {type(state).__name__}")
        if state.get("format") != _FORMAT or state.get("version") != _VERSION:
            raise ValueError(f"state must be that of a DynamicMixture: 'format' {_FORMAT!r}, 'version' {_VERSION}")
        for field, mine in self._run().items():
            if state.get(field) != mine:
                raise ValueError(
                    f"{field} of the state must be that of the schedule, {mine!r}; got {state.get(field)!r}: make the"
                    f" schedule with the {field} it was saved with"
                )
        try:
            history = tuple(Decision.from_dict(each) for each in state["history"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"history of the state must be as state_dict returns it; got {error!r}") from None
        self._check_history(history)
        self.history = history

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the state as JSON with a checksum, atomically; returns the path."""
        return files.write_sealed_json(path, self.state_dict())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from the state that `save` wrote.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is not JSON, or its state is damaged or of another run; the message names the file, and the
            schedule is unchanged.
        """
        state = files.read_json(path)
        with files.naming(path):
            self.load_state_dict(state)

    def _shares(self, supply: Any, run_tokens: float | None, max_epochs: float) -> Array:
        """Return how much of the run [m] each domain could fill; infinite without a limit."""
        if (supply is None) != (run_tokens is None):
            raise ValueError("supply and run_tokens must be given together; got only one of them")
        epochs = read_number("max_epochs", max_epochs, positive=True)
        if supply is None:
            return np.full(len(self.domains), np.inf)
        tokens = per_domain("supply", supply, self.domains, len(self.domains))
        shares = epochs * tokens / read_number("run_tokens", run_tokens, positive=True)
        if shares.sum() < 1.0 - TOLERANCE:
            raise ValueError(
                f"supply must last for the run; got {shares.sum():.3g} of run_tokens at max_epochs={epochs:g}: raise"
                " max_epochs, or train on fewer tokens"
            )
        return shares

    def _first_mixture(self, warm_up: Any) -> dict[str, float]:
        m, most = len(self.domains), np.minimum(self._supply, 1.0)
        if warm_up is None:
            weights, _ = capped_tilt(np.zeros(m), np.zeros(m), most)
            weights /= weights.sum()
        else:
            weights = read_prior(warm_up, self.domains, m, name="warm_up")
            given = per_domain("warm_up", warm_up, self.domains, m)
            # A sum that is off by rounding alone is left as it is, so that kept weights are those that were given.
            weights = given if abs(given.sum() - 1.0) <= _ROUNDING else weights
        beyond = np.flatnonzero(weights > most + TOLERANCE)
        if beyond.size:
            j = int(beyond[0])
            raise ValueError(
                f"warm_up must leave a supply to the end of the run; got {weights[j]:g} for domain {self.domains[j]!r},"
                f" which lasts for {most[j]:g}; lower it, raise max_epochs, or leave warm_up out"
            )
        return dict(zip(self.domains, weights.tolist(), strict=True))

    def _left(self, step: int) -> Array:
        """Return what is left of each domain's supply [m] at ``step``, as a share of the run."""
        spans = [(0, self._warm_up), *((each.step, each.weights) for each in self.history)]
        used = np.zeros(len(self.domains))
        for (start, weights), end in zip(spans, [*(start for start, _ in spans[1:]), step], strict=True):
            used += np.array(list(weights.values())) * ((end - start) / self.steps)
        # The mixture in use lasts to the end; rounding must not say otherwise.
        needed = np.array(list(spans[-1][1].values())) * (1 - step / self.steps)
        return np.maximum(self._supply - used, needed)

    def _try_options(self) -> None:
        own = [name for name in _OWN_OPTIONS if name in self._options]
        if own:
            raise ValueError(f"options must not hold {own[0]!r}: the schedule itself takes supply and max_epochs")
        if self._solver is not None or not self.boundaries:
            return
        try:
            inspect.signature(tikmix_d).bind(None, None, **self._options)
        except TypeError as error:
            raise TypeError(f"options must be keyword arguments of tikmix_d: {error}") from None
        nothing = np.zeros((1, len(self.domains)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._solve(self.boundaries[0], InfluenceMatrix.from_values(nothing, domains=self.domains, stderr=nothing))

    def _solve(self, step: int, matrix: InfluenceMatrix) -> MixtureResult:
        if self._solver is not None:
            return self._solver(matrix, self.weights)
        limited: dict[str, Any] = {}
        if np.isfinite(self._supply).any():
            left = dict(zip(self.domains, self._left(step).tolist(), strict=True))
            limited = {"supply": left, "stage_tokens": 1 - step / self.steps}
        return tikmix_d(matrix, self.weights, **self._options, **limited)

    def _read(self, matrix: InfluenceMatrix | Any) -> InfluenceMatrix:
        if not isinstance(matrix, InfluenceMatrix):
            if self._minimum_gain:
                raise ValueError("minimum_gain needs standard errors: pass an InfluenceMatrix, not a plain array")
            return InfluenceMatrix.from_values(matrix, domains=self.domains)
        if set(matrix.domains) != set(self.domains):
            raise ValueError(f"matrix must have the domains of the schedule, {self.domains}; got {matrix.domains}")
        return matrix

    def _read_weights(self, step: int, result: Any, matrix: InfluenceMatrix) -> dict[str, float]:
        """Return the solver's mixture in the schedule's order; nobody has checked a solver that was given."""
        if not isinstance(result, MixtureResult):
            raise TypeError(f"solver must return a MixtureResult; got {type(result).__name__}")
        names = result.domains or matrix.domains
        if set(names) != set(self.domains) or len(result.weights) != len(names):
            raise ValueError(f"solver must return weights of the domains {self.domains}; got {names}")
        found = dict(zip(names, result.weights.tolist(), strict=True))
        for name, most in self.caps(step).items():
            if found[name] > most + TOLERANCE:
                raise ValueError(
                    f"solver must keep within the supply; got {found[name]:g} for domain {name!r}, which lasts for"
                    f" {most:g}: see schedule.caps(step)"
                )
        return {name: found[name] for name in self.domains}

    def _agreement(self, tasks: tuple[str, ...], influence: Array, reliability: Array) -> RankAgreement | None:
        if not self.history:
            return None
        last = self.history[-1]
        common = [name for name in tasks if name in last.tasks]
        old, new = ([names.index(name) for name in common] for names in (last.tasks, tasks))
        return rank_agreement(common, last.influence[old], influence[new], last.reliability[old], reliability[new])

    def _judge(self, result: MixtureResult, gain: Gain, moves: bool) -> tuple[bool, str]:
        """Return whether the mixture changes, and why."""
        if not result.success:
            return False, f"kept: the solver failed: {result.message}"
        if not moves:
            return False, "kept: the solver proposes the mixture in use"
        if not self._minimum_gain:
            return True, "changed: every solution is taken, as minimum_gain is 0"
        if np.isnan(gain.excess):
            return False, "kept: the error of the gain is unknown; measure every domain in two micro-batches or more"
        said = f"the gain is {abs(gain.excess):.3g} standard errors {'beyond' if gain.excess >= 0 else 'below'} noise"
        if gain.excess < self._minimum_gain:
            return False, f"kept: {said}, the minimum is {self._minimum_gain:g}"
        return True, f"changed: {said}, the minimum is {self._minimum_gain:g}"

    def _stable(self, gain: Gain, ranks: RankAgreement | None) -> bool:
        if self._skip_agreement is None or ranks is None:
            return False
        return gain.excess < self._minimum_gain and ranks.mean_spearman >= self._skip_agreement

    def _run(self) -> dict[str, Any]:
        """Return what must be the same for a state to make sense."""
        return {
            "domains": list(self.domains),
            "steps": self.steps,
            "boundaries": list(self.boundaries),
            "warm_up": dict(self._warm_up),
        }

    def _check_history(self, history: tuple[Decision, ...]) -> None:
        weights, stage = self._warm_up, 0
        for each in history:
            if tuple(each.weights) != self.domains:
                raise ValueError(f"history of the state must have the schedule's domains; got {list(each.weights)}")
            if not (each.step < self.steps and stage < each.stage == bisect_right(self.boundaries, each.step)):
                raise ValueError(
                    f"history of the state must be at rising boundaries; got step {each.step}, stage {each.stage}"
                )
            if each.weights != (each.solved if each.changed else weights):
                raise ValueError(f"weights of the state must be those decided on; got others at step {each.step}")
            weights, stage = each.weights, each.stage

    def _next_due(self) -> str:
        return next((f"the next is {step}" for step in self.boundaries if self.due(step)), "there is none left")


def _names(domains: Iterable[str]) -> tuple[str, ...]:
    names = (domains,) if isinstance(domains, str) else tuple(domains)
    if isinstance(domains, str) or not names or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"domains must be one or more non-empty strings; got {domains!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"domains must be unique; got {names}")
    return names


def _equal(steps: int, stages: int) -> tuple[int, ...]:
    count = read_whole("stages", stages, 1)
    if count > steps:
        raise ValueError(f"stages must be at most the {steps} steps; got {count}")
    return tuple(stage * steps // count for stage in range(1, count))


def _given(steps: int, boundaries: Sequence[int]) -> tuple[int, ...]:
    places = tuple(read_whole("boundaries", place, 0) for place in boundaries)
    if any(later <= earlier for earlier, later in pairwise(places)) or (places and places[-1] >= steps):
        raise ValueError(f"boundaries must rise and lie below steps, {steps}; got {places}")
    return places
