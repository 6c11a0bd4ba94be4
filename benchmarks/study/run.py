"""Run the study: every arm on every seed, one file each.

python -m benchmarks.study.run --setting small --out DIR --workers 2  # under 2 hours on 2 cores, into DIR
python -m benchmarks.study.run --setting small --out DIR --seeds 100  # a tuning seed
python -m benchmarks.study.report DIR                                 # the table and the pictures

You may kill it at any time and start it again, also with other arms or seeds. It skips arms that have a file. An arm
that was cut off starts anew with the same result, because everything follows from the seed. Each worker uses one
thread: another number of threads rounds differently.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.study.baselines import arms
from benchmarks.study.problem import Problem
from benchmarks.study.settings import SETTINGS, StudySettings
from benchmarks.study.training import Study, train
from tikmix_fast import files
from tikmix_fast.report.environment import describe_environment

FORMAT = "tikmix_fast.study"


def result_path(folder: Path, arm: str, seed: int) -> Path:
    """Return the file of one arm and seed."""
    return folder / f"{arm.replace(' ', '-')}-{seed}.json"


def run_arm(settings: StudySettings, problem: Problem, folder: Path, arm: str, seed: int) -> Path:
    """Train one arm on one seed, unless its file exists, and return the file.

    Raises
    ------
    ValueError
        If the file comes from other settings or other text.
    """
    path = result_path(folder, arm, seed)
    made_with = {"format": FORMAT, "arm": arm, "seed": seed, "fingerprint": problem.fingerprint}
    made_with["settings"] = settings.to_dict()
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name, value in made_with.items() if before.get(name) != value]
        if differing:
            raise ValueError(f"{path} was made with another {' and '.join(differing)}: choose another --out")
        return path
    study = Study(settings, problem, seed, folder)
    made_by = {"commit": describe_environment()["commit"]}
    return files.write_json(path, {**made_with, **made_by, **train(study, arms(settings)[arm](study))})


_problem: Problem | None = None  # each worker has one


def _work(settings: StudySettings, folder: Path, names: list[str], seed: int) -> list[tuple[str, float]]:
    global _problem
    torch.set_num_threads(1)
    if _problem is None:
        _problem = Problem.built_in(settings)
    done = []
    for name in names:
        start = time.perf_counter()
        run_arm(settings, _problem, folder, name, seed)
        done.append((name, time.perf_counter() - start))
    return done


def main() -> None:
    """Run what is missing, and print a line for every file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="default: all of them")
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    settings = SETTINGS[arguments.setting]
    known = list(arms(settings))
    chosen = arguments.arms or known
    unknown = [name for name in chosen if name not in known]
    if unknown:
        parser.error(f"--arms must be of {', '.join(map(repr, known))}; got {', '.join(map(repr, unknown))}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    environment = {**describe_environment(), "date": datetime.now(timezone.utc).strftime("%Y-%m-%d")}
    files.write_json(arguments.out / "environment.json", environment)

    # Arms that share proxy runs form one job: no two workers then train the same proxies.
    jobs: dict[tuple[int, str], list[str]] = {}
    for seed in arguments.seeds or settings.seeds:
        for name in chosen:
            jobs.setdefault((seed, name.split()[0] if name.startswith("regmix") else name), []).append(name)
    began = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        pending = {pool.submit(_work, settings, arguments.out, names, seed): seed for (seed, _), names in jobs.items()}
        for each in as_completed(pending):
            for name, seconds in each.result():
                now = time.perf_counter() - began
                print(f"{now:6.0f} s  seed {pending[each]}  {name}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
