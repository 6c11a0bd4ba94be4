"""The report: decreases of the loss with their errors, the noise ceiling, and how well signals predict them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.study.problem import Problem
from benchmarks.study.stage_truth.judging import ceiling, judge
from benchmarks.study.stage_truth.settings import StageTruthSettings
from tikmix_fast import files
from tikmix_fast.report.environment import describe_environment

__all__ = ["PRECONDITIONERS", "decreases", "influence_path", "part_path", "write_report"]

PRECONDITIONERS: tuple[Literal["adam", "identity"], ...] = ("adam", "identity")
_COLUMNS = ("spearman", "pearson", "spearman_sum_max", "best_domain_regret_max", "mixture_regret", "steered_gain")


def part_path(folder: Path, seed: int, step: int, draw: int, share: float, domain: str | None) -> Path:
    """Return the file of one run; domain None goes on with the uniform mixture."""
    name = "uniform" if domain is None else domain.replace(" ", "_")
    return folder / f"truth-{seed}-{step}-{draw}-{share:g}-{name}.json"


def influence_path(folder: Path, seed: int, step: int, preconditioner: str) -> Path:
    """Return the file of S at one checkpoint."""
    return folder / f"influence-{seed}-{step}-{preconditioner}.json"


def decreases(
    settings: StageTruthSettings,
    problem: Problem,
    folder: Path,
    seed: int,
    step: int,
    share: float,
    horizon: int,
    kind: str = "reported",
) -> NDArray[np.float64]:
    """Return the loss of going on minus the loss of each shift, [draws, tasks, m], in nats."""
    tasks = list(problem.reported if kind == "reported" else problem.steered)

    def losses(draw: int, share: float, domain: str | None) -> NDArray[np.float64]:
        content = json.loads(part_path(folder, seed, step, draw, share, domain).read_text(encoding="utf-8"))
        return np.array([content[kind][str(horizon)][task] for task in tasks])

    return np.stack(
        [
            np.stack([losses(draw, 0.0, None) - losses(draw, share, each) for each in problem.domains], axis=1)
            for draw in range(settings.draws)
        ]
    )


def write_report(settings: StageTruthSettings, problem: Problem, seeds: Sequence[int], folder: Path) -> Path:
    """Write ``summary.json`` and ``summary.md`` and return the latter."""
    cells = [
        _cell(settings, problem, folder, seed, step, share, horizon)
        for seed in seeds
        for step in settings.steps
        for share in settings.shares
        for horizon in settings.horizons
    ]
    summary = {
        "format": "tikmix_fast.stage_truth_summary",
        "environment": describe_environment(),
        "fingerprint": problem.fingerprint,
        "tasks": list(problem.reported),
        "steered": list(problem.steered),
        "domains": list(problem.domains),
        "cells": cells,
    }
    files.write_json(folder / "summary.json", summary)
    return files.write_text(folder / "summary.md", _table(cells))


def _cell(
    settings: StageTruthSettings, problem: Problem, folder: Path, seed: int, step: int, share: float, horizon: int
) -> dict[str, Any]:
    draws = decreases(settings, problem, folder, seed, step, share, horizon)
    tasks = list(problem.reported)
    steered = draws[:, [tasks.index(name) for name in problem.steered]]
    held_out = draws[:, [tasks.index(name) for name in problem.held_out]]
    signals: dict[str, Any] = {}
    for name in PRECONDITIONERS:
        content = json.loads(influence_path(folder, seed, step, name).read_text(encoding="utf-8"))
        signals[f"S {name}"] = judge(content["values"], steered.mean(0), share=share, held_out=held_out.mean(0))
    first = settings.horizons[0]
    probes = decreases(settings, problem, folder, seed, step, share, first, "measured")
    judged = []
    for draw in range(settings.draws):  # probes of one draw, judged by the other draws
        others = np.arange(settings.draws) != draw
        truth, rest = steered[others].mean(0), held_out[others].mean(0)
        judged.append(judge(probes[draw], truth, share=share, held_out=rest))
    signals[f"probes K={first}"] = {name: _mean([each[name] for each in judged]) for name in judged[0]}
    return {
        "seed": seed,
        "step": step,
        "share": share,
        "horizon": horizon,
        "decrease": draws.mean(0).tolist(),
        "stderr": (draws.std(0, ddof=1) / np.sqrt(settings.draws)).tolist(),
        "ceiling": ceiling(steered),
        "signals": signals,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _table(cells: Sequence[dict[str, Any]]) -> str:
    header = ["seed", "step", "share", "K", "signal", *(name.replace("_", " ") for name in _COLUMNS)]
    rows = [header, ["---"] * len(header)]
    for cell in cells:
        where = [f"{cell[name]:g}" for name in ("seed", "step", "share", "horizon")]
        for name, values in {**cell["signals"], "noise ceiling": cell["ceiling"]}.items():
            numbers = (values.get(column) for column in _COLUMNS)
            rows.append([*where, name, *("" if each is None else f"{each:.3f}" for each in numbers)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
