"""Proportions for MosaicML Streaming."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tikmix_fast.data.exports.shares import check_names, checked_weights

__all__ = ["stream_arguments"]


def stream_arguments(
    weights: Mapping[str, float], streams: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return the keyword arguments of `streaming.Stream` for each domain.

    Parameters
    ----------
    weights : mapping from str to float
        Sum 1.
    streams : mapping from str to mapping
        Other arguments of each domain's stream: ``remote``, ``local``, ``split``, ...

    Raises
    ------
    TypeError, ValueError
        If the weights are not a mixture, ``streams`` names other domains, or a stream has its own ``proportion``,
        ``repeat`` or ``choose``.

    Notes
    -----
    Either all streams of a dataset have a ``proportion``, or none. Source:
    https://docs.mosaicml.com/projects/streaming/en/stable/dataset_configuration/mixing_data_sources.html.

    Examples
    --------
    >>> arguments = stream_arguments({"web": 0.7, "code": 0.3}, {"web": {"local": "/web"}, "code": {"local": "/code"}})
    >>> arguments["code"]  # StreamingDataset(streams=[Stream(**each) for each in arguments.values()])
    {'local': '/code', 'proportion': 0.3}
    """
    shares = checked_weights(weights)
    check_names("streams", streams, shares)
    for name, arguments in streams.items():
        if conflicts := {"proportion", "repeat", "choose"} & set(arguments):
            raise ValueError(f"streams[{name!r}] must leave the share to weights; got {', '.join(sorted(conflicts))}")
    return {name: {**streams[name], "proportion": share} for name, share in shares.items()}
