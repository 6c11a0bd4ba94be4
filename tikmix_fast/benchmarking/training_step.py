"""Training steps with the engine, against the same steps without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tikmix_fast.benchmarking.autograd_truth import Truth, make_gpt, mean_gradients, numbered, summed_loss
from tikmix_fast.benchmarking.interleaved import interleave
from tikmix_fast.demo.gpt import GPT
from tikmix_fast.influence.engine import InfluenceEngine
from tikmix_fast.influence.queries.projection import Projection
from tikmix_fast.testing import WorstCell, check_budget, rounding_floor

__all__ = ["ALONE", "QUICK_STEPS", "STEPS", "TINY_STEPS", "StepCase", "influence_of_sequences", "measure_step"]

ALONE = "step without influence"


@dataclass(frozen=True)
class StepCase:
    """A training step: a GPT, AdamW, and one batch of mixed domains.

    Attributes
    ----------
    layers, heads, width, vocabulary : int
    sequences, length : int
        Size of the batch.
    domains, tasks : int
    dtype : str
        "float32", or "bfloat16" for autocast.
    """

    layers: int
    heads: int
    width: int
    vocabulary: int
    sequences: int
    length: int
    domains: int
    tasks: int
    dtype: str

    @property
    def name(self) -> str:
        """A title for tables."""
        kind = "fp32" if self.dtype == "float32" else f"{self.dtype} autocast"
        return (
            f"GPT of {self.layers} layers, width {self.width}, vocabulary {self.vocabulary}, "
            f"{self.sequences} x {self.length} tokens, {kind}, AdamW, m={self.domains} n={self.tasks}"
        )


_STEP = StepCase(6, 6, 384, 8192, 16, 256, 8, 4, "float32")
STEPS = (_STEP, replace(_STEP, dtype="bfloat16"))
"""The steps for which the project has goals."""

QUICK_STEPS = (replace(_STEP, sequences=4),)
"""The steps of ``tikmix-fast bench``."""

TINY_STEPS = tuple(StepCase(1, 2, 16, 32, 4, 8, 2, 2, dtype) for dtype in ("float32", "bfloat16"))
"""Steps that show that everything runs."""

_VARIANTS: dict[str, dict[str, Any]] = {
    "with exact influence": {"task_splits": 1},
    "with exact influence, task_splits=2": {"task_splits": 2},
    "with projected influence, k=64": {"task_splits": 1, "projection": Projection(dim=64)},
}


def measure_step(case: StepCase, *, rounds: int = 20, seconds: float | None = None) -> dict[str, Any]:
    """Check the engine on this model, then time training steps with and without influence in turn.

    The task passes are not part of a step: a run pays for them once per refresh. The queries stay the same over the
    steps (``allow_stale``), which a training run should not do.

    Returns
    -------
    dict
        Plain JSON types: the case and ``rows`` (one per way to make a step).

    Raises
    ------
    AssertionError
        If influence is wrong: the budget is that of `tikmix_fast.testing`, relative to autograd in the same precision.
    """
    model = make_gpt(case.layers, case.heads, case.width, case.length, case.vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)

    def draw(sequences: int) -> Tensor:
        return torch.randint(case.vocabulary, (sequences, case.length + 1), generator=generator)

    def loss(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bfloat16"):
            return model.loss(batch)

    ours, eager = _check_engine(model, torch.stack([draw(1) for _ in range(4)]), case.dtype == "bfloat16")
    batch, ids = draw(case.sequences), torch.arange(case.sequences) % case.domains

    def step() -> None:
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()

    def step_with(engine: InfluenceEngine) -> Callable[[], None]:
        def run() -> None:
            optimizer.zero_grad()
            with engine.domains(ids):
                loss(batch).backward()
            optimizer.step()

        return run

    step()  # the preconditioner needs the optimizer's state
    functions: dict[str, Callable[[], None]] = {ALONE: step}
    for name, options in _VARIANTS.items():
        engine = InfluenceEngine(
            model, numbered("domain", case.domains), numbered("task", case.tasks), optimizer=optimizer,
            allow_stale=True, **options,
        )  # fmt: skip
        for task in engine.task_names:
            for _ in range(options["task_splits"]):
                with engine.task(task):
                    loss(draw(4)).backward()
        functions[name] = step_with(engine)
    timings = interleave(functions, rounds, seconds=seconds)
    return {
        "case": case.name,
        "threads": torch.get_num_threads(),
        "rows": [{"method": name, "ours": name != ALONE, **timings.summary(name, ALONE)} for name in functions],
        "error": ours.error,
        "eager_error": eager.error,
        "skipped": {},
    }


def influence_of_sequences(model: GPT, sequences: Tensor, autocast: bool = False) -> Tensor:
    """Return what the engine measures for two tasks and two domains of one sequence each.

    Parameters
    ----------
    model : GPT
        Its gradients are cleared.
    sequences : int64 Tensor [4, 1, length + 1]
        Those of the tasks, then those of the domains; on the device of the model.
    autocast : bool
        Whether the passes run in bfloat16.

    Returns
    -------
    float64 Tensor [2, 2]
        On the CPU.
    """
    engine = InfluenceEngine(model, ["a", "b"], ["s", "t"], "identity", reduction="sum", task_splits=1)
    for name, batch in zip(engine.task_names, sequences[:2], strict=True):
        with engine.task(name):
            summed_loss(model, batch, autocast).backward()
    with engine.domains(torch.arange(2)):
        summed_loss(model, sequences[2:].flatten(0, 1), autocast).backward()
    model.zero_grad()
    return torch.from_numpy(engine.matrix().values)


def _check_engine(model: GPT, sequences: Tensor, autocast: bool) -> tuple[WorstCell, WorstCell]:
    """Return the error of the engine and that of autograd in the same precision, on sequences [4, 1, length + 1]."""
    tasks, domains = [[each] for each in sequences[:2]], [[each] for each in sequences[2:]]
    truth = Truth.of(model, tasks, domains)
    ours = truth.error(influence_of_sequences(model, sequences, autocast))
    # In float64: the rounding of long float32 inner products would excuse any error.
    eager_tasks, eager_domains = (mean_gradients(model, groups, autocast).double() for groups in (tasks, domains))
    eager = truth.error(eager_tasks @ eager_domains.T)
    check_budget(ours, eager, rounding_floor(truth.tasks.shape[1]))
    return ours, eager
