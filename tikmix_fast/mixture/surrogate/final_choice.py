"""Choose between TiKMiX-D's mixture and TiKMiX-M's by new labels of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from tikmix_fast.mixture.inputs import Array
from tikmix_fast.mixture.result import MixtureResult

__all__ = ["choose_by_labels"]


def choose_by_labels(
    direct: MixtureResult,
    found: MixtureResult,
    labels_of: Callable[[Array], Any],
    *,
    scale: Any = 1.0,
    minimise: bool = False,
) -> MixtureResult:
    """Label TiKMiX-D's and TiKMiX-M's mixtures directly, and return the better one.

    A search favours mixtures that its model overrates. Labels from data that the model has not seen have no such bias.

    Parameters
    ----------
    direct, found : MixtureResult
        Results of `tikmix_d` and `tikmix_m`, over the same domains.
    labels_of : callable (mixtures [2, m]) -> array_like [2, n]
        Labels mixtures as the candidates were labelled, but on other data: for example
        ``lambda both: probe(...).labels``.
    scale : float or array_like [n]
        Divisor of each label before the sum, above 0.
    minimise : bool
        Whether smaller labels are better, as for losses.

    Returns
    -------
    MixtureResult
        ``found`` if the sum of its labels is better, else ``direct``; ``message`` says which, and by how much.

    Raises
    ------
    ValueError
        If the two are not over the same domains, the labels are not two rows of finite numbers, or ``scale`` is not
        above 0.

    Notes
    -----
    The cost is that of labelling two mixtures.

    Examples
    --------
    >>> from tikmix_fast import tikmix_d
    >>> direct = tikmix_d([[2.0, 1.0]], [0.5, 0.5])
    >>> chosen = choose_by_labels(direct, direct, lambda both: both @ [[2.0], [1.0]])
    >>> chosen.message.split(":")[0]
    'TiKMiX-M adds nothing'
    """
    if direct.domains != found.domains or direct.weights.shape != found.weights.shape:
        raise ValueError(f"found must be over the domains of direct, {direct.domains}; got {found.domains}")
    labels = np.asarray(labels_of(np.stack([direct.weights, found.weights])), dtype=np.float64)
    if labels.ndim != 2 or len(labels) != 2 or not np.isfinite(labels).all():
        raise ValueError(
            f"labels_of must return finite labels [2, n], one row for each mixture; got shape {labels.shape}: {labels}"
        )
    units = np.asarray(scale, dtype=np.float64)
    if units.shape not in ((), labels.shape[1:]) or not (np.isfinite(units) & (units > 0)).all():
        raise ValueError(f"scale must be a number above 0, or {labels.shape[1]} of them; got {scale!r}")
    before, after = (labels / units).sum(axis=1) * (-1 if minimise else 1)
    compared = f"labelled directly, its mixture scores {after:.4g} and TiKMiX-D's {before:.4g} (higher is better)"
    if after > before:
        return dataclasses.replace(found, message=f"{found.message}; TiKMiX-M adds something: {compared}")
    return dataclasses.replace(direct, message=f"TiKMiX-M adds nothing: {compared}; {direct.message}")
