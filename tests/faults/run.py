"""Break a copy of the project, one line at a time, and see the tests fail.

    python tests/faults/run.py                 every fault of faults.toml, each with the tests that it names
    python tests/faults/run.py NAME ...        some faults
    python tests/faults/run.py --whole         the whole ordinary suite for each, up to its first failure

The tests run on the copy without a fault first, and must pass. The exit status is 1 if a fault survives, or if its
tests could not run: an import or a collection that fails says nothing about the tests.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it to these versions

ROOT = Path(__file__).resolve().parents[2]
FAULTS = Path(__file__).with_name("faults.toml")

# An editable install answers imports before PYTHONPATH does, also in processes that tests start.
_SITE_CUSTOMIZE = """\
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "ScikitBuildRedirectingFinder"]
"""


@dataclass(frozen=True)
class Fault:
    """One line of the project, and what a tired person might have written instead.

    Attributes
    ----------
    name, layer : str
    file : str
        Relative to the project.
    line, replacement : str
        Without their indentation. The file holds the line once.
    effect : str
        What a user would get.
    tests : tuple of str
        Ordinary tests, as pytest takes them, at least one of which must fail.
    """

    name: str
    layer: str
    file: str
    line: str
    replacement: str
    effect: str
    tests: tuple[str, ...]

    def places(self, text: str) -> list[int]:
        """Return the numbers of the lines that equal the fault's line, from 0."""
        return [number for number, line in enumerate(text.splitlines()) if line.strip() == self.line]

    def applied(self, text: str) -> str:
        """Return the text with the fault.

        Raises
        ------
        ValueError
            If the text does not hold the line exactly once.
        """
        places = self.places(text)
        if len(places) != 1:
            raise ValueError(f"fault {self.name}: {self.file} must hold its line once; got it {len(places)} times")
        lines = text.splitlines(keepends=True)
        lines[places[0]] = lines[places[0]].replace(self.line, self.replacement)
        return "".join(lines)


def read_faults(path: Path = FAULTS) -> list[Fault]:
    """Read the list of faults.

    Raises
    ------
    ValueError
        If a fault lacks a field, has an unknown one, or has the name of another.
    """
    faults = []
    for content in tomllib.loads(path.read_text(encoding="utf-8"))["fault"]:
        names = [field.name for field in fields(Fault)]
        if set(content) != set(names):
            raise ValueError(f"fault {content.get('name')!r} must have the fields {names}; got {list(content)}")
        faults.append(Fault(**{**content, "tests": tuple(content["tests"])}))
    twice = {fault.name for fault in faults if sum(fault.name == other.name for other in faults) > 1}
    if twice:
        raise ValueError(f"faults must have names of their own; got more than one of {', '.join(sorted(twice))}")
    return faults


class Copy:
    """A copy of the project's files in which faults are tried, with a CPU module of its own."""

    def __init__(self, work: Path) -> None:
        self.tree, self._build, self._install = work / "tree", work / "build", work / "install"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.tree / name)
        site = work / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(_SITE_CUSTOMIZE)
        others = [path for path in sys.path[1:] if path and Path(path).resolve() != ROOT]
        # Without .pyc files: two versions of a source within a second have one time stamp.
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(site), str(self.tree), *others]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TIKMIX_FAST_CUDA": "OFF",
        }
        self._sound = self.build()
        self._place(self._sound)
        place = self._python("-c", "import tikmix_fast; print(tikmix_fast.__file__)").stdout
        if not place.startswith(str(self.tree)):
            raise RuntimeError(f"the tests must import the copy in {self.tree}; got {place}")

    def _python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.tree,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def build(self) -> dict[str, bytes]:
        """Compile what changed of the CPU module, and return the module's file.

        Raises
        ------
        RuntimeError
            If it does not compile.
        """
        options = ["--quiet", "--no-build-isolation", "--no-deps", "--upgrade", "--target", str(self._install)]
        done = self._python("-m", "pip", "install", *options, str(self.tree), "-C", f"build-dir={self._build}")
        if done.returncode:
            raise RuntimeError(f"the copy does not build:\n{done.stdout}")
        return {
            module.name: module.read_bytes()
            for module in (self._install / "tikmix_fast").glob("_cpu.*")
            if module.suffix != ".pyi"
        }

    def _place(self, modules: Mapping[str, bytes]) -> None:
        for name, content in modules.items():
            (self.tree / "tikmix_fast" / name).write_bytes(content)

    def test(self, tests: Sequence[str]) -> tuple[int, str]:
        """Run tests up to the first that fails; return pytest's exit status and output."""
        # The list of faults has a test of its own, which sees every fault.
        done = self._python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--ignore=tests/faults", *tests)
        return done.returncode, done.stdout

    def try_fault(self, fault: Fault, *, whole: bool) -> tuple[bool, str]:
        """Return whether the tests catch the fault, and what there is to say about it."""
        path = self.tree / fault.file
        text = path.read_text(encoding="utf-8")
        try:
            path.write_text(fault.applied(text), encoding="utf-8")
            if fault.file.startswith("csrc/cpu/"):
                self._place(self.build())
            status, output = self.test(() if whole else fault.tests)
        except (ValueError, RuntimeError) as error:
            return False, f"could not be tried: {error}"
        finally:
            path.write_text(text, encoding="utf-8")  # a new time stamp: the next build compiles it again
            self._place(self._sound)
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", output, re.MULTILINE)
        if status == 1 and failed:
            return True, f"caught by {failed[1]}"
        if status == 0:
            return False, "SURVIVES"
        return False, f"could not be tried: pytest ended with {status}\n{output[-3000:]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the faults, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to try; default: all")
    parser.add_argument("--whole", action="store_true", help="run the whole ordinary suite for each fault")
    options = parser.parse_args(arguments)
    faults = read_faults()
    unknown = set(options.names) - {fault.name for fault in faults}
    if unknown:
        parser.error(f"NAME must be a fault of {FAULTS.name}; got {', '.join(sorted(unknown))}")
    if options.names:
        faults = [fault for fault in faults if fault.name in options.names]

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as work:
        copy = Copy(Path(work))
        tests = () if options.whole else sorted({test for fault in faults for test in fault.tests})
        status, output = copy.test(tests)
        if status:
            print(f"{output}\nthe tests must pass without a fault first")
            return 1
        print(f"without a fault the tests pass ({time.monotonic() - began:.0f} s)", flush=True)
        missed = []
        for fault in faults:
            start = time.monotonic()
            caught, words = copy.try_fault(fault, whole=options.whole)
            print(f"{fault.name}: {words} ({time.monotonic() - start:.0f} s)", flush=True)
            if not caught:
                missed.append(fault.name)
    print(
        f"{len(faults) - len(missed)} of {len(faults)} faults caught in {(time.monotonic() - began) / 60:.1f} min"
        + (f"; missed: {', '.join(missed)}" if missed else "")
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
