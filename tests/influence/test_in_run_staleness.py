"""What staleness reports, against series whose truth is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from tikmix_fast.influence.in_run.staleness import StalenessHistory
from tikmix_fast.influence.preconditioners.protocol import Identity
from tikmix_fast.influence.queries.query_sketch import QuerySketch, Watched

WIDTH = 1021


def sketched(parameters):
    sketch = QuerySketch()
    watched = Watched(Identity(), sketch)
    for name, queries in parameters.items():
        assert watched.apply(name, queries) is queries
    return sketch


@pytest.mark.parametrize("shapes", [[(64, 96)], [(7,), (300, 40), (5, 3, 2)]])
def test_sketches_keep_cosines(shapes):
    generator = torch.Generator().manual_seed(0)
    parts = {f"p{k}": torch.randn(2, *shape, generator=generator) for k, shape in enumerate(shapes)}
    for queries in parts.values():
        queries[1] = 0.6 * queries[0] + 0.8 * queries[1]
    exact = torch.cat([each.flatten(1) for each in parts.values()], dim=1).double()
    found, _ = sketched(parts).by_task(2, [0, 1], [1.0, 1.0])
    assert found.shape == (2, WIDTH)
    lengths = exact.norm(dim=1)
    for i in range(2):
        for j in range(2):
            error = found[i] @ found[j] / float(lengths[i] * lengths[j]) - float(exact[i] @ exact[j]) / float(
                lengths[i] * lengths[j]
            )
            assert abs(error) < 4 * math.sqrt(2 / WIDTH)


def test_sketches_are_unbiased_even_for_constant_gradients():
    found = []
    for seed in range(300):
        sketch = sketched({f"name{seed}": torch.ones(1, 40, 96)})
        whole, _ = sketch.by_task(1, [0], [1.0])
        found.append((whole**2).sum() / (40 * 96))
    assert np.mean(found) == pytest.approx(1, abs=4 * math.sqrt(2 / WIDTH / 300) + 1e-3)
    assert np.std(found) < 2 * math.sqrt(2 / WIDTH)


def test_share_that_is_not_noise():
    generator, signal = torch.Generator().manual_seed(1), torch.zeros(20_000)
    signal[:5000] = 1.0
    # Two splits, with noise of the same length as the signal each: half of it is left in their mean.
    shares = []
    for _ in range(20):
        noise = 0.5 * torch.randn(2, 20_000, generator=generator)
        sketch = sketched({"weight": signal + noise})
        shares.append(sketch.by_task(1, [0, 0], [0.5, 0.5])[1][0])
    assert np.mean(shares) == pytest.approx(1 / 1.5, abs=0.03)
    assert np.isnan(sketched({"weight": signal[None]}).by_task(1, [0], [1.0])[1]).all()


def series(steps, gap, persistence, noise, staying=0.0, n=2, m=12, seed=0):
    """A matrix that forgets at a known rate, measured with noise; queries that turn at the same rate."""
    random, record = np.random.default_rng(seed), StalenessHistory(n)
    constant, moving = staying * random.normal(size=(n, m)), random.normal(size=(n, m))
    direction = random.normal(size=(n, WIDTH))
    keep = persistence**gap
    for at in range(steps):
        tokens = random.integers(5, 20, size=m).astype(float)
        values = constant + moving + noise * random.normal(size=(n, m))
        observed = direction + noise * random.normal(size=(n, WIDTH))
        signal = np.full(n, 1 / (1 + noise**2))
        record.add(at * gap, observed, signal, values * tokens, tokens)
        moving = keep * moving + math.sqrt(1 - keep**2) * random.normal(size=(n, m))
        direction = keep * direction + math.sqrt(1 - keep**2) * random.normal(size=(n, WIDTH))
    return record


def test_cosines_by_lag():
    found = series(60, 5, persistence=0.95, noise=1.0).report(5)
    assert [lag.steps for lag in found.queries] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert found.query_ceiling == pytest.approx(0.5)
    for lag in found.queries:
        assert lag.agreement == pytest.approx(0.5 * 0.95**lag.steps, abs=0.03)
    assert "task gradients 5 steps apart: cosine 0.3" in str(found)
    assert "(noise ceiling 0.50; 59 pairs)" in str(found)


def test_ranks_agree_up_to_the_ceiling_where_nothing_moves():
    found = series(64, 5, persistence=1.0, noise=2.0, m=40, n=4).report(5)
    assert found.window == 8
    assert [lag.steps for lag in found.influence] == [40 * many for many in range(1, 8)]
    assert sum(lag.pairs for lag in found.influence) == 28
    mean = np.average([lag.agreement for lag in found.influence], weights=[lag.pairs for lag in found.influence])
    # Signal 1, noise 2 over the root of 8 measured steps: a correlation of 2 / 3, of ranks a little less.
    assert mean == pytest.approx(found.influence_ceiling, abs=0.06)
    assert mean == pytest.approx(2 / 3, abs=0.08)


def test_ranks_disagree_where_s_moved():
    found = series(64, 5, persistence=0.98, noise=0.3, m=40, n=4).report(5)
    assert found.influence_ceiling > 0.9
    assert found.influence[0].agreement > found.influence[2].agreement
    assert abs(found.influence[-1].agreement) < 0.4


@pytest.mark.parametrize("noise", [0.5, 2.0, 5.0])
def test_time_constant_is_about_the_best_one(noise):
    gap, persistence, steps = 5, 0.995, 250
    found = series(steps, gap, persistence, noise, m=40, n=4, seed=3).report(gap).time_constant
    ages = gap * np.arange(steps)

    def error(constant):
        weights = np.exp(-ages / constant)
        weights /= weights.sum()
        between = persistence ** np.abs(ages[:, None] - ages)
        return 1 + weights @ between @ weights + noise**2 * (weights**2).sum() - 2 * weights @ persistence**ages

    best = min(error(constant) for constant in gap * 1.1 ** np.arange(100))
    assert found is not None
    assert error(found) < 1.15 * best
    assert error(1.0) > 1.15 * best or noise == 0.5, "the last one alone must not do"


def test_time_constant_is_long_where_nothing_moves_and_unknown_at_first():
    assert series(100, 5, persistence=1.0, noise=1.0).report(5).time_constant == math.inf
    early = series(4, 5, persistence=1.0, noise=1.0).report(5)
    assert early.time_constant is None
    assert early.influence == ()
    assert "too few" in str(early)


def test_domains_that_steps_lack_are_left_out():
    record, random = StalenessHistory(1), np.random.default_rng(0)
    truth = np.arange(5.0)
    for at in range(40):
        tokens = np.where(np.arange(5) == at % 5, 0.0, 10.0)
        record.add(at, random.normal(size=(1, WIDTH)), np.array([np.nan]), (truth * tokens)[None], tokens)
    found = record.report(1)
    assert [lag.agreement for lag in found.influence] == pytest.approx([1.0] * len(found.influence))
    assert math.isnan(found.query_ceiling)


def test_state_round_trip_and_bounds():
    record = series(300, 2, persistence=0.9, noise=1.0)
    state = json.loads(json.dumps(record.to_dict()))
    again = StalenessHistory.from_dict(state, 2)
    assert again.report(2) == record.report(2)
    assert len(state["influence"]) == 256
    assert len(state["sketches"]) == 8
    for broken in ({}, None, {**state, "sketches": [[0, [[1.0]]]]}, {**state, "influence": [[0, [[1.0]], [1.0]]]}):
        with pytest.raises(ValueError, match="staleness"):
            StalenessHistory.from_dict(broken, 2)


def test_the_same_parameter_gets_the_same_signs_every_time():
    weight = nn.Linear(30, 20).weight.detach()[None]
    first, second = (sketched({"layer.weight": weight}).by_task(1, [0], [1.0])[0] for _ in range(2))
    assert (first == second).all()
    other = sketched({"layer.bias": weight}).by_task(1, [0], [1.0])[0]
    assert not np.allclose(first, other)
