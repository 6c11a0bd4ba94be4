"""The study beside the package, and a problem for it that is small enough for a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.study.problem import Problem
from benchmarks.study.settings import SETTINGS, StudySettings
from benchmarks.study.training import Study
from tikmix_fast.demo.corpora import Corpora, Task


@pytest.fixture(scope="session")
def tiny() -> StudySettings:
    return SETTINGS["tiny"]


@pytest.fixture(scope="session")
def problem(tiny: StudySettings) -> Problem:
    """Words of two kinds and noise, under the names of the built-in corpora."""
    random = np.random.default_rng(0)

    def words(vocabulary: str, count: int) -> np.ndarray:
        return np.frombuffer(" ".join(random.choice(vocabulary.split(), count)).encode(), dtype=np.uint8)

    prose, code = "the cat sat mat on a and dog ran", "def x=1; (y) if: == {} [0] +="
    return Problem.of(
        Corpora(
            domains={
                "python": words(code, 1500),
                "docstrings": words(prose, 4000),
                "noise": random.integers(0, 256, 9000).astype(np.uint8),
            },
            tasks={
                "numpy docs": Task(True, words(prose, 400), words(prose, 400)),
                "fonttools": Task(True, words(code, 400), words(code, 400)),
                "sums": Task(False, words(prose + " 1 2 3", 400), words(prose + " 1 2 3", 400)),
            },
            sources={},
            missing={},
        ),
        tiny,
    )


@pytest.fixture
def make_study(tiny: StudySettings, problem: Problem, tmp_path: Path) -> Callable[..., Study]:
    def make(seed: int = 0, settings: StudySettings = tiny) -> Study:
        return Study(settings, problem, seed, tmp_path)

    return make
