"""Every arm of the study, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.study.baselines.ado import ADO
from benchmarks.study.baselines.dga import DGA
from benchmarks.study.baselines.doge import DoGE
from benchmarks.study.baselines.fixed import half_and_half, natural, own_domains, uniform
from benchmarks.study.baselines.odm import ODM
from benchmarks.study.baselines.regmix import RegMix
from benchmarks.study.baselines.tikmix_d import TikmixD
from benchmarks.study.baselines.tikmix_in_run import TikmixInRun
from benchmarks.study.baselines.tikmix_m import TikmixM
from benchmarks.study.settings import StudySettings
from benchmarks.study.training import Method, Study

__all__ = ["arms"]


def arms(settings: StudySettings) -> dict[str, Callable[[Study], Method]]:
    """Return by name the function that makes each arm's method."""
    return {
        "uniform": uniform,
        "natural": natural,
        "own domains": own_domains,
        "half and half": half_and_half,
        "odm": ODM,
        "ado": ADO,
        "doge": DoGE,
        "dga": DGA,
        **{f"regmix {count}": partial(RegMix, count=count) for count in settings.proxies},
        "tikmix-d": TikmixD,
        "tikmix-d in-run": TikmixInRun,
        "tikmix-m linear": partial(TikmixM, labels="linear"),
        "tikmix-m probe": partial(TikmixM, labels="probe"),
    }
