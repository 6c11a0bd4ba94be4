"""Blend lists for Megatron-LM and NeMo."""

from __future__ import annotations

from collections.abc import Mapping

from tikmix_fast.data.exports.shares import check_names, decimals

__all__ = ["blend_list"]


def blend_list(weights: Mapping[str, float], prefixes: Mapping[str, str], digits: int = 6) -> list[str]:
    """Return weight, prefix, weight, prefix, ... as Megatron's ``--data-path`` and NeMo's ``data_prefix`` take it.

    Parameters
    ----------
    weights : mapping from str to float
        Sum 1. Domains of weight 0 are left out, as Megatron refuses them.
    prefixes : mapping from str to str
        Path of each domain's .bin and .idx, without the ending.
    digits : int
        After the point. The decimals sum to 1; a smaller positive weight is raised to 10^-digits.

    Raises
    ------
    TypeError, ValueError
        If the weights are no mixture, or ``prefixes`` does not name their domains.

    Notes
    -----
    Source: ``get_blend_from_list`` in Megatron-LM, ``megatron/core/datasets/utils.py``, and the checks in
    ``blended_dataset.py`` beside it (megatron-core 0.16.1).

    Examples
    --------
    >>> print(*blend_list({"web": 0.75, "code": 0.25}, {"web": "/data/web", "code": "/data/code"}, digits=2))
    0.75 /data/web 0.25 /data/code
    """
    shares = decimals(weights, digits)
    check_names("prefixes", prefixes, shares)
    return [word for name, share in shares.items() if float(share) for word in (share, prefixes[name])]
