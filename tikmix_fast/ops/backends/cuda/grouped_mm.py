"""Group influence on a GPU in two passes of the vendor's products: gradients of a panel, then panel times queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tikmix_fast.ops.common.checks import Arguments
from tikmix_fast.ops.common.device_checks import clamped_offsets, device_offsets, mark_errors

__all__ = ["group_influence", "refusal"]

# The most that a panel of all domains' gradients may take: it should stay in the L2 cache until its second pass.
_PANEL_BYTES = 32 << 20
# The vendor's kernel has one thread of a block for each domain.
_MOST_DOMAINS = 1023
# The least height of a panel, that of a tile of the grouped product. Every panel reads all rows of input again.
_PANEL_ROWS = 128


def refusal(arguments: Arguments) -> str | None:
    """Return why the grouped product cannot take this call without the host's help, or None."""
    input, grad_output = arguments.input, arguments.grad_output
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm; 2.10 has"
    if not input.dtype == grad_output.dtype == torch.bfloat16:
        return f"grouped_mm takes bfloat16; got {input.dtype} and {grad_output.dtype}"
    if arguments.queries.dtype != torch.bfloat16:
        return f"it rounds gradients to bfloat16, which only bfloat16 queries allow; got {arguments.queries.dtype}"
    if len(arguments.offsets) - 1 > _MOST_DOMAINS:
        return f"grouped_mm takes up to {_MOST_DOMAINS} groups; got {len(arguments.offsets) - 1} domains"
    if input.device.type == "cuda" and torch.cuda.get_device_capability(input.device) < (9, 0):
        return "grouped_mm of this architecture waits for the host"
    for name, rows in (("input", input), ("grad_output", grad_output)):
        apart = rows.stride(0) >= rows.shape[1] and rows.stride(0) % 8 == 0
        if not apart or rows.stride(1) != 1 or rows.shape[1] % 8 or rows.data_ptr() % 16:
            return f"grouped_mm takes rows of 16-byte multiples; got {name} with strides {rows.stride()}"
    return None


def group_influence(arguments: Arguments) -> Tensor:
    """Compute ``tikmix_fast.ops.group_influence`` panel by panel.

    Gradients are rounded to bfloat16 before they meet the queries. With ``order``, the rows are copied into the order
    of their domains. The total gradient takes one more product.
    """
    input, grad_output, offsets, queries, _, order, grad_weight = arguments
    rows, width = input.shape
    tasks, height = queries.shape[:2]
    offsets = device_offsets(offsets, rows, input.device)
    domains = len(offsets) - 1
    values = torch.zeros(tasks, domains, dtype=torch.float64, device=input.device)
    if min(rows, height, width) == 0:
        return mark_errors(values, offsets, order, rows)
    if order is not None:
        rows_in_order = order.clamp(0, rows - 1)
        input, grad_output = input[rows_in_order], grad_output[rows_in_order]
    ends = clamped_offsets(offsets, rows)[1:].int()
    panel_height = max(_PANEL_BYTES // (2 * max(domains, 1) * width) // _PANEL_ROWS, 1) * _PANEL_ROWS
    for start in range(0, height, panel_height):
        panel = slice(start, start + panel_height)
        transposed = grad_output[:, panel].T
        if tasks and domains:
            gradients = F.grouped_mm(transposed, input, offs=ends)  # [m, panel, I]
            values += _wide_product(queries[:, panel].flatten(1), gradients.flatten(1).T)
        if grad_weight is not None:
            grad_weight[panel] += _wide_product(transposed, input)
    return mark_errors(values, offsets, order, rows)


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Return a product of bfloat16 matrices that is not rounded to bfloat16."""
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
