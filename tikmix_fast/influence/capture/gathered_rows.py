"""Trace flat rows [N, C] back: are they the flattened batch, or gathered from it in another order?"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tikmix_fast.influence.capture.rows import RowLabels, RowShapeError
from tikmix_fast.influence.torch_private import input_shape, saved

__all__ = ["refuse_gathered_rows"]

_GATHERS = ("Index", "Gather", "Sort", "Flip", "Roll", "Rot90", "Scatter", "MaskedScatter", "MaskedSelect", "Take")
_PIECES = ("Cat", "Stack", "Slice", "Split", "Repeat", "Unfold")
_RESHAPES = ("View", "UnsafeView", "Reshape", "Unsqueeze", "Squeeze")
_PRODUCTS = ("Mm", "Addmm", "Bmm", "Baddbmm")
# Results of our rules for products, norms, look-ups and broadcasts, which checked their rows already.
_OURS = ("_FusedProduct", "_Tap", "_Spread")
_CHECKED = "tikmix_fast: rows in the order of the batch"


def refuse_gathered_rows(rows: Tensor, labels: RowLabels) -> None:
    """Refuse rows [N, C] of a mixed batch that are not the batch in its own order, by their autograd history.

    The shape alone does not distinguish the flattened batch from as many rows picked by an index (a mixture of
    experts), or [B * S] from [S * B]. So this follows the history over every operand with N rows, back to the first
    activation with the batch's own dimensions, or to the parameters. It trusts activations of three and more
    dimensions, and assumes that a custom autograd function keeps the order of its rows. Tensors without gradient have
    no history to follow.

    Raises
    ------
    RowShapeError
        If the rows were gathered, concatenated from pieces, or flattened from other dimensions than the batch's.
    """
    if labels.single is not None:
        return
    if rows.ndim > 2 and labels.length is None:
        labels.are_rows(rows.shape[:-1])  # the first activation [B, S, ...] sets S
    if rows.ndim != 2:
        return
    count = len(rows)
    visited: list[Any] = []
    nodes: list[Any] = [rows.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or _CHECKED in node.metadata:
            continue
        visited.append(node)
        kind = node.name().rstrip("0123456789").removesuffix("Backward")
        if kind in _OURS:
            continue
        sizes: Any = saved(node, "self_sym_sizes") or ()
        if kind in _RESHAPES and len(sizes) > 2 and sizes[0] != count:
            before = tuple(int(size) for size in sizes[:-1])
            labels.are_rows(before)
            labels.layout(before, rows.device)
            continue
        inputs = node.next_functions[:-1] if kind in _PRODUCTS else node.next_functions  # the last one is a weight
        operands = [(each, input_shape(each, index)) for each, index in inputs if each is not None]
        if (kind.startswith(_GATHERS) and _along_rows(node)) or (
            kind in _PIECES and any(shape[:1] != (count,) for _, shape in operands)
        ):
            raise RowShapeError(
                f"rows of shape [{count}] were gathered by an index or put together from pieces ({kind}), so they "
                "cannot be matched to the sequences of a batch that mixes domains: measure batches of one domain each, "
                "or exclude the parameters behind"
            )
        nodes += [each for each, shape in operands if shape[:1] == (count,)]
    # The next layer stops here, instead of following the residual stream to its beginning again.
    for node in visited:
        node.metadata[_CHECKED] = True


def _along_rows(node: Any) -> bool:
    """Whether an indexing operation moves rows, not only features."""
    indices = saved(node, "indices")
    if indices is not None:
        return len(indices) > 0 and indices[0] is not None
    dim = saved(node, "dim")
    dims = saved(node, "dims") or () if dim is None else (dim,)
    # Autograd stores negative dimensions as unsigned numbers.
    signed = [each - (1 << 64) if each >= 1 << 63 else each for each in dims]
    ndim = len(input_shape(node, 0))
    return not signed or 0 in [each % ndim for each in signed]
