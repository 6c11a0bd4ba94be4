"""The public function over the registered op."""

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

    Domain j's gradient of a linear layer is the sum of ``grad_output[t]^T input[t]`` over its rows. The kernel forms it
    tile by tile and multiplies a tile with the queries while it is in cache. No per-domain gradient is written to
    memory.

    Parameters
    ----------
    input : float32 | bfloat16 | float16 | float64 Tensor [T, I]
        The layer's input, one row per token, any strides.
    grad_output : float32 | bfloat16 | float16 | float64 Tensor [T, O]
        The gradient of the loss with respect to the layer's output.
    offsets : int64 Tensor [m + 1]
        Domain j owns the rows ``offsets[j]:offsets[j + 1]`` (of ``order``, if given). Starts at 0, ends at T, never
        decreases; a domain may be empty.
    queries : Tensor [n, O, I] or PackedQueries
        The preconditioned task gradients of this layer.
    order : int64 Tensor [T], optional
        Row permutation that sorts the rows by domain. The kernel reads rows through it, so nobody copies ``input`` and
        ``grad_output`` to sort them. The op checks that entries are row numbers; the caller promises that none repeats.
    grad_weight : float32 | bfloat16 Tensor [O, I], optional
        The op adds the gradient summed over all domains to it in the same pass. It must not share memory with any other
        argument. On a CPU the op adds once per block of 1024 rows (2048 of bfloat16): if its contents are much larger
        than this call's contribution, start from zeros.
    backend : str, optional
        A key of `available_backends`; see `use_backend` for the order of choice.

    Returns
    -------
    float64 Tensor [n, m]
        ``<queries[i], sum over rows t of domain j of grad_output[t]^T input[t]>``; 0 for an empty domain. Positive
        where a step down the domain's gradient lowers the task's loss. A sum, not divided by the number of rows. A NaN
        or an infinity in a row reaches only the column of its domain; an infinity may become NaN there.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or offset is wrong. Then ``grad_weight`` is unchanged.
    RuntimeError
        If a tensor requires grad while grad mode is on (the op has no derivative), or the requested backend cannot run
        this call: the message lists every backend with its reason.

    Notes
    -----
    On a GPU the op never waits for the device, so it does not check offsets and ``order`` there before it runs. If they
    are wrong, every value is NaN, and the next `raise_on_device_errors` raises (``engine.matrix()`` calls it). Run a
    call once before a CUDA graph captures it.

    The op costs the ``2 T O I`` operations of the weight gradient plus ``2 m n O I``. Its memory does not grow with the
    number of domains, except for partial sums of the result's shape (up to 256 of them, or 32 MiB). If domains have a
    row or two and it costs less by counting, the CPU measures row by row, which takes float64 [n, T] more memory. Up to
    two workspaces of at most 64 MiB stay allocated between calls. If inputs and queries are all bfloat16, gradients may
    be rounded to bfloat16 before they meet the queries, as in torch; otherwise they stay float32.

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
