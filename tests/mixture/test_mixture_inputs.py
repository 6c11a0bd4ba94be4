import json

import numpy as np
import pytest

from tikmix_fast import InfluenceMatrix, MixtureResult, tikmix_d

MATRIX = InfluenceMatrix.from_values(
    [[1.0, 0.5, 0.2], [0.1, 0.4, 0.9]], tasks=["qa", "sums"], domains=["web", "code", "maths"]
)
PRIOR = {"web": 0.5, "code": 0.3, "maths": 0.2}


def test_names_are_matched_whatever_their_order():
    shuffled = {name: PRIOR[name] for name in ("maths", "web", "code")}
    one, other = tikmix_d(MATRIX, PRIOR), tikmix_d(MATRIX, shuffled)
    np.testing.assert_array_equal(one.weights, other.weights)
    assert one.domains == ("web", "code", "maths")
    np.testing.assert_array_equal(one.prior, [0.5, 0.3, 0.2])
    assert list(one.as_dict()) == ["web", "code", "maths"]
    assert one.as_dict()["web"] == one.weights[0]


def test_plain_arrays():
    named = tikmix_d(MATRIX, PRIOR)
    for matrix, prior in (
        (MATRIX.values, [0.5, 0.3, 0.2]),
        (MATRIX.values.tolist(), (0.5, 0.3, 0.2)),
        (MATRIX, [0.5, 0.3, 0.2]),
    ):
        result = tikmix_d(matrix, prior)
        np.testing.assert_array_equal(result.weights, named.weights)
    plain = tikmix_d(MATRIX.values, [0.5, 0.3, 0.2])
    assert plain.domains is None
    assert plain.tasks is None
    with pytest.raises(ValueError, match="must have domain names"):
        plain.as_dict()


def test_unknown_standard_errors_are_no_obstacle():
    assert np.isnan(MATRIX.stderr).all()
    assert tikmix_d(MATRIX, PRIOR).success


def test_arguments_are_not_changed():
    values, prior, cap = MATRIX.values.copy(), np.array([0.5, 0.3, 0.2]), np.array([0.9, 0.9, 0.9])
    tikmix_d(values, prior, cap=cap)
    np.testing.assert_array_equal(values, MATRIX.values)
    np.testing.assert_array_equal(prior, [0.5, 0.3, 0.2])
    result = tikmix_d(values, np.array([0.5, 0.3, 0.2]), smoothing=1.0)
    result.weights[0] = 9
    assert result.prior[0] == 0.5


@pytest.mark.parametrize(
    ("prior", "error", "message"),
    [
        ({"web": 0.5, "code": 0.5}, ValueError, r"prior must name the matrix's domains; got missing \['maths'\]"),
        ({"web": 0.5, "cod": 0.3, "maths": 0.2}, ValueError, r"got unknown \['cod'\] and missing \['code'\]"),
        ([0.5, 0.5], ValueError, r"prior must have one number per domain, 3; got shape \(2,\); give a mapping"),
        (0.3, ValueError, r"prior must have one number per domain, 3; got shape \(\)"),
        ([0.5, 0.3, 0.3], ValueError, r"prior must be .* sum to 1 within 1e-6; got sum 1\.1 .*; divide it by its sum"),
        ([50, 30, 20], ValueError, r"prior must be .* sum to 1 within 1e-6; got sum 100"),
        ([1.2, -0.4, 0.2], ValueError, r"prior must be at least 0; got -0\.4 for domain 'code'"),
        ([0.5, np.nan, 0.5], ValueError, r"prior must be at least 0; got nan for domain 'code'"),
        (["a", "b", "c"], TypeError, r"prior must hold numbers; got list"),
        (None, ValueError, r"prior must have one number per domain"),
    ],
)
def test_bad_prior(prior, error, message):
    with pytest.raises(error, match=message):
        tikmix_d(MATRIX, prior)


def test_prior_is_scaled_to_one_exactly():
    result = tikmix_d(MATRIX, [0.5 + 4e-7, 0.3, 0.2], smoothing=1.0)
    assert result.weights.sum() == pytest.approx(1, abs=1e-15)


def test_mapping_for_a_matrix_without_names():
    with pytest.raises(ValueError, match="prior must be an array of 3 numbers: a plain matrix has no domain names"):
        tikmix_d(MATRIX.values, PRIOR)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([1.0, 2.0, 3.0], ValueError, r"matrix must have shape \[n, m\] .* got \(3,\)"),
        (np.empty((0, 3)), ValueError, r"at least one task and one domain; got \(0, 3\)"),
        ([[1.0, np.inf, 0.0]], ValueError, "matrix must be finite or NaN; got infinity at task 0, domain 1"),
        ([[1.0, 2.0, 3.0], [1.0, np.nan, 3.0]], ValueError, r"got domain 1 without task\(s\) 1; measure"),
        ("nonsense", TypeError, "matrix must hold numbers; got str"),
        ([[1.0, 2.0], [3.0]], TypeError, "matrix must hold numbers; got list"),
    ],
)
def test_bad_matrix(values, error, message):
    with pytest.raises(error, match=message):
        tikmix_d(values, [0.5, 0.3, 0.2])


def test_bad_matrix_is_told_by_names():
    values = [[1.0, np.nan, 0.2], [0.1, 0.4, 0.9]]
    with pytest.raises(ValueError, match=r"domain 'code' without task\(s\) 'qa'"):
        tikmix_d(InfluenceMatrix.from_values(values, tasks=["qa", "sums"], domains=["web", "code", "maths"]), PRIOR)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"uniformity": -1}, ValueError, "uniformity must be at least 0, and finite; got -1"),
        ({"influence": np.nan}, ValueError, "influence must be at least 0"),
        ({"diversity": np.inf}, ValueError, "diversity must be at least 0, and finite; got inf"),
        ({"diversity": "much"}, TypeError, "diversity must be a number; got 'much'"),
        ({"smoothing": 1.5}, ValueError, "smoothing must be at least 0 and at most 1, and finite; got 1.5"),
        ({"max_kl": 0}, ValueError, "max_kl must be above 0"),
        ({"norm": "l2"}, ValueError, "norm must be one of 'max', 'maxabs', 'std'; got 'l2'"),
        ({"solver": "adam"}, ValueError, "solver must be one of 'auto', 'slsqp', 'interior'"),
        ({"floor": {"books": 0.1}}, ValueError, r"floor must name the matrix's domains; got unknown \['books'\]"),
        ({"floor": -0.1}, ValueError, "floor must be at least 0"),
        ({"cap": [0.5, 0.5]}, ValueError, "cap must have one number per domain, 3"),
        ({"supply": {"web": 1.0}, "stage_tokens": 5}, ValueError, r"supply must name .* missing \['code', 'maths'\]"),
        ({"supply": [1, 2, 3]}, ValueError, "supply and stage_tokens must be given together"),
        ({"stage_tokens": 10}, ValueError, "supply and stage_tokens must be given together"),
        ({"supply": [1, 2, 3], "stage_tokens": 0}, ValueError, "stage_tokens must be above 0"),
        ({"supply": [1, 2, 3], "stage_tokens": 5, "max_epochs": 0}, ValueError, "max_epochs must be above 0"),
        ({"max_epochs": 4}, ValueError, "max_epochs needs supply"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        tikmix_d(MATRIX, PRIOR, **options)


def test_result_as_json():
    values = MATRIX.values.copy()
    values[:, 1] = np.nan
    result = tikmix_d(InfluenceMatrix.from_values(values, domains=MATRIX.domains), PRIOR)
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert content["weights"] == result.weights.tolist()
    assert content["domains"] == ["web", "code", "maths"]
    assert content["kept"] == ["code"]
    assert content["success"] is True
    assert content["terms"] == dict(result.terms)
    json.dumps(tikmix_d(MATRIX.values, [0.5, 0.3, 0.2]).to_dict(), allow_nan=False)


def test_unknown_gap_becomes_null():
    result = tikmix_d(MATRIX, PRIOR)
    fields = {**vars(result), "gap": float("nan")}
    assert MixtureResult(**fields).to_dict()["gap"] is None


@pytest.mark.parametrize("weights", [[0.5, 0.6, 0.0], [1.1, -0.1, 0.0], [np.nan, 0.5, 0.5]])
def test_result_refuses_what_is_no_mixture(weights):
    fields = {**vars(tikmix_d(MATRIX, PRIOR)), "weights": np.array(weights)}
    with pytest.raises(ValueError, match="weights must"):
        MixtureResult(**fields)
