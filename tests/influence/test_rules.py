"""Every way of writing an operation with a parameter, against a backward per row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tikmix_fast.influence.capture.capture import Capture
from tikmix_fast.influence.capture.rows import RowLabels
from tikmix_fast.influence.capture.views import ParameterView, UncapturedParameterError
from tikmix_fast.influence.passes.influence_sink import InfluenceSink

B, S, C = 5, 5, 6  # as many rows as positions: neither may pass for the other
IDS = torch.tensor([1, 0, 2, 1, 1])


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(C, C))
        self.b = nn.Parameter(torch.randn(C))
        self.scalar = nn.Parameter(torch.tensor(1.3))
        self.one = nn.Parameter(torch.randn(1))
        self.places = nn.Parameter(torch.randn(1, S, C))
        self.table = nn.Parameter(torch.randn(11, C))
        self.columns = nn.Parameter(torch.randn(S, 1))


POSITIONS = torch.arange(S)
FORMS = {
    "F.linear": lambda p, x: F.linear(x, p.w),
    "F.linear, bias": lambda p, x: F.linear(x, p.w, p.b),
    "F.linear, keywords": lambda p, x: F.linear(input=x, weight=p.w, bias=p.b),
    "F.linear, bias only": lambda p, x: F.linear(x, torch.eye(C), p.b),
    "F.linear, scaled weight": lambda p, x: F.linear(x, 2 * p.w.T),
    "F.linear, sliced": lambda p, x: F.linear(x[..., :3], p.w[:, 1:4], p.b),
    "F.linear, product of parameters": lambda p, x: F.linear(x, p.w * p.b * p.w),
    "matmul operator": lambda p, x: x @ p.w,
    "transposed": lambda p, x: x @ p.w.t(),
    "mT": lambda p, x: x @ p.w.mT,
    "torch.matmul, keywords": lambda p, x: torch.matmul(input=x, other=p.w),
    "torch.mm": lambda p, x: torch.mm(x.flatten(0, 1), p.w).view_as(x),
    "Tensor.mm, keyword": lambda p, x: x.flatten(0, 1).mm(mat2=p.w).view_as(x),
    "torch.addmm": lambda p, x: torch.addmm(p.b, x.flatten(0, 1), p.w).view_as(x),
    "torch.addmm, keywords": lambda p, x: torch.addmm(input=p.b, mat1=x.flatten(0, 1), mat2=p.w).view_as(x),
    "add": lambda p, x: x + p.b,
    "radd": lambda p, x: p.b + x,
    "in place": lambda p, x: (x * 1.0).add_(p.b).mul_(p.b),
    "augmented": lambda p, x: _augmented(p, x),
    "minus, over": lambda p, x: (x - p.b) / p.b.exp() - p.b,
    "from the left": lambda p, x: 1.0 / (3.0 + (p.b - x).square()),
    "scalar": lambda p, x: x * p.scalar + p.one,
    "torch.where": lambda p, x: torch.where(x > 0, x * p.b, p.b),
    "torch.addcmul": lambda p, x: torch.addcmul(p.b, x, p.b, value=0.5),
    "torch.lerp": lambda p, x: torch.lerp(x, p.b, torch.sigmoid(p.scalar)),
    "cast and one plus": lambda p, x: (x.double() * (1.0 + p.b.double())).float(),
    "softplus of a parameter": lambda p, x: x * F.softplus(p.b),
    "cumulated parameter": lambda p, x: x + p.b.cumsum(0),
    "positions": lambda p, x: x + p.places,
    "positions, sliced and reshaped": lambda p, x: x + p.places[0, :S].unsqueeze(0).repeat(1, 1, 1),
    "positions, picked": lambda p, x: x * p.places[0][POSITIONS.flip(0)],
    "columns": lambda p, x: x * p.columns,
    "expanded to the batch": lambda p, x: torch.cat([p.places[:, :1].expand(B, -1, -1), x], dim=1).cumsum(1)[:, 1:],
    "embedding of positions [S]": lambda p, x: x + F.embedding(POSITIONS, p.table),
    "embedding of positions [1, S]": lambda p, x: x * torch.tanh(F.embedding(POSITIONS[None], p.table)),
    "embedding of positions, padded": lambda p, x: x + F.embedding(POSITIONS, p.table, padding_idx=2),
    "embedding of positions through a norm": lambda p, x: x + F.layer_norm(F.embedding(POSITIONS, p.table), (C,)),
    "embedding of positions through a layer": lambda p, x: x + F.linear(F.embedding(POSITIONS, p.table), p.w, p.b),
    "relative positions": lambda p, x: x + F.embedding(POSITIONS[:4, None] - POSITIONS + 5, p.table).sum(0),
    "embedding [B, S]": lambda p, x: x * F.embedding(x.detach().argsort(-1)[..., 0], p.table, padding_idx=-11),
    "layer_norm": lambda p, x: F.layer_norm(x, (C,), p.b, p.b * 2),
    "layer_norm, weight only": lambda p, x: F.layer_norm(x, (C,), weight=p.b, eps=1e-3),
    "layer_norm, bias only": lambda p, x: F.layer_norm(x, [C], None, p.b),
    "addmm to rows": lambda p, x: torch.addmm(x.flatten(0, 1), x.flatten(0, 1), p.w).view_as(x),
    "layer_norm over two": lambda p, x: F.layer_norm(x[:, None], (S, C), p.places[0])[:, 0],
    "rms_norm": lambda p, x: F.rms_norm(x, (C,), p.b),
    "rms_norm, eps": lambda p, x: F.rms_norm(x, (C,), p.b + 1, eps=1e-2),
    "per head": lambda p, x: (x.unflatten(-1, (2, 3)) * p.b[:3]).flatten(-2),
    "chunks": lambda p, x: x * p.b.chunk(2)[0].repeat(2) + p.b.split(2)[1].sum(),
    "stacked parameters": lambda p, x: x @ torch.cat([p.w[:3], p.w[3:] * 2]),
}


def _augmented(p, x):
    y = x * 1.0
    y += p.b
    y *= p.b
    return y


def objective(form, p, x):
    out = form(p, x)
    return torch.tanh(out).flatten(1).pow(2).sum(1)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "ordinary"])
@pytest.mark.parametrize("ids", [IDS, torch.full((B,), 2)], ids=["mixed", "one-domain"])
@pytest.mark.parametrize("name", FORMS)
def test_form(name, ids, fused):
    form, holder = FORMS[name], Holder()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, S, C, generator=generator, requires_grad=True)
    parameters = dict(holder.named_parameters())
    queries = {key: torch.randn(2, *value.shape, generator=generator) for key, value in parameters.items()}

    expected = torch.zeros(2, 3, dtype=torch.float64)
    losses = objective(form, holder, x)
    for row, domain in enumerate(ids):
        gradients = torch.autograd.grad(
            losses[row], list(parameters.values()), retain_graph=True, materialize_grads=True
        )
        for query, gradient in zip(queries.values(), gradients, strict=True):
            expected[:, domain] += (query.double() * gradient.double()).reshape(2, -1).sum(1)
    plain = torch.autograd.grad(losses.sum(), [x, *parameters.values()], materialize_grads=True)

    sink = InfluenceSink(RowLabels(ids, 3, batch_dim=0, length=S), queries)
    with Capture(holder, parameters, sink, fused).open():
        losses = objective(form, holder, x)
        assert not isinstance(losses, ParameterView)
        losses.sum().backward()
    found = sum(sink.sums.values())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for value, gradient in zip([x, *parameters.values()], plain, strict=True):
        got = torch.zeros_like(gradient) if value.grad is None else value.grad
        torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "form",
    [
        lambda p, x: torch.einsum("bsc,cd->bsd", x, p.w),
        lambda p, x: F.bilinear(x, x, p.w[None]),
        lambda p, x: F.batch_norm(x.transpose(1, 2), None, None, p.b, p.b, training=True).transpose(1, 2),
        lambda p, x: F.group_norm(x.transpose(1, 2), 2, p.b),
        lambda p, x: p.w @ x.transpose(1, 2),
        lambda p, x: torch.addmm(p.b, x.flatten(0, 1), p.w, alpha=2.0).view_as(x),
        lambda p, x: x + F.embedding(POSITIONS, p.table, max_norm=1.0),
        lambda p, x: x + F.embedding(POSITIONS, p.table * 2),
        lambda p, x: x + F.embedding(POSITIONS[:, None] - POSITIONS + 5, p.table).sum(0),
        lambda p, x: F.embedding(POSITIONS, p.table).tanh().sum().backward(),
        lambda p, x: torch.cat([F.embedding(POSITIONS, p.table), x[0]]),
        lambda p, x: torch.cat([p.places.squeeze(0), x[0]])[None],
    ],
    ids=[
        "einsum",
        "bilinear",
        "batch_norm",
        "group_norm",
        "left factor",
        "alpha",
        "max_norm",
        "derived table",
        "relative positions where B = S",
        "flat rows",
        "positions in cat",
        "cat",
    ],
)
def test_other_forms_are_refused(form):
    holder = Holder()
    parameters = dict(holder.named_parameters())
    sink = InfluenceSink(
        RowLabels(IDS, 3, batch_dim=0, length=S), {k: torch.zeros(1, *v.shape) for k, v in parameters.items()}
    )
    x = torch.randn(B, S, C, requires_grad=True)
    with (
        Capture(holder, parameters, sink, True).open(),
        pytest.raises(UncapturedParameterError, match=r"cannot be captured.*exclude="),
    ):
        form(holder, x)


def test_views_pass_for_parameters():
    """What models ask of a parameter besides arithmetic gets the parameter's own answer."""
    holder = Holder()
    parameters = dict(holder.named_parameters())
    sink = InfluenceSink(RowLabels(0, 1), {})
    with Capture(holder, parameters, sink, True).open():
        assert isinstance(holder.w, ParameterView)
        assert holder.w.shape == (C, C)
        assert holder.w.dtype == torch.float32
        assert holder.w.device == torch.device("cpu")
        assert holder.w.requires_grad
        assert holder.w.numel() == C * C
        assert holder.w.data_ptr() == parameters["w"].data_ptr()
        assert not isinstance(holder.w.detach(), ParameterView)
        assert [id(p) for p in holder.parameters()] == [id(p) for p in parameters.values()]
        assert list(holder.state_dict()) == list(parameters)
        with torch.no_grad():
            assert not isinstance(holder.w * 2, ParameterView)
    assert holder.w is parameters["w"]
