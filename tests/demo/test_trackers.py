"""Trackers: what is logged is read back from each one's own files."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from examples.trackers import MLflow, TensorBoard, Tracker, WandB
from tikmix_fast import InfluenceMatrix

WEIGHTS = {"web": 0.5, "c++": 0.25, "arXiv (2020)": 0.25, "none": 0.0}
MATRIX = InfluenceMatrix.from_values(
    [[1.0, np.nan], [-0.5, 2.0]], tasks=["qa", "a b"], domains=["web", "c++"], stderr=[[0.1, np.nan], [np.inf, 0.2]]
)
LOGGED = {
    ("mixture/web", 3): 0.5,
    ("mixture/c__", 3): 0.25,
    ("mixture/arXiv__2020_", 3): 0.25,
    ("mixture/none", 3): 0.0,
    ("mixture_effective_domains", 3): pytest.approx(2**1.5),
    ("mixture/web", 7): 1.0,
    ("mixture_effective_domains", 7): 1.0,
    ("influence/qa/web", 9): 1.0,
    ("influence/a_b/web", 9): -0.5,
    ("influence/a_b/c__", 9): 2.0,
    ("influence_stderr/qa/web", 9): pytest.approx(0.1),
    ("influence_stderr/a_b/c__", 9): pytest.approx(0.2),
}


def log_all(tracker):
    tracker.log_mixture(3, WEIGHTS)
    tracker.log_mixture(7, {"web": 1.0})
    tracker.log_matrix(9, MATRIX)
    tracker.close()


class Kept(Tracker):
    def __init__(self):
        self.numbers = {}

    def log(self, step, numbers):
        self.numbers.update({(name, step): number for name, number in numbers.items()})


def test_what_is_logged():
    tracker = Kept()
    log_all(tracker)
    assert tracker.numbers == LOGGED


@pytest.mark.parametrize(
    "log",
    [
        lambda tracker: tracker.log_mixture(0, {"c+": 0.5, "c*": 0.5}),
        lambda tracker: tracker.log_matrix(0, InfluenceMatrix.from_values([[1.0, 2.0]], domains=["c+", "c*"])),
    ],
    ids=["mixture", "matrix"],
)
def test_names_that_become_one_are_refused(log):
    tracker = Kept()
    with pytest.raises(ValueError, match=r"names must differ .* twice"):
        log(tracker)
    assert not tracker.numbers


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_all(TensorBoard(tmp_path / "events"))
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    logged = {(tag, each.step): each.value for tag in events.Tags()["scalars"] for each in events.Scalars(tag)}
    assert logged == LOGGED


def run(script, folder, **environment):
    """Run where a tracker's threads, warnings and settings cannot reach other tests."""
    script = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_trackers as here\n{script}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    script = """
import wandb
run = wandb.init(mode="offline", project="p", dir=".")
logged = {}
log = run.log
run.log = lambda numbers, step: (logged.update({(name, step): number for name, number in numbers.items()}),
                                 log(numbers, step=step))
here.log_all(here.WandB())
wandb.finish()
assert logged == here.LOGGED, logged
try:
    here.WandB()
except ValueError as error:
    assert "wandb.init(...) started none" in str(error)
else:
    raise AssertionError("a run that has ended was taken")
"""
    run(script, tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    (file,) = tmp_path.rglob("run-*.wandb")
    content = file.read_bytes()
    for name in {name for name, _ in LOGGED}:
        assert name.encode() in content


def test_mlflow(tmp_path):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    script = """
import mlflow
mlflow.set_tracking_uri("file:./runs")
try:
    here.MLflow()
except ValueError as error:
    assert "mlflow.start_run() started none" in str(error)
else:
    raise AssertionError("no run was active")
with mlflow.start_run() as run:
    here.log_all(here.MLflow())
here.MLflow(run.info.run_id).log(11, {"late": 1.0})
client = mlflow.tracking.MlflowClient()
names = {name for name, _ in here.LOGGED} | {"late"}
logged = {(name, each.step): each.value for name in names for each in client.get_metric_history(run.info.run_id, name)}
assert logged == {**here.LOGGED, ("late", 11): 1.0}, logged
"""
    run(script, tmp_path, MLFLOW_ALLOW_FILE_STORE="true")


@pytest.mark.parametrize(
    ("module", "make"),
    [("tensorboard", lambda: TensorBoard("events")), ("wandb", WandB), ("mlflow", MLflow)],
)
def test_a_tracker_that_is_missing_is_named_with_its_extra(monkeypatch, module, make):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs the package {module}; .*pip install 'tikmix_fast\[trackers\]'"):
        make()
