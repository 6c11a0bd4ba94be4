"""Learn while a language model pre-trains which data helps it, and move the data mixture accordingly.

The public names are loaded on first use, so that ``import tikmix_fast`` costs no torch, scipy or GPU initialisation.

    ops                 the kernels as functions on tensors
    InfluenceEngine     Group Influence around anybody's ``loss.backward()``
    tikmix_d            a new mixture from an influence matrix
    MixtureSampler      a torch sampler whose domain weights can change mid-run
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tikmix_fast._version import __version__

if TYPE_CHECKING:
    from tikmix_fast import ops
    from tikmix_fast.data.sampler import MixtureSampler
    from tikmix_fast.influence.ekfac import EKFAC, DiagonalFisher
    from tikmix_fast.influence.engine import InfluenceEngine
    from tikmix_fast.influence.masks import shifted_mask
    from tikmix_fast.influence.matrix import InfluenceMatrix
    from tikmix_fast.influence.projection import Projection
    from tikmix_fast.mixture.result import MixtureResult
    from tikmix_fast.mixture.tikmix_d import tikmix_d

__all__ = [
    "EKFAC",
    "DiagonalFisher",
    "InfluenceEngine",
    "InfluenceMatrix",
    "MixtureResult",
    "MixtureSampler",
    "Projection",
    "__version__",
    "ops",
    "shifted_mask",
    "tikmix_d",
]

_HOME = {
    "EKFAC": "tikmix_fast.influence.ekfac",
    "DiagonalFisher": "tikmix_fast.influence.ekfac",
    "InfluenceEngine": "tikmix_fast.influence.engine",
    "InfluenceMatrix": "tikmix_fast.influence.matrix",
    "MixtureResult": "tikmix_fast.mixture.result",
    "MixtureSampler": "tikmix_fast.data.sampler",
    "Projection": "tikmix_fast.influence.projection",
    "shifted_mask": "tikmix_fast.influence.masks",
    "tikmix_d": "tikmix_fast.mixture.tikmix_d",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("tikmix_fast.ops")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'tikmix_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
