"""Blend lists for Megatron-LM and NeMo."""

from __future__ import annotations

from collections.abc import Mapping

from tikmix_fast.data.exports.shares import check_names, decimals

__all__ = ["blend_list"]


def blend_list(weights: Mapping[str, float], prefixes: Mapping[str, str], digits: int = 6) -> list[str]:
    """Return weight, prefix, weight, prefix, ... for Megatron's ``--data-path`` or NeMo's ``data_prefix``.

    Parameters
    ----------
    weights : mapping from str to float
        Sum 1. The export leaves out domains of weight 0, as Megatron refuses them.
    prefixes : mapping from str to str
        Path of each domain's .bin and .idx, without suffix.
    digits : int
        Digits after the point. The decimals sum to 1; a positive weight becomes at least 10^-digits.

    Raises
    ------
    TypeError, ValueError
        If the weights are not a mixture, or ``prefixes`` names other domains.

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
