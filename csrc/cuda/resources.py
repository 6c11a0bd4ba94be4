"""Run nvcc, print what every kernel takes, and fail where one spills registers to memory.

CMake puts this before every CUDA compile command: python resources.py NVCC ARGUMENTS...
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

_ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'")
_SPILLS = re.compile(r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (?P<registers>\d+) registers")
_SHARED = re.compile(r"(?P<bytes>\d+) bytes smem")
# ptxas says so where it waits for every matrix product, because something touches the accumulators too early.
_SERIALIZED = re.compile(r".*wgmma.*serializ.*", re.IGNORECASE)


class Resources(NamedTuple):
    """What one kernel takes on one architecture; shared memory counts what is not asked for at launch."""

    name: str
    architecture: str
    registers: int
    shared_bytes: int
    spilled_bytes: int


def parse(report: str) -> Iterator[Resources]:
    """Read what ``ptxas -v`` printed, kernel by kernel."""
    entry, spilled = None, 0
    for line in report.splitlines():
        if found := _ENTRY.search(line):
            entry, spilled = found, 0
        elif found := _SPILLS.search(line):
            spilled = int(found["stores"]) + int(found["loads"])
        elif entry and (found := _REGISTERS.search(line)):
            shared = _SHARED.search(line)
            registers, static = int(found["registers"]), int(shared["bytes"]) if shared else 0
            yield Resources(_demangle(entry["name"]), entry["architecture"], registers, static, spilled)
            entry = None


def _demangle(name: str) -> str:
    try:
        demangled = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return name
    return demangled.replace("tikmix_fast::gpu::", "").replace("(anonymous namespace)::", "").split("(")[0]


def main(command: list[str]) -> int:
    """Compile, and return the exit status: nvcc's, or 1 where a kernel spills or waits for its matrix products."""
    done = subprocess.run([*command, "-Xptxas", "-v"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wrong = done.returncode
    for kernel in parse(done.stdout):
        print(
            f"{kernel.architecture:>7} {kernel.registers:4} registers {kernel.spilled_bytes:5} B spilled  {kernel.name}"
        )
        if kernel.spilled_bytes:
            print(f"error: {kernel.name} spills registers on {kernel.architecture}", file=sys.stderr)
            wrong = wrong or 1
    if found := _SERIALIZED.search(done.stdout):
        print(f"error: ptxas: {found[0]}", file=sys.stderr)
        wrong = wrong or 1
    if done.returncode:
        print(done.stdout, file=sys.stderr)
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
