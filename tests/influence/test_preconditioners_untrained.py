"""Adam where elements were never trained: what carries S is told, and a floor of one's own takes it away."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import nn

from tikmix_fast import InfluenceEngine
from tikmix_fast.influence.preconditioners.adam import Adam

EPS = 1e-8


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(6, 4), nn.Linear(4, 1)

    def forward(self, ids):
        return self.out(torch.tanh(self.table(ids)).sum(1)).square().mean()


def trained(rows=(0, 1, 2), steps=1):
    torch.manual_seed(0)
    model = Bag()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=EPS)
    for _ in range(steps):
        model(torch.tensor([list(rows)])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def measure(model, optimizer, preconditioner, task_ids, domain_ids):
    engine = InfluenceEngine(model, ["web"], ["qa"], preconditioner, optimizer, check_every=0)
    for ids in task_ids:
        with engine.task("qa"):
            model(torch.tensor([ids])).backward()
    for ids in domain_ids:
        with engine.domains("web"):
            model(torch.tensor([ids])).backward()
    model.zero_grad()
    return engine.matrix()


def by_hand(model, optimizer, floor, task_ids, domain_ids):
    """Influence in numpy, from v itself."""

    def mean(batches):
        found = [torch.autograd.grad(model(torch.tensor([ids])), list(model.parameters())) for ids in batches]
        return [np.mean([each.double().numpy() for each in parts], axis=0) for parts in zip(*found, strict=True)]

    total = 0.0
    for parameter, q, g in zip(model.parameters(), mean(task_ids), mean(domain_ids), strict=True):
        state = optimizer.state[parameter]
        root = np.sqrt(state["exp_avg_sq"].double().numpy() / (1 - 0.999 ** float(state["step"])))
        positive = np.sort(root[root > 0])
        root = np.maximum(root, floor * positive[(len(positive) - 1) // 2])
        total += (q * g / (root + EPS)).sum()
    return total


@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_influence_is_that_of_the_formula(floor):
    model, optimizer = trained()
    batches = [[0, 1, 5], [1, 2, 5]], [[0, 2, 5]]
    matrix = measure(model, optimizer, Adam(floor=floor), *batches)
    assert matrix.values[0, 0] == pytest.approx(by_hand(model, optimizer, floor, *batches), rel=1e-5)
    assert matrix.settings["preconditioner"] == ("adam" if floor == 0 else f"adam, floor {floor:g}")


def warned(caplog):
    return [each.getMessage() for each in caplog.records if "never trained" in each.getMessage()]


@pytest.mark.parametrize(
    ("rows", "preconditioner", "tasks", "expected"),
    [
        ((0, 1, 2), "adam", [[0, 1, 5], [1, 2, 5]], True),  # both splits meet row 5, which has no v
        ((0, 1, 2), "adam", [[0, 1, 5]], True),
        ((0, 1, 2), "adam", [[0, 1, 5], [1, 2, 4]], False),  # each another row: they share none
        ((0, 1, 2), "adam", [[0, 1, 2], [1, 2, 0]], False),  # there are such rows, and nobody meets them
        ((0, 1, 2), Adam(floor=1.0), [[0, 1, 5], [1, 2, 5]], False),
        ((0, 1, 2, 3, 4, 5), "adam", [[0, 1, 5], [1, 2, 5]], False),
    ],
)
def test_a_warning_where_they_carry_most_of_it(caplog, rows, preconditioner, tasks, expected):
    model, optimizer = trained(rows)
    with caplog.at_level(logging.WARNING, logger="tikmix_fast"):
        measure(model, optimizer, preconditioner, tasks, [[0, 1, 2]])
    found = warned(caplog)
    assert len(found) == expected
    assert not expected or "carry 100% of the influence" in found[0]


def test_it_is_told_again_after_every_refresh_and_not_more_often(caplog):
    model, optimizer = trained()
    engine = InfluenceEngine(model, ["web"], ["qa"], "adam", optimizer, check_every=0)
    with caplog.at_level(logging.WARNING, logger="tikmix_fast"):
        for count in (1, 2):
            for ids in ([[0, 1, 5]], [[1, 2, 5]]):
                with engine.task("qa"):
                    model(torch.tensor(ids)).backward()
            for _ in range(3):
                with engine.domains("web"):
                    model(torch.tensor([[0, 1, 2]])).backward()
            assert len(warned(caplog)) == count
            engine.refresh()


def test_a_floor_is_no_other_engines_state():
    model, optimizer = trained()
    with_floor = InfluenceEngine(model, ["web"], ["qa"], Adam(floor=0.5), optimizer)
    without = InfluenceEngine(model, ["web"], ["qa"], "adam", optimizer)
    with pytest.raises(ValueError, match=r"state 'preconditioner' must be 'adam'; got 'adam, floor 0\.5'"):
        without.load_state_dict(with_floor.state_dict())


@pytest.mark.parametrize("floor", [-0.1, float("nan"), float("inf"), "median"])
def test_bad_floors(floor):
    with pytest.raises(ValueError, match="floor must be a finite number of at least 0"):
        Adam(floor=floor)


def test_a_parameter_without_any_trained_element():
    model, optimizer = trained()
    optimizer.state[model.table.weight]["exp_avg_sq"].zero_()
    adam = Adam(floor=1.0)
    adam.prepare(dict(model.named_parameters()), optimizer)
    assert torch.equal(adam.apply("table.weight", torch.ones(1, 6, 4)), torch.full((1, 6, 4), 1 / EPS))
