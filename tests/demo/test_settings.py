"""Settings of the demonstration: what follows from them, their file form, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tikmix_fast.demo.settings import DemoSettings


def test_boundaries_cut_the_training_into_equal_stages() -> None:
    assert DemoSettings(steps=1000, stages=5).boundaries == (200, 400, 600, 800)
    assert DemoSettings(steps=10, stages=3).boundaries == (3, 6)


def test_the_last_step_is_evaluated_once() -> None:
    assert DemoSettings(steps=300, evaluate_every=100).evaluations == (100, 200, 300)
    assert DemoSettings(steps=250, evaluate_every=100).evaluations == (100, 200, 250)


def test_settings_survive_their_file_form(settings: DemoSettings) -> None:
    assert DemoSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed must be an int of at least 0"),
        ({"stages": 1}, "stages must be an int of at least 2"),
        ({"steps": 2, "stages": 3}, "steps must be at least the number of stages, 3"),
        ({"batch": 0}, "batch must be an int of at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"diversity": -0.1}, "diversity must not be negative"),
        ({"diversity": float("nan")}, "diversity must not be negative"),
        ({"smoothing": 1.0}, r"smoothing must lie in \[0, 1\)"),
        ({"preconditioner": "newton"}, "preconditioner must be one of 'adam', 'identity'"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: DemoSettings, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(settings, **change)
