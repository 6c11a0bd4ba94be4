"""The domain of each row of an activation, for activations of any shape."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tikmix_fast.influence.parallel.device_transfers import send

__all__ = ["Layout", "RowLabels", "RowShapeError"]


class RowShapeError(ValueError):
    """The rows of an activation do not match the domain ids of the batch."""


@dataclass(frozen=True)
class Layout:
    """The rows of one activation, sorted by domain.

    ``offsets`` int64 [m + 1] and ``order`` int64 [T] or None are arguments of `tikmix_fast.ops.group_influence`. In the
    activation's own order, every run of ``run`` rows has one domain: ``domains`` int64 [T / run].
    """

    offsets: Tensor
    order: Tensor | None
    run: int
    domains: Tensor

    def domain_of_rows(self) -> Tensor:
        """Return the domain of every row, int64 [T], in the activation's own order."""
        return self.domains.repeat_interleave(self.run)

    def sum_runs(self, rows: Tensor) -> Tensor:
        """Sum ``rows`` [T, C] over each run: [T / run, C], at least float32."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        if self.run == 1:
            return rows.to(wide)
        runs = rows.reshape(-1, self.run, rows.shape[-1])
        if rows.dtype == wide or rows.device.type != "cpu":
            return runs.sum(1, dtype=wide)
        # A CPU widens a few hundred rows at a time within its cache.
        return torch.cat([some.to(wide).sum(1) for some in runs.split(max(1, 256 // self.run))])

    def sum_domains(self, runs: Tensor) -> Tensor:
        """Sum the result of `sum_runs` over the runs of each domain: float64 [m, C]."""
        domains = len(self.offsets) - 1
        if runs.device.type == "cpu":
            return runs.new_zeros(domains, runs.shape[-1]).index_add_(0, self.domains, runs).double()
        # A product is reproducible; a GPU's atomic additions are not.
        member = torch.arange(domains, device=runs.device).unsqueeze(1) == self.domains
        return (member.to(runs.dtype) @ runs).double()


class RowLabels:
    """The domain of every sequence, or of every position, of one batch.

    Parameters
    ----------
    ids : int or int64 [B] or [B, S]
        One domain for the whole batch, one per sequence, or one per position.
    n_domains : int
    batch_dim : 0, 1 or None
        The batch dimension of activations: [B, S, ...] or [S, B, ...]. ``ids`` is [B, S] in both cases. None means 0,
        but refuses a batch with B = S.
    length : int, optional
        S if a mask gives it; otherwise the first activation [B, S, ...] does.

    Raises
    ------
    RowShapeError
        If the batch mixes domains, B = S, and ``batch_dim`` is None.
    """

    def __init__(
        self, ids: int | Tensor, n_domains: int, batch_dim: int | None = None, length: int | None = None
    ) -> None:
        self.n_domains = n_domains
        self.ids = ids.detach().cpu().long() if isinstance(ids, Tensor) else ids
        self._ids: NDArray[np.int64] | None = self.ids.numpy() if isinstance(self.ids, Tensor) else None
        # If the batch has one domain, every row belongs to it, whatever the shape of the activation.
        if isinstance(self.ids, Tensor) and self.ids.numel() and bool((self.ids == self.ids.flatten()[0]).all()):
            self.single: int | None = int(self.ids.flatten()[0])
        else:
            self.single = None if isinstance(self.ids, Tensor) else self.ids
        self.batch_dim = batch_dim or 0
        self._unambiguous = batch_dim is not None
        self.length: int | None = None
        self._layouts: dict[tuple[tuple[int, ...], torch.device], Layout] = {}
        if isinstance(self.ids, Tensor) and self.ids.ndim == 2:
            length = self.ids.shape[1]
        if length is not None:
            self._learn(length)

    @property
    def batch(self) -> int | None:
        """The number of sequences; None if the ids are one domain for the whole batch."""
        return self.ids.shape[0] if isinstance(self.ids, Tensor) else None

    def layout(self, leading: tuple[int, ...], device: torch.device) -> Layout:
        """Return the layout of an activation with these leading dimensions (all but the features).

        Raises
        ------
        RowShapeError
            If the leading dimensions are none of [B, S, ...], [B * S] and [B] (or [S, B, ...] with ``batch_dim=1``).
        """
        key = (tuple(leading), device)
        if key not in self._layouts:
            self._layouts[key] = self._make(tuple(leading), device)
        return self._layouts[key]

    def are_rows(self, leading: tuple[int, ...]) -> bool:
        """Whether leading dimensions are certainly rows of the batch; a table looked up once, for one, has none.

        Two dimensions are rows if they are [B, S]; the first such activation sets S. One dimension can be rows only
        once S is known: before that, [S] looks like [B] or [B * S].
        """
        if self.single is not None:
            return True
        batch = self.batch
        if len(leading) < 2:
            sizes = (
                () if self.length is None else ((batch or 0) * self.length, *((batch,) if self.length != batch else ()))
            )
            return len(leading) == 1 and leading[0] in sizes and self._fits(leading)
        if leading[self.batch_dim] != batch:
            return False
        if self.length is None:
            self._learn(leading[1 - self.batch_dim])
        return leading[1 - self.batch_dim] == self.length and self._fits(leading)

    def are_features(self, leading: tuple[int, ...]) -> bool:
        """Whether a layer's input without gradient is rows of the batch, not a constant.

        As `are_rows`, and also true for inputs [B, C] of a model without positions, and inputs [B, P, C] with another
        number of positions.
        """
        if self.single is not None or self.are_rows(leading):
            return True
        if len(leading) == 1:
            return self.length is None and leading[0] == self.batch
        return len(leading) > 1 and leading[self.batch_dim] == self.batch and self._fits(leading)

    def _learn(self, length: int) -> None:
        if self.single is None and length == self.batch and not self._unambiguous:
            raise RowShapeError(
                f"the batch has as many sequences as positions (B = S = {length}), so shapes do not tell them apart: "
                "make the engine with batch_dim=0 (activations are [B, S, ...]) or batch_dim=1 ([S, B, ...])"
            )
        self.length = length

    def _make(self, leading: tuple[int, ...], device: torch.device) -> Layout:
        if self.single is not None:
            offsets = np.zeros(self.n_domains + 1, dtype=np.int64)
            offsets[self.single + 1 :] = prod(leading)
            run = max(prod(leading), 1)
            domains = torch.full((prod(leading) // run,), self.single, device=device)
            return Layout(send(torch.from_numpy(offsets), device), None, run, domains)
        # Compute on the host, where the ids are, and send the result once per pass without waiting.
        rows = self._row_domains(leading)
        offsets = np.concatenate([[0], np.bincount(rows, minlength=self.n_domains).cumsum()])
        steps = np.diff(rows)
        order = None if (steps >= 0).all() else send(torch.from_numpy(np.argsort(rows, kind="stable")), device)
        run = max(gcd(len(rows), int(np.gcd.reduce(np.flatnonzero(steps) + 1))), 1)
        domains = send(torch.from_numpy(rows[::run].copy()), device)
        return Layout(send(torch.from_numpy(offsets), device), order, run, domains)

    def _fits(self, leading: tuple[int, ...]) -> bool:
        try:
            self._row_domains(tuple(leading))
        except RowShapeError:
            return False
        return True

    def _row_domains(self, leading: tuple[int, ...]) -> NDArray[np.int64]:
        """Return the domain of each row [T], rows in the order of the flattened leading dimensions."""
        ids = self._ids
        if ids is None:
            return np.full(prod(leading), self.ids)
        batch, length = ids.shape[0], self.length
        per_position = ids.ndim == 2
        if len(leading) == 1 and leading[0] != batch and length is not None and leading[0] == batch * length:
            # Flattened [B * S] (or [S * B]): unfold, label, and flatten again.
            leading = (batch, length) if self.batch_dim == 0 else (length, batch)
        if len(leading) == 1 and leading[0] == batch and not per_position:
            return ids
        if len(leading) > 1 and leading[self.batch_dim] == batch:
            labels = ids if per_position else ids[:, None]
            if not per_position or leading[1 - self.batch_dim] == length:
                labels = labels if self.batch_dim == 0 else labels.T
                labels = labels.reshape(labels.shape + (1,) * (len(leading) - 2))
                return np.broadcast_to(labels, leading).reshape(-1)
        shapes = "[B, S, ...], [B * S]" + ("" if per_position else " or [B]")
        raise RowShapeError(
            f"rows of shape {list(leading)} do not match the ids of shape {list(ids.shape)}: an activation's leading "
            f"dimensions must be {shapes if self.batch_dim == 0 else '[S, B, ...] or [S * B]'} with B = {batch}, "
            + (f"S = {length}" if length is not None else "S not known (a mask of shape [B, S] tells it)")
            + "; for activations with the batch in the second dimension use batch_dim=1; rows routed to experts or "
            "gathered are not supported in a batch that mixes domains"
        )
