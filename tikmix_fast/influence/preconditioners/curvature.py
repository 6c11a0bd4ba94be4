"""Sinks that sum second moments of one batch: of rows, or of gradients in a basis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tikmix_fast.influence.capture.rows import RowLabels
from tikmix_fast.influence.capture.views import ParameterView

__all__ = ["Basis", "EigenvalueSink", "FactorSink", "Sides", "add_sides"]

# Columns of a second moment at a time: products this wide run at full speed.
_TOGETHER = 256

Sides = tuple[Tensor | None, Tensor | None]
"""A tensor for the rows [R, R] and one for the columns [C, C] of a weight [R, C]; None for a side that has none."""


def add_sides(sums: dict[str, Sides], name: str, more: Sides) -> None:
    """Add to the sums of a weight, in place; the first addition becomes the sum."""
    (rows, columns), (more_rows, more_columns) = sums.get(name, (None, None)), more
    sums[name] = (
        more_rows if rows is None or more_rows is None else rows.add_(more_rows),
        more_columns if columns is None or more_columns is None else columns.add_(more_columns),
    )


@dataclass(frozen=True)
class Basis:
    """Orthonormal bases of the two sides of a weight [R, C]: ``rows`` [R, R], ``columns`` [C, C]; None is the identity.

    Examples
    --------
    >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> Basis(swap, None).into(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[3., 4.],
            [1., 2.]])
    """

    rows: Tensor | None = None
    columns: Tensor | None = None

    def into(self, gradients: Tensor) -> Tensor:
        """Return rows^T g columns for gradients [..., R, C]."""
        if self.rows is not None:
            gradients = self.rows.to(gradients).mT @ gradients
        return gradients if self.columns is None else gradients @ self.columns.to(gradients)

    def back(self, gradients: Tensor) -> Tensor:
        """Return rows g columns^T, the inverse of `into`."""
        if self.rows is not None:
            gradients = self.rows.to(gradients) @ gradients
        return gradients if self.columns is None else gradients @ self.columns.to(gradients).mT


class _CurvatureSink:
    """A sink that counts the uses of parameters; subclasses read the products.

    Attributes
    ----------
    labels : RowLabels
    products : Counter of str
        How often each parameter was the weight of a product, untransformed.
    elsewhere : set of str
        The parameters that were also used in another way, or after a transformation.
    """

    def __init__(self, labels: RowLabels) -> None:
        self.labels = labels
        self.products: Counter[str] = Counter()
        self.elsewhere: set[str] = set()

    def is_projected(self, view: ParameterView) -> bool:
        return False

    def close(self) -> None:
        """Do nothing: no reference to the graph is left."""

    def product(
        self, weight: ParameterView, rows: Tensor, gradient: Tensor, in_out: bool, total: Tensor | None = None
    ) -> None:
        if not weight.is_parameter:
            self._note_use(weight)
            return
        name = weight.sources[0].name
        self.products[name] += 1
        wide = torch.promote_types(gradient.dtype, torch.float32)
        # Under autocast, the product itself read the rows in the dtype of its output.
        inputs = rows.reshape(-1, rows.shape[-1]).to(gradient.dtype).to(wide)
        outputs = gradient.reshape(-1, gradient.shape[-1]).to(wide)
        self._read(name, inputs, outputs, in_out, tuple(rows.shape[:-1]))

    def _read(self, name: str, inputs: Tensor, outputs: Tensor, in_out: bool, leading: tuple[int, ...]) -> None:
        raise NotImplementedError

    def spread(self, view: ParameterView, gradient: Tensor) -> None:
        self._note_use(view)

    def features(self, view: ParameterView, per_row: Tensor) -> Tensor:
        self._note_use(view)
        wide = torch.promote_types(per_row.dtype, torch.float32)
        return per_row.reshape(-1, per_row.shape[-1]).sum(0, dtype=wide)

    def lookup(self, view: ParameterView, ids: Tensor, padding: int | None, gradient: Tensor) -> None:
        self._note_use(view)

    def _note_use(self, view: ParameterView) -> None:
        self.elsewhere.update(source.name for source in view.sources)


class FactorSink(_CurvatureSink):
    """Sum the Kronecker factors of every product's weight [R, C].

    Parameters
    ----------
    labels : RowLabels
    max_side : int
        Longer sides get no factor.

    Attributes
    ----------
    factors : dict of str to Sides
        Sums over rows of x x^T for the product's input x and of d d^T for its output's gradient d, in the order of the
        weight's dimensions. Entries above the diagonal are undefined.
    """

    def __init__(self, labels: RowLabels, max_side: int) -> None:
        super().__init__(labels)
        self.max_side = max_side
        self.factors: dict[str, Sides] = {}

    def _read(self, name: str, inputs: Tensor, outputs: Tensor, in_out: bool, leading: tuple[int, ...]) -> None:
        # No loss depends on rows without gradient (padding), so their inputs must not count.
        inputs = inputs * (outputs != 0).any(1, keepdim=True)
        sides = (inputs, outputs) if in_out else (outputs, inputs)
        rows, columns = (_second_moment(each) if each.shape[1] <= self.max_side else None for each in sides)
        add_sides(self.factors, name, (rows, columns))


class EigenvalueSink(_CurvatureSink):
    """Sum the squares of every group's weight gradient, in the basis of the layer.

    Parameters
    ----------
    labels : RowLabels
        The groups: the sequences, or the whole batch.
    bases : mapping of str to Basis
        By the name of the weight; others have the identity.

    Attributes
    ----------
    squares : dict of str to Tensor [R, C]
    """

    def __init__(self, labels: RowLabels, bases: Mapping[str, Basis]) -> None:
        super().__init__(labels)
        self.bases = bases
        self.squares: dict[str, Tensor] = {}

    def _read(self, name: str, inputs: Tensor, outputs: Tensor, in_out: bool, leading: tuple[int, ...]) -> None:
        if self.products[name] > 1 or name in self.elsewhere:
            return  # these squares come from the whole batch's gradient, which adds up the uses
        layout = self.labels.layout(leading, inputs.device)
        left, right = (inputs, outputs) if in_out else (outputs, inputs)
        if layout.order is not None:
            left, right = left[layout.order], right[layout.order]
        basis = self.bases.get(name, Basis())
        rows, columns = left.shape[1], right.shape[1]
        row_side, column_side = basis.rows is not None, basis.columns is not None
        by_rows = len(left) * (row_side * rows**2 + column_side * columns**2)
        by_gradients = self.labels.n_domains * rows * columns * (row_side * rows + column_side * columns)
        if by_rows < by_gradients:
            left = left if basis.rows is None else left @ basis.rows.to(left)
            right = right if basis.columns is None else right @ basis.columns.to(right)
            basis = Basis()
        squares = left.new_zeros(rows, columns)
        for start, end in pairwise(layout.offsets.tolist()):
            gradient = basis.into(left[start:end].t() @ right[start:end])
            squares.addcmul_(gradient, gradient)
        self.squares[name] = squares


def _second_moment(rows: Tensor) -> Tensor:
    """Return rows^T rows [C, C], valid on and below the diagonal: half of the operations if C is large."""
    columns = rows.shape[1]
    moment = rows.new_zeros(columns, columns)
    for start in range(0, columns, _TOGETHER):
        end = start + _TOGETHER
        moment[start:, start:end] = rows[:, start:].t() @ rows[:, start:end]
    return moment
