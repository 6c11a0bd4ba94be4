"""Whole measurements of the influence matrix: with the engine, and by ways that need nothing but torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tikmix_fast.benchmarking import memory
from tikmix_fast.benchmarking.autograd_truth import Truth, make_gpt, mean_gradients, numbered, summed_loss
from tikmix_fast.benchmarking.interleaved import interleave
from tikmix_fast.demo.gpt import GPT
from tikmix_fast.influence.engine import InfluenceEngine

__all__ = [
    "FLOOR",
    "MEASUREMENT",
    "QUICK_MEASUREMENT",
    "TINY_MEASUREMENT",
    "Measurement",
    "MeasurementCase",
    "MeasurementMethod",
    "make_measurement",
    "measure_measurement",
    "measurement_methods",
    "weigh_measurement",
]

FLOOR = "forward and backward alone"
OURS = "tikmix_fast"


@dataclass(frozen=True)
class MeasurementCase:
    """One measurement of all influence: batches of every task, then batches that mix all domains.

    Attributes
    ----------
    layers, heads, width, vocabulary, length : int
        Size of the model.
    domains, tasks : int
    domain_sequences : int
        Sequences of all domains together: a multiple of their number and of ``batch``.
    task_sequences : int
        Sequences of each task: a multiple of ``batch``.
    batch : int
    """

    layers: int = 2
    heads: int = 4
    width: int = 256
    vocabulary: int = 2048
    length: int = 128
    domains: int = 4
    tasks: int = 2
    domain_sequences: int = 128
    task_sequences: int = 16
    batch: int = 16

    @property
    def name(self) -> str:
        """A title for tables."""
        sequences = self.tasks * self.task_sequences + self.domain_sequences
        return (
            f"GPT of {self.layers} layers, width {self.width}, vocabulary {self.vocabulary}, "
            f"{sequences} sequences of {self.length} tokens, fp32, m={self.domains} n={self.tasks}"
        )


MEASUREMENT = MeasurementCase()
"""The measurement of the comparison with neighbouring libraries."""

QUICK_MEASUREMENT = replace(MEASUREMENT, domain_sequences=16, task_sequences=8)
"""The measurement of ``tikmix-fast bench``."""

TINY_MEASUREMENT = MeasurementCase(1, 2, 16, 32, 8, domain_sequences=64, task_sequences=4, batch=4)
"""A measurement that shows that everything runs."""


@dataclass(frozen=True)
class Measurement:
    """A model and its data.

    Attributes
    ----------
    case : MeasurementCase
    model : GPT
    tasks, domains : list of list of int64 Tensor [batch, length + 1]
        The batches of every task and of every domain; a domain's last batch may be smaller.
    mixed : list of (int64 Tensor [batch, length + 1], int64 Tensor [batch])
        The same sequences as in ``domains``, shuffled, with the domain of each.
    """

    case: MeasurementCase
    model: GPT
    tasks: list[list[Tensor]]
    domains: list[list[Tensor]]
    mixed: list[tuple[Tensor, Tensor]]


def make_measurement(case: MeasurementCase) -> Measurement:
    """Draw random tokens and weights."""
    generator = torch.Generator().manual_seed(0)

    def draw(sequences: int) -> Tensor:
        return torch.randint(case.vocabulary, (sequences, case.length + 1), generator=generator)

    sequences = draw(case.domain_sequences)
    ids = torch.arange(case.domain_sequences) % case.domains
    order = torch.randperm(case.domain_sequences, generator=generator)
    return Measurement(
        case,
        make_gpt(case.layers, case.heads, case.width, case.length, case.vocabulary),
        [list(draw(case.task_sequences).split(case.batch)) for _ in range(case.tasks)],
        [list(sequences[ids == domain].split(case.batch)) for domain in range(case.domains)],
        [(sequences[part], ids[part]) for part in order.split(case.batch)],
    )


class MeasurementMethod(NamedTuple):
    """One way to measure all influence.

    Attributes
    ----------
    prepare : callable (Measurement) -> callable () -> Tensor [n, m] or None
        Returns the function to time. That returns influence per target token, or None for the floor.
    covers : callable (str) -> bool
        Whether the method covers the parameter of this name.
    ours : bool
    slow : bool
        Whether few rounds are enough, because the method takes so long.
    """

    prepare: Callable[[Measurement], Callable[[], Tensor | None]]
    covers: Callable[[str], bool] = lambda name: True
    ours: bool = False
    slow: bool = False


def measurement_methods() -> dict[str, MeasurementMethod]:
    """Return the ways to measure that need nothing but torch and this package, `FLOOR` first."""
    return {
        FLOOR: MeasurementMethod(_alone),
        "plain torch, sorted batches": MeasurementMethod(_sorted),
        "a backward per domain, mixed": MeasurementMethod(_backward_per_domain, slow=True),
        OURS: MeasurementMethod(_ours, ours=True),
        f"{OURS}, check_every=0": MeasurementMethod(_ours_unchecked, ours=True),
    }


def _alone(data: Measurement) -> Callable[[], None]:
    batches = [*(batch for task in data.tasks for batch in task), *(batch for batch, _ in data.mixed)]

    def run() -> None:
        data.model.zero_grad()
        for batch in batches:
            summed_loss(data.model, batch).backward()

    return run


def _sorted(data: Measurement) -> Callable[[], Tensor]:
    def gradient(batches: list[Tensor]) -> Tensor:
        data.model.zero_grad()
        for batch in batches:
            summed_loss(data.model, batch).backward()
        flat = torch.cat([p.grad.flatten() for p in data.model.parameters() if p.grad is not None])
        return flat / sum(batch[:, 1:].numel() for batch in batches)

    def run() -> Tensor:
        tasks = torch.stack([gradient(batches) for batches in data.tasks])
        return torch.stack([tasks @ gradient(batches) for batches in data.domains], 1)

    return run


def _backward_per_domain(data: Measurement) -> Callable[[], Tensor]:
    parameters = list(data.model.parameters())

    def run() -> Tensor:
        tasks = mean_gradients(data.model, data.tasks)
        domains = torch.zeros(data.case.domains, tasks.shape[1])
        for batch, ids in data.mixed:
            logits = data.model(batch[:, :-1])
            for domain in ids.unique().tolist():
                rows = ids == domain
                loss = F.cross_entropy(logits[rows].flatten(0, 1), batch[rows, 1:].flatten(), reduction="sum")
                gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
                domains[domain] += torch.cat([each.flatten() for each in gradients])
        tokens = torch.tensor([sum(batch[:, 1:].numel() for batch in batches) for batches in data.domains])
        return tasks @ (domains / tokens[:, None]).T

    return run


def _ours(data: Measurement, **options: Any) -> Callable[[], Tensor]:
    domains, tasks = numbered("domain", data.case.domains), numbered("task", data.case.tasks)

    def run() -> Tensor:
        data.model.zero_grad()
        engine = InfluenceEngine(data.model, domains, tasks, "identity", reduction="sum", task_splits=1, **options)
        for name, batches in zip(tasks, data.tasks, strict=True):
            for batch in batches:
                with engine.task(name):
                    summed_loss(data.model, batch).backward()
        for batch, ids in data.mixed:
            with engine.domains(ids):
                summed_loss(data.model, batch).backward()
        return torch.from_numpy(engine.matrix().values)

    return run


def _ours_unchecked(data: Measurement) -> Callable[[], Tensor]:
    return _ours(data, check_every=0)


_WRONG = 1e-4
"""The largest error against float64 that an exact float32 method may have; correct ones stay below 1e-6."""


def measure_measurement(
    case: MeasurementCase,
    methods: dict[str, MeasurementMethod],
    *,
    rounds: int = 20,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Check every method against float64 on the parameters that it covers, then time them in turn.

    Parameters
    ----------
    case : MeasurementCase
    methods : dict of str to MeasurementMethod
        Must contain `FLOOR`.
    rounds, seconds
        As in `interleave`.

    Returns
    -------
    dict
        Plain JSON types: the case and ``rows`` (one per method).

    Raises
    ------
    AssertionError
        If a method is wrong.
    """
    data = make_measurement(case)
    truth = Truth.of(data.model, data.tasks, data.domains)
    names = {name: p.numel() for name, p in data.model.named_parameters()}
    functions: dict[str, Callable[[], Tensor | None]] = {}
    errors: dict[str, float | None] = {}
    for name, method in methods.items():
        run = functions[name] = method.prepare(data)
        values, errors[name] = run(), None
        if values is not None:
            covered = torch.cat([torch.full((size,), method.covers(each)) for each, size in names.items()])
            worst = Truth(truth.tasks[:, covered], truth.domains[:, covered]).error(values)
            if not worst.error <= _WRONG:
                raise AssertionError(f"{name} is wrong: {worst}")
            errors[name] = worst.error
    timings = interleave(functions, rounds, seconds=seconds)
    return {
        "case": case.name,
        "threads": torch.get_num_threads(),
        "rows": [
            {
                "method": name,
                "ours": method.ours,
                "covers": "all" if all(map(method.covers, names)) else "a part",
                "error": errors[name],
                **timings.summary(name, FLOOR),
            }
            for name, method in methods.items()
        ],
    }


def weigh_measurement(case: MeasurementCase, domains: Sequence[int], repeats: int = 3) -> dict[str, Any]:
    """Measure the peak memory of ours and of the floor for several numbers of domains, each in fresh processes.

    Returns
    -------
    dict
        Plain JSON types: ``rows`` with ``domains``, ``method``, ``growth_bytes`` (above model and data; median) and
        ``above_floor_bytes``; or ``skipped`` with the reason.
    """
    reason = memory.why_not()
    if reason is not None:
        return {"case": case.name, "rows": [], "skipped": {"memory": reason}}
    rows = []
    for count in domains:
        growth = {}
        for method in (FLOOR, OURS):
            request = {
                "case": vars(replace(case, domains=count)), "method": method, "threads": torch.get_num_threads(),
            }  # fmt: skip
            peaks = [memory.in_fresh_process(__name__, request)["growth"] for _ in range(repeats)]
            growth[method] = sorted(peaks)[repeats // 2]
        rows += [
            {"domains": count, "method": each, "growth_bytes": value, "above_floor_bytes": value - growth[FLOOR]}
            for each, value in growth.items()
        ]
    return {"case": case.name, "rows": rows, "skipped": {}}


def _weigh_one(request: dict[str, Any]) -> dict[str, int]:
    """Return the peak growth of one measurement, after a tiny one has warmed up the libraries."""
    torch.set_num_threads(request["threads"])
    method = measurement_methods()[request["method"]]
    method.prepare(make_measurement(TINY_MEASUREMENT))()
    return memory.peak_growth(method.prepare(make_measurement(MeasurementCase(**request["case"]))))


if __name__ == "__main__":
    print(json.dumps(_weigh_one(json.load(sys.stdin))))
