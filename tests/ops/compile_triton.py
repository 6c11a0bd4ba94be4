"""Compile what a call of a Triton kernel would launch, for an architecture that need not be here; print what came out.

Run by test_triton_compile.py in a process of its own, where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tikmix_fast.ops.backends.triton import configs, fused, gradient, two_pass
from tikmix_fast.ops.common.checks import Arguments

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Machine:
    """As much of a driver as compiling asks for."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def loop_counts(code: str, pattern: str) -> list[tuple[int, int]]:
    """Return, for every innermost loop of machine code that holds a pattern, how often, and its spills."""
    lines = code.splitlines()
    labels = {match[1]: n for n, line in enumerate(lines) if (match := re.match(r"\s*(\.L_x_\d+):", line))}
    jumps = [(match[1], n) for n, line in enumerate(lines) if (match := re.search(r"BRA\b.*`\((\.L_x_\d+)\)", line))]
    loops = [(labels[label], n) for label, n in jumps if labels.get(label, n) < n]
    inner = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    bodies = ["\n".join(lines[a:b]) for a, b in inner]
    return [
        (len(re.findall(pattern, body)), len(re.findall(r"\b(?:LDL|STL)\b", body)))
        for body in bodies
        if re.search(pattern, body)
    ]


def report(kernel: object) -> dict[str, object]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    return {
        "name": kernel.metadata.name,
        "registers": int(registers[1]),
        "stack": int(registers[2]),
        "shared": kernel.metadata.shared,
        "wgmma": loop_counts(code, r"\bHGMMA\b"),
        "mma": loop_counts(code, r"\bHMMA\b"),
        "float": [pair for pair in loop_counts(code, r"\bFFMA\b") if pair[0] >= 64],
        "copies": len(re.findall(r"\bUTMALDG\b", code)),
    }


def main() -> None:
    architecture, which, dtype, queries, total, order, tile = json.loads(sys.argv[1])
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("nothing is compiled in the interpreter")
    gradient.capability = lambda device: divmod(architecture, 10)
    two_pass.product_configs = lambda device, element_bytes: configs._PRODUCTS[element_bytes]
    triton.runtime.driver.set_active(Machine(architecture))
    compiled = []
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: object, **options: object) -> object:
        compiled.append(launch(self, *args, **options | {"warmup": True}))
        return compiled[-1]

    JITFunction.run = compile_only
    rows, height, width, tasks, domains = 512, 256, 512, 9, 26
    call = Arguments(
        torch.zeros(rows, width, dtype=getattr(torch, dtype)),
        torch.zeros(rows, height, dtype=getattr(torch, dtype)),
        torch.linspace(0, rows, domains + 1).long(),
        torch.zeros(tasks, height, width, dtype=getattr(torch, queries)),
        None,
        torch.arange(rows) if order else None,
        torch.zeros(height, width) if total else None,
    )
    kernel = {"fused": fused, "two_pass": two_pass}[which]
    kernel.group_influence(call, tile=configs.Tile(*tile), splits=1 + order, flag=torch.zeros(1).int())
    print(json.dumps([report(each) for each in compiled]))


if __name__ == "__main__":
    main()
