"""Does S predict? Influence of a small GPT trained here, against what training does.

OMP_NUM_THREADS=1 python benchmarks/study/prediction.py --setting small    # seeds 0, 1, 2 into build/prediction-small/
python benchmarks/study/prediction.py --report                             # tables and plots of what is there

Every part of a seed is stored as a JSON file of its own when it is done, so that an interrupted run goes on:
additivity (S w against the influence of sampled mixtures), counterfactual (S against the change of the tasks' losses
after k real optimizer steps on one domain, and two such runs against each other; "long" holds the largest k) and
calibration (how often 95% intervals hold the truth). The report is written to benchmarks/results/ as prediction.json,
.md and .png, with prediction_reading.md, which is written by hand, at the head of the tables.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from prediction_report import write_report
from torch import Tensor

from tikmix_fast import files
from tikmix_fast.data.sampler import MixtureSampler
from tikmix_fast.demo.arm import Arm
from tikmix_fast.demo.corpora import Corpora, Sequences, gather
from tikmix_fast.demo.gpt import GPT, GPTSettings
from tikmix_fast.demo.settings import DemoSettings
from tikmix_fast.influence.engine import InfluenceEngine
from tikmix_fast.influence.preconditioners.adam import Adam
from tikmix_fast.influence.preconditioners.ekfac import EKFAC, DiagonalFisher
from tikmix_fast.influence.preconditioners.protocol import Preconditioner
from tikmix_fast.influence.queries.projection import Projection
from tikmix_fast.matrix.estimator import Estimator
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.report.environment import describe_environment

REPOSITORY = Path(__file__).parents[2]
Array = NDArray[np.float64]
Texts = Mapping[str, Sequences]


@dataclass(frozen=True)
class Method:
    """One way to measure S.

    Attributes
    ----------
    preconditioner : {"identity", "adam", "ekfac", "diagonal_fisher"}
    dim : int or None
        Of the projection; None = exact.
    weights : {"current", "averaged", "decayed", "path", "coasted"}
        Where gradients are taken: at the checkpoint; at the moving average of the weights; after a few steps on the
        uniform mixture at a rate that falls to zero; at the checkpoint and a few steps before it, averaging S;
        or where the optimizer's momentum alone carries the weights within a few steps.
    damping : float
        Of "ekfac" and "diagonal_fisher".
    floor : float
        Of "adam": see `tikmix_fast.Adam`.
    """

    preconditioner: str
    dim: int | None = None
    weights: Literal["current", "averaged", "decayed", "path", "coasted"] = "current"
    damping: float = 0.1
    floor: float = 0.0

    @property
    def name(self) -> str:
        """What tables call it."""
        parts = [self.preconditioner.replace("_", " ")]
        parts += [f"k={self.dim}"] if self.dim else []
        parts += [f"{self.weights} weights"] if self.weights != "current" else []
        parts += [f"damping {self.damping:g}"] if self.damping != 0.1 else []
        parts += [f"floor {self.floor:g}"] if self.floor else []
        return ", ".join(parts)


METHODS = (
    Method("identity"),
    Method("adam"),
    Method("adam", floor=1.0),
    Method("ekfac"),
    Method("ekfac", damping=10.0),
    Method("diagonal_fisher"),
    Method("adam", 64),
    Method("adam", 32),
    Method("adam", weights="coasted"),
)
TRIED = (
    Method("identity", 64),
    Method("identity", 32),
    Method("ekfac", damping=0.01),
    Method("ekfac", damping=1.0),
    Method("adam", weights="averaged"),
    Method("ekfac", weights="averaged"),
    Method("adam", weights="decayed"),
    Method("adam", weights="path"),
    Method("ekfac", weights="coasted"),
)
"""What is measured besides in the full setting, where there is time; the small one leaves it to the tuning seeds."""


@dataclass(frozen=True)
class PredictionSettings:
    """Every number of the study.

    Attributes
    ----------
    training : DemoSettings
        Of the run that the checkpoint is taken from; its seed is replaced.
    checkpoint : int
        Step of it.
    averaging : float
        Decay of the moving average of the weights.
    coast_steps : int
        Steps with zero gradients before "coasted" is measured.
    decay_steps : int
        Steps with a falling rate before "decayed" is measured.
    path_steps : tuple of int
        Steps before the checkpoint at which "path" measures besides.
    methods : tuple of Method
    validation_rows : int
        Sequences per task: the validation set, whose loss S is about and whose loss real steps are judged by.
    unseen_rows : int
        Other sequences per task, from text that S does not see, that real steps are judged by besides.
    domain_rows : int
        Sequences per domain that S is measured on.
    batch_rows : int
        Sequences in one pass of the domains, about.
    fisher_rows : int
        Sequences that curvature is fitted to, of all domains in equal parts.
    steps : tuple of int
        k: optimizer steps on one domain after which losses are taken; ``long_steps`` are taken at the full rate alone,
        in a part of their own ("long").
    rates : tuple of float
        Multiples of the learning rate at the checkpoint.
    mixtures, mixture_rows : int
        Mixtures drawn from Dirichlet(1), and sequences of each that its influence is measured on.
    additivity_rows : int
        Sequences per domain for S in S w.
    pool_domain, pool_task : int
        Micro-batches per domain and per task in the pool that repeated measurements draw from.
    repetitions : int
        Repeated measurements per seed.
    """

    training: DemoSettings
    checkpoint: int
    averaging: float = 0.95
    coast_steps: int = 30
    decay_steps: int = 10
    path_steps: tuple[int, ...] = (40, 20)
    methods: tuple[Method, ...] = METHODS
    validation_rows: int = 32
    unseen_rows: int = 16
    domain_rows: int = 96
    fisher_rows: int = 144
    batch_rows: int = 36
    steps: tuple[int, ...] = (1, 10)
    long_steps: tuple[int, ...] = (100,)
    rates: tuple[float, ...] = (1.0, 0.1)
    mixtures: int = 128
    mixture_rows: int = 32
    additivity_rows: int = 96
    pool_domain: int = 64
    pool_task: int = 16
    repetitions: int = 400

    def __post_init__(self) -> None:
        if not 0 < self.checkpoint <= self.training.steps:
            raise ValueError(f"checkpoint must lie in 1 ... {self.training.steps}; got {self.checkpoint}")
        if max(self.path_steps, default=0) >= self.checkpoint:
            raise ValueError(f"path_steps must be below the checkpoint; got {self.path_steps}")


SETTINGS = {
    # With 32 and 96 sequences, sampling noise left additivity a ceiling of 0.64 on seed 0; these allow about 0.97.
    "small": PredictionSettings(DemoSettings(), checkpoint=400, mixture_rows=1024, additivity_rows=2048),
    "full": PredictionSettings(
        DemoSettings(),
        checkpoint=600,
        methods=METHODS + TRIED,
        validation_rows=128,
        unseen_rows=128,
        domain_rows=384,
        fisher_rows=576,
        mixture_rows=1024,
        additivity_rows=2048,
        pool_domain=256,
        pool_task=48,
        repetitions=2000,
    ),
    "quick": PredictionSettings(
        DemoSettings(
            steps=20,
            batch=4,
            warm_up=2,
            model=GPTSettings(layers=1, heads=2, width=48, length=32),
            domain_bytes=20_000,
            task_bytes=16_000,
        ),
        checkpoint=10,
        decay_steps=2,
        path_steps=(2,),
        methods=(Method("adam"), Method("ekfac"), Method("adam", 32), Method("identity", weights="averaged")),
        validation_rows=4,
        unseen_rows=4,
        domain_rows=4,
        fisher_rows=9,
        steps=(1, 2),
        long_steps=(3,),
        mixtures=12,
        mixture_rows=8,
        additivity_rows=16,
        pool_domain=4,
        pool_task=4,
        repetitions=10,
    ),
}


@dataclass
class Subject:
    """A model in training, what it reads, and where its weights were."""

    settings: PredictionSettings
    seed: int
    arm: Arm
    domains: Texts
    tasks: Texts
    validation: dict[str, Tensor]
    unseen: dict[str, Tensor]
    averaged: dict[str, Tensor]
    path: list[dict[str, Any]] = field(default_factory=list)


def train(settings: PredictionSettings, seed: int, corpora: Corpora, folder: Path) -> Subject:
    """Return the checkpoint of a seed, trained now or read from ``folder``."""
    training = dataclasses.replace(settings.training, seed=seed)
    length = training.model.length
    domains = {name: Sequences(text, length) for name, text in corpora.domains.items()}
    measured = {name: Sequences(task.measure, length) for name, task in corpora.tasks.items()}
    unseen = {
        name: spread(Sequences(task.report, length), settings.unseen_rows) for name, task in corpora.tasks.items()
    }
    validation = {name: spread(text, settings.validation_rows) for name, text in measured.items()}
    arm = Arm(training, domains)
    subject = Subject(settings, seed, arm, domains, measured, validation, unseen, {})
    path = folder / f"checkpoint-{seed}.pt"
    if not path.exists():
        while arm.step < settings.checkpoint:
            arm.train_step()
            for name, value in arm.model.state_dict().items():
                average = subject.averaged.setdefault(name, value.clone())
                average.lerp_(value, 1 - settings.averaging)
            if settings.checkpoint - arm.step in settings.path_steps:
                state = {"model": arm.model.state_dict(), "optimizer": arm.optimizer.state_dict()}
                subject.path.append(copy.deepcopy(state))
        state = {"model": arm.model.state_dict(), "optimizer": arm.optimizer.state_dict()}
        partial = path.with_suffix(".part")
        torch.save({**state, "averaged": subject.averaged, "path": subject.path}, partial)
        partial.replace(path)
    saved = torch.load(path)
    arm.model.load_state_dict(saved["model"])
    arm.optimizer.load_state_dict(saved["optimizer"])
    arm.step = settings.checkpoint
    subject.averaged, subject.path = saved["averaged"], saved["path"]
    return subject


def spread(text: Sequences, rows: int) -> Tensor:
    """Return ``rows`` sequences spread evenly over a text, all of it if it has fewer."""
    count = min(rows, len(text))
    return text.all()[torch.arange(count) * len(text) // count]


def draw(text: Sequences, rows: int, random: np.random.Generator) -> Tensor:
    """Return ``rows`` sequences, without repetition where there are enough."""
    chosen = random.choice(len(text), rows, replace=rows > len(text))
    return text.all()[torch.from_numpy(chosen)]


def interleaved(texts: Texts, rows: int, batch: int, random: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of sequences and their domains: ``rows`` of each domain, as many in every batch as fit."""
    each = max(1, min(rows, batch // len(texts)))
    drawn = [draw(text, rows, random).split(each) for text in texts.values()]
    for parts in zip(*drawn, strict=True):
        yield torch.cat(parts), torch.arange(len(texts)).repeat_interleave(len(parts[0]))


def influence(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    subject: Subject,
    preconditioner: str | Preconditioner,
    samples: Iterator[tuple[Tensor, Tensor]],
    columns: list[str],
    projection: Projection | None = None,
) -> InfluenceMatrix:
    """Measure S of whatever the columns are on the validation sets."""
    tasks = list(subject.validation)
    engine = InfluenceEngine(
        model,
        columns,
        tasks,
        preconditioner=preconditioner,
        optimizer=optimizer,
        projection=projection,
        batch_dim=0,  # 128 mixtures of 128 bytes would not tell
    )
    for name, rows in subject.validation.items():
        for batch in rows.split(-(-len(rows) // 4)):
            with engine.task(name):
                model.loss(batch).backward()
    for batch, ids in samples:
        with engine.domains(ids):
            model.loss(batch).backward()
        model.zero_grad()
    return engine.matrix()


def curvature(model: GPT, subject: Subject, method: Method) -> str | Preconditioner:
    """Return the preconditioner of a method, fitted to the domains in equal parts."""
    if method.preconditioner == "adam":
        return Adam(floor=method.floor)
    if method.preconditioner == "identity":
        return "identity"
    random = np.random.default_rng([subject.seed, 3])
    rows = -(-subject.settings.fisher_rows // len(subject.domains))
    batches = [batch for batch, _ in interleaved(subject.domains, rows, subject.settings.batch_rows, random)]
    kind = EKFAC if method.preconditioner == "ekfac" else DiagonalFisher
    return kind(damping=method.damping, seed=subject.seed).fit(model, batches, lambda model, batch: model.loss(batch))


def measurement_points(subject: Subject, method: Method) -> list[tuple[GPT, torch.optim.Optimizer]]:
    """Return the weights that a method takes gradients at, each with the optimizer that goes with them."""
    arm = subject.arm
    if method.weights == "current":
        return [(arm.model, arm.optimizer)]
    branch = arm.branch()
    if method.weights == "averaged":
        branch.model.load_state_dict(subject.averaged)
        return [(branch.model, branch.optimizer)]
    if method.weights == "decayed":
        random = np.random.default_rng([subject.seed, 4])
        count, rate = subject.settings.decay_steps, arm.learning_rate()
        rows = arm.settings.batch
        texts = list(subject.domains.values())
        for step in range(count):
            which = random.permutation(np.arange(rows) % len(texts))
            batch = torch.cat([draw(texts[each], 1, random) for each in which])
            optimizer_step(branch, batch, rate * (1 - (step + 0.5) / count))
        return [(branch.model, branch.optimizer)]
    if method.weights == "coasted":
        for _ in range(subject.settings.coast_steps):
            for parameter in branch.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            take_step(branch, arm.learning_rate())
        return [(branch.model, branch.optimizer)]
    points = [(arm.model, arm.optimizer)]
    for state in subject.path:
        branch = arm.branch()
        branch.model.load_state_dict(state["model"])
        branch.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        points.append((branch.model, branch.optimizer))
    return points


def measure_method(subject: Subject, method: Method) -> Array:
    """Return S [n, m] by a method; every method sees the same sequences."""
    settings = subject.settings
    values = []
    for number, (model, optimizer) in enumerate(measurement_points(subject, method)):
        samples = np.random.default_rng([subject.seed, 2, number])
        projection = None if method.dim is None else Projection(dim=method.dim, seed=subject.seed)
        batches = interleaved(subject.domains, settings.domain_rows, settings.batch_rows, samples)
        preconditioner = curvature(model, subject, method)
        matrix = influence(
            model,
            optimizer,
            subject,
            preconditioner,
            batches,
            list(subject.domains),
            projection,
        )
        values.append(matrix.values)
    return np.asarray(np.mean(values, axis=0), dtype=np.float64)


def optimizer_step(arm: Arm, batch: Tensor, rate: float) -> None:
    """Take the step that training would take on this batch, at this rate."""
    arm.optimizer.zero_grad()
    arm.model.loss(batch).backward()
    torch.nn.utils.clip_grad_norm_(arm.model.parameters(), arm.settings.clip)
    take_step(arm, rate)


def take_step(arm: Arm, rate: float) -> None:
    """Let the optimizer step on the gradients that are there, at this rate."""
    for group in arm.optimizer.param_groups:
        group["lr"] = rate
    arm.optimizer.step()


@torch.no_grad()
def losses(model: GPT, rows: Mapping[str, Tensor]) -> Array:
    """Return the loss of every task [n]."""
    return np.array([float(model.loss(each)) for each in rows.values()])


def gains(subject: Subject, rates: tuple[float, ...], steps: tuple[int, ...]) -> dict[str, Any]:
    """Train on one domain at a time from the checkpoint; return by how much each task's loss fell.

    ``"RATE/STEPS"`` to [2 draws of the training sequences, n, m], on the validation sets and on unseen text.
    """
    arm = subject.arm
    judges = {"validation": subject.validation, "unseen": subject.unseen}
    before = {name: losses(arm.model, rows) for name, rows in judges.items()}
    rate = arm.learning_rate()
    shape = (2, len(subject.tasks), len(subject.domains))
    found = {name: {f"{each:g}/{k}": np.zeros(shape) for each in rates for k in steps} for name in judges}
    for each in rates:
        for number in range(2):
            for column, text in enumerate(subject.domains.values()):
                random = np.random.default_rng([subject.seed, 5, number, column])
                branch = arm.branch()
                for step in range(1, max(steps) + 1):
                    optimizer_step(branch, draw(text, arm.settings.batch, random), rate * each)
                    if step in steps:
                        for name, rows in judges.items():
                            found[name][f"{each:g}/{step}"][number, :, column] = before[name] - losses(
                                branch.model, rows
                            )
    return {name: {cell: values.tolist() for cell, values in cells.items()} for name, cells in found.items()}


def counterfactual(subject: Subject) -> dict[str, Any]:
    """Return real gains, and S by every method."""
    influences = {method.name: measure_method(subject, method).tolist() for method in subject.settings.methods}
    return {"gains": gains(subject, subject.settings.rates, subject.settings.steps), "influence": influences}


def long(subject: Subject) -> dict[str, Any]:
    """Return the gains after more steps, at the full rate."""
    return {"gains": gains(subject, (1.0,), subject.settings.long_steps)}


def additivity(subject: Subject) -> dict[str, Any]:
    """Measure S, the influence of sampled mixtures, and what of both is sampling noise.

    Both use the same validation sets, as these are given; the domains' sequences are drawn independently. Every mixture
    is one column of the engine.
    """
    settings, arm = subject.settings, subject.arm
    names = list(subject.domains)
    samples = np.random.default_rng([subject.seed, 6])
    batches = interleaved(subject.domains, settings.additivity_rows, settings.batch_rows, samples)
    # Without a floor, bytes that the run never trained on (P = 1 / eps) decide what no sample of this size can tell.
    matrix = influence(arm.model, arm.optimizer, subject, Adam(floor=1.0), batches, names)
    weights = np.random.default_rng([subject.seed, 8]).dirichlet(np.ones(len(names)), settings.mixtures)
    lengths = {name: len(text) for name, text in subject.domains.items()}
    everything = torch.cat([text.all() for text in subject.domains.values()])
    order = []
    for number, mixture in enumerate(weights):
        # As a training run would draw them.
        sampler = MixtureSampler(
            lengths, dict(zip(names, mixture.tolist(), strict=True)), seed=1000 * subject.seed + number
        )
        order.append(list(islice(sampler, settings.mixture_rows)))
    chosen = torch.tensor(order)  # [mixtures, rows]
    ids = torch.arange(settings.mixtures)
    sampled = influence(
        arm.model,
        arm.optimizer,
        subject,
        Adam(floor=1.0),
        ((everything[column], ids) for column in chosen.T),
        [f"mixture {number}" for number in range(settings.mixtures)],
    )
    predicted = matrix.values @ weights.T
    # What sampling leaves of a perfect prediction: noise of both sides, that of S w being shared between mixtures.
    error = matrix.stderr_domain**2
    centred = weights - weights.mean(0)
    per_sequence = error * settings.additivity_rows / settings.mixture_rows
    noise_predicted = (error[:, None, :] * centred[None] ** 2).sum(2).mean(1)
    return {
        "tasks": list(subject.tasks),
        "predicted": predicted.tolist(),
        "measured": sampled.values.tolist(),
        "noise_predicted": noise_predicted.tolist(),
        "noise_measured": (per_sequence @ weights.T).mean(1).tolist(),
        "tokens_per_mixture": float(sampled.tokens[0]),
        "tokens_per_domain": float(matrix.tokens[0]),
    }


def calibration(subject: Subject) -> dict[str, Any]:
    """Repeat measurements of the demonstration's size and count how often intervals hold the truth.

    S is bilinear, so a table of the influence of every task micro-batch of a pool on every domain micro-batch of a pool
    holds all measurements that can be drawn from the pools. Repetitions draw from them with replacement; the truth is
    the mean of the whole table, which is known exactly.
    """
    settings, training = subject.settings, subject.settings.training
    random = np.random.default_rng([subject.seed, 9])
    n, m = len(subject.tasks), len(subject.domains)
    tokens = float(training.domain_rows * training.model.length)
    shares: dict[str, list[float]] = {}
    # One pool for both, so that they differ in nothing else.
    for preconditioner in (Adam(), Adam(floor=1.0)):
        table = influence_of_pools(subject, preconditioner)
        truth = table.mean((1, 3))
        for splits in (2, training.task_splits):
            kept = [covered(table, truth, splits, training, tokens, random) for _ in range(settings.repetitions)]
            shares[f"{preconditioner.name}, {splits} splits"] = np.mean(kept, axis=(1, 2)).tolist()
    return {"shares": shares, "cells": n * m}


def influence_of_pools(subject: Subject, preconditioner: Preconditioner) -> Array:
    """Return the influence of every micro-batch of the tasks on every one of the domains [n, pool, m, pool]."""
    settings, training, arm = subject.settings, subject.settings.training, subject.arm
    random = np.random.default_rng([subject.seed, 10])
    n, m = len(subject.tasks), len(subject.domains)
    names = [f"{task} {number}" for task in subject.tasks for number in range(settings.pool_task)]
    columns = [f"{domain} {number}" for domain in subject.domains for number in range(settings.pool_domain)]
    engine = InfluenceEngine(
        arm.model,
        columns,
        names,
        preconditioner=preconditioner,
        optimizer=arm.optimizer,
        task_splits=1,
        batch_dim=0,
        check_every=0,
    )
    for task, text in subject.tasks.items():
        for number, batch in enumerate(
            draw(text, settings.pool_task * training.task_rows, random).split(training.task_rows)
        ):
            with engine.task(f"{task} {number}"):
                arm.model.loss(batch).backward()
    for first, text in enumerate(subject.domains.values()):
        rows = draw(text, settings.pool_domain * training.domain_rows, random)
        ids = first * settings.pool_domain + torch.arange(settings.pool_domain).repeat_interleave(training.domain_rows)
        for batch, each in zip(rows.split(settings.batch_rows), ids.split(settings.batch_rows), strict=True):
            with engine.domains(each):
                arm.model.loss(batch).backward()
            arm.model.zero_grad()
    return engine.matrix().values.reshape(n, settings.pool_task, m, settings.pool_domain)


def covered(
    table: Array, truth: Array, splits: int, training: DemoSettings, tokens: float, random: np.random.Generator
) -> NDArray[np.bool_]:
    """Tell of which cells [n, m] the 95% interval of one drawn measurement holds the truth."""
    n, pool_task, m, pool_domain = table.shape
    batches = random.integers(0, pool_task, (n, training.task_batches))
    micro = random.integers(0, pool_domain, (m, training.domain_batches))
    rows, columns = np.arange(n)[:, None, None, None], np.arange(m)[None, :, None, None]
    drawn = table[rows, batches[:, None, :, None], columns, micro[None, :, None, :]]  # [n, m, task, domain batches]
    dealt = [np.arange(split, training.task_batches, splits) for split in range(splits)]
    queries = np.stack([drawn[:, :, each].mean(2) for each in dealt], axis=1)  # [n, splits, m, domain batches]
    estimator = Estimator(n, m)
    estimator.begin_round(
        np.repeat(np.arange(n), splits).tolist(), [len(each) / training.task_batches for each in dealt] * n
    )
    for number in range(training.domain_batches):
        estimator.add(queries[..., number].reshape(n * splits, m) * tokens, np.full(m, tokens))
    matrix = estimator.matrix([f"task{i}" for i in range(n)], [f"domain{j}" for j in range(m)])
    low, high = matrix.interval()
    return np.asarray((low <= truth) & (truth <= high))


PARTS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "counterfactual": counterfactual,
    "additivity": additivity,
    "calibration": calibration,
    "long": long,
}


def run(settings: PredictionSettings, seeds: list[int], parts: list[str], folder: Path) -> None:
    """Run what is not in ``folder`` yet, part by part over all seeds, and print a line for each."""
    folder.mkdir(parents=True, exist_ok=True)
    corpora = gather(domain_bytes=settings.training.domain_bytes, task_bytes=settings.training.task_bytes)
    described = {**json.loads(json.dumps(dataclasses.asdict(settings))), "text": corpora.digest()}
    about = folder / "settings.json"
    if about.exists() and json.loads(about.read_text(encoding="utf-8")) != described:
        raise ValueError(f"{folder} must hold results of the same settings and text; got others: choose another --out")
    files.write_json(about, described)
    missing = [(part, seed) for part in parts for seed in seeds if not (folder / f"{part}-{seed}.json").exists()]
    for part, seed in missing:
        began = time.process_time()
        found = PARTS[part](train(settings, seed, corpora, folder))
        content = {
            "environment": describe_environment(),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "domains": list(corpora.domains),
            "tasks": list(corpora.tasks),
            "cpu_seconds": time.process_time() - began,
            **found,
        }
        path = files.write_json(folder / f"{part}-{seed}.json", content)
        print(f"{path}: {content['cpu_seconds']:.0f} s of CPU", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the study, then report what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=("small", "full"), default="small")
    parser.add_argument("--quick", action="store_true", help="tiny numbers, to see that everything runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="where the parts are stored; default: build/prediction-SETTING")
    parser.add_argument("--results", type=Path, help="where the report goes; default: benchmarks/results")
    parser.add_argument("--report", action="store_true", help="run nothing, report what is there")
    chosen = parser.parse_args(arguments)
    name = "quick" if chosen.quick else chosen.setting
    folder = chosen.out or REPOSITORY / "build" / f"prediction-{name}"
    if not chosen.report:
        run(SETTINGS[name], chosen.seeds, chosen.parts, folder)
    # What is tiny must not replace what is committed.
    results = chosen.results or (folder if chosen.quick else REPOSITORY / "benchmarks" / "results")
    for path in write_report(folder, chosen.seeds, name, results):
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
