"""One rank of test_ranks.py: measures its share of the batches and writes down what it found.

torchrun --nproc-per-node N ranks_worker.py FOLDER
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tikmix_fast import InfluenceEngine, Projection
from tikmix_fast.influence.passes.conservation import ConservationError

DOMAINS, TASKS = ["web", "code", "books"], ["qa", "maths"]


class Net(nn.Module):
    """A table, two layers and a norm, in float64; a buffer, which DistributedDataParallel would send around."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.table = nn.Embedding(11, 48)
            self.first, self.norm, self.head = nn.Linear(48, 40), nn.LayerNorm(40), nn.Linear(40, 11)
        self.register_buffer("unused", torch.zeros(1))
        self.double()

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.first(self.table(x)))))


class Hidden(nn.Module):
    """Uses its weight a second time through a reference that no module shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6, bias=False).double()
        self.kept = [self.layer.weight]

    def forward(self, x):
        return F.linear(self.layer(x), self.kept[0])


def batch(seed):
    """Rows, and their domains; their number depends on the seed."""
    random = torch.Generator().manual_seed(seed)
    rows = 2 + seed % 3
    return torch.randint(11, (rows, 6), generator=random), torch.randint(len(DOMAINS), (rows,), generator=random)


def loss_of(model, x):
    return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


def adam_with_moments(model):
    """An optimizer that has moments without a step, the same on every rank."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    random = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        moment = torch.rand(parameter.shape, generator=random, dtype=torch.float64) + 0.1
        optimizer.state[parameter] = {
            "step": torch.tensor(7.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": moment,
        }
    return optimizer


def measure(model, mine, *, projection=None, micro_batches=8, unsynchronised=nullcontext, state=None):
    """Two rounds of measuring; ``mine`` picks this rank's share of a list."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    engine = InfluenceEngine(
        model, DOMAINS, TASKS, optimizer=adam_with_moments(inner), projection=projection, check_every=1
    )
    if state is not None:
        engine.load_state_dict(state)
    for start in (0, 100):
        if start:
            engine.refresh()
        for index, task in enumerate(TASKS):
            for seed in mine([start + 10 * index + each for each in range(4)]):
                x, _ = batch(seed)
                with engine.task(task):
                    loss_of(model, x).backward()
        for seed in mine(list(range(start + 50, start + 50 + micro_batches))):
            x, ids = batch(seed)
            with unsynchronised(), engine.domains(ids):
                loss_of(model, x).backward()
    return engine


def summary(engine):
    """What must agree: the matrix with its errors, and the state."""
    matrix = engine.matrix()
    parts = ("values", "stderr", "stderr_domain", "stderr_task", "dof", "tokens", "microbatches", "stderr_projection")
    found = {part: np.asarray(getattr(matrix, part)).tolist() for part in parts if getattr(matrix, part) is not None}
    return {**found, "bootstrap": np.asarray(matrix.interval(method="bootstrap")).tolist()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def mine(batches):
        return batches[rank::size]

    model = nn.parallel.DistributedDataParallel(Net())
    loss_of(model, batch(0)[0]).backward()  # a step before, after which buckets are rebuilt
    model.zero_grad()
    results = {}
    engine = measure(model, mine)
    results["exact"] = summary(engine)
    results["gradients"] = {name: p.grad.tolist() for name, p in model.module.named_parameters()}
    state = engine.state_dict()
    results["resumed"] = summary(measure(model, mine, state=state))
    results["uneven"] = summary(measure(model, mine, micro_batches=7, unsynchronised=model.no_sync))
    results["projected"] = summary(measure(model, mine, projection=Projection(dim=16, kind="rademacher")))
    results["state"] = json.loads(json.dumps(state, default=lambda each: each.tolist()))

    hidden = nn.parallel.DistributedDataParallel(Hidden())
    engine = InfluenceEngine(hidden, ["web"], ["qa"], preconditioner="identity")
    with engine.task("qa"):
        hidden(torch.ones(2, 6).double() + rank).mean().backward()
    try:
        with engine.domains("web"):
            hidden(torch.ones(2, 6).double()).mean().backward()
    except ConservationError as error:
        results["hidden"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
