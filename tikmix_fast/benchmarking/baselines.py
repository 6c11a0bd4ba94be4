"""Every known way to compute the influence of one layer, ours included, behind one signature."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from tikmix_fast import ops

__all__ = ["PLAIN", "Answer", "Layer", "Method", "exact_methods", "projected_methods"]

PLAIN = "plain weight gradient"
"""The method that every ratio is relative to."""

_PANEL = 128
_Kind = Literal["countsketch", "rademacher"]


@dataclass(frozen=True)
class Layer:
    """The operands of one layer's backward pass.

    Attributes
    ----------
    input : Tensor [T, I]
    grad_output : Tensor [T, O]
    offsets : int64 Tensor [m + 1]
        On the CPU, wherever the others are: a loop over domains reads them.
    queries : Tensor [n, O, I]
        Same dtype as ``input``, because every baseline needs that.
    """

    input: Tensor
    grad_output: Tensor
    offsets: Tensor
    queries: Tensor

    def parts(self) -> Iterator[tuple[int, int]]:
        """Iterate over (first row, end) of every domain."""
        return pairwise(self.offsets.tolist())


class Answer(NamedTuple):
    """Influence [n, m] and the total weight gradient [O, I]; None for what a method does not give."""

    values: Tensor | None
    total: Tensor | None


class Method(NamedTuple):
    """One way to compute influence.

    Attributes
    ----------
    prepare : callable (Layer) -> callable () -> Answer
        Does what a training run does once per refresh (pack the queries, allocate the total), and returns the function
        to time.
    refusal : callable (Layer) -> str or None
        Why the method cannot run here; None if it can.
    ours : bool
    matrices : callable (Layer) -> (Tensor [k, O], Tensor [k, I]), or None
        The projections of the method; None if its influence is exact.
    """

    prepare: Callable[[Layer], Callable[[], Answer]]
    refusal: Callable[[Layer], str | None] = lambda layer: None
    ours: bool = False
    matrices: Callable[[Layer], tuple[Tensor, Tensor]] | None = None


def exact_methods() -> dict[str, Method]:
    """Return the exact methods by name, `PLAIN` first."""
    return {
        PLAIN: Method(_plain),
        "oneDNN weight gradient": Method(_onednn, _onednn_refusal),
        "torch, domain by domain": Method(_per_domain),
        "torch, stacked + GEMM": Method(_stacked),
        "oneDNN, stacked + GEMM": Method(_stacked_onednn, _onednn_refusal),
        "grouped_mm + GEMM": Method(_grouped, _grouped_refusal),
        "panels of 128, two passes": Method(_panelled),
        "row-wise (ghost)": Method(_row_wise),
        "tikmix_fast": Method(_ours, _cpu_refusal, ours=True),
        "tikmix_fast, not packed": Method(_ours_unpacked, _cpu_refusal, ours=True),
        "tikmix_fast, influence only": Method(_ours_without_total, _cpu_refusal, ours=True),
    }


def projected_methods(dim: int) -> dict[str, Method]:
    """Return the methods that project both sides of a gradient to ``dim`` numbers, `PLAIN` first."""
    methods = {PLAIN: Method(_plain)}
    for kind in get_args(_Kind):
        methods[f"tikmix_fast, {kind}"] = Method(
            partial(_ours_projected, dim, kind), ours=True, matrices=partial(_matrices, dim, kind)
        )
    methods["torch, dense projections"] = Method(
        partial(_torch_projected, dim), matrices=partial(_matrices, dim, "rademacher")
    )
    return methods


def _plain(layer: Layer) -> Callable[[], Answer]:
    return lambda: Answer(None, layer.grad_output.T @ layer.input)


def _onednn_product(grad_output: Tensor, input: Tensor) -> Tensor:
    """Return ``grad_output.T @ input``; oneDNN wants the summed rows contiguous."""
    if not len(input):  # oneDNN refuses an empty input
        return input.new_zeros(grad_output.shape[1], input.shape[1])
    product: Tensor = torch.ops.mkldnn._linear_pointwise(
        grad_output.T.contiguous(), input.T.contiguous(), None, "none", [], ""
    )
    return product


def _onednn(layer: Layer) -> Callable[[], Answer]:
    return lambda: Answer(None, _onednn_product(layer.grad_output, layer.input))


def _onednn_refusal(layer: Layer) -> str | None:
    try:
        _onednn_product(layer.grad_output[:4], layer.input[:4])
    except (RuntimeError, AttributeError) as error:
        return f"oneDNN's linear op does not run here: {str(error).splitlines()[0]}"
    return None


def _per_domain(layer: Layer) -> Callable[[], Answer]:
    flat = layer.queries.flatten(1)

    def run() -> Answer:
        total = torch.zeros_like(layer.queries[0])
        columns = []
        for start, end in layer.parts():
            gradient = layer.grad_output[start:end].T @ layer.input[start:end]
            columns.append(flat @ gradient.flatten())
            total += gradient
        return Answer(torch.stack(columns, 1), total)

    return run


def _two_passes(queries: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Return influence and total from the gradients of all domains, [m, O, I]."""
    return queries.flatten(1) @ gradients.flatten(1).T, gradients.sum(0)


def _stacked(layer: Layer) -> Callable[[], Answer]:
    def run() -> Answer:
        gradients = layer.input.new_empty(len(layer.offsets) - 1, *layer.queries.shape[1:])
        for gradient, (start, end) in zip(gradients, layer.parts(), strict=True):
            torch.mm(layer.grad_output[start:end].T, layer.input[start:end], out=gradient)
        return Answer(*_two_passes(layer.queries, gradients))

    return run


def _stacked_onednn(layer: Layer) -> Callable[[], Answer]:
    def run() -> Answer:
        products = [_onednn_product(layer.grad_output[a:b], layer.input[a:b]) for a, b in layer.parts()]
        return Answer(*_two_passes(layer.queries, torch.stack(products)))

    return run


def _grouped(layer: Layer) -> Callable[[], Answer]:
    ends = layer.offsets[1:].int().to(layer.input.device)
    return lambda: Answer(*_two_passes(layer.queries, F.grouped_mm(layer.grad_output.T, layer.input, offs=ends)))


def _grouped_refusal(layer: Layer) -> str | None:
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    try:
        ends = torch.tensor([8], dtype=torch.int32, device=layer.input.device)
        F.grouped_mm(layer.grad_output[:8].T, layer.input[:8], offs=ends)
    except (RuntimeError, ValueError) as error:  # rows must be multiples of 16 bytes
        return f"grouped_mm refuses this layer: {str(error).splitlines()[0]}"
    return None


def _panelled(layer: Layer) -> Callable[[], Answer]:
    tasks, height, width = layer.queries.shape
    domains = len(layer.offsets) - 1

    def run() -> Answer:
        values = layer.input.new_zeros(tasks, domains, dtype=torch.float32)
        total = layer.input.new_empty(height, width)
        scratch = layer.input.new_empty(domains, min(_PANEL, height), width)
        for top in range(0, height, _PANEL):
            rows = slice(top, min(top + _PANEL, height))
            gradients = scratch[:, : rows.stop - top]
            for gradient, (start, end) in zip(gradients, layer.parts(), strict=True):
                torch.mm(layer.grad_output[start:end, rows].T, layer.input[start:end], out=gradient)
            influence, total[rows] = _two_passes(layer.queries[:, rows], gradients)
            values += influence
        return Answer(values, total)

    return run


def _row_wise(layer: Layer) -> Callable[[], Answer]:
    domains = len(layer.offsets) - 1
    of_row = torch.repeat_interleave(torch.arange(domains), layer.offsets.diff()).to(layer.input.device)

    def run() -> Answer:
        rows = torch.stack([((layer.input @ query.T) * layer.grad_output).sum(1).float() for query in layer.queries])
        values = rows.new_zeros(len(layer.queries), domains).index_add_(1, of_row, rows)
        return Answer(values, layer.grad_output.T @ layer.input)

    return run


def _cpu_refusal(layer: Layer) -> str | None:
    return ops.available_backends()["cpu"]


def _total_of(layer: Layer) -> Tensor:
    """Return zeros for the total, float32 like the main gradient of an optimizer."""
    return layer.input.new_zeros(layer.queries.shape[1:], dtype=torch.float32)


def _ours(layer: Layer) -> Callable[[], Answer]:
    queries, total = ops.pack_queries(layer.queries), _total_of(layer)

    def run() -> Answer:
        values = ops.group_influence(layer.input, layer.grad_output, layer.offsets, queries, grad_weight=total)
        return Answer(values, total)

    return run


def _ours_unpacked(layer: Layer) -> Callable[[], Answer]:
    total = _total_of(layer)

    def run() -> Answer:
        values = ops.group_influence(layer.input, layer.grad_output, layer.offsets, layer.queries, grad_weight=total)
        return Answer(values, total)

    return run


def _ours_without_total(layer: Layer) -> Callable[[], Answer]:
    queries = ops.pack_queries(layer.queries)
    return lambda: Answer(ops.group_influence(layer.input, layer.grad_output, layer.offsets, queries), None)


def _projection(dim: int, kind: _Kind, layer: Layer) -> ops.LayerProjection:
    height, width = layer.queries.shape[1:]
    return ops.LayerProjection(height, width, dim, dim, kind, device=str(layer.input.device))


def _matrices(dim: int, kind: _Kind, layer: Layer) -> tuple[Tensor, Tensor]:
    output, input = _projection(dim, kind, layer).matrices(torch.float64)
    return output, input


def _ours_projected(dim: int, kind: _Kind, layer: Layer) -> Callable[[], Answer]:
    projection = _projection(dim, kind, layer)
    queries = projection.project(layer.queries)
    return lambda: Answer(
        ops.projected_group_influence(layer.input, layer.grad_output, layer.offsets, queries, projection), None
    )


def _torch_projected(dim: int, layer: Layer) -> Callable[[], Answer]:
    output, input = (matrix.to(layer.input.dtype) for matrix in _matrices(dim, "rademacher", layer))
    queries = _projection(dim, "rademacher", layer).project(layer.queries).flatten(1)

    def run() -> Answer:
        small_input, small_grad = layer.input @ input.T, layer.grad_output @ output.T
        gradients = torch.stack([(small_grad[a:b].T @ small_input[a:b]).flatten() for a, b in layer.parts()])
        return Answer(queries @ gradients.T.float(), None)

    return run
