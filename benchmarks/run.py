"""Make the committed results, one file per suite: some 15 minutes on 2 quiet cores.

python -m benchmarks.run                    # into benchmarks/results/, then: python benchmarks/report.py
python -m benchmarks.run --suites engine    # one of them

Run it from the repository root; `python benchmarks/run.py` does the same from anywhere. An interrupted run resumes: it
skips every suite whose file has the same commit, machine and settings. If a suite fails, its old file stays and the
others run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path, Python finds no `benchmarks`

from benchmarks.suites import ALL_SUITES
from tikmix_fast import files
from tikmix_fast.benchmarking.suites import BenchSettings, run_suite
from tikmix_fast.report.environment import describe_environment

RESULTS = Path(__file__).parent / "results"


def is_done(path: Path, settings: BenchSettings) -> bool:
    """Tell whether ``path`` holds results of this commit, machine and settings."""
    if not path.exists():
        return False
    before = json.loads(path.read_text(encoding="utf-8"))
    now = describe_environment()
    return (
        "with changes" not in (now["commit"] or "with changes")
        and before["settings"] == asdict(settings)
        and all(before["environment"][key] == now[key] for key in ("commit", "machine", "packages", "variables"))
    )


def main() -> None:
    """Run the suites, and print a line for every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--suites", nargs="+", choices=ALL_SUITES, default=list(ALL_SUITES))
    parser.add_argument("--size", choices=("full", "quick", "tiny"), default="full")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--again", action="store_true", help="also run suites whose results are up to date")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = BenchSettings.of(arguments.size)
    began = time.perf_counter()

    def tell(name: str, step: object) -> None:
        print(f"{time.perf_counter() - began:6.0f} s  {name}: {step}", flush=True)

    failed = []
    for name in arguments.suites:
        path = arguments.out / f"{name}.json"
        if not arguments.again and is_done(path, settings):
            tell(name, f"{path} is up to date")
            continue
        try:
            files.write_json(path, run_suite(name, settings, partial(tell, name), ALL_SUITES))
        except Exception:  # the other suites do not depend on this one
            traceback.print_exc()
            failed.append(name)
        else:
            tell(name, path)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
