"""The command line: results, exit codes, and one line for a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from tikmix_fast import InfluenceMatrix, __version__, tikmix_d
from tikmix_fast.cli.app import app
from tikmix_fast.demo import corpora
from tikmix_fast.demo.corpora import Corpora, Task
from tikmix_fast.demo.results import DemoResult

DOMAINS = ("web", "code", "noise")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def mistake(result: Result) -> str:
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def matrix_file(tmp_path: Path) -> Path:
    matrix = InfluenceMatrix.from_values([[2.0, 1.0, -1.0], [1.0, 3.0, 0.0]], tasks=["qa", "fix"], domains=DOMAINS)
    return matrix.save(tmp_path / "S.json")


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> Corpora:
    """Corpora of a few kilobytes in place of those on the disk."""
    random = np.random.default_rng(0)

    def some(letters: str) -> np.ndarray:
        return np.frombuffer("".join(random.choice(list(letters), 4000)).encode(), dtype=np.uint8)

    small = Corpora(
        domains={"words": some("abc "), "digits": some("0123"), "signs": some("+-*/")},
        tasks={"words": Task(True, some("abc "), some("abc ")), "signs": Task(False, some("+-*/"), some("+-*/"))},
        sources={},
        missing={"lost": "it is not installed"},
    )
    monkeypatch.setattr(corpora, "gather", lambda **sizes: small)
    return small


# mix


def test_mix_solves_as_the_function_does(matrix_file: Path) -> None:
    result = run(
        "mix", matrix_file, "--prior", "web=0.5,code=0.2,noise=0.3", "--diversity", 0.5, "--cap", "code=0.6", "--json"
    )
    assert result.exit_code == 0
    expected = tikmix_d(
        InfluenceMatrix.load(matrix_file), {"web": 0.5, "code": 0.2, "noise": 0.3}, diversity=0.5, cap={"code": 0.6}
    )
    content = json.loads(result.stdout)
    assert content["weights"] == pytest.approx(expected.as_dict())
    assert content["settings"]["cap"] == {"code": 0.6}
    assert (content["success"], content["matrix"]) == (True, str(matrix_file))


def test_every_option_of_mix_arrives(matrix_file: Path, tmp_path: Path) -> None:
    options = {"uniformity": 0.5, "influence": 2.0, "diversity": 0.7, "floor": 0.02, "max_kl": 0.05, "smoothing": 0.25}
    options["confidence"] = 0.6
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    out = tmp_path / "w.json"
    assert run("mix", matrix_file, *words, "--no-pareto", "--out", out).exit_code == 0
    expected = tikmix_d(InfluenceMatrix.load(matrix_file), dict.fromkeys(DOMAINS, 1 / 3), **options, pareto=False)
    content = json.loads(out.read_text())
    assert content["weights"] == pytest.approx(expected.as_dict())
    assert options.items() <= content["settings"].items()


def test_the_prior_may_be_a_file_or_what_mix_wrote(matrix_file: Path, tmp_path: Path) -> None:
    plain, out = tmp_path / "prior.json", tmp_path / "w.json"
    plain.write_text(json.dumps({"web": 0.2, "code": 0.2, "noise": 0.6}))
    assert run("mix", matrix_file, "--prior", plain, "--out", out).exit_code == 0
    assert json.loads(out.read_text())["settings"]["prior"] == {"web": 0.2, "code": 0.2, "noise": 0.6}
    second = run("mix", matrix_file, "--prior", out, "--json")
    assert json.loads(second.stdout)["settings"]["prior"] == json.loads(out.read_text())["weights"]


def test_the_table_of_mix_names_every_domain(matrix_file: Path) -> None:
    shown = run("mix", matrix_file).stdout
    assert all(name in shown for name in DOMAINS)
    assert "33.3%" in shown
    assert "effective domains" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prior", "web=1"], "missing"),
        (["--prior", "web=0.5,code=0.5,books=0"], "books"),
        (["--prior", "web=0.5,code=0.6,noise=0"], "sum to 1"),
        (["--prior", "web=a,code=0,noise=0"], "prior must be a number"),
        (["--prior", "web=1,web=0"], "every name once"),
        (["--prior", "nowhere.json"], "nowhere.json"),
        (["--floor", "0.5"], "floor"),
        (["--floor", "much"], "floor must be a number"),
        (["--cap", "books=0.5"], "books"),
        (["--diversity", "-1"], "diversity must be"),
        (["--smoothing", "2"], "smoothing must be"),
        (["--out", "no/such/folder/w.json"], "no/such/folder"),
    ],
)
def test_mistakes_in_mix_are_told_in_one_line(matrix_file: Path, options: list[str], message: str) -> None:
    assert message in mistake(run("mix", matrix_file, *options))


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), ("{", "S.json"), ("{}", "not an influence matrix")]
)
def test_other_files_than_matrices_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "S.json"
    if content is not None:
        path.write_text(content)
    assert message in mistake(run("mix", path))


# demo


def small_demo(out: Path, *options: Any) -> Result:
    return run("demo", "--out", out, "--quick", "--steps", 6, "--stages", 2, *options)


def test_demo_writes_numbers_and_pictures(text: Corpora, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    shown = small_demo(out, "--seed", 3, "--diversity", 0.5)
    assert shown.exit_code == 0, shown.output
    assert sorted(path.name for path in out.iterdir()) == [
        "influence.json",
        "influence.png",
        "loss.png",
        "mixture.png",
        "results.json",
        "settings.json",
    ]
    result = DemoResult.load(out / "results.json")
    assert (result.settings.seed, result.settings.steps, result.settings.diversity) == (3, 6, 0.5)
    assert result.environment["tikmix_fast"] == __version__
    assert json.loads((out / "settings.json").read_text())["steps"] == 6
    last = result.boundaries[-1].matrix
    assert np.array_equal(InfluenceMatrix.load(out / "influence.json").values, last.values)
    for name, loss in result.tikmix.final.items():
        assert name in shown.stdout
        assert f"{loss:.3f}" in shown.stdout
    assert "missing: lost: it is not installed" in shown.stderr
    assert run("mix", out / "influence.json").exit_code == 0


def test_demo_runs_several_seeds(text: Corpora, tmp_path: Path) -> None:
    shown = small_demo(tmp_path, "--seeds", 2, "--json")
    summary = json.loads(shown.stdout)
    assert [each["seed"] for each in summary["seeds"]] == [0, 1]
    for each in summary["seeds"]:
        result = DemoResult.load(tmp_path / f"seed-{each['seed']}" / "results.json")
        assert each["tikmix"] == result.tikmix.final
        assert each["change_steered"] == result.change(("words",))


def test_demo_refuses_a_folder_it_cannot_write_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "gather", lambda **sizes: pytest.fail("text was gathered"))
    (tmp_path / "file").write_text("kept")
    assert "out must be a folder that can be written to" in mistake(run("demo", "--out", tmp_path / "file" / "demo"))
    assert "out must be a folder" in mistake(run("demo", "--out", tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "kept"


def test_demo_refuses_a_backend_that_cannot_run_before_training(
    text: Corpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKMIX_FAST_BACKEND", "abacus")
    assert "TIKMIX_FAST_BACKEND must be one of" in mistake(run("demo", "--out", tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "steps must be an int of at least 1"),
        (["--stages", "1"], "stages must be an int of at least 2"),
        (["--seed", "-1"], "seed must be an int of at least 0"),
        (["--preconditioner", "newton"], "preconditioner must be"),
        (["--diversity", "nan"], "diversity must not be negative"),
    ],
)
def test_mistakes_in_demo_are_told_in_one_line(tmp_path: Path, options: list[str], message: str) -> None:
    assert message in mistake(run("demo", "--out", tmp_path, *options))
    assert list(tmp_path.iterdir()) == []


# env and the rest


def test_env_prints_versions_and_reasons() -> None:
    facts = json.loads(run("env", "--json").stdout)
    assert facts["tikmix_fast"] == __version__
    shown = " ".join(run("env").stdout.split())
    for name, reason in facts["backends"].items():
        assert name in shown
        assert "usable" in shown if reason is None else reason.split(";")[0][:30] in shown


@pytest.mark.parametrize("command", [(), ("demo",), ("mix",), ("env",)])
def test_help_of_every_command(command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_an_unknown_command_is_a_mistake() -> None:
    assert run("bake").exit_code == 2


def test_version() -> None:
    assert run("--version").stdout.strip() == __version__


def test_help_imports_nothing_slow() -> None:
    script = """
import sys
from tikmix_fast.cli import main
sys.argv = ["tikmix-fast", "demo", "--help"]
try:
    main()
except SystemExit as end:
    slow = {"torch", "numpy", "scipy", "matplotlib"} & set(sys.modules)
    sys.exit(f"imported {slow}" if slow or end.code else 0)
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_the_module_is_the_command() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "tikmix_fast", "--version"], check=True, capture_output=True, text=True
    )
    assert shown.stdout.strip() == __version__
