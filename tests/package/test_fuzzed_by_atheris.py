"""Where atheris is installed, it searches too: guided by coverage, some seconds for each reader."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_fuzzed_files import CASES

SECONDS = int(os.environ.get("TIKMIX_FAST_FUZZ_SECONDS", "5"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_readers_take_or_refuse(case: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    script = Path(__file__).with_name("fuzz_readers.py")
    command = [sys.executable, str(script), case, f"-max_total_time={SECONDS}", f"-artifact_prefix={tmp_path}/"]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=120 + 2 * SECONDS, check=False, cwd=script.parent
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert "Done " in run.stdout + run.stderr
