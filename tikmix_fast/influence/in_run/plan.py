"""Plan how often a run measures, and on how much of each task, from predicted costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tikmix_fast.arguments import require_int
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix

__all__ = ["InRunPlan", "plan_in_run"]

# One token costs 6 operations per weight, forward and backward.
_FLOPS_PER_TOKEN = 6.0
# Bytes per weight and query: for a measured step's sums, preconditioning and packing; and for each micro-batch.
_BYTES_TO_FREEZE = 30.0
_BYTES_TO_READ = 8.0
# Operations of inner products per weight, query and domain, at the rate of matrix products.
_FLOPS_OF_PRODUCT = 6.0
_MANY_STEPS = 1000


@dataclass(frozen=True)
class InRunPlan:
    """A schedule of measured steps, and its cost as a share of the cost of training.

    Attributes
    ----------
    every : int
        Optimizer steps from one measured step to the next.
    task_sequences : int
        Sequences of each task in one measured step, at least one per split.
    task_tokens : int
        Tokens of all tasks together in one measured step.
    overhead : float
        Predicted extra cost.
    of_tasks, of_queries, of_domains : float
        The parts of ``overhead``: passes on the tasks; making the queries; reading them in the backward of training
        batches, with the inner products.
    budget : float
        The largest allowed ``overhead``.
    relative_error : float64 [n] or None
        The expected `InfluenceMatrix.relative_error` of the average, if an earlier matrix was given.
    words : str
        The plan as a sentence.
    """

    every: int
    task_sequences: int
    task_tokens: int
    overhead: float
    of_tasks: float
    of_queries: float
    of_domains: float
    budget: float
    relative_error: NDArray[np.float64] | None
    words: str

    def __str__(self) -> str:
        return self.words


def plan_in_run(
    budget: float,
    *,
    tasks: int,
    splits: int,
    domains: int,
    step_tokens: int,
    sequence_tokens: int,
    micro_batches: int = 1,
    near_every: int = 0,
    flops_per_byte: float = 20.0,
    matrix: InfluenceMatrix | None = None,
    task_tokens: int | None = None,
    time_constant: float = math.inf,
) -> InRunPlan:
    """Plan to measure as often as the budget allows, each time on the fewest task sequences that give error bars.

    The domain side is nearly free, so many small measured steps learn more about it than few large ones. With q = tasks
    x splits queries, a measured step costs: a forward and backward over the tasks' tokens; 30 bytes per weight and
    query for making queries; per micro-batch 8 bytes per weight and query for reading them, and 6 operations per
    weight, query and domain for the inner products. Reading counts in full, though it may overlap with products.

    Parameters
    ----------
    budget : float
        Largest extra cost, as a share of that of training: 0.05 for 5%.
    tasks, splits, domains : int
        Their numbers.
    step_tokens : int
        Tokens of one optimizer step, all micro-batches and ranks together.
    sequence_tokens : int
        Tokens of one sequence of a task.
    micro_batches : int
        Micro-batches per optimizer step.
    near_every : int
        As in `InRun`.
    flops_per_byte : float
        The machine's operations in the time of moving one byte of memory: about 10 to 30 for float32 on CPUs, 100 to
        300 for bfloat16 on large GPUs.
    matrix : InfluenceMatrix, optional
        An earlier measurement with its errors, from which the plan predicts the noise.
    task_tokens : int, optional
        Tokens of each task in that measurement.
    time_constant : float
        Time constant of the average whose noise is predicted, in optimizer steps; infinite: an average over a thousand
        measured steps.

    Raises
    ------
    ValueError
        If a number is out of range, or ``matrix`` has no errors or no ``task_tokens``.
    """
    require_int("step_tokens", step_tokens, 1)
    require_int("sequence_tokens", sequence_tokens, 1)
    require_int("micro_batches", micro_batches, 1)
    require_int("near_every", near_every, 0)
    _require_positive(budget=budget, flops_per_byte=flops_per_byte, time_constant=time_constant)
    queries = tasks * splits
    of_queries = queries * _BYTES_TO_FREEZE * flops_per_byte / _FLOPS_PER_TOKEN
    of_domains = (
        micro_batches * queries * (_FLOPS_OF_PRODUCT * domains + _BYTES_TO_READ * flops_per_byte) / _FLOPS_PER_TOKEN
    )

    def near(every: int) -> float:
        return 1 + 1 / near_every if near_every and every > 1 else 1.0

    def share(cost: float, every: int) -> float:
        return cost * near(every) / (every * step_tokens)

    cheapest = splits * tasks * sequence_tokens + of_queries + of_domains
    every = 1
    if share(cheapest, 1) > budget:
        every = max(2, math.ceil(cheapest * near(2) / (budget * step_tokens)))
    # Budget is left for more sequences only if every step is measured already.
    room = budget * step_tokens - of_queries - of_domains if every == 1 else 0.0
    sequences = max(splits, int(room // (tasks * sequence_tokens)))
    of_tasks = float(tasks * sequences * sequence_tokens)
    parts = [share(cost, every) for cost in (of_tasks, of_queries, of_domains)]
    expected = None
    if matrix is not None:
        measured_steps = _MANY_STEPS if math.isinf(time_constant) else max(2 * time_constant / every, 1.0)
        expected = _expected_error(matrix, task_tokens, measured_steps, step_tokens, sequences * sequence_tokens)
    plan = InRunPlan(
        every=every,
        task_sequences=sequences,
        task_tokens=int(of_tasks),
        overhead=sum(parts),
        of_tasks=parts[0],
        of_queries=parts[1],
        of_domains=parts[2],
        budget=budget,
        relative_error=expected,
        words="",
    )
    return replace(plan, words=_in_words(plan, tasks, sequence_tokens))


def _require_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} must be above 0; got {number!r}")


def _in_words(plan: InRunPlan, tasks: int, sequence_tokens: int) -> str:
    sequences = plan.task_sequences
    words = (
        f"measure every {_ordinal(plan.every)}step: {tasks} {'task' if tasks == 1 else 'tasks'} x {sequences} "
        f"{'sequence' if sequences == 1 else 'sequences'} of {sequence_tokens} tokens, overhead {plan.overhead:.1%} "
        f"of {plan.budget:.1%}: task passes {plan.of_tasks:.1%}, making queries {plan.of_queries:.1%}, domain side "
        f"{plan.of_domains:.1%}"
    )
    if plan.relative_error is not None:
        words += f"; relative error of S expected: {', '.join(f'{each:.2g}' for each in plan.relative_error)}"
    return words


def _expected_error(
    matrix: InfluenceMatrix, task_tokens: int | None, steps: float, step_tokens: int, of_task: int
) -> NDArray[np.float64]:
    """Return the expected relative error [n], from an earlier measurement and the number of measured steps."""
    if task_tokens is None or task_tokens < 1:
        raise ValueError("task_tokens must be the tokens of each task that matrix was measured on")
    if np.isnan(matrix.stderr_task).all() or np.isnan(matrix.stderr_domain).all():
        raise ValueError("matrix must have been measured, with errors of both sides: it has none")
    domain, task = matrix.stderr_domain**2, matrix.stderr_task**2
    projection = np.zeros_like(domain) if matrix.stderr_projection is None else matrix.stderr_projection**2
    both = np.clip(domain + task + projection - matrix.stderr**2, 0, np.minimum(domain, task))
    # A side's variance is inversely proportional to its tokens; the product of both sides' noise, to both.
    of_domain = matrix.tokens / (step_tokens / len(matrix.domains))
    of_tasks = task_tokens / of_task
    variance = ((domain - both) * of_domain + (task - both) * of_tasks + both * of_domain * of_tasks) / steps
    # Projections redrawn at every measured step have independent errors; the same ones keep their error.
    redrawn = (matrix.settings.get("projection") or {}).get("redraw", True)
    variance += projection / steps if redrawn else projection
    noise = np.nanmean(variance, axis=1)
    # The signal is the variance between domains in the earlier matrix, less that matrix's own noise.
    signal = np.nanvar(matrix.values, axis=1, ddof=1) - np.nanmean(matrix.stderr**2, axis=1)
    return np.asarray(np.sqrt(noise / (noise + np.maximum(signal, 0.0))))


def _ordinal(number: int) -> str:
    if number == 1:
        return ""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending} "
