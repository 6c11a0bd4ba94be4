"""Views: tensors that stand in for the parameters while influence is captured, and report their uses.

While a capture is open, ``module.weight`` is a `ParameterView`. Every torch function that gets a view calls
`Capture.handle`, which knows how the operation uses a parameter. A view is a tensor subclass, not a mode, so it works
wherever the model uses the parameter: in any module, in a hand-written norm, in a tied head, and again when activation
checkpointing recomputes a forward inside the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tikmix_fast.influence.torch_private import tree_leaves, tree_map, without_subclass_dispatch

__all__ = ["Lookup", "ParameterView", "Source", "UncapturedParameterError", "plain"]


class UncapturedParameterError(RuntimeError):
    """The influence of one use of a trainable parameter cannot be captured."""


class Handler(Protocol):
    def handle(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


@dataclass(frozen=True)
class Lookup:
    """The look-up of rows ``ids`` [...] in a table [V, C]; look-ups of the row ``padding`` have no gradient."""

    ids: Tensor
    padding: int | None

    def lift(self, queries: Tensor) -> Tensor:
        """Return the queries of the looked-up rows [q, ..., C], given those of the table [q, V, C]."""
        return self.masked(queries[:, self.ids])

    def masked(self, rows: Tensor) -> Tensor:
        """Return ``rows`` [..., *ids.shape, C] with zeros at look-ups of the padding."""
        return rows if self.padding is None else rows * (self.ids != self.padding).unsqueeze(-1)


@dataclass(frozen=True)
class Source:
    """What a view is made from: a parameter, or rows looked up in one."""

    name: str
    value: Tensor
    lookup: Lookup | None = None


class ParameterView(torch.Tensor):
    """A parameter, or a function of parameters alone, before it meets the data.

    Attributes
    ----------
    plain : Tensor
        The same values as an ordinary tensor with its autograd history.
    sources : tuple of Source
        The parameters, or rows of parameters, that the view depends on.
    build : callable or None
        Computes the view from the values of its sources; None if it is its only source itself.
    in_rows : bool
        Whether the leading dimensions are rows of the batch, or broadcast to them, as in a position embedding.
    handler : Handler
    """

    plain: Tensor
    sources: tuple[Source, ...]
    build: Callable[..., Tensor] | None
    in_rows: bool
    handler: Handler

    @staticmethod
    def make(
        plain: Tensor,
        handler: Handler,
        sources: tuple[Source, ...],
        build: Callable[..., Tensor] | None = None,
        in_rows: bool = False,
    ) -> ParameterView:
        # An alias: the gradient reaches the parameter even through code that calls no torch function.
        with torch.enable_grad(), without_subclass_dispatch():
            view = plain.as_subclass(ParameterView)
        view.plain, view.handler, view.sources, view.build, view.in_rows = plain, handler, sources, build, in_rows
        return view

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with without_subclass_dispatch():
            for each in tree_leaves((args, kwargs)):
                if isinstance(each, ParameterView):
                    return each.handler.handle(func, args, kwargs)
            return func(*args, **kwargs)

    @property
    def is_parameter(self) -> bool:
        """Whether the view is an unchanged parameter."""
        return self.build is None and self.sources[0].lookup is None

    def queries(self, of: Mapping[str, Tensor], without: Container[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """Yield each source's name and its queries pushed forward to this view, [q, *view.shape].

        ``of`` has the queries of every parameter, [q, *parameter.shape]. Sources named in ``without`` are left out. The
        pushed query and the view's gradient have the inner product of the query and the parameter's gradient: <J q, g>
        = <q, J^T g>.
        """
        for index, source in enumerate(self.sources):
            if source.name in without:
                continue
            lifted = of[source.name] if source.lookup is None else source.lookup.lift(of[source.name])
            yield source.name, lifted if self.build is None else self._push_forward(index, lifted)

    def _push_forward(self, index: int, lifted: Tensor) -> Tensor:
        build = self.build
        if build is None:
            return lifted
        # Forward mode by two backward passes: unlike torch.func.jvp, this works for every differentiable operation.
        with torch.enable_grad():
            values = [source.value.to(lifted.dtype).detach() for source in self.sources]
            values[index].requires_grad_()
            output = build(*values)
            weights = torch.zeros_like(output, requires_grad=True)
            (back,) = torch.autograd.grad(output, values[index], weights, create_graph=True)
            pushed = [torch.autograd.grad(back, weights, query, retain_graph=True)[0] for query in lifted]
        return torch.stack(pushed)

    def pull_back(self, index: int, gradient: Tensor) -> Tensor:
        """Return J^T g, the gradient of a source's value given that of this view: the adjoint of `queries`."""
        if self.build is None:
            return gradient
        with torch.enable_grad():
            values = [source.value.to(gradient.dtype).detach() for source in self.sources]
            values[index].requires_grad_()
            output = self.build(*values)
        return torch.autograd.grad(output, values[index], gradient.to(output.dtype))[0]


def plain(value: Any) -> Any:
    """Replace every view in nested arguments by its ordinary tensor."""
    return tree_map(lambda each: each.plain if isinstance(each, ParameterView) else each, value)
