"""Methods with a kernel forced by an environment variable."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tikmix_fast.benchmarking.baselines import Answer, Layer, Method, exact_methods
from tikmix_fast.ops.backends import cpu

__all__ = ["environment_variable", "instruction_set_methods"]


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable inside, and restore it at the end."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def instruction_set_methods() -> dict[str, Method]:
    """Return our CPU kernel with each instruction set of this machine forced, by name."""
    ours = exact_methods()["tikmix_fast"]
    return {f"tikmix_fast, {name}": ours._replace(prepare=_forced(ours, name)) for name in cpu.instruction_sets()}


def _forced(method: Method, name: str) -> Callable[[Layer], Callable[[], Answer]]:
    def prepare(layer: Layer) -> Callable[[], Answer]:
        with environment_variable(cpu.INSTRUCTION_SET_VARIABLE, name):
            run = method.prepare(layer)

        def run_forced() -> Answer:
            with environment_variable(cpu.INSTRUCTION_SET_VARIABLE, name):
                return run()

        return run_forced

    return prepare
