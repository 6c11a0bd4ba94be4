"""Probabilities for `datasets.interleave_datasets`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tikmix_fast.data.exports.shares import check_names, checked_weights

__all__ = ["interleave_probabilities"]


def interleave_probabilities(weights: Mapping[str, float], names: Sequence[str]) -> list[float]:
    """Return the weights in the order of the arguments of `datasets.interleave_datasets`.

    Parameters
    ----------
    weights : mapping from str to float
        Sum 1; `MixtureResult.as_dict` gives it.
    names : sequence of str
        The domain of each dataset.

    Raises
    ------
    TypeError, ValueError
        If the weights are not a mixture, or ``names`` are other domains.

    Notes
    -----
    Source: https://huggingface.co/docs/datasets/process#interleave. The library draws the dataset of each example at
    random, so actual proportions have multinomial noise. By default it stops when the first dataset ends; set
    ``stopping_strategy="all_exhausted"`` to repeat datasets. `MixtureSampler` has neither problem.

    Examples
    --------
    >>> interleave_probabilities({"web": 0.7, "code": 0.3}, ["code", "web"])
    [0.3, 0.7]
    """
    shares = checked_weights(weights)
    check_names("names", names, shares)
    return [shares[name] for name in names]
