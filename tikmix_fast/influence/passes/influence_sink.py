"""Inner products of the queries with the gradients of one micro-batch's domains, per parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tikmix_fast import ops
from tikmix_fast.influence.capture.rows import Layout, RowLabels
from tikmix_fast.influence.capture.views import ParameterView
from tikmix_fast.influence.queries.store import QueryStore
from tikmix_fast.ops.projected.lookup import projected_lookup_gradients

__all__ = ["LOOKED_UP_TOGETHER", "InfluenceSink"]

# Rows of an embedding's queries at a time on a GPU: 64 MiB for 4096 columns.
LOOKED_UP_TOGETHER = 4096


class InfluenceSink:
    """A `Sink` that sums <query, gradient of a domain's rows> over the uses of every parameter.

    Parameters
    ----------
    labels : RowLabels
        The domain of every row.
    queries : QueryStore, or mapping of str to Tensor [q, *parameter.shape]
        The preconditioned task gradients, by the name of the parameter.
    projections : mapping of str to LayerProjection, optional
        The weights whose queries are projected.

    Attributes
    ----------
    sums : dict of str to float64 Tensor [q, m]
        By the name of the parameter, in the units of the gradient that flowed.
    projected : dict of str to Tensor [m, k_out, k_in]
        The domains' projected gradients, by the name of the parameter.
    saw_half : bool
        Whether a gradient in half precision was read.
    """

    def __init__(
        self,
        labels: RowLabels,
        queries: QueryStore | Mapping[str, Tensor],
        projections: Mapping[str, ops.LayerProjection] | None = None,
    ) -> None:
        self.labels = labels
        self.queries = queries if isinstance(queries, QueryStore) else QueryStore(queries)
        self.projections = projections or {}
        self.sums: dict[str, Tensor] = {}
        self.projected: dict[str, Tensor] = {}
        self.saw_half = False

    def total(self) -> Tensor | None:
        """Return the sum over all parameters [q, m], on the first one's device; None if nothing was captured."""
        sums = list(self.sums.values())
        return torch.stack([each.to(sums[0].device) for each in sums]).sum(0) if sums else None

    def close(self) -> None:
        """Stop, and release the queries: a graph or a view that outlives the pass must not keep them alive."""
        self.queries.end_pass()
        self.queries = QueryStore()

    def is_projected(self, view: ParameterView) -> bool:
        """Whether the view is a parameter that is measured through a projection."""
        return view.is_parameter and view.sources[0].name in self.projections

    def product(
        self, weight: ParameterView, rows: Tensor, gradient: Tensor, in_out: bool, total: Tensor | None = None
    ) -> None:
        """Add ``output = rows @ weight.T`` (``rows @ weight`` if ``in_out``), given the gradient of the output.

        ``total``, if given, gets the weight gradient added in the same pass.
        """
        self._note(gradient)
        # Under autocast, the product itself read the rows in the dtype of its output.
        dtype = gradient.dtype
        flat_rows = rows.reshape(-1, rows.shape[-1]).to(dtype)
        flat_gradient = gradient.reshape(-1, gradient.shape[-1])
        left, right = (flat_rows, flat_gradient) if in_out else (flat_gradient, flat_rows)
        if total is not None and (not self.queries or total.dtype not in (torch.float32, torch.bfloat16)):
            # The kernel adds to float32 and bfloat16 only; float64 models are for checks, not for speed.
            total += left.t() @ right
            total = None
        if not self.queries:
            return
        layout = self.labels.layout(rows.shape[:-1], rows.device)
        if self.is_projected(weight):
            name = weight.sources[0].name
            self._add_projected(
                name,
                ops.projected_domain_gradients(right, left, layout.offsets, self.projections[name], order=layout.order),
            )
            return
        by_name: Iterable[tuple[str, Tensor | ops.PackedQueries]]
        if weight.is_parameter:
            by_name = [(weight.sources[0].name, self.queries.packed(weight.sources[0].name, dtype))]
        else:
            of_rows = layout.domain_of_rows()
            self._add_derived(
                weight, lambda domain: _wide(left[of_rows == domain]).t() @ _wide(right[of_rows == domain])
            )
            by_name = self._view_queries(weight)
        for name, queries in by_name:
            sums = ops.group_influence(right, left, layout.offsets, queries, order=layout.order, grad_weight=total)
            self._add(name, sums)

    def spread(self, view: ParameterView, gradient: Tensor) -> None:
        """Add a view that the model broadcast to the shape of ``gradient``."""
        if not self.queries:
            return
        self._note(gradient)
        if self.labels.single is not None:
            gradient = gradient.sum_to_size(view.plain.shape)
        if gradient.ndim == 0:
            gradient = gradient.reshape(1, 1)
        elif gradient.ndim == 1:
            gradient = gradient.unsqueeze(0 if self.labels.single is not None else 1)
        if view.plain.shape[:-1].numel() == 1:
            self.features(view, gradient)
            return
        layout = self.labels.layout(gradient.shape[:-1], gradient.device)
        of_rows = layout.domain_of_rows().reshape(*gradient.shape[:-1], 1)
        shape = view.plain.shape
        self._add_derived(view, lambda domain: (_wide(gradient) * (of_rows == domain)).sum_to_size(shape))
        for name, queries in self._view_queries(view):
            # Align trailing dimensions, as broadcasting does.
            aligned = queries.reshape(len(queries), *(1,) * (gradient.ndim - queries.ndim + 1), *queries.shape[1:])
            dots = torch.einsum("...c,q...c->...q", _wide(gradient), _wide(aligned))
            self._add_rows(name, dots.reshape(-1, len(queries)), layout)

    def features(self, view: ParameterView, per_row: Tensor) -> Tensor:
        """Add a parameter with one value per feature, or a single one, given its gradient by row [..., C].

        Returns the sum over all rows, [C].
        """
        self._note(per_row)
        layout = self.labels.layout(per_row.shape[:-1], per_row.device)
        runs = layout.sum_runs(per_row.reshape(-1, per_row.shape[-1]))
        if self.queries:
            of_domains = layout.sum_domains(runs)
            shape = view.plain.shape
            self._add_derived(
                view, lambda domain: of_domains[domain].expand(*shape[:-1], -1).sum_to_size(shape).to(runs.dtype)
            )
            for name, queries in self._view_queries(view):
                features = queries.reshape(len(queries), -1).expand(-1, runs.shape[-1])
                self._add(name, features.double() @ of_domains.t())
        return runs.sum(0)

    def lookup(self, view: ParameterView, ids: Tensor, padding: int | None, gradient: Tensor) -> None:
        """Add an embedding's rows at ``ids`` [...], given their gradient [..., C]."""
        if not self.queries:
            return
        self._note(gradient)
        layout = self.labels.layout(ids.shape, ids.device)
        flat_ids, flat = ids.reshape(-1), _wide(gradient.reshape(-1, gradient.shape[-1]))
        if padding is not None:
            flat = flat * (flat_ids != padding).unsqueeze(1)
        name = view.sources[0].name
        if name in self.projections:
            projected = projected_lookup_gradients(
                flat_ids, flat, layout.offsets, self.projections[name], order=layout.order
            )
            self._add_projected(name, projected)
            return
        queries = self.queries[name]
        # A CPU multiplies few rows at a time within its cache; a GPU needs many to be busy.
        some = 256 if flat.device.type == "cpu" else LOOKED_UP_TOGETHER
        dots = [
            torch.stack([torch.linalg.vecdot(_wide(F.embedding(some_ids, query)), rows) for query in queries], dim=1)
            for some_ids, rows in zip(flat_ids.split(some), flat.split(some), strict=True)
        ]
        self._add_rows(name, torch.cat(dots), layout)

    def _view_queries(self, view: ParameterView) -> Iterable[tuple[str, Tensor]]:
        return view.queries(self.queries, without=self.projections)

    def _add_derived(self, view: ParameterView, gradient_of: Callable[[int], Tensor]) -> None:
        """Add the projected parameters among a view's sources; ``gradient_of`` returns its gradient for a domain.

        Each domain's gradient takes as long as the ordinary gradient of all rows; one exists at a time.
        """
        derived = [index for index, source in enumerate(view.sources) if source.name in self.projections]
        if not derived:
            return
        labels = self.labels
        present = labels.ids.unique().tolist() if isinstance(labels.ids, Tensor) else [labels.ids]
        for domain in present:
            gradient = gradient_of(domain)
            for index in derived:
                name, lookup = view.sources[index].name, view.sources[index].lookup
                pulled, projection = view.pull_back(index, gradient), self.projections[name]
                if lookup is None:
                    projected = projection.project(pulled)
                else:
                    rows = lookup.masked(pulled).reshape(-1, pulled.shape[-1])
                    ends = torch.tensor([0, len(rows)], device=rows.device)
                    projected = projected_lookup_gradients(lookup.ids.reshape(-1), rows, ends, projection)[0]
                gradients = projected.new_zeros(labels.n_domains, *projected.shape)
                gradients[domain] = projected
                self._add_projected(name, gradients)

    def _add_projected(self, name: str, gradients: Tensor) -> None:
        """Add a parameter's projected gradients by domain [m, k_out, k_in], and their influence."""
        self.projected[name] = self.projected[name] + gradients if name in self.projected else gradients
        self._add(name, self.queries[name].flatten(1).double() @ gradients.flatten(1).double().t())

    def _note(self, gradient: Tensor) -> None:
        self.saw_half = self.saw_half or gradient.dtype in (torch.bfloat16, torch.float16)

    def _add_rows(self, name: str, dots: Tensor, layout: Layout) -> None:
        """Sum ``dots`` [T, q] over the rows of each domain."""
        self._add(name, layout.sum_domains(layout.sum_runs(dots.double())).t())

    def _add(self, name: str, sums: Tensor) -> None:
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums


def _wide(tensor: Tensor) -> Tensor:
    """Widen half precision to float32, in which products accumulate."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
