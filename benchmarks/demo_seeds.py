"""Run the demonstration on several seeds and write the results that the documents show.

OMP_WAIT_POLICY=PASSIVE python benchmarks/demo_seeds.py     # seeds 0, 1, 2 into benchmarks/results/
python benchmarks/report.py                                 # the table from benchmarks/results/demo.json
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import time
from pathlib import Path
from typing import Any

import torch

from tikmix_fast import files
from tikmix_fast.demo.corpora import gather
from tikmix_fast.demo.demonstration import demonstrate
from tikmix_fast.demo.results import DemoResult
from tikmix_fast.demo.settings import DemoSettings
from tikmix_fast.report.environment import describe_environment
from tikmix_fast.report.pictures import draw_influence, draw_losses, draw_mixture, save_figure

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run and print a line per seed; write ``demo.json`` and the pictures of the first seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    environment = describe_environment()
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")

    settings = DemoSettings()
    corpora = gather(domain_bytes=settings.domain_bytes, task_bytes=settings.task_bytes)
    seeds: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        start = time.perf_counter()
        result = demonstrate(dataclasses.replace(settings, seed=seed), corpora)
        wall = time.perf_counter() - start
        print(f"seed {seed}: {wall:.0f} s, steered {result.change(result.steered):+.1%}", flush=True)
        if seed == arguments.seeds[0]:
            _draw(result, arguments.out)
        seeds.append(
            {
                "seed": seed,
                "wall_seconds": wall,
                "seconds": result.seconds,
                "uniform": result.uniform.final,
                "tikmix": result.tikmix.final,
                "weights": [{"step": step, "domains": weights} for step, weights in result.tikmix.weights],
                "drawn": result.tikmix.drawn,
            }
        )
    content = {
        "date": date,
        "environment": environment,
        "settings": {name: value for name, value in settings.to_dict().items() if name != "seed"},
        "steered": list(corpora.steered),
        "held_out": list(corpora.held_out),
        "sources": corpora.sources,
        "text_bytes": {name: len(text) for name, text in corpora.domains.items()},
        "rows": result.rows,
        "seeds": seeds,
    }
    print(files.write_json(arguments.out / "demo.json", content))


def _draw(result: DemoResult, folder: Path) -> None:
    last = result.boundaries[-1]
    save_figure(draw_influence(last.matrix, f"Group Influence at step {last.step}"), folder / "influence.png")
    save_figure(draw_mixture(result), folder / "mixture.png")
    save_figure(draw_losses(result), folder / "loss.png")


if __name__ == "__main__":
    main()
