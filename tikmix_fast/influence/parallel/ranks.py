"""Processes that measure one matrix together, each on its own batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tikmix_fast.influence.parallel.fully_sharded import mesh_group
from tikmix_fast.influence.torch_private import uncompiled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Ranks", "ranks_of"]

Array = NDArray[np.float64]


class Ranks:
    """The processes of a group; all of them must make the same calls in the same order.

    Parameters
    ----------
    group : ProcessGroup
    device : torch.device
        The device for exchanging small numbers: that of the parameters, which the group's backend supports.

    Attributes
    ----------
    index, size : int
        The rank of this process, and the number of processes.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self.index, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.index < 0:
            raise ValueError("process_group must be a group that this process belongs to")

    def add_up(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by its sum over all ranks, in place."""
        dist.all_reduce(tensor, group=self._group)

    def total(self, values: Array) -> Array:
        """Return the sum of ``values`` over all ranks."""
        sent = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)).to(self._device, copy=True)
        self.add_up(sent)
        return sent.cpu().numpy()

    def share_of_sum(self, tensor: Tensor) -> Tensor:
        """Return this rank's share of the sum of ``tensor`` over all ranks: an equal part of its elements, flat."""
        padded = self._padded(tensor)
        share = padded.new_empty(len(padded) // self.size)
        dist.reduce_scatter_tensor(share, padded, group=self._group)
        return share

    def share(self, tensor: Tensor) -> Tensor:
        """Return this rank's share of a tensor that is whole on every rank."""
        return self._padded(tensor).chunk(self.size)[self.index].clone()

    def join(self, share: Tensor, shape: torch.Size) -> Tensor:
        """Return the whole tensor, given this rank's share of it."""
        joined = share.new_empty(len(share) * self.size)
        dist.all_gather_into_tensor(joined, share, group=self._group)
        return joined[: shape.numel()].view(shape)

    def _padded(self, tensor: Tensor) -> Tensor:
        return F.pad(tensor.reshape(-1), (0, -tensor.numel() % self.size))

    def gather(self, rows: Array) -> list[Array]:
        """Return the ``rows`` [k, width] of every rank; k may differ between ranks."""
        counts = np.zeros(self.size)
        counts[self.index] = len(rows)
        counts = self.total(counts)
        mine = torch.zeros(int(counts.max()), rows.shape[1], dtype=torch.float64)
        mine[: len(rows)] = torch.from_numpy(rows)
        mine = mine.to(self._device)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        if mine.numel():
            dist.all_gather(parts, mine, group=self._group)
        return [part[: int(count)].cpu().numpy() for part, count in zip(parts, counts, strict=True)]


def ranks_of(model: nn.Module, group: ProcessGroup | Literal["auto"] | None, device: torch.device) -> Ranks | None:
    """Return the processes that measure together; None if this process measures alone.

    "auto" takes the group of DistributedDataParallel around the model, or of ``fully_shard``.

    Raises
    ------
    ValueError
        If ``group`` is another string, this process does not belong to it, or "auto" is ambiguous for a sharded model.
    """
    if isinstance(group, str):
        if group != "auto":
            raise ValueError(f'process_group must be a ProcessGroup, "auto" or None; got {group!r}')
        wrapper: Any = uncompiled(model)
        parallel = isinstance(wrapper, nn.parallel.DistributedDataParallel)
        group = wrapper.process_group if parallel else mesh_group(model)
    if group is None:
        return None
    ranks = Ranks(group, device)
    return ranks if ranks.size > 1 else None
