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

# Rooms from the ground up: a room may import those of the rows above it in this list, and none of its own row.
ROOMS = {
    "": [
        {"_version", "_cpu", "_cuda", "arguments", "simplex"},
        {"files", "schemas"},
        {"tensor_files", "ops"},
        {"matrix", "testing"},
        {"influence", "mixture", "data"},
        {"probes", "checkpoints", "demo"},
        {"report"},
        {"benchmarking"},
        {"cli"},
        {"__main__"},
    ],
    "influence": [
        {"torch_private"},
        {"parallel"},
        {"capture"},
        {"loss"},
        {"preconditioners"},
        {"queries"},
        {"passes", "options"},
        {"memory_estimate"},
        {"query_placement"},
        {"session"},
        {"in_run"},
        {"engine_reports"},
        {"engine"},
    ],
    "mixture": [{"inputs"}, {"result"}, {"direct"}, {"surrogate", "schedule"}],
    "ops": [{"common"}, {"backends"}, {"dispatch"}, {"exact"}, {"projected"}],
}
TORCH_FREE = ["mixture", "matrix", "arguments.py", "simplex.py", "files.py", "_version.py", "__init__.py"]

Arrow = tuple[str, str]


def module_name(path: Path) -> tuple[str, ...]:
    """Dotted name of a file, without ``__init__``."""
    parts = ("tikmix_fast", *path.relative_to(PACKAGE).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {module_name(path): path for path in FILES}


def imported_modules(path: Path, *, also_lazy: bool = True, also_for_types: bool = True) -> set[str]:
    """Absolute names of the modules a file imports: in functions and for type checkers too, unless told otherwise."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path)[:-1]
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if not also_for_types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if not also_lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                known = tuple(whole.split(".")) in MODULES or alias.name in ("_cpu", "_cuda")
                names.add(whole if known else module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return names


def arrows() -> dict[str, dict[Arrow, Arrow]]:
    """For every folder, the arrows between the files and folders in it, each with a pair of modules that makes it.

    An ``__init__`` stands for its folder: what it imports from inside is no arrow.
    """
    folders: dict[str, dict[Arrow, Arrow]] = {}
    for module, path in MODULES.items():
        for name in imported_modules(path):
            target = tuple(name.split("."))
            if target[0] != "tikmix_fast":
                continue
            depth = 0
            while depth < min(len(module), len(target)) and module[depth] == target[depth]:
                depth += 1
            if depth < len(module) and depth < len(target):
                folder = ".".join(module[1:depth])
                folders.setdefault(folder, {}).setdefault((module[depth], target[depth]), (".".join(module), name))
    return folders


def first_circle(edges: dict[Arrow, Arrow]) -> str | None:
    """Return a circle of arrows in words, or None."""
    ahead: dict[str, set[str]] = {}
    for one, other in edges:
        ahead.setdefault(one, set()).add(other)
    for start in sorted(ahead):
        paths = [[start]]
        reached: set[str] = set()
        while paths:
            path = paths.pop()
            for step in sorted(ahead.get(path[-1], ())):
                if step == start:
                    pairs = [edges[pair] for pair in zip([*path], [*path[1:], start], strict=True)]
                    return "; ".join(f"{one} imports {other}" for one, other in pairs)
                if step not in reached:
                    reached.add(step)
                    paths.append([*path, step])
    return None


@pytest.mark.parametrize("folder", sorted(arrows()), ids=lambda folder: folder or "tikmix_fast")
def test_no_circle_in_a_folder(folder: str) -> None:
    circle = first_circle(arrows()[folder])
    assert circle is None, circle


@pytest.mark.parametrize("folder", list(ROOMS), ids=lambda folder: folder or "tikmix_fast")
def test_imports_point_down(folder: str) -> None:
    level = {room: row for row, rooms in enumerate(ROOMS[folder]) for room in rooms}
    there = {name[len(folder.split(".")) + 1 if folder else 1] for name in MODULES if _inside(name, folder)}
    assert there <= set(level), f"rooms without a row: {sorted(there - set(level))}"
    for (one, other), (importer, imported) in sorted(arrows()[folder].items()):
        assert level[one] > level[other], f"{importer} imports {imported}: up, or beside"


def _inside(name: tuple[str, ...], folder: str) -> bool:
    parents = ("tikmix_fast", *filter(None, folder.split(".")))
    return len(name) > len(parents) and name[: len(parents)] == parents


def test_circles_and_arrows_are_seen() -> None:
    edges = {("a", "b"): ("x.a", "x.b"), ("b", "c"): ("x.b", "x.c"), ("c", "a"): ("x.c.d", "x.a")}
    assert first_circle(edges) == "x.a imports x.b; x.b imports x.c; x.c.d imports x.a"
    assert first_circle({("a", "b"): ("x.a", "x.b"), ("a", "c"): ("x.a", "x.c"), ("b", "c"): ("x.b", "x.c")}) is None
    assert arrows()[""]["influence", "ops"]
    assert any(other == "_cpu" for _, other in arrows()[""]), "native modules count"
    assert arrows()["influence"]["session", "passes"]
    assert "torch" in imported_modules(PACKAGE / "influence" / "session.py")


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_the_package_does_not_import_what_is_beside_it(path: Path) -> None:
    assert not {name for name in imported_modules(path) if name.split(".")[0] in ("benchmarks", "tests", "examples")}


@pytest.mark.parametrize("name", TORCH_FREE)
def test_never_imports_torch(name: str) -> None:
    target = PACKAGE / name
    files = sorted(target.rglob("*.py")) if target.is_dir() else [target]
    assert files
    for path in files:
        assert not {module for module in imported_modules(path) if module.split(".")[0] == "torch"}, path


# Kernels in Triton's language, which functions import when they are used.
TRITON_KERNELS = {path for path in FILES if path.parent.name == "triton" and path.name != "__init__.py"}


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_optional_or_heavy_packages_are_imported_when_used(path: Path) -> None:
    at_import = {name.split(".")[0] for name in imported_modules(path, also_lazy=False, also_for_types=False)}
    allowed = {"triton"} if path in TRITON_KERNELS else set()
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
