"""Rank RegMix's published proxy runs: 512 to fit and cross-validate on, 256 that were held out.

OMP_NUM_THREADS=1 python benchmarks/study/regmix.py --data FOLDER                 # the 512 only
OMP_NUM_THREADS=1 python benchmarks/study/regmix.py --data FOLDER --held-out      # the last look, at the 256 too

FOLDER holds {train,test}_mixture_1m.csv and {train,test}_pile_loss_1m.csv of sail-sg/regmix. Times are CPU seconds.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tikmix_fast import files
from tikmix_fast.matrix.rank_correlation import rank_correlation
from tikmix_fast.mixture.surrogate.mixture_model import MixtureModel
from tikmix_fast.report.environment import describe_environment

Array = NDArray[np.float64]

RESULTS = Path(__file__).parent.parent / "results"
CANDIDATES = 100_000
ROUNDS = 3


def read_runs(folder: Path, part: str) -> tuple[Array, Array, tuple[str, ...], tuple[str, ...]]:
    """Return mixtures [N, m] and losses [N, n] of ``part``, with the names of domains and losses."""
    domains, mixtures = _read_table(folder / f"{part}_mixture_1m.csv")
    losses, values = _read_table(folder / f"{part}_pile_loss_1m.csv")
    if not np.array_equal(mixtures[:, 0], values[:, 0]):
        raise ValueError(f"{folder}: the two tables of {part!r} must list the same runs in the same order")
    return (
        mixtures[:, 1:],
        values[:, 1:],
        tuple(name.removeprefix(f"{part}_the_pile_") for name in domains[1:]),
        tuple(name.removeprefix("metric/the_pile_").removesuffix("_val_loss") for name in losses[1:]),
    )


def main() -> None:
    """Fit, cross-validate, time, look at the held-out runs if asked to, and write ``regmix.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=RESULTS / "regmix.json")
    parser.add_argument("--held-out", action="store_true", help="evaluate on the 256 held-out runs")
    arguments = parser.parse_args()
    environment = describe_environment()
    mixtures, losses, domains, tasks = read_runs(arguments.data, "train")

    spent = time.process_time()
    model = MixtureModel("auto").fit(mixtures, losses, domains=domains, tasks=tasks)
    spent = time.process_time() - spent
    print(model.table(), f"\nfit with cross-validation: {spent:.0f} CPU s", flush=True)
    trees = MixtureModel("lightgbm", folds=2).fit(mixtures, losses)
    candidates = np.random.default_rng(0).dirichlet(mixtures.mean(axis=0) * 17, size=CANDIDATES)
    times = _interleaved({"auto": lambda: model.predict(candidates), "lightgbm": lambda: trees.predict(candidates)})
    print(f"predict {CANDIDATES} candidates: {times} CPU s", flush=True)
    content: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "environment": environment,
        "runs": len(mixtures),
        "folds": model.folds,
        "kinds": dict(zip(tasks, model.kinds, strict=True)),
        "cross_validated": {
            kind: _by_task(tasks, {"spearman": each.spearman, "r2": each.r2}) for kind, each in model.scores.items()
        },
        "fit_cpu_seconds": spent,
        "predict": {"candidates": CANDIDATES, "cpu_seconds": times},
    }
    if arguments.held_out:
        unseen, truth, *_ = read_runs(arguments.data, "test")
        content["held_out"] = {"runs": len(unseen)}
        for name, fitted in (("auto", model), ("lightgbm", trees)):
            found = _by_task(tasks, {"spearman": rank_correlation(fitted.predict(unseen), truth, axis=0)})
            content["held_out"][name] = found
            print(f"held out, {name}: Spearman {found['spearman']}", flush=True)
    files.write_json(arguments.out, content)


def _read_table(path: Path) -> tuple[list[str], Array]:
    with path.open(newline="", encoding="utf-8") as file:
        names, *rows = csv.reader(file)
    return names, np.array(rows, dtype=np.float64)


def _by_task(tasks: tuple[str, ...], measures: dict[str, Array]) -> dict[str, Any]:
    return {
        name: {
            "mean": float(numbers.mean()),
            "minimum": float(numbers.min()),
            "each": dict(zip(tasks, numbers.tolist(), strict=True)),
        }
        for name, numbers in measures.items()
    }


def _interleaved(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median CPU seconds of each call, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


if __name__ == "__main__":
    main()
