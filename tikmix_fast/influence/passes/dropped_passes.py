"""Count the passes whose gradients are not finite."""

from __future__ import annotations

from typing import Any

from tikmix_fast.ops.common.device_checks import raise_on_device_errors

__all__ = ["DroppedPasses"]


class DroppedPasses:
    """Drop non-finite passes if a GradScaler explains them, and raise otherwise.

    Parameters
    ----------
    most_in_row : int
        So many drops in a row raise, because the scaler does not recover.

    Attributes
    ----------
    count : int
        The number of dropped passes.
    """

    def __init__(self, most_in_row: int) -> None:
        self.count = 0
        self._most_in_row, self._in_row = most_in_row, 0

    def drops(self, finite: bool, what: str, scaler: Any) -> bool:
        """Count the pass ``what`` and return True if it is not finite.

        Raises
        ------
        FloatingPointError
            If there is no scaler, or too many passes in a row were not finite.
        """
        if finite:
            self._in_row = 0
            return False
        raise_on_device_errors()
        if scaler is None:
            raise FloatingPointError(f"{what} gave gradients that are not finite; nothing of it was kept")
        self.count += 1
        self._in_row += 1
        if self._in_row >= self._most_in_row:
            raise FloatingPointError(
                f"{what} gave gradients that are not finite, {self._in_row} times in a row: the scaler does not recover"
            )
        return True
