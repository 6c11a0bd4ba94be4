"""The engine under what trainers do: autocast, checkpointing, compiled models, wrappers, half-precision weights."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tikmix_fast import InfluenceEngine, shifted_mask

TOLERANCE = 1e-5


class Checkpointed(nn.Module):
    """The attentive model with its block recomputed in the backward."""

    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        h = self.inner.tokens(x) + self.inner.positions(torch.arange(x.shape[1]))
        h = checkpoint(self.inner.block, h, use_reentrant=self.reentrant)
        return h @ self.inner.tokens.weight.T


@pytest.mark.parametrize("grad", ["fused", "ordinary"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(kit, reentrant, grad):
    model = Checkpointed(kit.make_model("attentive"), reentrant)
    tasks = {"a": [kit.make_batch(1, 3, 8)]}
    batches = [kit.make_batch(2, 4, 9, ids=[1, 0, 1, 0], masked=0.2), kit.make_batch(3, 2, 9, ids=[1, 1])]
    kit.mean_loss(model, batches[0]).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    engine = kit.measure(model, tasks, batches[:1], 2, preconditioner="identity", grad=grad)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-4, atol=1e-7)
    with engine.domains(batches[1].ids, mask=shifted_mask(batches[1].labels)):
        kit.mean_loss(model, batches[1]).backward()
    truth = kit.per_example_influence(model.inner, tasks, batches, 2)
    assert truth.error(engine.matrix().values) < TOLERANCE


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_transformers_own_checkpointing(kit, kind):
    model = kit.make_model(kind)
    tasks, batches = {"a": [kit.make_batch(1, 3, 8)]}, [kit.make_batch(2, 4, 9, ids=[1, 0, 1, 0])]
    truth = kit.per_example_influence(model, tasks, batches, 2)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    engine = kit.measure(model, tasks, batches, 2, preconditioner="identity")
    assert truth.error(engine.matrix().values) < TOLERANCE


@pytest.mark.parametrize("grad", ["fused", "ordinary"])
@pytest.mark.parametrize("kind", ["zoo", "gpt2", "llama"])
def test_bfloat16_autocast(kit, kind, grad):
    """S is as near to that of the same model in float64 as the autocast gradients themselves are."""
    model = kit.make_model(kind)
    tasks = {"a": [kit.make_batch(1, 8, 16)]}
    batches = [kit.make_batch(2, 8, 16, ids=[1, 0, 1, 0, 0, 0, 1, 1])]
    truth = kit.per_example_influence(model, tasks, batches, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kit.mean_loss(model, batches[0]).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    exact = copy.deepcopy(model).double()
    kit.mean_loss(exact, batches[0]).backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine = kit.measure(model, tasks, batches, 2, preconditioner="identity", grad=grad)

    def error(gradients):
        squares = [
            ((gradients[name].double() - p.grad).square().sum(), p.grad.square().sum())
            for name, p in exact.named_parameters()
        ]
        return float((sum(d for d, _ in squares) / sum(s for _, s in squares)).sqrt())

    eager = error(plain)
    ours = error({name: p.grad for name, p in model.named_parameters()})
    assert ours <= 1.05 * eager
    # Both sides of the product carry that error.
    assert truth.error(engine.matrix().values) <= 2 * eager
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_bfloat16_weights(kit):
    model = kit.make_model("llama").bfloat16()
    tasks = {"a": [kit.make_batch(1, 8, 16)]}
    batches = [kit.make_batch(2, 8, 16, ids=[1, 0, 1, 0, 0, 0, 1, 1])]
    truth = kit.per_example_influence(model, tasks, batches, 2)
    engine = kit.measure(model, tasks, batches, 2, preconditioner="identity")
    assert truth.error(engine.matrix().values) < 0.03
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())


def test_bfloat16_gradients_of_many_batches_are_summed_wider(kit):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(37, 8), nn.Linear(8, 37)).bfloat16()
    task, batches = kit.make_batch(1, 2, 6), [kit.make_batch(2, 2, 6, ids=[0, 1])]
    once, often = (
        kit.measure(model, {"a": [task] * many}, batches, 2, preconditioner="identity").matrix().values
        for many in (1, 64)
    )
    assert often == pytest.approx(once, rel=1e-4)


@pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
def test_compiled_model(kit, how):
    """Compiled before, it runs as written inside the contexts and compiled again afterwards."""
    model = kit.make_model("attentive")
    tasks, batches = {"a": [kit.make_batch(1, 3, 8)]}, [kit.make_batch(2, 4, 9, ids=[1, 0, 1, 0])]
    truth = kit.per_example_influence(model, tasks, batches, 2)
    calls = []

    def backend(graph, inputs):
        def run(*args):
            calls.append(1)
            return graph.forward(*args)

        return run

    if how == "torch.compile":
        compiled = torch.compile(model, backend=backend)
    else:
        compiled = model
        compiled.compile(backend=backend)
    compiled(batches[0].x)
    assert calls
    calls.clear()
    engine = kit.measure(compiled, tasks, batches, 2, preconditioner="identity")
    assert truth.error(engine.matrix().values) < TOLERANCE
    assert not calls
    assert set(engine.parameters()) == {name for name, _ in model.named_parameters()}
    compiled(batches[0].x)
    assert calls


def test_distributed_data_parallel_of_one(kit):
    """Names are those of the wrapped model, and a task's backward starts no reduction."""
    if not torch.distributed.is_available():
        pytest.skip("torch.distributed is not available")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = kit.make_model("attentive")
        tasks, batches = {"a": [kit.make_batch(1, 3, 8)]}, [kit.make_batch(2, 4, 9, ids=[1, 0, 1, 0])]
        truth = kit.per_example_influence(model, tasks, batches, 2)
        wrapped = nn.parallel.DistributedDataParallel(model)
        engine = kit.measure(wrapped, tasks, batches, 2, preconditioner="identity")
        assert truth.error(engine.matrix().values) < TOLERANCE
        assert set(engine.parameters()) == {name for name, _ in model.named_parameters()}
    finally:
        torch.distributed.destroy_process_group()


def test_frozen_parameters_need_nothing(kit):
    """Only adapters train: influence covers them, and the frozen weights need neither queries nor capture."""
    model = kit.make_model("gpt2")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("ln_" in name or "c_fc" in name)
    tasks, batches = {"a": [kit.make_batch(1, 3, 8)]}, [kit.make_batch(2, 4, 9, ids=[1, 0, 1, 0])]
    engine = kit.measure(model, tasks, batches, 2, preconditioner="identity")
    trained = {name: torch.tensor(float(p.requires_grad)).expand(p.shape) for name, p in model.named_parameters()}
    model.requires_grad_(True)
    assert kit.per_example_influence(model, tasks, batches, 2, trained).error(engine.matrix().values) < TOLERANCE


def test_sparse_embedding_gradients(kit):
    torch.manual_seed(0)
    tables = [nn.Embedding(37, 8, sparse=sparse) for sparse in (True, False)]
    tables[1].load_state_dict(tables[0].state_dict())
    head = nn.Linear(8, 37)
    values = []
    for table in tables:
        model = nn.Sequential(table, head)
        engine = kit.measure(
            model,
            {"a": [kit.make_batch(1, 3, 8), kit.make_batch(2, 3, 8)]},
            [kit.make_batch(3, 4, 9, ids=[1, 0, 1, 0]), kit.make_batch(4, 4, 9, ids=[1, 0, 1, 0])],
            2,
            preconditioner="identity",
        )
        values.append(torch.as_tensor(engine.matrix().values))
        model.zero_grad()
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=1e-9)


def test_regression_without_a_cross_entropy():
    """Rows are examples, the loss is a square: mask=None takes every row of the last product."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 1))
    x, y = torch.randn(10, 4), torch.randn(10, 1)
    ids = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1, 1])
    engine = InfluenceEngine(model, ["x", "y"], ["a"], preconditioner="identity")
    with engine.task("a"):
        (model(x[:3]) - y[:3]).square().mean().backward()
    with engine.domains(ids):
        (model(x) - y).square().mean().backward()
    assert engine.matrix().tokens.tolist() == [4, 6]

    def gradient(rows):
        loss = (model(x[rows]) - y[rows]).square().mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    for j in range(2):
        expected = float(gradient(slice(0, 3)) @ gradient(ids == j))
        assert engine.matrix().values[0, j] == pytest.approx(expected, rel=1e-5, abs=1e-7)
