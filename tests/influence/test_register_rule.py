"""Rules for operations of one's own: a made-up product, captured as if torch had it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tikmix_fast import InfluenceEngine, register_rule
from tikmix_fast.influence.capture import rules
from tikmix_fast.influence.capture.rules import plain, tap
from tikmix_fast.influence.capture.views import UncapturedParameterError


def scaled_linear(x, weight, scale):
    """scale * x @ weight.T, which dispatches as torch's own functions do."""
    if torch.overrides.has_torch_function((x, weight)):
        return torch.overrides.handle_torch_function(scaled_linear, (x, weight), x, weight, scale)
    return _ScaledLinear.apply(x, weight, scale)


class _ScaledLinear(torch.autograd.Function):
    """Autograd of its own, so that nothing inside is seen."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(x, weight)
        ctx.scale = scale
        return scale * x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        flat = gradient.reshape(-1, len(weight)).T @ x.reshape(-1, x.shape[-1])
        return ctx.scale * gradient @ weight, ctx.scale * flat, None


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, ids):
        return scaled_linear(self.table(ids), self.weight, 3.0)


@pytest.fixture
def scaled_rule(monkeypatch):
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))

    @register_rule(scaled_linear, data=(0, "x"))
    def rule(capture, function, x, weight, scale):
        def read(gradient, rows):
            capture.sink.product(weight, rows, scale * gradient, in_out=False)

        return tap(function(x, plain(weight), scale), read, x.detach())

    return rule


def batches():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(11, (4, 7), generator=generator), torch.randint(11, (3, 7), generator=generator)


def by_hand(model, task, batch, ids):
    """S of the rows of each domain, by autograd on each alone."""

    def gradient(rows):
        loss = model(rows).square().sum()
        return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(model.parameters()))]).double()

    query = gradient(task) / task.numel()
    return [float(query @ gradient(batch[ids == j]) / batch[ids == j].numel()) for j in range(2)]


def test_a_made_up_operation_is_captured(scaled_rule):
    torch.manual_seed(0)
    model, (task, batch), ids = Model().double(), batches(), torch.tensor([0, 1, 1])
    engine = InfluenceEngine(model, ["x", "y"], ["a"], preconditioner="identity", reduction="sum")
    with engine.task("a", mask=task.numel()):
        model(task).square().sum().backward()
    with engine.domains(ids, mask=torch.ones(3, 7, dtype=torch.bool)):
        model(batch).square().sum().backward()
    assert engine.matrix().values[0].tolist() == pytest.approx(by_hand(model, task, batch, ids), rel=1e-9)
    assert engine.coverage().share == 1


def test_without_a_rule_it_is_refused():
    model, (task, batch) = Model(), batches()
    engine = InfluenceEngine(model, ["x", "y"], ["a"], preconditioner="identity", reduction="sum")
    with engine.task("a", mask=task.numel()):
        model(task).square().sum().backward()
    with (
        pytest.raises(UncapturedParameterError, match=r"'weight'.*scaled_linear.*exclude=\['weight'\]"),
        engine.domains([0, 1, 1]),
    ):
        model(batch).square().sum().backward()


def test_constants_in_the_place_of_the_data_are_derived_from(scaled_rule):
    """The rule asks for rows of the batch; a constant through the same operation makes a parameter of it."""
    model = Model().double()
    task, batch = batches()
    loss = lambda rows: (model(rows) + scaled_linear(torch.ones(6, dtype=torch.float64), model.weight, 2.0)).sum()  # noqa: E731
    engine = InfluenceEngine(model, ["x", "y"], ["a"], preconditioner="identity", reduction="sum")
    with engine.task("a", mask=task.numel()):
        loss(task).backward()
    with engine.domains([0, 1, 1], mask=torch.ones(3, 7, dtype=torch.bool)):
        loss(batch).backward()

    def gradient(rows):
        grads = torch.autograd.grad(loss(rows), list(model.parameters()))
        return torch.cat([each.flatten() for each in grads]) / rows.numel()

    expected = [float(gradient(task) @ gradient(rows)) for rows in (batch[:1], batch[1:])]
    assert engine.matrix().values[0].tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("function", "rule", "options", "error", "match"),
    [
        (3, print, {}, TypeError, "function must be callable; got int"),
        (print, 3, {}, TypeError, "rule must be callable; got int"),
        (print, print, {"data": 0}, TypeError, "data must be the position and the name"),
        (torch.matmul, print, {}, ValueError, "'matmul' has one"),
        (torch.add, print, {}, ValueError, "'add' has one"),
    ],
)
def test_mistakes(function, rule, options, error, match):
    with pytest.raises(error, match=match):
        register_rule(function, rule, **options)


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w, b: x.reshape(-1, 6).mm(w).view(*x.shape[:-1], 5),
        lambda x, w, b: b.addmm(x.reshape(-1, 6), w).view(*x.shape[:-1], 5),
        lambda x, w, b: torch.addmm(b, mat1=x.reshape(-1, 6), mat2=w).view(*x.shape[:-1], 5),
        lambda x, w, b: w.__rmatmul__(x),
    ],
    ids=["Tensor.mm", "Tensor.addmm", "addmm by name", "__rmatmul__"],
)
def test_every_form_of_a_product_tells_its_rows(product):
    """With mask=None the rows of the last product are counted, whichever way it is written."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": nn.Embedding(11, 6), "head": nn.Linear(5, 6)}).double()
    task, batch = batches()
    logits = lambda rows: product(model["table"](rows), model["head"].weight, model["head"].bias[:5].detach())  # noqa: E731
    engine = InfluenceEngine(model, ["x", "y"], ["a"], preconditioner="identity", exclude="head.bias")
    with engine.task("a"):
        logits(task).square().sum(-1).mean().backward()
    with engine.domains([0, 1, 1]):
        logits(batch).square().sum(-1).mean().backward()
    assert engine.matrix().tokens.tolist() == [7, 14]

    def gradient(rows):
        loss = logits(rows).square().sum(-1).mean()
        grads = torch.autograd.grad(loss, [model["table"].weight, model["head"].weight])
        return torch.cat([each.flatten() for each in grads])

    expected = [float(gradient(task) @ gradient(rows)) for rows in (batch[:1], batch[1:])]
    assert engine.matrix().values[0].tolist() == pytest.approx(expected, rel=1e-9)
