"""Learn while a language model pre-trains which data helps it, and move the data mixture accordingly.

The public names are loaded on first use, so that ``import tikmix_fast`` costs no torch, scipy or GPU initialisation.

    ops                 the kernels as functions on tensors
    InfluenceEngine     Group Influence around anybody's ``loss.backward()``
    tikmix_d            a new mixture from an influence matrix
    MixtureModel        a surrogate of what mixtures lead to, and `tikmix_m`, the search on it
    DynamicMixture      the schedule of a run: when to measure, and whether a change is worth it
    MixtureSampler      a torch sampler whose domain weights can change mid-run
    open_domain         text or tokens on disk as sequences for it
    register_rule       teach the capture an operation of your own
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tikmix_fast._version import __version__

if TYPE_CHECKING:
    from tikmix_fast import ops
    from tikmix_fast.data.domain import open_domain
    from tikmix_fast.data.sampler import MixtureSampler
    from tikmix_fast.influence.capture.rules import register_rule
    from tikmix_fast.influence.engine import InfluenceEngine
    from tikmix_fast.influence.in_run.plan import InRunPlan
    from tikmix_fast.influence.in_run.run import InRun
    from tikmix_fast.influence.in_run.staleness import Staleness
    from tikmix_fast.influence.loss.masks import shifted_mask
    from tikmix_fast.influence.preconditioners.adam import Adam
    from tikmix_fast.influence.preconditioners.ekfac import EKFAC, DiagonalFisher
    from tikmix_fast.influence.queries.projection import Projection
    from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
    from tikmix_fast.mixture.direct.tikmix_d import tikmix_d
    from tikmix_fast.mixture.result import MixtureResult
    from tikmix_fast.mixture.schedule.dynamic import DynamicMixture
    from tikmix_fast.mixture.surrogate.candidates import draw_mixtures
    from tikmix_fast.mixture.surrogate.final_choice import choose_by_labels
    from tikmix_fast.mixture.surrogate.labels import linear_labels, resampled_labels
    from tikmix_fast.mixture.surrogate.mixture_model import MixtureModel
    from tikmix_fast.mixture.surrogate.tikmix_m import tikmix_m
    from tikmix_fast.probes.probe import probe

__all__ = [
    "EKFAC",
    "Adam",
    "DiagonalFisher",
    "DynamicMixture",
    "InRun",
    "InRunPlan",
    "InfluenceEngine",
    "InfluenceMatrix",
    "MixtureModel",
    "MixtureResult",
    "MixtureSampler",
    "Projection",
    "Staleness",
    "__version__",
    "choose_by_labels",
    "draw_mixtures",
    "linear_labels",
    "open_domain",
    "ops",
    "probe",
    "register_rule",
    "resampled_labels",
    "shifted_mask",
    "tikmix_d",
    "tikmix_m",
]

_HOME = {
    "Adam": "tikmix_fast.influence.preconditioners.adam",
    "DiagonalFisher": "tikmix_fast.influence.preconditioners.ekfac",
    "DynamicMixture": "tikmix_fast.mixture.schedule.dynamic",
    "EKFAC": "tikmix_fast.influence.preconditioners.ekfac",
    "InRun": "tikmix_fast.influence.in_run.run",
    "InRunPlan": "tikmix_fast.influence.in_run.plan",
    "Staleness": "tikmix_fast.influence.in_run.staleness",
    "InfluenceEngine": "tikmix_fast.influence.engine",
    "InfluenceMatrix": "tikmix_fast.matrix.influence_matrix",
    "MixtureModel": "tikmix_fast.mixture.surrogate.mixture_model",
    "MixtureResult": "tikmix_fast.mixture.result",
    "MixtureSampler": "tikmix_fast.data.sampler",
    "Projection": "tikmix_fast.influence.queries.projection",
    "choose_by_labels": "tikmix_fast.mixture.surrogate.final_choice",
    "draw_mixtures": "tikmix_fast.mixture.surrogate.candidates",
    "linear_labels": "tikmix_fast.mixture.surrogate.labels",
    "open_domain": "tikmix_fast.data.domain",
    "probe": "tikmix_fast.probes.probe",
    "register_rule": "tikmix_fast.influence.capture.rules",
    "resampled_labels": "tikmix_fast.mixture.surrogate.labels",
    "shifted_mask": "tikmix_fast.influence.loss.masks",
    "tikmix_d": "tikmix_fast.mixture.direct.tikmix_d",
    "tikmix_m": "tikmix_fast.mixture.surrogate.tikmix_m",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("tikmix_fast.ops")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'tikmix_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
