"""What would make a GPU's host wait, seen on the CPU: reads of values, and tensors on the wrong device."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tikmix_fast import InfluenceEngine, Projection, ops, shifted_mask
from tikmix_fast.influence.capture.rows import RowLabels
from tikmix_fast.influence.parallel.device_transfers import read_together, send
from tikmix_fast.influence.passes.fingerprint import Fingerprint
from tikmix_fast.influence.passes.influence_sink import InfluenceSink
from tikmix_fast.ops.common import device_checks


class NoReads(TorchDispatchMode):
    """Refuse what copies values to the host on a GPU, or makes a shape of them."""

    READS = frozenset(
        getattr(torch.ops.aten, name)
        for name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "unique2")
        if hasattr(torch.ops.aten, name)
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in self.READS, f"{func} reads values"
        if func.overloadpacket is torch.ops.aten.index:
            assert not any(each is not None and each.dtype == torch.bool for each in args[1]), "indexed by a mask"
        return func(*args, **(kwargs or {}))


def test_the_detector_detects():
    for read in (lambda x: bool(x), lambda x: x.item(), lambda x: torch.ones(1)[x == 1], lambda x: x.nonzero()):
        with NoReads(), pytest.raises(AssertionError, match=r"reads values|indexed by a mask"):
            read(torch.ones(1))


@pytest.fixture
def quiet_kernel(monkeypatch):
    """The CPU kernel reads offsets, which a GPU kernel does not: it is not what is tested here."""
    for name in ("group_influence", "projected_domain_gradients"):
        original = getattr(ops, name)

        def unwatched(*args, original=original, **options):
            with torch.utils._python_dispatch._disable_current_modes():
                return original(*args, **options)

        monkeypatch.setattr(ops, name, unwatched)


@pytest.mark.parametrize("cast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("ids", [[1, 0, 1, 0], [1, 1, 1, 1]], ids=["mixed", "one domain"])
@pytest.mark.parametrize("kind", ["zoo", "gpt2", "llama-tied"])
@pytest.mark.usefixtures("quiet_kernel")
def test_nothing_is_read_inside(kit, kind, ids, cast):
    """From the first line inside the context to the last: not one value."""
    model = kit.make_model(kind)
    engine = kit.measure(model, {"a": [kit.make_batch(1, 3, 8)]}, [], 2, preconditioner="identity", check_every=0)
    for seed in (2, 3):
        batch = kit.make_batch(seed, 4, 9, ids=ids)
        mask = shifted_mask(batch.labels)
        targets = mask.sum()
        with engine.domains(batch.ids, mask=mask):
            # Transformers' masks read values of their own in the forward.
            with NoReads() if kind == "zoo" else nullcontext(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
                loss = kit.token_losses(model, batch.x, batch.labels).sum() / targets
            with NoReads():
                loss.backward()
    assert engine.matrix().microbatches.tolist() == [2 * (0 in ids), 2]


@pytest.mark.usefixtures("quiet_kernel")
def test_one_copy_at_the_end(kit, monkeypatch):
    from tikmix_fast.influence.passes import measured_pass as module

    model, groups = kit.make_model("attentive"), []

    def counted(given):
        groups.append({name for name, tensors in given.items() if tensors})
        return read_together(given)

    monkeypatch.setattr(module, "read_together", counted)
    engine = kit.measure(model, {"a": [kit.make_batch(1, 3, 8)]}, [], 2, preconditioner="identity", check_every=0)
    batch = kit.make_batch(2, 4, 9, ids=[1, 0, 1, 0])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    with engine.domains(batch.ids, mask=shifted_mask(batch.labels), scaler=scaler):
        scaler.scale(kit.mean_loss(model, batch)).backward()
    assert groups == [
        {"stepped", "masked", "losses", "scale", "sums"},
        {"stepped", "masked", "losses", "scale", "products"},
    ]


def test_read_together_keeps_shapes_and_order():
    given = {"a": [torch.arange(3), torch.tensor(True)], "none": [], "b": [torch.ones(2, 2).bfloat16()]}
    found = read_together(given)
    assert [each.shape for each in found["a"]] == [(3,), ()]
    assert found["a"][0].tolist() == [0, 1, 2]
    assert float(found["a"][1]) == 1
    assert found["none"] == []
    assert torch.equal(found["b"][0], torch.ones(2, 2, dtype=torch.float64))


def test_small_changes_of_half_precision_weights_are_seen():
    """One step of one element: a norm in the weights' own dtype would not move."""
    weights = {"w": torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16()}
    before = Fingerprint(weights)
    assert not any(map(bool, Fingerprint(weights).changes_since(before)))
    version = weights["w"]._version
    with torch.autograd._unsafe_preserve_version_counter(weights["w"]):
        weights["w"][0] = torch.nextafter(weights["w"][0].clone(), torch.tensor(100.0).bfloat16())
    assert weights["w"]._version == version
    assert any(map(bool, Fingerprint(weights).changes_since(before)))


def test_not_a_number_stays_what_it_was():
    weights = {"w": torch.tensor([float("nan")]), "v": torch.ones(1)}
    assert not any(map(bool, Fingerprint(weights).changes_since(Fingerprint(weights))))


class View:
    """As much of a `ParameterView` as a sink asks of a parameter: a fake tensor cannot be one."""

    is_parameter = True

    def __init__(self, name, plain):
        self.plain, self.sources = plain, (SimpleNamespace(name=name),)

    def queries(self, of, without=()):
        yield from ((source.name, of[source.name]) for source in self.sources if source.name not in without)


@pytest.fixture
def sent(monkeypatch):
    """Pinned memory needs a GPU; an ordinary copy stands in."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)


@pytest.mark.parametrize("ids", [torch.tensor([0, 1, 0]), 1], ids=["mixed", "one domain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("sent")
def test_devices_fit_together(ids, dtype):
    """Every way of reading a gradient, with all tensors on a GPU: nothing stays behind on the host."""
    device = torch.device("cuda:0")
    labels = RowLabels(ids, 2, batch_dim=0, length=5)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        shapes = {"w": (6, 4), "b": (6,), "n": (4,), "t": (9, 4), "p": (5, 4)}
        sink = InfluenceSink(labels, {name: torch.empty(2, *shape, device=device) for name, shape in shapes.items()})
        views = {name: View(name, torch.empty(shape, device=device)) for name, shape in shapes.items()}
        rows = torch.empty(3, 5, 4, device=device, dtype=dtype)
        wide = torch.empty(3, 5, 6, device=device, dtype=dtype)
        sink.product(views["w"], rows, wide, False, torch.empty(6, 4, device=device))
        sink.features(views["b"], wide)
        sink.spread(views["n"], rows)
        sink.lookup(views["t"], torch.zeros(3, 5, dtype=torch.int64, device=device), 1, rows)
        sink.spread(views["p"], rows)
        for name, found in sink.sums.items():
            assert found.device == device, name
            assert found.shape == (2, 2)
            assert found.dtype == torch.float64
        assert set(sink.sums) == set(shapes)
        layout = sink.labels.layout((3, 5), device)
        assert layout.offsets.device == layout.domains.device == device
        assert send(torch.ones(1), device).device == device


@pytest.mark.parametrize("reentrant", [False, True])
def test_half_precision_with_a_scaler_and_checkpointing(kit, reentrant):
    """What a float16 run does: autocast, a scaled loss, blocks computed again; the overflow is dropped."""

    class Again(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            h = self.inner.tokens(x) + self.inner.positions(torch.arange(x.shape[1]))
            h = checkpoint(self.inner.block, h, use_reentrant=reentrant)
            return h @ self.inner.tokens.weight.T

    model = Again(kit.make_model("attentive"))
    task, batch = kit.make_batch(1, 8, 16), kit.make_batch(2, 8, 16, ids=[1, 0, 1, 0, 0, 0, 1, 1])
    truth = kit.per_example_influence(model.inner, {"a": [task]}, [batch], 2)
    engine = InfluenceEngine(model, ["x", "y"], ["a"], preconditioner="identity", check_every=1, batch_dim=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def backward(given, scale):
        with torch.autocast("cpu", torch.float16):
            loss = kit.mean_loss(model, given)
        scale(loss).backward()

    with engine.task("a", mask=shifted_mask(task.labels), scaler=scaler):
        backward(task, scaler.scale)
    with engine.domains(batch.ids, mask=shifted_mask(batch.labels), scaler=scaler):
        backward(batch, lambda loss: scaler.scale(loss) * 1e9)
    assert engine.dropped == 1
    with engine.domains(batch.ids, mask=shifted_mask(batch.labels), scaler=scaler):
        backward(batch, scaler.scale)
        scaler.update(1.0)  # too early for the optimizer, and no matter for what was measured
    assert truth.error(engine.matrix().values) < 2e-3


def test_streams_of_a_forward_are_joined(kit, monkeypatch):
    """A product's stream is noted where it runs, and joined before anything is read."""
    model, calls = kit.make_model("attentive"), []
    from tikmix_fast.influence.parallel.device_transfers import PassStreams

    monkeypatch.setattr(PassStreams, "note", lambda self, tensor: calls.append("note"))
    monkeypatch.setattr(PassStreams, "join", lambda self, kept=(): calls.append("join"))
    batch = kit.make_batch(2, 3, 8, ids=[0, 1, 0])
    kit.measure(model, {"a": [kit.make_batch(1, 3, 8)]}, [batch], 2, preconditioner="identity")
    assert calls == ["note"] * 2 + ["join"] + ["note"] * 3 + ["join"]  # a task's capture sees no transposed table


def test_what_a_kernel_noted_is_said_when_the_matrix_is_read(kit, monkeypatch):
    """Offsets on a GPU are not read by the host: a kernel leaves a note instead."""
    monkeypatch.setattr(device_checks, "_flags", {})
    engine = kit.measure(
        kit.make_model("attentive"), {"a": [kit.make_batch(1, 3, 8)]}, [], 2, preconditioner="identity"
    )
    engine.matrix()
    device_checks.error_flag(torch.device("cpu")).fill_(device_checks.WRONG_OFFSETS)
    with pytest.raises(ValueError, match="offsets must start at 0"):
        engine.matrix()
    engine.matrix()


@pytest.mark.parametrize("projection", [None, Projection(dim=16)], ids=["exact", "projected"])
def test_default_device(kit, projection):
    """Whatever torch's default device is, what the engine makes lies with the parameters or on the host."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(37, 20), torch.nn.Linear(20, 24), torch.nn.Tanh())
    model.append(torch.nn.Linear(24, 37))
    tasks = {"a": [kit.make_batch(seed, 3, 8) for seed in (1, 2)]}
    batches = [kit.make_batch(seed, 4, 9, ids=[1, 0, 1, 0]) for seed in (3, 4)]
    options = {"preconditioner": "identity", "projection": projection}
    expected = kit.measure(model, tasks, batches, 2, **options).matrix()
    torch.set_default_device("meta")
    try:
        engine = kit.measure(model, tasks, batches, 2, **options)
        found = engine.matrix()
        with engine.domains(["d0", "d0", "d1"], mask=shifted_mask(batches[0].labels[:3])):
            kit.mean_loss(model, batches[0]._replace(x=batches[0].x[:3], labels=batches[0].labels[:3])).backward()
        engine.memory_estimate()
        assert engine.matrix().microbatches.tolist() == [3, 3]
    finally:
        torch.set_default_device(None)
    assert (found.values == expected.values).all()
