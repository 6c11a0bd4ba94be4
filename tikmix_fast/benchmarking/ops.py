"""The kernels against every baseline: checked against float64 first, then timed in turn, then weighed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tikmix_fast.benchmarking import memory
from tikmix_fast.benchmarking.baselines import PLAIN, Answer, Layer, Method, exact_methods, projected_methods
from tikmix_fast.benchmarking.interleaved import interleave
from tikmix_fast.benchmarking.machine import MachineRates
from tikmix_fast.testing import (
    WorstCell,
    check_budget,
    domain_gradients,
    eager_group_influence,
    gradient_error,
    influence_error,
    rounding_floor,
)

__all__ = [
    "CASES",
    "QUICK_CASES",
    "TINY_CASES",
    "Case",
    "CheckedMethod",
    "check_methods",
    "make_layer",
    "measure_case",
    "methods_of",
]

_WRONG = 30.0
"""A baseline, which has no budget to keep, is taken for broken beyond this many times the eager path's error."""


@dataclass(frozen=True)
class Case:
    """One layer and one batch.

    Attributes
    ----------
    rows, height, width : int
        T, O and I.
    domains, tasks : int
        m and n.
    dtype : str
        Name of a torch dtype, of operands and queries.
    projection : int or None
        k, to measure projected influence with k x k numbers of every gradient; None for exact influence.
    """

    rows: int
    height: int
    width: int
    domains: int
    tasks: int
    dtype: str
    projection: int | None = None

    @property
    def name(self) -> str:
        """A title for tables."""
        short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(self.dtype, self.dtype)
        projected = f", projected k={self.projection}" if self.projection else ""
        return f"{short} T={self.rows} O={self.height} I={self.width} m={self.domains} n={self.tasks}{projected}"

    @property
    def useful_flops(self) -> float:
        """Operations that influence with total needs: the weight gradient and one inner product per cell.

        Projected influence has no total; it counts as if its projections were dense.
        """
        if self.projection:
            k = self.projection
            return 2.0 * self.rows * k * (self.height + self.width + k) + 2.0 * self.domains * self.tasks * k * k
        weights = self.height * self.width
        return 2.0 * self.rows * weights + 2.0 * self.domains * self.tasks * weights

    @property
    def least_bytes(self) -> float:
        """Bytes that have to be moved: operands and queries read, the float32 total (if any) written, each once."""
        size = getattr(torch, self.dtype).itemsize
        if self.projection:
            return float(size * self.rows * (self.height + self.width) + 4 * self.tasks * self.projection**2)
        weights = self.height * self.width
        return float(size * (self.rows * (self.height + self.width) + self.tasks * weights) + 4 * weights)

    @property
    def plain_flops(self) -> float:
        """Operations of the plain weight gradient."""
        return 2.0 * self.rows * self.height * self.width

    @property
    def plain_bytes(self) -> float:
        """Bytes that the plain weight gradient has to move."""
        size = getattr(torch, self.dtype).itemsize
        return float(size * (self.rows * (self.height + self.width) + self.height * self.width))


CASES = (
    Case(4096, 1024, 1024, 8, 4, "float32"),
    Case(4096, 1024, 1024, 8, 4, "bfloat16"),
    Case(4096, 4096, 1024, 26, 9, "bfloat16"),
    Case(8192, 768, 768, 26, 9, "bfloat16"),
    Case(4096, 1024, 1024, 8, 4, "bfloat16", 64),
)
"""Those that the project set bars for."""

QUICK_CASES = (CASES[0], CASES[1], CASES[-1])
"""Those of ``tikmix-fast bench``."""

TINY_CASES = (
    Case(96, 40, 24, 3, 2, "float32"),
    Case(96, 40, 24, 3, 2, "bfloat16"),
    Case(96, 40, 24, 3, 2, "bfloat16", 16),
)
"""To see that everything runs."""


def methods_of(case: Case, *, every_instruction_set: bool = False) -> dict[str, Method]:
    """Return the methods that compete in a case, `PLAIN` first."""
    if case.projection:
        return projected_methods(case.projection)
    return exact_methods(every_instruction_set=every_instruction_set)


def make_layer(case: Case, seed: int = 0, device: torch.device | str = "cpu") -> Layer:
    """Draw operands and queries (standard normal) on a device, and domains of uneven size."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    random = np.random.default_rng(seed)
    shares = random.dirichlet(np.full(case.domains, 2.0))
    sizes = random.multinomial(case.rows, shares)
    offsets = torch.tensor(np.concatenate([[0], np.cumsum(sizes)]))
    return Layer(
        normal(case.rows, case.width),
        normal(case.rows, case.height),
        offsets,
        normal(case.tasks, case.height, case.width),
    )


@dataclass(frozen=True)
class CheckedMethod:
    """A method whose answer was found right.

    Attributes
    ----------
    run : callable
        What is timed.
    error, total_error : float or None
        Of the influence, max over cells of ``|dS_ij| / (|q_i| |g_j|)``, and of the total, in the measure of
        `gradient_error`; None where it gives none. That of projected influence is to the same projections in float64.
    sampling_error : float or None
        Of projected influence, to the exact one: root mean square over cells, in the same unit.
    ours : bool
    """

    run: Callable[[], Answer]
    error: float | None
    total_error: float | None
    sampling_error: float | None
    ours: bool


def check_methods(layer: Layer, methods: dict[str, Method]) -> tuple[dict[str, CheckedMethod], dict[str, str]]:
    """Prepare every method that can run and compare its answer with float64.

    Returns
    -------
    checked : dict of str to CheckedMethod
    skipped : dict of str to str
        The others, with the reason.

    Raises
    ------
    AssertionError
        If an answer is wrong, with the method's name: ours by the budget of `tikmix_fast.testing`, which is twice the
        error of the eager torch path in the same dtype; the others by 30 times that error.
    """
    gradients = domain_gradients(layer.input, layer.grad_output, layer.offsets)
    exact = _Truth.of(layer, gradients, None)

    def within_budget(name: str, ours: bool, found: WorstCell, other: WorstCell, floor: float) -> float:
        try:
            if ours:
                check_budget(found, other, floor)
            elif not found.error <= _WRONG * other.error + floor:
                raise AssertionError(f"{found}, where the eager path has {other}")
        except AssertionError as error:
            raise AssertionError(f"{name} is wrong: {error}") from None
        return found.error

    checked, skipped = {}, {}
    for name, method in methods.items():
        reason = method.refusal(layer)
        if reason is not None:
            skipped[name] = reason
            continue
        run = method.prepare(layer)
        answer = run()
        error = total_error = sampling_error = None
        if answer.values is not None:
            truth = exact
            if method.matrices is not None:
                truth = _Truth.of(layer, gradients, method.matrices(layer))
                scale = exact.queries.flatten(1).norm(dim=1)[:, None] * gradients.flatten(1).norm(dim=1)
                sampling_error = float(((answer.values - exact.values) / scale).square().mean().sqrt())
            found = influence_error(answer.values, truth.values, truth.queries, truth.gradients)
            floor = rounding_floor(truth.queries[0].numel())
            error = within_budget(f"{name}: influence", method.ours, found, truth.eager, floor)
        if answer.total is not None:
            found = gradient_error(answer.total, exact.total)
            total_error = within_budget(f"{name}: total", method.ours, found, exact.eager_total, 1e-6)
        checked[name] = CheckedMethod(run, error, total_error, sampling_error, method.ours)
    return checked, skipped


class _Truth(NamedTuple):
    """What is right, by float64, and how wrong the eager torch path of the same dtype is."""

    queries: Tensor
    gradients: Tensor
    values: Tensor
    total: Tensor
    eager: WorstCell
    eager_total: WorstCell

    @classmethod
    def of(cls, layer: Layer, gradients: Tensor, matrices: tuple[Tensor, Tensor] | None) -> _Truth:
        """Compute it from the domains' gradients [m, O, I], projected where matrices [k, O] and [k, I] are given."""
        input, grad_output, queries = layer.input, layer.grad_output, layer.queries
        wide = queries.double()
        if matrices is not None:
            output_matrix, input_matrix = matrices
            gradients = output_matrix.double() @ gradients @ input_matrix.double().T
            wide = output_matrix.double() @ wide @ input_matrix.double().T
            input, grad_output = input @ input_matrix.to(input.dtype).T, grad_output @ output_matrix.to(input.dtype).T
            queries = wide.to(input.dtype)
        values, total = wide.flatten(1) @ gradients.flatten(1).T, gradients.sum(0)
        eager_values, eager_total = eager_group_influence(input, grad_output, layer.offsets, queries)
        return cls(
            wide,
            gradients,
            values,
            total,
            influence_error(eager_values, values, wide, gradients),
            gradient_error(eager_total, total),
        )


def measure_case(
    case: Case,
    rates: MachineRates,
    *,
    rounds: int = 20,
    seconds: float | None = None,
    weigh: bool = True,
    every_instruction_set: bool = False,
    tell: Callable[[str], object] = lambda what: None,
) -> dict[str, Any]:
    """Check, time and weigh every method on one case.

    Parameters
    ----------
    case : Case
    rates : MachineRates
        Of this machine, for the shares.
    rounds, seconds
        As in `interleave`.
    weigh : bool
        Whether to measure memory, in a fresh process per method (instruction sets that are forced left out).
    every_instruction_set : bool
        Also our kernel with each instruction set forced.
    tell : callable (str) -> object
        Called with what is being done.

    Returns
    -------
    dict
        Plain JSON types: the case, ``rows`` (one per method) and ``skipped`` (method to reason).

    Raises
    ------
    AssertionError
        If a method is wrong; see `check_methods`.
    """
    tell(f"{case.name}: checking against float64")
    methods = methods_of(case, every_instruction_set=every_instruction_set)
    checked, skipped = check_methods(make_layer(case), methods)
    tell(f"{case.name}: timing {len(checked)} methods")
    timings = interleave({name: method.run for name, method in checked.items()}, rounds, seconds=seconds)
    weights = _weigh(case, [name for name in methods_of(case) if name in checked], tell) if weigh else {}
    rows = []
    for name, method in checked.items():
        summary = timings.summary(name, PLAIN)
        flops = case.plain_flops if method.error is None else case.useful_flops
        least = case.plain_bytes if method.error is None else case.least_bytes
        rows.append(
            {
                "method": name,
                "ours": method.ours,
                "gives": [
                    what
                    for what, error in (("influence", method.error), ("total", method.total_error))
                    if error is not None
                ],
                **summary,
                "flops_per_second": flops / summary["seconds"],
                "peak_share": flops / summary["seconds"] / rates.flops[case.dtype],
                "bytes_per_second": least / summary["seconds"],
                "bandwidth_share": least / summary["seconds"] / rates.bandwidth,
                "scratch_bytes": weights.get(name, {}).get("growth"),
                "peak_bytes": weights.get(name, {}).get("peak"),
                "error": method.error,
                "total_error": method.total_error,
                "sampling_error": method.sampling_error,
            }
        )
    return {
        "case": case.name,
        "dtype": case.dtype,
        "shape": {"T": case.rows, "O": case.height, "I": case.width, "m": case.domains, "n": case.tasks},
        "projection": case.projection,
        "main": next(iter(name for name, method in checked.items() if method.ours), None),
        "tokens_per_domain": case.rows / case.domains,
        "threads": torch.get_num_threads(),
        "intensity": case.useful_flops / case.least_bytes,
        "rows": rows,
        "skipped": skipped,
    }


def _weigh(case: Case, names: Sequence[str], tell: Callable[[str], object]) -> dict[str, dict[str, Any]]:
    if memory.why_not() is not None:
        return {}
    found = {}
    for name in names:
        tell(f"{case.name}: memory of {name}")
        request = {"case": vars(case), "method": name, "threads": torch.get_num_threads()}
        found[name] = memory.in_fresh_process(__name__, request)
    return found


def _weigh_one(request: dict[str, Any]) -> dict[str, int]:
    """Return the peak growth of one call beyond the total, the libraries warmed up on a small layer."""
    torch.set_num_threads(request["threads"])
    case = Case(**request["case"])
    method = methods_of(case)[request["method"]]
    small = replace(case, rows=128, height=32, width=32)
    method.prepare(make_layer(small))()
    run = method.prepare(make_layer(case))
    answers: list[Answer] = []
    found = memory.peak_growth(lambda: answers.append(run()))
    if not method.ours and answers[0].total is not None:  # ours adds to a total that is there before
        found["growth"] = max(0, found["growth"] - answers[0].total.nbytes)
    return found


if __name__ == "__main__":
    print(json.dumps(_weigh_one(json.load(sys.stdin))))
