"""Influence through projections: what it is, that its error is told, and that everything else stays exact."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tikmix_fast import InfluenceEngine, InfluenceMatrix, Projection, shifted_mask
from tikmix_fast.influence.passes.conservation import ConservationError


class Model(nn.Module):
    """Two weights and a table large enough for 16 or 32, a weight that is too narrow, a norm, biases."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(37, 40)
        self.norm = nn.LayerNorm(40)
        self.up = nn.Linear(40, 70)
        self.down = nn.Linear(70, 40)
        self.narrow = nn.Linear(40, 8)
        self.head = nn.Linear(8, 37)

    def forward(self, x):
        h = self.tokens(x)
        return self.head(torch.tanh(self.narrow(h + self.down(F.relu(self.up(self.norm(h)))))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


PROJECTED = {"tokens.weight", "up.weight", "down.weight"}
TASKS = {"a": (1, 2), "b": (3, 4)}


def measure(kit, model, projection, batches=3, **options):
    given = [kit.make_batch(10 + seed, 4, 9, ids=[0, 1, 2, 1]) for seed in range(batches)]
    tasks = {name: [kit.make_batch(seed, 3, 9) for seed in seeds] for name, seeds in TASKS.items()}
    options = {"preconditioner": "identity", "projection": projection, **options}
    return kit.measure(model, tasks, given, 3, **options), tasks, given


def gradients(kit, model, loss_batches):
    """Mean gradient per target token over the batches, by autograd."""
    total, tokens = 0, 0
    for batch, rows in loss_batches:
        losses = kit.token_losses(model, batch.x[rows], batch.labels[rows])
        found = torch.autograd.grad(losses.sum(), list(model.parameters()))
        total = [a + b.double() for a, b in zip(total or [0] * len(found), found, strict=True)]
        tokens += int(shifted_mask(batch.labels[rows]).sum())
    return {name: each / tokens for (name, _), each in zip(model.named_parameters(), total, strict=True)}


def truth(kit, model, tasks, given, layers):
    """Influence from whole gradients, those of ``layers`` written out as P_out G P_in^T first."""

    def seen(found):
        flat = []
        for name, each in found.items():
            if name in layers:
                output, input = layers[name].matrices(torch.float64)
                each = output @ each @ input.T
            flat.append(each.flatten())
        return torch.cat(flat)

    queries = [seen(gradients(kit, model, [(batch, slice(None)) for batch in batches])) for batches in tasks.values()]
    domains = [seen(gradients(kit, model, [(batch, batch.ids == j) for batch in given])) for j in range(3)]
    values = torch.stack(queries) @ torch.stack(domains).T
    scale = torch.stack(queries).norm(dim=1)[:, None] * torch.stack(domains).norm(dim=1)
    return values.numpy(), scale.numpy()


@pytest.mark.parametrize("kind", ["countsketch", "rademacher", "gaussian"])
def test_values_are_those_of_projected_gradients(kit, model, kind):
    projection = Projection(dim=32, kind=kind, seed=5)
    engine, tasks, given = measure(kit, model, projection)
    layers = projection.layers(model, engine.parameters())
    assert set(layers) == PROJECTED
    values, scale = truth(kit, model, tasks, given, layers)
    assert (np.abs(engine.matrix().values - values) / scale).max() < 1e-6


def test_nothing_changes_where_weights_are_small(kit, model):
    exact, _, _ = measure(kit, model, None)
    projected, _, _ = measure(kit, model, Projection(dim=64))
    assert (exact.matrix().values == projected.matrix().values).all()
    assert (projected.matrix().stderr_projection == 0).all()
    assert exact.matrix().stderr_projection is None


def test_the_error_is_told(kit, model):
    exact, _, _ = measure(kit, model, None)
    found = [measure(kit, model, Projection(dim=32, kind="rademacher", seed=s))[0].matrix() for s in range(24)]
    errors = np.stack([matrix.values - exact.matrix().values for matrix in found])
    variances = np.stack([matrix.stderr_projection**2 for matrix in found])
    spread = errors.std(0)
    assert (np.abs(errors.mean(0)) < 4 * spread / np.sqrt(len(found))).all(), "no bias"
    assert 0.5 < variances.mean() / (errors**2).mean() < 2
    matrix = found[0]
    parts = matrix.stderr_domain**2 + matrix.stderr_task**2 + matrix.stderr_projection**2
    assert (matrix.stderr**2 <= parts * (1 + 1e-12)).all()
    assert (matrix.stderr > matrix.stderr_projection).all()


def test_gradients_are_bit_identical(kit, model):
    _, _, given = measure(kit, model, Projection(dim=16), batches=1)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    kit.mean_loss(model, given[0]).backward()
    for name in PROJECTED:
        assert torch.equal(found[name], model.get_parameter(name).grad)


def test_queries_are_small(kit, model):
    engine, _, _ = measure(kit, model, Projection(dim=16))
    assert engine._session._queries.store["up.weight"].shape == (4, 16, 16)
    assert not {name for name, _ in engine._session._queries.store._packed} & PROJECTED


def test_tables_may_stay_exact(kit, model):
    """A table's share of S is then what it is without projection, and no error is told for it."""
    exact, _, _ = measure(kit, model, None, exclude=("[!t]*",))
    kept, _, _ = measure(kit, model, Projection(dim=16, tables=False), exclude=("[!t]*",))
    np.testing.assert_array_equal(kept.matrix().values, exact.matrix().values)
    assert (kept.matrix().stderr_projection == 0).all()
    model.up.weight = model.tokens.weight  # tied: as the table it is, not as the weight
    assert set(Projection(dim=16, tables=False).layers(model, dict(model.named_parameters()))) == {"down.weight"}


def test_verify(kit, model):
    engine, _, given = measure(kit, model, Projection(dim=16))
    batch = given[0]
    result = engine.verify(lambda m, b: kit.token_losses(m, *b).sum(1), (batch.x, batch.labels), batch.ids)
    assert result.max_error < 1e-6


def test_conservation_holds_for_projected_weights(kit, model):
    measure(kit, model, Projection(dim=16))
    hook = model.up.weight.register_hook(lambda gradient: gradient * 1.1)
    # A hook acts on the tasks' gradients too; what it does to the domains' is what is found.
    with pytest.raises(ConservationError, match=r"up\.weight"):
        measure(kit, model, Projection(dim=16))
    hook.remove()


def test_refreshes_add_up_and_states_go_on(kit, model):
    engine, tasks, given = measure(kit, model, Projection(dim=16))
    first = engine.matrix()
    engine.refresh()
    np.testing.assert_allclose(engine.matrix().stderr_projection, first.stderr_projection)

    def again(engine):
        for name, batches in tasks.items():
            for batch in batches:
                with engine.task(name, mask=shifted_mask(batch.labels)):
                    kit.mean_loss(model, batch).backward()
        for batch in given:
            with engine.domains(batch.ids, mask=shifted_mask(batch.labels)):
                kit.mean_loss(model, batch).backward()
        return engine.matrix()

    resumed = InfluenceEngine(
        model, ["d0", "d1", "d2"], ["a", "b"], "identity", projection=Projection(dim=16), batch_dim=0
    )
    resumed.load_state_dict(json.loads(json.dumps(engine.state_dict())))
    second = again(engine)
    assert (second.values != first.values).all(), "matrices are drawn anew"
    # The same data twice: the sum's variance is that of both rounds, over twice the tokens.
    ratio = second.stderr_projection / first.stderr_projection
    assert (ratio > 0.5).all()
    assert (ratio < 1).any()
    np.testing.assert_array_equal(again(resumed).values, second.values)
    np.testing.assert_array_equal(resumed.matrix().stderr_projection, second.stderr_projection)
    engine.reset()
    np.testing.assert_array_equal(again(engine).values, first.values)


def test_a_state_of_another_projection_is_refused(kit, model):
    engine, _, _ = measure(kit, model, Projection(dim=16))
    other, _, _ = measure(kit, model, Projection(dim=32))
    with pytest.raises(ValueError, match="projection"):
        other.load_state_dict(engine.state_dict())


def test_the_matrix_is_saved_whole(kit, model, tmp_path):
    matrix = measure(kit, model, Projection(dim=16))[0].matrix()
    again = InfluenceMatrix.load(matrix.save(tmp_path / "matrix.json"))
    np.testing.assert_array_equal(again.stderr_projection, matrix.stderr_projection)
    assert again.settings["projection"]["dim"] == 16


class Tables(nn.Module):
    """A table tied to its head, padding in it, positions looked up once, a weight used as it is and derived."""

    def __init__(self, head):
        super().__init__()
        self.tokens = nn.Embedding(37, 40, padding_idx=3)
        self.positions = nn.Embedding(24, 40)
        self.up = nn.Linear(40, 40, bias=False)
        self.head = head

    def forward(self, x):
        where = torch.arange(x.shape[1])[None]
        h = self.tokens(x) + 0.5 * self.positions(where).to(torch.float32)
        h = h + torch.tanh(self.up(h)) * self.up.weight[0]
        h = h + torch.tanh(h @ (self.up.weight.t() * 2))
        return self.head(self, h)


HEADS = {
    "product": lambda model, h: F.linear(h, model.tokens.weight),
    "transposed": lambda model, h: h @ model.tokens.weight.t(),
}


@pytest.mark.parametrize("ids", [[0, 1, 2, 1], [2, 2, 2, 2], "positions"], ids=["sequences", "single", "positions"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["countsketch", "gaussian"])
def test_tables_and_derived_weights_are_projected_in_all_their_uses(kit, head, ids, kind):
    torch.manual_seed(2)
    model = Tables(HEADS[head])
    projection = Projection(dim=16, kind=kind)
    if ids == "positions":
        ids = torch.randint(0, 3, (4, 9), generator=torch.Generator().manual_seed(0))
    batches = [kit.make_batch(10 + seed, 4, 9, ids=ids, masked=0.2) for seed in range(2)]
    tasks = {name: [kit.make_batch(seed, 3, 9) for seed in seeds] for name, seeds in TASKS.items()}
    engine = kit.measure(model, tasks, batches, 3, preconditioner="identity", projection=projection)
    layers = projection.layers(model, engine.parameters())
    assert set(layers) == {"tokens.weight", "positions.weight", "up.weight"}
    values, lengths, tokens = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3), torch.zeros(3)
    queries = engine._session._queries.by_task(2)
    for domain in range(3):
        total = dict.fromkeys(queries, torch.zeros(()))
        for batch in batches:
            losses = kit.token_losses(model, batch.x, batch.labels)
            mine = batch.ids.reshape(4, -1).expand(4, 9) == domain
            tokens[domain] += (shifted_mask(batch.labels) & mine).sum()
            found = torch.autograd.grad(losses[mine].sum(), list(engine.parameters().values()), materialize_grads=True)
            total = {name: total[name] + each for name, each in zip(total, found, strict=True)}
        for name, layer in layers.items():
            total[name] = layer.project(total[name])
            # What the error bar is made of.
            assert (engine._session._projected.gradients[name][domain] - total[name]).norm() <= 1e-5 * total[
                name
            ].norm()
        for name, each in total.items():
            values[:, domain] += (queries[name].double() * each).flatten(1).sum(1)
            lengths[domain] += each.square().sum()
    scale = torch.stack([each.flatten(1).square().sum(1) for each in queries.values()]).sum(0)[:, None] * lengths
    errors = (torch.as_tensor(engine.matrix().values) - values / tokens).abs() / (scale.sqrt() / tokens)
    assert errors[:, tokens > 0].max() < 1e-6


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dim": 1}, "dim must be an int of at least 2; got 1"),
        ({"dim": 64.0}, "dim"),
        ({"dim": 48}, "dim must be a power of two"),
        ({"kind": "srht"}, "kind must be one of"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_projections(options, match):
    with pytest.raises(ValueError, match=match):
        Projection(**options)


def test_a_projection_must_be_one(model):
    with pytest.raises(TypeError, match=r"tikmix_fast\.Projection"):
        InfluenceEngine(model, ["x"], ["a"], projection=64)
