"""A run that is interrupted between two micro-batches ends with the same matrix, bit for bit."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tikmix_fast import InfluenceEngine, InfluenceMatrix, Projection

TASKS, DOMAINS = ["qa", "fix"], ["web", "code", "books"]
BATCHES = 7


def make(projection: Projection | None = None) -> InfluenceEngine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 24), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 11))
    return InfluenceEngine(model, DOMAINS, TASKS, "identity", projection=projection, task_splits=3, batch_dim=0)


def batch(seed: int, rows: int = 4, length: int = 5) -> torch.Tensor:
    return torch.randint(11, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss(engine: InfluenceEngine, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(engine.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def measure_tasks(engine: InfluenceEngine, length: int = 5) -> None:
    for task, name in enumerate(TASKS):
        for index in range(4):
            with engine.task(name):
                loss(engine, batch(100 * task + index, length=length + index)).backward()


def measure_domains(engine: InfluenceEngine, indices: range) -> None:
    for index in indices:
        ids = torch.tensor([index % 3, (index + 1) % 3, 0, 1])
        with engine.domains(ids):
            loss(engine, batch(1000 + index)).backward()


def content(matrix: InfluenceMatrix) -> dict[str, Any]:
    return matrix.to_dict()


@pytest.mark.parametrize("projection", [None, Projection(dim=4, kind="rademacher")], ids=["exact", "projected"])
@pytest.mark.parametrize("stops", [[3], [1, 2, 5]], ids=["once", "thrice"])
@pytest.mark.parametrize("earlier_round", [False, True], ids=["first-round", "second-round"])
def test_the_matrix_is_that_of_an_uninterrupted_run(
    projection: Projection | None, stops: list[int], earlier_round: bool
) -> None:
    def begin() -> InfluenceEngine:
        engine = make(projection)
        if earlier_round:
            measure_tasks(engine, length=6)
            measure_domains(engine, range(100, 104))
            engine.refresh()
        return engine

    whole = begin()
    measure_tasks(whole)
    measure_domains(whole, range(BATCHES))

    engine = begin()
    for start, end in zip([0, *stops], [*stops, BATCHES], strict=True):
        measure_tasks(engine)
        measure_domains(engine, range(start, end))
        state = engine.state_dict(within_round=True)
        tensors = state.pop("projected", {})
        assert bool(tensors) == (projection is not None)
        before = engine.matrix()
        engine = make(projection)
        engine.load_state_dict({**json.loads(json.dumps(state)), "projected": tensors})
        np.testing.assert_array_equal(engine.matrix().values, before.values)
        np.testing.assert_array_equal(engine.matrix().stderr_task, before.stderr_task)
    measure_tasks(engine)
    measure_domains(engine, range(BATCHES, BATCHES + 1))
    measure_domains(whole, range(BATCHES, BATCHES + 1))
    assert content(engine.matrix()) == content(whole.matrix())
    assert np.isfinite(whole.matrix().stderr).all()


def test_a_state_that_closes_the_round_would_not_do() -> None:
    """The tasks would count as measured twice, independently: why there is within_round."""
    whole, engine = make(), make()
    for each in (whole, engine):
        measure_tasks(each)
        measure_domains(each, range(3))
    state = engine.state_dict()
    engine = make()
    engine.load_state_dict(state)
    measure_tasks(engine)
    for each in (whole, engine):
        measure_domains(each, range(3, BATCHES))
    np.testing.assert_array_equal(engine.matrix().values, whole.matrix().values)
    assert not np.array_equal(engine.matrix().stderr_task, whole.matrix().stderr_task)


def test_other_batches_of_the_tasks_are_refused_and_refresh_takes_them() -> None:
    engine = make()
    measure_tasks(engine)
    measure_domains(engine, range(3))
    state = engine.state_dict(within_round=True)
    engine = make()
    engine.load_state_dict(state)
    for name in TASKS:
        with engine.task(name):
            loss(engine, batch(0)).backward()
    for _ in range(2):  # and again: nothing is half begun
        with pytest.raises((ValueError, RuntimeError), match=r"same batches|tasks come first"):
            measure_domains(engine, range(1))
    engine.refresh()
    measure_tasks(engine)
    measure_domains(engine, range(3, BATCHES))
    assert engine.matrix().microbatches.sum() > 0


def test_the_projections_own_error_is_that_of_the_state_until_the_tasks_are_measured_again() -> None:
    engine = make(Projection(dim=4, kind="rademacher"))
    measure_tasks(engine)
    measure_domains(engine, range(3))
    state, before = engine.state_dict(within_round=True), engine.matrix().stderr_projection
    assert before is not None
    assert (before > 0).all()

    def loaded(state: Any) -> InfluenceEngine:
        other = make(Projection(dim=4, kind="rademacher"))
        other.load_state_dict(state)
        return other

    assert (loaded(state).matrix().stderr_projection == before).all()
    assert (loaded(loaded(state).state_dict(within_round=True)).matrix().stderr_projection == before).all()
    closed = loaded(state)
    closed.refresh()
    assert closed.matrix().stderr_projection == pytest.approx(before)
    forgotten = loaded(state)
    forgotten.refresh(keep=0)
    measure_tasks(forgotten)
    measure_domains(forgotten, range(3))
    assert np.isfinite(np.asarray(forgotten.matrix().stderr_projection)).all()
    gone_on = loaded(state)
    measure_tasks(gone_on)
    measure_domains(gone_on, range(3, 4))
    assert np.isfinite(np.asarray(gone_on.matrix().stderr_projection)).all()
    damaged = {name: each for name, each in state.items() if name != "projection_variance_so_far"}
    with pytest.raises(ValueError, match="projection_variance_so_far"):
        loaded(damaged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["estimator"]["round"].pop("sum"), "round"),
        (lambda state: state["estimator"]["round"].update(owners=[0, 0, 0, 1, 1, 2]), "owners"),
        (lambda state: state["estimator"]["round"].update(tokens=[1.0]), "tokens"),
        (lambda state: state["estimator"]["round"].update(task_cross=[[0.0]]), "task_cross"),
        (lambda state: state.update(projected={"nowhere": torch.zeros(2)}), "projected"),
        (lambda state: state.update(projected={"1.weight": [0.0]}), "projected"),
    ],
)
def test_a_damaged_state_changes_nothing(change: Any, message: str) -> None:
    engine = make()
    measure_tasks(engine)
    measure_domains(engine, range(3))
    state = engine.state_dict(within_round=True)
    change(state)
    other = make()
    before = json.dumps(other.state_dict())
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert json.dumps(other.state_dict()) == before
