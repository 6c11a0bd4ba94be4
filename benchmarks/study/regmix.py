"""Rank RegMix's published proxy runs: 512 for the fit and its cross-validation, 256 held out.

OMP_NUM_THREADS=1 python -m benchmarks.study.regmix --data FOLDER                 # the 512 only
OMP_NUM_THREADS=1 python -m benchmarks.study.regmix --data FOLDER --held-out      # the last look, at the 256 too

FOLDER holds {train,test}_mixture_1m.csv and {train,test}_pile_loss_1m.csv of sail-sg/regmix. Times are CPU seconds.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.study.ranks import spearman_by_task
from tikmix_fast import files
from tikmix_fast.benchmarking.interleaved import interleave
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
    """Fit, cross-validate and time; evaluate the held-out runs on request; write ``regmix.json``."""
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
    calls = {"auto": lambda: model.predict(candidates), "lightgbm": lambda: trees.predict(candidates)}
    times = {name: float(np.median(cpu)) for name, cpu in interleave(calls, ROUNDS).cpu.items()}
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
            ranks = _by_task(tasks, {"spearman": spearman_by_task(fitted.predict(unseen).T, truth.T)})
            content["held_out"][name] = ranks
            print(f"held out, {name}: Spearman {ranks['spearman']}", flush=True)
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


if __name__ == "__main__":
    main()
