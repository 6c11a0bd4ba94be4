import re
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tikmix_fast.matrix.rank_correlation import rank_correlation
from tikmix_fast.mixture.direct.tikmix_d import tikmix_d
from tikmix_fast.mixture.surrogate.labels import linear_labels
from tikmix_fast.mixture.surrogate.mixture_model import MixtureModel
from tikmix_fast.mixture.surrogate.tikmix_m import tikmix_m

SEEDS = st.integers(0, 2**32 - 1)


def fitted(labels_of, m=4, count=150, kind="gp", seed=0, spread=1.0, **names):
    mixtures = np.random.default_rng(seed).dirichlet(np.full(m, spread), size=count)
    return MixtureModel(kind, folds=2).fit(mixtures, labels_of(mixtures), **names)


def test_the_optimum_of_a_quadratic_is_found():
    best = np.array([0.45, 0.3, 0.15, 0.1])
    model = fitted(lambda w: -((w - best) ** 2).sum(axis=1))
    result = tikmix_m(model, np.full(4, 0.25))
    np.testing.assert_allclose(result.weights, best, atol=0.01)
    assert result.success
    assert result.solver == "search"
    assert result.fun == pytest.approx(-result.predicted[0] / model.spread[0], abs=1e-7)
    assert "predicted to fall by" in result.message


def test_the_optimum_of_an_interaction_is_found_where_the_linear_model_sees_nothing():
    # Two domains that help only together: the best is half and half, whatever the third and fourth do.
    model = fitted(lambda w: w[:, 0] * w[:, 1], count=200)
    result = tikmix_m(model, np.full(4, 0.25))
    assert result.weights[:2] == pytest.approx([0.5, 0.5], abs=0.03)
    assert result.predicted[0] > 3.5 * result.predicted_prior[0]


def test_losses_are_minimised():
    best = np.array([0.2, 0.5, 0.3])
    model = fitted(lambda w: 3 + ((w - best) ** 2).sum(axis=1), m=3)
    result = tikmix_m(model, np.full(3, 1 / 3), minimise=True)
    np.testing.assert_allclose(result.weights, best, atol=0.01)
    assert result.predicted[0] < result.predicted_prior[0]
    away = tikmix_m(model, np.full(3, 1 / 3))
    assert away.predicted[0] > away.predicted_prior[0]


def influence(seed=3):
    return np.random.default_rng(seed).normal(0.5, 0.5, size=(3, 4))


def test_linear_labels_reproduce_the_ranking_and_the_answer_of_tikmix_d():
    matrix, prior = influence(), np.array([0.4, 0.3, 0.2, 0.1])
    with pytest.warns(UserWarning, match="TiKMiX-M adds nothing over TiKMiX-D"):
        model = fitted(lambda w: linear_labels(matrix, w), kind="auto")
    assert model.kinds == ("ridge",) * 3
    candidates = np.random.default_rng(8).dirichlet(np.ones(4), size=500)
    scale = matrix.max(axis=1)
    score = (model.predict(candidates) / scale).sum(axis=1)
    np.testing.assert_allclose(rank_correlation(score, (candidates @ (matrix / scale[:, None]).T).sum(1)), 1)
    terms = {"uniformity": 1, "influence": 1, "diversity": 1}
    # Where Pareto holds with equality (the first), the mean of random candidates stays a little inside.
    for options, share in (({}, 0.97), ({"pareto": False}, 0.999), ({"pareto": False, "diversity": 0.3}, 0.999)):
        objective = {**terms, **options, "prior": prior, "scale": scale}
        expected = tikmix_d(matrix, prior, **options)
        found = tikmix_m(model, prior, **objective, rounds=20, concentration=(8, 80_000))
        before = tikmix_m(model, prior, **objective, rounds=1, candidates=1, concentration=(1e12, 1e12)).fun
        assert (expected.active != ()) == (share == 0.97)
        assert expected.fun - 1e-9 <= found.fun
        assert before - found.fun >= share * (before - expected.fun)
        # From TiKMiX-D's own answer there is nothing to be gained, and it says so.
        again = tikmix_m(model, expected, **objective)
        assert again.message.startswith("TiKMiX-M adds nothing")
        assert again.fun <= expected.fun + 1e-9


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, m=st.integers(2, 6), literal=st.booleans(), pareto=st.booleans())
def test_the_answer_is_a_mixture_in_the_box_never_worse_than_the_anchor(seed, m, literal, pareto):
    rng = np.random.default_rng(seed)
    mixtures = rng.dirichlet(np.ones(m), size=30)
    model = MixtureModel("ridge", folds=2).fit(mixtures, mixtures @ rng.normal(size=(m, 2)))
    anchor = mixtures.mean(axis=0)
    cap = anchor * 1.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = tikmix_m(
            model, anchor, seed=seed % 97, candidates=500, literal_schedule=literal, pareto=pareto, cap=cap
        )
    assert result.weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert (result.weights >= model.low - 1e-12).all()
    assert (result.weights <= np.minimum(model.high, cap) + 1e-12).all()
    gain = (model.predict(result.weights[None]) - model.predict(anchor[None]))[0]
    assert (gain / model.spread).sum() >= -1e-12
    if pareto:
        assert (gain >= -1e-8).all()


def test_pareto_mixtures_are_preferred():
    # The first task is worth more in the sum; only Pareto keeps the second from paying for it.
    model = fitted(lambda w: np.column_stack([w[:, 0], -(w[:, 0] ** 2) / 5 + w[:, 1] / 20]), m=3)
    anchor = np.array([0.2, 0.3, 0.5])
    scale = [1.0, 1.0]
    free = tikmix_m(model, anchor, scale=scale, pareto=False)
    held = tikmix_m(model, anchor, scale=scale)
    assert free.predicted[1] < free.predicted_prior[1] - 0.01
    assert (held.predicted >= held.predicted_prior - 1e-8).all()
    assert held.fun < -held.predicted_prior.sum()


def test_the_schedule_runs_from_wide_to_narrow_and_literally_the_other_way(monkeypatch):
    module = sys.modules["tikmix_fast.mixture.surrogate.tikmix_m"]
    seen = []
    plain = module.dirichlet

    def spy(rng, strengths, count):
        seen.append(strengths.sum())
        return plain(rng, strengths, count)

    monkeypatch.setattr(module, "dirichlet", spy)
    model = fitted(lambda w: -((w - 0.25) ** 2).sum(axis=1) + w[:, 0], kind="ridge")
    monkeypatch.setattr(module, "_STILL", 0.0)
    tikmix_m(model, np.full(4, 0.25), rounds=3, candidates=200)
    np.testing.assert_allclose(seen, [8.0, 80.0, 800.0])
    seen.clear()
    tikmix_m(model, np.full(4, 0.25), rounds=3, candidates=200, literal_schedule=True)
    np.testing.assert_allclose(seen, [800.0, 80.0, 8.0])


def test_it_stops_when_the_mixture_stands_still():
    model = fitted(lambda w: -((w - 0.25) ** 2).sum(axis=1))
    result = tikmix_m(model, np.full(4, 0.25), rounds=40, concentration=(1e6, 1e7))
    assert result.nit < 40


def test_equal_seeds_give_equal_answers_and_names_are_kept():
    model = fitted(
        lambda w: np.column_stack([w[:, 0], w[:, 1]]), kind="ridge", domains=list("abcd"), tasks=["one", "two"]
    )
    anchor = {"d": 0.25, "a": 0.35, "b": 0.2, "c": 0.2}
    first, second = (tikmix_m(model, anchor, seed=4, floor={"c": 0.1}, cap={"a": 0.5}) for _ in range(2))
    np.testing.assert_array_equal(first.weights, second.weights)
    assert first.as_dict().keys() == set("abcd")
    assert first.as_dict()["c"] >= 0.1
    assert first.as_dict()["a"] <= 0.5
    assert first.tasks == ("one", "two")
    np.testing.assert_array_equal(first.prior, [0.35, 0.2, 0.2, 0.25])
    # An answer of -D is matched by its names, too.
    np.testing.assert_array_equal(tikmix_m(model, first).prior, first.weights)


def test_a_gain_within_the_models_error_is_called_nothing_certain():
    rng = np.random.default_rng(0)
    model = fitted(lambda w: 0.2 * w[:, 0] + rng.normal(size=len(w)), kind="ridge")
    result = tikmix_m(model, np.full(4, 0.25))
    assert "adds nothing certain" in result.message


def test_a_box_that_no_candidate_meets_is_said_and_the_anchor_returned():
    mixtures = np.full((20, 8), 1 / 8) + 1e-9 * (np.eye(8)[np.arange(20) % 8] - 1 / 8)
    model = MixtureModel("ridge", folds=2).fit(mixtures, mixtures[:, 0])
    with pytest.warns(UserWarning, match="none of 100 candidates in any round lay within the box"):
        result = tikmix_m(model, np.full(8, 1 / 8), candidates=100)
    np.testing.assert_array_equal(result.weights, np.full(8, 1 / 8))
    assert (result.success, result.status, result.solver) == (False, 1, "anchor")


def test_a_prior_that_nothing_can_match_is_said():
    model = fitted(lambda w: np.column_stack([w[:, 0], w[:, 1]]), kind="ridge", m=3)
    with (
        pytest.warns(UserWarning, match="prior lies outside the box"),
        pytest.warns(UserWarning, match="no mixture was found for which every task"),
    ):
        result = tikmix_m(model, [0.3, 0.3, 0.4], prior=[0.5, 0.5, 0.0], cap=0.45)
    assert not result.success
    assert len(result.warnings) == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be a fitted MixtureModel; got int"),
        ({"model": MixtureModel()}, ValueError, "the model must be fitted first"),
        ({"anchor": [0.5, 0.5]}, ValueError, "anchor must have one number per domain, 4; got shape (2,)"),
        ({"anchor": [1.0, 0.0, 0.0, 0.0]}, ValueError, "anchor must lie within the box of the fitted mixtures"),
        ({"cap": 0.26, "anchor": [0.3, 0.2, 0.25, 0.25]}, ValueError, "anchor must lie within the box"),
        ({"floor": 0.3}, ValueError, "floor must sum to at most 1 over the domains"),
        ({"influence": 0}, ValueError, "one of uniformity, influence and diversity must be above 0"),
        ({"diversity": -1}, ValueError, "diversity must be at least 0"),
        ({"rounds": 0}, ValueError, "rounds must be an int of at least 1; got 0"),
        ({"candidates": 1.5}, ValueError, "candidates must be an int of at least 1; got 1.5"),
        ({"top": 0}, ValueError, "top must be an int of at least 1; got 0"),
        ({"scale": [1.0, 2.0]}, ValueError, "scale must be 1 numbers above 0, one per label"),
        ({"scale": [0.0]}, ValueError, "scale must be 1 numbers above 0, one per label"),
        ({"concentration": (5.0, 1.0)}, ValueError, "concentration must not fall from the first round to the last"),
        ({"concentration": (1.0,)}, ValueError, "concentration must be two numbers"),
        ({"prior": [0.5, 0.5, 0.5, 0.5]}, ValueError, "prior must be at least 0 and sum to 1 within 1e-6; got sum 2"),
    ],
)
def test_messages(change, error, message):
    arguments = {"model": fitted(lambda w: w[:, 0], kind="ridge"), "anchor": np.full(4, 0.25), **change}
    with pytest.raises(error, match=re.escape(message)):
        tikmix_m(arguments.pop("model"), arguments.pop("anchor"), **arguments)


def test_a_prior_that_the_model_knows_nothing_of_is_said():
    mixtures = np.random.default_rng(0).dirichlet(np.full(3, 50.0), 60)
    model = MixtureModel(kind="ridge").fit(mixtures, mixtures @ [[1.0], [0.0], [0.0]])
    with pytest.warns(UserWarning, match="prior lies outside the box"):
        tikmix_m(model, mixtures.mean(0), prior=[0.0, 0.0, 1.0], rounds=2, candidates=100)
