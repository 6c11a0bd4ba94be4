"""Intercept the model's calls of torch's cross-entropy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F

__all__ = ["intercept_losses"]


@contextmanager
def intercept_losses(instead: Callable[..., Any]) -> Iterator[None]:
    """Call ``instead(original, *args, **kwargs)`` for ``F.cross_entropy`` and ``F.nll_loss`` inside.

    Calls from other threads, and calls by ``instead``, go to torch. Under a function mode such as
    ``torch.set_default_device``, even the original calls itself through the patched name.
    """
    thread, inside = threading.get_ident(), False
    originals = {name: getattr(F, name) for name in ("cross_entropy", "nll_loss")}

    def intercepted(original: Callable[..., Any]) -> Callable[..., Any]:
        def loss(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside or threading.get_ident() != thread:
                return original(*args, **kwargs)
            inside = True
            try:
                return instead(original, *args, **kwargs)
            finally:
                inside = False

        return loss

    try:
        for name, original in originals.items():
            setattr(F, name, intercepted(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(F, name, original)
