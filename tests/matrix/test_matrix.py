import json
import math
import os
import stat

import numpy as np
import pytest

from tikmix_fast import InfluenceMatrix

TASKS, DOMAINS = ("qa", "sums"), ("web", "code", "noise")
VALUES = np.array([[1.0, 0.25, -0.5], [0.1, 1e-300, np.nan]])
STDERR = np.array([[0.1, 0.2, 0.3], [0.05, 0.0, np.nan]])


def full():
    """Make a matrix with every field given, unknown and infinite cells included."""
    return InfluenceMatrix(
        values=VALUES.copy(),
        stderr=STDERR.copy(),
        tokens=np.array([100.0, 50.0, 0.0]),
        tasks=TASKS,
        domains=DOMAINS,
        stderr_domain=STDERR * 0.8,
        stderr_task=STDERR * 0.6,
        dof=np.array([[4.0, 1.0, np.inf], [30.0, 2.5, np.nan]]),
        microbatches=np.array([5, 3, 0]),
        dropped=2,
        settings={"preconditioner": "adam", "lr": 1e-3},
    )


ARRAYS = ("values", "stderr", "tokens", "stderr_domain", "stderr_task", "dof", "microbatches")


def assert_same(one, other):
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
        assert getattr(one, name).dtype == getattr(other, name).dtype
    for name in ("tasks", "domains", "dropped", "settings"):
        assert getattr(one, name) == getattr(other, name)


def test_cells_by_name():
    matrix = full()
    assert matrix.shape == (2, 3)
    assert matrix["qa", "noise"] == -0.5
    assert matrix["sums", "web"] == 0.1
    with pytest.raises(KeyError, match="unknown domain 'books'; known: web, code, noise"):
        matrix["qa", "books"]
    with pytest.raises(KeyError, match="unknown task 'web'; known: qa, sums"):
        matrix["web", "qa"]


def test_from_values_leaves_unknown_what_is_not_given():
    matrix = InfluenceMatrix.from_values([[1, 2], [3, 4], [5, 6]])
    assert matrix.tasks == ("task0", "task1", "task2")
    assert matrix.domains == ("domain0", "domain1")
    assert matrix.values.dtype == np.float64
    for name in ("stderr", "stderr_domain", "stderr_task", "dof", "tokens"):
        assert np.isnan(getattr(matrix, name)).all()
    assert matrix.microbatches.tolist() == [0, 0]
    assert not matrix.significant().any()


def test_from_values_with_errors():
    matrix = InfluenceMatrix.from_values(VALUES, stderr=STDERR, tokens=[1, 2, 3], tasks=TASKS, domains=DOMAINS)
    np.testing.assert_array_equal(matrix.stderr_domain, STDERR)
    assert np.isinf(matrix.dof).all()
    assert matrix.tokens.tolist() == [1, 2, 3]


def test_from_values_copies():
    values = VALUES.copy()
    matrix = InfluenceMatrix.from_values(values)
    values[0, 0] = 9
    assert matrix.values[0, 0] == 1


def test_interval_against_tables():
    matrix = full()
    low, high = matrix.interval(0.95)
    # Two-sided 95% quantiles of Student's t: 4 degrees of freedom 2.776, 1 12.706, infinitely many 1.960.
    np.testing.assert_allclose(high[0] - matrix.values[0], [0.1 * 2.776445, 0.2 * 12.706205, 0.3 * 1.959964], rtol=1e-6)
    np.testing.assert_allclose(low + high, 2 * matrix.values)
    assert np.isnan(low[1, 2])
    narrow = matrix.interval(0.5)
    assert (narrow[1][0] < high[0]).all()
    for level in (0.0, 1.0, -1, 95):
        with pytest.raises(ValueError, match="level must lie between 0 and 1"):
            matrix.interval(level)


def test_significant():
    expected = [[True, False, False], [False, True, False]]
    assert full().significant(0.95).tolist() == expected
    assert full().significant(0.5).tolist()[0] == [True, True, True]


def test_significant_takes_the_confidence():
    for level in (0.05, 0.49, 1.0):
        with pytest.raises(ValueError, match="level must be the confidence, at least"):
            full().significant(level)
    with pytest.raises(ValueError, match="correction must be one of 'bh', None"):
        full().significant(correction="bonferroni")


def test_p_values_agree_with_intervals():
    matrix = full()
    p = matrix.p_values()
    # Of t with 4 degrees of freedom at 10 by a table; with 1 (Cauchy) at 5/4 in closed form; normal at 5/3.
    np.testing.assert_allclose(
        p[0], [0.000562, 1 - 2 * math.atan(1.25) / math.pi, math.erfc(5 / 3 / math.sqrt(2))], atol=1e-6
    )
    assert np.isnan(p[1, 2])
    for level in (0.5, 0.9, 0.95, 0.999):
        np.testing.assert_array_equal(matrix.significant(level), p < 1 - level)


def test_benjamini_hochberg_written_out():
    random = np.random.default_rng(0)
    values = random.normal(size=(4, 25)) + np.where(random.random((4, 25)) < 0.3, 4.0, 0.0)
    errors = np.where(random.random((4, 25)) < 0.1, np.nan, 1.0)
    matrix = InfluenceMatrix.from_values(values, stderr=errors)
    p = matrix.p_values()
    ordered = np.sort(p[~np.isnan(p)])
    passed = np.flatnonzero(ordered <= 0.05 * np.arange(1, len(ordered) + 1) / len(ordered))
    expected = p <= ordered[passed[-1]]
    found = matrix.significant(correction="bh")
    np.testing.assert_array_equal(found, expected)
    assert 0 < found.sum() < matrix.significant().sum()
    assert not InfluenceMatrix.from_values(values).significant(correction="bh").any(), "no errors, nothing known"


def test_benjamini_hochberg_bounds_false_discoveries():
    random = np.random.default_rng(1)
    truth = np.where(random.random((400, 30)) < 0.2, 3.0, 0.0)
    matrices = [
        InfluenceMatrix.from_values((row + random.normal(size=30))[None], stderr=np.ones((1, 30))) for row in truth
    ]
    found = np.array([matrix.significant(correction="bh")[0] for matrix in matrices])
    false = (found & (truth == 0)).sum(1) / np.maximum(found.sum(1), 1)
    assert 0.02 < false.mean() < 0.055


def test_relative_error():
    matrix = full()
    spread = VALUES[0].std(ddof=1)
    unmeasured = InfluenceMatrix.from_values(VALUES[:1], stderr=STDERR[:1])
    assert unmeasured.relative_error()[0] == pytest.approx(np.sqrt((STDERR[0] ** 2).mean()) / spread)
    # A domain without a value in one task is left out of all; its error is unknown.
    np.testing.assert_allclose(
        matrix.relative_error("domain"), 0.8 * np.sqrt((STDERR[:, :2] ** 2).mean(1)) / VALUES[:, :2].std(axis=1, ddof=1)
    )
    assert np.isinf(InfluenceMatrix.from_values([[1.0, 2.0]]).relative_error()[0]), "unknown error"
    assert np.isinf(InfluenceMatrix.from_values([[2.0, 2.0]], stderr=[[1.0, 1.0]]).relative_error()[0])
    assert np.isnan(InfluenceMatrix.from_values([[2.0]], stderr=[[1.0]]).relative_error()[0]), "one domain"
    with pytest.raises(ValueError, match="side must be"):
        matrix.relative_error("task")


def test_bad_intervals():
    with pytest.raises(ValueError, match="method must be"):
        full().interval(method="bayes")
    with pytest.raises(ValueError, match="resamples must be an int of at least 2"):
        full().interval(method="bootstrap", resamples=1)
    with pytest.raises(ValueError, match="no record"):
        full().interval(method="bootstrap")
    with pytest.raises(ValueError, match="draws must be an int of at least 1"):
        full().split_half(draws=0)


def test_save_and_load(tmp_path):
    path = full().save(tmp_path / "S.json")
    assert_same(InfluenceMatrix.load(path), full())
    assert_same(InfluenceMatrix.load(str(path)), full())
    # The file is strict JSON, which has neither NaN nor infinity.
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["values"][1][2] is None
    assert content["dof"][0][2] == "inf"
    assert [each.name for each in tmp_path.iterdir()] == ["S.json"]


def test_dict_round_trip_of_a_matrix_from_values():
    matrix = InfluenceMatrix.from_values([[1.0]], tasks=["a"], domains=["b"])
    assert_same(InfluenceMatrix.from_dict(matrix.to_dict()), matrix)


def test_negative_infinity_survives():
    matrix = InfluenceMatrix.from_values([[-np.inf, np.inf]])
    assert_same(InfluenceMatrix.from_dict(json.loads(json.dumps(matrix.to_dict(), allow_nan=False))), matrix)


def test_save_leaves_the_old_file_when_it_cannot_write(tmp_path):
    path = full().save(tmp_path / "S.json")
    before = path.read_text()
    spoiled = InfluenceMatrix.from_values([[1.0]], settings={"lr": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        spoiled.save(path)
    assert path.read_text() == before
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError):
        full().save(tmp_path / "missing" / "S.json")


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write anywhere")
def test_save_into_a_folder_without_permission(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(PermissionError):
        full().save(tmp_path / "S.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": np.zeros((3, 2))}, r"values must be an array of shape \(2, 3\); got \(3, 2\)"),
        ({"stderr": [[1.0] * 3] * 2}, "stderr must be an array of shape .* got list"),
        ({"tokens": np.zeros(2)}, r"tokens must be an array of shape \(3,\)"),
        ({"microbatches": np.zeros((1, 3), dtype=np.int64)}, "microbatches must be an array"),
        ({"tasks": ("qa", "qa")}, "tasks must be unique"),
        ({"domains": ("web", "", "noise")}, "domains must be non-empty strings"),
        ({"domains": ("web", 3, "noise")}, "domains must be non-empty strings"),
        ({"stderr": -STDERR}, "stderr must not be negative"),
        ({"stderr_task": -STDERR}, "stderr_task must not be negative"),
        ({"tokens": np.array([1.0, -1.0, 0.0])}, "tokens must not be negative"),
    ],
)
def test_bad_fields(change, message):
    with pytest.raises(ValueError, match=message):
        InfluenceMatrix(**{**vars(full()), **change})


def test_bad_values():
    with pytest.raises(ValueError, match=r"values must have shape \[n, m\]; got \(3,\)"):
        InfluenceMatrix.from_values([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="stderr must be an array of shape"):
        InfluenceMatrix.from_values([[1.0, 2.0]], stderr=[[1.0]])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: [], "not an influence matrix"),
        (lambda content: {**content, "format": "something"}, "not an influence matrix: 'format' must be"),
        (lambda content: {**content, "version": 2}, "version must be 1; got 2"),
        (lambda content: {k: v for k, v in content.items() if k != "dof"}, "lacks the field 'dof'"),
        (lambda content: {**content, "values": None}, "has a field of the wrong type"),
        (lambda content: {**content, "values": [[1.0]]}, "values must be an array of shape"),
        (lambda content: {**content, "values": [["one"] * 3] * 2}, "could not convert string to float"),
        (lambda content: {**content, "tasks": ["qa", "qa"]}, "tasks must be unique"),
        (lambda content: {**content, "settings": 3}, "has a field of the wrong type"),
    ],
)
def test_bad_files(spoil, message, tmp_path):
    path = tmp_path / "S.json"
    path.write_text(json.dumps(spoil(full().to_dict())))
    with pytest.raises(ValueError, match=message) as caught:
        InfluenceMatrix.load(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1, 2"])
def test_not_json(content, tmp_path):
    path = tmp_path / "S.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"S\.json: "):
        InfluenceMatrix.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        InfluenceMatrix.load(tmp_path / "S.json")


def test_frozen():
    with pytest.raises(AttributeError):
        full().dropped = 3
