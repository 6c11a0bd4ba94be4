"""The engine against per-example autograd in float64: every model, every kind of batch, both ways of forming p.grad."""

from __future__ import annotations

import pytest
import torch

from tikmix_fast import InfluenceEngine, shifted_mask

MODELS = ["zoo", "attentive", "gpt2", "llama", "llama-tied"]
TOLERANCE = 1e-5


def tasks_of(kit):
    return {
        "a": [kit.make_batch(seed, 3, 8, masked=0.2) for seed in (1, 2)],
        "b": [kit.make_batch(seed, 2, 7) for seed in (3, 4, 5)],
    }


@pytest.mark.parametrize("grad", ["fused", "ordinary"])
@pytest.mark.parametrize("kind", MODELS)
def test_mixed_rows_masks_and_microbatches(kit, kind, grad):
    model, tasks = kit.make_model(kind), tasks_of(kit)
    batches = [
        kit.make_batch(10, 5, 9, ids=[2, 0, 0, 3, 2], masked=0.3),
        # As many rows as positions: a position embedding looked up once, [S, C], must not pass for rows.
        kit.make_batch(11, 6, 6, ids=[0, 0, 2, 2, 3, 3], masked=0.1),
        kit.make_batch(12, 3, 11, ids=[2, 2, 2]),
        kit.make_batch(13, 1, 5, ids=[3]),
    ]
    engine = kit.measure(model, tasks, batches, 4, preconditioner="identity", grad=grad)
    truth = kit.per_example_influence(model, tasks, batches, 4)
    found = engine.matrix()
    assert torch.isnan(torch.as_tensor(found.values[:, 1])).all(), "a domain never seen is NaN"
    seen = [0, 2, 3]
    difference = (torch.as_tensor(found.values) - truth.values).abs() / truth.scale
    assert float(difference[:, seen].max()) < TOLERANCE
    assert engine.coverage().share == 1.0


@pytest.mark.parametrize("grad", ["fused", "ordinary"])
def test_domains_per_position(kit, grad):
    model, tasks = kit.make_model("zoo"), tasks_of(kit)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for seed, (rows, length) in enumerate([(4, 9), (7, 7), (1, 6)]):
        ids = torch.randint(0, 3, (rows, length), generator=generator)
        batches.append(kit.make_batch(20 + seed, rows, length, ids=ids, masked=0.2))
    engine = kit.measure(model, tasks, batches, 3, preconditioner="identity", grad=grad)
    assert kit.per_example_influence(model, tasks, batches, 3).error(engine.matrix().values) < TOLERANCE


@pytest.mark.parametrize("kind", ["zoo", "gpt2", "llama"])
def test_adam_preconditioner(kit, kind):
    model, tasks = kit.make_model(kind), tasks_of(kit)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "lr": 1e-3}, {"params": others, "lr": 4e-3}], betas=(0.8, 0.9))
    for seed in range(3):
        kit.mean_loss(model, kit.make_batch(seed, 16, 20)).backward()
        optimizer.step()
        optimizer.zero_grad()
    scaling = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        lr = 1e-3 if parameter.ndim > 1 else 4e-3
        v = state["exp_avg_sq"].double() / (1 - 0.9 ** float(state["step"]))
        scaling[name] = lr / 4e-3 / (v.sqrt() + 1e-8)
    batches = [kit.make_batch(10, 5, 9, ids=[1, 0, 0, 1, 2], masked=0.3), kit.make_batch(11, 2, 9, ids=[2, 1])]
    engine = kit.measure(model, tasks, batches, 3, optimizer=optimizer)
    assert kit.per_example_influence(model, tasks, batches, 3, scaling).error(engine.matrix().values) < TOLERANCE
    assert engine.matrix().settings["reference_lr"] == 4e-3


def test_names_indices_and_lists_of_names_mean_the_same(kit):
    model, tasks = kit.make_model("attentive"), tasks_of(kit)
    batch = kit.make_batch(1, 4, 8, ids=[1, 1, 1, 1])
    values = []
    for ids in (batch.ids, "d1", 1, ["d1"] * 4, [1] * 4):
        engine = kit.measure(model, tasks, [batch._replace(ids=ids)], 3, preconditioner="identity")
        values.append(torch.as_tensor(engine.matrix().values[:, 1]))
    truth = kit.per_example_influence(model, tasks, [batch], 3)
    for each in values:
        assert float(((each - truth.values[:, 1]).abs() / truth.scale[:, 1]).max()) < TOLERANCE


def test_excluded_parameters_count_as_zero(kit):
    model, tasks = kit.make_model("zoo"), tasks_of(kit)
    batches = [kit.make_batch(10, 4, 9, ids=[1, 0, 0, 1])]
    engine = kit.measure(model, tasks, batches, 2, preconditioner="identity", exclude=["norm.*", "up.weight"])
    scaling = {
        name: torch.zeros_like(p) if name in ("norm.weight", "norm.bias", "up.weight") else torch.ones_like(p)
        for name, p in model.named_parameters()
    }
    assert kit.per_example_influence(model, tasks, batches, 2, scaling).error(engine.matrix().values) < TOLERANCE
    assert set(engine.coverage().excluded) == {"norm.weight", "norm.bias", "up.weight"}
    assert model.up.weight.grad is not None, "an excluded parameter still trains"


def test_batch_in_the_second_dimension(kit):
    class Transposed(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            """Position-wise layers see [S, B, ...]; only then do the logits come back as [B, S, ...]."""
            h = self.inner.tokens(x.T) + self.inner.more_positions[: x.shape[1], None]
            h = self.inner.shared(self.inner.hand(self.inner.norm(h)))
            return (h @ self.inner.tokens.weight.T).transpose(0, 1)

    model, tasks = Transposed(kit.make_model("zoo")), tasks_of(kit)
    for ids in ([1, 0, 0, 1], torch.arange(4 * 9).reshape(4, 9) % 2):
        batches = [kit.make_batch(10, 4, 9, ids=ids, masked=0.2)]
        engine = kit.measure(model, tasks, batches, 2, preconditioner="identity", batch_dim=1)
        assert kit.per_example_influence(model, tasks, batches, 2).error(engine.matrix().values) < TOLERANCE


def test_no_domain_count_changes_what_is_kept(kit):
    """Memory: the tensors a backward makes are the same for 2 and for 64 domains, but for the [n, m] results."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for each in torch.utils._pytree.tree_leaves(result):
                if isinstance(each, torch.Tensor) and each.untyped_storage().nbytes() > 64 * 8 * 4 * 2:
                    self.total += each.untyped_storage().nbytes()
            return result

    totals = []
    for n_domains in (2, 64):
        model, tasks = kit.make_model("zoo"), tasks_of(kit)
        engine = InfluenceEngine(
            model,
            domains=[f"d{j}" for j in range(n_domains)],
            tasks=list(tasks),
            preconditioner="identity",
            check_every=0,
        )
        for name, given in tasks.items():
            for batch in given:
                with engine.task(name, mask=shifted_mask(batch.labels)):
                    kit.mean_loss(model, batch).backward()
        batch = kit.make_batch(1, 64, 20, ids=torch.arange(64) % n_domains)
        with engine.domains(torch.zeros(64, dtype=torch.int64), mask=shifted_mask(batch.labels)):
            kit.mean_loss(model, batch).backward()
        with Largest() as seen, engine.domains(batch.ids, mask=shifted_mask(batch.labels)):
            kit.mean_loss(model, batch).backward()
        totals.append(seen.total)
    assert totals[0] > 0
    assert totals[1] <= 1.05 * totals[0]


def test_fused_weight_gradients_are_computed_once(kit):
    """In a linear layer's backward the only products are that of its input's gradient and the kernel's own pass."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.shapes, self.influence = [], 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
                self.shapes.append(tuple(result.shape))
            self.influence += func.overloadpacket is torch.ops.tikmix_fast.group_influence
            return result

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7, bias=False), torch.nn.Tanh(), torch.nn.Linear(7, 3, bias=False))
    engine = InfluenceEngine(model, ["x", "y"], ["t"], preconditioner="identity", check_every=0)
    with engine.task("t"):
        model(torch.randn(4, 5)).square().mean().backward()
    with Products() as seen, engine.domains(torch.tensor([0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0])):
        model(torch.randn(11, 5)).square().mean().backward()
    assert seen.influence == 2
    assert (7, 5) not in seen.shapes, "first layer's weight gradient"
    assert (3, 7) not in seen.shapes, "second layer's weight gradient"
    assert all(p.grad is not None for p in model.parameters())
