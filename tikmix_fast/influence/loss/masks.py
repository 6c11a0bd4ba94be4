"""The loss mask of models that shift their labels themselves."""

from __future__ import annotations

from torch import Tensor

__all__ = ["shifted_mask"]


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
