"""One rank of test_sharded.py: measures under ``fully_shard`` and writes down what it found.

torchrun --nproc-per-node N sharded_worker.py FOLDER
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
from ranks_worker import DOMAINS, TASKS, batch, loss_of, summary
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import distribute_tensor
from torch.utils.checkpoint import checkpoint

from tikmix_fast import InfluenceEngine, Projection


class Block(nn.Module):
    """A unit of its own, with a weight that is first changed and two parameters that meet rows one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(24), nn.Linear(24, 39), nn.Linear(39, 24)
        self.gate = nn.Parameter(torch.ones(24))

    def forward(self, x):
        return self.beside(x)

    def beside(self, x):
        hidden = torch.tanh(self.up(self.norm(x)))
        return x + self.gate * nn.functional.linear(hidden, self.down.weight * 0.5, self.down.bias)


class Net(nn.Module):
    """Two blocks between a table and a head that is tied to it."""

    def __init__(self, checkpointed=False, dtype=torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.table = nn.Embedding(11, 24)
            self.blocks = nn.ModuleList([Block(), Block()])
        self.checkpointed = checkpointed
        self.to(dtype)

    def forward(self, x):
        hidden = self.table(x)
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=False) if self.checkpointed else block(hidden)
        return nn.functional.linear(hidden, self.table.weight)


def sharded(model, mesh, **options):
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def adam(model):
    """AdamW with moments, sharded where the parameters are."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    random = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        moment = (torch.rand(parameter.shape, generator=random, dtype=torch.float64) + 0.1).to(parameter.dtype)
        if hasattr(parameter, "placements"):
            moment = distribute_tensor(moment, parameter.device_mesh, parameter.placements)
        optimizer.state[parameter] = {"step": torch.tensor(7.0), "exp_avg": moment, "exp_avg_sq": moment}
    return optimizer


def measure(model, rank, size, together=1, **options):
    """Two rounds; this rank's share of the batches, so many of a task's together in one."""
    engine = InfluenceEngine(model, DOMAINS, TASKS, optimizer=adam(model), check_every=1, **options)
    for start in (0, 100):
        if start:
            engine.refresh()
        for index, task in enumerate(TASKS):
            seeds = [start + 10 * index + each for each in range(8)][rank::size]
            for first in range(0, len(seeds), together):
                with engine.task(task):
                    loss_of(model, torch.cat([batch(seed)[0] for seed in seeds[first : first + together]])).backward()
        for seed in range(start + 50, start + 58)[rank::size]:
            x, ids = batch(seed)
            with engine.domains(ids):
                loss_of(model, x).backward()
    return engine


def gradients(model):
    return {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)().tolist() for name, p in model.named_parameters()}


SCENARIOS = {
    "exact": {},
    "projected": {"projection": Projection(dim=16, kind="rademacher")},
    "ordinary": {"grad": "ordinary"},
    "shared": {"share_queries": True},
    "shared, projected": {"share_queries": True, "projection": Projection(dim=16, kind="rademacher")},
}


def said(call):
    """Return what a call raises."""
    try:
        call()
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refused(mesh, rank):
    """What the engine says to what it cannot do."""
    model = sharded(Net(), mesh)
    found = {}
    engine = InfluenceEngine(model, DOMAINS, TASKS, optimizer=adam(model), share_queries=True)

    def different_tasks():
        with engine.task(TASKS[rank % 2]):
            loss_of(model, batch(1)[0]).backward()

    found["tasks"] = said(different_tasks)

    def not_finite_on_one():
        with engine.task("qa"):
            (loss_of(model, batch(1)[0]) * (float("nan") if rank else 1.0)).backward()

    found["nan"] = said(not_finite_on_one)
    engine = InfluenceEngine(model, DOMAINS, TASKS, preconditioner="identity", check_every=1)
    for task in TASKS:
        with engine.task(task):
            loss_of(model, batch(1)[0]).backward()
    found["grad"] = str([p.grad for p in model.parameters()].count(None) == len(list(model.parameters())))
    with engine.domains("web"):
        loss_of(model, batch(2)[0]).backward()
    found["verify"] = said(lambda: engine.verify(lambda m, x: m(x), batch(1)[0], batch(1)[1]))
    with torch.no_grad():
        next(model.parameters()).mul_(2)

    def stale():
        with engine.domains("web"):
            loss_of(model, batch(2)[0]).backward()

    found["stale"] = said(stale)
    return found


def aside(mesh):
    """What is said of a unit that is used without its forward."""

    class Aside(Net):
        def forward(self, x):
            hidden = self.table(x)
            for block in self.blocks:
                hidden = block.beside(hidden)
            return nn.functional.linear(hidden, self.table.weight)

    model = sharded(Aside(), mesh)
    for block in model.blocks:
        register_fsdp_forward_method(block, "beside")
    engine = InfluenceEngine(model, ["web"], ["qa"], preconditioner="identity")

    def task():
        with engine.task("qa"):
            loss_of(model, batch(1)[0]).backward()

    def domains():
        with engine.domains("web"):
            loss_of(model, batch(1)[0]).backward()

    found = [said(task)]
    engine._session._tasks.add(0, {}, 1.0, 1.0, {})  # as if the task had been measured
    return [*found, said(domains)]


def waiting_micro_batches(mesh, rank, size):
    """A task measured between micro-batches that are not reduced yet takes nothing of theirs, and adds nothing."""
    found = []
    for with_task in (False, True):
        model = sharded(Net(), mesh)
        engine = InfluenceEngine(model, DOMAINS, TASKS, preconditioner="identity")
        model.set_requires_gradient_sync(False)
        loss_of(model, batch(rank)[0]).backward()
        if with_task:
            with engine.task("qa"):
                loss_of(model, batch(5)[0]).backward()
        model.set_requires_gradient_sync(True)
        loss_of(model, batch(rank + size)[0]).backward()
        found.append(gradients(model))
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    results = {}
    for name, options in SCENARIOS.items():
        model = sharded(Net(), mesh)
        engine = measure(model, rank, size, **options)
        results[name] = {**summary(engine), "gradients": gradients(model)}
        results[f"memory, {name}"] = [engine.memory_estimate().peak, engine.memory_estimate().queries]
    results["kept"] = summary(measure(sharded(Net(), mesh, reshard_after_forward=False), rank, size))
    results["checkpointed"] = summary(measure(sharded(Net(checkpointed=True), mesh), rank, size))
    parallel = nn.parallel.DistributedDataParallel(Net())
    results["parallel, shared"] = summary(measure(parallel, rank, size, share_queries=True))
    if size == 4:
        replicas = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        results["replicated"] = summary(measure(sharded(Net(), replicas), rank, size))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    half = sharded(Net(dtype=torch.float32), mesh, mp_policy=policy)
    results["bfloat16"] = summary(measure(half, rank, size))
    results["refused"] = refused(mesh, rank)
    results["aside"] = aside(mesh)
    results["waiting"] = waiting_micro_batches(mesh, rank, size)
    (folder / f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
