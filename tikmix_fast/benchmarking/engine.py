"""Training steps and whole measurements with the engine, against the same without it."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tikmix_fast
from tikmix_fast.benchmarking import memory
from tikmix_fast.benchmarking.interleaved import interleave
from tikmix_fast.demo.gpt import GPT, GPTSettings
from tikmix_fast.influence.engine import InfluenceEngine
from tikmix_fast.testing import WorstCell, check_budget, influence_error, rounding_floor

__all__ = [
    "FLOOR",
    "MEASUREMENT",
    "QUICK_MEASUREMENT",
    "QUICK_STEPS",
    "STEPS",
    "TINY_MEASUREMENT",
    "TINY_STEPS",
    "Measurement",
    "MeasurementCase",
    "MeasurementMethod",
    "StepCase",
    "Truth",
    "make_gpt",
    "make_measurement",
    "mean_gradients",
    "measure_measurement",
    "measure_step",
    "measurement_methods",
    "summed_loss",
    "weigh_measurement",
]

ALONE = "step without influence"
FLOOR = "forward and backward alone"
OURS = "tikmix_fast"


@dataclass(frozen=True)
class StepCase:
    """A training step: a GPT, AdamW, one batch of mixed domains.

    Attributes
    ----------
    layers, heads, width, vocabulary : int
    sequences, length : int
        Of the batch.
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
"""Those that the project set bars for."""

QUICK_STEPS = (replace(_STEP, sequences=4),)
"""Those of ``tikmix-fast bench``."""

TINY_STEPS = tuple(StepCase(1, 2, 16, 32, 4, 8, 2, 2, dtype) for dtype in ("float32", "bfloat16"))
"""To see that everything runs."""


def make_gpt(layers: int, heads: int, width: int, length: int, vocabulary: int, seed: int = 0) -> GPT:
    """Return the demonstration's model with another vocabulary."""
    model = GPT(GPTSettings(layers=layers, heads=heads, width=width, length=length), seed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model.bytes = nn.Embedding(vocabulary, width)
        model.head = nn.Linear(width, vocabulary, bias=False)
        for module in (model.bytes, model.head):
            nn.init.normal_(module.weight, std=0.02)
    return model


def measure_step(case: StepCase, *, rounds: int = 20, seconds: float | None = None) -> dict[str, Any]:
    """Check the engine on this model, then time training steps with and without influence in turn.

    The task passes are not part of a step: they are paid once per refresh. Queries are kept over the steps
    (``allow_stale``) for the timing's sake alone.

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

    found, eager = _check_engine(model, torch.stack([draw(1) for _ in range(4)]), case.dtype == "bfloat16")

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
    variants: dict[str, dict[str, Any]] = {
        "with exact influence": {"task_splits": 1},
        "with exact influence, task_splits=2": {"task_splits": 2},
    }
    if hasattr(tikmix_fast, "Projection"):
        variants["with projected influence, k=64"] = {"task_splits": 1, "projection": tikmix_fast.Projection(dim=64)}
    for name, options in variants.items():
        engine = InfluenceEngine(
            model, _numbered("domain", case.domains), _numbered("task", case.tasks), optimizer=optimizer,
            allow_stale=True, **options,
        )  # fmt: skip
        for task in engine.task_names:
            for _ in range(options["task_splits"]):
                with engine.task(task):
                    loss(draw(4)).backward()
        functions[name] = step_with(engine)
    timings = interleave(functions, rounds, seconds=seconds)
    rows = [{"method": name, "ours": name != ALONE, **timings.summary(name, ALONE)} for name in functions]
    return {
        "case": case.name,
        "threads": torch.get_num_threads(),
        "rows": rows,
        "error": found.error,
        "eager_error": eager.error,
        "skipped": {} if hasattr(tikmix_fast, "Projection") else {"projected influence": "not in this version"},
    }


def _check_engine(model: GPT, sequences: Tensor, autocast: bool) -> tuple[WorstCell, WorstCell]:
    """Check the engine on two tasks and two domains of one sequence each, [4, 1, length + 1].

    Returns the error of the engine and that of autograd in the same precision.
    """
    tasks, domains = [[each] for each in sequences[:2]], [[each] for each in sequences[2:]]
    engine = InfluenceEngine(model, ["a", "b"], ["s", "t"], "identity", reduction="sum", task_splits=1)
    for name, (batch,) in zip(engine.task_names, tasks, strict=True):
        with engine.task(name):
            summed_loss(model, batch, autocast).backward()
    with engine.domains(torch.arange(2)):
        summed_loss(model, sequences[2:].flatten(0, 1), autocast).backward()
    model.zero_grad()
    truth = Truth.of(model, tasks, domains)
    found = truth.error(torch.from_numpy(engine.matrix().values))
    # Long float32 inner products would be so inexact that they excused anything.
    eager_tasks, eager_domains = (mean_gradients(model, groups, autocast).double() for groups in (tasks, domains))
    eager = truth.error(eager_tasks @ eager_domains.T)
    check_budget(found, eager, rounding_floor(truth.tasks.shape[1]))
    return found, eager


def summed_loss(model: nn.Module, batch: Tensor, autocast: bool = False) -> Tensor:
    """Return the sum over the target tokens of ``batch`` [B, S + 1] of their cross-entropy."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")


def mean_gradients(model: nn.Module, groups: Sequence[Sequence[Tensor]], autocast: bool = False) -> Tensor:
    """Return the mean gradient per target token of every group of batches, [groups, all parameters]."""
    parameters = list(model.parameters())
    rows = []
    for batches in groups:
        total = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype)
        for batch in batches:
            gradients = torch.autograd.grad(summed_loss(model, batch, autocast), parameters)
            total += torch.cat([each.flatten() for each in gradients])
        rows.append(total / sum(batch[:, 1:].numel() for batch in batches))
    return torch.stack(rows)


class Truth(NamedTuple):
    """Mean gradients of tasks [n, P] and domains [m, P], by float64 autograd."""

    tasks: Tensor
    domains: Tensor

    @classmethod
    def of(cls, model: GPT, tasks: Sequence[Sequence[Tensor]], domains: Sequence[Sequence[Tensor]]) -> Truth:
        """Compute them with a float64 copy of the model."""
        wide = copy.deepcopy(model).double()
        return cls(mean_gradients(wide, tasks), mean_gradients(wide, domains))

    def error(self, values: Tensor) -> WorstCell:
        """Measure the error of an influence matrix [n, m]; see `influence_error`."""
        return influence_error(values, self.tasks @ self.domains.T, self.tasks[..., None], self.domains[..., None])


def _numbered(what: str, count: int) -> list[str]:
    return [f"{what} {index}" for index in range(count)]


@dataclass(frozen=True)
class MeasurementCase:
    """One measurement of all influence: batches of every task, then batches that mix all domains.

    Attributes
    ----------
    layers, heads, width, vocabulary, length : int
        Of the model.
    domains, tasks : int
    domain_sequences : int
        In all domains together, a multiple of their number and of ``batch``.
    task_sequences : int
        Of each task, a multiple of ``batch``.
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
"""That of the comparison with neighbouring libraries."""

QUICK_MEASUREMENT = replace(MEASUREMENT, domain_sequences=16, task_sequences=8)
"""That of ``tikmix-fast bench``."""

TINY_MEASUREMENT = MeasurementCase(1, 2, 16, 32, 8, domain_sequences=64, task_sequences=4, batch=4)
"""To see that everything runs."""


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


def make_measurement(case: MeasurementCase, seed: int = 0) -> Measurement:
    """Draw random tokens and weights."""
    generator = torch.Generator().manual_seed(seed)

    def draw(sequences: int) -> Tensor:
        return torch.randint(case.vocabulary, (sequences, case.length + 1), generator=generator)

    sequences = draw(case.domain_sequences)
    ids = torch.arange(case.domain_sequences) % case.domains
    order = torch.randperm(case.domain_sequences, generator=generator)
    return Measurement(
        case,
        make_gpt(case.layers, case.heads, case.width, case.length, case.vocabulary, seed),
        [list(draw(case.task_sequences).split(case.batch)) for _ in range(case.tasks)],
        [list(sequences[ids == domain].split(case.batch)) for domain in range(case.domains)],
        [(sequences[part], ids[part]) for part in order.split(case.batch)],
    )


class MeasurementMethod(NamedTuple):
    """One way to measure all influence.

    Attributes
    ----------
    prepare : callable (Measurement) -> callable () -> Tensor [n, m] or None
        Returns what is timed; its result is the matrix of mean gradients per target token, or None for the floor.
    covers : callable (str) -> bool
        Whether it covers the parameter of this name.
    ours : bool
    slow : bool
        So slow that few rounds tell enough.
    """

    prepare: Callable[[Measurement], Callable[[], Tensor | None]]
    covers: Callable[[str], bool] = lambda name: True
    ours: bool = False
    slow: bool = False


def measurement_methods() -> dict[str, MeasurementMethod]:
    """Return the ways to measure that need nothing but torch, `FLOOR` first."""
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
    domains, tasks = _numbered("domain", data.case.domains), _numbered("task", data.case.tasks)

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
"""An exact float32 method whose error against float64 is beyond this is broken; they are all below 1e-6."""


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
        With `FLOOR`.
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
            found = Truth(truth.tasks[:, covered], truth.domains[:, covered]).error(values)
            if not found.error <= _WRONG:
                raise AssertionError(f"{name} is wrong: {found}")
            errors[name] = found.error
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
            found = [memory.in_fresh_process(__name__, request)["growth"] for _ in range(repeats)]
            growth[method] = sorted(found)[repeats // 2]
        rows += [
            {"domains": count, "method": each, "growth_bytes": value, "above_floor_bytes": value - growth[FLOOR]}
            for each, value in growth.items()
        ]
    return {"case": case.name, "rows": rows, "skipped": {}}


def _weigh_one(request: dict[str, Any]) -> dict[str, int]:
    """Return the peak growth of one measurement, the libraries warmed up on a tiny one."""
    torch.set_num_threads(request["threads"])
    method = measurement_methods()[request["method"]]
    method.prepare(make_measurement(TINY_MEASUREMENT))()
    return memory.peak_growth(method.prepare(make_measurement(MeasurementCase(**request["case"]))))


if __name__ == "__main__":
    print(json.dumps(_weigh_one(json.load(sys.stdin))))
