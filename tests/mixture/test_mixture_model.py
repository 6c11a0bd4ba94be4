import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import lightgbm
import numpy as np
import pytest
from scipy.optimize import check_grad
from scipy.stats import spearmanr

from tikmix_fast import files
from tikmix_fast.matrix.rank_correlation import rank_correlation
from tikmix_fast.mixture.surrogate.gaussian_process import GaussianProcess, negative_log_posterior
from tikmix_fast.mixture.surrogate.mixture_model import MixtureModel
from tikmix_fast.mixture.surrogate.ridge import Ridge
from tikmix_fast.mixture.surrogate.trees import Trees

REGMIX = Path(__file__).parents[3] / "shared" / "data" / "regmix"


def runs(count=60, m=4, seed=0, noise=0.0):
    """Draw mixtures with a label that is linear and one in which domains interact."""
    rng = np.random.default_rng(seed)
    mixtures = rng.dirichlet(np.ones(m), size=count)
    labels = np.column_stack([mixtures @ np.arange(m), 5 * mixtures[:, 0] * mixtures[:, 1]])
    return mixtures, labels + noise * rng.normal(size=labels.shape)


# --- each kind against its own formula


def test_ridge_solves_the_normal_equations_with_the_penalty_of_least_leave_one_out_error():
    mixtures, labels = runs(30, noise=0.5)
    y = labels[:, 0]
    found = Ridge.fit(mixtures, y)

    def solve(x, target, penalty):
        centered = x - x.mean(axis=0)
        w = np.linalg.solve(centered.T @ centered + penalty * np.eye(4), centered.T @ (target - target.mean()))
        return w, target.mean() - x.mean(axis=0) @ w

    largest = np.linalg.eigvalsh(np.cov(mixtures.T, bias=True) * 30).max()
    penalties = np.logspace(-10, 2, 49) * largest
    x = mixtures - mixtures.mean(axis=0)
    errors = []
    for penalty in penalties:
        hat = x @ np.linalg.solve(x.T @ x + penalty * np.eye(4), x.T) + 1 / 30
        errors.append((((y - hat @ y) / (1 - np.diag(hat))) ** 2).sum())
    expected, intercept = solve(mixtures, y, penalties[int(np.argmin(errors))])
    np.testing.assert_allclose(found.coefficients, expected, rtol=1e-7)
    assert found.intercept == pytest.approx(intercept, rel=1e-9)


def test_gaussian_process_is_the_dense_formula():
    mixtures, labels = runs(40, noise=0.05)
    y = labels[:, 1]
    found = GaussianProcess.fit(mixtures, y)
    roots = mixtures**0.25
    x = (roots - roots.mean(axis=0)) / roots.std(axis=0)
    unseen = np.random.default_rng(9).dirichlet(np.ones(4), size=7)
    z = (unseen**0.25 - roots.mean(axis=0)) / roots.std(axis=0)
    near = np.array([[(found.narrowness * (a - b) ** 2).sum() for b in x] for a in z])
    # The posterior mean at the fitted points differs from the target by noise * dual: one number for all of them.
    residual = (y - found.predict(mixtures)) / y.std()
    ratio = residual / found.dual
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)
    assert ratio[0] > 0
    expected = (1 / (1 + near)) @ found.dual + z @ found.slope + found.intercept
    np.testing.assert_allclose(found.predict(unseen), expected, rtol=1e-9)


def test_the_posterior_is_the_normal_density_and_its_gradient_the_slope():
    rng = np.random.default_rng(1)
    points, target = rng.normal(size=(12, 3)), rng.normal(size=12)
    parameters = rng.normal(size=6) - 1
    value, _ = negative_log_posterior(parameters, points, target)
    narrow, (signal, noise, linear) = np.exp(parameters[:3]), np.exp(parameters[3:])
    kernel = np.array(
        [[signal / (1 + (narrow * (a - b) ** 2).sum()) + linear * a @ b + 10 for b in points] for a in points]
    )
    kernel += noise * np.eye(12)
    from scipy.stats import multivariate_normal, norm

    density = multivariate_normal(np.zeros(12), kernel).logpdf(target) + norm(-3, 3).logpdf(parameters[:3]).sum()
    constant = 6 * np.log(2 * np.pi) + 3 * np.log(3 * np.sqrt(2 * np.pi))
    assert value == pytest.approx(-density - constant, rel=1e-9)
    slope = check_grad(
        lambda at: negative_log_posterior(at, points, target)[0],
        lambda at: negative_log_posterior(at, points, target)[1],
        parameters,
    )
    assert slope < 1e-4


def test_trees_are_lightgbms_with_the_settings_of_the_notebook():
    mixtures, labels = runs(80)
    settings = {"objective": "regression", "learning_rate": 0.01, "seed": 42, "verbosity": -1}
    expected = lightgbm.train(settings, lightgbm.Dataset(mixtures, labels[:, 1]), 1000).predict(mixtures)
    np.testing.assert_allclose(Trees.fit(mixtures, labels[:, 1]).predict(mixtures), expected, rtol=1e-12)


def test_gaussian_process_stays_sane_where_no_mixture_was_seen():
    mixtures, labels = runs(120, m=5, seed=2)
    model = MixtureModel("gp").fit(mixtures, labels)
    corners = model.predict(np.eye(5))
    assert (corners > labels.min(axis=0) - np.ptp(labels, axis=0)).all()
    assert (corners < labels.max(axis=0) + np.ptp(labels, axis=0)).all()
    assert corners[:, 0].argmax() == 4


# --- the choice


def test_auto_takes_the_linear_model_for_linear_labels_and_another_for_interacting_ones():
    mixtures, labels = runs(80, noise=0.01)
    model = MixtureModel().fit(mixtures, labels, tasks=["linear", "product"])
    assert model.kinds == ("ridge", "gp")
    assert model.scores["gp"].r2[1] > 0.95 > model.scores["ridge"].r2[1]
    assert set(model.scores) == {"ridge", "gp", "lightgbm"}
    table = model.table()
    assert len(table.splitlines()) == 3
    assert re.search(r"^'linear' .*\*", table, re.M)
    unseen, truth = runs(200, seed=5)
    assert (rank_correlation(model.predict(unseen), truth, axis=0) > 0.97).all()
    assert model.error.tolist() == [model.scores["ridge"].error[0], model.scores["gp"].error[1]]


def test_scores_are_of_mixtures_that_the_model_had_not_seen():
    # Labels of pure noise: whatever was fitted to a mixture itself would score well.
    mixtures, _ = runs(60)
    noise = np.random.default_rng(3).normal(size=(60, 1))
    with pytest.warns(UserWarning, match="trees predict no label better than a linear model"):
        model = MixtureModel("lightgbm", folds=4).fit(mixtures, noise)
    assert model.scores["lightgbm"].r2[0] < 0.1
    order = np.random.default_rng(0).permutation(60)
    squares, ranks = [], []
    for fold in np.array_split(order, 4):
        rest = np.setdiff1d(order, fold)
        predicted = Ridge.fit(mixtures[rest], noise[rest, 0]).predict(mixtures[fold])
        squares.append((predicted - noise[fold, 0]) ** 2)
        ranks.append(spearmanr(predicted, noise[fold, 0])[0])
    assert model.scores["ridge"].r2[0] == pytest.approx(1 - np.concatenate(squares).mean() / noise.var())
    assert model.scores["ridge"].spearman[0] == pytest.approx(np.mean(ranks))


def test_it_says_in_words_when_trees_add_nothing():
    mixtures, labels = runs(60)
    with pytest.warns(UserWarning, match="trees predict no label better.*TiKMiX-M adds nothing") as caught:
        model = MixtureModel("lightgbm").fit(mixtures, labels[:, 0])
    assert model.warnings == (str(caught[0].message),)


def test_a_constant_label_is_predicted_and_scored_as_unknown():
    mixtures, _ = runs(40)
    for kind in ("ridge", "gp"):
        model = MixtureModel(kind).fit(mixtures, np.full(40, 2.5))
        np.testing.assert_allclose(model.predict(mixtures), 2.5, rtol=1e-12)
        assert np.isnan(model.scores[kind].r2[0])
        assert np.isnan(model.scores[kind].spearman[0])


def test_rows_of_rounded_tables_are_scaled():
    mixtures, labels = runs(40)
    rounded = np.round(mixtures, 3)
    rounded[0] *= 1.004
    model = MixtureModel("ridge").fit(rounded, labels)
    np.testing.assert_allclose(model.mixtures.sum(axis=1), 1.0, atol=1e-15)
    np.testing.assert_allclose(model.predict(rounded * 0.995), model.predict(rounded), rtol=1e-12)


# --- files


def saved(tmp_path, kind="auto"):
    mixtures, labels = runs(60, noise=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MixtureModel(kind, folds=2).fit(mixtures, labels, domains=list("abcd"), tasks=["one", "two"])
    return model, model.save(tmp_path / "model.json")


@pytest.mark.parametrize("kind", ["auto", "ridge", "gp", "lightgbm"])
def test_a_loaded_model_predicts_the_same_to_the_last_bit(tmp_path, kind):
    model, path = saved(tmp_path, kind)
    loaded = MixtureModel.load(path)
    unseen = np.random.default_rng(7).dirichlet(np.ones(4), size=50)
    np.testing.assert_array_equal(loaded.predict(unseen), model.predict(unseen))
    assert (loaded.kinds, loaded.domains, loaded.tasks) == (model.kinds, model.domains, model.tasks)
    assert loaded.table() == model.table()
    assert loaded.warnings == model.warnings
    for name in ("low", "high", "spread", "error"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(model, name))
    again = loaded.save(tmp_path / "again.json")
    assert again.read_bytes() == path.read_bytes()


def test_damaged_files_are_refused_and_named(tmp_path):
    _, path = saved(tmp_path)
    text = path.read_text()
    content = json.loads(text)
    damaged = {
        "": "Expecting value",
        text[:-100]: "Unterminated string",
        "[]": "is another kind of file",
        json.dumps({**content, "version": 2}): "its checksum differs",
        json.dumps({**content, "format": "other"}): "'format' must be 'tikmix_fast.mixture_model'; got 'other'",
        json.dumps({"format": content["format"], "version": 1}): "has no checksum",
        text.replace("0.", "1.", 1): "its checksum differs",
    }
    for wrong, message in damaged.items():
        path.write_text(wrong)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{re.escape(message)}"):
            MixtureModel.load(path)
    with pytest.raises(FileNotFoundError):
        MixtureModel.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("mixtures"), "lacks 'mixtures'"),
        (lambda c: c["models"].pop(), "kinds, models and scores must be of the same labels"),
        (lambda c: c["models"][1]["dual"].pop(), "must hold finite numbers for 60 mixtures of 4 domains"),
        (lambda c: c["models"][1]["narrowness"].__setitem__(0, -1.0), "narrowness must not be negative"),
        (lambda c: c["models"][0]["coefficients"].pop(), "must hold 4 finite coefficients"),
        (lambda c: c["spread"].pop(), "spread and scores must hold 2 numbers"),
        (lambda c: c["domains"].pop(), "domains must be 4 different non-empty strings"),
        (lambda c: c["mixtures"].__setitem__(0, [0.5, 0.5, 0.005, 0.0]), "mixtures must sum to 1 in every row"),
    ],
)
def test_files_that_do_not_fit_together_are_refused_even_with_a_right_checksum(tmp_path, change, message):
    _, path = saved(tmp_path)
    whole = json.loads(path.read_text())
    change(whole["content"])
    del whole["sha256"]
    files.write_sealed_json(path, whole)
    with pytest.raises(ValueError, match=re.escape(message)):
        MixtureModel.load(path)


def test_text_that_is_no_model_of_trees_is_refused():
    mixtures, labels = runs(60)
    content = Trees.fit(mixtures, labels[:, 1]).to_dict()
    with pytest.raises(ValueError, match="the trees must be of 3 domains; got 4"):
        Trees.from_dict(content, mixtures[:, :3])
    with pytest.raises(ValueError, match="the text of the trees cannot be read"):
        Trees.from_dict({"text": "nonsense"}, mixtures)


# --- messages


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mixtures": np.eye(4)[:2]}, ValueError, "labels must have shape [N, n], a row for each of 2 mixtures"),
        ({"mixtures": [0.5, 0.5]}, ValueError, "mixtures must have shape [N, m], one mixture a row; got (2,)"),
        ({"mixtures": "abc"}, TypeError, "mixtures must hold numbers; got str"),
        ({"labels": "abc"}, TypeError, "labels must hold numbers; got str"),
        ({"labels": np.zeros((60, 0))}, ValueError, "labels must have shape [N, n]"),
        ({"domains": ["a", "a", "b", "c"]}, ValueError, "domains must be 4 different non-empty strings"),
        ({"tasks": ["a"]}, ValueError, "tasks must be 2 different non-empty strings"),
    ],
)
def test_messages_of_fit(change, error, message):
    mixtures, labels = runs(60)
    model = MixtureModel("ridge").fit(mixtures, labels)
    before = model.predict(mixtures)
    with pytest.raises(error, match=re.escape(message)):
        model.fit(**{"mixtures": mixtures, "labels": labels, **change})
    np.testing.assert_array_equal(model.predict(mixtures), before)


def test_other_messages():
    mixtures, labels = runs(60)
    with pytest.raises(ValueError, match=r"kind must be one of 'auto', .*; got 'forest'"):
        MixtureModel("forest")
    with pytest.raises(ValueError, match="folds must be an int of at least 2; got 1"):
        MixtureModel(folds=1)
    with pytest.raises(ValueError, match="the model must be fitted first"):
        MixtureModel().predict(mixtures)
    with pytest.raises(ValueError, match="mixtures must be at least 8 for 5 folds; got 7; label more"):
        MixtureModel().fit(mixtures[:7], labels[:7])
    labels[3, 1] = np.nan
    with pytest.raises(ValueError, match="labels must be finite; got nan at row 3, label 1; drop the row"):
        MixtureModel().fit(mixtures, labels)


def test_lightgbm_and_torch_are_not_imported_with_the_module():
    code = (
        "import sys, tikmix_fast.mixture.surrogate.mixture_model, tikmix_fast.mixture.surrogate.tikmix_m;"
        "assert not {'lightgbm', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- real runs


@pytest.mark.slow
@pytest.mark.skipif(not REGMIX.is_dir(), reason=f"needs RegMix's runs in {REGMIX}")
def test_half_of_regmixs_runs_rank_the_other_half_better_than_trees_do():
    mixtures, losses = (
        np.loadtxt(REGMIX / f"train_{name}_1m.csv", delimiter=",", skiprows=1)[:, 1:]
        for name in ("mixture", "pile_loss")
    )
    mixtures /= mixtures.sum(axis=1, keepdims=True)
    seen, unseen = slice(0, None, 2), slice(1, None, 2)
    ranks = {}
    for name, kind in (("gp", GaussianProcess), ("trees", Trees)):
        predicted = [kind.fit(mixtures[seen], losses[seen, i]).predict(mixtures[unseen]) for i in (0, 8, 12)]
        ranks[name] = rank_correlation(np.column_stack(predicted), losses[unseen][:, (0, 8, 12)], axis=0)
    assert (ranks["gp"] > ranks["trees"]).all()
    assert (ranks["gp"] > 0.97).all()
