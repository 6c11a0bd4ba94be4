"""The schemas: they take what is really written, and refuse what is broken."""

from __future__ import annotations

import copy
import json
import warnings

import numpy as np
import pytest
from typer.testing import CliRunner

from tikmix_fast import InfluenceMatrix, tikmix_d
from tikmix_fast.cli.app import app
from tikmix_fast.matrix.microbatch_record import MicrobatchRecord
from tikmix_fast.schemas import schema

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")


def validator(name):
    jsonschema.Draft202012Validator.check_schema(schema(name))
    return jsonschema.Draft202012Validator(schema(name))


def full_matrix():
    """Every optional part, and every kind of number that is not finite."""
    record = MicrobatchRecord(2, 3, blocks=2)
    for _ in range(5):
        record.add(np.ones((2, 3)), np.array([3.0, 2.0, 0.0]), np.ones((2, 3)), np.ones((2, 3)))
    nan = np.array([[1.0, -2.0, np.nan], [0.5, 1e-300, np.nan]])
    return InfluenceMatrix(
        values=nan,
        stderr=np.abs(nan),
        tokens=np.array([15.0, 10.0, 0.0]),
        tasks=("a", "b"),
        domains=("x", "y", "z"),
        stderr_domain=np.abs(nan),
        stderr_task=np.abs(nan),
        dof=np.array([[5.0, np.inf, np.nan]] * 2),
        microbatches=np.array([5, 5, 0]),
        dropped=1,
        settings={"preconditioner": "adam", "lr": 0.1},
        stderr_projection=np.abs(nan),
        effective_microbatches=np.array([5.0, 4.5, np.nan]),
        record=record,
    )


def plain_matrix():
    return InfluenceMatrix.from_values([[1.0, 2.0, -1.0], [0.5, -0.5, 1.0]], stderr=np.full((2, 3), 0.1))


MATRICES = {"full": full_matrix, "plain": plain_matrix}


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_saved_matrices_are_valid(tmp_path, matrix):
    content = json.loads(matrix().save(tmp_path / "S.json").read_text())
    validator("influence_matrix").validate(content)
    InfluenceMatrix.from_dict(content)


def test_every_part_of_a_matrix_has_a_schema(tmp_path):
    content = json.loads(full_matrix().save(tmp_path / "S.json").read_text())
    assert set(content) == set(schema("influence_matrix")["properties"])


@pytest.mark.parametrize("matrix", [plain_matrix(), plain_matrix().values, full_matrix()], ids=["named", "bare", "nan"])
@pytest.mark.parametrize("options", [{}, {"pareto": False, "cap": 0.4}], ids=["free", "capped"])
def test_results_are_valid(matrix, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = tikmix_d(matrix, np.full(3, 1 / 3), **options)
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    validator("mixture").validate(content)
    assert set(content) == set(schema("mixture")["required"])


def test_a_result_with_confidence_is_valid():
    result = tikmix_d(plain_matrix(), np.full(3, 1 / 3), confidence=0.9)
    assert result.known is not None
    validator("mixture").validate(json.loads(json.dumps(result.to_dict(), allow_nan=False)))


def test_the_file_of_the_command_is_valid(tmp_path):
    plain_matrix().save(tmp_path / "S.json")
    done = CliRunner().invoke(app, ["mix", str(tmp_path / "S.json"), "--out", str(tmp_path / "mixture.json")])
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "mixture.json").read_text())
    assert isinstance(content["weights"], dict)
    assert (content["format"], content["version"]) == ("tikmix_fast.mixture", 1)
    validator("mixture").validate(content)
    assert set(content) == set(schema("mixture")["properties"])


def broken(content, path, value):
    """Set one part of a copy; a value of ... removes it."""
    changed = copy.deepcopy(content)
    part = changed
    for key in path[:-1]:
        part = part[key]
    if value is ...:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["format"], "else"),
        (["version"], 2),
        (["values"], ...),
        (["record", "table"], ...),
        (["values", 0, 0], "1.0"),
        (["values", 0], 1.0),
        (["stderr", 1, 1], -0.5),
        (["tokens", 0], -1),
        (["microbatches", 0], 1.5),
        (["microbatches", 0], None),
        (["tasks"], ["a", "a"]),
        (["domains", 1], ""),
        (["dropped"], -1),
        (["settings"], []),
        (["record", "blocks"], 3),
    ],
)
def test_broken_matrices_are_refused(path, value):
    content = full_matrix().to_dict()
    assert validator("influence_matrix").is_valid(content)
    assert not validator("influence_matrix").is_valid(broken(content, path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["format"], "else"),
        (["version"], 2),
        (["weights"], ...),
        (["weights"], []),
        (["weights", 0], -0.1),
        (["weights", 0], 1.1),
        (["weights"], {"x": "0.5"}),
        (["weights"], {}),
        (["domains"], ["a", "a", "b"]),
        (["success"], "yes"),
        (["status"], 0.5),
        (["terms", "influence"], ...),
        (["predicted", 0], "1"),
        (["kept"], [0.5]),
        (["warnings"], "one"),
    ],
)
def test_broken_mixtures_are_refused(path, value):
    content = tikmix_d(plain_matrix(), np.full(3, 1 / 3)).to_dict()
    assert validator("mixture").is_valid(content)
    assert not validator("mixture").is_valid(broken(content, path, value))


def test_an_unknown_schema_is_refused():
    with pytest.raises(ValueError, match="name must be one of 'influence_matrix', 'mixture'; got 'other'"):
        schema("other")
