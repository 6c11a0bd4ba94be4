"""Label mixtures by a few real optimizer steps on each, all from the same state, which is restored afterwards."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tikmix_fast.arguments import require_int
from tikmix_fast.mixture.inputs import read_mixtures
from tikmix_fast.probes.snapshot import Snapshot

Array = NDArray[np.float64]

__all__ = ["ProbeLabels", "probe"]


@dataclass(frozen=True, eq=False)
class ProbeLabels:
    """Effect of N mixtures on n tasks.

    Attributes
    ----------
    mixtures : float64 [N, m]
    runs : float64 [R, N, n]
        Decrease of each task's loss in each of R repeats; positive is better.
    before : float64 [R, n]
        Losses at the common start.
    steps : int
        Optimizer steps on each mixture.
    """

    mixtures: Array
    runs: Array
    before: Array
    steps: int

    @property
    def labels(self) -> Array:
        """Mean decrease of each task's loss over repeats [N, n]; positive is better."""
        return np.asarray(self.runs.mean(axis=0))

    @property
    def stderr(self) -> Array:
        """Standard error of `labels` [N, n]; NaN for a single repeat."""
        return _standard_error(self.runs)

    @property
    def paired_stderr(self) -> Array:
        """Standard error of the differences between `labels` and their mean over mixtures [N, n].

        Use it to compare mixtures: all mixtures of a repeat share the same noise, which cancels in differences. NaN for
        a single repeat.
        """
        return _standard_error(self.runs - self.runs.mean(axis=1, keepdims=True))


def probe(
    owners: Iterable[Any],
    train_step: Callable[[Array, int], Any],
    evaluate: Callable[[], Sequence[float] | Any],
    mixtures: Sequence[Any] | Any,
    *,
    steps: int,
    repeats: int = 1,
    seed: int = 0,
    prepare: Callable[[Array, int], Any] | None = None,
) -> ProbeLabels:
    """Take real optimizer steps on each of several mixtures, and return how much each lowers the tasks' losses.

    Every mixture starts from the state at the time of the call, with the same random numbers. Afterwards, even after
    an exception, that state is restored bit by bit.

    Parameters
    ----------
    owners : iterable
        Everything that ``train_step`` and ``evaluate`` change: model, optimizer, scheduler, scaler, sampler, averages
        of the weights; see `Snapshot`. State that is not listed stays changed and leaks into the next mixture.
    train_step : callable
        ``train_step(mixture, step)`` takes one optimizer step on data of the mixture, float64 [m]; step starts at 0.
    evaluate : callable
        Returns the tasks' losses [n].
    mixtures : array_like [N, m]
        Weights of at least 0 whose sum is 1 within 0.01; the function scales them to sum 1.
    steps : int
        Optimizer steps on each mixture.
    repeats : int
        Number of repetitions of all steps, each with other random numbers; two or more give standard errors.
    seed : int
        Seed of the global random states of Python, numpy and torch. They are set before the first step on each mixture
        and before each evaluation.
    prepare : callable, optional
        ``prepare(mixture, repeat)`` runs before the first step on each mixture. Use it to set a sampler's weights, and
        to choose other data in each repeat if the data does not come from the global random states.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or ``evaluate`` does not return losses [n].
    FloatingPointError
        If a loss is not finite.

    Warns
    -----
    UserWarning
        If all repeats give exactly the same labels, which then say nothing about the error.

    Notes
    -----
    Cost: N * repeats * steps optimizer steps and (N + 1) * repeats evaluations. The label of a mixture does not depend
    on the other mixtures, so several calls can share a long list.

    This is the only kind of label that includes real interactions between domains. It measures several steps at the
    current learning rate, as MATES and Aioli do; Group Influence is the slope at the first step.

    Examples
    --------
    >>> weight = torch.zeros(2)
    >>> def train_step(mixture, step):
    ...     weight.add_(torch.from_numpy(mixture).float())
    >>> labels = probe([weight], train_step, lambda: [3 - weight[0]], [[1.0, 0.0], [0.25, 0.75]], steps=2)
    >>> labels.labels.tolist(), weight.tolist()
    ([[2.0], [0.5]], [0.0, 0.0])
    """
    candidates = read_mixtures("mixtures", mixtures)
    steps, repeats = require_int("steps", steps, 1), require_int("repeats", repeats, 1)
    seed = require_int("seed", seed, 0)
    snapshot = Snapshot(owners)
    before: list[Array] = []
    runs: list[list[Array]] = []
    try:
        for repeat in range(repeats):
            training_seed, evaluation_seed = map(int, np.random.SeedSequence([seed, repeat]).generate_state(2))
            snapshot.restore()
            start = _losses(evaluate, evaluation_seed, "before training", len(before[0]) if before else None)
            before.append(start)
            runs.append([])
            for index, mixture in enumerate(candidates):
                snapshot.restore()
                _seed_all(training_seed)
                if prepare is not None:
                    prepare(mixture.copy(), repeat)
                for step in range(steps):
                    train_step(mixture.copy(), step)
                where = f"after {steps} steps on mixture {index}"
                runs[-1].append(start - _losses(evaluate, evaluation_seed, where, len(start)))
    finally:
        snapshot.restore()
    result = ProbeLabels(candidates, np.array(runs), np.array(before), steps)
    if repeats > 1 and (result.runs == result.runs[0]).all():
        warnings.warn(
            "all repeats gave the same labels: draw data from the global random state, or let prepare(mixture, repeat)"
            " choose other data for each repeat",
            stacklevel=2,
        )
    return result


def _losses(evaluate: Callable[[], Any], seed: int, where: str, expected: int | None) -> Array:
    _seed_all(seed)
    losses = np.array([float(each) for each in evaluate()], dtype=np.float64)
    if not losses.size or (expected is not None and len(losses) != expected):
        raise ValueError(
            f"evaluate must return the losses of {expected or 'one or more'} tasks; got {len(losses)} {where}"
        )
    if not np.isfinite(losses).all():
        raise FloatingPointError(f"evaluate must return finite losses; got {losses.tolist()} {where}")
    return losses


def _standard_error(runs: Array) -> Array:
    repeats = len(runs)
    if repeats < 2:
        return np.full(runs.shape[1:], np.nan)
    return np.asarray(runs.std(axis=0, ddof=1) / math.sqrt(repeats))


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  users' code may draw from the global state
    torch.manual_seed(seed)
