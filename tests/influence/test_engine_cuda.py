"""The engine on a GPU: mixed precision, checkpointing, queries in host memory, no waiting, streams, memory."""

from __future__ import annotations

import copy
import gc
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from tikmix_fast import InfluenceEngine, Projection, ops, shifted_mask
from tikmix_fast.influence.queries import offload

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

VOCABULARY = 37
DEVICE = "cuda:0"
IDS = [1, 0, 1, 0, 0, 0, 1, 1]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width, bias=False)

    def forward(self, h):
        heads = [part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(h)).chunk(3, dim=-1)]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.mlp_norm(h))))


class Decoder(nn.Module):
    """A small decoder with a tied head; ``again`` computes blocks once more in the backward."""

    def __init__(self, width=32, layers=2, vocabulary=VOCABULARY, again=None):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(32, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self.again = again

    def forward(self, x):
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h) if self.again is None else checkpoint(block, h, use_reentrant=self.again == "reentrant")
        return self.head(self.norm(h))


def make_model(**options):
    torch.manual_seed(1)
    model = Decoder(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def mean_loss(model, batch):
    """Without the two-dimensional kernel of the cross-entropy, whose sums come in any order."""
    logits, targets = model(batch.x)[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()
    return F.cross_entropy(logits, targets)


def on_gpu(batch):
    return batch._replace(x=batch.x.to(DEVICE), labels=batch.labels.to(DEVICE))


@pytest.fixture
def batches(kit):
    return [on_gpu(kit.make_batch(seed, 8, 16, ids=IDS)) for seed in (2, 3, 4)]


@pytest.fixture
def tasks(kit):
    return {name: [on_gpu(kit.make_batch(seed + s, 8, 16)) for s in (0, 1)] for name, seed in (("a", 10), ("b", 20))}


def measure(model, tasks, batches, cast=None, scaler=None, around=nullcontext, **options):
    """Run an engine; ``around`` is entered inside each context of it."""
    settings = {"preconditioner": "identity", "check_every": 1, **options}
    engine = InfluenceEngine(model, domains=["x", "y"], tasks=list(tasks), **settings)

    def backward(batch):
        with around(), sdpa_kernel(SDPBackend.MATH):
            with torch.autocast("cuda", dtype=cast or torch.bfloat16, enabled=cast is not None):
                loss = mean_loss(model, batch)
            (loss if scaler is None else scaler.scale(loss)).backward()

    for name, given in tasks.items():
        for batch in given:
            with engine.task(name, mask=shifted_mask(batch.labels), scaler=scaler):
                backward(batch)
    for batch in batches:
        with engine.domains(batch.ids, mask=shifted_mask(batch.labels), scaler=scaler):
            backward(batch)
    return engine


def truth_of(kit, model, tasks, batches):
    cpu = copy.deepcopy(model).cpu()
    cpu.again = None

    def back(batch):
        return batch._replace(x=batch.x.cpu(), labels=batch.labels.cpu())

    given = {name: [back(each) for each in some] for name, some in tasks.items()}
    return kit.per_example_influence(cpu, given, [back(each) for each in batches], 2)


def eager_error(model, batch, cast):
    """How far the gradients of the cast model are from those in float64, as a share of their norm."""
    exact = copy.deepcopy(model).double()
    mean_loss(exact, batch).backward()
    with torch.autocast("cuda", dtype=cast):
        loss = mean_loss(model, batch)
    loss.backward()
    pairs = list(zip(model.parameters(), exact.parameters(), strict=True))
    difference = sum((p.grad.double() - e.grad).square().sum() for p, e in pairs)
    model.zero_grad()
    return float((difference / sum(e.grad.square().sum() for _, e in pairs)).sqrt())


@pytest.mark.parametrize("grad", ["fused", "ordinary"])
def test_float32(kit, tasks, batches, grad):
    model = make_model().to(DEVICE)
    engine = measure(model, tasks, batches, grad=grad)
    assert truth_of(kit, model, tasks, batches).error(engine.matrix().values) < 1e-5
    assert engine.coverage().share == 1


@pytest.mark.parametrize("again", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_mixed_precision_and_checkpointing(kit, tasks, batches, cast, again):
    model = make_model(again=again).to(DEVICE)
    eager = eager_error(model, batches[0], cast)
    truth = truth_of(kit, model, tasks, batches)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12) if cast == torch.float16 else None
    engine = measure(model, tasks, batches, cast, scaler)
    assert truth.error(engine.matrix().values) <= 2 * eager
    assert engine.dropped == 0
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_an_overflow_is_dropped(tasks, batches):
    model = make_model().to(DEVICE)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12)
    engine = measure(model, tasks, batches[:1], torch.float16, scaler)
    before = engine.matrix().values.copy()
    with engine.domains(batches[1].ids, mask=shifted_mask(batches[1].labels), scaler=scaler):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = mean_loss(model, batches[1])
        (scaler.scale(loss) * 1e9).backward()
    assert engine.dropped == 1
    assert (engine.matrix().values == before).all()


@pytest.mark.parametrize("projection", [None, Projection(dim=16)], ids=["exact", "projected"])
@pytest.mark.parametrize("cast", [None, torch.bfloat16])
def test_the_same_numbers_from_host_memory(tasks, batches, cast, projection):
    found = []
    for where in (None, "cpu"):
        model = make_model().to(DEVICE)
        engine = measure(model, tasks, batches, cast, projection=projection, queries_device=where)
        found.append((engine.matrix(), [p.grad for p in model.parameters()]))
        away = engine._session._queries.store._away
        assert bool(away) == (where == "cpu")
        assert all(value.is_pinned() for value in away.values())
    (here, gradients), (there, others) = found
    assert (here.values == there.values).all()
    assert (here.stderr_task == there.stderr_task).all()
    assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))


def test_run_to_run(tasks, batches):
    values = [measure(make_model().to(DEVICE), tasks, batches).matrix().values for _ in range(2)]
    assert (values[0] == values[1]).all()


@contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("again", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("where", [None, "cpu"], ids=["here", "host memory"])
@pytest.mark.parametrize("projection", [None, Projection(dim=16)], ids=["exact", "projected"])
@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16])
def test_the_host_does_not_wait(tasks, batches, cast, projection, where, again):
    """From entering the context to its end, once the queries are frozen."""
    reasons = ops.available_backends()
    if all(reasons[name] is not None for name in ("triton", "cuda")):
        pytest.skip(f"only the reference, which reads offsets, runs here: {reasons}")
    model = make_model(again=again).to(DEVICE)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12) if cast == torch.float16 else None
    options = {"projection": projection, "queries_device": where, "check_every": 0}
    engine = measure(model, tasks, batches[:1], cast, scaler, **options)
    for batch in batches[1:]:
        mask = shifted_mask(batch.labels)
        context = engine.domains(batch.ids, mask=mask, scaler=scaler)
        torch.cuda.synchronize()
        with no_waiting():
            context.__enter__()
            with torch.autocast("cuda", dtype=cast or torch.bfloat16, enabled=cast is not None):
                loss = mean_loss(model, batch)
            (loss if scaler is None else scaler.scale(loss)).backward()
        context.__exit__(None, None, None)
    assert engine.matrix().microbatches.tolist() == [3, 3]


def test_a_stream_of_ones_own(tasks, batches):
    """Around everything, and inside the contexts only, where it is late: results are waited for on the device."""
    expected = measure(make_model().to(DEVICE), tasks, batches).matrix().values
    stream = torch.cuda.Stream()
    model = make_model().to(DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        assert (measure(model, tasks, batches).matrix().values == expected).all()

    @contextmanager
    def late():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            yield

    for where in (None, "cpu"):
        model = make_model().to(DEVICE)
        found = measure(model, tasks, batches, around=late, queries_device=where, check_every=0).matrix().values
        assert (found == expected).all()


def test_weights_that_change_unseen_are_seen(tasks, batches):
    model = make_model().to(DEVICE)
    engine = measure(model, tasks, batches[:1])
    model.blocks[0].up.bias.data.add_(1e-3)
    mask = shifted_mask(batches[1].labels)
    with pytest.raises(RuntimeError, match="weights changed since"), engine.domains(batches[1].ids, mask=mask):
        mean_loss(model, batches[1]).backward()
    assert engine.matrix().microbatches.tolist() == [1, 1]


def held_now():
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def most_of(function):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("where", [None, "cpu"], ids=["here", "host memory"])
@pytest.mark.parametrize("projection", [None, Projection(dim=64)], ids=["exact", "projected"])
@pytest.mark.parametrize("cast", [None, torch.bfloat16])
def test_the_estimate(kit, cast, projection, where):
    """Within a tenth of what is allocated, phase by phase; the most at a time over what the model takes alone."""
    model = make_model(width=512, layers=4, vocabulary=4096).to(DEVICE)
    batch = on_gpu(kit.make_batch(1, 2, 12, ids=[0, 1]))
    mask = shifted_mask(batch.labels)

    def backward():
        with torch.autocast("cuda", dtype=cast or torch.bfloat16, enabled=cast is not None):
            loss = mean_loss(model, batch)
        loss.backward()

    def run_tasks():
        for name in names:
            for _ in range(2):
                with engine.task(name, mask=mask):
                    backward()

    def run_domains():
        with engine.domains(batch.ids, mask=mask):
            backward()

    backward()
    model.zero_grad()  # cuBLAS has its workspace now
    names = list("abcd")
    options = {"preconditioner": "identity", "projection": projection, "queries_device": where}
    engine = InfluenceEngine(model, ["x", "y"], names, **options)
    estimate = engine.memory_estimate(cast, tokens=24)
    base = held_now()
    plain = most_of(lambda: (backward(), model.zero_grad())) - base

    def near(expected, found, of):
        assert abs(expected - found) <= 0.1 * of, f"{expected} against {found}; {estimate}"

    tasks = most_of(run_tasks) - base
    near(max(estimate.tasks, estimate.task_gradients + plain), tasks, max(tasks, estimate.tasks))
    near(estimate.task_gradients, held_now() - base, estimate.tasks)
    domains = most_of(run_domains) - base
    own = max(estimate.freezing, estimate.domains)
    near(max(estimate.freezing, estimate.domains + plain), domains, max(own, plain))
    model.zero_grad()
    run_domains()
    model.zero_grad()
    near(estimate.queries + estimate.packed + estimate.visitors, held_now() - base, own)


def test_auto(tasks, batches, monkeypatch):
    model = make_model().to(DEVICE)
    assert not measure(model, tasks, batches, queries_device="auto")._session.placement.copiers
    monkeypatch.setattr(offload, "free_memory", lambda device: (1000, 1000))
    assert measure(model, tasks, batches, queries_device="auto")._session.placement.copiers


def test_free_memory():
    free, total = offload.free_memory(torch.device(DEVICE))
    assert 0 < free <= total == torch.cuda.get_device_properties(0).total_memory


def test_nothing_stays_on_the_device(tasks, batches):
    model = make_model().to(DEVICE)
    base = held_now()
    for where in (None, "cpu"):
        engine = measure(model, tasks, batches, queries_device=where)
        model.zero_grad()
        engine.reset()
        del engine
    assert held_now() - base < 1 << 20
