"""The cases of the kernels on a GPU, and their goals."""

from __future__ import annotations

from dataclasses import dataclass

from tikmix_fast.benchmarking.ops import Case

__all__ = ["GPU_CASES", "TINY_GPU_CASES", "Bar"]


@dataclass(frozen=True)
class Bar:
    """A case and its goal.

    Attributes
    ----------
    case : Case
    measure : "ratio", "floor" or "scratch"
        Time over that of the plain weight gradient, time over the case's own floor, or bytes of scratch memory.
    bar, aim : float or None
        The value that the case must reach, and the value that it should reach.
    """

    case: Case
    measure: str = "ratio"
    bar: float | None = None
    aim: float | None = None


GPU_CASES = (
    Bar(Case(16384, 4096, 4096, 4, 9, "bfloat16"), "ratio", 1.12, 1.05),
    Bar(Case(65536, 4096, 4096, 26, 9, "bfloat16"), "ratio", 1.15, 1.06),
    Bar(Case(16384, 4096, 4096, 26, 9, "bfloat16"), "ratio", 1.50, 1.25),
    Bar(Case(65536, 14336, 4096, 26, 9, "bfloat16"), "scratch", 64e6, 0.0),
    Bar(Case(16384, 4096, 4096, 26, 9, "bfloat16", 64), "floor", 1.3, 1.15),
    Bar(Case(8192, 768, 768, 26, 9, "bfloat16")),
    Bar(Case(8192, 4096, 4096, 26, 9, "bfloat16")),
    Bar(Case(16384, 4096, 4096, 8, 4, "bfloat16")),
    Bar(Case(65536, 4096, 4096, 64, 32, "bfloat16")),
    Bar(Case(32768, 4096, 4096, 26, 1, "bfloat16")),
    Bar(Case(16384, 4096, 4096, 26, 9, "float16")),
    Bar(Case(16384, 4096, 4096, 26, 9, "float32")),
    Bar(Case(16384, 768, 768, 26, 9, "bfloat16", 64)),
)
"""The cases with goals come first, the others by importance."""

TINY_GPU_CASES = (
    Bar(Case(96, 40, 24, 3, 2, "bfloat16"), "ratio", 1.12, 1.05),
    Bar(Case(96, 40, 24, 3, 2, "float32"), "scratch", 64e6, 0.0),
    Bar(Case(96, 40, 24, 3, 2, "bfloat16", 16), "floor", 1.3, 1.15),
)
"""Cases that show that everything runs."""
