"""The list of faults fits the project; run.py tries them."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("faults_run", Path(__file__).with_name("run.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


run = _load()
FAULTS = run.read_faults()


def test_there_are_forty_over_all_layers() -> None:
    layers = Counter(fault.layer for fault in FAULTS)
    assert len(FAULTS) >= 40
    assert len(layers) == 11, layers
    assert min(layers.values()) >= 2, layers


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_its_line_is_there_once_and_its_replacement_compiles(fault) -> None:
    text = (ROOT / fault.file).read_text(encoding="utf-8") if (ROOT / fault.file).exists() else ""
    if len(fault.places(text)) != 1:
        folders = (path for name in ("tikmix_fast", "csrc") for path in (ROOT / name).rglob("*"))
        files = [path for path in folders if path.suffix in (".py", ".h", ".cpp", ".cu")]
        elsewhere = [str(path.relative_to(ROOT)) for path in files if fault.places(path.read_text(encoding="utf-8"))]
        pytest.fail(f"{fault.file} must hold once:\n{fault.line}\nfiles that hold it: {elsewhere or 'none'}")
    assert fault.replacement != fault.line
    assert "\n" not in fault.replacement
    if fault.file.endswith(".py"):
        before, after = ast.parse(text), ast.parse(fault.applied(text))
        assert ast.dump(before) != ast.dump(after)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_its_tests_are_there(fault) -> None:
    assert fault.tests
    for test in fault.tests:
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file(), f"{file} has moved"
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not name or f"def {name.partition('[')[0]}(" in text, f"{file} has no {name}"


def test_a_line_that_is_not_there_once_is_refused() -> None:
    fault = run.Fault("name", "layer", "file.py", "a = 1", "a = 2", "", ("tests",))
    assert fault.applied("if b:\n    a = 1\nc = 3\n") == "if b:\n    a = 2\nc = 3\n"
    for text in ("a = 10\n", "a = 1\nif b:\n    a = 1\n"):
        with pytest.raises(ValueError, match="must hold its line once"):
            fault.applied(text)
