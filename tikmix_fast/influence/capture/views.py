"""A parameter as the model sees it while influence is captured: a tensor that says where it is used.

While a capture is open, ``module.weight`` is a `ParameterView`. Every torch function that meets one comes to
`Capture.handle`, which knows how the operation uses a parameter. Because the view is a tensor subclass and no mode, it
works wherever the parameter is used: in any module, in a hand-written norm, in a tied head, and again when activation
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
    """A trainable parameter is used in a way whose influence cannot be captured."""


class Handler(Protocol):
    def handle(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


@dataclass(frozen=True)
class Lookup:
    """The rows ``ids`` [...] of a table [V, C]; those of the row ``padding`` pass no gradient on."""

    ids: Tensor
    padding: int | None

    def lift(self, queries: Tensor) -> Tensor:
        """Take queries of the table, [q, V, C], to queries of what was found, [q, ..., C]."""
        return self.masked(queries[:, self.ids])

    def masked(self, rows: Tensor) -> Tensor:
        """Return ``rows`` [..., *ids.shape, C] with zeros where padding was looked up."""
        return rows if self.padding is None else rows * (self.ids != self.padding).unsqueeze(-1)


@dataclass(frozen=True)
class Source:
    """A parameter, or rows looked up in one, that a view is made from."""

    name: str
    value: Tensor
    lookup: Lookup | None = None


class ParameterView(torch.Tensor):
    """A parameter, or what was computed from parameters alone, on its way to meet the data.

    Attributes
    ----------
    plain : Tensor
        The same values as an ordinary tensor with its autograd history.
    sources : tuple of Source
        What it was made from.
    build : callable or None
        How to make it from the values of its sources; None = it is the one source itself.
    in_rows : bool
        Its leading dimensions are rows of the batch (or broadcast to them), as with a looked-up position embedding.
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
        # The alias keeps the gradient flowing to the parameter where a view reaches code that no torch function shows.
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
        """Whether this is a parameter itself, untouched."""
        return self.build is None and self.sources[0].lookup is None

    def queries(self, of: Mapping[str, Tensor], without: Container[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """Yield for each source but some its name and its queries carried to this view, [q, *view.shape].

        ``of`` holds the queries of every parameter, [q, *parameter.shape]. An inner product with the gradient of the
        parameter equals one of the carried query with the gradient of the view: <q, J^T g> = <J q, g>.
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
        # Forward mode by two backward ones: unlike torch.func.jvp it works for every operation that has a derivative.
        with torch.enable_grad():
            values = [source.value.to(lifted.dtype).detach() for source in self.sources]
            values[index].requires_grad_()
            made = build(*values)
            weights = torch.zeros_like(made, requires_grad=True)
            (back,) = torch.autograd.grad(made, values[index], weights, create_graph=True)
            pushed = [torch.autograd.grad(back, weights, query, retain_graph=True)[0] for query in lifted]
        return torch.stack(pushed)

    def pull_back(self, index: int, gradient: Tensor) -> Tensor:
        """Carry a gradient of this view back to the value of one of its sources, J^T g: the adjoint of `queries`."""
        if self.build is None:
            return gradient
        with torch.enable_grad():
            values = [source.value.to(gradient.dtype).detach() for source in self.sources]
            values[index].requires_grad_()
            made = self.build(*values)
        return torch.autograd.grad(made, values[index], gradient.to(made.dtype))[0]


def plain(value: Any) -> Any:
    """Replace every view inside nested arguments by its ordinary tensor."""
    return tree_map(lambda each: each.plain if isinstance(each, ParameterView) else each, value)
