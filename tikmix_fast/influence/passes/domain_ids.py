"""Turn the user's domain ids into labels of rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tikmix_fast.influence.capture.rows import RowLabels

__all__ = ["Ids", "index_of", "label_rows"]

Ids = str | int | Tensor | Sequence[str] | Sequence[int]


def index_of(kind: str, name: str, names: Sequence[str]) -> int:
    """Return the index of a name.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    if name not in names:
        raise ValueError(f"unknown {kind} {name!r}; the {kind}s are {', '.join(names)}")
    return names.index(name)


def label_rows(ids: Ids, mask: Tensor | int | None, domains: Sequence[str], batch_dim: int | None) -> RowLabels:
    """Return the labels of a batch; a mask [B, S] gives S.

    Raises
    ------
    TypeError
        If the ids are not of a type in `Ids`.
    ValueError
        If an id is unknown or out of range, or the shape is none of [B] and [B, S].
    """
    length = mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if isinstance(ids, str) or (isinstance(ids, int) and not isinstance(ids, bool)):
        return RowLabels(_domain(ids, domains), len(domains), batch_dim, length)
    if isinstance(ids, np.ndarray):
        ids = torch.as_tensor(ids)
    if isinstance(ids, Sequence):
        ids = torch.tensor([_domain(each, domains) for each in ids], dtype=torch.int64, device="cpu")
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids must be a domain's name or index, or an int tensor [B] or [B, S]; got {got}")
    ids = ids.cpu()
    if ids.ndim not in (1, 2) or not ids.numel():
        raise ValueError(f"ids must have shape [B] or [B, S] and not be empty; got {list(ids.shape)}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= len(domains):
        raise ValueError(f"ids must lie in 0 ... {len(domains) - 1}; got values from {low} to {high}")
    return RowLabels(ids, len(domains), batch_dim, length)


def _domain(domain: str | int, domains: Sequence[str]) -> int:
    if isinstance(domain, str):
        return index_of("domain", domain, domains)
    if not 0 <= domain < len(domains):
        raise ValueError(f"ids must lie in 0 ... {len(domains) - 1}; got {domain}")
    return int(domain)
