"""Whole training steps of a GPT on a GPU, with and without influence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import tikmix_fast
from benchmarks.gpu.device import Device
from benchmarks.gpu.progress import Save, Trying, in_one_line, take_death
from benchmarks.gpu.timing import time_in_turn
from tikmix_fast.benchmarking.autograd_truth import Truth, make_gpt, numbered
from tikmix_fast.benchmarking.training_step import ALONE, StepCase, influence_of_sequences
from tikmix_fast.influence.engine import InfluenceEngine

__all__ = ["ALONE", "BARS", "GPU_STEPS", "TINY_GPU_STEPS", "run_engine"]

_EXACT = "with exact influence"
_PROJECTED = "with projected influence, k=64"

GPU_STEPS = (StepCase(24, 16, 1024, 24576, 32, 1024, 26, 9, "bfloat16"),)
"""353 million parameters: 302 in the blocks, 50 in the two tables."""

TINY_GPU_STEPS = (
    replace(GPU_STEPS[0], layers=1, heads=2, width=96, vocabulary=64, sequences=4, length=16, domains=3, tasks=2),
)
"""Steps that show that everything runs."""

BARS = {_EXACT: (1.10, 1.05), _PROJECTED: (1.04, 1.02)}
"""The ratio to a step without influence that each must reach, and the ratio that it should reach."""

_WRONG = 1e-5
"""The largest error against float64 that an exact float32 engine may have."""


def _check_engine(where: torch.device) -> float:
    """Compare influence on the device with float64 autograd on the CPU, on a small float32 model."""
    model = make_gpt(2, 2, 64, 16, 32)
    sequences = torch.randint(32, (4, 1, 17), generator=torch.Generator().manual_seed(0))
    truth = Truth.of(model, [[each] for each in sequences[:2]], [[each] for each in sequences[2:]])
    worst = truth.error(influence_of_sequences(model.to(where), sequences.to(where)))
    if not worst.error <= _WRONG:
        raise AssertionError(f"influence of a small model is wrong: {worst}")
    return worst.error


class _Trainer:
    """A model with its optimizer, and steps with or without an engine."""

    def __init__(self, case: StepCase, where: torch.device) -> None:
        self._case, self._where = case, where
        self._generator = torch.Generator(where).manual_seed(0)
        self.model = make_gpt(case.layers, case.heads, case.width, case.length, case.vocabulary).to(where)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.batches = [self._draw(case.sequences) for _ in range(4)]
        self._ids = torch.arange(case.sequences) % case.domains

    def _draw(self, sequences: int) -> Tensor:
        shape = (sequences, self._case.length + 1)
        return torch.randint(self._case.vocabulary, shape, generator=self._generator, device=self._where)

    def _backward(self, batch: Tensor) -> None:
        with torch.autocast(self._where.type, torch.bfloat16):
            loss = self.model.loss(batch)
        loss.backward()

    def step(self, batch: Tensor, engine: InfluenceEngine | None) -> None:
        self._optimizer.zero_grad()
        if engine is None:
            self._backward(batch)
        else:
            with engine.domains(self._ids):
                self._backward(batch)
        self._optimizer.step()

    def runs(self, engine: InfluenceEngine | None) -> Sequence[Callable[[], object]]:
        return [lambda batch=batch: self.step(batch, engine) for batch in self.batches]  # type: ignore[misc]

    def prepare(self, projection: tikmix_fast.Projection | None) -> InfluenceEngine:
        """Return an engine with frozen queries."""
        engine = InfluenceEngine(
            self.model,
            numbered("domain", self._case.domains),
            numbered("task", self._case.tasks),
            optimizer=self._optimizer,
            projection=projection,
            task_splits=1,
            allow_stale=True,
        )
        for task in engine.task_names:
            with engine.task(task):
                self._backward(self._draw(4))
        self.step(self.batches[0], engine)  # freezes the queries
        return engine


def _allocated(where: torch.device) -> int | None:
    return torch.cuda.memory_allocated(where) if where.type == "cuda" else None


def _measure_step(
    device: Device, case: StepCase, *, rounds: int, seconds: float | None, trying: Trying
) -> dict[str, Any]:
    where = device.where
    trainer = _Trainer(case, where)
    batch = trainer.batches[1]
    trying(ALONE)
    trainer.step(trainer.batches[0], None)  # the preconditioner needs the optimizer's state
    _, peak = device.peak_growth(lambda: trainer.step(batch, None))
    functions = {ALONE: trainer.runs(None)}
    facts: dict[str, dict[str, Any]] = {ALONE: {"step_bytes": peak, "held_bytes": 0}}
    failed: dict[str, str] = {}
    for name, projection in ((_EXACT, None), (_PROJECTED, tikmix_fast.Projection(dim=64))):
        trying(name)
        try:
            before = _allocated(where)
            engine = trainer.prepare(projection)
            held = None if before is None else (_allocated(where) or 0) - before
            _, peak = device.peak_growth(lambda engine=engine: trainer.step(batch, engine))  # type: ignore[misc]
        except Exception as error:  # the other way may run all the same
            failed[name] = in_one_line(error)
            device.synchronize()
            continue
        functions[name] = trainer.runs(engine)
        facts[name] = {"step_bytes": peak, "held_bytes": held}

    trying("timing")
    with device.watch_clocks() as clocks:
        timings = time_in_turn(device, functions, rounds=rounds, seconds=seconds, warm_up=1)
    rows = [
        {"method": name, "ours": name != ALONE, **timings.summary(name, ALONE), **facts[name]} for name in functions
    ]
    return {
        "case": case.name,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "bars": {name: list(bar) for name, bar in BARS.items()},
        "rows": rows,
        "failed": failed,
        "clocks": clocks,
    }


def run_engine(
    device: Device, content: dict[str, Any], seconds: float, save: Save, cases: Sequence[StepCase] = GPU_STEPS
) -> None:
    """Check the engine against float64 on a small model, then time training steps in turn.

    The task passes are not part of a step: a run pays for them once per refresh. The queries stay the same over the
    steps (``allow_stale``), which a training run should not do.

    Parameters
    ----------
    device, content, seconds, save
        As in `benchmarks.gpu.ops.run_ops`.
    cases : sequence of StepCase
    """
    tiny = device.where.type == "cpu"

    def trying(step: str) -> None:
        content["trying"] = {"case": "engine", "what": step}
        save(content)

    # After a crash, no remaining step is small enough to be worth another try.
    death = take_death(content)
    if death:
        content.setdefault("crashed", []).append(death)
        save(content)
        return
    trying("a small model against float64")
    try:
        content["error"] = _check_engine(device.where)
    except Exception as error:
        content["wrong"] = in_one_line(error)
        device.synchronize()
    content["steps"] = []
    for case in cases:
        content["steps"].append(
            _measure_step(device, case, rounds=3 if tiny else 12, seconds=seconds / 2, trying=trying)
        )
    content.pop("trying")
    save(content)
