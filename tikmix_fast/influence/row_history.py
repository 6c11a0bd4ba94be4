"""Where flat rows come from: [N, C] may be the batch flattened, or rows gathered from it in another order."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tikmix_fast.influence.rows import RowLabels, RowShapeError

__all__ = ["refuse_gathered_rows"]

_GATHERS = ("Index", "Gather", "MaskedSelect", "Take", "Sort")
_RESHAPES = ("View", "UnsafeView", "Reshape", "Unsqueeze", "Squeeze")
_KEEPS = ("ToCopy", "Clone", "Alias", "Detach")


def refuse_gathered_rows(rows: Tensor, labels: RowLabels) -> None:
    """Refuse rows [N, C] of a mixed batch whose autograd history says that they are not the batch in its own order.

    A shape alone cannot tell the flattened batch from as many rows picked by an index (a mixture of experts), nor [B *
    S] from [S * B].

    Raises
    ------
    RowShapeError
        If the rows were gathered, or flattened from dimensions that are not the batch's.
    """
    if labels.single is not None:
        return
    if rows.ndim > 2 and labels.length is None:
        labels.are_rows(rows.shape[:-1])  # the first activation [B, S, ...] tells S
    if rows.ndim != 2:
        return
    node: Any = rows.grad_fn
    while node is not None:
        kind = node.name().rstrip("0123456789")
        if kind.startswith(_GATHERS):
            raise RowShapeError(
                f"rows of shape {list(rows.shape[:-1])} were gathered by an index ({kind}), so they cannot be "
                "matched to the sequences of a batch that mixes domains: measure batches of one domain each, or "
                "exclude the parameters behind"
            )
        sizes = getattr(node, "_saved_self_sym_sizes", None)
        if kind.startswith(_RESHAPES) and sizes is not None and len(sizes) > 2:
            before = tuple(int(size) for size in sizes[:-1])
            labels.are_rows(before)
            labels.layout(before, rows.device)
            return
        if not kind.startswith((*_RESHAPES, *_KEEPS)) or not node.next_functions:
            return
        node = node.next_functions[0][0]
