"""A Mixtera algorithm that follows a mixture file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tikmix_fast import files
from tikmix_fast.data.exports.shares import check_names, checked_weights
from tikmix_fast.data.optional_packages import optional

__all__ = ["mixture_file_algorithm"]


def mixture_file_algorithm(path: str | os.PathLike[str], domains: Sequence[str]) -> Any:
    """Return a `DynamicMixingAlgorithm` for Mixtera's `DynamicMixture` that follows a mixture file.

    Mixtera's server runs the algorithm; the file carries the mixture there from the process that measures influence.
    Write it with ``tikmix-fast mix --out``, or with `tikmix_fast.files.write_json` and ``{name: weight}``.

    Parameters
    ----------
    path : path
        The file. Mixtera's initial mixture stays until it exists.
    domains : sequence of str
        The domain of each Mixtera key, in the order of the keys' ids, which is that of the sorted keys.

    Raises
    ------
    ImportError
        If Mixtera is not installed.
    ValueError
        If ``domains`` is empty or repeats a name. When Mixtera asks: if the file contains no mixture of these domains.

    Notes
    -----
    Source: ``mixtera/core/algo/dynamic_mixing/dynamic_mixing.py`` and ``mixtera/core/query/mixture/dynamic_mixture.py``
    in https://github.com/eth-easl/mixtera. The algorithm reads the file at every feedback of the training loop; it
    ignores the losses in the feedback.
    """
    base: Any = optional(
        "mixtera.core.algo.dynamic_mixing.dynamic_mixing", "following a mixture", "see github.com/eth-easl/mixtera"
    ).DynamicMixingAlgorithm
    names = list(domains)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"domains must have at least one name, and each once; got {names}")

    class MixtureFileAlgorithm(base):  # type: ignore[misc]  # defined here, as the base may be missing
        def __init__(self) -> None:
            super().__init__()
            self.path = Path(path)
            self.domains = names
            self.last: dict[str, float] | None = None

        def calc_mixture(self, updated_at_client: bool) -> Any:
            weights = read_mixture(self.path, self.domains)
            if weights is None or weights == self.last:
                return None
            self.last = weights
            mixture = np.zeros(max(len(self.domains), len(self.initial_mixture)), dtype=np.float32)
            mixture[: len(self.domains)] = [weights[name] for name in self.domains]
            return mixture

    return MixtureFileAlgorithm()


def read_mixture(path: Path, domains: Sequence[str]) -> dict[str, float] | None:
    """Read ``{name: weight}``, or a solver's result, which has ``weights``; None if there is no file."""
    try:
        content = files.read_json(path)
    except FileNotFoundError:
        return None
    if isinstance(content, Mapping) and isinstance(content.get("weights"), Mapping):
        content = content["weights"]
    with files.naming(path):
        weights = checked_weights(content)
        check_names("weights", weights, domains)
    return weights
