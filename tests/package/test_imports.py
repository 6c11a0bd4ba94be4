"""What importing costs, and which way the layers point."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tikmix_fast

PACKAGE = Path(tikmix_fast.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# The lower a layer, the smaller its number; a file may import its own layer and those below.
LAYERS = {
    "_version": 0,
    "files": 0,
    "ops": 1,
    "testing": 2,
    "influence": 2,
    "data": 3,
    "mixture": 3,
    "training": 4,
    "report": 5,
    "benchmarking": 5,
    "cli": 6,
    "__main__": 7,
}
TORCH_FREE = [
    "mixture",
    "influence/matrix.py",
    "influence/record.py",
    "influence/resampling.py",
    "files.py",
    "_version.py",
    "__init__.py",
]


def imported_modules(path: Path, *, also_lazy: bool = True) -> set[str]:
    """Absolute names of the modules a file imports; imports for type checkers are left out."""
    package = ("tikmix_fast", *path.relative_to(PACKAGE).with_suffix("").parts)[:-1]
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if not also_lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return names


def layer_of(module: str) -> int | None:
    """Layer of a module of this package; None for the package itself, other packages and the native modules."""
    parts = module.split(".")
    return LAYERS.get(parts[1]) if parts[0] == "tikmix_fast" and len(parts) > 1 else None


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_point_down(path: Path) -> None:
    own = layer_of(".".join(("tikmix_fast", *path.relative_to(PACKAGE).with_suffix("").parts)))
    if own is None:
        assert path.name == "__init__.py", f"{path.name} belongs to no layer: add it to LAYERS"
        return
    upwards = {name for name in imported_modules(path) if (layer_of(name) or 0) > own}
    assert not upwards
    siblings = {"data": "mixture", "mixture": "data"}
    layer = path.relative_to(PACKAGE).parts[0]
    if layer in siblings:
        assert not {name for name in imported_modules(path) if name.startswith(f"tikmix_fast.{siblings[layer]}")}


def test_the_direction_is_seen() -> None:
    assert layer_of("tikmix_fast.influence.engine") > layer_of("tikmix_fast.ops")
    assert "tikmix_fast.ops.common.checks" in imported_modules(PACKAGE / "ops" / "cpu.py")
    assert "torch" in imported_modules(PACKAGE / "ops" / "cpu.py")


@pytest.mark.parametrize("name", TORCH_FREE)
def test_never_imports_torch(name: str) -> None:
    target = PACKAGE / name
    files = sorted(target.rglob("*.py")) if target.is_dir() else [target]
    assert files
    for path in files:
        assert not {module for module in imported_modules(path) if module.split(".")[0] == "torch"}, path


# Kernels in Triton's language, which functions import when they are used.
TRITON_KERNELS = {
    Path("benchmarking/gpu_l2.py"),
    *(Path("ops/triton") / f"{name}.py" for name in ("configs", "fused", "gradient", "projected", "two_pass")),
}


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_optional_or_heavy_packages_are_imported_when_used(path: Path) -> None:
    at_import = {name.split(".")[0] for name in imported_modules(path, also_lazy=False)}
    allowed = {"triton"} if path.relative_to(PACKAGE) in TRITON_KERNELS else set()
    assert not at_import & {"triton", "lightgbm"} - allowed


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = """
import sys
import tikmix_fast
print(tikmix_fast.__version__)
heavy = {"torch", "numpy", "scipy", "triton", "lightgbm", "matplotlib", "rich", "typer", "transformers"}
print(sorted(heavy & set(sys.modules)))
"""
    assert run(script).splitlines() == [tikmix_fast.__version__, "[]"]


def test_importing_the_ops_starts_no_gpu_and_imports_no_optional_package() -> None:
    script = """
import sys
from tikmix_fast import ops
import torch
ops.available_backends()
assert not torch.cuda.is_initialized()
print(sorted({"triton", "lightgbm", "matplotlib", "scipy.optimize", "transformers"} & set(sys.modules)))
"""
    assert run(script).strip() == "[]"


def test_a_process_has_one_openmp_runtime() -> None:
    """Two copies of libgomp would not share torch.set_num_threads, and would fight over the cores."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    script = """
import torch
from tikmix_fast import _cpu
torch.randn(300, 300) @ torch.randn(300, 300)
print({line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line})
"""
    assert len(ast.literal_eval(run(script))) == 1
