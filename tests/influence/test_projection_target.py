"""The size of a projection that a target asks for, and the error that it has."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tikmix_fast import InfluenceEngine, InfluenceMatrix, Projection
from tikmix_fast.influence.queries.projection import expected_error

WIDTH = 300
KINDS = ("countsketch", "rademacher", "gaussian")


def exact_spread(q, g, dim):
    """Standard deviation over Gaussian matrices, of unit gradients; the formula of kernels.md 3."""
    s, n = (q * g).sum(), q.square().sum() * g.square().sum()
    p, r = (q.T @ g).square().sum(), (q @ g.T).square().sum()
    t = (q @ g.T @ q @ g.T).trace()
    return float((p * (1 + 1 / dim) + n / dim + t + (r + s**2) / dim + r + t).div(dim).div(n).sqrt())


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_the_formula(dim, rank):
    # Directions of equal strength: the same gradient twice.
    q = torch.diag(torch.ones(rank, dtype=torch.float64))
    spread = exact_spread(q, q, dim)
    assert spread <= 2 * expected_error(dim) * (1 + 1e-12)
    if rank == 1:
        assert spread == pytest.approx(2 * expected_error(dim))
    if rank == 4:
        assert spread == pytest.approx(expected_error(dim), rel=0.06)


class Head(nn.Module):
    """Most influence is that of one matrix, as the head's of a language model is."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.head(x + 0.1 * torch.tanh(self.body(x)))


def rows(seed, count=24, rank=6):
    """Rows and targets with a few directions in common, some of them stronger."""
    fixed = torch.Generator().manual_seed(0)
    directions = torch.randn(rank, WIDTH, generator=fixed) * torch.linspace(1.5, 0.5, rank)[:, None]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, rank, generator=generator) @ directions
    # Far apart: a countsketch never lets neighbours meet.
    return x, 49 * torch.randint(0, rank, (count,), generator=generator)


def measure(projection, rounds=1, state=None, engine=None):
    torch.manual_seed(0)
    model = Head()
    engine = InfluenceEngine(model, ["x", "y"], ["a", "b"], "identity", projection=projection, batch_dim=0)
    if state is not None:
        engine.load_state_dict(state)
    for index in range(rounds):
        if index:
            engine.refresh()
        for name, seed in (("a", 1), ("b", 2)):
            for split in range(2):
                x, y = rows(10 * seed + split)
                with engine.task(name):
                    F.cross_entropy(model(x), y).backward()
        for batch in range(2):
            x, y = rows(50 + batch)
            with engine.domains([0, 1] * 12):
                F.cross_entropy(model(x), y).backward()
    return engine


def lengths(exact):
    """|q_i| |g_j| by the exact queries and the gradients of the domains."""
    model = exact.model
    queries = exact._session._queries.by_task(2)
    of_queries = torch.stack([each.flatten(1).square().sum(1) for each in queries.values()]).sum(0).sqrt()
    of_domains = []
    for domain in range(2):
        losses = []
        for batch in range(2):
            x, y = rows(50 + batch)
            losses.append(F.cross_entropy(model(x)[domain::2], y[domain::2]))
        found = torch.autograd.grad(sum(losses) / 2, list(model.parameters()))
        of_domains.append(torch.stack([each.square().sum() for each in found]).sum().sqrt())
    return (of_queries[:, None] * torch.stack(of_domains)).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_what_was_asked_for(kind):
    exact = measure(None)
    scale, values = lengths(exact), exact.matrix().values
    ratios = []
    for target in (0.18, 0.13):  # dim 32, and 60 or 64
        given = [Projection(target_error=target, kind=kind, seed=seed) for seed in range(16)]
        errors = [(measure(each).matrix().values - values) / scale for each in given]
        ratios.append(np.sqrt(np.mean(np.square(errors))) / target)
    assert (np.array(ratios) > 1 / 3).all()
    assert (np.array(ratios) < 3).all()


@pytest.mark.parametrize("redraw", [True, False])
def test_rounds_add_up(redraw):
    """Four rounds of the same data: over four draws, or four times the same error."""
    values = measure(None).matrix().values
    kind, count = "rademacher", 12
    given = [Projection(dim=32, kind=kind, seed=seed, redraw=redraw) for seed in range(count)]
    one = [measure(each).matrix() for each in given]
    four = [measure(each, rounds=4).matrix() for each in given]
    squares = [np.mean([(each.values - values) ** 2 for each in found]) for found in (one, four)]
    told = [np.mean([each.stderr_projection**2 for each in found]) for found in (one, four)]
    if redraw:
        assert told[1] / told[0] == pytest.approx(1 / 4, rel=0.2)
        assert squares[1] / squares[0] == pytest.approx(1 / 4, rel=0.6)
    else:  # every round tells the same, and errs the same
        for first, last in zip(one, four, strict=True):
            np.testing.assert_allclose(last.values, first.values, rtol=1e-5)
            np.testing.assert_allclose(last.stderr_projection, first.stderr_projection, rtol=1e-5)


@pytest.mark.parametrize("redraw", [True, False])
def test_a_resumed_run_goes_on(redraw):
    projection = Projection(target_error=0.2, redraw=redraw)
    state = json.loads(json.dumps(measure(projection).state_dict()))
    assert state["projection"] == asdict(projection)
    whole, resumed = measure(projection, rounds=2).matrix(), measure(projection, state=state).matrix()
    np.testing.assert_array_equal(resumed.values, whole.values)
    np.testing.assert_array_equal(resumed.stderr_projection, whole.stderr_projection)
    with pytest.raises(ValueError, match="projection"):
        measure(replace(projection, redraw=not redraw), state=state)


def test_what_was_chosen_is_told(tmp_path):
    engine = measure(Projection(target_error=0.2))
    assert engine.projection.dim == 32
    settings = InfluenceMatrix.load(engine.matrix().save(tmp_path / "matrix.json")).settings["projection"]
    assert settings["dim"] == 32
    assert settings["target_error"] == 0.2
    assert Projection(**settings) == engine.projection


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [0.3, 0.1, 0.06, 0.035])
def test_the_smallest_that_is_enough(kind, target):
    dim = Projection(target_error=target, kind=kind).dim
    assert expected_error(dim) <= target
    smaller = dim // 2 if kind == "countsketch" else dim - 1
    assert dim == 32 or expected_error(smaller) > target


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_error": 0.02}, r"target_error must be at least 0\.031 for a countsketch.*projection=None"),
        ({"target_error": 0}, "target_error must be a share"),
        ({"target_error": 1.0}, "target_error must be a share"),
        ({"target_error": float("nan")}, "target_error must be a share"),
        ({"target_error": "small"}, "target_error must be a share"),
        ({"target_error": 0.1, "dim": 64}, r"dim must not be given beside target_error.*128"),
        ({"redraw": "always"}, "redraw must be True or False"),
        ({"tables": None}, "tables must be True or False"),
    ],
)
def test_what_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Projection(**options)


def test_dense_kinds_reach_smaller_errors():
    assert Projection(target_error=0.02, kind="rademacher").dim == 2501
