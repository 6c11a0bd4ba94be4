"""Queries that rest elsewhere and visit the device: the same numbers, two at a time, the next one sent for in time."""

from __future__ import annotations

import logging

import pytest
import torch

from tikmix_fast import InfluenceEngine, Projection, shifted_mask
from tikmix_fast.influence.queries import offload
from tikmix_fast.influence.queries.offload import Prefetcher, aligned


class LateCopier:
    """A device beside the CPU whose copies arrive as late as they may: when they are waited for.

    Until then the destination holds NaN, and so does what is freed, so that a use without waiting is seen. ``log`` has
    every call in order.
    """

    def __init__(self):
        self.log, self.on_device, self.peak = [], 0, 0

    def to_host(self, tensor, into=None):
        self.log.append(("to_host", tensor.nbytes))
        return tensor.clone() if into is None else into.copy_(tensor)

    def fetch(self, host):
        self.log.append(("fetch", host.nbytes))
        return host.clone()

    def allocate(self, size):
        self.log.append(("allocate", size))
        return torch.full((size,), 0xFF, dtype=torch.uint8)

    def start(self, host, into):
        self.log.append(("start", host.nbytes))
        into.fill_(float("nan"))
        return host, into

    def wait(self, mark):
        self.log.append(("wait", mark[0].nbytes))
        mark[1].copy_(mark[0])

    def sizes(self, kind):
        return [size for what, size in self.log if what == kind]


def host_tensors(**sizes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def one_pass(prefetcher, host, names):
    prefetcher.begin()
    for name in names:
        assert torch.equal(prefetcher.get(name), host[name])
    prefetcher.end()


def test_the_next_is_sent_for_before_this_one_is_used():
    host, copier = host_tensors(a=100, b=200, c=300, d=100), LateCopier()
    prefetcher = Prefetcher(copier, host)
    one_pass(prefetcher, host, "abcd")
    copier.log.clear()
    one_pass(prefetcher, host, "abcd")
    moves = [(what, size // 4) for what, size in copier.log if what != "allocate"]
    a, b, c, d = 100, 200, 300, 100
    expected = [("start", a), ("start", b), ("wait", a), ("start", c), ("wait", b), ("start", d), ("wait", c)]
    assert moves == [*expected, ("wait", d)]
    # The memory is that of the two neighbours that take most, and it stays.
    assert copier.sizes("allocate") == [sum(aligned(4 * size) for size in (b, c))]
    copier.log.clear()
    one_pass(prefetcher, host, "abcd")
    assert not copier.sizes("allocate")


@pytest.mark.parametrize(
    "then", ["abcd", "dcba", "acbd", "aabbccdd", "bd", "cabdabc", "dadbdc", "abcda"], ids=lambda names: names
)
@pytest.mark.parametrize("first", ["abcd", "abca", "aab", "dcacb"], ids=lambda names: names)
def test_any_order_gives_the_right_tensor(first, then):
    host, copier = host_tensors(a=100, b=700, c=300, d=129), LateCopier()
    prefetcher = Prefetcher(copier, host)
    for names in (first, then, then, first):
        one_pass(prefetcher, host, names)
    assert torch.equal(prefetcher.get("b"), host["b"])
    assert torch.equal(prefetcher.get("a"), host["a"])


def test_what_is_used_twice_in_a_row_is_brought_once():
    host, copier = host_tensors(a=100, b=200), LateCopier()
    prefetcher = Prefetcher(copier, host)
    one_pass(prefetcher, host, "aabba")
    copier.log.clear()
    one_pass(prefetcher, host, "aabba")
    assert copier.sizes("start") == [400, 800]  # the last "a" never left


def test_what_changed_on_the_host_is_brought_anew():
    host, copier = host_tensors(a=100, b=200), LateCopier()
    prefetcher = Prefetcher(copier, host)
    one_pass(prefetcher, host, "ab")
    one_pass(prefetcher, host, "ab")
    host["b"] = torch.ones(50)
    prefetcher.forget("b")
    one_pass(prefetcher, host, "ab")
    assert prefetcher.get("b").sum() == 50


@pytest.fixture
def copiers(monkeypatch):
    made = []

    def make(device):
        made.append(LateCopier())
        return made[-1]

    monkeypatch.setattr(offload, "copier_for", make)
    return made


def run(kit, kind, cast=False, passes=3, **options):
    model = kit.make_model(kind)
    tasks = {"a": [kit.make_batch(seed, 3, 8) for seed in (1, 2)], "b": [kit.make_batch(seed, 2, 7) for seed in (8, 9)]}
    batches = [kit.make_batch(seed, 4, 9, ids=[1, 0, 1, 0]) for seed in range(4, 4 + passes)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
        engine = kit.measure(model, tasks, batches, 2, preconditioner="identity", **options)
    return engine, engine.matrix()


@pytest.mark.parametrize("projection", [None, Projection(dim=8, kind="rademacher")], ids=["exact", "projected"])
@pytest.mark.parametrize("cast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["zoo", "gpt2", "llama", "llama-tied"])
def test_same_numbers(kit, copiers, kind, cast, projection):
    _, here = run(kit, kind, cast, projection=projection)
    engine, away = run(kit, kind, cast, projection=projection, queries_device="cpu")
    assert (here.values == away.values).all()
    assert (here.stderr_task == away.stderr_task).all()
    (copier,) = copiers
    assert copier.sizes("to_host")
    store = engine._session._queries.store
    assert set(store._away) == {
        name
        for name, p in engine.parameters().items()
        if p.ndim > 1 and name not in engine._session._queries.projections
    }


def test_two_weights_at_a_time(kit, copiers):
    """The device holds vectors' queries and, of matrices', the memory for two; every one is waited for before use."""
    engine, _ = run(kit, "gpt2", queries_device="cpu", check_every=0, task_splits=1, passes=4)
    store, (copier,) = engine._session._queries.store, copiers
    sizes = sorted(each.nbytes for each in store._away.values())
    assert copier.sizes("allocate")[-1] <= sizes[-1] + sizes[-2] + 2 * aligned(1)
    assert all(engine.parameters()[name].ndim == 1 for name in store._here)
    assert len(copier.sizes("start")) == len(copier.sizes("wait"))
    order = engine._session._queries.store._prefetchers[torch.device("cpu")]._order
    # The tied table is the head's weight first and looked up last.
    assert order[0] == order[-1] == "transformer.wte.weight"


def test_verify_and_refresh(kit, copiers):
    engine, _ = run(kit, "attentive", queries_device="cpu")
    batch = kit.make_batch(9, 4, 8, ids=[1, 0, 1, 0])
    found = engine.verify(lambda model, b: kit.token_losses(model, b.x, b.labels).sum(1), batch, batch.ids, cells=2)
    assert found.max_error < 1e-6
    engine.refresh()
    assert engine._session._queries is None
    assert not any(engine._session._tasks._sums.values())


def test_a_failed_pass_teaches_no_order_that_breaks(kit, copiers):
    engine, _ = run(kit, "attentive", queries_device="cpu")
    batch = kit.make_batch(9, 4, 8, ids=[1, 0, 1, 0])

    def fail():
        with engine.domains(batch.ids, mask=shifted_mask(batch.labels)):
            loss = kit.mean_loss(engine.model, batch)
            loss.register_hook(lambda gradient: gradient.no_such_thing)
            loss.backward()

    with pytest.raises(AttributeError):
        fail()
    for each in (engine, run(kit, "attentive")[0]):
        with each.domains(batch.ids, mask=shifted_mask(batch.labels)):
            kit.mean_loss(each.model, batch).backward()
    assert (each.matrix().values == engine.matrix().values).all()


def test_nothing_moves_on_the_cpu(kit):
    engine, away = run(kit, "attentive", queries_device="cpu")
    assert not engine._session._queries.store._away
    assert (away.values == run(kit, "attentive")[1].values).all()


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_auto_compares_the_estimate_with_what_is_free(kit, copiers, monkeypatch, caplog, share):
    model = kit.make_model("attentive")
    engine = InfluenceEngine(model, ["x"], ["a"], preconditioner="identity", queries_device="auto")
    free = int(share * engine.memory_estimate().peak)
    monkeypatch.setattr(offload, "free_memory", lambda device: (free, free))
    mask = shifted_mask(kit.make_batch(1, 3, 8).labels)
    with caplog.at_level(logging.INFO, "tikmix_fast"), engine.task("a", mask):
        kit.mean_loss(model, kit.make_batch(1, 3, 8)).backward()
    assert bool(copiers) == (share < 1)
    assert ("in host memory" if share < 1 else "rest there") in caplog.text
    with engine.task("a", mask):
        kit.mean_loss(model, kit.make_batch(1, 3, 8)).backward()
    assert caplog.text.count("queries rest") == 1


@pytest.mark.parametrize("given", ["gpu", 3, torch.device("meta")])
def test_bad_device(kit, given):
    with pytest.raises(ValueError, match="queries_device"):
        InfluenceEngine(kit.make_model("attentive"), ["x"], ["a"], queries_device=given)


def test_devices_that_cannot_be_relieved():
    assert offload.copier_for(torch.device("cpu")) is None
    assert offload.free_memory(torch.device("cpu")) is None
    with pytest.raises(ValueError, match="queries_device must be None"):
        offload.copier_for(torch.device("meta"))


def test_order_on_a_gpus_streams(monkeypatch):
    """What the copier asks of CUDA, with streams that only write down what is asked of them."""
    log = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            log.append(f"{self.name} waits for {event}")

        def record_event(self):
            return f"what {self.name} did"

        def __enter__(self):
            log.append(f"on {self.name}")

        def __exit__(self, *_):
            log.append(f"off {self.name}")

    current, empty, copy = Stream("current"), torch.empty, torch.Tensor.copy_
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: log.append(f"kept for {stream.name}"))
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *size, pin_memory=False, **options: log.append(f"pinned {pin_memory}") or empty(*size, **options),
    )

    def noted(self, source, non_blocking=False):
        log.append(f"copy, waiting {not non_blocking}")
        return copy(self, source)

    monkeypatch.setattr(torch.Tensor, "copy_", noted)
    copier = offload.CudaCopier(torch.device("cpu"))
    host = copier.to_host(torch.arange(4.0))
    assert log == ["pinned True", "copy, waiting False"]
    log.clear()
    memory = copier.allocate(host.nbytes)
    assert log == ["pinned False", "kept for side"]
    log.clear()
    mark = copier.start(host, memory.view(torch.float32))
    copier.wait(mark)
    assert log == [
        "kept for current",
        "side waits for current",
        *("on side", "copy, waiting False", "off side"),
        "current waits for what side did",
    ]
    assert memory.view(torch.float32).tolist() == [0, 1, 2, 3]
    assert torch.equal(copier.fetch(host), host)
