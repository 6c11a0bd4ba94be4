"""Ways to get a wrong number without noticing, found by trying: each is exact now, or an error that says what to do."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tikmix_fast import InfluenceEngine, shifted_mask
from tikmix_fast.influence.capture.rows import RowShapeError
from tikmix_fast.influence.capture.views import ParameterView, UncapturedParameterError
from tikmix_fast.influence.passes.conservation import ConservationError

TOLERANCE = 1e-5


def engine_for(model, **options):
    return InfluenceEngine(model, domains=["x", "y"], tasks=["a"], **{"preconditioner": "identity", **options})


def run_task(kit, engine, seed=1):
    batch = kit.make_batch(seed, 3, 8)
    with engine.task("a", mask=shifted_mask(batch.labels)):
        kit.mean_loss(engine.model, batch).backward()


def run_domains(kit, engine, seed=2, ids=(0, 1, 1), **options):
    batch = kit.make_batch(seed, len(ids), 8)
    with engine.domains(torch.tensor(ids), mask=shifted_mask(batch.labels), **options):
        kit.mean_loss(engine.model, batch).backward()


@pytest.mark.parametrize("how", ["fused", "foreach", "data", "swap"])
def test_any_change_of_weights_is_seen(kit, how):
    model = kit.make_model("attentive")
    options = {how: True} if how in ("fused", "foreach") else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **options)
    engine = engine_for(model)
    run_task(kit, engine)
    run_domains(kit, engine)
    if how == "data":
        model.out.bias.data.add_(1e-3)
    elif how == "swap":
        model.out.bias.data = model.out.bias.data + 1e-3
    else:
        optimizer.step()
    with pytest.raises(RuntimeError, match="weights changed since"):
        run_domains(kit, engine)
    engine.refresh()
    run_task(kit, engine)
    batch = kit.make_batch(2, 3, 8)

    def step():
        kit.mean_loss(model, batch).backward()
        optimizer.step()

    with pytest.raises(RuntimeError, match="weights changed inside domains"), engine.domains([0, 1, 1]):
        step()


class Constants(nn.Module):
    """Fixed encodings that go through parameters before they meet the batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(37, 8)
        self.register_buffer("places", torch.randn(30, 8))
        self.alpha = nn.Parameter(torch.randn(8))
        self.layer = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.turn = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))
        self.head = nn.Linear(8, 37)
        with torch.no_grad():
            self.norm.weight.add_(torch.randn(8) / 3)

    def forward(self, x):
        places = self.places[: x.shape[1]]
        h = self.tokens(x) + self.alpha * places + torch.tanh(self.layer(places)) + self.norm(places)
        return self.head(self.turn(h))


@pytest.mark.parametrize("shape", [(6, 6), (3, 9), (4, 8), (4, 7)])
def test_constants_are_not_rows(kit, shape):
    rows, length = shape
    torch.manual_seed(0)
    model = Constants()
    tasks = {"a": [kit.make_batch(1, 3, 8)]}
    batches = [kit.make_batch(2, rows, length, ids=torch.arange(rows) % 2, masked=0.1)]
    engine = kit.measure(model, tasks, batches, 2, preconditioner="identity")
    assert kit.per_example_influence(model, tasks, batches, 2).error(engine.matrix().values) < TOLERANCE


class HeadBias(nn.Module):
    """A relative bias for the scores of every head, handed to the attention as its mask."""

    def __init__(self, heads):
        super().__init__()
        torch.manual_seed(0)
        self.heads = heads
        self.tokens = nn.Embedding(37, 8 * heads)
        self.bias = nn.Embedding(64, heads)
        self.slope = nn.Parameter(torch.randn(heads, 1, 1))
        self.head = nn.Linear(8 * heads, 37)

    def forward(self, x):
        length = x.shape[1]
        h = self.tokens(x)
        parts = h.unflatten(-1, (self.heads, 8)).transpose(1, 2)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        scores = self.bias(distance + 30).permute(2, 0, 1) + self.slope * distance / 10
        mixed = F.scaled_dot_product_attention(parts, parts, parts, attn_mask=scores)
        return self.head(h + mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("heads", [4, 2])
def test_a_bias_of_heads_is_not_one_of_sequences(kit, heads):
    model, tasks = HeadBias(heads), {"a": [kit.make_batch(1, 3, 8)]}
    batches = [kit.make_batch(2, 4, 9, ids=[0, 1, 1, 0])]
    engine = kit.measure(model, tasks, batches, 2, preconditioner="identity")
    assert kit.per_example_influence(model, tasks, batches, 2).error(engine.matrix().values) < TOLERANCE


def backwards(flat):
    return torch.arange(len(flat)).flip(0)


# Ways to move flat rows [B * S, C] that leave their shape alone, with something ordinary behind.
MOVED = {
    "times": lambda h, flat: flat[backwards(flat)] * 1.5,
    "activated": lambda h, flat: flat[backwards(flat)].relu(),
    "normed": lambda h, flat: F.layer_norm(flat[backwards(flat)], (8,)),
    "added": lambda h, flat: flat + flat.index_select(0, backwards(flat)),
    "weighed": lambda h, flat: flat[backwards(flat)] * flat.softmax(-1)[:, :1],
    "through frozen weights": lambda h, flat: flat[backwards(flat)] @ torch.eye(8),
    "as features and back": lambda h, flat: flat[backwards(flat)].view(-1, 2, 4).flatten(1),
    "flipped": lambda h, flat: flat.flip(0),
    "flipped, counted from the end": lambda h, flat: flat.flip(-2),
    "selected, counted from the end": lambda h, flat: flat.index_select(-2, backwards(flat)),
    "rolled": lambda h, flat: flat.roll(1, 0),
    "gathered": lambda h, flat: flat.gather(0, backwards(flat)[:, None].expand_as(flat)) + 1,
    "scattered": lambda h, flat: torch.zeros_like(flat).index_copy(0, backwards(flat), flat),
    "pieces": lambda h, flat: torch.cat([flat[3:], flat[:3]]) * 2,
    "positions": lambda h, flat: torch.cat(list(h.unbind(1))),
    "stacked": lambda h, flat: torch.stack(list(flat.unbind(0))[::-1]),
    "later rows": lambda h, flat: torch.cat([flat, flat])[3 : 3 + len(flat)],
}


class Gathered(nn.Module):
    """Rows picked by an index, as a mixture of experts routes them, or flattened time first."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.tokens, self.expert, self.head = nn.Embedding(37, 8), nn.Linear(8, 8), nn.Linear(8, 37)

    def forward(self, x):
        h = self.tokens(x)
        if self.how == "time first":
            return self.head(h.transpose(0, 1).reshape(-1, 8)).unflatten(0, x.T.shape).transpose(0, 1)
        flat = h.reshape(-1, 8)
        if self.how in MOVED:
            moved = MOVED[self.how](h, flat)
            return self.head(torch.zeros_like(flat).index_add(0, backwards(flat), self.expert(moved)).view_as(h))
        if self.how == "met by a bias":
            return self.head((flat[backwards(flat)] + self.expert.bias)[backwards(flat)].view_as(h))
        chosen = backwards(flat)[: len(flat) if self.how == "all" else len(x)]
        routed = torch.zeros_like(flat).index_copy(0, chosen, self.expert(flat[chosen]))
        return self.head(h + routed.view_as(h))


@pytest.mark.parametrize("how", ["all", "as many as sequences", "time first", "met by a bias", *MOVED])
def test_gathered_rows_are_refused_in_a_mixed_batch(kit, how):
    engine = engine_for(Gathered(how))
    run_task(kit, engine)
    with pytest.raises(RowShapeError, match=r"gathered|do not match"):
        run_domains(kit, engine)


class FlatInOrder(nn.Module):
    """A model that works on [B * S, C] throughout, with everything that moves features and leaves rows alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head = nn.Embedding(37, 8), nn.Linear(8, 37)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.norm, self.bias = nn.LayerNorm(8), nn.Parameter(torch.randn(8))

    def forward(self, x):
        flat = self.tokens(x).flatten(0, 1)
        for layer in self.layers:
            turned = torch.cat([-flat[:, 4:], flat[:, :4]], -1) + flat.flip(-1) + flat.roll(1, 1)
            heads = flat.view(-1, 2, 4).softmax(1).flatten(1)
            best = flat.gather(1, flat.topk(2, -1).indices)[:, :1] * flat[:, [1, 0, 2, 3, 4, 5, 6, 7]]
            parts = torch.stack(flat.chunk(2, -1), 1).transpose(1, 2).reshape(len(flat), 8)
            flat = flat + layer(self.norm(turned + heads + best + parts) + self.bias)
        return self.head(flat).view(*x.shape, -1)


def test_flat_rows_in_order_are_exact(kit):
    model, tasks = FlatInOrder(), {"a": [kit.make_batch(1, 3, 8)]}
    batches = [kit.make_batch(2, 4, 9, ids=[0, 1, 1, 0])]
    engine = kit.measure(model, tasks, batches, 2, preconditioner="identity")
    assert kit.per_example_influence(model, tasks, batches, 2).error(engine.matrix().values) < TOLERANCE


@pytest.mark.parametrize("how", ["all", "times", "flipped"])
def test_gathered_rows_are_exact_in_a_batch_of_one_domain(kit, how):
    model, tasks = Gathered(how), {"a": [kit.make_batch(1, 3, 8)]}
    batches = [kit.make_batch(2, 4, 9, ids=[1, 1, 1, 1]), kit.make_batch(3, 4, 9, ids=[0, 0, 0, 0])]
    engine = kit.measure(model, tasks, batches, 2, preconditioner="identity")
    assert kit.per_example_influence(model, tasks, batches, 2).error(engine.matrix().values) < TOLERANCE


def test_as_many_sequences_as_positions_must_be_told(kit):
    engine = engine_for(kit.make_model("attentive"))
    run_task(kit, engine)
    batch = kit.make_batch(2, 6, 6)
    with pytest.raises(RowShapeError, match="batch_dim=0"), engine.domains([0, 1] * 3, mask=shifted_mask(batch.labels)):
        kit.mean_loss(engine.model, batch).backward()
    with engine.domains("x", mask=shifted_mask(batch.labels)):
        kit.mean_loss(engine.model, batch).backward()


@pytest.mark.parametrize(
    ("scale", "options", "divided"),
    [
        (24.0, {}, None),
        (0.25, {}, None),
        (0.25, {"normalizer": 4 * 21}, 21),
        (1024.0, {}, None),
        (21.0, {"normalizer": 1}, 21),
    ],
)
def test_the_backward_tells_a_wrong_normalizer(kit, scale, options, divided):
    """A sum passed for a mean, a forgotten accumulation or scaler: the gradient at the cross-entropy knows."""
    engine = engine_for(kit.make_model("attentive"))
    batch = kit.make_batch(1, 3, 8)  # 21 target tokens
    mask = shifted_mask(batch.labels)

    def measure():
        with engine.task("a", mask=mask, **options):
            (scale * kit.mean_loss(engine.model, batch)).backward()

    if divided is None:
        with pytest.raises(ValueError, match=r"was divided by .*pass normalizer="):
            measure()
    else:
        measure()


def test_a_key_bias_has_no_gradient_and_no_conservation_error(kit):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(vocab_size=37, max_position_embeddings=32, **sizes)).eval()
    tasks, batches = {"a": [kit.make_batch(1, 3, 8)]}, [kit.make_batch(2, 4, 9, ids=[0, 1, 1, 0])]
    engine = kit.measure(model, tasks, batches, 2, preconditioner="identity")
    assert kit.per_example_influence(model, tasks, batches, 2).error(engine.matrix().values) < TOLERANCE


def test_accumulating_in_half_precision_is_no_conservation_error(kit):
    model = kit.make_model("attentive").bfloat16()
    engine = engine_for(model, check_every=1)
    run_task(kit, engine)
    for seed in range(30):
        run_domains(kit, engine, seed)
    assert engine.matrix().microbatches.tolist() == [30, 30]


def test_what_lies_in_p_grad_does_not_matter(kit):
    model = kit.make_model("attentive")
    engine = engine_for(model, check_every=1)
    run_task(kit, engine)
    model.out.bias.grad = torch.full_like(model.out.bias, float("nan"))
    run_domains(kit, engine)
    batch = kit.make_batch(2, 3, 8)
    with engine.domains([0, 1, 1], mask=shifted_mask(batch.labels)):
        model.zero_grad(set_to_none=True)
        kit.mean_loss(model, batch).backward()
    assert engine.matrix().microbatches.tolist() == [2, 2]


def test_a_hook_that_changes_a_gradient_is_a_conservation_error(kit):
    model = kit.make_model("attentive")
    engine = engine_for(model)
    run_task(kit, engine)
    model.out.weight.register_hook(lambda gradient: gradient * 0.5)
    with pytest.raises(ConservationError, match=r"'out\.weight'"):
        run_domains(kit, engine)


def test_refused_by_name(kit):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.vector = nn.Embedding(37, 8), nn.Parameter(torch.ones(8))

        def forward(self, x):
            return F.linear(self.tokens(x), self.vector)[..., None].expand(-1, -1, 37)

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.EmbeddingBag(37, 8), nn.Linear(8, 37)

        def forward(self, x):
            return self.head(self.table(x))[:, None].expand(-1, x.shape[1], -1)

    for model, match in ((Flat(), "'vector'.*linear"), (Bag(), r"'table\.weight'.*embedding_bag")):
        engine = engine_for(model)
        run_task(kit, engine)
        with pytest.raises(UncapturedParameterError, match=match):
            run_domains(kit, engine)
    wave = nn.Linear(4, 4, dtype=torch.complex64)
    with pytest.raises(TypeError, match="'weight' is complex"):
        engine_for(wave)


def test_autocast_leaves_float64_alone(kit):
    model = kit.make_model("gpt2").double()
    tasks, batches = {"a": [kit.make_batch(1, 3, 8)]}, [kit.make_batch(2, 4, 9, ids=[0, 1, 1, 0])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine = kit.measure(model, tasks, batches, 2, preconditioner="identity")
    assert kit.per_example_influence(model, tasks, batches, 2).error(engine.matrix().values) < 1e-9


def test_dtypes_that_do_not_fit_fail_as_ever(kit):
    model = nn.Sequential(nn.Embedding(37, 8).bfloat16(), nn.Linear(8, 37))
    engine = engine_for(model)
    with pytest.raises(RuntimeError, match="dtype"):
        run_task(kit, engine)


def test_queries_are_let_go(kit):
    """Neither a kept loss nor a view cached on a module keeps the queries once they are refreshed."""
    model = kit.make_model("attentive")

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            self.cached = self.inner.qkv.weight.t()
            return self.inner(x)

    outer = Keeps()
    engine = engine_for(outer)
    run_task(kit, engine)
    batch = kit.make_batch(2, 3, 8)
    with engine.domains([0, 1, 1], mask=shifted_mask(batch.labels)):
        loss = kit.mean_loss(outer, batch)
        loss.backward(retain_graph=True)
    assert isinstance(outer.cached, ParameterView)
    references = [weakref.ref(query) for query in engine._session._queries.store.values()]
    values = engine.matrix().values.copy()
    model.zero_grad()
    loss.backward()  # after the context: an ordinary backward that records nothing
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    kit.mean_loss(outer, batch).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7)
    assert (engine.matrix().values == values).all()
    engine.refresh()
    gc.collect()
    assert loss is not None
    assert not any(reference() is not None for reference in references)


def test_a_failed_first_task_does_not_bind_the_weights(kit):
    model = kit.make_model("attentive")
    engine = engine_for(model)
    with pytest.raises(KeyError), engine.task("a"):
        raise KeyError
    with torch.no_grad():
        model.out.bias.add_(1.0)
    run_task(kit, engine)
    run_domains(kit, engine)


def test_kinds_of_numbers(kit):
    engine = engine_for(kit.make_model("attentive"))
    batch = kit.make_batch(1, 3, 8)
    mask = shifted_mask(batch.labels)
    with pytest.raises(TypeError, match="normalizer must be a number; got str"), engine.task("a", normalizer="21"):
        pass
    with engine.task("a", mask=mask, normalizer=mask.sum()):
        kit.mean_loss(engine.model, batch).backward()
    with engine.domains(np.array([0, 1, 1]), mask=mask, normalizer=np.float32(21)):
        kit.mean_loss(engine.model, batch).backward()
    assert engine.matrix().tokens.tolist() == [7, 14]


def test_frozen_embeddings_with_a_hand_written_norm(kit):
    model = kit.make_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    tasks, batches = {"a": [kit.make_batch(1, 3, 8)]}, [kit.make_batch(2, 4, 9, ids=[1, 0, 1, 0])]
    engine = kit.measure(model, tasks, batches, 2, preconditioner="identity")
    trained = {name: torch.tensor(float(p.requires_grad)).expand(p.shape) for name, p in model.named_parameters()}
    model.requires_grad_(True)
    assert kit.per_example_influence(model, tasks, batches, 2, trained).error(engine.matrix().values) < TOLERANCE
