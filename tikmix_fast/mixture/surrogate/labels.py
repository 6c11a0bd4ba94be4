"""Labels for mixtures without training: from an influence matrix, or from its recorded micro-batches."""

from __future__ import annotations

from typing import Any

import numpy as np

from tikmix_fast.arguments import require_int
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.mixture.inputs import Array, label, read_matrix, read_mixtures

__all__ = ["linear_labels", "resampled_labels"]


def linear_labels(matrix: InfluenceMatrix | Any, mixtures: Any) -> Array:
    """Return ``S @ w`` for every mixture, TiKMiX-D's own prediction. A surrogate of it adds nothing to TiKMiX-D.

    Parameters
    ----------
    matrix : InfluenceMatrix or array_like [n, m]
        The influence of an unmeasured domain (a column of NaN) counts as zero, as in `tikmix_d`.
    mixtures : array_like [N, m]

    Returns
    -------
    float64 [N, n]
        Positive lowers the task's loss.

    Examples
    --------
    >>> linear_labels([[2.0, 0.0]], [[0.5, 0.5], [1.0, 0.0]]).tolist()
    [[1.0], [2.0]]
    """
    values = read_matrix(matrix)[0]
    return read_mixtures("mixtures", mixtures, values.shape[1]) @ values.T


def resampled_labels(
    matrix: InfluenceMatrix, mixtures: Any, *, microbatches: int | None = None, seed: int = 0
) -> Array:
    """Return the influence of one mixed sample per mixture, drawn from recorded micro-batches.

    The weights of a mixture give the domains of its micro-batches; the micro-batches come with replacement from
    ``matrix.record``, so no gradient is computed. The labels scatter around `linear_labels` as new samples would. They
    contain no interaction of domains; only a training step shows that.

    Parameters
    ----------
    matrix : InfluenceMatrix
        With a record, in which every domain with weight in some mixture is measured.
    mixtures : array_like [N, m]
    microbatches : int, optional
        Micro-batches in a mixed sample; default the number of blocks in the record.
    seed : int

    Returns
    -------
    float64 [N, n]
        Positive lowers the task's loss.

    Raises
    ------
    ValueError
        If there is no record, or a domain with weight was never measured.
    TypeError
        If ``matrix`` is not an `InfluenceMatrix`.
    """
    if not isinstance(matrix, InfluenceMatrix):
        raise TypeError(f"matrix must be an InfluenceMatrix; got {type(matrix).__name__}, which has no micro-batches")
    if matrix.record is None:
        raise ValueError("matrix must have a record of its micro-batches, as engine.matrix() gives; got none")
    weights = read_mixtures("mixtures", mixtures, len(matrix.domains))
    blocks = [matrix.record.of_domain(j) for j in range(len(matrix.domains))]
    for j in np.flatnonzero((weights > 0).any(axis=0)):
        if not len(blocks[j][0]):
            raise ValueError(f"domain {label(matrix.domains, j)} has weight but was never measured; measure it")
    total = sum(len(tokens) for tokens, _ in blocks) if microbatches is None else microbatches
    total = require_int("microbatches", total, 1)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(total, weights)  # [N, m]
    labels = np.zeros((len(weights), len(matrix.tasks)))
    for j in np.flatnonzero(counts.any(axis=0)):
        tokens, sums = blocks[j]
        used = counts[:, j] > 0
        drawn = rng.multinomial(counts[used, j], np.full(len(tokens), 1 / len(tokens)))
        means = (drawn @ sums.T) / (drawn @ tokens)[:, None]
        labels[used] += counts[used, j, None] / total * means
    return labels
