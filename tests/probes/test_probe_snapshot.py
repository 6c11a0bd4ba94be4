"""Everything that training changes comes back bit by bit, and training goes on as if nothing had happened."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tikmix_fast import MixtureSampler
from tikmix_fast.probes.snapshot import Snapshot


class Odd(nn.Module):
    """What a state dict does not tell, or tells by copying: each of these was once forgotten by somebody."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6)
        self.norm = nn.BatchNorm1d(6)
        self.turned = nn.Parameter(torch.randn(5, 6).t())  # not contiguous
        self.coarse = nn.Parameter(torch.randn(5, dtype=torch.bfloat16))
        self.head = nn.Linear(5, 10, bias=False)
        self.tail = nn.Linear(6, 10, bias=False)
        self.tail.weight = self.table.weight  # tied
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.extra = 0

    def get_extra_state(self):
        return {"extra": self.extra}

    def set_extra_state(self, state) -> None:
        self.extra = state["extra"]

    def forward(self, ids):
        self.seen = self.seen + len(ids)  # a new tensor in its place
        self.extra += 1
        x = self.norm(self.table(ids))
        x = nn.functional.dropout(x, 0.3, self.training)
        return self.head(x @ self.turned + self.coarse) + self.tail(x)


class FloatMoments(torch.optim.Optimizer):
    """Keeps float32 moments of bfloat16 parameters, which load_state_dict would cast, in a list inside its state."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state.setdefault("moments", [torch.zeros_like(parameter, dtype=torch.float32)])
                state["moments"][0] = state["moments"][0] * 0.9 + parameter.grad.float()
                state["steps"] = (state.get("steps", (0, None))[0] + 1, None)
                parameter.sub_(group["lr"] * state["moments"][0].to(parameter.dtype))


def make() -> SimpleNamespace:
    torch.manual_seed(0)
    model = Odd()
    optimizer = torch.optim.AdamW([model.table.weight, model.turned, model.head.weight], lr=0.05, amsgrad=True)
    other = torch.optim.SGD(model.norm.parameters(), lr=0.05, momentum=0.9)
    floats = FloatMoments([model.coarse, model.unused])
    run = SimpleNamespace(
        model=model,
        optimizer=optimizer,
        other=other,
        floats=floats,
        scheduler=torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100),
        scaler=torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2),
        average=AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)),
        by_hand={"head": model.head.weight.detach().clone()},
        sampler=MixtureSampler([40, 30], [0.5, 0.5], seed=3),
        generator=torch.Generator().manual_seed(5),
        numbers=np.random.default_rng(6),
    )
    run.owners = list(vars(run).values())
    return run


def step(run: SimpleNamespace) -> float:
    """One step that moves every piece of state, and every random generator."""
    drawn = [index % 10 for _, index in zip(range(6), run.sampler, strict=False)]
    noise = torch.rand((), generator=run.generator) + run.numbers.random() + random.random() + np.random.rand()  # noqa: NPY002
    ids = torch.tensor(drawn)
    for optimizer in (run.optimizer, run.other, run.floats):
        optimizer.zero_grad()
    loss = nn.functional.cross_entropy(run.model(ids) * (1 + 0.1 * noise), torch.randint(10, (6,)))
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.step(run.other)
    run.scaler.step(run.floats)
    run.scaler.update()
    run.scheduler.step()
    run.average.update_parameters(run.model)
    run.by_hand["head"].lerp_(run.model.head.weight.detach(), 0.1)
    return loss.item()


def bits(value):
    """A nested copy with tensors as bytes, so that == compares bits (and NaN equals NaN)."""
    if isinstance(value, torch.Tensor):
        content = value.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
        return str(value.dtype), tuple(value.shape), value.stride(), content
    if isinstance(value, dict):
        return {(id(key) if isinstance(key, torch.Tensor) else key): bits(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(part) for part in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


def everything(run: SimpleNamespace):
    optimizers = (run.optimizer, run.other, run.floats)
    schedule = run.scheduler.state_dict()
    return {
        "model": {name: bits(each) for name, each in [*run.model.named_parameters(), *run.model.named_buffers()]},
        "average": bits(run.average.state_dict()),
        "gradients": [bits(each.grad) for each in run.model.parameters()],
        "modes": [each.training for each in run.model.modules()],
        "requires": [each.requires_grad for each in run.model.parameters()],
        "extra": run.model.extra,
        "moments": [bits(dict(each.state)) for each in optimizers],
        "groups": [bits([{**group, "params": None} for group in each.param_groups]) for each in optimizers],
        "scheduler": {name: value for name, value in schedule.items() if not callable(value)},
        "scaler": run.scaler.state_dict(),
        "by_hand": bits(run.by_hand),
        "sampler": run.sampler.state_dict(),
        "generators": [bits(run.generator.get_state()), run.numbers.bit_generator.state],
        "random": [random.getstate(), bits(list(np.random.get_state())), bits(torch.get_rng_state())],  # noqa: NPY002
    }


def seed_all() -> None:
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)


def disturb(run: SimpleNamespace) -> None:
    for _ in range(4):
        step(run)
    run.model.eval()
    run.model.table.weight.requires_grad_(False)
    run.model.unused.grad = torch.ones(3)
    run.sampler.set_weights([0.1, 0.9])
    run.by_hand["new"] = torch.zeros(1)
    run.optimizer.param_groups[0]["lr"] = 7.0
    with torch.no_grad():
        run.model.frozen.fill_(float("nan"))


@pytest.mark.parametrize("earlier", [0, 3])  # before the first step there are no moments, gradients or scale
def test_everything_comes_back_and_goes_on(earlier: int) -> None:
    run, undisturbed = make(), make()
    seed_all()
    for _ in range(earlier):
        step(run)
    tensors = [*run.model.parameters(), *run.model.buffers()]
    addresses = [each.data_ptr() for each in tensors]
    moments = [value for state in run.optimizer.state.values() for value in state.values()]
    gradients = [each.grad for each in run.model.parameters()]
    before = everything(run)
    snapshot = Snapshot(run.owners)
    for _ in range(2):
        disturb(run)
        untouched = [name for name, value in everything(run).items() if value == before[name]]
        assert not untouched, "the disturbance must reach everything"
        snapshot.restore()
        assert everything(run) == before
    # In place: whoever holds on to a tensor still holds the right one.
    assert all(a is b for a, b in zip([*run.model.parameters(), *run.model.buffers()], tensors, strict=True))
    assert [each.data_ptr() for each in tensors] == addresses
    after = [value for state in run.optimizer.state.values() for value in state.values()]
    assert all(a is b for a, b in zip(after, moments, strict=True))
    assert all(each.grad is gradient for each, gradient in zip(run.model.parameters(), gradients, strict=True))
    assert run.model.unused.grad is None

    after = [step(run) for _ in range(5)]
    seed_all()
    for _ in range(earlier):
        step(undisturbed)
    assert after == [step(undisturbed) for _ in range(5)]
    left, right = everything(run), everything(undisturbed)
    for name in left.keys() - {"moments"}:  # theirs are by the address of the parameter
        assert left[name] == right[name], name


def test_a_snapshot_is_a_copy() -> None:
    """Of what it remembers, and of what it hands back: owners that keep a state as their own may change it."""

    class Keeper:
        def __init__(self) -> None:
            self.state = {"numbers": [1, 2]}

        def state_dict(self):
            return self.state

        def load_state_dict(self, state) -> None:
            self.state = state

    keeper = Keeper()
    snapshot = Snapshot([keeper])
    for _ in range(3):
        keeper.state["numbers"].append(3)
        snapshot.restore()
        assert keeper.state == {"numbers": [1, 2]}


def test_a_sampler_goes_on_with_the_same_draws() -> None:
    sampler = MixtureSampler({"a": 50, "b": 20}, {"a": 0.6, "b": 0.4}, seed=1)
    draws = iter(sampler)
    for _ in range(33):
        next(draws)
    snapshot = Snapshot([sampler])
    twin = copy.deepcopy(sampler.state_dict())
    expected = [next(draws) for _ in range(60)]
    snapshot.restore()
    sampler.set_weights({"a": 0.0, "b": 1.0})
    for _ in range(100):
        next(draws)
    snapshot.restore()
    assert sampler.state_dict() == twin
    assert [next(draws) for _ in range(60)] == expected


@pytest.mark.parametrize(
    ("owners", "message"),
    [
        (nn.Linear(1, 1), "owners must be an iterable"),
        (3, "owners must be an iterable"),
        ([3], "an owner must be a module, an optimizer, .*; got int"),
    ],
)
def test_what_cannot_be_remembered_is_refused(owners, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Snapshot(owners)
