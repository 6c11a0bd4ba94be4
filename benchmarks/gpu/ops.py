"""The kernels on a GPU against every baseline: checked against float64, weighed, then timed in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.cases import GPU_CASES, Bar
from benchmarks.gpu.ceilings import measure_ceilings
from benchmarks.gpu.device import Device
from benchmarks.gpu.methods import gpu_methods
from benchmarks.gpu.progress import Save, Trying, in_one_line, take_death
from benchmarks.gpu.timing import time_in_turn
from tikmix_fast.benchmarking.baselines import PLAIN, Answer, Layer, Method
from tikmix_fast.benchmarking.layer_truth import Errors, LayerTruth, check_answer
from tikmix_fast.benchmarking.ops import Case, make_layer

__all__ = ["measure_gpu_case", "run_ops"]

# Below this, launches cost as much as the work: the same work is also replayed from a CUDA graph.
_SHORT = 100e-6
_MOST_SETS = 8
Runs = Sequence[Callable[[], object]]


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
        The result of `measure_ceilings`.
    rounds, seconds
        As in `time_in_turn`.
    without : dict of str to str, optional
        Methods to leave out, with the reason.
    trying : callable (str) -> object
        Called with the name of a method before its first run, and with "timing" before all take turns.

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
    layers = _make_layers(case, device)
    layer = layers[0]
    truth = LayerTruth.of(layer)
    skipped, wrong = dict(without or {}), {}
    checked: dict[str, _Checked] = {}
    runs: dict[str, Runs] = {}
    for name, method in gpu_methods(case.projection).items():
        if name in skipped:
            continue
        trying(name)
        try:
            reason = method.refusal(layer)
            if reason is None:
                run = method.prepare(layer)
                checked[name] = _check(device, run, method, layer, truth)
                runs[name] = [run, *(method.prepare(each) for each in layers[1:])]
            else:
                skipped[name] = reason
        except AssertionError as error:
            wrong[name] = str(error)
        except Exception as error:  # the other methods may run all the same
            skipped[name] = in_one_line(error)
        device.synchronize()  # raises if the error was the device's: nothing runs any more in this process
    if PLAIN not in runs:
        raise RuntimeError(f"nothing to compare with: {skipped.get(PLAIN) or wrong.get(PLAIN)}")
    trying("timing")
    with device.watch_clocks() as clocks:
        timings = time_in_turn(device, runs, rounds=rounds, seconds=seconds)
    short = timings.summary(PLAIN, PLAIN)["seconds"] < _SHORT
    graphs = _time_graphs(device, runs, rounds) if short else {}
    rows = [
        {"method": name, **_row(checked[name], case, ceilings, timings.summary(name, PLAIN)), "graph": graphs.get(name)}
        for name in runs
    ]
    return {
        "case": case.name,
        "measure": bar.measure,
        "bar": bar.bar,
        "aim": bar.aim,
        "shape": asdict(case),
        "tokens_per_domain": case.rows / case.domains,
        "floor_seconds": _floor(case, ceilings),
        "input_sets": len(layers),
        "clocks": clocks,
        "rows": rows,
        "skipped": skipped,
        "wrong": wrong,
    }


def _make_layers(case: Case, device: Device) -> list[Layer]:
    """Draw as many sets of inputs as it takes to exceed the cache."""
    first = _make_layer(case, 0, device)
    sets = math.ceil(4 * device.cache_bytes / (first.input.nbytes + first.grad_output.nbytes))
    return [first, *(_make_layer(case, seed, device) for seed in range(1, min(_MOST_SETS, sets)))]


def _make_layer(case: Case, seed: int, device: Device) -> Layer:
    layer = make_layer(case, seed, device.where)
    # The influence of standard normal numbers exceeds the range of float16.
    return replace(layer, queries=layer.queries / 256) if case.dtype == "float16" else layer


def _floor(case: Case, ceilings: dict[str, Any]) -> float:
    """Return the least time that the case can take at the measured rates."""
    return float(max(case.useful_flops / ceilings["flops"][case.dtype], case.least_bytes / ceilings["bandwidth"]))


class _Checked(NamedTuple):
    errors: Errors
    ours: bool
    scratch_bytes: int | None


def _check(
    device: Device, run: Callable[[], Answer], method: Method, layer: Layer, truth: LayerTruth
) -> _Checked:  # fmt: skip
    """Make the first call and compare the answer with float64; raise AssertionError if it is wrong."""
    answer, growth = device.peak_growth(run)
    errors = check_answer(answer, method, layer, truth)
    if growth is not None and answer.total is not None and not method.ours:
        growth = max(0, growth - answer.total.nbytes)  # ours adds to a total that exists before the call
    return _Checked(errors, method.ours, growth)


def _row(checked: _Checked, case: Case, ceilings: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    seconds = summary["seconds"]
    return {
        "ours": checked.ours,
        "gives": checked.errors.gives,
        **checked.errors._asdict(),
        "scratch_bytes": checked.scratch_bytes,
        **summary,
        **case.rates(seconds, checked.errors, ceilings["flops"][case.dtype], ceilings["bandwidth"]),
        "floor_ratio": None if checked.errors.error is None else seconds / _floor(case, ceilings),
    }


def _run_all(runs: Runs) -> list[object]:
    return [run() for run in runs]


def _time_graphs(device: Device, runs: dict[str, Runs], rounds: int) -> dict[str, dict[str, Any]]:
    """Time the same work from CUDA graphs; the graph of a method holds all its sets of inputs."""
    graphs: dict[str, Runs] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, each in runs.items():
        try:
            graphs[name] = [device.capture(partial(_run_all, each))]
        except Exception as error:
            rows[name] = {"skipped": in_one_line(error)}
            device.synchronize()
    if PLAIN in graphs:
        timings = time_in_turn(device, graphs, rounds=rounds)
        for name in graphs:
            summary = timings.summary(name, PLAIN)
            ratios = {key: summary[key] for key in ("ratio", "ratio_interval", "rounds")}
            rows[name] = {"seconds": summary["seconds"] / len(runs[name]), **ratios}
    return rows


def run_ops(
    device: Device,
    content: dict[str, Any],
    seconds: float,
    save: Save,
    cases: Sequence[Bar] = GPU_CASES,
) -> None:
    """Measure the ceilings and every case that is not in ``content`` yet, and save after each.

    If an earlier process died, this leaves out what that process was trying and records it as crashed.

    Parameters
    ----------
    device : Device
    content : dict
        What an earlier process saved, or an empty dict. Changed in place.
    seconds : float
        Start no case after this time.
    save : callable (dict) -> object
    cases : sequence of Bar
    """
    end = time.monotonic() + seconds
    tiny = device.where.type == "cpu"
    crashed = content.setdefault("crashed", [])
    death = take_death(content)
    if death:
        crashed.append(death)
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
            result = measure_gpu_case(
                device,
                bar,
                content["ceilings"],
                rounds=3 if tiny else 20,
                seconds=min(8.0, left / (len(todo) - index) / 3),
                without=before,
                trying=trying,
            )
        except torch.OutOfMemoryError as error:
            content["left_out"].append({"case": name, "why": in_one_line(error)})
        else:
            done.append(result)
        content.pop("trying", None)
        save(content)
        if device.where.type == "cuda":
            torch.cuda.empty_cache()
    content.pop("trying", None)
    save(content)
