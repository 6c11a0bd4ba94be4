"""The kernels on a GPU against every baseline: checked against float64 first, then timed in turn, and weighed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.ceilings import measure_ceilings
from benchmarks.gpu.device import Device
from benchmarks.gpu.methods import gpu_methods
from benchmarks.gpu.timing import time_in_turn
from tikmix_fast.benchmarking.baselines import PLAIN, Answer, Layer, Method
from tikmix_fast.benchmarking.interleaved import Timings
from tikmix_fast.benchmarking.ops import Case, make_layer
from tikmix_fast.testing import (
    WorstCell,
    check_budget,
    domain_gradients,
    eager_group_influence,
    gradient_error,
    influence_error,
    rounding_floor,
)

__all__ = ["GPU_CASES", "TINY_GPU_CASES", "Bar", "LayerTruth", "measure_gpu_case", "run_ops"]

_WRONG = 30.0
# float64 gradients of all domains are formed for this many rows of the weights at a time.
_SLICE = 1024
# Below this, launches cost as much as the work: the same work is also replayed from a CUDA graph.
_SHORT = 100e-6
_MOST_SETS = 8


@dataclass(frozen=True)
class Bar:
    """A case, and what was set as its goal.

    Attributes
    ----------
    case : Case
    measure : "ratio", "floor" or "scratch"
        Time over that of the plain weight gradient, time over the case's own floor, or bytes of memory besides.
    bar, aim : float or None
        What it must reach, and what it should.
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
"""Those that the project set bars for come first; the others in the order in which they matter."""

TINY_GPU_CASES = (
    Bar(Case(96, 40, 24, 3, 2, "bfloat16"), "ratio", 1.12, 1.05),
    Bar(Case(96, 40, 24, 3, 2, "float32"), "scratch", 64e6, 0.0),
    Bar(Case(96, 40, 24, 3, 2, "bfloat16", 16), "floor", 1.3, 1.15),
)
"""To see that everything runs."""


class LayerTruth(NamedTuple):
    """What is right for a layer, by float64, and how wrong the eager torch path of the same dtype is.

    Attributes
    ----------
    values, total : float64 Tensor [n, m], [O, I]
    query_norms, gradient_norms : float64 Tensor [n, 1, 1], [m, 1, 1]
    eager, eager_total : WorstCell
    weights : int
        Entries of a gradient.
    """

    values: Tensor
    total: Tensor
    query_norms: Tensor
    gradient_norms: Tensor
    eager: WorstCell
    eager_total: WorstCell
    weights: int

    @classmethod
    def of(cls, layer: Layer) -> LayerTruth:
        """Compute it a slice of the weights at a time, so that no [m, O, I] of float64 is needed."""
        tasks, height, width = layer.queries.shape
        domains = len(layer.offsets) - 1
        values = torch.zeros(tasks, domains, dtype=torch.float64, device=layer.input.device)
        total = torch.empty(height, width, dtype=torch.float64, device=layer.input.device)
        squares, query_squares = values.new_zeros(domains), values.new_zeros(tasks)
        for top in range(0, height, _SLICE):
            rows = slice(top, top + _SLICE)
            gradients = domain_gradients(layer.input, layer.grad_output[:, rows], layer.offsets).flatten(1)
            queries = layer.queries[:, rows].double().flatten(1)
            values += queries @ gradients.T
            squares += gradients.square().sum(1)
            query_squares += queries.square().sum(1)
            total[rows] = gradients.sum(0).view(-1, width)
            del gradients, queries
        query_norms, gradient_norms = (each.sqrt()[:, None, None] for each in (query_squares, squares))
        eager, eager_total = eager_group_influence(layer.input, layer.grad_output, layer.offsets, layer.queries)
        return cls(
            values,
            total,
            query_norms,
            gradient_norms,
            influence_error(eager, values, query_norms, gradient_norms),
            gradient_error(eager_total, total),
            height * width,
        )

    def projected(self, layer: Layer, matrices: tuple[Tensor, Tensor]) -> LayerTruth:
        """Return what is right for the same layer seen through matrices [k, O] and [k, I]; the total stays."""
        output, input = matrices
        wide = Layer(
            layer.input.double() @ input.double().T,
            layer.grad_output.double() @ output.double().T,
            layer.offsets,
            output.double() @ layer.queries.double() @ input.double().T,
        )
        dtype = layer.input.dtype
        small_input, small_grad = layer.input @ input.to(dtype).T, layer.grad_output @ output.to(dtype).T
        truth = LayerTruth.of(wide)
        eager, _ = eager_group_influence(small_input, small_grad, layer.offsets, wide.queries.to(dtype))
        found = influence_error(eager, truth.values, truth.query_norms, truth.gradient_norms)
        return truth._replace(eager=found, total=self.total, eager_total=self.eager_total)


class _Checked(NamedTuple):
    gives: list[str]
    error: float | None
    total_error: float | None
    sampling_error: float | None
    scratch_bytes: int | None


def _check(device: Device, run: Callable[[], Answer], method: Method, layer: Layer, truth: LayerTruth) -> _Checked:
    """Call for the first time and compare the answer with float64; raise AssertionError if it is wrong."""
    answer, growth = device.peak_growth(run)

    def accept(what: str, found: WorstCell, eager: WorstCell, floor: float) -> float:
        if not math.isfinite(found.error):
            raise AssertionError(f"{what}: {found}")
        if method.ours:
            try:
                check_budget(found, eager, floor)
            except AssertionError as error:
                raise AssertionError(f"{what}: {error}") from None
        elif not found.error <= _WRONG * eager.error + floor:
            raise AssertionError(f"{what}: {found}, where the eager path has {eager}")
        return found.error

    gives, error, total_error, sampling_error = [], None, None, None
    if answer.values is not None:
        right = truth
        if method.matrices is not None:
            right = truth.projected(layer, method.matrices(layer))
            scale = truth.query_norms[:, 0] * truth.gradient_norms[:, 0, 0]
            sampling_error = float(((answer.values.double() - truth.values) / scale).square().mean().sqrt())
        found = influence_error(answer.values, right.values, right.query_norms, right.gradient_norms)
        error = accept("influence", found, right.eager, rounding_floor(right.weights))
        gives.append("influence")
    if answer.total is not None:
        total_error = accept("total", gradient_error(answer.total, truth.total), truth.eager_total, 1e-6)
        gives.append("total")
        if growth is not None and not method.ours:  # ours adds to a total that is there before
            growth = max(0, growth - answer.total.nbytes)
    return _Checked(gives, error, total_error, sampling_error, growth)


Trying = Callable[[str], object]


def measure_gpu_case(
    device: Device,
    bar: Bar,
    ceilings: dict[str, Any],
    *,
    rounds: int = 20,
    seconds: float | None = None,
    without: dict[str, str] | None = None,
    trying: Trying = lambda what: None,
) -> dict[str, Any]:
    """Check, weigh and time every method on one case.

    Parameters
    ----------
    device : Device
    bar : Bar
    ceilings : dict
        From `measure_ceilings`.
    rounds, seconds
        As in `time_in_turn`.
    without : dict of str to str, optional
        Methods to leave out, with the reason.
    trying : callable (str) -> object
        Called with the name of a method before it runs for the first time, and with "timing" before all take turns.

    Returns
    -------
    dict
        Plain JSON types: the case, ``rows`` (one per method), ``skipped`` and ``wrong`` (method to reason).

    Raises
    ------
    RuntimeError
        If the device can no longer be used.
    """
    case = bar.case
    layer = _make_layer(case, 0, device)
    truth = LayerTruth.of(layer)
    bytes_of_set = layer.input.nbytes + layer.grad_output.nbytes
    sets = min(_MOST_SETS, max(1, math.ceil(4 * device.cache_bytes / bytes_of_set)))
    layers = [layer, *(_make_layer(case, seed, device) for seed in range(1, sets))]
    skipped, wrong, checked = dict(without or {}), {}, {}
    runs: dict[str, Sequence[Callable[[], object]]] = {}
    for name, method in gpu_methods(case.projection).items():
        if name in skipped:
            continue
        trying(name)
        try:
            reason = method.refusal(layer)
            if reason is not None:
                skipped[name] = reason
                continue
            prepared = method.prepare(layer)
            checked[name] = _check(device, prepared, method, layer, truth), method.ours
            runs[name] = [prepared, *(method.prepare(each) for each in layers[1:])]
        except AssertionError as error:
            wrong[name] = str(error)
        except Exception as error:  # one method that cannot run must not cost the others
            skipped[name] = _in_one_line(error)
        device.synchronize()  # raises where the error was the device's: nothing runs any more in this process
    if PLAIN not in runs:
        raise RuntimeError(f"nothing to compare with: {skipped.get(PLAIN) or wrong.get(PLAIN)}")
    trying("timing")
    with device.watch_clocks() as clocks:
        timings = time_in_turn(device, runs, rounds=rounds, seconds=seconds)
    short = timings.summary(PLAIN, PLAIN)["seconds"] < _SHORT
    graphs = _time_graphs(device, runs, rounds) if short else {}
    rows = [_row(name, found, ours, case, ceilings, timings) for name, (found, ours) in checked.items() if name in runs]
    for row in rows:
        row["graph"] = graphs.get(row["method"])
    return {
        "case": case.name,
        "measure": bar.measure,
        "bar": bar.bar,
        "aim": bar.aim,
        "shape": asdict(case),
        "tokens_per_domain": case.rows / case.domains,
        "floor_seconds": _floor(case, ceilings),
        "input_sets": sets,
        "clocks": clocks,
        "rows": rows,
        "skipped": skipped,
        "wrong": wrong,
    }


def _make_layer(case: Case, seed: int, device: Device) -> Layer:
    layer = make_layer(case, seed, device.where)
    # Influence of standard normal numbers would be beyond float16.
    return replace(layer, queries=layer.queries / 256) if case.dtype == "float16" else layer


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _floor(case: Case, ceilings: dict[str, Any]) -> float:
    """Return the least time for what the case needs, by the rates measured."""
    return float(max(case.useful_flops / ceilings["flops"][case.dtype], case.least_bytes / ceilings["bandwidth"]))


def _row(
    name: str, found: _Checked, ours: bool, case: Case, ceilings: dict[str, Any], timings: Timings
) -> dict[str, Any]:
    summary = timings.summary(name, PLAIN)
    seconds = summary["seconds"]
    plain = found.error is None
    flops, least = (case.plain_flops, case.plain_bytes) if plain else (case.useful_flops, case.least_bytes)
    return {
        "method": name,
        "ours": ours,
        **found._asdict(),
        **summary,
        "flops_per_second": flops / seconds,
        "peak_share": flops / seconds / ceilings["flops"][case.dtype],
        "bytes_per_second": least / seconds,
        "bandwidth_share": least / seconds / ceilings["bandwidth"],
        "floor_ratio": None if plain else seconds / _floor(case, ceilings),
    }


def _run_all(runs: Sequence[Callable[[], object]]) -> list[object]:
    return [run() for run in runs]


def _time_graphs(
    device: Device, runs: dict[str, Sequence[Callable[[], object]]], rounds: int
) -> dict[str, dict[str, Any]]:
    """Time the same work replayed from CUDA graphs, one that holds all sets of inputs for each method."""
    graphs: dict[str, Sequence[Callable[[], object]]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, each in runs.items():
        try:
            graphs[name] = [device.capture(partial(_run_all, each))]
        except Exception as error:
            found[name] = {"skipped": _in_one_line(error)}
            device.synchronize()
    if PLAIN in graphs:
        timings = time_in_turn(device, graphs, rounds=rounds)
        for name in graphs:
            summary = timings.summary(name, PLAIN)
            kept = {key: summary[key] for key in ("ratio", "ratio_interval", "rounds")}
            found[name] = {"seconds": summary["seconds"] / len(runs[name]), **kept}
    return found


def run_ops(
    device: Device,
    content: dict[str, Any],
    seconds: float,
    save: Callable[[dict[str, Any]], object],
    cases: Sequence[Bar] = GPU_CASES,
) -> None:
    """Measure the ceilings and every case that is not in ``content`` yet, and save after each.

    What ``content`` says was being tried when an earlier process died is left out and recorded as crashed.

    Parameters
    ----------
    device : Device
    content : dict
        What an earlier process saved, or an empty dict; changed.
    seconds : float
        Begin no case after this time.
    save : callable (dict) -> object
    cases : sequence of Bar
    """
    end = time.monotonic() + seconds
    tiny = device.where.type == "cpu"
    crashed = content.setdefault("crashed", [])
    died = content.pop("trying", None)
    if died:
        crashed.append({"why": "the process died", **died})
    done = content.setdefault("cases", [])
    content["left_out"] = []
    if "ceilings" not in content:
        content["trying"] = {"case": "ceilings", "what": "ceilings"}
        save(content)
        options = {"gemm": 64, "copied": 1 << 16, "rounds": 3} if tiny else {}
        content["ceilings"] = measure_ceilings(device, **options)
    todo = [bar for bar in cases if bar.case.name not in {each["case"] for each in done}]
    for index, bar in enumerate(todo):
        name = bar.case.name
        left = end - time.monotonic()
        before = {each["what"]: f"crashed: {each['why']}" for each in crashed if each["case"] == name}
        if left <= 0 or "timing" in before:
            content["left_out"].append({"case": name, "why": before.get("timing", "the time was up")})
            continue

        def trying(what: str, name: str = name) -> None:
            content["trying"] = {"case": name, "what": what}
            save(content)

        try:
            found = measure_gpu_case(
                device,
                bar,
                content["ceilings"],
                rounds=3 if tiny else 20,
                seconds=min(8.0, left / (len(todo) - index) / 3),
                without=before,
                trying=trying,
            )
        except torch.OutOfMemoryError as error:
            content["left_out"].append({"case": name, "why": _in_one_line(error)})
        else:
            done.append(found)
        content.pop("trying", None)
        save(content)
        if device.where.type == "cuda":
            torch.cuda.empty_cache()
    content.pop("trying", None)
    save(content)
