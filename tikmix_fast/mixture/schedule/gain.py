"""The predicted gain of a new mixture, and whether it exceeds noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.matrix.microbatch_record import MicrobatchRecord
from tikmix_fast.mixture.direct.problem import TOLERANCE, row_scale
from tikmix_fast.mixture.inputs import Array, read_matrix

__all__ = ["Gain", "expected_gain"]


@dataclass(frozen=True)
class Gain:
    """The predicted gain of one mixture over another, with its errors.

    Attributes
    ----------
    total : float
        Sum over tasks of their gain ``S @ (weights - prior)``, each divided by the scale of its row: the growth of
        TiKMiX-D's influence term.
    stderr : float
        Standard error of ``total``, as if S had not chosen the mixture. NaN if the error of a moving domain is unknown.
    chance : float
        Upper bound on ``total / stderr`` from noise alone, for a mixture chosen by the same S: sqrt(k) for k + 1
        measured domains.

    Notes
    -----
    A solver moves weight to the domains that look best, so it always predicts some gain: ``total / stderr`` reaches 5
    for 26 domains without any influence. Its largest value over all changes of the mixture is the root of a chi-square
    with k degrees of freedom (Scheffe 1953), which is nearly normal about sqrt(k) with variance 1/2 (Fisher). So for
    any solver, `excess` is above 1 in at most 8% of matrices without influence, and above 2 in 0.3%; the rates are
    somewhat higher if the errors themselves come from few micro-batches.
    """

    total: float
    stderr: float
    chance: float

    @property
    def excess(self) -> float:
        """Standard errors beyond the reach of noise alone, ``total / stderr - chance``; NaN where unknown."""
        if self.stderr == 0:
            return math.copysign(math.inf, self.total) if self.total else -self.chance
        return self.total / self.stderr - self.chance


def expected_gain(matrix: InfluenceMatrix, weights: Array, prior: Array) -> Gain:
    """Predict the gain of ``weights`` over ``prior``, both [m] in the matrix's order.

    Errors of different domains, and of different tasks' own batches, are independent. All tasks share the batches of a
    domain. The matrix's record, if there is one, shows how far their errors agree; without it this assumes that they
    agree fully, which bounds the error. The task's own error, and a projection's, count as independent between domains.
    That overstates them, because the part that domains share cancels in a change.
    """
    values, measured, tasks, _ = read_matrix(matrix)
    step = np.where(measured, weights - prior, 0.0)
    step[np.abs(step) <= TOLERANCE] = 0.0
    moved = np.flatnonzero(step)
    scale, _ = row_scale(values[:, measured], "max", tasks)
    domain_side, total = matrix.stderr_domain / scale[:, None], matrix.stderr / scale[:, None]
    rest = np.maximum(total**2 - domain_side**2, 0.0).sum(axis=0)
    joint = domain_side.sum(axis=0) ** 2
    if matrix.record is not None:
        joint *= [_joint_share(matrix.record, scale, j) for j in range(len(step))]
    return Gain(
        total=float((values @ step / scale).sum()),
        stderr=math.sqrt((step[moved] ** 2 * (joint + rest)[moved]).sum()),
        chance=math.sqrt(max(measured.sum() - 1, 0)),
    )


def _joint_share(record: MicrobatchRecord, scale: Array, domain: int) -> float:
    """Return the variance of a domain's scaled influence summed over tasks, over that of fully agreeing errors."""
    tokens, sums = record.of_domain(domain)
    if len(tokens) < 2:
        return 1.0
    scores = sums / scale[:, None]  # [n, k], tokens times influence
    residual = scores - scores.sum(axis=1, keepdims=True) / tokens.sum() * tokens
    joint = residual.sum(axis=0)
    largest = np.sqrt((residual**2).sum(axis=1)).sum()
    return float(joint @ joint / largest**2) if largest > 0 else 1.0
