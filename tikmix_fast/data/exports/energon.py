"""Metadatasets for Megatron-Energon."""

from __future__ import annotations

import json
from collections.abc import Mapping

from tikmix_fast.data.exports.shares import check_names, decimals

__all__ = ["metadataset", "scheduled_metadataset"]


def metadataset(
    weights: Mapping[str, float], paths: Mapping[str, str], *, split: str = "train", digits: int = 6
) -> str:
    """Return the YAML of a metadataset that blends the domains.

    Parameters
    ----------
    weights : mapping from str to float
        Sum 1. Domains of weight 0 are left out.
    paths : mapping from str to str
        Energon dataset of each domain, absolute or relative to the file that the YAML goes into.
    split : str
        The split that is blended; add others below it.
    digits : int
        After the point. The decimals sum to 1; a smaller positive weight is raised to 10^-digits.

    Raises
    ------
    TypeError, ValueError
        If the weights are no mixture, or ``paths`` does not name their domains.

    Notes
    -----
    Source: https://nvidia.github.io/Megatron-Energon/basic/metadataset.html, release 7.4.1.

    Examples
    --------
    >>> print(metadataset({"web": 0.75, "code": 0.25}, {"web": "./web", "code": "./code"}, digits=2), end="")
    __module__: megatron.energon
    __class__: MetadatasetV2
    splits:
      train:
        blend:
          - weight: 0.75
            path: "./web"
          - weight: 0.25
            path: "./code"
    """
    shares = decimals(weights, digits)
    check_names("paths", paths, shares)
    return _yaml(split, {paths[name]: f" {share}" for name, share in shares.items() if float(share)})


def scheduled_metadataset(
    schedule: Mapping[int, Mapping[str, float]], paths: Mapping[str, str], *, split: str = "train", digits: int = 6
) -> str:
    """Return the YAML of a metadataset whose weights change at given batches.

    Parameters
    ----------
    schedule : mapping from int to mapping from str to float
        The weights that hold from each batch on; the first is batch 0.
    paths, split, digits
        As in `metadataset`. A domain that never has weight is left out.

    Raises
    ------
    TypeError, ValueError
        If the weights are no mixtures of the same domains, the schedule does not begin at batch 0, or ``paths`` does
        not name the domains.

    Notes
    -----
    No release of Energon reads this yet (7.4.1 does not): it is the format of the open pull request
    https://github.com/NVIDIA/Megatron-Energon/pull/208. With a release, write a `metadataset` per stage. A batch is one
    that the loader of a rank has yielded, which is a micro-batch where gradients are accumulated.

    Examples
    --------
    >>> stages = {0: {"web": 0.5, "code": 0.5}, 1500: {"web": 0.25, "code": 0.75}}
    >>> text = scheduled_metadataset(stages, {"web": "./web", "code": "./code"}, digits=2)
    >>> print(text[text.index("blend:") :], end="")
    blend:
          - weight:
              step:
                0: 0.50
                1500: 0.25
            path: "./web"
          - weight:
              step:
                0: 0.50
                1500: 0.75
            path: "./code"
    """
    batches = sorted(schedule)
    if not batches or batches[0] != 0:
        raise ValueError(f"schedule must begin at batch 0; got {batches}")
    shares = {batch: decimals(schedule[batch], digits) for batch in batches}
    for batch in batches:
        check_names("paths", paths, shares[batch])
    steps = {
        path: "\n          step:" + "".join(f"\n            {batch}: {shares[batch][name]}" for batch in batches)
        for name, path in paths.items()
        if any(float(shares[batch][name]) for batch in batches)
    }
    return _yaml(split, steps)


def _yaml(split: str, weights: Mapping[str, str]) -> str:
    lines = ["__module__: megatron.energon", "__class__: MetadatasetV2", "splits:", f"  {split}:", "    blend:"]
    for path, weight in weights.items():
        # A JSON string is a YAML one.
        lines += [f"      - weight:{weight}", f"        path: {json.dumps(path)}"]
    return "\n".join(lines) + "\n"
