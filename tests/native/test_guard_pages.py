"""The native kernels touch nothing beside their arguments: each lies flush against pages that nobody may touch."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from random import Random

import pytest
import torch
from torch import Tensor

from tikmix_fast import ops
from tikmix_fast.ops.backends.cpu import exact, native

PROT_NONE = 0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def place(tensor: Tensor, *strides: int, side: str) -> Tensor:
    """Copy a tensor to memory that begins or ends where the process may neither read nor write."""
    strides = strides or tensor.contiguous().stride()
    count = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    page = mmap.PAGESIZE
    pages = -(-count * tensor.element_size() // page) * page
    memory = mmap.mmap(-1, pages + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for closed in (start, start + page + pages):
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(closed), ctypes.c_size_t(page), PROT_NONE) != 0:
            raise OSError("mprotect failed")
    offset = page if side == "begins" else page + pages - count * tensor.element_size()
    storage = torch.frombuffer(memory, dtype=tensor.dtype, count=count, offset=offset)
    return storage.as_strided(tensor.shape, strides).copy_(tensor)


def row_layouts(rows: int, columns: int) -> list[tuple[int, int]]:
    """Strides: contiguous, with a margin, transposed, every other column."""
    return [(columns, 1), (columns + 3, 1), (1, rows), (2 * columns + 1, 2)]


def plain(tensor: Tensor, *strides: int) -> Tensor:
    """Copy a tensor to ordinary memory; strides as in `place`."""
    return torch.empty_strided(tensor.shape, strides or tensor.contiguous().stride(), dtype=tensor.dtype).copy_(tensor)


def influence(
    instruction_set: str, put: Callable[..., Tensor], case: tuple[int, int, int], which: int
) -> tuple[Tensor, Tensor]:
    rows, height, width = case
    choice = Random(which).choice
    tasks, margin, packed, with_order = choice([1, 3, 5, 8]), *(choice([0, 1]) for _ in range(3))
    generator = torch.Generator().manual_seed(which)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DTYPES[which % 3])

    input = put(random(rows, width), *choice(row_layouts(rows, width)))
    grad_output = put(random(rows, height), *choice(row_layouts(rows, height)))
    total = put(torch.ones(height, width), *choice(row_layouts(height, width)))
    queries = put(random(tasks, height, width), height * (width + margin) + margin, width + margin, 1)
    offsets = put(torch.tensor([0, rows // 2, rows // 2, rows]))
    order = put(torch.randperm(rows, generator=generator)) if with_order else None
    values = put(torch.full((tasks, 3), torch.nan, dtype=torch.float64))
    read = exact.plain_argument(queries)
    if packed:
        shape, dtype = exact.packed_layout(instruction_set, queries)
        panels = put(torch.full(shape, torch.nan, dtype=dtype))
        native.module.pack_queries(
            instruction_set=instruction_set,
            threads=1,
            height=height,
            width=width,
            queries=read,
            panels=panels.data_ptr(),
        )
        read = exact.packed_argument(panels)
    native.module.group_influence(
        instruction_set=instruction_set,
        threads=1,
        sizes=(rows, height, width, 3),
        input=native.matrix_argument(input),
        grad_output=native.matrix_argument(grad_output),
        queries=read,
        offsets=offsets.data_ptr(),
        order=0 if order is None else order.data_ptr(),
        grad_weight=(total.data_ptr(), *total.stride()),
        values=values.data_ptr(),
    )
    return values, total


def check_influence(instruction_set: str, put: Callable[..., Tensor], case: tuple[int, int, int], which: int) -> None:
    expected = influence(instruction_set, plain, case, which)
    for fenced, right in zip(influence(instruction_set, put, case, which), expected, strict=True):
        assert right.isfinite().all()
        assert torch.equal(fenced, right)


def check_sketch(instruction_set: str, put: Callable[..., Tensor], case: tuple[int, int, int], which: int) -> None:
    rows, columns, dim = case
    numbers = torch.randint(-8, 9, (rows, columns)).to(DTYPES[which % 3])
    codes = ops.LayerProjection(1, columns, k_in=dim, seed=which).input_factor
    fenced = put(numbers, *row_layouts(rows, columns)[which % 4])
    output = put(torch.full((rows, dim), torch.nan))
    fenced_codes = put(codes)
    native.module.sketch_rows(
        instruction_set=instruction_set,
        threads=1,
        sizes=(rows, columns, dim),
        input=native.matrix_argument(fenced),
        codes=fenced_codes.data_ptr(),
        output=output.data_ptr(),
    )
    buckets = torch.where(codes < 0, ~codes, codes).long()
    signs = torch.where(codes < 0, -1.0, 1.0)
    assert torch.equal(output, torch.zeros(rows, dim).index_add_(1, buckets, numbers.float() * signs))


# What is checked, and sizes: tails of every vector and micro-tile, blocks of a sketch that are full or not.
CHECKS = (
    (check_influence, ((1, 2, 9, 70), (1, 5, 6, 7, 12, 13, 49), (1, 4, 7, 8, 16, 17, 32, 33, 65))),
    (check_sketch, ((1, 2, 5), (1, 15, 16, 33, 100, 1100, 2048), (16, 32, 64, 1024))),
)


def run(instruction_set: str) -> None:
    torch.set_num_threads(1)
    os.environ[native.INSTRUCTION_SET_VARIABLE] = instruction_set
    which = 0
    for check, sizes in CHECKS:
        for case, side, _ in itertools.product(itertools.product(*sizes), ("begins", "ends"), DTYPES):
            which += 1  # three in turn are every dtype
            print(f"{check.__name__}({case}, {which}) where memory {side} at a closed page", flush=True)
            check(instruction_set, partial(place, side=side), case, which)


def touch(access: str) -> None:
    """Do what no kernel may do."""
    how, where = access.split()
    fenced = place(torch.zeros(3, 5), side="begins" if where == "before" else "ends")
    address = fenced.data_ptr() + (-1 if where == "before" else fenced.numel() * fenced.element_size())
    if how == "read":
        ctypes.string_at(address, 1)
    else:
        ctypes.memset(address, 0, 1)


def in_a_process_of_its_own(*arguments: str) -> None:
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    last_call = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"{last_call} ended with {done.returncode}: {done.stderr}"


def test_nothing_beside_the_arguments_is_touched(instruction_set: str) -> None:
    in_a_process_of_its_own("run", instruction_set)


@pytest.mark.parametrize("access", ["read before", "read behind", "write before", "write behind"])
def test_a_kernel_that_did_would_be_seen(access: str) -> None:
    with pytest.raises(AssertionError, match=r"ended with -(11|10): "):
        in_a_process_of_its_own("touch", access)


if __name__ == "__main__":
    {"run": run, "touch": touch}[sys.argv[1]](sys.argv[2])
