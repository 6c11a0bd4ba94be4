"""Report in one line which trainable parameters the influence covers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Coverage"]


@dataclass(frozen=True)
class Coverage:
    """The share of the trainable parameters that the influence covers.

    Attributes
    ----------
    captured, excluded, silent : dict of str to int
        Number of elements by parameter name. Captured: at least once. Excluded: by the user. Silent: trainable, but no
        gradient has reached it yet.

    Examples
    --------
    >>> print(Coverage({"head.weight": 90}, {"norm.weight": 10}, {}))
    influence covers 90.0% of 100 trainable elements (1 of 2 parameters); excluded: norm.weight
    """

    captured: dict[str, int]
    excluded: dict[str, int]
    silent: dict[str, int]

    @property
    def share(self) -> float:
        """Captured elements divided by trainable elements, 0 to 1."""
        return sum(self.captured.values()) / max(self._elements, 1)

    @property
    def _elements(self) -> int:
        return sum(sum(part.values()) for part in (self.captured, self.excluded, self.silent))

    def __str__(self) -> str:
        count = len(self.captured) + len(self.excluded) + len(self.silent)
        line = (
            f"influence covers {100 * self.share:.1f}% of {self._elements:,} trainable elements "
            f"({len(self.captured)} of {count} parameters)"
        )
        if self.excluded:
            line += f"; excluded: {', '.join(self.excluded)}"
        if self.silent:
            line += f"; no gradient seen: {', '.join(self.silent)}"
        return line
