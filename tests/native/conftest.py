from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "csrc" / "cuda"

BuildModule = Callable[[str, Sequence[str]], ModuleType]


@pytest.fixture(scope="session")
def build_module(tmp_path_factory: pytest.TempPathFactory) -> BuildModule:
    """Compile sources of this folder to a module, with the kernels' headers for the simulator; once per session.

    CXXFLAGS adds to the compiler's options: `-fsanitize=undefined -fno-sanitize-recover=all`, for example.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the native test modules need g++")
    pybind11 = pytest.importorskip("pybind11", reason="the native test modules need pybind11")
    folder = tmp_path_factory.mktemp("native")
    includes = (KERNELS, HERE, pybind11.get_include(), sysconfig.get_path("include"))

    @cache
    def build(name: str, sources: tuple[str, ...]) -> ModuleType:
        module = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        done = subprocess.run(
            [
                *(compiler, "-O2", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden"),
                "-DTIKMIX_FAST_SIMULATED",
                *(f"-I{include}" for include in includes),
                *(HERE / source for source in sources),
                *shlex.split(os.environ.get("CXXFLAGS", "")),
                *("-o", module),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        spec = importlib.util.spec_from_file_location(name, module)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    return lambda name, sources: build(name, tuple(sources))
