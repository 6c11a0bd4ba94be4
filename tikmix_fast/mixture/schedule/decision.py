"""What was decided at one boundary of a schedule, with everything that it was decided on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tikmix_fast.mixture.result import plain_types
from tikmix_fast.mixture.schedule.gain import Gain
from tikmix_fast.mixture.schedule.stability import RankAgreement

Array = NDArray[np.float64]

__all__ = ["Decision"]


@dataclass(frozen=True, eq=False)
class Decision:
    """The mixture from one boundary on, and why.

    Attributes
    ----------
    stage : int
        The stage that begins; the warm-up is stage 0.
    step : int
        From which the mixture holds.
    weights : dict of str to float
        The mixture in use from here on; sums to 1.
    changed : bool
        Whether it differs from the one before.
    reason : str
        The decision in words.
    solved : dict of str to float
        What the solver proposed, taken or not.
    gain : Gain
        What that was predicted to gain over the mixture before.
    ranks : RankAgreement or None
        Agreement with the stage that was measured before this one; None for the first.
    skips_next : bool
        Whether the next boundary is passed over without measuring.
    fun : float
        The solver's objective at ``solved``.
    terms : dict of str to float
        Its terms, see `MixtureResult`.
    success : bool
    message : str
        What the solver said.
    warnings : tuple of str
        What it warned of.
    tasks : tuple of str
    influence : float64 [n, m]
        What was measured, domains in the order of ``weights``; NaN where a domain was not.
    reliability : float64 [n]
        What two such measurements would correlate by, see `SplitHalf.whole`; NaN where unknown.

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
            weights = np.array(list(getattr(self, name).values()), dtype=np.float64)
            if not ((weights >= 0).all() and abs(weights.sum() - 1.0) <= 1e-6):
                raise ValueError(f"{name} must be at least 0 and sum to 1; got {getattr(self, name)!r}")
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
        """Read what `to_dict` returned.

        Raises
        ------
        KeyError, TypeError, ValueError
            If a field is missing, of the wrong type, or wrong.
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
            ranks=None
            if ranks is None
            else RankAgreement(
                tuple(ranks["tasks"]),
                *(tuple(map(_number, ranks[name])) for name in ("spearman", "kendall", "ceiling")),
            ),
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


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _numbers(content: Mapping[str, float | None]) -> dict[str, float]:
    return {name: _number(value) for name, value in content.items()}
