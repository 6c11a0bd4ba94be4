"""The schedule of a training run: a warm-up mixture, and new mixtures from measured influence at its boundaries."""

from __future__ import annotations

import inspect
import os
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tikmix_fast import files
from tikmix_fast.arguments import require_int
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.mixture.direct.problem import TOLERANCE
from tikmix_fast.mixture.direct.tikmix_d import tikmix_d
from tikmix_fast.mixture.inputs import Array, read_names, read_number
from tikmix_fast.mixture.result import MixtureResult
from tikmix_fast.mixture.schedule.boundaries import read_boundaries
from tikmix_fast.mixture.schedule.decision import Decision, check_history
from tikmix_fast.mixture.schedule.gain import Gain, expected_gain
from tikmix_fast.mixture.schedule.rank_agreement import RankAgreement, rank_agreement
from tikmix_fast.mixture.schedule.supply import Supply

Solver = Callable[[InfluenceMatrix, dict[str, float]], MixtureResult]

__all__ = ["DynamicMixture", "Solver"]

_FORMAT = "tikmix_fast.dynamic_mixture"
_VERSION = 1
_OWN_OPTIONS = ("supply", "stage_tokens", "max_epochs")


class DynamicMixture:
    """Decide at each boundary of a training run on the mixture of the next stage.

    The run begins with a warm-up mixture. At each boundary the caller measures Group Influence at the current weights,
    and a solver proposes a mixture. The schedule accepts it if its predicted gain is large enough against the error of
    the measurement. The schedule holds no model and no sampler: it works with ``MixtureSampler.set_weights`` and with
    any trainer.

    Parameters
    ----------
    domains : iterable of str
        Names of the domains.
    steps : int
        Length of the run, in any unit that grows with the training tokens: optimizer steps, samples, tokens.
    stages : int
        Number of equal parts of the run. The paper can be read as 5 or as 2; 1 never measures.
    boundaries : sequence of int, optional
        Rising steps at which the mixture may change, instead of equal stages. 0 measures before the first step.
    warm_up : mapping from domain name to weight, or array_like [m], optional
        The mixture before the first boundary. None: uniform, or as even as the supply allows.
    solver : callable, optional
        ``solver(matrix, prior) -> MixtureResult`` with the prior by domain name. None: `tikmix_d`.
    options : mapping, optional
        Keyword arguments of `tikmix_d`, such as ``{"diversity": 0.3, "smoothing": 0.3}``.
    minimum_gain : float
        The least excess of the predicted gain for a change: standard errors beyond the gain that noise alone reaches
        (`Gain.excess`). Without any influence, 1 accepts fewer than one change in ten. 0 accepts every solution. A
        number above 0 needs matrices with standard errors, and rejects a change that only adds diversity, because it
        gains nothing.
    skip_agreement : float, optional
        Between 0 and 1. If the gain at a boundary is below ``minimum_gain``, and the ranks of the domains agree with
        the previous measurement (mean Spearman over tasks at least this), the schedule skips the measurement at the
        next boundary. It never changes weights.
    supply : mapping or array_like [m], optional
        Tokens that each domain has; ``inf`` for no limit. Needs ``run_tokens``. The schedule accepts a mixture only if
        the supply lasts for it to the end of the run, so it can always keep the mixture in use.
    run_tokens : float, optional
        Tokens of the whole run.
    max_epochs : float
        The largest number of passes through a domain's supply.

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
        If an argument is not as described. The constructor tries the options on an influence of zero, so that a mistake
        in them shows now and not at the first boundary.

    Notes
    -----
    A rejected solution leaves the mixture in use unchanged, even if ``floor`` or ``cap`` among the options exclude it.

    The gain is S's prediction, linear in the weights, whatever the solver. A solver that models interactions, such as
    TiKMiX-M, should compare its gain with its own error, and leave ``minimum_gain`` at 0.

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
        self.domains = read_names("domains", domains)
        self.steps = require_int("steps", steps, 1)
        self.boundaries = read_boundaries(self.steps, stages, boundaries)
        self._supply = Supply(self.domains, self.steps, supply, run_tokens, max_epochs)
        self._warm_up = self._supply.first_mixture(warm_up)
        self._minimum_gain = read_number("minimum_gain", minimum_gain)
        self._skip_agreement = None if skip_agreement is None else read_number("skip_agreement", skip_agreement, most=1)
        if skip_agreement is not None and not self._minimum_gain:
            raise ValueError("skip_agreement needs a minimum_gain above 0: without one every gain is enough; got 0")
        if solver is not None and options is not None:
            raise ValueError("options are tikmix_d's: give either a solver or options, or bind them to the solver")
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
        """Tell whether to measure influence and call `update` before training on ``step``.

        It stays true until `update`, so a loop that misses a boundary meets it late.
        """
        passed = bisect_right(self.boundaries, step) - self.stage
        skipped = 1 if self.history and self.history[-1].skips_next else 0
        return step < self.steps and passed > skipped

    def caps(self, step: int) -> dict[str, float]:
        """Return the largest weight of each domain for which its supply lasts from ``step`` to the end.

        Raises
        ------
        TypeError, ValueError
            If ``step`` is no step of the run, or precedes the last decision, whose mixture has used supply since.
        """
        if require_int("step", step, 0) >= self.steps:
            raise ValueError(f"step must be below steps, {self.steps}; got {step}")
        if self.history and step < self.history[-1].step:
            raise ValueError(f"step must be at least that of the last decision, {self.history[-1].step}; got {step}")
        rest = 1 - step / self.steps
        return {name: min(left / rest, 1.0) for name, left in self._left(step).items()}

    def update(self, step: int, matrix: InfluenceMatrix | Any) -> Decision:
        """Decide on the mixture from ``step`` on, by the influence measured there; return the new end of `history`.

        Parameters
        ----------
        step : int
            A step at which an update is due.
        matrix : InfluenceMatrix or array_like [n, m]
            An InfluenceMatrix has the schedule's domains in any order, and its tasks may differ from stage to stage. An
            array has the schedule's order.

        Raises
        ------
        TypeError, ValueError
            If no update is due at ``step``, or the matrix or the solver's result does not fit. Any error, the solver's
            too, leaves the schedule as it was.
        """
        if not self.due(require_int("step", step, 0)):
            following = next(
                (f"the next is {each}" for each in self.boundaries if self.due(each)), "there is none left"
            )
            raise ValueError(f"step must be one at which an update is due; got {step}: {following}")
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
        skips = (
            result.success
            and self._skip_agreement is not None
            and ranks is not None
            and gain.excess < self._minimum_gain
            and ranks.mean_spearman >= self._skip_agreement
        )
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
        """Return all decisions, and the run they belong to, as plain JSON types."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            **self._run(),
            "history": [decision.to_dict() for decision in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. The next decisions equal those of an uninterrupted schedule of the same arguments.

        The state does not contain the solver, its options and the thresholds; this schedule uses its own.

        Raises
        ------
        TypeError, ValueError
            If the state is damaged, or belongs to another run; the schedule is then unchanged.
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
        check_history(history, self.domains, self.steps, self.boundaries, self._warm_up)
        self.history = history

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the state as JSON with a checksum, atomically, and return the path."""
        return files.write_sealed_json(path, self.state_dict())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continue from the state that `save` wrote.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is not JSON, or its state is damaged or belongs to another run; the message names the file, and
            the schedule is unchanged.
        """
        state = files.read_json(path)
        with files.naming(path):
            self.load_state_dict(state)

    def _left(self, step: int) -> dict[str, float]:
        spans = [(0, self._warm_up), *((each.step, each.weights) for each in self.history)]
        return self._supply.left(spans, step)

    def _try_options(self) -> None:
        own = [name for name in _OWN_OPTIONS if name in self._options]
        if own:
            raise ValueError(f"options must not hold {own[0]!r}: give supply and max_epochs to the schedule itself")
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
        limits: dict[str, Any] = {}
        if np.isfinite(self._supply.shares).any():
            limits = {"supply": self._left(step), "stage_tokens": 1 - step / self.steps}
        return tikmix_d(matrix, self.weights, **self._options, **limits)

    def _read(self, matrix: InfluenceMatrix | Any) -> InfluenceMatrix:
        if not isinstance(matrix, InfluenceMatrix):
            if self._minimum_gain:
                raise ValueError("minimum_gain needs standard errors: pass an InfluenceMatrix, not a plain array")
            return InfluenceMatrix.from_values(matrix, domains=self.domains)
        if set(matrix.domains) != set(self.domains):
            raise ValueError(f"matrix must have the domains of the schedule, {self.domains}; got {matrix.domains}")
        return matrix

    def _read_weights(self, step: int, result: Any, matrix: InfluenceMatrix) -> dict[str, float]:
        """Return the solver's mixture in the schedule's order, after checks that the caller's solver may fail."""
        if not isinstance(result, MixtureResult):
            raise TypeError(f"solver must return a MixtureResult; got {type(result).__name__}")
        names = result.domains or matrix.domains
        if set(names) != set(self.domains) or len(result.weights) != len(names):
            raise ValueError(f"solver must return weights of the domains {self.domains}; got {names}")
        solved = dict(zip(names, result.weights.tolist(), strict=True))
        for name, most in self.caps(step).items():
            if solved[name] > most + TOLERANCE:
                raise ValueError(
                    f"solver must keep within the supply; got {solved[name]:g} for domain {name!r}, which lasts for"
                    f" {most:g}: see schedule.caps(step)"
                )
        return {name: solved[name] for name in self.domains}

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
            return True, "changed: minimum_gain is 0, which accepts every solution"
        if np.isnan(gain.excess):
            return False, "kept: the error of the gain is unknown; measure every domain in two micro-batches or more"
        finding = (
            f"the gain is {abs(gain.excess):.3g} standard errors {'beyond' if gain.excess >= 0 else 'below'} noise"
        )
        if gain.excess < self._minimum_gain:
            return False, f"kept: {finding}, the minimum is {self._minimum_gain:g}"
        return True, f"changed: {finding}, the minimum is {self._minimum_gain:g}"

    def _run(self) -> dict[str, Any]:
        """Return the part of a state that must equal the schedule's."""
        return {
            "domains": list(self.domains),
            "steps": self.steps,
            "boundaries": list(self.boundaries),
            "warm_up": dict(self._warm_up),
        }
