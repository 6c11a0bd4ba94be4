"""While a capture is open, the parameters of a model are seen as views that record their influence."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tikmix_fast.influence import rules
from tikmix_fast.influence.recorder import Recorder
from tikmix_fast.influence.transfers import PassStreams
from tikmix_fast.influence.views import ParameterView, Source, plain

__all__ = ["Capture"]


class Capture:
    """Stand in for the parameters of a model while one micro-batch runs forward and backward.

    Parameters
    ----------
    model : nn.Module
    parameters : mapping of str to Tensor
        The parameters to capture, by name. Others are left alone.
    recorder : Recorder or None
        Where inner products go; None only observes the shape of the rows.
    fused : bool
        Whether a linear layer's weight gradient comes from the kernel's own pass.

    Attributes
    ----------
    rows : tuple of int or None
        Leading dimensions of the last product in the forward: the shape of the positions that have logits.
    streams : PassStreams
        The CUDA streams of the forward's products.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, Tensor], recorder: Recorder | None, fused: bool
    ) -> None:
        self.fused = fused
        self.rows: tuple[int, ...] | None = None
        self.streams = PassStreams()
        self._model = model
        self._parameters = parameters
        self._recorder = recorder
        self._open = False

    @property
    def recorder(self) -> Recorder:
        """Where inner products go."""
        if self._recorder is None:
            raise RuntimeError("a capture that only observes has no recorder")
        return self._recorder

    @contextmanager
    def open(self) -> Iterator[Capture]:
        """Show views in place of the parameters; whatever happens inside, the modules are as before afterwards."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        views: dict[str, ParameterView] = {}
        shadowed: list[tuple[dict[str, Any], str]] = []
        try:
            for module in self._model.modules():
                for attribute, parameter in module._parameters.items():
                    name = names.get(id(parameter))
                    # An entry of the instance's own dictionary hides the parameter of that name without touching it,
                    # its hooks, or the state dict.
                    if parameter is not None and name is not None and attribute not in vars(module):
                        if name not in views:
                            views[name] = ParameterView.make(parameter, self, (Source(name, parameter.detach()),))
                        vars(module)[attribute] = views[name]
                        shadowed.append((vars(module), attribute))
            self._open = True
            with _eager():
                yield self
        finally:
            self._open = False
            if self._recorder is not None:
                self._recorder.close()
            for dictionary, attribute in shadowed:
                if isinstance(dictionary.get(attribute), ParameterView):
                    del dictionary[attribute]

    def handle(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a torch function that met a view."""
        if self._open and func in _PRODUCTS and torch._C._current_graph_task_id() == -1:
            place, name = (1, "mat1") if func is torch.addmm else (0, "input")
            rows = args[place] if len(args) > place else kwargs[name]
            self.rows = tuple(rows.shape[:-1])
            self.streams.note(rows)
        if not self._open or self._recorder is None or not torch.is_grad_enabled():
            return func(*plain(args), **plain(kwargs))
        return rules.apply_rule(self, func, args, kwargs)

    def settle(self, value: Any, func: Any) -> Any:
        """Take ``value`` as data: a view among rows starts to record here, anything else stays what it is."""
        return rules.settle_view(self, value, func) if isinstance(value, ParameterView) else value

    def spread(self, view: ParameterView, shape: torch.Size) -> Tensor:
        """Broadcast a view to ``shape``, recording every copy."""
        return rules.spread_view(self, view, shape)


_PRODUCTS = frozenset(
    (torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.addmm)
)


def _eager() -> AbstractContextManager[Any]:
    """Run compiled models as written: a compiled graph has the ordinary parameters built in.

    Where nothing was compiled in this process, torch's compiler is not even imported.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
