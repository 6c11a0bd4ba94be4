"""Adam's scaling read from a live optimizer and from saved states, by name, against torch's own step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tikmix_fast import InfluenceEngine
from tikmix_fast.influence.preconditioners.adam import Adam
from tikmix_fast.influence.preconditioners.optimizer_state import canonical_name, read_adam
from tikmix_fast.influence.preconditioners.protocol import Preconditioner


def trained(kind=torch.optim.AdamW, named=False, steps=3, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(dtype)
    optimizer = kind(model.named_parameters() if named else model.parameters(), lr=0.01, **options)
    for _ in range(steps):
        model(torch.randn(8, 4, dtype=dtype)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_scales_as_torch_steps(kind, amsgrad):
    """With m = g and v held (beta1 = 0, v so large that one gradient does not move it), torch's own step is lr P g."""
    options = {"amsgrad": amsgrad, "betas": (0.0, 0.999), "weight_decay": 0.0, "eps": 1e-3}
    model, optimizer = trained(kind, dtype=torch.float64, **options)
    for state in optimizer.state.values():
        state["step"].fill_(1e6)  # bias corrections are one
        state["exp_avg_sq"].mul_(1e8)
        if amsgrad:
            state["max_exp_avg_sq"].mul_(1e8)
    parameters = dict(model.named_parameters())
    adam = Adam()
    adam.prepare(parameters, optimizer)
    gradients = {name: torch.randn_like(p) for name, p in parameters.items()}
    scaled = {name: adam.apply(name, g[None].clone())[0] for name, g in gradients.items()}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for name, p in parameters.items():
        p.grad = gradients[name]
    optimizer.step()
    for name, p in parameters.items():
        torch.testing.assert_close(before[name] - p.detach(), 0.01 * scaled[name], rtol=2e-3, atol=0)


def test_bias_correction():
    model, optimizer = trained(steps=2, betas=(0.9, 0.99), eps=1e-8)
    parameters = dict(model.named_parameters())
    moment = read_adam(optimizer, parameters)["0.weight"]
    state = optimizer.state[model[0].weight]
    assert moment.step == 2
    torch.testing.assert_close(moment.denominator(), (state["exp_avg_sq"] / (1 - 0.99**2)).sqrt() + 1e-8)


def saved_forms(model, optimizer):
    """The state dict of an optimizer that knows names, and the one keyed by names that checkpoints hold."""
    by_index = optimizer.state_dict()
    names = [name for name, _ in model.named_parameters()]
    by_name = {
        "state": {names[index]: value for index, value in by_index["state"].items()},
        "param_groups": [
            {**group, "params": [names[i] for i in group["params"]]} for group in by_index["param_groups"]
        ],
    }
    prefixed = {
        "state": {f"_orig_mod.{name}": value for name, value in by_name["state"].items()},
        "param_groups": [{**g, "params": [f"_orig_mod.{n}" for n in g["params"]]} for g in by_name["param_groups"]],
    }
    return {"param_names": by_index, "by name": by_name, "of a compiled model": prefixed}


@pytest.mark.parametrize("form", ["param_names", "by name", "of a compiled model"])
def test_saved_states_with_names(form):
    model, optimizer = trained(named=True)
    parameters = dict(model.named_parameters())
    live = read_adam(optimizer, parameters)
    for name, moment in read_adam(saved_forms(model, optimizer)[form], parameters).items():
        assert torch.equal(moment.v, live[name].v)
        assert (moment.step, moment.beta2, moment.eps, moment.lr) == (3.0, 0.999, 1e-8, 0.01)


def test_matched_by_name_and_not_by_position():
    model, optimizer = trained(named=True)
    saved = optimizer.state_dict()
    group = saved["param_groups"][0]
    shuffled = [2, 0, 3, 1]
    group["params"] = [group["params"][i] for i in shuffled]
    group["param_names"] = [group["param_names"][i] for i in shuffled]
    live = read_adam(optimizer, dict(model.named_parameters()))
    for name, moment in read_adam(saved, dict(model.named_parameters())).items():
        assert torch.equal(moment.v, live[name].v), name


def engine(model, optimizer):
    made = InfluenceEngine(model, ["x"], ["a"], optimizer=optimizer)
    with made.task("a"):
        model(torch.ones(3, 4)).sum().backward()
    with made.domains("x"):
        model(torch.ones(3, 4)).sum().backward()
    return made


def test_refusals():
    model, optimizer = trained()
    with pytest.raises(ValueError, match="keyed by index and carries no names"):
        engine(model, optimizer.state_dict())
    fresh, untouched = trained(steps=0)
    with pytest.raises(ValueError, match=r"no 'exp_avg_sq' for '0.weight': take at least one optimizer step"):
        engine(fresh, untouched)
    with pytest.raises(ValueError, match="needs optimizer="):
        engine(model, None)
    with pytest.raises(TypeError, match="got SGD"):
        engine(model, torch.optim.SGD(model.parameters(), lr=0.1))
    other, _ = trained()
    with pytest.raises(ValueError, match=r"does not hold '0.weight'.*another model"):
        engine(other, optimizer)
    partial = torch.optim.AdamW(model[0].parameters())
    partial.state.update({p: optimizer.state[p] for p in model[0].parameters()})
    with pytest.raises(ValueError, match=r"does not hold '1.weight', '1.bias'"):
        engine(model, partial)
    named, with_names = trained(named=True)
    foreign = with_names.state_dict()
    foreign["state"][0]["exp_avg_sq"] = torch.zeros(7, 7)
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(7, 7\).*another model"):
        engine(named, foreign)
    with pytest.raises(ValueError, match="'state' and 'param_groups'"):
        engine(model, {"model": 1})
    climbing = torch.optim.AdamW(model.parameters(), maximize=True)
    climbing.state.update(optimizer.state)
    with pytest.raises(ValueError, match="maximises"):
        engine(model, climbing)


def test_the_optimizer_is_only_read():
    model, optimizer = trained()
    before = {
        k: {n: torch.as_tensor(v).clone() for n, v in s.items()} for k, s in optimizer.state_dict()["state"].items()
    }
    engine(model, optimizer)
    for key, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), before[key][name])


def test_equal_rates_of_zero_cancel():
    model, optimizer = trained()
    expected = engine(model, optimizer).matrix().values
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert (engine(model, optimizer).matrix().values == expected).all()


def test_a_preconditioner_of_ones_own():
    class Doubled:
        name = "doubled"

        def prepare(self, parameters, optimizer):
            self.seen = set(parameters)

        def apply(self, name, gradients):
            return 2 * gradients

    model, _ = trained()
    assert isinstance(Doubled(), Preconditioner)
    values = {}
    for choice in ("identity", Doubled()):
        made = InfluenceEngine(model, ["x"], ["a"], preconditioner=choice)
        with made.task("a"):
            model(torch.ones(3, 4)).sum().backward()
        with made.domains("x"):
            model(torch.ones(3, 4)).sum().backward()
        values[made.preconditioner.name] = made.matrix().values[0, 0]
    assert values["doubled"] == pytest.approx(2 * values["identity"])


def test_canonical_name():
    assert canonical_name("a._orig_mod.b") == "a.b"
    assert canonical_name("weight") == "weight"
