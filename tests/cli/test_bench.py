"""``tikmix-fast bench``: files, tables, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from tikmix_fast.benchmarking import suites
from tikmix_fast.cli.app import app


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["bench", *(str(each) for each in arguments)], env={"COLUMNS": "160"})


@pytest.fixture(autouse=True)
def threads() -> Any:
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_bench_writes_numbers_settings_and_a_picture(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    shown = run("--size", "tiny", "--rounds", 2, "--threads", 1, "--out", out, "--suite", "ops")
    assert shown.exit_code == 0, shown.output
    assert sorted(each.name for each in out.iterdir()) == ["ops.json", "roofline.png", "settings.json"]
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["size"], settings["rounds"], settings["threads"]) == ("tiny", 2, 1)
    assert settings["suites"] == ["ops"]
    result = json.loads((out / "ops.json").read_text())
    assert {row["rounds"] for case in result["cases"] for row in case["rows"]} == {2}
    assert len(result["cases"][0]["rows"]) == 11
    for text in ("fp32 T=96 O=40 I=24 m=3 n=2", "row-wise (ghost)", "tikmix_fast, not packed"):
        assert text in shown.stdout


def test_bench_prints_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = lambda name, settings, tell: {"suite": name, "seconds": settings.seconds}  # noqa: E731
    monkeypatch.setattr(suites, "run_suite", made_up)
    shown = run("--size", "tiny", "--seconds", 0.01, "--out", tmp_path, "--suite", "engine", "--json")
    assert shown.exit_code == 0, shown.output
    printed = json.loads(shown.stdout)
    assert printed["engine"] == json.loads((tmp_path / "engine.json").read_text())
    assert printed["engine"]["seconds"] == 0.01


def test_memory_is_measured_if_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Any] = []
    monkeypatch.setattr(suites, "run_suite", lambda name, settings, tell: used.append(settings) or {"suite": name})
    for options in ([], ["--memory"]):
        assert run("--out", tmp_path, "--suite", "engine", "--json", *options).exit_code == 0
    assert [each.weigh for each in used] == [False, True]


def test_help() -> None:
    shown = run("--help")
    assert shown.exit_code == 0
    assert "against torch's ways" in shown.stdout


def test_a_wrong_result_is_told_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> None:
        raise AssertionError("tikmix_fast: influence is wrong")

    monkeypatch.setattr(suites, "run_suite", wrong)
    shown = run("--out", tmp_path, "--suite", "ops")
    assert shown.exit_code == 1
    assert shown.stderr.strip().endswith("wrong result: tikmix_fast: influence is wrong")
    assert [each.name for each in tmp_path.iterdir()] == ["settings.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite", "gpu"], "suite must be one of 'ops', 'engine'; got"),
        (["--seconds", "0"], "seconds must be positive"),
        (["--size", "huge"], "'huge' is not one of"),
    ],
)
def test_mistakes(tmp_path: Path, options: list[str], message: str) -> None:
    shown = run("--out", tmp_path, *options)
    assert shown.exit_code == 2
    assert message in " ".join(shown.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    shown = run("--out", tmp_path / "file" / "bench")
    assert shown.exit_code == 2
    assert "out must be a folder that can be written to" in shown.stderr
