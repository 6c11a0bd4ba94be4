"""Replace the parameters of a model by views while one micro-batch runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tikmix_fast.influence.capture.rules import apply_rule, product_rows
from tikmix_fast.influence.capture.sink import Sink
from tikmix_fast.influence.capture.views import ParameterView, Source, plain
from tikmix_fast.influence.parallel.device_transfers import PassStreams
from tikmix_fast.influence.parallel.fully_sharded import is_sharded, units
from tikmix_fast.influence.torch_private import in_backward, run_compiled_as_written

__all__ = ["Capture"]


class Capture:
    """Show views instead of a model's parameters while one micro-batch runs forward and backward.

    Parameters
    ----------
    model : nn.Module
    parameters : mapping of str to Tensor
        The parameters to capture, by name. Others stay as they are.
    sink : Sink or None
        Gets the rows and gradients; None: only `rows` and `streams` are noted.
    fused : bool
        Whether a linear layer's weight gradient comes from the sink's own pass.
    watch : callable (name, parameter), optional
        Called for every parameter when its view is shown; for a sharded one each time that it becomes whole.

    Attributes
    ----------
    rows : tuple of int or None
        Leading dimensions of the last product in the forward, which are those of the logits.
    streams : PassStreams
        The CUDA streams of the forward's products.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        sink: Sink | None,
        fused: bool,
        watch: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        self.fused = fused
        self.rows: tuple[int, ...] | None = None
        self.streams = PassStreams()
        self._model = model
        self._parameters = parameters
        self._sink = sink
        self._watch = watch
        self._open = False

    @property
    def sink(self) -> Sink:
        """The sink.

        Raises
        ------
        RuntimeError
            If the capture has none.
        """
        if self._sink is None:
            raise RuntimeError("a capture that only observes has no sink")
        return self._sink

    @contextmanager
    def open(self) -> Iterator[Capture]:
        """Show views instead of the parameters inside; the modules are restored afterwards, even after an error."""
        places = self._places()
        views: dict[str, ParameterView] = {}

        def show(some: list[tuple[nn.Module, str, str]]) -> None:
            for module, attribute, name in some:
                parameter = module._parameters[attribute]
                if parameter is None or is_sharded(parameter):
                    continue
                if name not in views or views[name].plain is not parameter:
                    views[name] = ParameterView.make(parameter, self, (Source(name, parameter.detach()),))
                    if self._watch is not None:
                        self._watch(name, parameter)
                # An entry in the module's own dictionary hides the parameter of that name. The parameter, its hooks
                # and the state dict stay unchanged.
                vars(module)[attribute] = views[name]

        with ExitStack() as stack:
            stack.callback(self._close, places)
            show(places)
            for unit in units(self._model):
                # The hook of fully_shard runs before this one and makes the parameters whole, also in a recomputation.
                inside = set(unit.modules())
                own = [place for place in places if place[0] in inside]
                stack.callback(unit.register_forward_pre_hook(lambda _module, _args, own=own: show(own)).remove)
            self._open = True
            with run_compiled_as_written():
                yield self

    def _places(self) -> list[tuple[nn.Module, str, str]]:
        """Return every place of a parameter: the module, the attribute, and the parameter's name."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        return [
            (module, attribute, names[id(parameter)])
            for module in self._model.modules()
            for attribute, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in names and attribute not in vars(module)
        ]

    def _close(self, places: list[tuple[nn.Module, str, str]]) -> None:
        self._open = False
        if self._sink is not None:
            self._sink.close()
        for module, attribute, _ in places:
            if isinstance(vars(module).get(attribute), ParameterView):
                del vars(module)[attribute]

    def handle(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a torch function that got a view."""
        rows = product_rows(func, args, kwargs) if self._open and not in_backward() else None
        if rows is not None:
            self.rows = tuple(rows.shape[:-1])
            self.streams.note(rows)
        if not self._open or self._sink is None or not torch.is_grad_enabled():
            return func(*plain(args), **plain(kwargs))
        return apply_rule(self, func, args, kwargs)
