"""Passes whose gradients were not finite."""

from __future__ import annotations

from typing import Any

from tikmix_fast.ops.common.device_checks import raise_on_device_errors

__all__ = ["DroppedPasses"]


class DroppedPasses:
    """Count the passes that a GradScaler explains, and raise for the others.

    Parameters
    ----------
    most_in_row : int
        So many in a row raise, as the scaler does not recover.

    Attributes
    ----------
    count : int
    """

    def __init__(self, most_in_row: int) -> None:
        self.count = 0
        self._most_in_row, self._in_row = most_in_row, 0

    def takes(self, finite: bool, what: str, scaler: Any) -> bool:
        """Whether the pass ``what`` is dropped.

        Raises
        ------
        FloatingPointError
            If it is not finite, and no scaler explains it or it is one too many in a row.
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
