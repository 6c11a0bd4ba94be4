"""The truth over a stage: runs from a checkpoint, the judge, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.study.problem import Problem
from benchmarks.study.stage_truth import __main__ as command
from benchmarks.study.stage_truth.checkpoint import Checkpoint, train_checkpoints
from benchmarks.study.stage_truth.judging import judge
from benchmarks.study.stage_truth.orders import DataOrder
from benchmarks.study.stage_truth.settings import SETTINGS

TINY = SETTINGS["tiny"]


@pytest.fixture
def checkpoint(problem: Problem, tmp_path: Path) -> Checkpoint:
    train_checkpoints(TINY, problem, 100, tmp_path)
    return Checkpoint(TINY, problem, 100, TINY.steps[0], tmp_path)


def test_a_shift_of_nothing_changes_nothing(checkpoint: Checkpoint) -> None:
    order = checkpoint.order(0)
    for domain in range(3):
        assert np.array_equal(order.indices(domain, 0.0), order.indices())
    assert checkpoint.run(order.indices()) == checkpoint.run(order.indices(2, 0.0))


def test_a_run_repeats_and_leaves_the_checkpoint_as_it_was(checkpoint: Checkpoint) -> None:
    before = {name: tensor.clone() for name, tensor in checkpoint.arm.tensors().items()}
    indices = checkpoint.order(0).indices(1, 0.4)
    first = checkpoint.run(indices)
    assert checkpoint.influence("adam") == checkpoint.influence("adam")
    assert checkpoint.run(indices) == first
    after = checkpoint.arm.tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert checkpoint.run(checkpoint.order(0).indices(2, 0.4)) != first


def test_the_share_of_a_domain() -> None:
    lengths, share = [300, 200, 100, 400], 0.4
    order = DataOrder(lengths, np.zeros(sum(lengths), dtype=np.int64), steps=400, batch=8, seed=[0])
    ends = np.cumsum(lengths)
    for domain in range(4):
        indices = order.indices(domain, share)
        shares = np.bincount(np.searchsorted(ends, indices.ravel(), side="right"), minlength=4) / indices.size
        expected = (1 - share) / 4 + share * (np.arange(4) == domain)
        np.testing.assert_allclose(shares, expected, atol=0.02)
        unchanged = ~order.replaced(domain, share)
        assert np.array_equal(indices[unchanged], order.indices()[unchanged])


def test_the_truth_is_its_own_best_signal() -> None:
    truth = np.random.default_rng(0).normal(size=(3, 6))
    own, opposite = judge(truth, truth, held_out=truth), judge(-truth, truth)
    for name in ("spearman", "pearson", "spearman_sum_max", "pearson_sum_std"):
        assert own[name] == pytest.approx(1)
        assert opposite[name] == pytest.approx(-1)
    assert own["best_domain_regret_max"] == own["best_domain_regret_std"] == own["mixture_regret"] == 0
    assert opposite["best_domain_regret_max"] == pytest.approx(1)
    assert own["steered_gain"] == own["held_out_gain"]


def test_the_command(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Problem, "built_in", lambda settings: problem)
    arguments = ["--setting", "tiny", "--seeds", "100", "--out", str(tmp_path), "--report"]
    command.main(arguments)
    made = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("truth-*.json")}
    assert len(made) == TINY.draws * (1 + len(TINY.shares) * len(problem.domains))
    capsys.readouterr()
    command.main(arguments)
    assert "0 new files" in capsys.readouterr().out
    assert made == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("truth-*.json")}

    (first, *_) = json.loads((tmp_path / "summary.json").read_text())["cells"]
    table = (tmp_path / "summary.md").read_text()
    for signal in (*first["signals"], "noise ceiling"):
        assert table.count(f"| {signal} |") == len(TINY.shares) * len(TINY.horizons)
    assert set(first["signals"]) == {"S adam", "S identity", "probes K=2"}
    assert np.shape(first["decrease"]) == np.shape(first["stderr"]) == (len(problem.reported), len(problem.domains))

    settings = tmp_path / "settings.json"
    settings.write_text(settings.read_text().replace(problem.fingerprint, "another"))
    with pytest.raises(ValueError, match="choose another --out"):
        command.main(arguments)


def test_the_command_refuses_reported_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--setting", "tiny", "--seeds", "12", "--out", str(tmp_path / "new")])
    assert "--reported" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
