"""Random projections of one layer: the draw of the two matrices, and their use."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from statistics import NormalDist
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["LayerProjection", "ProjectionKind", "factor_matrix", "is_sketch_dim"]

ProjectionKind = Literal["countsketch", "rademacher", "gaussian"]

_UINT64 = 1 << 64
# Rows that share a random generator: making one takes as long as drawing 2000 words.
_ROWS_PER_GENERATOR = 16
_NORMAL_BITS = 16
# The largest entry is 125. It fits int8 and is exact in bfloat16 and float16, so no backend rounds the matrix.
_NORMAL_STEPS = 29


@cache
def _normal_table() -> NDArray[np.int8]:
    """Tabulate the normal distribution: entry i is its quantile at ``(i + 1/2) / 2**16``, in 29ths, rounded.

    Every quantile is more than 1e-6 away from a rounding boundary, so the libm of every platform gives these integers.
    """
    half = 1 << (_NORMAL_BITS - 1)
    quantile = NormalDist().inv_cdf
    upper = [round(_NORMAL_STEPS * quantile(0.5 + (i + 0.5) / (2 * half))) for i in range(half)]
    return np.array([-entry for entry in reversed(upper)] + upper, np.int8)


@cache
def _entry_deviation(kind: ProjectionKind) -> float:
    """Return the standard deviation of an entry as it is drawn, before it is scaled."""
    return math.sqrt(np.square(_normal_table(), dtype=np.float64).mean()) if kind == "gaussian" else 1.0


def _random_words(seed: int, stream: int, side: int, rows: int, count: int) -> NDArray[np.uint64]:
    """Draw little-endian 64-bit words [rows, count], each a function of seed, stream, side, row and column alone."""
    key = np.array([seed, stream], np.uint64)
    groups = []
    for group in range(-(-rows // _ROWS_PER_GENERATOR)):
        generator = np.random.Philox(counter=np.array([0, group, side, 0], np.uint64), key=key)
        groups.append(generator.random_raw(_ROWS_PER_GENERATOR * count).reshape(count, _ROWS_PER_GENERATOR).T)
    return np.concatenate(groups)[:rows].astype("<u8", order="C", copy=False)


def _draw_factor(kind: ProjectionKind, seed: int, stream: int, side: int, dim: int, columns: int) -> Tensor:
    def bits(rows: int) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        words = _random_words(seed, stream, side, rows, -(-columns // 64))
        return words, np.unpackbits(words.view(np.uint8), axis=1, count=columns, bitorder="little")

    if kind == "countsketch":
        words, negative = bits(2)
        masks = words[1].view("<u2").astype(np.int32) & (dim - 1)
        column = np.arange(columns, dtype=np.int32)
        buckets = column % dim ^ masks[column // dim]
        return torch.from_numpy(np.where(negative[0], ~buckets, buckets))
    if kind == "rademacher":
        return torch.from_numpy(1 - 2 * bits(dim)[1].astype(np.int8))
    words = _random_words(seed, stream, side, dim, -(-columns // (64 // _NORMAL_BITS)))
    return torch.from_numpy(_normal_table()[words.view("<u2")[:, :columns]])


def is_sketch_dim(dim: int) -> bool:
    """Return whether a CountSketch can have this number of rows: a power of two from 16 to 1024."""
    return 16 <= dim <= 1024 and dim.bit_count() == 1


def factor_matrix(factor: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix of a factor, before it is scaled.

    Parameters
    ----------
    factor : Tensor
        int32 [D]: the codes of a CountSketch. A code is the row of the column's entry, or ``~row`` if the entry is -1.
        Any other dtype: the matrix [dim, D] itself.
    dim : int
    dtype : torch.dtype

    Returns
    -------
    Tensor [dim, D]

    Raises
    ------
    ValueError
        If a code is not a row of the matrix.
    """
    if factor.dtype != torch.int32:
        return factor.to(dtype)
    rows = torch.where(factor < 0, ~factor, factor).long()
    if rows.numel() and int(rows.max()) >= dim:
        raise ValueError(f"projection must send columns to rows 0 ... {dim - 1}; got row {int(rows.max())}")
    signs = 1 - 2 * (factor < 0).to(dtype)
    matrix = torch.zeros(dim, factor.shape[0], dtype=dtype, device=factor.device)
    return matrix.scatter_(0, rows[None], signs[None])


@dataclass(frozen=True)
class LayerProjection:
    """Two random matrices that shrink one layer's gradients: P_out [k_out, O] and P_in [k_in, I], ``E[P^T P] = I``.

    A gradient ``W`` [O, I] becomes ``P_out W P_in^T``. Inner products of projected gradients are right in expectation.
    Every entry is a function of (kind, seed, layer, side, row, column): the same bits on every machine and device.

    Attributes
    ----------
    height, width : int
        O and I of the layer.
    k_out, k_in : int
        Rows of the two matrices; at least 32 for `projection_stderr` to be stable.
    kind : {"countsketch", "rademacher", "gaussian"}
        ``countsketch``: every column has one entry, +-1. Two columns of a block of k columns never have it in the same
        row; columns of different blocks do with probability 1/k. The cheapest on a CPU; k must be a power of two from
        16 to 1024.
        ``rademacher``: entries +-1 / sqrt(k). ``gaussian``: a normal distribution of 229 values up to 4.31 standard
        deviations, with variance 1/k and kurtosis 2.9990 instead of 3.
    seed : int
        In ``0 ... 2**64 - 1``.
    layer : int or str
        A number in ``0 ... 2**64 - 1``, or a name, which is hashed to one. Two layers have independent errors only if
        their numbers differ.
    device : str
        The device of the drawn tensors, which must be that of the rows to project.
    scale : float
        The scale of ``P_out W P_in^T`` if both matrices are used as drawn. Computed, like the factors.
    output_factor, input_factor : Tensor
        The matrices as drawn: int32 codes [O] and [I] of a CountSketch, otherwise int8 [k_out, O] and [k_in, I]; see
        `tikmix_fast.ops.common.projection.factor_matrix`.

    Raises
    ------
    ValueError
        If a size, the kind, the seed or the layer is out of range.

    Notes
    -----
    The matrix of a larger layer begins with the columns of a smaller one. Except for the scale, a dense matrix with
    more rows begins with the rows of one with fewer. The bits are those of `numpy.random.Philox`, which every version
    of numpy draws alike.

    Examples
    --------
    >>> projection = LayerProjection(height=100, width=80, k_out=32, k_in=16, layer="blocks.0.mlp")
    >>> [tuple(matrix.shape) for matrix in projection.matrices()]
    [(32, 100), (16, 80)]
    """

    height: int
    width: int
    k_out: int = 64
    k_in: int = 64
    kind: ProjectionKind = "countsketch"
    seed: int = 0
    layer: int | str = 0
    device: str = "cpu"
    # Computed once: torch.compile takes tensors and numbers as arguments, but cannot trace a draw.
    scale: float = field(init=False, repr=False, compare=False)
    output_factor: Tensor = field(init=False, repr=False, compare=False)
    input_factor: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        kinds = get_args(ProjectionKind)
        if self.kind not in kinds:
            raise ValueError(f"kind must be one of {', '.join(kinds)}; got {self.kind!r}")
        for name in ("height", "width", "k_out", "k_in", "seed"):
            if not isinstance(getattr(self, name), int):
                raise TypeError(f"{name} must be an int; got {getattr(self, name)!r}")
        if not isinstance(self.layer, (int, str)):
            raise TypeError(f"layer must be an int or a name; got {self.layer!r}")
        for name in ("height", "width"):
            if not 0 <= getattr(self, name) < 1 << 31:
                raise ValueError(f"{name} must be in 0 ... 2**31 - 1; got {getattr(self, name)}")
        for name in ("k_out", "k_in"):
            dim = getattr(self, name)
            if not 1 <= dim < 1 << 31:
                raise ValueError(f"{name} must be in 1 ... 2**31 - 1; got {dim}")
            if self.kind == "countsketch" and not is_sketch_dim(dim):
                raise ValueError(
                    f"{name} must be a power of two from 16 to 1024 for a countsketch; got {dim}; "
                    "rademacher and gaussian take any"
                )
        if not 0 <= self.seed < _UINT64:
            raise ValueError(f"seed must be in 0 ... 2**64 - 1; got {self.seed}")
        if isinstance(self.layer, int) and not 0 <= self.layer < _UINT64:
            raise ValueError(f"layer must be a name or in 0 ... 2**64 - 1; got {self.layer}")
        for name, side, dim, columns in (
            ("output_factor", 0, self.k_out, self.height),
            ("input_factor", 1, self.k_in, self.width),
        ):
            factor = _draw_factor(self.kind, self.seed, self._stream, side, dim, columns)
            object.__setattr__(self, name, factor.to(self.device))
        object.__setattr__(self, "scale", self._scale(self.k_out) * self._scale(self.k_in))

    @property
    def _stream(self) -> int:
        if isinstance(self.layer, int):
            return self.layer
        return int.from_bytes(blake2b(self.layer.encode(), digest_size=8).digest(), "little")

    def _scale(self, dim: int) -> float:
        return 1.0 if self.kind == "countsketch" else 1 / (math.sqrt(dim) * _entry_deviation(self.kind))

    def matrices(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return both matrices, scaled.

        Parameters
        ----------
        dtype : torch.dtype
            The dtype of the result. Entries are computed in float64 and rounded once.

        Returns
        -------
        tuple of Tensor
            ``P_out`` [k_out, O] and ``P_in`` [k_in, I].

        Examples
        --------
        >>> LayerProjection(4, 6, k_out=2, k_in=4, kind="rademacher").matrices()[1].abs().unique()
        tensor([0.5000])
        """
        sides = ((self.output_factor, self.k_out), (self.input_factor, self.k_in))
        output, input = ((factor_matrix(factor, k, torch.float64) * self._scale(k)).to(dtype) for factor, k in sides)
        return output, input

    def project(self, gradients: Tensor) -> Tensor:
        """Project gradients of the layer, such as the task gradients that the op takes as queries.

        Parameters
        ----------
        gradients : float32 | bfloat16 | float16 | float64 Tensor [..., O, I]

        Returns
        -------
        float32 | float64 Tensor [..., k_out, k_in]
            ``P_out G P_in^T``, in float64 if the gradients are.

        Raises
        ------
        ValueError
            If the last two sizes are not O and I.

        Examples
        --------
        >>> import torch
        >>> LayerProjection(height=100, width=80).project(torch.zeros(3, 100, 80)).shape
        torch.Size([3, 64, 64])
        """
        if gradients.dim() < 2 or gradients.shape[-2:] != (self.height, self.width):
            raise ValueError(f"gradients must have shape (..., {self.height}, {self.width}); got {gradients.shape}")
        dtype = torch.promote_types(gradients.dtype, torch.float32)
        output, input = self.matrices(dtype)
        with torch.autocast(gradients.device.type, enabled=False):
            return output @ gradients.to(dtype) @ input.T
