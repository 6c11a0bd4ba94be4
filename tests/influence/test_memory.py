"""The memory estimate against what is allocated: storages that the engine holds, and torch's own record of a pass."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tikmix_fast import InfluenceEngine, Projection, shifted_mask
from tikmix_fast.influence.memory_estimate import readable_size
from tikmix_fast.influence.queries import offload

VOCABULARY = 211


def gpt2(layers=2, width=64):
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=2, vocab_size=VOCABULARY, n_positions=32, **ids)
    return GPT2LMHeadModel(config)


def llama(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=2,
            hidden_size=64,
            intermediate_size=160,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            tie_word_embeddings=tied,
        )
    )


CASES = {
    "gpt2": (gpt2, None, {}),
    "gpt2, bfloat16": (gpt2, torch.bfloat16, {}),
    "gpt2, projected": (gpt2, None, {"projection": Projection(dim=16)}),
    "gpt2, projected, bfloat16": (gpt2, torch.bfloat16, {"projection": Projection(dim=16, kind="gaussian")}),
    "gpt2, unchecked, bfloat16": (gpt2, torch.bfloat16, {"check_every": 0}),
    "llama": (lambda: llama(False), None, {}),
    "llama, bfloat16": (lambda: llama(False), torch.bfloat16, {"exclude": ("*norm*",)}),
    "llama tied": (lambda: llama(True), torch.bfloat16, {}),
    "llama tied, projected": (lambda: llama(True), None, {"projection": Projection(dim=32)}),
}


class Run:
    """A model with an optimizer, and an engine of four tasks."""

    def __init__(self, make, dtype, rows=(2, 6), **options):
        torch.manual_seed(0)
        self.model, self.dtype = make().train(), dtype
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.x = torch.randint(0, VOCABULARY, rows)
        self.forward()
        optimizer.step()
        optimizer.zero_grad()
        self.tasks = ["a", "b", "c", "d"]
        self.engine = InfluenceEngine(self.model, ["x", "y"], self.tasks, optimizer=optimizer, batch_dim=0, **options)

    def forward(self):
        with torch.autocast("cpu", dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            self.model(self.x, labels=self.x).loss.backward()

    def run_tasks(self):
        for name in self.tasks:
            for _ in range(2):
                with self.engine.task(name, mask=shifted_mask(self.x)):
                    self.forward()

    def run_domains(self):
        with self.engine.domains([0] + [1] * (len(self.x) - 1), mask=shifted_mask(self.x)):
            self.forward()

    def estimate(self, **options):
        return self.engine.memory_estimate(self.dtype, self.x.numel(), **options)


def storages(*roots):
    """Return the bytes of all storages reachable from objects, by the garbage collector's own references."""
    seen, found, waiting = set(), {}, list(roots)
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, (type, nn.Module)) or callable(each):
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            found[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
        else:
            waiting += gc.get_referents(each)
    return sum(found.values())


class Allocations(TorchDispatchMode):
    """The storages that operations make while this is entered: the bytes of those alive, and the most at a time."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._note((args, kwargs), new=False)
        result = func(*args, **(kwargs or {}))
        self._note(result, new=True)
        return result

    def _note(self, values, new):
        for each in tree_leaves(values):
            if isinstance(each, Tensor) and (storage := each.untyped_storage())._cdata not in self._known:
                size = storage.nbytes() if new else 0
                self._known.add(storage._cdata)
                weakref.finalize(storage, self._freed, storage._cdata, size)
                self.live += size
        self.peak = max(self.peak, self.live)

    def _freed(self, key, size):
        self._known.discard(key)
        self.live -= size

    def of(self, function):
        """Return the most at a time during a call, what was there before included."""
        self.peak = self.live
        with self:
            function()
        return self.peak


@pytest.fixture(params=CASES)
def run(request):
    make, dtype, options = CASES[request.param]
    return Run(make, dtype, **options)


def near(estimate, truth):
    return estimate == pytest.approx(truth, rel=0.1)


def test_what_is_held_and_what_is_allocated(run):
    """Of every phase: what the engine holds, and the most at a time over what the same passes take without it."""
    estimate, engine, allocations = run.estimate(), run.engine, Allocations()
    plain = allocations.of(lambda: (run.forward(), run.model.zero_grad()))
    tasks = allocations.of(run.run_tasks)
    assert near(estimate.task_gradients, storages(engine._session._tasks))
    assert near(max(estimate.tasks, estimate.task_gradients + plain), tasks)
    domains = allocations.of(run.run_domains)
    run.run_domains()
    assert not storages(engine._session._tasks)
    assert near(estimate.queries + estimate.packed, storages(engine._session._queries.store))
    own = max(estimate.freezing, estimate.domains)
    assert abs(max(estimate.freezing, estimate.domains + plain) - domains) <= 0.1 * own
    assert estimate.peak == max(estimate.tasks, own)
    assert estimate.host == estimate.visitors == 0


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_held_elsewhere(monkeypatch, dtype):
    """What rests in host memory, and the place of what visits the device."""

    class Copier:
        def to_host(self, tensor, into=None):
            return tensor.clone() if into is None else into.copy_(tensor)

        def fetch(self, host):
            return host.clone()

        def allocate(self, size):
            return torch.empty(size, dtype=torch.uint8)

        def start(self, host, into):
            into.copy_(host)

        def wait(self, mark):
            pass

    monkeypatch.setattr(offload, "copier_for", lambda device: Copier())
    run = Run(gpt2, dtype, queries_device="cpu")
    run.run_tasks()
    estimate, sums = run.estimate(), run.engine._session._tasks._sums
    at_home = [value for split in sums.values() for value in split.values() if value.ndim < 2]
    assert estimate.task_gradients == storages(at_home)
    assert near(estimate.host, storages(run.engine._session._tasks))
    for _ in range(3):
        run.run_domains()
    store = run.engine._session._queries.store
    assert near(estimate.queries, storages(store._here))
    (prefetcher,) = store._prefetchers.values()
    largest = max(p.numel() for p in run.model.parameters())
    assert near(estimate.visitors, prefetcher._memory.nbytes)
    assert estimate.visitors >= prefetcher._memory.nbytes >= 8 * largest * (4 if dtype is None else 2)
    assert "in host memory" in str(estimate)


def test_said_before_any_pass(run):
    before = run.estimate()
    assert before == run.estimate()
    assert not run.engine._session._tasks.begun
    assert str(before).startswith("on cpu at most ")


def test_what_is_asked_for():
    engine = InfluenceEngine(nn.Linear(100, 10), ["x"], ["a", "b"], preconditioner="identity", task_splits=3)
    assert engine.memory_estimate().task_gradients == 4 * 6 * 1010
    assert engine.memory_estimate(tokens=100_000).domains > engine.memory_estimate().domains
    assert engine.memory_estimate(device="cuda:3").peak == 0
    assert readable_size(5 * 2**40) == "5.0 TiB"
    assert readable_size(12) == "12 bytes"


def test_projected_queries_of_gpt2_are_small():
    """The bar: 60 MB for nine tasks of the 124M model, whose queries take 4.5 GB; nothing is allocated to tell."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    tasks = [str(index) for index in range(9)]
    for projection, most in ((Projection(dim=64), 12e6), (None, 4.5e9)):
        engine = InfluenceEngine(model, ["x"], tasks, "identity", projection=projection, task_splits=1)
        estimate = engine.memory_estimate()
        assert 0.9 * most < estimate.queries + estimate.packed < most
