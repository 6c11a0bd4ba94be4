"""The tokens that each domain has left, as shares of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tikmix_fast.mixture.direct.problem import TOLERANCE
from tikmix_fast.mixture.direct.tilt import capped_tilt
from tikmix_fast.mixture.inputs import per_domain, read_number, read_prior

__all__ = ["Supply"]


class Supply:
    """How much of a run each domain can fill.

    Parameters
    ----------
    domains : tuple of str
    steps : int
        Length of the run.
    tokens, run_tokens, max_epochs
        ``supply``, ``run_tokens`` and ``max_epochs`` of `DynamicMixture`.

    Attributes
    ----------
    shares : float64 [m]
        Share of the run that each domain can fill; infinite without a limit.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of range, or the tokens do not last for the run.
    """

    def __init__(
        self, domains: tuple[str, ...], steps: int, tokens: Any, run_tokens: float | None, max_epochs: float
    ) -> None:
        if (tokens is None) != (run_tokens is None):
            raise ValueError("supply and run_tokens must be given together; got only one of them")
        epochs = read_number("max_epochs", max_epochs, positive=True)
        self._domains, self._steps = domains, steps
        self.shares = np.full(len(domains), np.inf)
        if tokens is None:
            return
        numbers = per_domain("supply", tokens, domains, len(domains))
        self.shares = epochs * numbers / read_number("run_tokens", run_tokens, positive=True)
        if self.shares.sum() < 1.0 - TOLERANCE:
            raise ValueError(
                f"supply must last for the run; got {self.shares.sum():.3g} of run_tokens at max_epochs={epochs:g}:"
                " raise max_epochs, or train on fewer tokens"
            )

    def first_mixture(self, warm_up: Any) -> dict[str, float]:
        """Return the warm-up mixture by domain, by default the most even one that the supply allows.

        Raises
        ------
        TypeError, ValueError
            If ``warm_up`` is not a mixture of the domains, or the supply does not last for it.
        """
        m, most = len(self._domains), np.minimum(self.shares, 1.0)
        if warm_up is None:
            weights, _ = capped_tilt(np.zeros(m), np.zeros(m), most)
            weights /= weights.sum()
        else:
            weights = read_prior(warm_up, self._domains, m, name="warm_up")
        beyond = np.flatnonzero(weights > most + TOLERANCE)
        if beyond.size:
            j = int(beyond[0])
            raise ValueError(
                f"warm_up must leave a supply to the end of the run; got {weights[j]:g} for domain"
                f" {self._domains[j]!r}, which lasts for {most[j]:g}; lower it, raise max_epochs, or leave warm_up out"
            )
        return dict(zip(self._domains, weights.tolist(), strict=True))

    def left(self, spans: Sequence[tuple[int, Mapping[str, float]]], step: int) -> dict[str, float]:
        """Return what each domain has left at ``step``, as a share of the run.

        ``spans`` are the mixtures used so far, each with its first step, from step 0 on.
        """
        used = np.zeros(len(self._domains))
        ends = [*(start for start, _ in spans[1:]), step]
        for (start, weights), end in zip(spans, ends, strict=True):
            used += np.array(list(weights.values())) * ((end - start) / self._steps)
        # The mixture in use lasts to the end by construction; rounding must not contradict that.
        needed = np.array(list(spans[-1][1].values())) * (1 - step / self._steps)
        return dict(zip(self._domains, np.maximum(self.shares - used, needed).tolist(), strict=True))
