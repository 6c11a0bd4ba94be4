"""Whole training steps of a GPT on a GPU, with and without influence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import tikmix_fast
from benchmarks.gpu.device import Device
from benchmarks.gpu.timing import time_in_turn
from tikmix_fast.benchmarking.engine import StepCase, Truth, make_gpt, summed_loss
from tikmix_fast.influence.engine import InfluenceEngine

__all__ = ["ALONE", "BARS", "GPU_STEPS", "TINY_GPU_STEPS", "run_engine"]

ALONE = "step without influence"
_EXACT = "with exact influence"
_PROJECTED = "with projected influence, k=64"

GPU_STEPS = (StepCase(24, 16, 1024, 24576, 32, 1024, 26, 9, "bfloat16"),)
"""353 million parameters: 302 in the blocks, 50 in the two tables."""

TINY_GPU_STEPS = (
    replace(GPU_STEPS[0], layers=1, heads=2, width=96, vocabulary=64, sequences=4, length=16, domains=3, tasks=2),
)
"""To see that everything runs."""

BARS = {_EXACT: (1.10, 1.05), _PROJECTED: (1.04, 1.02)}
"""What a step over a step without influence must reach, and what it should."""

_WRONG = 1e-5
"""An exact float32 engine whose error against float64 is beyond this is broken."""


def _check_engine(where: torch.device) -> float:
    """Compare influence on the device with float64 autograd on the CPU, on a small float32 model."""
    model = make_gpt(2, 2, 64, 16, 32)
    sequences = torch.randint(32, (4, 1, 17), generator=torch.Generator().manual_seed(0))
    truth = Truth.of(model, [[each] for each in sequences[:2]], [[each] for each in sequences[2:]])
    model.to(where)
    engine = InfluenceEngine(model, ["a", "b"], ["s", "t"], "identity", reduction="sum", task_splits=1)
    for name, batch in zip(engine.task_names, sequences[:2].to(where), strict=True):
        with engine.task(name):
            summed_loss(model, batch).backward()
    with engine.domains(torch.arange(2)):
        summed_loss(model, sequences[2:].flatten(0, 1).to(where)).backward()
    found = truth.error(torch.from_numpy(engine.matrix().values))
    if not found.error <= _WRONG:
        raise AssertionError(f"influence of a small model is wrong: {found}")
    return found.error


def _allocated(where: torch.device) -> int | None:
    return torch.cuda.memory_allocated(where) if where.type == "cuda" else None


def _measure_step(
    device: Device, case: StepCase, *, rounds: int, seconds: float | None, trying: Callable[[str], object]
) -> dict[str, Any]:
    where = device.where
    generator = torch.Generator(where).manual_seed(0)
    model = make_gpt(case.layers, case.heads, case.width, case.length, case.vocabulary).to(where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def draw(sequences: int) -> Tensor:
        return torch.randint(case.vocabulary, (sequences, case.length + 1), generator=generator, device=where)

    def loss(batch: Tensor) -> Tensor:
        with torch.autocast(where.type, torch.bfloat16):
            return model.loss(batch)

    batches = [draw(case.sequences) for _ in range(4)]
    ids = torch.arange(case.sequences) % case.domains

    def step(batch: Tensor, engine: InfluenceEngine | None) -> None:
        optimizer.zero_grad()
        if engine is None:
            loss(batch).backward()
        else:
            with engine.domains(ids):
                loss(batch).backward()
        optimizer.step()

    def runs(engine: InfluenceEngine | None) -> Sequence[Callable[[], object]]:
        return [lambda batch=batch: step(batch, engine) for batch in batches]  # type: ignore[misc]

    def prepare(projection: tikmix_fast.Projection | None) -> InfluenceEngine:
        engine = InfluenceEngine(
            model,
            [f"domain {index}" for index in range(case.domains)],
            [f"task {index}" for index in range(case.tasks)],
            optimizer=optimizer,
            projection=projection,
            task_splits=1,
            allow_stale=True,
        )
        for task in engine.task_names:
            with engine.task(task):
                loss(draw(4)).backward()
        step(batches[0], engine)  # freezes the queries
        return engine

    trying(ALONE)
    step(batches[0], None)  # Adam's scaling needs the optimizer's state
    _, peak = device.peak_growth(lambda: step(batches[1], None))
    functions = {ALONE: runs(None)}
    facts: dict[str, dict[str, Any]] = {ALONE: {"step_bytes": peak, "held_bytes": 0}}
    failed: dict[str, str] = {}
    for name, projection in ((_EXACT, None), (_PROJECTED, tikmix_fast.Projection(dim=64))):
        trying(name)
        try:
            before = _allocated(where)
            engine = prepare(projection)
            held = None if before is None else (_allocated(where) or 0) - before
            _, peak = device.peak_growth(lambda engine=engine: step(batches[1], engine))  # type: ignore[misc]
        except Exception as error:  # the other way may run all the same
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
            device.synchronize()
            continue
        functions[name] = runs(engine)
        facts[name] = {"step_bytes": peak, "held_bytes": held}

    trying("timing")
    with device.watch_clocks() as clocks:
        timings = time_in_turn(device, functions, rounds=rounds, seconds=seconds, warm_up=1)
    rows = [
        {"method": name, "ours": name != ALONE, **timings.summary(name, ALONE), **facts[name]} for name in functions
    ]
    return {
        "case": case.name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bars": {name: list(bar) for name, bar in BARS.items()},
        "rows": rows,
        "failed": failed,
        "clocks": clocks,
    }


def run_engine(
    device: Device,
    content: dict[str, Any],
    seconds: float,
    save: Callable[[dict[str, Any]], object],
    cases: Sequence[StepCase] = GPU_STEPS,
) -> None:
    """Check the engine against float64 on a small model, then time training steps in turn.

    Queries are kept over the steps (``allow_stale``) for the timing's sake alone; the task passes, which are paid once
    per refresh, are not part of a step.

    Parameters
    ----------
    device, content, seconds, save
        As in `benchmarks.gpu.ops.run_ops`.
    cases : sequence of StepCase
    """
    tiny = device.where.type == "cpu"

    def trying(what: str) -> None:
        content["trying"] = {"case": "engine", "what": what}
        save(content)

    # Nothing here is so small that the rest of it is worth another try.
    died = content.pop("trying", None)
    if died:
        content.setdefault("crashed", []).append(died)
        save(content)
        return
    trying("a small model against float64")
    try:
        content["error"] = _check_engine(device.where)
    except Exception as error:
        content["wrong"] = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
        device.synchronize()
    content["steps"] = []
    for case in cases:
        content["steps"].append(
            _measure_step(device, case, rounds=3 if tiny else 12, seconds=seconds / 2, trying=trying)
        )
    content.pop("trying")
    save(content)
