"""What may follow what, what is refused, and that nothing is left behind."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tikmix_fast import InfluenceEngine, ops, shifted_mask
from tikmix_fast.influence.capture.views import UncapturedParameterError
from tikmix_fast.influence.passes.conservation import ConservationError


def engine_for(model, **options):
    return InfluenceEngine(model, domains=["x", "y"], tasks=["a"], **{"preconditioner": "identity", **options})


def run_task(kit, engine, seed=1, name="a"):
    batch = kit.make_batch(seed, 3, 8)
    with engine.task(name, mask=shifted_mask(batch.labels)):
        kit.mean_loss(engine.model, batch).backward()


def run_domains(kit, engine, seed=2, ids=(0, 1, 1), **options):
    batch = kit.make_batch(seed, len(ids), 8)
    with engine.domains(torch.tensor(ids), mask=shifted_mask(batch.labels), **options):
        kit.mean_loss(engine.model, batch).backward()


@pytest.fixture
def model(kit):
    return kit.make_model("attentive")


def state_of(model):
    return {id(module): set(vars(module)) for module in model.modules()}, list(model.state_dict())


@pytest.mark.parametrize("fails", ["before forward", "after forward", "in backward"])
def test_nothing_is_left_behind(kit, model, fails):
    before = state_of(model)
    cross_entropy = torch.nn.functional.cross_entropy
    engine = engine_for(model)
    run_task(kit, engine)
    run_domains(kit, engine)
    values = engine.matrix().values.copy()

    def fail(*_):
        raise KeyError("mine")

    def body():
        if fails == "before forward":
            fail()
        loss = kit.mean_loss(model, kit.make_batch(3, 3, 8))
        if fails == "after forward":
            fail()
        loss.register_hook(fail)
        loss.backward()

    for kind in ("domains", "task"):
        engine.refresh()
        if kind == "domains":
            run_task(kit, engine)
        with (
            pytest.raises(KeyError, match="mine"),
            engine.domains([0, 1, 1]) if kind == "domains" else engine.task("a"),
        ):
            body()
        assert state_of(model) == before
        assert torch.nn.functional.cross_entropy is cross_entropy
        assert (engine.matrix().values == values).all(), "a failed pass must not count"
    # The engine still works afterwards, and the model runs and trains as ever.
    engine.refresh()
    run_task(kit, engine)
    run_domains(kit, engine)
    assert engine.matrix().microbatches.tolist() == [2, 2]


def test_tasks_come_first(kit, model):
    engine = InfluenceEngine(model, ["x"], ["a", "b"], preconditioner="identity")
    run_task(kit, engine)
    with pytest.raises(RuntimeError, match=r"tasks come first.*'b'"), engine.domains("x"):
        pass


def test_no_task_after_the_queries_froze(kit, model):
    engine = engine_for(model)
    run_task(kit, engine)
    run_domains(kit, engine)
    with pytest.raises(RuntimeError, match="refresh"), engine.task("a"):
        pass
    engine.refresh()
    run_task(kit, engine)


@pytest.mark.parametrize("when", ["between tasks", "before domains", "between domains"])
def test_weights_must_stay(kit, model, when):
    engine = engine_for(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run_task(kit, engine)
    if when == "between domains":
        run_domains(kit, engine)
    kit.mean_loss(model, kit.make_batch(3, 3, 8)).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="weights changed"):
        run_task(kit, engine) if when == "between tasks" else run_domains(kit, engine)


def test_stale_weights_may_be_allowed(kit, model):
    engine = engine_for(model, allow_stale=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run_task(kit, engine)
    run_domains(kit, engine)
    kit.mean_loss(model, kit.make_batch(3, 3, 8)).backward()
    optimizer.step()
    run_domains(kit, engine)
    assert engine.matrix().microbatches.tolist() == [2, 2]


def test_an_optimizer_that_steps_in_the_backward_is_refused(kit, model):
    engine = engine_for(model)
    run_task(kit, engine)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = model.qkv.weight.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    with pytest.raises(RuntimeError, match=r"'qkv.weight' has a post-accumulate-grad hook"), engine.domains("x"):
        pass
    handle.remove()
    model.qkv.bias.register_hook(lambda gradient: optimizer.step())
    model.out.bias.grad = torch.ones_like(model.out.bias)
    with pytest.raises(RuntimeError, match="weights changed inside"):
        run_domains(kit, engine)


def test_refresh_keeps_and_reset_forgets(kit, model):
    engine = engine_for(model)
    run_task(kit, engine)
    run_domains(kit, engine, seed=2)
    run_domains(kit, engine, seed=3)
    one = engine.matrix()
    engine.refresh()
    run_task(kit, engine)
    run_domains(kit, engine, seed=4)
    assert engine.matrix().microbatches.tolist() == [3, 3]
    engine.reset()
    assert engine.matrix().tokens.tolist() == [0, 0]
    run_task(kit, engine)
    run_domains(kit, engine, seed=2)
    run_domains(kit, engine, seed=3)
    assert (engine.matrix().values == one.values).all()


def test_queries_are_packed_once_a_refresh(kit, model, monkeypatch):
    packed = []
    original = ops.pack_queries
    monkeypatch.setattr(ops, "pack_queries", lambda queries: packed.append(queries.shape) or original(queries))
    engine = engine_for(model)
    for refreshes in (1, 2):
        run_task(kit, engine)
        for seed in (2, 3, 4):
            run_domains(kit, engine, seed)
        # The head is the table transposed: its queries are carried there each time.
        assert packed == refreshes * [(1, *model.out.weight.shape), (1, *model.qkv.weight.shape)]
        engine.refresh()


def test_state_round_trip(kit, model):
    engine = engine_for(model, task_splits=2)
    for seed in (1, 2, 3):
        run_task(kit, engine, seed)
    for seed in (4, 5):
        run_domains(kit, engine, seed)
    state = json.loads(json.dumps(engine.state_dict()))
    other = engine_for(model, task_splits=2)
    other.load_state_dict(state)
    for name in ("values", "stderr", "stderr_task", "dof", "tokens"):
        assert (getattr(other.matrix(), name) == getattr(engine.matrix(), name)).all(), name
    for each in (engine, other):
        each.refresh()
        for seed in (6, 7):
            run_task(kit, each, seed)
        for seed in (8, 9):
            run_domains(kit, each, seed)
    assert (other.matrix().values == engine.matrix().values).all()
    assert (other.matrix().stderr == engine.matrix().stderr).all()


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": ["b"]},
        {"domains": ["y", "x"]},
        {"version": 2},
        {"format": "x"},
        {"preconditioner": "adam"},
        {"estimator": {}},
        {"estimator": None},
        {"dropped": None},
    ],
)
def test_foreign_state_changes_nothing(kit, model, change):
    engine = engine_for(model)
    run_task(kit, engine)
    run_domains(kit, engine)
    before = engine.state_dict()
    with pytest.raises(ValueError, match="state"):
        engine.load_state_dict({**before, **change})
    assert engine.state_dict() == before


def test_contexts_do_not_nest(kit, model):
    engine = engine_for(model)
    run_task(kit, engine)
    with pytest.raises(RuntimeError, match="another context"), engine.domains("x"), engine.domains("y"):
        pass
    with pytest.raises(RuntimeError, match="another context"), engine.domains("x"):
        engine.refresh()


@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [
        ("w", ValueError, "unknown domain 'w'; the domains are x, y"),
        (2, ValueError, r"0 ... 1; got 2"),
        (-1, ValueError, r"0 ... 1; got -1"),
        (True, TypeError, "ids must be"),
        (None, TypeError, "ids must be"),
        (1.5, TypeError, "ids must be"),
        (torch.tensor([0.0, 1.0]), TypeError, "float32"),
        (torch.tensor([0, 2]), ValueError, "from 0 to 2"),
        (torch.tensor([0, -1]), ValueError, "from -1 to 0"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), ValueError, r"\[B\] or \[B, S\]"),
        (torch.zeros(0, dtype=torch.int64), ValueError, "empty"),
        (["x", "w"], ValueError, "unknown domain 'w'"),
    ],
)
def test_bad_ids(kit, model, ids, error, match):
    engine = engine_for(model)
    run_task(kit, engine)
    with pytest.raises(error, match=match), engine.domains(ids):
        pass


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        (torch.ones(3, 8), TypeError, "float32"),
        (torch.ones(2, 8, dtype=torch.bool), ValueError, r"\[B, S\]"),
        (5, ValueError, "bool tensor if a batch mixes"),
        (-1, ValueError, "negative"),
        ("all", TypeError, "str"),
    ],
)
def test_bad_masks(kit, model, mask, error, match):
    engine = engine_for(model)
    run_task(kit, engine)
    with pytest.raises(error, match=match), engine.domains(torch.tensor([0, 1, 1]), mask=mask):
        pass


def test_ids_that_do_not_fit_the_batch(kit, model):
    engine = engine_for(model)
    run_task(kit, engine)
    batch = kit.make_batch(2, 3, 8)
    with pytest.raises(ValueError, match="do not match the ids"), engine.domains(torch.tensor([0, 1, 1, 0])):
        kit.mean_loss(model, batch).backward()


def test_a_wrong_mask_is_caught_by_the_cross_entropy(kit, model):
    engine = engine_for(model)
    batch = kit.make_batch(1, 3, 8, masked=0.3)
    with pytest.raises(ValueError, match="shifted_mask"), engine.task("a"):
        kit.mean_loss(model, batch).backward()
    with pytest.raises(ValueError, match="the mask counts"), engine.task("a", mask=batch.labels != -100):
        kit.mean_loss(model, batch).backward()
    with pytest.raises(ValueError, match="no target token"), engine.task("a", mask=0):
        (model(batch.x) * 0.0).sum().backward()


def test_no_backward_inside(kit, model):
    engine = engine_for(model)
    with pytest.raises(RuntimeError, match="no gradient reached"), engine.task("a"):
        model(kit.make_batch(1, 2, 8).x)
    run_task(kit, engine)
    with pytest.raises(RuntimeError, match="no gradient reached"), engine.domains("x"):
        model(kit.make_batch(1, 2, 8).x)


def test_not_finite(kit, model):
    engine = engine_for(model, max_dropped_in_row=3)
    batch = kit.make_batch(1, 3, 8)
    mask = shifted_mask(batch.labels)
    with pytest.raises(FloatingPointError, match="task 'a'"), engine.task("a", mask=mask):
        (kit.mean_loss(model, batch) * float("nan")).backward()
    run_task(kit, engine)
    run_domains(kit, engine)
    values = engine.matrix().values.copy()
    with pytest.raises(FloatingPointError, match="micro-batch"), engine.domains("x", mask=mask):
        (kit.mean_loss(model, batch) * float("inf")).backward()
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(2):
        with engine.domains("x", mask=mask, scaler=scaler):
            (kit.mean_loss(model, batch) * float("inf")).backward()
    assert engine.dropped == 2
    assert engine.matrix().dropped == 2
    assert (engine.matrix().values == values).all()
    with pytest.raises(FloatingPointError, match="in a row"), engine.domains("x", mask=mask, scaler=scaler):
        (kit.mean_loss(model, batch) * float("inf")).backward()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"domains": []}, "domains"),
        ({"domains": "web"}, "domains"),
        ({"domains": ["x", "x"]}, "unique"),
        ({"tasks": ["a", ""]}, "tasks"),
        ({"preconditioner": "newton"}, r"adam.*newton"),
        ({"reduction": "max"}, r"mean.*max"),
        ({"grad": "no"}, "fused"),
        ({"exclude": ["nothing.*"]}, "matches no trainable parameter"),
        ({"exclude": "*"}, "not excluded"),
        ({"task_splits": 0}, "task_splits"),
        ({"batch_dim": 2}, "batch_dim"),
    ],
)
def test_bad_options(model, options, match):
    with pytest.raises(ValueError, match=match):
        InfluenceEngine(model, **{"domains": ["x"], "tasks": ["a"], **options})


def test_bad_types(model):
    with pytest.raises(TypeError, match=r"nn\.Module"):
        InfluenceEngine(lambda x: x, ["x"], ["a"])
    with pytest.raises(TypeError, match="preconditioner"):
        InfluenceEngine(model, ["x"], ["a"], preconditioner=3)
    engine = engine_for(model)
    with pytest.raises(ValueError, match="unknown task 'b'; the tasks are a"), engine.task("b"):
        pass
    for normalizer in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="normalizer"), engine.task("a", normalizer=normalizer):
            pass
    with pytest.raises(TypeError, match="GradScaler"), engine.task("a", scaler=3):
        pass


class Hidden(nn.Module):
    """A tied weight whose second use goes through a reference kept outside the modules."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(37, 8)
        self.norm = nn.LayerNorm(8)
        self.elsewhere = [self.tokens.weight]

    def forward(self, x):
        return self.norm(self.tokens(x)) @ self.elsewhere[0].T


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(37, 8)
        self.cell = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 37)

    def forward(self, x):
        return self.head(self.cell(self.tokens(x))[0])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(37, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 37)

    def forward(self, x):
        h = self.tokens(x)
        return self.head(self.attention(h, h, h, need_weights=False)[0])


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(37, 8)
        self.mix = nn.Conv1d(8, 37, 1)

    def forward(self, x):
        return self.mix(self.tokens(x).transpose(1, 2)).transpose(1, 2)


class OwnKernel(nn.Module):
    """A weight handed to somebody's autograd function, as fused losses do."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h, weight):
            ctx.save_for_backward(h, weight)
            return h @ weight.T

        @staticmethod
        def backward(ctx, gradient):
            h, weight = ctx.saved_tensors
            return gradient @ weight, gradient.flatten(0, 1).T @ h.flatten(0, 1)

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(37, 8)
        self.head = nn.Linear(8, 37, bias=False)

    def forward(self, x):
        return self.Product.apply(self.tokens(x), self.head.weight)


class DroppedPositions(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(37, 8), nn.Embedding(20, 8), nn.Linear(8, 37)

    def forward(self, x):
        positions = nn.functional.dropout(self.positions(torch.arange(x.shape[1])), 0.1, training=True)
        return self.head(self.tokens(x) + positions)


@pytest.mark.parametrize(
    ("kind", "error", "match"),
    [
        (Hidden, ConservationError, "'tokens.weight'"),
        (Recurrent, UncapturedParameterError, r"'cell.weight_ih_l0'.*exclude"),
        (Attention, UncapturedParameterError, r"attention.*multi_head_attention_forward.*exclude"),
        (Convolution, UncapturedParameterError, r"'mix.weight'.*conv1d"),
        (OwnKernel, UncapturedParameterError, "'head.weight'"),
        (DroppedPositions, UncapturedParameterError, r"positions.*dropout"),
    ],
)
def test_what_is_not_captured_is_refused_by_name(kit, kind, error, match):
    torch.manual_seed(0)
    engine = engine_for(kind())
    run_task(kit, engine)
    with pytest.raises(error, match=match):
        run_domains(kit, engine)
    assert engine.matrix().tokens.tolist() == [0, 0]


def test_what_is_not_captured_can_be_excluded(kit):
    torch.manual_seed(0)
    engine = engine_for(Recurrent(), exclude=["cell.*"])
    run_task(kit, engine)
    run_domains(kit, engine)
    assert "excluded: cell.weight_ih_l0" in str(engine.coverage())


def test_coverage_is_said_once_and_loudly(kit, model, caplog):
    engine = engine_for(model, exclude=["norm.*"])
    assert "no gradient seen" in str(engine.coverage())
    run_task(kit, engine)
    with caplog.at_level("WARNING", logger="tikmix_fast"):
        run_domains(kit, engine)
        run_domains(kit, engine)
    lines = [record.message for record in caplog.records if "influence covers" in record.message]
    assert len(lines) == 1
    assert "excluded: norm.weight, norm.bias" in lines[0]


def test_reset_forgets_what_was_captured(kit, model):
    engine = engine_for(model)
    run_task(kit, engine)
    run_domains(kit, engine)
    assert engine.coverage().share == 1
    engine.reset()
    assert engine.coverage().share == 0


def test_conservation_is_checked_again_after_a_reset(kit, model):
    """A hook that changes a gradient is seen in the first pass, and again in the first one after reset."""
    engine = engine_for(model)
    run_task(kit, engine)
    run_domains(kit, engine)
    engine.reset()
    run_task(kit, engine)
    handle = model.qkv.weight.register_hook(lambda gradient: 2 * gradient)
    with pytest.raises(ConservationError, match=r"qkv\.weight"):
        run_domains(kit, engine)
    handle.remove()


def test_getters_leave_the_model_alone(kit, model, monkeypatch):
    """fully_shard's parameters may be whole when a getter is called; only a pass that begins makes them parts again."""
    from tikmix_fast.influence.passes import covered_parameters as covered

    engine = engine_for(model)
    run_task(kit, engine)
    run_domains(kit, engine)
    monkeypatch.setattr(covered, "reshard", lambda _: pytest.fail("a getter changed the model"))
    engine.parameters(), engine.coverage(), engine.matrix(), engine.memory_estimate(), engine.state_dict()
    with pytest.raises(pytest.fail.Exception):
        run_domains(kit, engine)
