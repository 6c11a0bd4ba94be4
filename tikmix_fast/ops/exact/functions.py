"""The public functions over the registered ops."""

from __future__ import annotations

from torch import Tensor

from tikmix_fast.ops.exact.packing import PackedQueries
from tikmix_fast.ops.exact.schema import group_influence_op

__all__ = ["group_influence"]


def group_influence(
    input: Tensor,
    grad_output: Tensor,
    offsets: Tensor,
    queries: Tensor | PackedQueries,
    *,
    order: Tensor | None = None,
    grad_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Take the inner products of every domain's weight gradient with the task gradients of one layer.

    Domain j's gradient of a linear layer is the sum of ``grad_output[t]^T input[t]`` over its rows. It is formed tile
    by tile and multiplied with the queries while the tile is in cache; no per-domain gradient is written to memory.

    Parameters
    ----------
    input : float32 | bfloat16 | float16 | float64 Tensor [T, I]
        What the layer read, one row per token, any strides.
    grad_output : float32 | bfloat16 | float16 | float64 Tensor [T, O]
        The gradient of the loss with respect to what the layer wrote.
    offsets : int64 Tensor [m + 1]
        Domain j owns the rows ``offsets[j]:offsets[j + 1]`` (of ``order``, if given). Starts at 0, ends at T, never
        decreases; a domain may be empty.
    queries : Tensor [n, O, I] or PackedQueries
        The preconditioned task gradients of this layer.
    order : int64 Tensor [T], optional
        Row permutation that sorts the rows by domain. The kernel reads rows through it, so nobody sorts ``input`` and
        ``grad_output``. Entries are checked to be row numbers; that none repeats is the caller's promise.
    grad_weight : float32 | bfloat16 Tensor [O, I], optional
        The gradient summed over all domains is added to it in the same pass. It must not share memory with any other
        argument. On a CPU it is added once per block of 1024 rows (2048 of bfloat16), so that begin with zeros where
        what is there already is far larger than what comes.
    backend : str, optional
        A key of `available_backends`; see `use_backend` for the order of choice.

    Returns
    -------
    float64 Tensor [n, m]
        ``<queries[i], sum over rows t of domain j of grad_output[t]^T input[t]>``; 0 for an empty domain. Positive
        where a step down the domain's gradient lowers the task's loss. A sum, not divided by the number of rows. A NaN
        or an infinity in a row reaches the column of its domain only, and may be NaN there.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or offset is wrong; ``grad_weight`` is untouched then.
    RuntimeError
        If a tensor requires grad while grad mode is on (the op has no derivative), or the backend asked for cannot run
        this call: the message lists every backend with its reason.

    Notes
    -----
    On a GPU nothing waits for the device, so that offsets and ``order`` there are not checked before: where they are
    wrong every value is NaN, and `raise_on_device_errors` raises (``engine.matrix()``
    calls it). A call that a CUDA graph captures must have run once before.

    Costs the weight gradient's ``2 T O I`` operations plus ``2 m n O I``; memory beyond the arguments does not grow
    with the number of domains, except for partial sums of the result's shape (up to 256, or 32 MiB of them). Where
    domains have a row or two and counting says that it costs less, the CPU measures row by row instead, which takes
    float64 [n, T] besides. Up to two workspaces of at most 64 MiB are kept between calls. Where inputs and queries are
    all bfloat16, the products are taken of gradients rounded to bfloat16, as torch would; otherwise they stay float32.

    Examples
    --------
    >>> import torch
    >>> from tikmix_fast import ops
    >>> input, grad_output = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [-1.0]])
    >>> offsets, queries = torch.tensor([0, 1, 2]), torch.ones(1, 1, 2)
    >>> ops.group_influence(input, grad_output, offsets, queries)
    tensor([[ 3., -7.]], dtype=torch.float64)
    """
    plain, panels = (queries.tensor, queries.panels) if isinstance(queries, PackedQueries) else (queries, None)
    values: Tensor = group_influence_op(input, grad_output, offsets, plain, panels, order, grad_weight, backend)
    return values
