"""Build the native modules for one GPU and stage the package beside them, without an installation."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tikmix_fast import files

__all__ = ["Build", "build_package", "gpu_architecture", "interpreter_for", "parse_kernels"]

# The format of csrc/cuda/resources.py.
_KERNEL = re.compile(
    r"^\s*(?P<architecture>sm_\w+)\s+(?P<registers>\d+) registers\s+(?P<spilled>\d+) B spilled\s+(?P<name>.+)$"
)
_PACKAGE = "tikmix_fast"


@dataclass(frozen=True)
class Build:
    """A build of the package.

    Attributes
    ----------
    site : Path
        First on the path, this makes ``import tikmix_fast`` find the staged package.
    seconds : float
    cuda : str or None
        Why there is no CUDA module; None if there is one.
    kernels : list of dict
        ``name``, ``architecture``, ``registers`` and ``spilled_bytes`` of every kernel, from the compiler.
    """

    site: Path
    seconds: float
    cuda: str | None
    kernels: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**asdict(self), "site": str(self.site)}


def gpu_architecture(capability: tuple[int, int]) -> str:
    """Return the architecture to build for a GPU of this compute capability.

    Examples
    --------
    >>> gpu_architecture((9, 0)), gpu_architecture((8, 6))
    ('90a', '86')
    """
    major, minor = capability
    return f"{major}{minor}{'a' if major == 9 else ''}"


def build_package(root: Path, folder: Path, architecture: str, seconds: float = 600) -> Build:
    """Configure and compile ``root`` into ``folder``, and stage the package under ``folder/site``.

    Files that are up to date in the folder are not compiled again. If the CUDA module does not compile, the package is
    staged without it and `Build.cuda` says why.

    Raises
    ------
    RuntimeError
        If the package does not build without CUDA either, or the time is up; with the end of the output.
    """
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    site, log = folder / "site", folder / "kernels.json"
    failure, output = None, ""
    try:
        output = _compile(
            root,
            folder / "cuda",
            site,
            ["TIKMIX_FAST_CUDA=ON", f"TIKMIX_FAST_CUDA_ARCHITECTURES={architecture}"],
            seconds,
        )
    except RuntimeError as error:
        failure = str(error)
        _compile(root, folder / "cpu", site, ["TIKMIX_FAST_CUDA=OFF"], seconds)
    # The compiler prints nothing for files that it did not compile again.
    known = {} if failure or not log.exists() else {each["name"]: each for each in json.loads(log.read_text())}
    kernels = list({**known, **{each["name"]: each for each in parse_kernels(output)}}.values())
    files.write_json(log, kernels)
    return Build(site, time.perf_counter() - start, failure, kernels)


def _compile(root: Path, folder: Path, site: Path, definitions: list[str], seconds: float) -> str:
    pybind11 = _run([sys.executable, "-m", "pybind11", "--cmakedir"], seconds).strip()
    definitions = [
        f"pybind11_DIR={pybind11}", f"Python_EXECUTABLE={sys.executable}", f"CMAKE_INSTALL_PREFIX={site}", *definitions
    ]  # fmt: skip
    _run(["cmake", "-S", str(root), "-B", str(folder), "-G", "Ninja", *(f"-D{each}" for each in definitions)], seconds)
    output = _run(["cmake", "--build", str(folder)], seconds)
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(root / _PACKAGE, site / _PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    _run(["cmake", "--install", str(folder)], seconds)
    return output


def _run(command: list[str], seconds: float) -> str:
    # Use cmake and ninja of the running environment, even if it is not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds,
            env=os.environ | {"PATH": path},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{' '.join(command[:3])} failed: {error}") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} failed: {done.stdout.strip()[-3000:]}")
    return done.stdout


def parse_kernels(output: str) -> list[dict[str, Any]]:
    """Read the kernels' resources from the output of the build.

    Examples
    --------
    >>> parse_kernels(" sm_90a  168 registers     0 B spilled  exact_mma<1>")[0]["registers"]
    168
    """
    return [
        {
            "name": kernel["name"].strip(),
            "architecture": kernel["architecture"],
            "registers": int(kernel["registers"]),
            "spilled_bytes": int(kernel["spilled"]),
        }
        for kernel in map(_KERNEL.match, output.splitlines())
        if kernel
    ]


def interpreter_for(site: Path, root: Path) -> tuple[list[str], dict[str, str]]:
    """Return the command of a Python that imports the staged package and ``benchmarks``, and its environment.

    An editable install takes precedence over the path. If there is one, the Python starts without its own site-packages
    and gets them through the path.

    Parameters
    ----------
    site : Path
        The staged package.
    root : Path
        The repository, which holds ``benchmarks``; it comes after ``site``, whose package has the native modules.
    """
    editable = any(type(finder).__module__.endswith(f"editable_skbc_{_PACKAGE}") for finder in sys.meta_path)
    inherited = sys.path[1:] if editable else [os.environ.get("PYTHONPATH", "")]
    path = [str(site), str(root), *filter(None, inherited)]
    return [sys.executable, *(["-S"] if editable else [])], {"PYTHONPATH": os.pathsep.join(path)}
