"""What the build says of every CUDA kernel, read from what ptxas prints."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "csrc" / "cuda" / "resources.py"
REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodv' for 'sm_80'
ptxas info    : Function properties for _Z4goodv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 512 bytes smem
ptxas info    : Compiling entry function '_Z7spillerv' for 'sm_90a'
ptxas info    : Function properties for _Z7spillerv
    64 bytes stack frame, 40 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree, and this is an installed copy")


@pytest.fixture(scope="module")
def resources() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_resources", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def compiler(report: str, status: int = 0) -> list[str]:
    return [sys.executable, "-c", f"import sys; sys.stderr.write({report!r}); sys.exit({status})"]


def test_registers_shared_memory_and_spills_are_read(resources: ModuleType) -> None:
    found = [tuple(kernel)[1:] for kernel in resources.parse(REPORT)]
    assert found == [("sm_80", 96, 512, 0), ("sm_90a", 255, 0, 64)]


def test_a_kernel_that_fits_passes_and_is_reported(resources: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    fits = REPORT[: REPORT.index("ptxas info    : Compiling entry function '_Z7")]
    assert resources.main(compiler(fits)) == 0
    assert "sm_80   96 registers" in capsys.readouterr().out


def test_a_spill_fails_the_build(resources: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert resources.main(compiler(REPORT)) == 1
    assert "spills registers on sm_90a" in capsys.readouterr().err


def test_serialized_matrix_products_fail_the_build(resources: ModuleType) -> None:
    warning = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n"
    assert resources.main(compiler(warning)) == 1


def test_the_compilers_own_failure_is_passed_on(resources: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert resources.main(compiler("x.cu(1): error: what is this\n", status=2)) == 2
    assert "what is this" in capsys.readouterr().err
