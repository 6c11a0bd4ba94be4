"""Layouts and schedules of the CUDA kernels cover each thing once, and inverses are inverses."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

INT64 = np.iinfo(np.int64)
quick = settings(max_examples=100, deadline=None)


@pytest.fixture(scope="module")
def layouts(build_module) -> ModuleType:
    return build_module("layouts", ["layouts.cpp"])


def filled(function: Any, *arguments: Any, shape: tuple[int, ...]) -> np.ndarray:
    """What a function of the module writes into an array of this shape."""
    out = np.full(shape, INT64.min)
    function(*arguments, out.ctypes.data)
    return out


def is_bijection(pairs: np.ndarray, *sizes: int) -> bool:
    """Whether each (i, j, ...) below the sizes occurs exactly once."""
    pairs = pairs.reshape(-1, len(sizes))
    if not ((pairs >= 0) & (pairs < sizes)).all():
        return False
    counts = np.bincount(np.ravel_multi_index(tuple(pairs.T), sizes), minlength=int(np.prod(sizes)))
    return bool((counts == 1).all())


SHAPES = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.sampled_from((16, 32, 64)), st.sampled_from((8, 16, 24, 32, 256))
).map(lambda s: (s[0] * s[2], s[1] * s[3], s[2], s[3]))
# How many registers a lane loads at a time: 16 bytes of float32 or of 16-bit numbers. A block of 16 x 8 has four.
PER_LOAD = st.sampled_from((4, 8))


@quick
@given(shape=SHAPES)
def test_registers_cover_the_tile_once(layouts: ModuleType, shape: tuple[int, ...]) -> None:
    tile = layouts.TileShape(*shape)
    rows, columns, warp_rows, warp_columns = shape
    assert tile.warps == rows // warp_rows * (columns // warp_columns)
    assert tile.elements == rows * columns == tile.warps * 32 * tile.registers
    assert is_bijection(filled(layouts.places, tile, shape=(tile.warps, 32, tile.registers, 2)), rows, columns)


def test_registers_lie_where_the_instructions_leave_them(layouts: ModuleType) -> None:
    """Against the tables of the PTX ISA, written down for each instruction by itself."""
    lane = np.arange(32)[:, None]
    group, in_group = lane // 4, lane % 4

    # Each warp of mma has products of 16 x 8, row by row, whose registers are c0 ... c3.
    tile = layouts.TILE_MMA
    product, i = np.divmod(np.arange(tile.registers)[None, :], 4)
    across = tile.warp_columns // 8
    row = group + np.where(i >= 2, 8, 0)
    column = in_group * 2 + (i & 1)
    found = filled(layouts.places, tile, shape=(tile.warps, 32, tile.registers, 2))
    for warp in range(tile.warps):
        down, right = divmod(warp, tile.columns // tile.warp_columns)
        assert (found[warp, ..., 0] == down * tile.warp_rows + product // across * 16 + row).all()
        assert (found[warp, ..., 1] == right * tile.warp_columns + product % across * 8 + column).all()

    # Two warpgroups of wgmma.m64n256k16, one below the other; d0 ... d127, a warp of a group has 16 rows.
    tile = layouts.TILE_WGMMA
    assert (tile.rows, tile.columns, tile.warps, tile.registers) == (128, 256, 8, 128)
    d = np.arange(128)[None, :]
    row = group + np.where(d % 4 >= 2, 8, 0)
    column = d // 4 * 8 + in_group * 2 + (d & 1)
    found = filled(layouts.places, tile, shape=(8, 32, 128, 2))
    for warp in range(8):
        assert (found[warp, ..., 0] == warp // 4 * 64 + warp % 4 * 16 + row).all()
        assert (found[warp, ..., 1] == column).all()


@quick
@given(
    shape=st.one_of(SHAPES, st.sampled_from(((128, 128, 64, 32), (128, 128, 64, 64), (128, 256, 16, 256)))),
    per_load=PER_LOAD,
    tasks=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_packing_and_its_inverse(
    layouts: ModuleType, shape: tuple[int, ...], per_load: int, tasks: int, grid: tuple[int, int]
) -> None:
    tile = layouts.TileShape(*shape)
    if tile.registers % per_load:
        per_load = 4
    tiles = grid[0] * grid[1]
    total = tiles * tasks * tile.elements
    elements = filled(layouts.packed_elements, tile, per_load, tasks, grid[1], 0, total, shape=(total, 3))
    assert is_bijection(elements, tasks, grid[0] * tile.rows, grid[1] * tile.columns)

    # A lane finds its own registers at the position that it computes.
    loads = tile.registers // per_load
    places = filled(layouts.places, tile, shape=(tile.warps, 32, loads, per_load, 2)).transpose(0, 2, 1, 3, 4)
    positions = filled(
        layouts.packed_positions, tile, per_load, tasks, tiles, shape=(tiles, tasks, tile.warps, loads, 32)
    )
    assert is_bijection(positions[..., None] + np.arange(per_load), total)
    found = elements[positions[..., None] + np.arange(per_load)]
    assert (found[..., 0] == np.arange(tasks)[:, None, None, None, None]).all()
    for number in range(tiles):
        origin = np.array(divmod(number, grid[1])) * (tile.rows, tile.columns)
        assert (found[number, ..., 1:] == places + origin).all()


@quick
@given(shape=st.sampled_from(("TILE_MMA", "TILE_WGMMA")), per_load=PER_LOAD, far=st.integers(2**31, 2**45))
def test_packing_goes_beyond_32_bits(layouts: ModuleType, shape: str, per_load: int, far: int) -> None:
    tile, tasks, tile_columns = getattr(layouts, shape), 20, 500
    (element,) = filled(layouts.packed_elements, tile, per_load, tasks, tile_columns, far, far + 1, shape=(1, 3))
    number, rest = divmod(far // tile.elements, tasks)
    assert element[0] == rest
    assert element[1] // tile.rows == number // tile_columns
    assert element[2] // tile.columns == number % tile_columns


@quick
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), band=st.integers(1, 50))
def test_every_tile_has_a_number(layouts: ModuleType, rows: int, columns: int, band: int) -> None:
    tiles = filled(layouts.tiles, rows, columns, band, shape=(rows * columns, 2))
    assert is_bijection(tiles, rows, columns)
    # Bands come one after the other, and within one the columns.
    assert (np.diff(tiles[:, 0] // band * columns + tiles[:, 1]) >= 0).all()


@quick
@given(tiles=st.integers(1, 100), splits=st.integers(1, 20))
def test_every_item_is_a_tile_and_a_split(layouts: ModuleType, tiles: int, splits: int) -> None:
    items = filled(layouts.items, tiles, splits, shape=(tiles * splits, 2))
    assert is_bijection(items, tiles, splits)
    assert (np.diff(items[:, 1]) >= 0).all()


@quick
@given(
    rows=st.one_of(st.integers(0, 3000), st.integers(0, 2**40)),
    splits=st.integers(1, 300),
    block=st.sampled_from((1, 16, 32, 64, 128)),
)
def test_splits_cover_the_rows_once(layouts: ModuleType, rows: int, splits: int, block: int) -> None:
    begins, ends = filled(layouts.splits, rows, splits, block, shape=(splits, 2)).T
    assert begins[0] == 0
    assert ends[-1] == rows
    assert (begins[1:] == ends[:-1]).all()
    assert (begins <= ends).all()
    # Whole blocks, and as equal as blocks can be.
    assert (begins[begins < rows] % block == 0).all()
    blocks = -(-(ends - begins) // block)
    assert blocks.max() - blocks.min() <= 1


@quick
@given(
    tiles=st.integers(0, 400),
    rows=st.one_of(st.integers(0, 5000), st.integers(0, 2**40)),
    multiprocessors=st.integers(1, 300),
    least_rows=st.integers(1, 4096),
)
def test_splits_are_as_many_as_help(
    layouts: ModuleType, tiles: int, rows: int, multiprocessors: int, least_rows: int
) -> None:
    splits = layouts.count_splits(tiles, rows, multiprocessors, least_rows)
    assert splits >= 1
    if splits > 1:
        assert splits * tiles <= multiprocessors
        assert splits * least_rows <= rows
    if 0 < tiles < multiprocessors:  # one more would not have done
        assert (splits + 1) * tiles > multiprocessors or (splits + 1) * least_rows > rows


@st.composite
def sorted_offsets(draw: st.DrawFn) -> np.ndarray:
    """Offsets of domains, many of them empty, also the first and the last ones."""
    lengths = draw(st.lists(st.one_of(st.just(0), st.integers(0, 3), st.integers(0, 300)), max_size=30))
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).astype(np.int64)


def segments_of(layouts: ModuleType, offsets: np.ndarray, rows: int, begin: int, end: int) -> np.ndarray:
    out = np.full((len(offsets), 3), INT64.min)
    count = layouts.segments(offsets.ctypes.data, len(offsets) - 1, rows, begin, end, out.ctypes.data)
    return out[:count]


@quick
@given(offsets=sorted_offsets(), splits=st.integers(1, 5), block=st.sampled_from((1, 16, 64)))
def test_segments_cover_each_row_of_a_range_once(
    layouts: ModuleType, offsets: np.ndarray, splits: int, block: int
) -> None:
    rows = int(offsets[-1])
    domain_of_row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    found = np.full(rows, -1)
    for begin, end in filled(layouts.splits, rows, splits, block, shape=(splits, 2)):
        place, before = begin, -1
        for domain, first, last in segments_of(layouts, offsets, rows, begin, end):
            assert place == first < last
            assert before < domain
            found[first:last] = domain
            place, before = last, domain
        assert place == end
    assert (found == domain_of_row).all()


EXTREMES = st.one_of(st.integers(-5, 70), st.sampled_from((INT64.min, INT64.max, -1, 2**31, 2**32)))


@quick
@given(offsets=st.lists(EXTREMES, min_size=1, max_size=12), range_=st.tuples(st.integers(0, 64), st.integers(0, 64)))
def test_wrong_offsets_stay_in_the_range(layouts: ModuleType, offsets: list[int], range_: tuple[int, int]) -> None:
    begin, end = sorted(range_)
    found = segments_of(layouts, np.array(offsets), 64, begin, end)
    domain, first, last = found.T
    assert (np.diff(domain) > 0).all()
    assert ((domain >= 0) & (domain < len(offsets) - 1)).all()
    assert ((begin <= first) & (first < last) & (last <= end)).all()
    # What a domain claims inside of the range is what it gets.
    for number in range(len(offsets) - 1):
        inside = [row for row in range(begin, end) if offsets[number] <= row < offsets[number + 1]]
        got = [row for d, f, e in found if d == number for row in range(f, e)]
        assert got == inside


@quick
@given(order=st.lists(EXTREMES, max_size=40))
def test_rows_are_taken_from_memory_that_exists(layouts: ModuleType, order: list[int]) -> None:
    rows = len(order)
    entries = np.array(order, np.int64)
    assert (filled(layouts.rows_by_order, entries.ctypes.data, rows, shape=(rows,)) == entries.clip(0, rows - 1)).all()
    assert (filled(layouts.rows_by_order, 0, rows, shape=(rows,)) == np.arange(rows)).all()


def banks_differ(offsets: np.ndarray) -> bool:
    """Whether each eight lanes in turn reach eight different groups of four banks."""
    groups = np.sort(offsets.reshape(-1, 8) // 16 % 8, axis=-1)
    return bool((groups == np.arange(8)).all())


@pytest.mark.parametrize("rows", [8, 32, 64])
def test_chunks_of_operands_lie_side_by_side(layouts: ModuleType, rows: int) -> None:
    offsets = filled(layouts.chunk_offsets, rows, shape=(rows * 16,))
    assert (np.sort(offsets) == np.arange(rows * 16) * 16).all()


@pytest.mark.parametrize(("threads", "rows"), [(256, 32), (256, 64), (128, 32)])
def test_threads_copy_every_chunk_once_and_at_full_speed(layouts: ModuleType, threads: int, rows: int) -> None:
    count = rows * 16 // threads
    chunks = filled(layouts.copied_chunks, threads, count, shape=(threads, count, 2))
    assert is_bijection(chunks, rows, 16)
    offsets = filled(layouts.chunk_offsets, rows, shape=(rows, 16))
    assert banks_differ(offsets[chunks[..., 0], chunks[..., 1]].T)
    # Eight threads in a row read 128 bytes in a row of device memory.
    assert (chunks[:, :, 0].reshape(-1, 8, count) == chunks[::8, None, :, 0]).all()
    assert (np.diff(chunks[:, :, 1].reshape(-1, 8, count), axis=1) == 1).all()


def test_matrices_are_fragments_and_read_at_full_speed(layouts: ModuleType) -> None:
    chunks = filled(layouts.chunks_of_fragments, shape=(32, 2, 2))
    rows = 32
    offsets = filled(layouts.chunk_offsets, rows, shape=(rows, 16))
    for which, blocks in enumerate((((0, 0), (0, 1), (1, 0), (1, 1)), ((0, 0), (1, 0), (0, 1), (1, 1)))):
        # Matrix i, transposed, is word i of the fragment: a has (k, columns) blocks (0, 0), (0, 8), (8, 0), (8, 8);
        # two times b (0, 0), (8, 0) and the same of the next 8 columns.
        row, column = chunks[:, which].T
        matrix, within = np.divmod(np.arange(32), 8)
        block = np.array(blocks)[matrix]
        assert (row == block[:, 0] * 8 + within).all()
        assert (column == block[:, 1]).all()
        for k in range(0, rows, 16):
            for first in range(0, 16, 2):
                assert banks_differ(offsets[row + k, column + first])
