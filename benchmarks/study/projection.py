"""The loss of rank by projections: projected S against exact S, on a small GPT trained here.

OMP_NUM_THREADS=1 python -m benchmarks.study.projection            # benchmarks/results/projection.json, minutes
OMP_NUM_THREADS=1 python -m benchmarks.study.projection --quick    # shows that everything runs; writes nothing

The study forms the gradient of every task and domain once, in two halves of its sequences, and applies every projection
to the same gradients. A check first shows that the engine measures the same. Spearman's correlation is over domains,
per task. The noise ceiling compares exact S of one half with exact S of the other: no projection needs to do better.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.study.ranks import spearman_by_task
from tikmix_fast import InfluenceEngine, Projection, files
from tikmix_fast.demo.corpora import Bytes, Corpora, Sequences, gather
from tikmix_fast.demo.gpt import GPT, GPTSettings
from tikmix_fast.influence.preconditioners.choose import make_preconditioner
from tikmix_fast.influence.preconditioners.protocol import Preconditioner
from tikmix_fast.influence.queries.projection import expected_error
from tikmix_fast.ops.common.projection import LayerProjection, ProjectionKind
from tikmix_fast.report.environment import describe_environment

RESULT = Path(__file__).parents[1] / "results" / "projection.json"
Array = NDArray[np.float64]
Gradients = dict[str, Tensor]
"""Gradients [count, *shape] by the name of the parameter."""


@dataclass(frozen=True)
class Settings:
    """The size of training and measurement."""

    layers: int = 2
    heads: int = 8
    width: int = 512
    length: int = 64
    steps: int = 150
    step_rows: int = 9
    lr: float = 6e-4
    rows: int = 24
    """Sequences per half of a task or a domain."""
    dims: tuple[int, ...] = (32, 64, 128)
    seeds: int = 5


QUICK = Settings(layers=1, heads=2, width=160, length=16, steps=3, rows=2, dims=(32,), seeds=2)


def train(corpora: Corpora, settings: Settings, random: np.random.Generator) -> tuple[GPT, torch.optim.AdamW]:
    """Train on all domains alike."""
    model = GPT(GPTSettings(settings.layers, settings.heads, settings.width, settings.length), seed=0)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=settings.lr, betas=(0.9, 0.95))
    texts = [Sequences(text, settings.length) for text in corpora.domains.values()]
    for _ in range(settings.steps):
        chosen = [texts[i % len(texts)] for i in range(settings.step_rows)]
        loss = model.loss(torch.cat([draw(text, 1, random) for text in chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.zero_grad()
    print(f"trained to a loss of {loss.item():.3f}", flush=True)
    return model, optimizer


def draw(text: Sequences, rows: int, random: np.random.Generator) -> Tensor:
    """Draw sequences, without replacement if the text has enough."""
    return text.all()[torch.from_numpy(random.choice(len(text), rows, replace=rows > len(text)))]


def gradients_of(model: GPT, halves: list[Tensor]) -> list[Gradients]:
    """Return for each half the stacked mean gradients of its entries [rows, S + 1]."""
    named = dict(model.named_parameters())
    gradients = [[torch.autograd.grad(model.loss(rows), list(named.values())) for rows in half] for half in halves]
    return [dict(zip(named, map(torch.stack, zip(*half, strict=True)), strict=True)) for half in gradients]


def mean_of(halves: list[Gradients]) -> Gradients:
    """Return the mean of two halves."""
    return {name: (value + halves[1][name]) / 2 for name, value in halves[0].items()}


def precondition(preconditioner: Preconditioner, halves: list[Gradients]) -> list[Gradients]:
    """Turn gradients into queries."""
    return [{name: preconditioner.apply(name, value.clone()) for name, value in half.items()} for half in halves]


def project(gradients: Gradients, layers: Mapping[str, LayerProjection]) -> Gradients:
    """Project the gradients of ``layers`` and return all."""
    return {name: layers[name].project(value) if name in layers else value for name, value in gradients.items()}


def products(queries: Gradients, domains: Gradients, names: list[str]) -> Array:
    """Return sum over the parameters of <query, gradient>, [n, m]."""
    parts = [queries[name].flatten(1) @ domains[name].flatten(1).T for name in names]
    return torch.stack(parts).double().sum(0).numpy()


def lengths(gradients: Gradients, names: list[str]) -> Array:
    """Return the norm of each gradient."""
    squares = [gradients[name].flatten(1).double().square().sum(1) for name in names]
    return torch.stack(squares).sum(0).sqrt().numpy()


def study(model: GPT, queries: list[Gradients], domains: list[Gradients], settings: Settings) -> list[dict[str, Any]]:
    """Compare every projection with the exact matrix, for the wide layers alone and for everything."""
    named = dict(model.named_parameters())
    whole = mean_of(queries), mean_of(domains)
    wide = [name for name, p in named.items() if name.startswith("blocks.") and p.ndim == 2]
    parts = {"wide layers": wide, "everything": list(named)}
    exact = {part: products(*whole, names) for part, names in parts.items()}
    scale = {part: lengths(whole[0], names)[:, None] * lengths(whole[1], names) for part, names in parts.items()}
    ceilings = {
        part: spearman_by_task(products(queries[0], domains[0], names), products(queries[1], domains[1], names))
        for part, names in parts.items()
    }
    cases = []
    for kind, dim in product(get_args(ProjectionKind), settings.dims):
        projected: dict[str, list[Array]] = {part: [] for part in parts}
        for seed in range(settings.seeds):
            layers = Projection(dim=dim, kind=kind, seed=seed).layers(model, named)
            queries_here, domains_here = (project(each, layers) for each in whole)
            for part, names in parts.items():
                projected[part].append(products(queries_here, domains_here, names))
        for part, values in projected.items():
            agreement = np.stack([spearman_by_task(each, exact[part]) for each in values])
            errors = (np.stack(values) - exact[part]) / scale[part]
            case = {
                "part": part,
                "kind": kind,
                "dim": dim,
                "spearman_mean": float(agreement.mean()),
                "spearman_worst_task": float(agreement.mean(0).min()),
                "spearman_by_seed": agreement.mean(1).tolist(),
                "noise_ceiling_mean": float(ceilings[part].mean()),
                "noise_ceiling_worst_task": float(ceilings[part].min()),
                "error": float(np.sqrt(np.square(errors).mean())),
                "expected_error": expected_error(dim),
            }
            cases.append(case)
            print(
                f"  {part}, {kind}, {dim}: Spearman {case['spearman_mean']:.4f}, worst task "
                f"{case['spearman_worst_task']:.4f} (two halves of the data: {case['noise_ceiling_mean']:.4f}), error "
                f"{case['error']:.4f} of |q| |g|",
                flush=True,
            )
    return cases


def check_engine(
    model: GPT, optimizer: torch.optim.Optimizer, name: str, tasks: list[Tensor], domains: list[Tensor]
) -> float:
    """Return the distance of the engine's projected matrix from ours, as a share of the largest entry."""
    projection = Projection(dim=32, seed=3)
    tasks, domains = [half[:2] for half in tasks], [half[:3] for half in domains]
    engine = InfluenceEngine(model, ["a", "b", "c"], ["x", "y"], name, optimizer, projection, check_every=0)
    for half in tasks:
        for task, rows in zip(("x", "y"), half, strict=True):
            with engine.task(task):
                model.loss(rows).backward()
    for half in domains:
        with engine.domains(torch.arange(3).repeat_interleave(half.shape[1])):
            model.loss(half.flatten(0, 1)).backward()
        model.zero_grad()
    named = dict(model.named_parameters())
    preconditioner = make_preconditioner(name)
    preconditioner.prepare(named, optimizer)
    layers = projection.layers(model, named)
    queries = mean_of(precondition(preconditioner, gradients_of(model, tasks)))
    values = products(project(queries, layers), project(mean_of(gradients_of(model, domains)), layers), list(named))
    return float(np.abs(engine.matrix().values - values).max() / np.abs(values).max())


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    settings = QUICK if parser.parse_args().quick else Settings()
    began, random = time.process_time(), np.random.default_rng(0)
    corpora = gather()
    model, optimizer = train(corpora, settings, random)

    def halves(texts: Iterable[Bytes]) -> list[Tensor]:
        drawn = [draw(Sequences(text, settings.length), 2 * settings.rows, random) for text in texts]
        return list(torch.stack(drawn).unflatten(1, (2, settings.rows)).unbind(1))  # each [texts, rows, S + 1]

    tasks = halves(task.measure for task in corpora.tasks.values())
    domains = halves(corpora.domains.values())
    of_tasks, of_domains = gradients_of(model, tasks), gradients_of(model, domains)
    results: dict[str, Any] = {}
    for name in ("identity", "adam"):
        print(name, flush=True)
        differs = check_engine(model, optimizer, name, tasks, domains)
        if not differs < 1e-4:
            raise RuntimeError(f"the engine's projected matrix differs from this script's own by {differs:.1e}")
        preconditioner = make_preconditioner(name)
        preconditioner.prepare(dict(model.named_parameters()), optimizer)
        results[name] = study(model, precondition(preconditioner, of_tasks), of_domains, settings)
    if settings == QUICK:
        return
    content = {
        "suite": "projection",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "environment": describe_environment(),
        "settings": asdict(settings),
        "tasks": list(corpora.tasks),
        "domains": list(corpora.domains),
        "cpu_seconds": time.process_time() - began,
        "preconditioners": results,
    }
    print(files.write_json(RESULT, content))


if __name__ == "__main__":
    main()
