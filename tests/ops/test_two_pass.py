"""The two passes through torch's grouped product, on CPU tensors, where the same code runs."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import check_group_influence
from tikmix_fast.ops.backends import reference
from tikmix_fast.ops.backends.cuda import grouped_mm as two_pass
from tikmix_fast.ops.common.checks import Arguments
from tikmix_fast.ops.common.device_checks import raise_on_device_errors

ROWS, HEIGHT, WIDTH = 150, 272, 40


def arguments(sizes: list[int], tasks: int, shuffled: bool = False) -> Arguments:
    generator = torch.Generator().manual_seed(sum(sizes) + tasks)
    rows = sum(sizes)
    return Arguments(
        input=torch.randn(rows, WIDTH, generator=generator).bfloat16(),
        grad_output=torch.randn(rows, HEIGHT, generator=generator).bfloat16(),
        offsets=torch.tensor([0, *sizes]).cumsum(0),
        queries=torch.randn(tasks, HEIGHT, WIDTH, generator=generator).bfloat16(),
        panels=None,
        order=torch.randperm(rows, generator=generator) if shuffled else None,
        grad_weight=None,
    )


@pytest.fixture
def low_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_pass, "_PANEL_BYTES", 1)  # 128 rows high: three panels, the last one ragged


@pytest.mark.usefixtures("low_panels")
@pytest.mark.parametrize("sizes", [[150], [0, 70, 0, 1, 79, 0]], ids=["one-domain", "empty-domains"])
@pytest.mark.parametrize("shuffled", [False, True], ids=["sorted", "ordered"])
@pytest.mark.parametrize("total", [torch.float32, torch.bfloat16], ids=["into-f32", "into-bf16"])
def test_panels_agree_with_float64(sizes: list[int], shuffled: bool, total: torch.dtype) -> None:
    call = arguments(sizes, 3, shuffled)
    before = torch.randn(HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)).to(total)
    grad_weight = before.clone()
    assert two_pass.refusal(call) is None
    values = two_pass.group_influence(call._replace(grad_weight=grad_weight))
    check_group_influence(
        *(call.input, call.grad_output, call.offsets, call.queries, call.order),
        values=values,
        grad_weight=grad_weight,
        before=before,
    )


@pytest.mark.parametrize("sizes", [[], [0, 0], [5]], ids=["no-domain", "no-row", "no-task"])
def test_nothing_to_do_gives_zeros(sizes: list[int]) -> None:
    call = arguments(sizes, 0 if sizes == [5] else 2)
    values = two_pass.group_influence(call)
    assert torch.equal(values, reference.group_influence(call))


@pytest.mark.parametrize(
    ("offsets", "order", "message"),
    [
        ([0, 200], None, "offsets must start at 0"),
        ([5, 150], None, "offsets must start at 0"),
        ([0, 90, 40, 150], None, "never decrease"),
        ([0, 150], [0] * 149 + [150], "order must be a permutation"),
        ([0, 150], [-1] * 150, "order must be a permutation"),
    ],
)
def test_wrong_offsets_on_the_device_give_nan_and_a_note(
    monkeypatch: pytest.MonkeyPatch, offsets: list[int], order: list[int] | None, message: str
) -> None:
    # As if the offsets lay where the host does not look.
    monkeypatch.setattr(two_pass, "device_offsets", lambda offsets, rows, device: offsets)
    call = arguments([150], 2)._replace(
        offsets=torch.tensor(offsets), order=None if order is None else torch.tensor(order)
    )
    assert two_pass.group_influence(call).isnan().all()
    with pytest.raises(ValueError, match=message):
        raise_on_device_errors()
    raise_on_device_errors()  # once


def test_a_nan_reaches_only_its_domain() -> None:
    call = arguments([50, 1, 99], 2)
    call.input[50] = torch.nan
    values = two_pass.group_influence(call)
    assert values[:, 1].isnan().all()
    assert values[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_and_odd_rows_are_refused_in_words(dtype: torch.dtype) -> None:
    call = arguments([150], 1)
    assert "grouped_mm takes bfloat16" in str(two_pass.refusal(call._replace(input=call.input.to(dtype))))
    assert "rounds gradients to bfloat16" in str(two_pass.refusal(call._replace(queries=call.queries.to(dtype))))
    assert "16-byte multiples; got input" in str(two_pass.refusal(call._replace(input=call.input[:, 1:])))
    assert "16-byte multiples; got input" in str(two_pass.refusal(call._replace(input=call.input[:1].expand(150, -1))))


def test_more_domains_than_the_vendors_kernel_takes_are_refused() -> None:
    call = arguments([150], 1)
    assert two_pass.refusal(call._replace(offsets=torch.full((1024,), 150))) is None
    assert "up to 1023 groups; got 1024 domains" in str(
        two_pass.refusal(call._replace(offsets=torch.full((1025,), 150)))
    )
