"""The fit of EK-FAC, ours against kronfluence's: benchmarks/results/ekfac.json.

OMP_NUM_THREADS=1 python -m benchmarks.study.ekfac            # needs: pip install kronfluence
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import torch

from benchmarks.study.ekfac_fit import FitCase, measure_fit
from tikmix_fast import files
from tikmix_fast.report.environment import describe_environment

RESULT = Path(__file__).parents[1] / "results" / "ekfac.json"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    result = measure_fit(FitCase(), rounds=rounds)
    content = {
        "suite": "ekfac",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "environment": describe_environment(),
        **result,
    }
    for row in result["rows"]:
        growth = result["growth_bytes"].get(row["method"], 0) / 2**20
        print(f"{row['method']}: {row['cpu_seconds']:.1f} s of the processor, peak {growth:.0f} MiB above the start")
    print(f"ratio of times {result['ratio']:.2f}; {files.write_json(RESULT, content)}")


if __name__ == "__main__":
    main()
