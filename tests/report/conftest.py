"""The result of a demonstration, made up: pictures and tables need no training."""

from __future__ import annotations

import numpy as np
import pytest

from tikmix_fast.demo.results import ArmResult, Boundary, DemoResult
from tikmix_fast.demo.settings import DemoSettings
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix

DOMAINS = ("python", "docstrings", "noise")
TASKS = ("numpy docs", "readmes", "sums")


@pytest.fixture
def matrix() -> InfluenceMatrix:
    values = [[2.0, -1.0, 0.1], [-4.0, 1.0, np.nan]]
    errors = [[0.1, 0.1, 0.2], [0.5, 0.1, np.nan]]
    return InfluenceMatrix.from_values(values, tasks=TASKS[:2], domains=DOMAINS, stderr=errors)


@pytest.fixture
def result(matrix: InfluenceMatrix) -> DemoResult:
    settings = DemoSettings(steps=300, stages=3)
    mixtures = [(0, (1 / 3, 1 / 3, 1 / 3)), (100, (0.5, 0.45, 0.05)), (200, (0.29, 0.7, 0.01))]
    weights = [(step, dict(zip(DOMAINS, each, strict=True))) for step, each in mixtures]

    def arm(factor: float) -> ArmResult:
        losses = [(step, dict.fromkeys(TASKS, 3 - factor * step / 300)) for step in (100, 200, 300)]
        return ArmResult(losses=losses, final=losses[-1][1], weights=weights, drawn=dict.fromkeys(DOMAINS, 1600))

    ours, theirs = arm(1.0), arm(0.5)
    ours.final["sums"] = 3.0
    boundaries = [Boundary(step, matrix, mixture, "", True) for step, mixture in weights[1:]]
    return DemoResult(
        settings=settings,
        tikmix=ours,
        uniform=theirs,
        boundaries=boundaries,
        steered=TASKS[:2],
        held_out=TASKS[2:],
        sources={},
        text_bytes=dict.fromkeys(DOMAINS, 1000),
        missing={},
        seconds={"training": 1.0},
        rows={"trained per arm": 4800, "measured": 100},
    )
