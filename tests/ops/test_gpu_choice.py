"""Which way group influence takes on a GPU: the counting is monotone and puts each way where it belongs."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tikmix_fast.ops.common.gpu_cost import count_gpu_costs

KERNELS = ("triton", "cuda")


@given(
    rows=st.integers(1, 10**6),
    domains=st.integers(0, 10**3),
    tasks=st.integers(0, 100),
    with_total=st.booleans(),
    kernel=st.sampled_from(KERNELS),
    capability=st.sampled_from([(7, 0), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0)]),
)
def test_more_work_never_costs_less(
    rows: int,
    domains: int,
    tasks: int,
    with_total: bool,
    kernel: Literal["triton", "cuda"],
    capability: tuple[int, int],
) -> None:
    def costs(rows: int, domains: int, tasks: int) -> tuple[float, ...]:
        return count_gpu_costs(
            rows, 640, 480, domains, tasks, with_total=with_total, kernel=kernel, capability=capability
        )

    here = costs(rows, domains, tasks)
    for more in (costs(rows + 1, domains, tasks), costs(rows, domains + 1, tasks), costs(rows, domains, tasks + 1)):
        assert all(after >= before for before, after in zip(here, more, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("with_total", [False, True])
def test_few_domains_are_fused_and_many_with_many_tasks_are_not(
    kernel: Literal["triton", "cuda"], capability: tuple[int, int], with_total: bool
) -> None:
    def cheapest(domains: int, tasks: int) -> str:
        return count_gpu_costs(
            16384, 4096, 4096, domains, tasks, with_total=with_total, kernel=kernel, capability=capability
        ).cheapest()

    assert cheapest(1, 9) == "fused"
    assert cheapest(64, 32) == "two_pass"


def test_a_total_of_its_own_is_counted_for_the_vendors_two_passes_only() -> None:
    def two_pass(kernel: Literal["triton", "cuda"], with_total: bool) -> float:
        return count_gpu_costs(
            16384, 4096, 4096, 8, 9, with_total=with_total, kernel=kernel, capability=(9, 0)
        ).two_pass

    assert two_pass("cuda", True) > 1.5 * two_pass("cuda", False)
    assert two_pass("triton", True) == two_pass("triton", False)
