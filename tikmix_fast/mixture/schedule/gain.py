"""What a change of mixture promises, and whether that is more than noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.matrix.microbatch_record import MicrobatchRecord
from tikmix_fast.mixture.direct.problem import TOLERANCE, row_scale
from tikmix_fast.mixture.inputs import read_matrix

Array = NDArray[np.float64]

__all__ = ["Gain", "expected_gain"]


@dataclass(frozen=True)
class Gain:
    """The predicted gain of one mixture over another, with its errors.

    Attributes
    ----------
    total : float
        Sum over tasks of their gain ``S @ (weights - prior)``, each over the scale of its row: what the influence term
        of TiKMiX-D grows by.
    stderr : float
        Its standard error, as if the mixtures had been chosen without looking at S. NaN where the error of a domain
        that moves is unknown.
    chance : float
        What ``total / stderr`` comes to by noise alone if the mixture was chosen by the same S, at most: sqrt(k) with k
        the measured domains but one.

    Notes
    -----
    A solver moves weight to the domains that look best, so some gain is always predicted: of 26 domains without any
    influence ``total / stderr`` comes to as much as 5. Its largest value over all changes of the mixture is the root of
    a chi-square with k degrees of freedom (Scheffe 1953), which is nearly normal about sqrt(k) with variance 1/2
    (Fisher). Whatever the solver, `excess` is thus above 1 in at most some 8% of matrices without any influence, and
    above 2 in 0.3%; somewhat more where the errors themselves come from few micro-batches.
    """

    total: float
    stderr: float
    chance: float

    @property
    def excess(self) -> float:
        """Standard errors beyond what noise alone reaches, ``total / stderr - chance``; NaN where unknown."""
        if self.stderr == 0:
            return math.copysign(math.inf, self.total) if self.total else -self.chance
        return self.total / self.stderr - self.chance


def expected_gain(matrix: InfluenceMatrix, weights: Array, prior: Array) -> Gain:
    """Predict what ``weights`` gain over ``prior``, both [m] in the matrix's order.

    Errors of different domains, and of different tasks' own batches, are independent. The batches of one domain are
    shared by all tasks: how far their errors agree is taken from the micro-batches where the matrix has a record of
    them, else they are taken to agree fully, which bounds the error. The task's own error, and that of a projection,
    is taken as independent from domain to domain, which overstates it where domains share it: what they share cancels
    in a change.
    """
    values, measured, tasks, _ = read_matrix(matrix)
    step = np.where(measured, weights - prior, 0.0)
    step[np.abs(step) <= TOLERANCE] = 0.0
    moved = np.flatnonzero(step)
    scale, _ = row_scale(values[:, measured], "max", tasks)
    of_domain, total = matrix.stderr_domain / scale[:, None], matrix.stderr / scale[:, None]
    rest = np.maximum(total**2 - of_domain**2, 0.0).sum(axis=0)
    joint = of_domain.sum(axis=0) ** 2
    if matrix.record is not None:
        joint *= [_joint_share(matrix.record, scale, j) for j in range(len(step))]
    return Gain(
        total=float((values @ step / scale).sum()),
        stderr=math.sqrt((step[moved] ** 2 * (joint + rest)[moved]).sum()),
        chance=math.sqrt(max(measured.sum() - 1, 0)),
    )


def _joint_share(record: MicrobatchRecord, scale: Array, domain: int) -> float:
    """Return the variance of a domain's scaled influence summed over tasks, over what it were if all errors agreed."""
    tokens, sums = record.of_domain(domain)
    if len(tokens) < 2:
        return 1.0
    scores = sums / scale[:, None]  # [n, k], tokens times influence
    residual = scores - scores.sum(axis=1, keepdims=True) / tokens.sum() * tokens
    joint = residual.sum(axis=0)
    largest = np.sqrt((residual**2).sum(axis=1)).sum()
    return float(joint @ joint / largest**2) if largest > 0 else 1.0
