"""What every pass needs: its gradients are followed, and views replace the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from tikmix_fast.influence.capture.capture import Capture
from tikmix_fast.influence.capture.sink import Sink
from tikmix_fast.influence.parallel.gradients import PassGradients

__all__ = ["captured_pass"]


@contextmanager
def captured_pass(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    sink: Sink | None,
    *,
    fused: bool,
    take: bool = True,
    keep: bool = True,
) -> Iterator[tuple[Capture, PassGradients]]:
    """Run one forward and backward inside.

    Parameters
    ----------
    model : nn.Module
    parameters : mapping of str to Tensor
        The parameters to capture.
    sink : Sink or None
        As in `Capture`.
    fused : bool
        Whether a linear layer's weight gradient comes from the sink's own pass.
    take, keep : bool
        As in `PassGradients`.
    """
    gradients = PassGradients(model, parameters, take=take, keep=keep)
    capture = Capture(model, parameters, sink, fused, watch=gradients.watch)
    with gradients.open(), capture.open():
        yield capture, gradients
