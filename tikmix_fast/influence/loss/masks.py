"""The loss mask of models that shift their labels themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from tikmix_fast.influence.capture.rows import RowLabels

__all__ = ["check_mask", "shifted_mask"]


def shifted_mask(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Return where the logits enter the loss of a model that shifts its labels itself, as transformers' models do.

    Such a model compares the logits at position s with ``labels[:, s + 1]``, so position s carries loss where
    ``labels[:, s + 1] != ignore_index``, and the last position never does.

    Parameters
    ----------
    labels : int [B, S]
        The model's labels; padding and prompts are ``ignore_index``.
    ignore_index : int
        The label that the loss skips.

    Returns
    -------
    bool [B, S]
        For the ``mask`` of `InfluenceEngine.task` and `InfluenceEngine.domains`.

    Raises
    ------
    TypeError
        If ``labels`` is not an integer tensor.
    ValueError
        If it is not two-dimensional.

    Examples
    --------
    >>> import torch
    >>> shifted_mask(torch.tensor([[5, 6, 7, -100]]))
    tensor([[ True,  True, False, False]])
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be an integer tensor; got {getattr(labels, 'dtype', type(labels).__name__)}")
    if labels.ndim != 2:
        raise ValueError(f"labels must have shape [B, S]; got {tuple(labels.shape)}")
    mask = labels.new_zeros(labels.shape).bool()
    mask[:, :-1] = labels[:, 1:] != ignore_index
    return mask


def check_mask(mask: Tensor | int | None, labels: RowLabels) -> None:
    """Check a mask against the ids before the model runs.

    Raises
    ------
    TypeError
        If it is neither a bool tensor, an int, nor None.
    ValueError
        If its shape does not fit the ids, or it is a count and the batch has several domains.
    """
    if mask is None:
        return
    if isinstance(mask, int) and not isinstance(mask, bool):
        if mask < 0:
            raise ValueError(f"mask given as a number of target tokens must not be negative; got {mask}")
        if labels.batch is not None and labels.single is None:
            raise ValueError(
                "mask must be a bool tensor if a batch mixes domains: a count does not say whose tokens they are"
            )
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, True where the logits enter the loss, or an int count; got {got}")
    ids = labels.ids
    if isinstance(ids, Tensor):
        fits = mask.shape == ids.shape if ids.ndim == 2 else mask.ndim in (1, 2) and mask.shape[0] == ids.shape[0]
        if not fits:
            raise ValueError(
                f"mask must have shape [B, S] with the ids of shape {list(ids.shape)}; got {list(mask.shape)}"
            )
