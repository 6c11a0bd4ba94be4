"""Building for one GPU into a folder of its own, with a small project in place of ours."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.gpu.build import build_package, gpu_architecture, interpreter_for, parse_kernels

PROJECT = """
cmake_minimum_required(VERSION 3.25)
project(small LANGUAGES NONE)
if(TIKMIX_FAST_CUDA STREQUAL ON)
  if(EXISTS ${CMAKE_SOURCE_DIR}/broken)
    message(FATAL_ERROR "kernel<1> spills registers")
  endif()
  add_custom_command(OUTPUT cuda.txt
                     COMMAND echo "sm_${TIKMIX_FAST_CUDA_ARCHITECTURES}  168 registers     0 B spilled  kernel"
                     COMMAND echo made > cuda.txt VERBATIM)
  add_custom_target(cuda ALL DEPENDS cuda.txt)
  install(FILES ${CMAKE_BINARY_DIR}/cuda.txt DESTINATION tikmix_fast RENAME _cuda.py)
endif()
install(FILES module.py DESTINATION tikmix_fast RENAME _cpu.py)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "tikmix_fast" / "ops").mkdir(parents=True)
    (root / "benchmarks").mkdir()
    (root / "benchmarks" / "__init__.py").write_text("")
    (root / "CMakeLists.txt").write_text(PROJECT)
    (root / "module.py").write_text("made = 'native'\n")
    (root / "tikmix_fast" / "__init__.py").write_text("")
    (root / "tikmix_fast" / "ops" / "__init__.py").write_text("")
    (root / "tikmix_fast" / "_cpu.old.so").write_text("of another build")
    return root


def test_the_package_is_staged_and_found(tree: Path, tmp_path: Path) -> None:
    built = build_package(tree, tmp_path / "build", "90a")
    assert built.cuda is None
    assert built.kernels == [{"name": "kernel", "architecture": "sm_90a", "registers": 168, "spilled_bytes": 0}]
    staged = sorted(path.name for path in (built.site / "tikmix_fast").iterdir())
    assert staged == ["__init__.py", "_cpu.py", "_cuda.py", "ops"]
    command, environment = interpreter_for(built.site, tree)
    script = (
        "import torch, benchmarks, tikmix_fast._cpu as module; print(module.made, module.__file__, benchmarks.__file__)"
    )
    done = subprocess.run(
        [*command, "-c", script], cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True
    )
    files = [str(built.site / "tikmix_fast" / "_cpu.py"), str(tree / "benchmarks" / "__init__.py")]
    assert done.stdout.split() == ["native", *files], done.stderr

    (tree / "tikmix_fast" / "new.py").write_text("")
    again = build_package(tree, tmp_path / "build", "90a")
    assert again.kernels == built.kernels  # nothing was compiled, and so nothing printed
    assert (again.site / "tikmix_fast" / "new.py").exists()


def test_without_the_cuda_module_where_it_does_not_compile(tree: Path, tmp_path: Path) -> None:
    (tree / "broken").write_text("")
    built = build_package(tree, tmp_path / "build", "80")
    assert "kernel<1> spills registers" in str(built.cuda)
    assert built.kernels == []
    assert not (built.site / "tikmix_fast" / "_cuda.py").exists()
    assert (built.site / "tikmix_fast" / "_cpu.py").exists()
    assert set(built.to_dict()) == {"site", "seconds", "cuda", "kernels"}


def test_a_tree_that_does_not_build_at_all(tree: Path, tmp_path: Path) -> None:
    (tree / "CMakeLists.txt").write_text("nonsense(")
    with pytest.raises(RuntimeError, match=r"(?s)cmake -S .* failed:"):
        build_package(tree, tmp_path / "build", "80")


def test_what_the_build_prints() -> None:
    output = (
        "[1/2] Building\n  sm_80  254 registers    16 B spilled  void k<A, 3>\n"
        "error: k spills\n sm_90a   32 registers     0 B spilled  z\n"
    )
    assert parse_kernels(output) == [
        {"name": "void k<A, 3>", "architecture": "sm_80", "registers": 254, "spilled_bytes": 16},
        {"name": "z", "architecture": "sm_90a", "registers": 32, "spilled_bytes": 0},
    ]
    assert [gpu_architecture(each) for each in ((8, 0), (8, 9), (9, 0), (10, 0))] == ["80", "89", "90a", "100"]
