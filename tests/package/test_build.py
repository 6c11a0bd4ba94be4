"""The build as a user meets it: the CUDA switch and its messages, what a wheel and an sdist hold."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

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


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def wheel(source_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source_copy, tmp_path_factory.mktemp("wheel"), "build_wheel")


@pytest.fixture(scope="module")
def sdist(source_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source_copy, tmp_path_factory.mktemp("sdist"), "build_sdist")


def tracked(folder: str) -> set[str]:
    """Return what git tracks below a folder."""
    listed = subprocess.run(["git", "ls-files", "-z", folder], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(filter(None, listed.stdout.split("\0")))


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"tikmix_fast-{__version__}.dist-info/METADATA").decode()
    package = {name for name in names if name.startswith("tikmix_fast/")}
    (module,) = package - tracked("tikmix_fast")
    assert re.fullmatch(r"tikmix_fast/_cpu\..*\.so", module)
    assert package - {module} == tracked("tikmix_fast")
    # What is not Python and easily forgotten.
    assert {
        "tikmix_fast/py.typed", "tikmix_fast/_cpu.pyi", "tikmix_fast/schemas/mixture.json",
        "tikmix_fast/report/page.html.j2", "tikmix_fast/report/page.css",
    } <= package  # fmt: skip
    information = f"tikmix_fast-{__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"tikmix_fast", information}
    assert not any("test_" in name or "conftest" in name for name in names)
    assert f"{information}/licenses/LICENSE" in names
    needed = {
        Requirement(line.partition(": ")[2]).name
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist:") and "extra ==" not in line
    }
    assert needed == {
        *("torch", "numpy", "scipy", "lightgbm", "triton", "typer", "rich", "matplotlib", "jinja2"),
        *("safetensors", "filelock"),
    }  # fmt: skip


@pytest.mark.slow
def test_the_sdist_holds_what_git_tracks(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml"} <= names
    assert tracked("csrc") | tracked("tikmix_fast") <= names
    assert names - tracked(".") == {"PKG-INFO"}


@pytest.mark.slow
@pytest.mark.parametrize("made", ["wheel", "sdist"])
def test_pip_installs_it_in_a_fresh_environment(made: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    file: Path = request.getfixturevalue(made)
    fresh = tmp_path / "fresh"
    venv.create(fresh, with_pip=True)
    own = next(fresh.glob("lib/python*/site-packages"))
    # The dependencies of this environment, but not the editable install in it: a path file within one is not read.
    (own / "dependencies.pth").write_text("\n".join(site.getsitepackages()))

    def run(*command: str) -> str:
        done = subprocess.run(
            [fresh / "bin" / command[0], *command[1:]],
            cwd=tmp_path,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            | {"TIKMIX_FAST_CUDA": "OFF", "PATH": os.pathsep.join([str(fresh / "bin"), OWN_TOOLS["PATH"]])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
    run("python", "-m", "pip", "install", "--quiet", *offline, str(file))
    assert run("tikmix-fast", "--version").strip() == __version__
    kernel = (
        "import torch, tikmix_fast._cpu as module; from tikmix_fast import ops; one = torch.ones(1, 1);"
        "print(module.__file__, *ops.group_influence(one, one, torch.tensor([0, 1]), one[None], backend='cpu'))"
    )
    place, value = run("python", "-c", kernel).split(maxsplit=1)
    assert Path(place).is_relative_to(fresh)
    assert value.startswith("tensor([1.]")


def documented_cuda_build() -> dict[str, str]:
    """Return the variables that docs/wheels.md sets for CUDA wheels, by name."""
    page = (ROOT / "docs" / "wheels.md").read_text(encoding="utf-8")
    block = page.partition("<!-- cuda -->\n```sh\n")[2].partition("```")[0]
    lines = [shlex.split(line) for line in block.splitlines()]
    return dict(words[1].split("=", 1) for words in lines if words[0] == "export")


def wheel_settings() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    return settings["cibuildwheel"]


def test_wheels_are_built_for_every_python_that_is_supported() -> None:
    supported = SpecifierSet(metadata("tikmix_fast")["Requires-Python"])
    built = [re.fullmatch(r"cp3(\d+)-\*", each) for each in wheel_settings()["build"].split()]
    minors = [int(found[1]) for found in built if found]
    assert len(minors) == len(built)
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert f"3.{minors[0]}" in supported
    assert f"3.{minors[0] - 1}" not in supported


def test_variables_of_wheel_builds_are_those_of_the_build() -> None:
    switch = (ROOT / "csrc" / "cuda" / "switch.cmake").read_text(encoding="utf-8")
    words = shlex.split(documented_cuda_build()["CIBW_ENVIRONMENT"])
    for name in (*wheel_settings()["environment"], *(word.partition("=")[0] for word in words)):
        assert name == "CUDACXX" or f"set({name} " in switch
    assert wheel_settings()["environment"]["TIKMIX_FAST_CUDA"] == "OFF"
    assert "TIKMIX_FAST_CUDA=ON" in words


def test_cuda_wheels_get_a_label_of_their_toolkit(source_copy: Path, tmp_path: Path) -> None:
    variables = documented_cuda_build()
    images = [variables[f"CIBW_MANYLINUX_{machine}_IMAGE"] for machine in ("X86_64", "AARCH64")]
    toolkits = {image.rpartition(":cuda")[2].replace(".", "") for image in images}
    copy = tmp_path / "source"
    shutil.copytree(source_copy, copy)
    for _ in range(2):  # a label that is there already stays alone
        subprocess.run(variables["CIBW_BEFORE_ALL"], shell=True, cwd=copy, check=True)
    made = build(copy, tmp_path, "prepare_metadata_for_build_wheel")
    assert {f"Version: {__version__}+cu{toolkit}" for toolkit in toolkits} == set(
        re.findall("^Version: .*$", (made / "METADATA").read_text(), flags=re.MULTILINE)
    )


def test_cibuildwheel_reads_the_settings() -> None:
    pytest.importorskip("cibuildwheel", reason="cibuildwheel is not installed")
    command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers", "--platform", "linux"]
    for more in ({}, documented_cuda_build()):
        done = subprocess.run(command, cwd=ROOT, env=os.environ | more, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [
            f"cp3{minor}-manylinux_{machine}" for machine in ("x86_64", "aarch64") for minor in range(10, 15)
        ]
