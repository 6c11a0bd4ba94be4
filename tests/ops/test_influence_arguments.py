"""What group_influence refuses: the message names the argument, and grad_weight is as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tikmix_fast import ops


def call(**changes: object) -> tuple[dict[str, object], Tensor]:
    grad_weight = torch.full((3, 4), 2.0)
    arguments: dict[str, object] = {
        "input": torch.ones(6, 4),
        "grad_output": torch.ones(6, 3),
        "offsets": torch.tensor([0, 2, 6]),
        "queries": torch.ones(2, 3, 4),
        "grad_weight": grad_weight,
    }
    return arguments | changes, grad_weight


BAD = [
    ({"input": torch.ones(6)}, ValueError, r"input must have shape \(T, I\); got \(6,\) \[float32, cpu\]"),
    ({"grad_output": torch.ones(5, 3)}, ValueError, r"grad_output must have shape \(6, O\); got \(5, 3\)"),
    ({"queries": torch.ones(3, 4)}, ValueError, r"queries must have shape \(n, 3, 4\); got \(3, 4\)"),
    ({"queries": torch.ones(2, 4, 3)}, ValueError, r"queries must have shape \(n, 3, 4\); got \(2, 4, 3\)"),
    ({"offsets": torch.tensor([[0, 6]])}, ValueError, r"offsets must have shape \(m \+ 1\)"),
    ({"offsets": torch.tensor([], dtype=torch.int64)}, ValueError, "offsets must hold m \\+ 1 row numbers"),
    ({"offsets": torch.tensor([0, 2, 6], dtype=torch.int32)}, ValueError, "offsets must be int64.*convert it"),
    ({"offsets": torch.tensor([0.0, 6.0])}, ValueError, "offsets must be int64"),
    ({"offsets": torch.tensor([1, 6])}, ValueError, "offsets must start at 0 and end at T = 6; got 1 and 6"),
    ({"offsets": torch.tensor([0, 5])}, ValueError, "offsets must start at 0 and end at T = 6; got 0 and 5"),
    ({"offsets": torch.tensor([0, 7])}, ValueError, "offsets must start at 0 and end at T = 6; got 0 and 7"),
    (
        {"offsets": torch.tensor([0, 4, 2, 6])},
        ValueError,
        r"must not decrease; got offsets\[1\] = 4 > offsets\[2\] = 2",
    ),
    ({"offsets": torch.tensor([0, -1, 6])}, ValueError, r"must not decrease; got offsets\[0\] = 0 > offsets\[1\] = -1"),
    ({"offsets": torch.tensor([0, 2**40, 6])}, ValueError, "must not decrease"),
    ({"order": torch.arange(5)}, ValueError, r"order must have shape \(6\); got \(5,\)"),
    ({"order": torch.arange(6).int()}, ValueError, "order must be int64"),
    ({"order": torch.tensor([0, 1, 2, 3, 4, 6])}, ValueError, "order must be a permutation of 0 ... 5; got .* 0 to 6"),
    (
        {"order": torch.tensor([0, 1, 2, 3, 4, -1])},
        ValueError,
        "order must be a permutation of 0 ... 5; got .* -1 to 4",
    ),
    ({"input": torch.ones(6, 4, dtype=torch.int64)}, TypeError, "input must be a floating-point tensor; got .*int64"),
    ({"queries": torch.ones(2, 3, 4, dtype=torch.complex64)}, TypeError, "queries must be a floating-point tensor"),
    ({"input": torch.ones(6, 4, device="meta")}, ValueError, "grad_output must be on the device of input, meta"),
    ({"order": torch.arange(6, device="meta")}, ValueError, "order must be on the device of input, cpu"),
    ({"offsets": torch.tensor([0, 6], device="meta")}, ValueError, "offsets must be on the CPU or on the device of"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_arguments(backend: str, changes: dict[str, Tensor], error: type[Exception], message: str) -> None:
    arguments, grad_weight = call(**changes)
    with pytest.raises(error, match=message):
        ops.group_influence(**arguments, backend=backend)
    assert (grad_weight == 2.0).all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [((4, 3), r"grad_weight must have shape \(3, 4\); got \(4, 3\)"), ((12,), r"grad_weight must have shape \(3, 4\)")],
)
def test_grad_weight_of_the_wrong_shape(backend: str, shape: tuple[int, ...], message: str) -> None:
    arguments, _ = call(grad_weight=torch.ones(shape))
    with pytest.raises(ValueError, match=message):
        ops.group_influence(**arguments, backend=backend)


@pytest.mark.parametrize("name", ["input", "grad_output", "queries"])
def test_grad_weight_may_not_share_memory_with_what_is_read(backend: str, name: str) -> None:
    arguments, _ = call()
    tensor = arguments[name]
    buffer = torch.ones(tensor.numel() + 12)
    arguments[name] = buffer[12:].view(tensor.shape)
    arguments["grad_weight"] = buffer[8:20].view(3, 4)
    with pytest.raises(ValueError, match=f"grad_weight must not share memory with {name}"):
        ops.group_influence(**arguments, backend=backend)
    assert (buffer == 1).all()

    arguments["grad_weight"] = buffer[:12].view(3, 4)  # neighbours in one buffer are fine
    ops.group_influence(**arguments, backend=backend)
    assert (buffer[:12] == 7).all()
    assert (buffer[12:] == 1).all()


@pytest.mark.parametrize(
    "grad_weight",
    [torch.ones(1, 4).expand(3, 4), torch.ones(3, 1).expand(3, 4), torch.ones(12).as_strided((3, 4), (2, 1))],
    ids=["rows", "columns", "overlapping-rows"],
)
def test_grad_weight_may_not_overlap_itself(backend: str, grad_weight: Tensor) -> None:
    arguments, _ = call(grad_weight=grad_weight)
    with pytest.raises(ValueError, match="grad_weight must not overlap itself"):
        ops.group_influence(**arguments, backend=backend)
    assert (grad_weight == 1).all()


@pytest.mark.parametrize(("height", "width"), [(1, 4), (3, 1), (1, 1)])
def test_a_single_row_or_column_of_any_stride_does_not_overlap_itself(backend: str, height: int, width: int) -> None:
    grad_weight = torch.zeros(height, width).as_strided((height, width), (width, 1) if height > 1 else (0, 1))
    ops.group_influence(
        torch.ones(2, width),
        torch.ones(2, height),
        torch.tensor([0, 2]),
        torch.ones(1, height, width),
        grad_weight=grad_weight,
        backend=backend,
    )
    assert (grad_weight == 2).all()
