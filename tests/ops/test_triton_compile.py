"""The exact Triton kernels compile for GPUs that are not here, use their tensor cores, and spill in no main loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton kernels need triton")

from tikmix_fast.ops.backends.triton import configs

SCRIPT = Path(__file__).with_name("compile_triton.py")
WGMMA, MMA, FLOAT = (configs._TILES[kind][0] for kind in ("wgmma", "mma", "float"))
WIDE = configs._TILES["wgmma"][1]


def compiled(cache: Path, *case: object) -> dict[str, dict[str, object]]:
    *others, tile = case
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, SCRIPT, json.dumps([*others, astuple(tile)])],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {kernel["name"]: kernel for kernel in json.loads(done.stdout)}


def check(architecture: int, dtype: str, kernels: dict[str, dict[str, object]]) -> None:
    loops = [loop for each in kernels.values() for kind in ("wgmma", "mma", "float") for loop in each[kind]]
    assert all(spills == 0 for _, spills in loops), f"spills in main loops: {kernels}"
    product = kernels.get("_fused") or kernels["_write_panel"]
    wanted = "float" if dtype == "float32" else "wgmma" if architecture == 90 else "mma"
    assert product[wanted], f"no {wanted}: {kernels}"


def test_hopper_reads_through_the_memory_accelerator_and_multiplies_with_wgmma(tmp_path: Path) -> None:
    kernels = compiled(tmp_path, 90, "fused", "bfloat16", "bfloat16", True, False, WGMMA)
    check(90, "bfloat16", kernels)
    assert kernels["_fused"]["copies"] > 0
    assert kernels["_fused"]["stack"] == 0


CASES = [
    (architecture, which, dtype, queries, total, order, tile)
    for which in ("fused", "two_pass")
    for architecture, dtype, queries, total, order, tile in (
        (90, "bfloat16", "bfloat16", False, False, WIDE),
        (90, "bfloat16", "float32", True, False, WGMMA),
        (90, "float16", "float16", True, True, WGMMA),
        (90, "float32", "float32", True, False, FLOAT),
        (80, "bfloat16", "bfloat16", True, False, MMA),
        (80, "float16", "float32", True, True, MMA),
        (80, "float32", "float32", True, True, FLOAT),
    )
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:6])))
def test_no_main_loop_spills(tmp_path: Path, case: tuple[object, ...]) -> None:
    check(case[0], case[2], compiled(tmp_path, *case))
