"""The build as a user meets it: the CUDA switch and its messages, what a wheel and an sdist hold."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tikmix_fast import __version__

ROOT = Path(__file__).parents[2]
# cmake and ninja of the environment that runs the tests, activated or not.
OWN_TOOLS = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])}
NO_NVCC = {"CUDACXX": "/nonexistent/nvcc"}

pytestmark = pytest.mark.skipif(
    not (ROOT / "CMakeLists.txt").exists(), reason="needs the source tree, and this is an installed copy"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


def configure(
    folder: Path, *definitions: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run cmake's configure step and fold its wrapped messages into single lines."""
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    ).stdout.strip()
    settings = (f"pybind11_DIR={pybind11}", f"Python_EXECUTABLE={sys.executable}", *definitions)
    done = subprocess.run(
        ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *(f"-D{setting}" for setting in settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | OWN_TOOLS | (environment or {}),
        check=False,
    )
    done.stdout = re.sub(r"\s+", " ", done.stdout)
    return done


def test_cuda_off_configures_without_cuda_and_says_so(tmp_path: Path) -> None:
    done = configure(tmp_path, "TIKMIX_FAST_CUDA=OFF")
    assert done.returncode == 0, done.stdout
    assert "CPU-only build, because TIKMIX_FAST_CUDA=OFF" in done.stdout
    assert "csrc/cuda/module.cpp" not in (tmp_path / "build.ninja").read_text()


def test_cuda_auto_without_nvcc_configures_cpu_only_aloud(tmp_path: Path) -> None:
    done = configure(tmp_path, "TIKMIX_FAST_CUDA=AUTO", environment=NO_NVCC)
    assert done.returncode == 0, done.stdout
    assert "*** CPU-ONLY BUILD: no CUDA compiler was found" in done.stdout
    assert "csrc/cuda/module.cpp" not in (tmp_path / "build.ninja").read_text()


def test_cuda_on_without_nvcc_fails_with_a_way_out(tmp_path: Path) -> None:
    done = configure(tmp_path, "TIKMIX_FAST_CUDA=ON", environment=NO_NVCC)
    assert done.returncode != 0
    assert "TIKMIX_FAST_CUDA=ON, but no CUDA compiler was found: put nvcc on PATH or set CUDACXX" in done.stdout


def test_an_unknown_choice_is_refused(tmp_path: Path) -> None:
    done = configure(tmp_path, "TIKMIX_FAST_CUDA=maybe")
    assert done.returncode != 0
    assert "TIKMIX_FAST_CUDA must be AUTO, ON or OFF; got 'maybe'" in done.stdout


@needs_nvcc
def test_cuda_on_builds_for_the_architectures_nvcc_knows(tmp_path: Path) -> None:
    done = configure(tmp_path, "TIKMIX_FAST_CUDA=ON", "TIKMIX_FAST_CUDA_ARCHITECTURES=80;90a;999")
    assert done.returncode == 0, done.stdout
    assert "this nvcc does not know architecture 999; left out" in done.stdout
    assert "CUDA module for 80;90a with" in done.stdout
    flags = set(re.findall(r"--generate-code=\S+", (tmp_path / "build.ninja").read_text()))
    assert flags == {
        "--generate-code=arch=compute_80,code=sm_80",
        "--generate-code=arch=compute_90a,code=sm_90a",
        "--generate-code=arch=compute_90,code=compute_90",
    }


@needs_nvcc
@pytest.mark.slow
def test_a_build_folder_that_saw_no_nvcc_finds_it_later(tmp_path: Path) -> None:
    configure(tmp_path, "TIKMIX_FAST_CUDA=AUTO", environment=NO_NVCC)
    done = configure(tmp_path, "TIKMIX_FAST_CUDA=ON", "TIKMIX_FAST_CUDA_ARCHITECTURES=80")
    assert done.returncode == 0, done.stdout


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        ("998;999", "nvcc knows none of TIKMIX_FAST_CUDA_ARCHITECTURES=998;999"),
        ("ampere", "TIKMIX_FAST_CUDA_ARCHITECTURES must be like 80;90a;120; got 'ampere'"),
    ],
)
def test_architectures_that_cannot_be_built_are_refused(tmp_path: Path, architectures: str, message: str) -> None:
    done = configure(tmp_path, "TIKMIX_FAST_CUDA=ON", f"TIKMIX_FAST_CUDA_ARCHITECTURES={architectures}")
    assert done.returncode != 0
    assert message in done.stdout


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks, so that building leaves nothing in the tree."""
    copy = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    return copy


def build(source: Path, target: Path, hook: str) -> Path:
    """Run one hook of the build backend, offline and without an isolated environment."""
    script = f"import scikit_build_core.build as backend; print(backend.{hook}({str(target)!r}))"
    environment = os.environ | OWN_TOOLS | {"TIKMIX_FAST_CUDA": "OFF"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=source, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target / done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(source_copy: Path, tmp_path: Path) -> None:
    wheel = build(source_copy, tmp_path, "build_wheel")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"tikmix_fast-{__version__}.dist-info/METADATA").decode()
    assert {"tikmix_fast/py.typed", "tikmix_fast/_cpu.pyi", "tikmix_fast/_cuda.pyi"} <= set(names)
    assert any(re.fullmatch(r"tikmix_fast/_cpu\..*\.so", name) for name in names)
    assert not any(re.match(r"tikmix_fast/_cuda\..*\.so", name) for name in names)
    assert {name.split("/")[0] for name in names} == {"tikmix_fast", f"tikmix_fast-{__version__}.dist-info"}
    assert not any("test_" in name or "conftest" in name for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    needed = {
        Requirement(line.partition(": ")[2]).name
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist:") and "extra ==" not in line
    }
    assert needed == {
        "torch", "numpy", "scipy", "lightgbm", "triton", "typer", "rich", "matplotlib", "safetensors"
    }  # fmt: skip


@pytest.mark.slow
def test_a_wheel_can_be_built_from_the_sdist(source_copy: Path, tmp_path: Path) -> None:
    sdist = build(source_copy, tmp_path, "build_sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"tikmix_fast-{__version__}"
    assert (unpacked / "csrc" / "cpu" / "kernel.h").exists()
    wheel = build(unpacked, tmp_path, "build_wheel")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # -S keeps the editable install's finder away, and with it site-packages, which the path brings back.
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import torch, tikmix_fast._cpu as module; print(module.__file__)"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith(str(site)), done.stderr
