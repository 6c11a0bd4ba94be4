"""Does S predict? Influence of a small GPT trained here, against what training does.

OMP_NUM_THREADS=1 python -m benchmarks.study.prediction --setting small    # seeds 0, 1, 2 into build/prediction-small/
python -m benchmarks.study.prediction --report                             # tables and plots of the parts that exist

Each part of a seed becomes a JSON file when it is done, so an interrupted run resumes:
additivity (S w against the influence of sampled mixtures), counterfactual (S against the change of the tasks' losses
after k real optimizer steps on one domain, and two such runs against each other; "long" holds the largest k) and
calibration (how often 95% intervals hold the truth). The report goes to benchmarks/results/ as prediction.json, .md and
.png; prediction_reading.md, written by hand, stands at the head of its tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.study.prediction.additivity import additivity
from benchmarks.study.prediction.calibration import calibration
from benchmarks.study.prediction.counterfactual import counterfactual, long
from benchmarks.study.prediction.report import write_report
from benchmarks.study.prediction.settings import SETTINGS, PredictionSettings
from benchmarks.study.prediction.subject import Subject, train
from tikmix_fast import files
from tikmix_fast.demo.corpora import gather
from tikmix_fast.report.environment import describe_environment

REPOSITORY = Path(__file__).parents[3]

PARTS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "counterfactual": counterfactual,
    "additivity": additivity,
    "calibration": calibration,
    "long": long,
}


def run(settings: PredictionSettings, seeds: list[int], parts: list[str], folder: Path) -> None:
    """Run the parts that ``folder`` lacks, each over all seeds, and print a line for each."""
    folder.mkdir(parents=True, exist_ok=True)
    corpora = gather(domain_bytes=settings.training.domain_bytes, task_bytes=settings.training.task_bytes)
    described = {**json.loads(json.dumps(dataclasses.asdict(settings))), "text": corpora.digest()}
    about = folder / "settings.json"
    if about.exists() and json.loads(about.read_text(encoding="utf-8")) != described:
        raise ValueError(f"{folder} must hold results of the same settings and text; got others: choose another --out")
    files.write_json(about, described)
    missing = [(part, seed) for part in parts for seed in seeds if not (folder / f"{part}-{seed}.json").exists()]
    for part, seed in missing:
        began = time.process_time()
        result = PARTS[part](train(settings, seed, corpora, folder))
        content = {
            "environment": describe_environment(),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "domains": list(corpora.domains),
            "tasks": list(corpora.tasks),
            "cpu_seconds": time.process_time() - began,
            **result,
        }
        path = files.write_json(folder / f"{part}-{seed}.json", content)
        print(f"{path}: {content['cpu_seconds']:.0f} s of CPU", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the study, then report all parts that exist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=("small", "full"), default="small")
    parser.add_argument("--quick", action="store_true", help="tiny numbers that show that everything runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="folder of the parts; default: build/prediction-SETTING")
    parser.add_argument("--results", type=Path, help="folder of the report; default: benchmarks/results")
    parser.add_argument("--report", action="store_true", help="run nothing, report the parts that exist")
    chosen = parser.parse_args(arguments)
    name = "quick" if chosen.quick else chosen.setting
    folder = chosen.out or REPOSITORY / "build" / f"prediction-{name}"
    if not chosen.report:
        run(SETTINGS[name], chosen.seeds, chosen.parts, folder)
    # Tiny results must not replace the committed ones.
    results = chosen.results or (folder if chosen.quick else REPOSITORY / "benchmarks" / "results")
    for path in write_report(folder, chosen.seeds, name, results):
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
