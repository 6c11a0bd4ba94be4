"""Mixtures without a measurement."""

from __future__ import annotations

import numpy as np

from benchmarks.study.training import Array, Method, Study

__all__ = ["half_and_half", "natural", "own_domains", "uniform"]


def natural(study: Study) -> Method:
    """Draw every domain in proportion to its text."""
    return Method(study.problem.natural)


def uniform(study: Study) -> Method:
    """Draw every domain equally often."""
    return Method(study.uniform)


def own_domains(study: Study) -> Method:
    """Draw only domains of the same kind of text as a steered task, equally often."""
    return Method(_own(study))


def half_and_half(study: Study) -> Method:
    """Draw half from the tasks' own domains, half from all."""
    return Method((_own(study) + study.uniform) / 2)


def _own(study: Study) -> Array:
    chosen = np.array([name in study.problem.own for name in study.problem.domains], dtype=np.float64)
    return np.asarray(chosen / chosen.sum())
