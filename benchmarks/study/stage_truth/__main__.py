"""Measure what mixtures really do over a stage, one file per run.

python -m benchmarks.study.stage_truth --setting tiny --out DIR --report
python -m benchmarks.study.stage_truth --setting small --seeds 100 101 --steps 150 400 640 --out DIR --report

You may kill it at any time and start it again, also with other seeds or steps. It skips runs that have a file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.problem import Problem
from benchmarks.study.stage_truth.checkpoint import Checkpoint, new_arm, train_checkpoints
from benchmarks.study.stage_truth.report import PRECONDITIONERS, influence_path, part_path, write_report
from benchmarks.study.stage_truth.settings import REPORTED_SEEDS, SETTINGS, StageTruthSettings
from tikmix_fast import files

FORMAT = "tikmix_fast.stage_truth"


def parts(settings: StageTruthSettings, domains: Sequence[str]) -> Iterator[tuple[int, float, str | None]]:
    """Yield draw, share and domain of each run from one checkpoint; None goes on with the uniform mixture."""
    for draw in range(settings.draws):
        yield draw, 0.0, None
        for share in settings.shares:
            for domain in domains:
                yield draw, share, domain


def check_folder(settings: StageTruthSettings, problem: Problem, folder: Path) -> None:
    """Write the settings file, or compare with the one in ``folder``. Seeds and steps may differ.

    Raises
    ------
    ValueError
        If the folder belongs to other settings or other text.
    """
    content: dict[str, Any] = {name: value for name, value in vars(settings).items() if name not in ("seeds", "steps")}
    content["study"] = settings.study.to_dict()
    content = {"format": FORMAT, "fingerprint": problem.fingerprint, "settings": content}
    path = folder / "settings.json"
    if not path.exists():
        files.write_json(path, content)
    elif json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(content)):
        raise ValueError(f"{path} has other settings or other text: choose another --out")


def run_checkpoint(settings: StageTruthSettings, problem: Problem, seed: int, step: int, folder: Path) -> int:
    """Make the files that one checkpoint lacks, and return their number."""
    names = list(problem.domains)
    missing = [part for part in parts(settings, names) if not part_path(folder, seed, step, *part).exists()]
    unmeasured = [name for name in PRECONDITIONERS if not influence_path(folder, seed, step, name).exists()]
    if not missing and not unmeasured:
        return 0
    train_checkpoints(settings, problem, seed, folder)
    checkpoint = Checkpoint(settings, problem, seed, step, folder)
    for name in unmeasured:
        files.write_json(influence_path(folder, seed, step, name), checkpoint.influence(name))
    for draw, share, domain in missing:
        order = checkpoint.order(draw)
        indices = order.indices() if domain is None else order.indices(names.index(domain), share)
        files.write_json(part_path(folder, seed, step, draw, share, domain), checkpoint.run(indices))
    return len(missing) + len(unmeasured)


def estimate(settings: StageTruthSettings, problem: Problem, seeds: Sequence[int], folder: Path) -> str:
    """Time a few steps and say what the runs that ``folder`` lacks will cost, without losses and influences."""
    missing = sum(
        not part_path(folder, seed, step, *part).exists()
        for seed in seeds
        for step in settings.steps
        for part in parts(settings, list(problem.domains))
    )
    if not missing:
        return "every run has a file"
    arm = new_arm(settings, problem, seeds[0])
    arm.train_on()
    start = time.perf_counter()
    for _ in range(3):
        arm.train_on()
    step = (time.perf_counter() - start) / 3
    steps = missing * settings.horizons[-1] + len(seeds) * max(settings.steps)
    return (
        f"{missing} runs of {settings.horizons[-1]} steps: about {steps * step / 60:.1f} min"
        f" at {step * 1e3:.0f} ms per step, and losses and influences on top"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and print a line for every checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study.stage_truth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--steps", type=int, nargs="+", help="steps before each checkpoint")
    parser.add_argument("--reported", action="store_true", help="allow the seeds of the reported results")
    parser.add_argument("--report", action="store_true", help="write summary.json and summary.md at the end")
    options = parser.parse_args(arguments)
    settings = SETTINGS[options.setting]
    seeds = options.seeds or list(settings.seeds)
    reserved = sorted(set(seeds) & set(REPORTED_SEEDS))
    if reserved and not options.reported:
        parser.error(f"--seeds {reserved} are for reported results: choose others, such as 100, or add --reported")
    if options.steps:
        try:
            settings = dataclasses.replace(settings, steps=tuple(options.steps))
        except ValueError as error:
            parser.error(f"--steps: {error}")
    options.out.mkdir(parents=True, exist_ok=True)
    problem = Problem.built_in(settings.study)
    check_folder(settings, problem, options.out)
    print(estimate(settings, problem, seeds, options.out), flush=True)
    for seed in seeds:
        for step in settings.steps:
            start = time.perf_counter()
            count = run_checkpoint(settings, problem, seed, step, options.out)
            print(f"seed {seed} step {step}: {count} new files, {time.perf_counter() - start:.0f} s", flush=True)
    if options.report:
        print(write_report(settings, problem, seeds, options.out))


if __name__ == "__main__":
    torch.set_num_threads(1)  # another number of threads rounds differently
    main()
