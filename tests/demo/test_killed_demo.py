"""kill -9 at random moments, again and again: the demonstration ends as if nobody had touched it.

``TIKMIX_FAST_KILLS=50 pytest --full tests/training/test_killed_demo.py -s`` kills 50 times.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

KILLS = int(os.environ.get("TIKMIX_FAST_KILLS", "5"))

# The server imports everything once; each run is forked from it and is killed as a whole process is.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["tikmix_fast.cli.app", "tikmix_fast.demo.demonstration", "tikmix_fast.report.pictures", "lightgbm"]
)


def run_demo(out: Path) -> None:
    """Be ``tikmix-fast demo --quick``."""
    from tikmix_fast.cli.app import app

    app(["demo", "--quick", "--threads", "1", "--save-every", "5", "--out", str(out)])


def start(out: Path) -> Any:
    process = SERVER.Process(target=run_demo, args=(out,))
    process.start()
    return process


def outcome(out: Path) -> dict[str, Any]:
    """What the run found: everything but times."""
    content = json.loads((out / "results.json").read_text())
    return {key: value for key, value in content.items() if key not in ("seconds", "environment", "sha256")}


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path: Path) -> None:
    began = time.monotonic()
    whole = start(tmp_path / "whole")
    whole.join()
    length = time.monotonic() - began
    assert whole.exitcode == 0
    expected = outcome(tmp_path / "whole")
    assert all(len(arm["parameters"]) == 64 for arm in expected["arms"].values())
    moments = random.Random(0)
    kills = runs = resumed = 0
    while kills < KILLS:
        out = tmp_path / f"killed-{runs}"
        while True:
            process = start(out)
            # Under half a run, so that most runs are killed several times, in any of their parts; the last one is not.
            process.join(moments.uniform(0, 0.5 * length) if kills < KILLS else None)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            resumed += (out / "resume.safetensors").exists()
        assert process.exitcode == 0
        assert outcome(out) == expected
        assert not (out / "resume.safetensors").exists()
        runs += 1
    print(f"{kills} kills, {resumed} of them with a state to go on from, in {runs} runs of {length:.1f} s: all alike")
    assert resumed > 0
