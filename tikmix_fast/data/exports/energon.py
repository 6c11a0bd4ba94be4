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
        Sum 1. The export leaves out domains of weight 0.
    paths : mapping from str to str
        Energon dataset of each domain, absolute or relative to the YAML file.
    split : str
        Name of the blended split; add others below it in the file.
    digits : int
        Digits after the point. The decimals sum to 1; a positive weight becomes at least 10^-digits.

    Raises
    ------
    TypeError, ValueError
        If the weights are not a mixture, or ``paths`` names other domains.

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
    """Return the YAML of a metadataset whose weights change at batches.

    Parameters
    ----------
    schedule : mapping from int to mapping from str to float
        New weights from each batch on; the first is batch 0.
    paths, split, digits
        As in `metadataset`. The export leaves out domains that never have a positive weight.

    Raises
    ------
    TypeError, ValueError
        If the weights are not mixtures of the same domains, the schedule does not begin at batch 0, or ``paths`` names
        other domains.

    Notes
    -----
    No release of Energon reads this format yet, including 7.4.1. It is that of the open pull request
    https://github.com/NVIDIA/Megatron-Energon/pull/208. For a release, write one `metadataset` per stage. The batches
    are those that the loader of a rank yields: micro-batches, if gradients are accumulated.

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
        # Every JSON string is a YAML string.
        lines += [f"      - weight:{weight}", f"        path: {json.dumps(path)}"]
    return "\n".join(lines) + "\n"
