"""Make the committed results in one go: every suite into a file of its own, some 15 minutes on 2 quiet cores.

python benchmarks/run.py                    # into benchmarks/results/, then: python benchmarks/report.py
python benchmarks/run.py --suites engine    # one of them

A suite whose file was made from the same commit with the same settings is not run again, so that an interrupted run
goes on where it was; a suite that fails leaves its old file alone and the others run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

import torch

from tikmix_fast import files
from tikmix_fast.benchmarking.suites import SUITES, BenchSettings, run_suite
from tikmix_fast.report.environment import describe_environment

RESULTS = Path(__file__).parent / "results"


def is_done(path: Path, settings: BenchSettings) -> bool:
    """Tell whether ``path`` holds what a run would measure again."""
    if not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    now = describe_environment()
    return (
        "with changes" not in (now["commit"] or "with changes")
        and found["settings"] == asdict(settings)
        and all(found["environment"][key] == now[key] for key in ("commit", "machine", "packages", "variables"))
    )


def main() -> None:
    """Run the suites, with a line for every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES)
    parser.add_argument("--size", choices=("full", "quick", "tiny"), default="full")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--again", action="store_true", help="run also what is there already")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = BenchSettings.of(arguments.size)
    began = time.perf_counter()

    def tell(what: str) -> None:
        print(f"{time.perf_counter() - began:6.0f} s  {what}", flush=True)

    failed = []
    for name in arguments.suites:
        path = arguments.out / f"{name}.json"
        if not arguments.again and is_done(path, settings):
            tell(f"{name}: {path} is of this commit already")
            continue
        try:
            files.write_json(path, run_suite(name, settings, lambda what, name=name: tell(f"{name}: {what}")))
        except Exception:  # the other suites take minutes each and do not depend on this one
            traceback.print_exc()
            failed.append(name)
        else:
            tell(f"{name}: {path}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
