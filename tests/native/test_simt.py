"""The simulator of a GPU's threads does what the instructions of ptx.h say, and tells a kernel that is wrong."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

SEEDS = range(8)
LANE = np.arange(32)


@pytest.fixture(scope="module")
def simt(build_module) -> ModuleType:
    return build_module("simt_check", ["simt_check.cpp"])


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def aligned(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Zeros that begin at a multiple of 16 bytes."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(count + 16, np.uint8)
    return memory[-address(memory) % 16 :][:count].view(dtype).reshape(shape)


def words_of(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "dtype"), [("shuffle_float", np.float32), ("shuffle_double", np.float64)])
def test_shuffle_exchanges_with_the_lane_at_the_mask(simt: ModuleType, name: str, dtype: type, seed: int) -> None:
    given = np.random.default_rng(seed).normal(size=96).astype(dtype)
    taken = np.empty_like(given)
    mask = (1, 2, 4, 8, 16, 31, 0, 5)[seed]
    getattr(simt, name)(address(given), address(taken), 96, mask, seed)
    assert (taken.reshape(3, 32) == given.reshape(3, 32)[:, LANE ^ mask]).all()


def test_any_lane_is_a_matter_of_one_warp(simt: ModuleType) -> None:
    predicates = np.zeros(96, bool)
    predicates[40] = True
    answers = simt.any_of_lanes(predicates.tolist(), 1)
    assert answers == [False] * 32 + [True] * 32 + [False] * 32


def test_threads_know_their_place(simt: ModuleType) -> None:
    places = np.full((3, 64, 3), -1)
    simt.who_am_i(3, 64, address(places))
    assert (places[:, :, 0] == np.arange(3)[:, None]).all()
    assert (places[:, :, 1] == 3).all()
    assert (places[:, :, 2] == np.arange(64)).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_spread_over_lanes(simt: ModuleType, transposed: bool, seed: int) -> None:
    rows = aligned((4, 8, 8), np.uint16)
    rows[:] = np.random.default_rng(seed).permutation(256).reshape(4, 8, 8)
    words = np.zeros((32, 4), np.uint32)
    simt.matrices(address(rows), address(words), transposed, 16 if seed % 2 else 48, seed)
    long, short = LANE // 4, LANE % 4 * 2
    for matrix in range(4):
        m = rows[matrix].T if transposed else rows[matrix]
        assert (words[:, matrix] == words_of(m[long, short], m[long, short + 1])).all()


@pytest.mark.parametrize(("name", "dtype"), [("product_bfloat16", torch.bfloat16), ("product_float16", torch.float16)])
def test_product_of_fragments(simt: ModuleType, name: str, dtype: torch.dtype) -> None:
    """Fragments laid out as the tables in the PTX ISA say, element by element."""
    warps = 3
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(warps, *shape, generator=generator).to(dtype) for shape in ((16, 16), (16, 8)))
    d = torch.randn(warps, 16, 8, generator=generator)
    group, in_group = LANE // 4, LANE % 4

    def bits(matrix: torch.Tensor, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        return matrix.view(torch.int16).numpy().view(np.uint16)[:, row, column]

    def a_place(i: int) -> tuple[np.ndarray, np.ndarray]:
        return group + (8 if i in (2, 3, 6, 7) else 0), in_group * 2 + i % 2 + (8 if i >= 4 else 0)

    def b_place(i: int) -> tuple[np.ndarray, np.ndarray]:
        return in_group * 2 + i % 2 + (8 if i >= 2 else 0), group

    def d_place(i: int) -> tuple[np.ndarray, np.ndarray]:
        return group + (8 if i >= 2 else 0), in_group * 2 + i % 2

    left = np.stack([words_of(bits(a, *a_place(i)), bits(a, *a_place(i + 1))) for i in (0, 2, 4, 6)], -1).copy()
    right = np.stack([words_of(bits(b, *b_place(i)), bits(b, *b_place(i + 1))) for i in (0, 2)], -1).copy()
    sums = np.stack([d.numpy()[(slice(None), *d_place(i))] for i in range(4)], -1).copy()
    getattr(simt, name)(address(sums), address(left), address(right), warps, 5)

    expected = (d.double() + a.double() @ b.double()).numpy()
    for i in range(4):
        assert np.allclose(sums[..., i], expected[(slice(None), *d_place(i))], rtol=0, atol=2e-5)


def test_numbers_are_rounded_to_nearest_even(simt: ModuleType) -> None:
    generator = np.random.default_rng(0)
    every_bfloat16 = np.arange(65536, dtype=np.uint32) << 16
    every_float16 = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    words = [generator.integers(0, 2**32, 500_000, dtype=np.uint32)]
    # Every number that is one, halfway between two, and what lies beside those.
    for numbers, half in ((every_bfloat16, 1 << 15), (every_float16, 1 << 12)):
        words += [numbers + step for step in (0, half - 1, half, half + 1)]
    # Between subnormal numbers of float16.
    halves = ((np.arange(4096) / 2 * 2.0**-24) * np.array([[1], [1 - 2.0**-20], [1 + 2.0**-20]])).astype(np.float32)
    words.append(halves.ravel().view(np.uint32))
    values = np.concatenate(words).astype(np.uint32).view(np.float32)
    bfloat16, float16 = np.empty((2, len(values)), np.uint16)
    simt.to_bits(address(values), len(values), address(bfloat16), address(float16))

    missing = np.isnan(values)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    assert (float16 == expected)[~missing].all()
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert (bfloat16 == expected)[~missing].all()
    for bits in (bfloat16, float16):
        assert (bits[missing] == 0x7FFF).all()  # as the conversions of CUDA do


def test_bits_become_numbers(simt: ModuleType) -> None:
    bfloat16, float16 = np.empty((2, 65536), np.float32)
    simt.from_bits(address(bfloat16), address(float16))
    bits = np.arange(65536, dtype=np.uint32)
    assert np.array_equal(bfloat16, (bits << 16).view(np.float32), equal_nan=True)
    assert np.array_equal(float16, bits.astype(np.uint16).view(np.float16).astype(np.float32), equal_nan=True)
    assert simt.parts_of_word(0x3F80_4000) == [2.0, 1.0, np.uint32(0x3F80_4000).view(np.float32)]


@pytest.mark.parametrize("seed", SEEDS)
def test_copies_end_in_zeros(simt: ModuleType, seed: int) -> None:
    generator = np.random.default_rng(seed)
    count = generator.integers(0, 17, 64)
    source, got = aligned((64, 16), np.uint8), np.empty((64, 16), np.uint8)
    source[:] = generator.integers(1, 256, source.shape)
    simt.partial_copies(address(source), address(got), count.tolist(), seed)
    assert (got == np.where(np.arange(16) < count[:, None], source, 0)).all()


def test_waiting_is_for_the_older_groups(simt: ModuleType) -> None:
    """What was waited for is there; what was not shows as NaN in some schedules and is there in others."""
    seen = np.array([simt.groups_seen(seed) for seed in range(64)])
    done, poison = np.array([1, 2, 3]), 0xFF
    assert np.isin(seen, [1, 2, 3, poison]).all()
    for wait in range(3):
        assert (seen[:, wait, : wait + 1] == done[: wait + 1]).all()
        for group in range(wait + 1, 3):
            assert set(seen[:, wait, group]) == {done[group], poison}


def test_load_once_reads_16_bytes(simt: ModuleType) -> None:
    memory = aligned((8,), np.uint32)
    memory[:] = np.arange(8)
    start = address(memory)

    def load(*allowed: tuple[int, int]) -> list[int]:
        return simt.loaded_once(start + 16, [(start + begin, bytes_) for begin, bytes_ in allowed])

    for allowed in [(), ((0, 32),), ((16, 16),), ((24, 8), (16, 8)), ((20, 4), (0, 8), (16, 30)), ((0, 40), (16, 1))]:
        assert load(*allowed) == [4, 5, 6, 7]
    for allowed in [((0, 31),), ((17, 15),), ((0, 16), (32, 16)), ((16, 8), (25, 7))]:
        with pytest.raises(RuntimeError, match=r"thread 0: load_once reads 16 bytes outside of the memory it may read"):
            load(*allowed)
    # The permission ended with the launch.
    assert load() == [4, 5, 6, 7]


def test_atomic_or(simt: ModuleType) -> None:
    assert simt.bits_of_all(32, 0) == 2**31 - 1


@pytest.mark.parametrize("threads", [32, 128, 384, 1024])
def test_a_barrier_makes_writes_visible(simt: ModuleType, threads: int) -> None:
    warps = threads // 32
    for seed in SEEDS:
        assert simt.sums_over_warps(threads, True, seed) == [warps * (warps + 1) // 2] * threads


def test_a_missing_barrier_shows(simt: ModuleType) -> None:
    assert all(simt.sums_over_warps(128, False, seed) != [10] * 128 for seed in range(32))


@pytest.mark.parametrize("seed", SEEDS)
def test_no_race_is_seen_where_there_is_none(simt: ModuleType, seed: int) -> None:
    simt.run_without_races(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_parts_of_a_block_wait_for_each_other(simt: ModuleType, seed: int) -> None:
    assert simt.passed_on(50, seed) == list(range(50))


def test_the_seed_decides_who_goes_first(simt: ModuleType) -> None:
    orders = [simt.order_of_threads(seed) for seed in range(16)]
    assert orders == [simt.order_of_threads(seed) for seed in range(16)]
    assert all(sorted(order) == list(range(128)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("grid", "cluster"), [(6, 1), (6, 2), (6, 3), (8, 4)])
def test_blocks_of_a_cluster_run_together(simt: ModuleType, grid: int, cluster: int, seed: int) -> None:
    before = [(rank - 1) % cluster for rank in range(cluster)]
    assert simt.around_the_cluster(grid, cluster, seed) == before * (grid // cluster)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_warpgroup_meets(simt: ModuleType, seed: int) -> None:
    sums = np.arange(256).reshape(2, 128).sum(1)
    assert simt.sums_over_groups(256, seed) == np.repeat(sums, 128).tolist()


def test_what_is_under_way_ends_when_waited_for(simt: ModuleType) -> None:
    early, waited = np.array([simt.done_later(seed) for seed in range(64)]).T
    assert (waited == 64).all()
    assert early.min() == 0
    assert early.max() == 64
    assert len(set(early)) > 3


BARRIER = r"no thread can go on:\nblock 0:"
MESSAGES = {
    "some threads skip a barrier": rf"{BARRIER} threads 0 to 31 wait in sync_block; threads 32 to 95 have left",
    "half a warp at a barrier": rf"{BARRIER} threads 0 to 15 wait in sync_block; threads 16 to 31 have left",
    "different functions in a warp": r"is at (sync_warp|any_lane) while others of its warp are at (any_lane|sync_warp)",
    "different masks in a warp": r"is at shuffle_xor of float\(.\) while others .* at shuffle_xor of float\(.\)",
    "different counts at a barrier": r"sync_some of (64|96) threads where others wait for (96|64) at barrier 1",
    "a barrier for more threads than there are": r"sync_some needs whole warps of the block; got 160 threads",
    "barrier 16": r"there is no barrier 16",
    "barrier 0 by number": r"barrier 0 is sync_block's",
    "a copy past the end": r"16 bytes at offset 4096 of the block's shared memory, which has 4096",
    "a copy before the start": r"16 bytes at offset -1008 of the block's shared memory",
    "a misaligned copy": r"copy_async_16 needs a multiple of 16; got shared address 1032",
    "a misaligned source": r"copy_async_16 needs an aligned source",
    "a copy of 17 bytes": r"copy_async_16 of 17 bytes",
    "matrices past the end": r"16 bytes at offset 4096",
    "misaligned matrices": r"load_matrices_transposed needs a multiple of 16; got shared address 1026",
    "a misaligned load": r"load_once needs an address that 16 divides",
    "writing past the end": r"block 0 wrote beside its 4096 bytes of shared memory",
    "writing before the start": r"block 0 wrote beside its 4096 bytes of shared memory",
    "an address elsewhere": r"shared_address of what is not in the block's shared memory",
    "another block's memory without a cluster": r"an address in shared memory of no block of the cluster",
    "waiting for what never comes": r"0 to 6 have left the kernel; threads 7 to 7 wait in Godot\(2\); threads 8 to",
    "a launch inside a launch": r"a launch inside a launch",
    "half a warpgroup": r"no whole warpgroup",
    "reading what was not waited for": r"load_matrices at offset \d+ of .* by a copy that warp . has not waited for",
    "reading what another warp did not wait for": r"which is filled by a copy that warp 0 has not waited for",
    "waiting for too few groups": r"which is filled by a copy that warp 1 has not waited for",
    "reading without a barrier after the wait": r"load_matrices at .* warp 1 (wrote with no barrier|has not waited)",
    "reading after the wrong barrier": r"(load_matrices .* warp 1 wrote|copy_async_16 .* warp [02] read) with no",
    "copying again what others still read": r"copy_async_16 .* warp . read with no barrier|has not waited for",
    "copying twice to one place": r"copy_async_16 .* by a copy that warp . has not waited for",
    "throwing": r"thrown by the kernel",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_what_a_kernel_does_wrong_is_told(simt: ModuleType, name: str) -> None:
    for seed in SEEDS:
        with pytest.raises(Exception, match=MESSAGES[name]):
            simt.run_wrong(name, seed)
    # The machine is as before.
    assert simt.sums_over_warps(64, True, 0) == [3] * 64


def test_every_wrong_kernel_is_tested(simt: ModuleType) -> None:
    assert simt.names_of_wrong() == sorted(MESSAGES)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_failed_launch_unwinds_all_threads(simt: ModuleType, seed: int) -> None:
    assert simt.left_after_failure(seed) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 2, 32, 0), "the grid must be whole clusters"),
        ((1, 0, 32, 0), "the grid must be whole clusters"),
        ((1, 1, 33, 0), "a block must be 1 to 32 whole warps"),
        ((1, 1, 0, 0), "a block must be 1 to 32 whole warps"),
        ((1, 1, 1056, 0), "a block must be 1 to 32 whole warps"),
        ((1, 1, 32, -1), "too much shared memory"),
        ((1, 1, 32, 1 << 24), "too much shared memory"),
    ],
)
def test_launches_that_cannot_be(simt: ModuleType, arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        simt.launch(*arguments)


def test_an_empty_grid_is_nothing(simt: ModuleType) -> None:
    simt.launch(0, 1, 32, 0)


def test_the_device_s_functions_need_a_kernel(simt: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="outside of a kernel"):
        simt.outside_of_a_kernel()
