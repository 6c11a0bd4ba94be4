"""What projecting costs in rank: S through projections against exact S, on a small GPT trained here.

OMP_NUM_THREADS=1 python benchmarks/study/projection.py            # benchmarks/results/projection.json, minutes
OMP_NUM_THREADS=1 python benchmarks/study/projection.py --quick    # to see that everything runs; writes nothing

Every task's and every domain's gradient is formed once, in two halves of its sequences; every projection is then drawn
and applied to the same gradients, which is what the engine measures (checked against it first). Spearman's correlation
is over domains, per task. The noise ceiling is that of exact S from the one half against exact S from the other: no
projection needs to be better than what sampling leaves.
"""

from __future__ import annotations

import argparse
import datetime
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from tikmix_fast import InfluenceEngine, Projection, files
from tikmix_fast.data.corpora import Corpora, Sequences, gather
from tikmix_fast.influence.preconditioners import Preconditioner, make_preconditioner
from tikmix_fast.influence.projection import expected_error
from tikmix_fast.ops.projection import ProjectionKind
from tikmix_fast.report.environment import describe_environment
from tikmix_fast.training.gpt import GPT, GPTSettings

RESULT = Path(__file__).parents[1] / "results" / "projection.json"
Array = NDArray[np.float64]
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """How much is trained and measured."""

    layers: int = 2
    heads: int = 8
    width: int = 512
    length: int = 64
    steps: int = 150
    step_rows: int = 9
    lr: float = 6e-4
    rows: int = 32
    """Sequences per half of a task or a domain."""
    dims: tuple[int, ...] = (32, 64, 128)
    seeds: int = 8


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
    """Draw sequences without replacement, where the text has enough."""
    return text.all()[torch.from_numpy(random.choice(len(text), rows, replace=rows > len(text)))]


def gradients_of(model: GPT, halves: Tensor) -> list[Gradients]:
    """Return the mean gradient of each half of the sequences [2, rows, S + 1]."""
    named = dict(model.named_parameters())
    return [
        dict(zip(named, torch.autograd.grad(model.loss(half), list(named.values())), strict=True)) for half in halves
    ]


def products(queries: list[Gradients], domains: list[Gradients], names: list[str]) -> Array:
    """Return sum over the parameters of <query, gradient>, [n, m]."""
    total = torch.zeros(len(queries), len(domains), dtype=torch.float64)
    for name in names:
        left, right = (torch.stack([each[name].flatten() for each in side]) for side in (queries, domains))
        total += (left @ right.T).double()
    return total.numpy()


def lengths(gradients: list[Gradients], names: list[str]) -> Array:
    """Return the norm of each gradient."""
    return np.array([math.sqrt(sum(float(each[name].double().square().sum()) for name in names)) for each in gradients])


def ranks(found: Array, exact: Array) -> Array:
    """Return Spearman's correlation over domains, per task."""
    return np.array([spearmanr(a, b).statistic for a, b in zip(found, exact, strict=True)])


def mean_of(halves: list[Gradients]) -> Gradients:
    """Return the mean of two halves."""
    return {name: (value + halves[1][name]) / 2 for name, value in halves[0].items()}


def project(gradients: list[Gradients], layers: Mapping[str, Any]) -> list[Gradients]:
    """Return the gradients with those of ``layers`` projected."""
    return [{name: layers[name].project(g) if name in layers else g for name, g in each.items()} for each in gradients]


def study(model: GPT, queries: list[list[Gradients]], domains: list[list[Gradients]], settings: Settings) -> list[Any]:
    """Compare every projection with the exact matrix, for the wide layers alone and for everything."""
    named = dict(model.named_parameters())
    whole_queries, whole_domains = [mean_of(each) for each in queries], [mean_of(each) for each in domains]
    parts = {"wide layers": [name for name, p in named.items() if name.startswith("blocks.") and p.ndim == 2]}
    parts["everything"] = list(named)
    cases = []
    for part, names in parts.items():
        exact = products(whole_queries, whole_domains, names)
        scale = lengths(whole_queries, names)[:, None] * lengths(whole_domains, names)
        first, second = (products([q[h] for q in queries], [d[h] for d in domains], names) for h in (0, 1))
        ceiling = ranks(first, second)
        for kind in get_args(ProjectionKind):
            for dim in settings.dims:
                agreement, errors = [], []
                for seed in range(settings.seeds):
                    layers = Projection(dim=dim, kind=kind, seed=seed).layers(model, named)
                    values = products(project(whole_queries, layers), project(whole_domains, layers), names)
                    agreement.append(ranks(values, exact))
                    errors.append((values - exact) / scale)
                per_task = np.mean(agreement, axis=0)
                cases.append(
                    {
                        "part": part,
                        "kind": kind,
                        "dim": dim,
                        "spearman_mean": float(np.mean(agreement)),
                        "spearman_worst_task": float(per_task.min()),
                        "spearman_worst": float(np.min(agreement)),
                        "spearman_by_seed": [float(each.mean()) for each in agreement],
                        "noise_ceiling_mean": float(ceiling.mean()),
                        "noise_ceiling_worst_task": float(ceiling.min()),
                        "error": float(np.sqrt(np.mean(np.square(errors)))),
                        "expected_error": expected_error(dim),
                    }
                )
                print(
                    f"  {part}, {kind}, {dim}: Spearman {np.mean(agreement):.4f}, worst task {per_task.min():.4f} "
                    f"(ceiling {ceiling.mean():.4f}), error {cases[-1]['error']:.4f} of |q| |g|",
                    flush=True,
                )
    return cases


def precondition(preconditioner: Preconditioner, gradients: list[list[Gradients]]) -> list[list[Gradients]]:
    """Turn the halves' gradients into queries."""
    return [
        [{name: preconditioner.apply(name, g.clone()[None])[0] for name, g in half.items()} for half in halves]
        for halves in gradients
    ]


def check_engine(model: GPT, optimizer: torch.optim.Optimizer, name: str, data: dict[str, list[Tensor]]) -> float:
    """Return by how much the engine's projected matrix differs from the one formed here, as a share of the largest."""
    projection = Projection(dim=32, seed=3)
    tasks, domains = data["tasks"][:2], data["domains"][:3]
    engine = InfluenceEngine(
        model, ["a", "b", "c"], ["x", "y"], name, optimizer, projection, check_every=0, batch_dim=0
    )
    for task, halves in zip(("x", "y"), tasks, strict=True):
        for half in halves:
            with engine.task(task):
                model.loss(half).backward()
    for half in (0, 1):
        with engine.domains(torch.arange(3).repeat_interleave(domains[0].shape[1])):
            model.loss(torch.cat([each[half] for each in domains])).backward()
        model.zero_grad()
    preconditioner = make_preconditioner(name)
    named = dict(model.named_parameters())
    preconditioner.prepare(named, optimizer)
    layers = projection.layers(model, named)
    queries = [mean_of(each) for each in precondition(preconditioner, [gradients_of(model, each) for each in tasks])]
    found = [mean_of(gradients_of(model, each)) for each in domains]
    values = products(project(queries, layers), project(found, layers), list(named))
    return float(np.abs(engine.matrix().values - values).max() / np.abs(values).max())


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    settings = QUICK if parser.parse_args().quick else Settings()
    began, random = time.process_time(), np.random.default_rng(0)
    corpora = gather()
    model, optimizer = train(corpora, settings, random)
    texts = {"tasks": [task.measure for task in corpora.tasks.values()], "domains": list(corpora.domains.values())}
    data = {
        side: [draw(Sequences(text, settings.length), 2 * settings.rows, random) for text in given]
        for side, given in texts.items()
    }
    halves = {side: [rows.unflatten(0, (2, settings.rows)) for rows in given] for side, given in data.items()}
    gradients = {side: [gradients_of(model, each) for each in given] for side, given in halves.items()}
    found: dict[str, Any] = {}
    for name in ("identity", "adam"):
        print(name, flush=True)
        differs = check_engine(model, optimizer, name, halves)
        if not differs < 1e-4:
            raise RuntimeError(f"the engine's projected matrix differs from the one formed here by {differs:.1e}")
        preconditioner = make_preconditioner(name)
        preconditioner.prepare(dict(model.named_parameters()), optimizer)
        found[name] = study(model, precondition(preconditioner, gradients["tasks"]), gradients["domains"], settings)
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
        "preconditioners": found,
    }
    print(files.write_json(RESULT, content))


if __name__ == "__main__":
    main()
