"""The decision at one boundary of a schedule, with all its grounds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tikmix_fast.mixture.inputs import Array
from tikmix_fast.mixture.result import plain_types
from tikmix_fast.mixture.schedule.gain import Gain
from tikmix_fast.mixture.schedule.rank_agreement import RankAgreement
from tikmix_fast.simplex import require_mixtures

__all__ = ["Decision", "check_history"]


@dataclass(frozen=True, eq=False)
class Decision:
    """The mixture from one boundary on, and why.

    Attributes
    ----------
    stage : int
        The stage that begins; the warm-up is stage 0.
    step : int
        The first step with the mixture.
    weights : dict of str to float
        The mixture from here on; sums to 1.
    changed : bool
        Whether it is a new mixture.
    reason : str
        The decision in words.
    solved : dict of str to float
        The solver's proposal, accepted or not.
    gain : Gain
        The proposal's predicted gain over the mixture before.
    ranks : RankAgreement or None
        Agreement with the previous measurement; None for the first.
    skips_next : bool
        Whether the schedule skips the next boundary without a measurement.
    fun : float
        The solver's objective at ``solved``.
    terms : dict of str to float
        Its terms, see `MixtureResult`.
    success : bool
    message : str
    warnings : tuple of str
        The solver's own.
    tasks : tuple of str
    influence : float64 [n, m]
        The measurement, with domains in the order of ``weights``; NaN for unmeasured domains.
    reliability : float64 [n]
        The predicted correlation of two such measurements, see `SplitHalf.whole`; NaN where unknown.

    Raises
    ------
    ValueError
        If the weights are no mixtures, or shapes disagree.
    """

    stage: int
    step: int
    weights: dict[str, float]
    changed: bool
    reason: str
    solved: dict[str, float]
    gain: Gain
    ranks: RankAgreement | None
    skips_next: bool
    fun: float
    terms: dict[str, float]
    success: bool
    message: str
    warnings: tuple[str, ...]
    tasks: tuple[str, ...]
    influence: Array
    reliability: Array

    def __post_init__(self) -> None:
        for name in ("weights", "solved"):
            require_mixtures(name, np.array(list(getattr(self, name).values()), dtype=np.float64), 1e-6)
        if list(self.solved) != list(self.weights):
            raise ValueError(f"solved must have the domains of weights; got {list(self.solved)}")
        cells = (len(self.tasks), len(self.weights))
        for name, shape in (("influence", cells), ("reliability", cells[:1])):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must have shape {shape}; got {getattr(self, name).shape}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; an unknown number becomes None."""
        content: dict[str, Any] = plain_types(asdict(self))
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Decision:
        """Read the output of `to_dict`.

        Raises
        ------
        KeyError, TypeError, ValueError
            If a field is missing, has the wrong type, or is wrong.
        """
        ranks = content["ranks"]
        return cls(
            stage=int(content["stage"]),
            step=int(content["step"]),
            weights=_numbers(content["weights"]),
            changed=bool(content["changed"]),
            reason=str(content["reason"]),
            solved=_numbers(content["solved"]),
            gain=Gain(**_numbers(content["gain"])),
            ranks=None if ranks is None else _read_ranks(ranks),
            skips_next=bool(content["skips_next"]),
            fun=_number(content["fun"]),
            terms=_numbers(content["terms"]),
            success=bool(content["success"]),
            message=str(content["message"]),
            warnings=tuple(content["warnings"]),
            tasks=tuple(content["tasks"]),
            influence=np.array(content["influence"], dtype=np.float64),  # None becomes NaN
            reliability=np.array(content["reliability"], dtype=np.float64),
        )


def check_history(
    history: Sequence[Decision],
    domains: tuple[str, ...],
    steps: int,
    boundaries: Sequence[int],
    weights: Mapping[str, float],
) -> None:
    """Raise ValueError unless the decisions fit the schedule and each other; ``weights`` is the warm-up mixture."""
    stage = 0
    for each in history:
        if tuple(each.weights) != domains:
            raise ValueError(f"history of the state must have the schedule's domains; got {list(each.weights)}")
        if not (each.step < steps and stage < each.stage == bisect_right(boundaries, each.step)):
            raise ValueError(
                f"history of the state must be at rising boundaries; got step {each.step}, stage {each.stage}"
            )
        if each.weights != (each.solved if each.changed else weights):
            raise ValueError(f"weights of the state must follow from its decisions; got others at step {each.step}")
        weights, stage = each.weights, each.stage


def _read_ranks(content: Mapping[str, Any]) -> RankAgreement:
    numbers = (tuple(map(_number, content[name])) for name in ("spearman", "kendall", "ceiling"))
    return RankAgreement(tuple(content["tasks"]), *numbers)


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _numbers(content: Mapping[str, float | None]) -> dict[str, float]:
    return {name: _number(value) for name, value in content.items()}
