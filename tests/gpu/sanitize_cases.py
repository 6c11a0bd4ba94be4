"""Small calls of every kernel for compute-sanitizer; wrong numbers fail too.

compute-sanitizer --tool memcheck --error-exitcode 86 python tests/gpu/sanitize_cases.py
"""

from __future__ import annotations

import sys
from unittest import mock

import torch

from tikmix_fast import ops
from tikmix_fast.ops.backends.cuda import grouped_mm
from tikmix_fast.testing import domain_gradients

CASES = [  # O, I, sizes of the domains, n
    (128, 128, [64], 1),
    (72, 136, [1, 0, 70, 65], 3),
    (264, 392, [10] * 26, 9),
]


def run(backend: str, dtype: torch.dtype) -> None:
    """Make the calls of one backend and compare them with float64."""
    for height, width, sizes, tasks in CASES:
        rows = sum(sizes)
        generator = torch.Generator().manual_seed(0)
        input, grad_output, queries = (
            torch.randn(*shape, generator=generator).to("cuda", dtype)
            for shape in ((rows, width), (rows, height), (tasks, height, width))
        )
        offsets, grad_weight = torch.tensor([0, *sizes]).cumsum(0), torch.zeros(height, width, device="cuda")
        gradients = domain_gradients(input, grad_output, offsets)
        scale = queries.double().flatten(1).norm(dim=1)[:, None] * gradients.flatten(1).norm(dim=1)
        right = torch.einsum("noi,moi->nm", queries.double(), gradients)
        on_device = offsets.cuda()
        for order in (None, torch.arange(rows, device="cuda")):
            for total in (None, grad_weight):
                packed = ops.pack_queries(queries)
                values = ops.group_influence(
                    input, grad_output, on_device, packed, order=order, grad_weight=total, backend=backend
                )
                assert ((values - right).abs() <= 1e-3 * scale).all()
        wrong = on_device.clone()
        wrong[-1] += 1000  # must not read outside the memory
        assert ops.group_influence(input, grad_output, wrong, queries, backend=backend).isnan().all()
        for kind in ("countsketch", "rademacher"):
            projection = ops.LayerProjection(height, width, k_out=64, k_in=32, kind=kind, device="cuda")
            small = ops.projected_group_influence(
                input, grad_output, on_device, projection.project(queries), projection, backend=backend
            )
            assert small.isfinite().all()
    torch.cuda.synchronize()


def main() -> None:
    """Run every backend that is available; there must be one."""
    ran = []
    for backend in ("cuda", "triton"):
        reason = ops.available_backends()[backend]
        if reason is None:
            # The vendor's kernels would take some of the calls; this program examines ours.
            with mock.patch.object(grouped_mm, "refusal", return_value="left to our own kernels"):
                for dtype in (torch.bfloat16, torch.float16):
                    run(backend, dtype)
            ran.append(backend)
        print(f"{backend}: {reason or 'ran'}")
    if not ran:
        sys.exit("no kernel ran")


if __name__ == "__main__":
    main()
