"""Two real kinds of text and noise, small enough for a training run in a test."""

from __future__ import annotations

import numpy as np
import pytest

from tikmix_fast.data.corpora import Corpora, Task
from tikmix_fast.training.gpt import GPTSettings
from tikmix_fast.training.settings import DemoSettings


@pytest.fixture
def corpora() -> Corpora:
    random = np.random.default_rng(0)

    def words(vocabulary: list[str], count: int) -> np.ndarray:
        return np.frombuffer(" ".join(random.choice(vocabulary, count)).encode(), dtype=np.uint8)

    prose = ["the", "cat", "sat", "mat", "on", "a", "and", "dog", "ran"]
    code = ["def", "x=1;", "(y)", "if:", "==", "{}", "[0]", "+="]
    noise = random.integers(0, 256, 4000).astype(np.uint8)
    return Corpora(
        domains={"prose": words(prose, 1500), "code": words(code, 1500), "noise": noise},
        tasks={
            "prose": Task(True, words(prose, 400), words(prose, 400)),
            "code": Task(False, words(code, 400), words(code, 400)),
        },
        sources={"prose": "made up", "code": "made up", "noise": "random"},
        missing={},
    )


@pytest.fixture
def settings() -> DemoSettings:
    return DemoSettings(
        steps=24,
        stages=3,
        batch=4,
        model=GPTSettings(layers=1, heads=2, width=16, length=16),
        learning_rate=1e-2,
        warm_up=4,
        task_batches=4,
        task_rows=3,
        domain_batches=6,
        domain_rows=2,
        task_splits=2,
        evaluate_every=8,
        curve_rows=8,
    )
