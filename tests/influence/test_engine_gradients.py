"""What the engine does to ``p.grad``: nothing in a task, the ordinary thing in domains."""

from __future__ import annotations

import copy

import pytest
import torch

from tikmix_fast import InfluenceEngine, shifted_mask

MODELS = ["zoo", "attentive", "gpt2", "llama-tied"]


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def ordinary(kit, model, batches):
    model.zero_grad()
    for batch in batches:
        kit.mean_loss(model, batch).backward()
    return gradients(model)


@pytest.mark.parametrize("kind", MODELS)
def test_ordinary_is_bit_identical(kit, kind):
    model = kit.make_model(kind)
    tasks = {"a": [kit.make_batch(1, 3, 8)]}
    batches = [kit.make_batch(2, 4, 9, ids=[1, 0, 1, 0]), kit.make_batch(3, 2, 9, ids=[1, 1])]
    expected = ordinary(kit, model, batches)
    model.zero_grad()
    kit.measure(model, tasks, batches, 2, preconditioner="identity", grad="ordinary")
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("kind", MODELS)
def test_fused_is_as_accurate_as_ordinary(kit, kind):
    model = kit.make_model(kind)
    tasks = {"a": [kit.make_batch(1, 3, 8)]}
    batches = [kit.make_batch(seed, 8, 20, ids=[1, 0, 1, 0, 2, 2, 2, 1]) for seed in (2, 3, 4)]
    exact = ordinary(kit, copy.deepcopy(model).double(), batches)
    plain = ordinary(kit, model, batches)
    model.zero_grad()
    kit.measure(model, tasks, batches, 3, preconditioner="identity")
    for name, gradient in gradients(model).items():
        scale = exact[name].norm()
        eager = float((plain[name].double() - exact[name]).norm() / scale)
        fused = float((gradient.double() - exact[name]).norm() / scale)
        assert fused <= 2 * eager + 2e-7, name


def test_tasks_leave_gradients_alone(kit):
    model = kit.make_model("gpt2")
    kit.mean_loss(model, kit.make_batch(1, 2, 8)).backward()
    model.transformer.wpe.weight.grad = None
    before = gradients(model)
    objects = {name: p.grad for name, p in model.named_parameters()}
    engine = InfluenceEngine(model, ["x"], ["a"], preconditioner="identity")
    batch = kit.make_batch(2, 3, 8)
    with engine.task("a", mask=shifted_mask(batch.labels)):
        kit.mean_loss(model, batch).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is objects[name]
        assert before[name] is None or torch.equal(parameter.grad, before[name])


def test_domains_add_to_what_is_there(kit):
    model = kit.make_model("attentive")
    first, second = kit.make_batch(1, 2, 8), kit.make_batch(2, 3, 8, ids=[0, 1, 0])
    expected = ordinary(kit, model, [first, second])
    model.zero_grad()
    engine = kit.measure(model, {"a": [kit.make_batch(3, 2, 8)]}, [], 2, preconditioner="identity")
    kit.mean_loss(model, first).backward()
    with engine.domains(second.ids, mask=shifted_mask(second.labels)):
        kit.mean_loss(model, second).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


def test_training_with_the_engine_is_training_without_it(kit):
    """Ten optimizer steps whose gradients come out of the contexts end at the weights of ten ordinary ones."""
    models = {}
    for grad in ("none", "ordinary"):
        model = models[grad] = kit.make_model("gpt2")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        kit.mean_loss(model, kit.make_batch(99, 4, 8)).backward()
        optimizer.step()
        optimizer.zero_grad()
        engine = InfluenceEngine(model, ["x", "y"], ["a"], optimizer=optimizer, grad="ordinary")
        for step in range(10):
            batch = kit.make_batch(step, 4, 8, ids=[0, 1, 1, 0])
            if grad == "none":
                kit.mean_loss(model, batch).backward()
            else:
                task = kit.make_batch(50 + step, 2, 8)
                with engine.task("a", mask=shifted_mask(task.labels)):
                    kit.mean_loss(model, task).backward()
                with engine.domains(batch.ids, mask=shifted_mask(batch.labels)):
                    kit.mean_loss(model, batch).backward()
                engine.refresh()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(models["none"].parameters(), models["ordinary"].parameters(), strict=True):
        assert torch.equal(one, other)
    matrix = engine.matrix()
    assert matrix.microbatches.tolist() == [10, 10]
