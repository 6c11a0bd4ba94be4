"""The parts that both exact kernels share: checks of the rows, the product of a domain's rows, the last sum."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version
from triton.tools.tensor_descriptor import TensorDescriptor

from tikmix_fast.ops.backends.triton.configs import INTERPRETED, Tile, bucket, capability
from tikmix_fast.ops.common.checks import Arguments, check_order, domain_bounds
from tikmix_fast.ops.common.device_checks import device_offsets, error_flag

__all__ = [
    "TRITON_DTYPES",
    "Call",
    "Rows",
    "Strided",
    "accumulate_rows",
    "add_to",
    "check_on_host",
    "count_below",
    "descriptors",
    "dot_dtype",
    "finish",
    "is_describable",
    "partial_sums",
    "precision",
    "prepare",
    "sum_of_splits",
    "tile_options",
    "tile_origin",
]

# The most that partial sums of the result may take.
_PARTIAL_BYTES = 32 << 20

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Strided(NamedTuple):
    """A tensor as a kernel takes it; without data, a result that the caller does not want."""

    data: Tensor | None
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor | None) -> Strided:
        """Return a tensor [rows, columns], or None, with its strides."""
        return cls(tensor, (0, 0) if tensor is None else tensor.stride())


class Rows(NamedTuple):
    """The rows of a call as a kernel takes them: ``height`` is O and ``width`` is I."""

    input: Strided
    grad_output: Strided
    order: Tensor | None
    height: int
    width: int


class Call(NamedTuple):
    """One call with everything checked and on the device.

    Attributes
    ----------
    input, grad_output, queries
        As in `tikmix_fast.ops.group_influence`; bfloat16 becomes float32 in Triton's interpreter.
    offsets, order
        Contiguous, on the device.
    grad_weight : Tensor or None
        The kernels add the total to it.
    status : int32 Tensor [1]
        Not 0 where offsets or order are wrong: then the kernels read no row, and every value is NaN.
    """

    input: Tensor
    grad_output: Tensor
    offsets: Tensor
    queries: Tensor
    order: Tensor | None
    grad_weight: Tensor | None
    status: Tensor

    @property
    def domains(self) -> int:
        """How many domains there are, m."""
        return len(self.offsets) - 1

    def rows(self) -> Rows:
        """Return the rows as the kernels take them."""
        sizes = self.grad_output.shape[1], self.input.shape[1]
        return Rows(Strided.of(self.input), Strided.of(self.grad_output), self.order, *sizes)

    def with_own_total(self) -> Call:
        """Return the same call with a grad_weight of its own, for timing."""
        return self._replace(grad_weight=None if self.grad_weight is None else torch.zeros_like(self.grad_weight))

    def kind(self) -> tuple[object, ...]:
        """Return everything that the best configuration depends on."""
        dtypes = self.input.dtype, self.grad_output.dtype, self.queries.dtype, precision(dot_dtype(self))
        sizes = bucket(len(self.input)), bucket(self.domains), bucket(len(self.queries)), *self.queries.shape[1:]
        layout = self.input.stride(-1), self.grad_output.stride(-1), self.queries.stride(-1)
        return (*dtypes, *sizes, *(stride == 1 for stride in layout), self.order is None, self.grad_weight is None)


# Sizes that change from step to step are not specialized, so that nothing is compiled again for them.
@triton.jit(do_not_specialize=["rows", "domains"])
def _check_rows(
    offsets, order, status, flag, rows, domains, OFFSETS: tl.constexpr, ORDER: tl.constexpr, BLOCK: tl.constexpr
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    code = 0
    if OFFSETS:
        bound = tl.load(offsets + entry, mask=entry <= domains, other=0)
        following = tl.load(offsets + entry + 1, mask=entry < domains, other=0)
        wrong = (entry < domains) & (following < bound)
        wrong |= (entry == 0) & (bound != 0)
        wrong |= (entry == domains) & (bound != rows)
        code = tl.max(wrong.to(tl.int32))
    if ORDER:
        row = tl.load(order + entry, mask=entry < rows, other=0)
        wrong = (entry < rows) & ((row < 0) | (row >= rows))
        code += 2 * tl.max(wrong.to(tl.int32))
    if code != 0:
        tl.atomic_or(status, code)
        tl.atomic_or(flag, code)


@triton.jit
def count_below(bounds, domains, value):
    """Count the first ``domains`` entries of ``bounds`` that are less than ``value``."""
    count = 0
    for first in range(0, domains, 128):
        entry = first + tl.arange(0, 128)
        bound = tl.load(bounds + entry, mask=entry < domains, other=0)
        count += tl.sum(((entry < domains) & (bound < value)).to(tl.int32))
    return count


@triton.jit
def tile_origin(tile, height, width, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr):
    """Return where a tile begins. Tiles that run at the same time form a square, so they read the same columns."""
    across = tl.cdiv(width, BLOCK_I)
    group = tile // (GROUP * across)
    first = group * GROUP
    tall = tl.minimum(tl.cdiv(height, BLOCK_O) - first, GROUP)
    within = tile % (GROUP * across)
    return (first + within % tall) * BLOCK_O, (within // tall) * BLOCK_I


@triton.jit
def accumulate_rows(
    rows,
    input_tiles,
    grad_tiles,
    start,
    end,
    top,
    left,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the tile at ``[top, left]`` of ``grad_output[start:end].T @ input[start:end]`` in float32.

    Whole blocks of rows come through the tensor memory accelerator where there are descriptors. It cannot stop at
    ``end``, where the next domain begins, so the last rows of a domain are read through pointers.
    """
    sums = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    o = (top + tl.arange(0, BLOCK_O)).to(tl.int64)
    i = (left + tl.arange(0, BLOCK_I)).to(tl.int64)
    if input_tiles is not None:
        whole = start + (end - start) // BLOCK_T * BLOCK_T
        for t in range(start, whole, BLOCK_T):
            input_block = input_tiles.load([tl.cast(t, tl.int32), left])
            grad_block = grad_tiles.load([tl.cast(t, tl.int32), top])
            sums = tl.dot(tl.trans(grad_block), input_block, sums, input_precision=PRECISION)
        start = whole
    # The few rows that descriptors leave need no pipeline.
    for t in tl.range(start, end, BLOCK_T, num_stages=None if input_tiles is None else 1):
        row = tl.cast(t, tl.int64) + tl.arange(0, BLOCK_T)
        inside = row < end
        if rows.order is not None:
            row = tl.load(rows.order + row, mask=inside, other=0)
        input_block = tl.load(
            rows.input.data + row[:, None] * rows.input.strides[0] + i[None, :] * rows.input.strides[1],
            mask=inside[:, None] & (i < rows.width)[None, :],
            other=0.0,
        )
        grad_block = tl.load(
            rows.grad_output.data
            + o[:, None] * rows.grad_output.strides[1]
            + row[None, :] * rows.grad_output.strides[0],
            mask=(o < rows.height)[:, None] & inside[None, :],
            other=0.0,
        )
        if input_block.dtype != grad_block.dtype:
            input_block = input_block.to(tl.float32)
            grad_block = grad_block.to(tl.float32)
        sums = tl.dot(grad_block, input_block, sums, input_precision=PRECISION)
    return sums


@triton.jit
def sum_of_splits(totals, stride, splits, offset, inside, BLOCK: tl.constexpr):
    """Return ``sum(totals[split * stride + offset] for every split)``, in that order."""
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(totals + tl.cast(split, tl.int64) * stride + offset, mask=inside, other=0.0)
    return total


@triton.jit
def add_to(place, total, inside):
    """Add float32 numbers to what is at a place, and round once to its dtype."""
    before = tl.load(place, mask=inside, other=0.0)
    tl.store(place, (before.to(tl.float32) + total).to(before.dtype), mask=inside)


@triton.jit(do_not_specialize=["cells", "slots"])
def _sum_partials(partials, status, values, cells, slots, CELLS: tl.constexpr, SLOTS: tl.constexpr):
    cell = tl.program_id(0).to(tl.int64) * CELLS + tl.arange(0, CELLS)
    sums = tl.zeros([CELLS, SLOTS], tl.float64)
    for first in range(0, slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        inside = (cell < cells)[:, None] & (slot < slots)[None, :]
        sums += tl.load(partials + cell[:, None] * slots + slot[None, :], mask=inside, other=0.0).to(tl.float64)
    value = tl.sum(sums, axis=1)
    if tl.load(status) != 0:
        value += float("nan")
    tl.store(values + cell, value, mask=cell < cells)


def check_on_host(
    offsets: Tensor, order: Tensor | None, rows: int, device: torch.device, flag: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Check what the host may read, and return the offsets on the device, and the flag for what a kernel has to check.

    The flag is None if a kernel has nothing to check: without a GPU, if the caller gave none.
    """
    if flag is None and device.type == "cuda":
        return device_offsets(offsets, rows, device), error_flag(device)
    if flag is None:
        domain_bounds(offsets, rows)
        check_order(order, rows)
    return offsets, flag


def prepare(arguments: Arguments, flag: Tensor | None = None) -> Call:
    """Check the rows and bring the arguments to where the kernels read them.

    Parameters
    ----------
    arguments : Arguments
    flag : int32 Tensor [1], optional
        A kernel writes here if it finds wrong offsets or a wrong order; by default `error_flag` on a GPU. With a flag,
        a kernel checks CPU tensors too, as if they were on a GPU.

    Raises
    ------
    ValueError
        If offsets or order are wrong and the host may read them.
    """
    input, grad_output, offsets, queries, _, order, grad_weight = arguments
    rows, device = len(input), input.device
    status = torch.zeros(1, dtype=torch.int32, device=device)
    check_offsets = offsets.device == device
    offsets, flag = check_on_host(offsets, order, rows, device, flag)
    offsets = offsets.contiguous()
    order = None if order is None else order.contiguous()
    if flag is not None and (check_offsets or order is not None):
        entries = max(len(offsets) if check_offsets else 0, 0 if order is None else rows)
        _check_rows[(triton.cdiv(entries, 1024),)](
            offsets,
            order,
            status,
            flag,
            rows,
            len(offsets) - 1,
            OFFSETS=check_offsets,
            ORDER=order is not None,
            BLOCK=1024,
        )
    if INTERPRETED:  # whose arithmetic of bfloat16 is wrong
        input, grad_output, queries = (
            tensor.float() if tensor.dtype == torch.bfloat16 else tensor for tensor in (input, grad_output, queries)
        )
        grad_weight = grad_weight if grad_weight is None else grad_weight.float()
    return Call(input, grad_output, offsets, queries, order, grad_weight, status)


def partial_sums(call: Call, programs: int) -> Tensor:
    """Return zeros float32 [n, m, slots]: every program adds its part of the result to a slot of its own.

    There are fewer slots than programs only if they would take too much memory; then fewer programs must run.
    """
    tasks = len(call.queries)
    slots = max(min(programs, _PARTIAL_BYTES // (4 * max(tasks * call.domains, 1))), 1)
    return torch.zeros(tasks, call.domains, slots, dtype=torch.float32, device=call.input.device)


def finish(arguments: Arguments, call: Call, partials: Tensor) -> Tensor:
    """Sum the parts of the result in float64 in their order, and tell autograd that ``grad_weight`` has changed."""
    tasks, domains, slots = partials.shape
    values = torch.empty(tasks, domains, dtype=torch.float64, device=partials.device)
    if values.numel():
        grid = (triton.cdiv(values.numel(), 16),)
        _sum_partials[grid](partials, call.status, values, values.numel(), slots, CELLS=16, SLOTS=64)
    grad_weight = arguments.grad_weight
    if grad_weight is not None and call.grad_weight is grad_weight:
        increment_version(grad_weight)  # autograd did not see the write
    elif grad_weight is not None and call.grad_weight is not None:
        grad_weight.copy_(call.grad_weight)
    return values


def dot_dtype(call: Call) -> torch.dtype:
    """Return the dtype in which rows are multiplied: their own if both have the same, else float32."""
    dtype = call.input.dtype
    return dtype if call.grad_output.dtype == dtype else torch.float32


def precision(dtype: torch.dtype) -> str:
    """Return how float32 is multiplied: as in torch's own products, exactly unless TensorFloat-32 is allowed."""
    # The older switch, allow_tf32, sets this one too, and raises where both are in use.
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def tile_options(call: Call, tile: Tile) -> dict[str, Any]:
    """Return the options of a kernel that forms gradients tile by tile."""
    return {
        "BLOCK_T": tile.block_t,
        "BLOCK_O": tile.block_o,
        "BLOCK_I": tile.block_i,
        "PRECISION": precision(dot_dtype(call)),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def descriptors(call: Call, tile: Tile) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """Describe input and grad_output to the tensor memory accelerator, or return None if it cannot read them."""
    pair = call.input, call.grad_output
    if call.order is not None or not all(map(is_describable, pair)) or call.input.dtype != call.grad_output.dtype:
        return None, None
    blocks = [tile.block_t, tile.block_i], [tile.block_t, tile.block_o]
    first, second = (TensorDescriptor.from_tensor(tensor, block) for tensor, block in zip(pair, blocks, strict=True))
    return first, second


def is_describable(tensor: Tensor) -> bool:
    """Return whether the tensor memory accelerator exists and can read a tensor [..., rows, columns]."""
    if capability(tensor.device) < (9, 0):
        return False
    strides = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
    aligned = tensor.data_ptr() % 16 == 0 and all(stride % 16 == 0 and stride < 2**40 for stride in strides)
    plain = tensor.stride(-1) == 1 and tensor.numel() > 0 and max(tensor.shape) < 2**31
    return aligned and plain and tensor.stride(-2) >= tensor.shape[-1] and min(strides) > 0
