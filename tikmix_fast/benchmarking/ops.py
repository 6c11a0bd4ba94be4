"""The kernels against every baseline: checked against float64 first, then timed in turn, then weighed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tikmix_fast.benchmarking import memory
from tikmix_fast.benchmarking.baselines import PLAIN, Answer, Layer, Method, exact_methods, projected_methods
from tikmix_fast.benchmarking.interleaved import interleave
from tikmix_fast.benchmarking.layer_truth import Errors, LayerTruth, check_answer
from tikmix_fast.benchmarking.machine import MachineRates

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
        k of projected influence, which keeps k x k numbers of every gradient; None for exact influence.
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
        """Operations of influence with total: the weight gradient and one inner product per cell.

        Projected influence has no total and counts as if its projections were dense.
        """
        if self.projection:
            k = self.projection
            return 2.0 * self.rows * k * (self.height + self.width + k) + 2.0 * self.domains * self.tasks * k * k
        weights = self.height * self.width
        return 2.0 * self.rows * weights + 2.0 * self.domains * self.tasks * weights

    @property
    def least_bytes(self) -> float:
        """Bytes to move: read operands and queries once, write the float32 total (if any) once."""
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

    def rates(self, seconds: float, errors: Errors, flops: float, bandwidth: float) -> dict[str, float]:
        """Return the rates that a method reached, and their shares of the machine's.

        Parameters
        ----------
        seconds : float
            Time of the method.
        errors : Errors
            A method without influence is counted as the plain weight gradient.
        flops, bandwidth : float
            Operations and bytes per second that the machine reaches.
        """
        plain = errors.error is None
        work, moved = (self.plain_flops, self.plain_bytes) if plain else (self.useful_flops, self.least_bytes)
        return {
            "flops_per_second": work / seconds,
            "peak_share": work / seconds / flops,
            "bytes_per_second": moved / seconds,
            "bandwidth_share": moved / seconds / bandwidth,
        }


CASES = (
    Case(4096, 1024, 1024, 8, 4, "float32"),
    Case(4096, 1024, 1024, 8, 4, "bfloat16"),
    Case(4096, 4096, 1024, 26, 9, "bfloat16"),
    Case(8192, 768, 768, 26, 9, "bfloat16"),
    Case(4096, 1024, 1024, 8, 4, "bfloat16", 64),
)
"""The cases for which the project has goals."""

QUICK_CASES = (CASES[0], CASES[1], CASES[-1])
"""The cases of ``tikmix-fast bench``."""

TINY_CASES = (
    Case(96, 40, 24, 3, 2, "float32"),
    Case(96, 40, 24, 3, 2, "bfloat16"),
    Case(96, 40, 24, 3, 2, "bfloat16", 16),
)
"""Cases that show that everything runs."""


def methods_of(case: Case) -> dict[str, Method]:
    """Return the methods that compete in a case, `PLAIN` first."""
    return projected_methods(case.projection) if case.projection else exact_methods()


def make_layer(case: Case, seed: int = 0, device: torch.device | str = "cpu") -> Layer:
    """Draw standard normal operands and queries on a device, and domains of uneven size."""
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
    """A method whose answer is right.

    Attributes
    ----------
    run : callable
        The function to time.
    errors : Errors
    ours : bool
    """

    run: Callable[[], Answer]
    errors: Errors
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
        If an answer is wrong, with the method's name; see `check_answer`.
    """
    truth = LayerTruth.of(layer)
    checked, skipped = {}, {}
    for name, method in methods.items():
        reason = method.refusal(layer)
        if reason is not None:
            skipped[name] = reason
            continue
        run = method.prepare(layer)
        try:
            errors = check_answer(run(), method, layer, truth)
        except AssertionError as error:
            raise AssertionError(f"{name} is wrong: {error}") from None
        checked[name] = CheckedMethod(run, errors, method.ours)
    return checked, skipped


def measure_case(
    case: Case,
    rates: MachineRates,
    *,
    rounds: int = 20,
    seconds: float | None = None,
    weigh: bool = True,
    others: Mapping[str, Method] | None = None,
    tell: Callable[[str], object] = lambda step: None,
) -> dict[str, Any]:
    """Check, time and weigh every method on one case.

    Parameters
    ----------
    case : Case
    rates : MachineRates
        Rates of this machine; the shares are relative to them.
    rounds, seconds
        As in `interleave`.
    weigh : bool
        Whether to measure memory, in a fresh process per method; ``others`` are left out.
    others : mapping of str to Method, optional
        Further methods.
    tell : callable (str) -> object
        Called with the name of each step before it starts.

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
    methods = {**methods_of(case), **(others or {})}
    checked, skipped = check_methods(make_layer(case), methods)
    tell(f"{case.name}: timing {len(checked)} methods")
    timings = interleave({name: method.run for name, method in checked.items()}, rounds, seconds=seconds)
    weights = _weigh(case, [name for name in methods_of(case) if name in checked], tell) if weigh else {}
    rows = []
    for name, method in checked.items():
        summary = timings.summary(name, PLAIN)
        rows.append(
            {
                "method": name,
                "ours": method.ours,
                "gives": method.errors.gives,
                **summary,
                **case.rates(summary["seconds"], method.errors, rates.flops[case.dtype], rates.bandwidth),
                "scratch_bytes": weights.get(name, {}).get("growth"),
                "peak_bytes": weights.get(name, {}).get("peak"),
                **method.errors._asdict(),
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
    weights = {}
    for name in names:
        tell(f"{case.name}: memory of {name}")
        request = {"case": vars(case), "method": name, "threads": torch.get_num_threads()}
        weights[name] = memory.in_fresh_process(__name__, request)
    return weights


def _weigh_one(request: dict[str, Any]) -> dict[str, int]:
    """Return the peak growth of one call beyond the total, after a small layer has warmed up the libraries."""
    torch.set_num_threads(request["threads"])
    case = Case(**request["case"])
    method = methods_of(case)[request["method"]]
    small = replace(case, rows=128, height=32, width=32)
    method.prepare(make_layer(small))()
    run = method.prepare(make_layer(case))
    answers: list[Answer] = []
    peak = memory.peak_growth(lambda: answers.append(run()))
    if not method.ours and answers[0].total is not None:  # ours adds to a total that exists before the call
        peak["growth"] = max(0, peak["growth"] - answers[0].total.nbytes)
    return peak


if __name__ == "__main__":
    print(json.dumps(_weigh_one(json.load(sys.stdin))))
