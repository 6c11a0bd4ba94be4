"""While a capture is open, the parameters of a model are seen as views that record their influence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tikmix_fast.influence.capture import rules
from tikmix_fast.influence.capture.views import ParameterView, Source, plain
from tikmix_fast.influence.parallel.fully_sharded import is_sharded, units
from tikmix_fast.influence.parallel.transfers import PassStreams
from tikmix_fast.influence.passes.recorder import Recorder

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
    watch : callable (name, parameter), optional
        Told of every parameter that is shown, when a sharded one has become whole too.

    Attributes
    ----------
    rows : tuple of int or None
        Leading dimensions of the last product in the forward: the shape of the positions that have logits.
    streams : PassStreams
        The CUDA streams of the forward's products.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        recorder: Recorder | None,
        fused: bool,
        watch: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        self.fused = fused
        self.rows: tuple[int, ...] | None = None
        self.streams = PassStreams()
        self._model = model
        self._parameters = parameters
        self._recorder = recorder
        self._watch = watch
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
                # An entry of the instance's own dictionary hides the parameter of that name without touching it, its
                # hooks, or the state dict.
                vars(module)[attribute] = views[name]

        with ExitStack() as stack:
            stack.callback(self._close, places)
            show(places)
            for unit in units(self._model):
                # Its parameters become whole before this, in the hook of fully_shard itself; also in a recomputation.
                inside = set(unit.modules())
                own = [place for place in places if place[0] in inside]
                stack.callback(unit.register_forward_pre_hook(lambda _module, _args, own=own: show(own)).remove)
            self._open = True
            with _eager():
                yield self

    def _places(self) -> list[tuple[nn.Module, str, str]]:
        """Return where the parameters stand: the module, its attribute, and the parameter's name."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        return [
            (module, attribute, names[id(parameter)])
            for module in self._model.modules()
            for attribute, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in names and attribute not in vars(module)
        ]

    def _close(self, places: list[tuple[nn.Module, str, str]]) -> None:
        self._open = False
        if self._recorder is not None:
            self._recorder.close()
        for module, attribute, _ in places:
            if isinstance(vars(module).get(attribute), ParameterView):
                del vars(module)[attribute]

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
