"""The protocol of sinks, which take the rows and gradients of every use of a parameter."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from tikmix_fast.influence.capture.rows import RowLabels
from tikmix_fast.influence.capture.views import ParameterView

__all__ = ["OpenCapture", "Sink"]


class Sink(Protocol):
    """Take the readings of a capture while a backward runs.

    Attributes
    ----------
    labels : RowLabels
        The domain of every row of the batch.
    """

    labels: RowLabels

    def is_projected(self, view: ParameterView) -> bool:
        """Whether the view is a parameter that the sink measures through a projection."""

    def product(
        self, weight: ParameterView, rows: Tensor, gradient: Tensor, in_out: bool, total: Tensor | None = None
    ) -> None:
        """Take one product ``output = rows @ weight.T``, or ``rows @ weight`` with ``in_out``.

        Parameters
        ----------
        weight : ParameterView [O, I], or [I, O] with ``in_out``
        rows : Tensor [..., I]
        gradient : Tensor [..., O]
            The gradient of the output.
        in_out : bool
        total : Tensor of the weight's shape, optional
            The sink must add the weight gradient to it.
        """

    def spread(self, view: ParameterView, gradient: Tensor) -> None:
        """Take a view that was broadcast to the shape of ``gradient`` when it met the data."""

    def features(self, view: ParameterView, per_row: Tensor) -> Tensor:
        """Take a parameter with one value per feature: ``per_row`` [..., C] is its gradient by row.

        Returns the sum of ``per_row`` over all rows, [C].
        """

    def lookup(self, view: ParameterView, ids: Tensor, padding: int | None, gradient: Tensor) -> None:
        """Take an embedding looked up at ``ids`` [...], with the gradient [..., C] of the looked-up rows."""

    def close(self) -> None:
        """Stop, and release everything large: a graph that outlives the pass must not keep it alive."""


class OpenCapture(Protocol):
    """The part of a capture that rules use.

    Attributes
    ----------
    sink : Sink
    fused : bool
        Whether a linear layer's weight gradient comes from the sink's own pass.
    """

    fused: bool

    @property
    def sink(self) -> Sink: ...

    def handle(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
