"""The standard error of a projected influence, estimated from the projected gradients alone."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["projection_stderr"]


def projection_stderr(gradients: Tensor, queries: Tensor) -> Tensor:
    """Estimate the standard error that the projection adds to every cell of an influence matrix.

    Each of the ``k_out k_in`` products of entries, times their number, is an estimate of the cell; the cell is their
    mean. Their noise comes from the rows, the columns, and both together. A two-way analysis of variance separates the
    three.

    Parameters
    ----------
    gradients : Tensor [m, k_out, k_in]
        The domains' projected gradients: `projected_domain_gradients`, summed over the same calls as the influence.
    queries : Tensor [n, k_out, k_in]
        The task gradients under the same projection.

    Returns
    -------
    float64 Tensor [n, m]
        One standard error of ``<queries[i], gradients[j]>``, without the error of sampling data. Layers that were drawn
        apart have independent errors: add the squares.

    Raises
    ------
    ValueError
        If the shapes disagree, or k_out or k_in is less than 2.

    Notes
    -----
    Costs ``6 m n k_out k_in`` operations. Negative estimates of a variance count as 0. For the dense kinds, whose rows
    are independent, the squared error is right in expectation. For a countsketch it is too large: about 1.5 times the
    variance if O and I are 3 k, 1.2 times if they are 8 k.

    Examples
    --------
    >>> import torch
    >>> bool((projection_stderr(torch.ones(3, 4, 4), torch.ones(2, 4, 4)) == 0).all())
    True
    """
    if gradients.dim() != 3 or queries.dim() != 3 or gradients.shape[1:] != queries.shape[1:]:
        raise ValueError(
            "gradients and queries must have shapes (m, k_out, k_in) and (n, k_out, k_in); "
            f"got {tuple(gradients.shape)} and {tuple(queries.shape)}"
        )
    height, width = gradients.shape[1:]
    if height < 2 or width < 2:
        raise ValueError(f"k_out and k_in must be at least 2 to estimate an error; got {height} and {width}")
    w, g = gradients.double(), queries.double()
    # z = k_out k_in w g: means of its rows and columns, and the mean squares of rows, columns and the residual.
    rows = height * torch.einsum("moi,noi->nmo", w, g)
    columns = width * torch.einsum("moi,noi->nmi", w, g)
    mean = rows.mean(-1, keepdim=True)
    squares = (height * width) ** 2 * torch.einsum("moi,noi->nm", w.square(), g.square())
    of_rows = (rows - mean).square().sum(-1)
    of_columns = (columns - mean).square().sum(-1)
    rest = squares - width * of_rows - height * of_columns - height * width * mean[..., 0].square()
    rest = (rest / ((height - 1) * (width - 1))).clamp(min=0)
    row_variance = (of_rows / (height - 1) - rest / width).clamp(min=0)
    column_variance = (of_columns / (width - 1) - rest / height).clamp(min=0)
    return (row_variance / height + column_variance / width + rest / (height * width)).sqrt()
