"""One forward and backward inside a context of the engine: watch it, read the results together, and check them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tikmix_fast.influence.capture.capture import Capture
from tikmix_fast.influence.capture.captured_pass import captured_pass
from tikmix_fast.influence.capture.sink import Sink
from tikmix_fast.influence.capture.views import UncapturedParameterError
from tikmix_fast.influence.loss.loss_account import LossAccount
from tikmix_fast.influence.parallel.device_transfers import read_together
from tikmix_fast.influence.parallel.gradients import PassGradients
from tikmix_fast.influence.passes.fingerprint import Fingerprint

__all__ = ["MeasuredPass", "all_finite", "check_captured", "not_captured", "sum_of"]


class MeasuredPass:
    """Watch the weights and the loss of one pass, and read all results with one copy per device.

    Parameters
    ----------
    model : nn.Module
    parameters : mapping of str to Tensor
        The parameters that the influence covers.
    account : LossAccount
    context : str
        The engine's method, for messages.
    frozen : Fingerprint, optional
        The weights must equal these.
    since : str
        The time of ``frozen``, for messages.

    Raises
    ------
    RuntimeError
        If the weights changed, and the host knows this without waiting for the device.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        account: LossAccount,
        *,
        context: str,
        frozen: Fingerprint | None,
        since: str,
    ) -> None:
        self._model, self._parameters, self._account = model, parameters, account
        self._context, self._since = context, since
        self._capture: Capture | None = None
        self.weights = Fingerprint(parameters)
        self._changed = [] if frozen is None else self.weights.changes_since(frozen)
        if all(flag.device.type == "cpu" for flag in self._changed):
            self._refuse_changed(self._changed)
            self._changed = []

    @contextmanager
    def open(self, sink: Sink | None, *, fused: bool, take: bool, keep: bool) -> Iterator[PassGradients]:
        """Run the forward and the backward inside; the arguments are those of `captured_pass`."""
        passing = captured_pass(self._model, self._parameters, sink, fused=fused, take=take, keep=keep)
        with self._account.watch(), passing as (self._capture, gradients):
            yield gradients

    def read(
        self, gradients: Iterable[Tensor] = (), **unread: Sequence[Tensor]
    ) -> tuple[dict[str, list[Tensor]], tuple[int, ...] | None]:
        """Copy everything unread to the host, ``unread`` included, and check that the weights stayed the same.

        ``gradients`` come from the backward's streams; the current stream will read them.

        Returns
        -------
        dict of str to list of float64 Tensor
            The readings for `LossAccount.settle`, and ``unread``.
        tuple of int or None
            Leading dimensions of the model's last product.

        Raises
        ------
        RuntimeError
            If the weights changed before or inside the context.
        """
        if self._capture is None:
            raise RuntimeError("read() must follow open()")
        self._capture.streams.join(gradients)
        stepped = Fingerprint(self._parameters).changes_since(self.weights)
        readings = read_together({"changed": self._changed, "stepped": stepped, **self._account.unread(), **unread})
        self._refuse_changed(readings["changed"])
        if any(map(bool, readings["stepped"])):
            raise RuntimeError(
                f"weights changed inside {self._context}(...): step the optimizer outside; one that steps inside the "
                "backward is not supported"
            )
        return readings, self._capture.rows

    def _refuse_changed(self, flags: Sequence[Tensor]) -> None:
        if any(map(bool, flags)):
            raise RuntimeError(
                f"weights changed since {self._since}: task and domain gradients must belong to the same weights. Call "
                "engine.refresh() and measure the tasks again after every optimizer step; in-run, call run.step() "
                "after it (or allow_stale=True for domains, at your own risk)"
            )


def not_captured(names: Sequence[str]) -> UncapturedParameterError:
    """Return the error for parameters that got a gradient without being captured."""
    return UncapturedParameterError(
        f"gradients reached {', '.join(map(repr, names))} in a way that was not captured (a fused kernel, a recurrent "
        "layer, a reference kept outside the module, or a unit of fully_shard used outside its forward). Leave them "
        f"out with exclude={list(names)!r}; their influence then counts as zero"
    )


def check_captured(touched: Collection[str], captured: Collection[str]) -> None:
    """Raise unless every parameter that an ordinary backward touched was captured."""
    if not touched:
        raise RuntimeError("no gradient reached a parameter inside domains(...): run loss.backward() in it")
    missed = [name for name in touched if name not in captured]
    if missed:
        raise not_captured(missed)


def sum_of(gradient: Tensor) -> Tensor:
    """Return the sum of all entries, at least float32, on the device."""
    values = _values(gradient)
    return values.sum(dtype=torch.promote_types(values.dtype, torch.float32))


def all_finite(sums: Sequence[Tensor], gradients: Collection[Tensor]) -> bool:
    """Whether every entry of the gradients is finite, given their sums on the host.

    A finite sum proves finite entries, which is fast. Otherwise each entry is checked, because a sum may overflow.
    """
    return all(map(math.isfinite, sums)) or all(bool(torch.isfinite(_values(each)).all()) for each in gradients)


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient
