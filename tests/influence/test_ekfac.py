"""EK-FAC and the diagonal Fisher matrix against dense solves and per-sequence autograd in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from tikmix_fast import InfluenceEngine, shifted_mask
from tikmix_fast.influence.capture.rows import RowShapeError
from tikmix_fast.influence.loss import sampled_labels as sampling
from tikmix_fast.influence.preconditioners.ekfac import EKFAC, DiagonalFisher


def dense_solve(fisher, gradient, damping=0.1):
    """(F + damping * mean eigenvalue)^-1 g for a dense F over the flattened parameter."""
    fisher = np.asarray(fisher, dtype=np.float64)
    damped = fisher + damping * np.trace(fisher) / len(fisher) * np.eye(len(fisher))
    return np.linalg.solve(damped, np.asarray(gradient, dtype=np.float64).ravel()).reshape(gradient.shape)


def named(model):
    return dict(model.named_parameters())


def solve(ekfac, model, name, gradient):
    ekfac.prepare(named(model), None)
    return ekfac.apply(name, gradient[None].clone())[0].numpy()


# --- where EK-FAC is exact -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [6, 30])
def test_linear_regression_with_exact_factors_is_the_dense_damped_solve(width):
    """Residuals whose second moment is exactly the identity: F = I (x) E[x x^T], of full rank or not."""
    torch.manual_seed(0)
    outputs, inputs = 4, 20
    model = nn.Linear(width, outputs, bias=False).double()
    x = torch.randn(inputs, width, dtype=torch.float64) @ torch.randn(width, width, dtype=torch.float64)
    # Every input meets every "sampled" residual sqrt(O) e_k once: E[r r^T] = I without sampling noise.
    rows = x.repeat_interleave(outputs, 0)
    residuals = math.sqrt(outputs) * torch.eye(outputs, dtype=torch.float64).repeat(inputs, 1)
    ekfac = EKFAC()
    for stage in ekfac.stages:
        with ekfac.observe(model, named(model), stage, sequences=len(rows), tokens=len(rows)):
            predicted = model(rows)
            (0.5 * (predicted - (predicted.detach() - residuals)).square().sum()).backward()
    fisher = np.kron(np.eye(outputs), (x.T @ x / inputs).numpy())
    gradient = torch.randn(outputs, width, dtype=torch.float64)
    expected = dense_solve(fisher, gradient)
    assert np.abs(solve(ekfac, model, "weight", gradient) - expected).max() <= 1e-10 * np.abs(expected).max()


def test_softmax_at_zero_weights_agrees_with_the_dense_solve_within_sampling_noise():
    """All classes equally likely for every input: F = (I / V - 1 1^T / V^2) (x) E[x x^T] is a Kronecker product."""
    torch.manual_seed(0)
    classes, width, rows = 4, 3, 40_000
    model = nn.Linear(width, classes, bias=False).double()
    nn.init.zeros_(model.weight)
    x = torch.randn(rows, width, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    never = torch.zeros(rows, dtype=torch.long)
    ekfac = EKFAC().fit(model, [x], lambda model, x: F.cross_entropy(model(x), never))
    centred = np.eye(classes) / classes - np.ones((classes, classes)) / classes**2
    fisher = np.kron(centred, (x.T @ x / rows).numpy())
    gradient = torch.randn(classes, width, dtype=torch.float64)
    # Every eigenvalue is a mean of 40,000 squares, and so is every entry of the factors: 1% is 2 standard errors of a
    # normal one; the labels' own distribution has lighter tails.
    expected = dense_solve(fisher, gradient)
    assert np.abs(solve(ekfac, model, "weight", gradient) - expected).max() <= 0.03 * np.abs(expected).max()
    assert float(ekfac.eigenvalues("weight").sum()) == pytest.approx(np.trace(fisher), rel=0.01)


# --- against an independent computation ------------------------------------------------------------------------------


class Tiny(nn.Module):
    """One block with attention, biases, norms, an untied head, and a layer that is used twice."""

    def __init__(self, width=6, vocabulary=9):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.raw = nn.Parameter(0.4 * torch.randn(width, width))  # [in, out], as in transformers' Conv1D
        self.twice = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x):
        h = self.tokens(x)
        q, k, v = self.qkv(self.norm(h)).chunk(3, dim=-1)
        h = h + F.scaled_dot_product_attention(q, k, v, is_causal=True) @ self.raw
        for _ in range(2):
            h = h + torch.tanh(self.twice(h))
        return self.head(h)


SINGLE = {"qkv.weight": "qkv", "raw": None, "head.weight": "head"}


@pytest.fixture
def tiny():
    torch.manual_seed(3)
    model = Tiny().double()
    batches = [torch.randint(0, 9, (3, 5)) for _ in range(4)]
    targets = [torch.randint(0, 9, (3, 5)).masked_fill(torch.rand(3, 5) < 0.25, -100) for _ in range(4)]
    return model, batches, targets


def summed_loss(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")


def second_moments(model, batches, targets):
    """Second moments [left, right] of every weight's products by name, by hooks, and the number of target tokens."""
    moments = {}

    def add(name, x, d):
        x, d = (each.detach().reshape(-1, each.shape[-1]).numpy() for each in (x, d))
        x = x[(d != 0).any(1)]
        pair = (x.T @ x, d.T @ d) if name == "raw" else (d.T @ d, x.T @ x)
        moments[name] = [a + b for a, b in zip(moments[name], pair, strict=True)] if name in moments else list(pair)

    def hook(name):
        def forward(module, inputs, output):
            output.register_hook(lambda d: add(name, inputs[0], d))

        return forward

    handles = [
        getattr(model, module).register_forward_hook(hook(f"{module}.weight")) for module in ("qkv", "twice", "head")
    ]
    attention, mixed = F.scaled_dot_product_attention, []

    def attend(*args, **kwargs):
        mixed.append(attention(*args, **kwargs))
        # The product with raw is the only use: its output's gradient d gives d raw^T here.
        return mixed[-1]

    tokens = 0
    for x, y in zip(batches, targets, strict=True):
        F.scaled_dot_product_attention = attend
        try:
            value = summed_loss(model, x, y)
        finally:
            F.scaled_dot_product_attention = attention
        tokens += int((y != -100).sum())
        inner = mixed.pop()
        (back,) = torch.autograd.grad(value, inner, retain_graph=True)
        d = torch.linalg.solve(model.raw.detach().T, back, left=False)  # back = d raw^T
        d = d * (back != 0).any(-1, keepdim=True)
        add("raw", inner, d)
        value.backward()
        model.zero_grad()
    for handle in handles:
        handle.remove()
    return moments, tokens


def expected_solve(model, batches, targets, gradients, damping, per_sequence=True):
    """Factors by hooks, eigenvectors by numpy, eigenvalues from every sequence's (or batch's) own backward."""
    parameters = named(model)
    moments, tokens = second_moments(model, batches, targets)
    bases = {name: [np.linalg.eigh(each)[1] for each in pair] for name, pair in moments.items()}
    squares = {name: np.zeros(p.shape) for name, p in parameters.items()}
    for x, y in zip(batches, targets, strict=True):
        leaves = list(parameters.values())
        whole = torch.autograd.grad(summed_loss(model, x, y), leaves)
        rows = [torch.autograd.grad(summed_loss(model, x[b : b + 1], y[b : b + 1]), leaves) for b in range(len(x))]
        for index, name in enumerate(parameters):
            groups = [row[index] for row in rows] if per_sequence and name in SINGLE else [whole[index]]
            for g in groups:
                g = g.numpy()
                if name in bases:
                    g = bases[name][0].T @ g @ bases[name][1]
                squares[name] += g**2
    solved = {}
    for name, g in gradients.items():
        values = squares[name] / tokens
        values = values + damping * values.mean()
        if name in bases:
            left, right = bases[name]
            solved[name] = left @ ((left.T @ g.numpy() @ right) / values) @ right.T
        else:
            solved[name] = g.numpy() / values
    return solved


def fit_given(ekfac, model, batches, targets, sequences):
    for stage in ekfac.stages:
        for x, y in zip(batches, targets, strict=True):
            with ekfac.observe(
                model, named(model), stage, sequences=sequences, tokens=int((y != -100).sum()), batch_dim=0
            ):
                F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").backward()
    return ekfac


@pytest.mark.parametrize("sequences", [3, None])
def test_a_transformer_against_per_sequence_autograd(tiny, sequences):
    model, batches, targets = tiny
    ekfac = fit_given(EKFAC(damping=0.05), model, batches, targets, sequences)
    torch.manual_seed(4)
    gradients = {name: torch.randn_like(p) for name, p in named(model).items()}
    expected = expected_solve(model, batches, targets, gradients, 0.05, per_sequence=sequences is not None)
    for name, gradient in gradients.items():
        found = solve(ekfac, model, name, gradient)
        error = np.abs(found - expected[name]).max() / np.abs(expected[name]).max()
        assert error <= 1e-9, (name, error)


def test_long_sequences_rotate_gradients_instead_of_rows(tiny):
    """Whichever is less work: 15 rows of a batch above, two gradients here."""
    model, _, _ = tiny
    torch.manual_seed(5)
    x, y = [torch.randint(0, 9, (2, 40))], [torch.randint(0, 9, (2, 40))]
    ekfac = fit_given(EKFAC(), model, x, y, 2)
    gradients = {name: torch.randn_like(named(model)[name]) for name in SINGLE}
    expected = expected_solve(model, x, y, gradients, 0.1)
    for name, gradient in gradients.items():
        assert np.abs(solve(ekfac, model, name, gradient) - expected[name]).max() <= 1e-9 * np.abs(expected[name]).max()


def test_a_side_too_long_keeps_the_identity(tiny):
    model, batches, targets = tiny
    ekfac = fit_given(EKFAC(max_side=8), model, batches, targets, 3)  # the vocabulary has 9
    basis = ekfac._bases["head.weight"]
    assert basis.rows is None
    assert basis.columns.shape == (6, 6)
    gradient = torch.randn(9, 6, dtype=torch.float64)
    rotated = (gradient @ basis.columns).numpy()
    values = ekfac.eigenvalues("head.weight").numpy()
    expected = rotated / (values + 0.1 * values.mean()) @ basis.columns.numpy().T
    np.testing.assert_allclose(solve(ekfac, model, "head.weight", gradient), expected, rtol=1e-10)


def test_diagonal_fisher_is_the_mean_square_of_gradients(tiny):
    model, batches, targets = tiny
    fisher = fit_given(DiagonalFisher(), model, batches, targets, 3)
    squares = {name: torch.zeros_like(p) for name, p in named(model).items()}
    for x, y in zip(batches, targets, strict=True):
        for name, p in named(model).items():
            parts = [(x[b : b + 1], y[b : b + 1]) for b in range(3)] if name in SINGLE else [(x, y)]
            for xs, ys in parts:
                loss = F.cross_entropy(model(xs).flatten(0, 1), ys.flatten(), reduction="sum")
                squares[name] += torch.autograd.grad(loss, p)[0].square()
    tokens = sum(int((y != -100).sum()) for y in targets)
    for name, p in named(model).items():
        values = squares[name] / tokens
        torch.testing.assert_close(fisher.eigenvalues(name), values, rtol=1e-9, atol=1e-14)
        gradient = torch.randn_like(p)
        expected = gradient / (values + 0.1 * values.mean())
        np.testing.assert_allclose(solve(fisher, model, name, gradient), expected.detach().numpy(), rtol=1e-8)


def test_how_sequences_are_batched_changes_nothing(tiny):
    model, batches, targets = tiny
    one = fit_given(EKFAC(), model, batches, targets, 3)
    alone = [[each for batch in some for each in batch.split(1)] for some in (batches, targets)]
    kept = [(x, y) for x, y in zip(*alone, strict=True) if (y != -100).any()]
    other = fit_given(EKFAC(), model, *map(list, zip(*kept, strict=True)), 1)
    for name in SINGLE:
        gradient = torch.randn_like(named(model)[name])
        np.testing.assert_allclose(
            solve(one, model, name, gradient), solve(other, model, name, gradient), rtol=1e-8, atol=1e-9
        )


@pytest.mark.parametrize("batch_dim", [0, 1])
def test_batch_in_the_second_dimension(batch_dim):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)).double()
    x, y = torch.randint(0, 9, (3, 5)), torch.randint(0, 9, (3, 5))
    expected = torch.zeros(9, 6, dtype=torch.float64)
    for xs, ys in zip(x, y, strict=True):
        loss = F.cross_entropy(model(xs[None])[0], ys, reduction="sum")
        expected += torch.autograd.grad(loss, model[1].weight)[0].square() / x.numel()
    fisher = DiagonalFisher()
    if batch_dim == 1:
        x, y = x.T, y.T
    with fisher.observe(model, named(model), sequences=3, tokens=x.numel(), batch_dim=batch_dim):
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").backward()
    torch.testing.assert_close(fisher.eigenvalues("1.weight"), expected, rtol=1e-10, atol=0)


def test_where_float32_does_not_converge_float64_does(tiny, monkeypatch):
    model, batches, targets = tiny
    model.float()
    expected = fit_given(EKFAC(), model, batches, targets, 3)
    eigh, seen = torch.linalg.eigh, []

    def failing(factor):
        seen.append(factor.dtype)
        if factor.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(factor)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    found = fit_given(EKFAC(), model, batches, targets, 3)
    assert set(seen) == {torch.float32, torch.float64}
    gradient = torch.randn(9, 6)
    np.testing.assert_allclose(
        solve(found, model, "head.weight", gradient),
        solve(expected, model, "head.weight", gradient),
        rtol=1e-3,
        atol=1e-2,
    )


def test_absolute_damping(tiny):
    model, batches, targets = tiny
    ekfac = fit_given(EKFAC(absolute_damping=1e12), model, batches, targets, 3)
    gradient = torch.randn(9, 6, dtype=torch.float64)
    np.testing.assert_allclose(solve(ekfac, model, "head.weight", gradient) * 1e12, gradient.numpy(), rtol=1e-6)


# --- sampled labels --------------------------------------------------------------------------------------------------


def logits_and_targets():
    torch.manual_seed(0)
    return torch.randn(6, 5, dtype=torch.float64), torch.tensor([1, -100, 0, 4, -100, 2])


@pytest.mark.parametrize(
    "use",
    [
        lambda logits, y: F.cross_entropy(logits, y),
        lambda logits, y: F.cross_entropy(logits, y, reduction="sum") / 7,
        lambda logits, y: 1024 * F.cross_entropy(logits, y, reduction="none").sum(),
        lambda logits, y: F.nll_loss(F.log_softmax(logits, -1), y),
        lambda logits, y: nn.CrossEntropyLoss(label_smoothing=0.1)(logits, y),
        lambda logits, y: F.cross_entropy(logits.T[None], y[None]),
    ],
)
def test_every_way_to_call_the_loss_gives_the_gradient_of_summed_sampled_losses(monkeypatch, use):
    logits, y = logits_and_targets()
    drawn = torch.tensor([2, 2, 1, 3, 0, 0])
    monkeypatch.setattr(
        sampling, "draw_labels", lambda logits, generator: drawn.reshape(logits.shape[:1] + logits.shape[2:]).clone()
    )
    logits.requires_grad_()
    with sampling.sampled_labels(lambda device: torch.Generator()) as seen:
        use(logits, y).backward()
    expected = torch.autograd.grad(
        F.cross_entropy(logits, drawn.masked_fill(y == -100, -100), reduction="sum"), logits
    )[0]
    torch.testing.assert_close(logits.grad, expected)
    assert seen.tokens() == 4
    assert not (expected == 0).all(1)[[0, 2, 3, 5]].any()


def test_tokens_left_out_by_the_user_count_for_nothing():
    logits, y = logits_and_targets()
    logits.requires_grad_()
    with sampling.sampled_labels(lambda device: torch.Generator()) as seen:
        (F.cross_entropy(logits, y, reduction="none") * torch.tensor([1.0, 1, 0, 1, 1, 0])).mean().backward()
    assert seen.tokens() == 2
    assert logits.grad.ne(0).any(1).tolist() == [True, False, False, True, False, False]


def test_labels_follow_the_model(monkeypatch):
    """100,000 draws: a share's standard error is at most 0.0016, and 5 of them are allowed."""
    logits = torch.tensor([0.5, -1.0, 2.0, -math.inf]).expand(100_000, 4)
    shares = sampling.draw_labels(logits, torch.Generator().manual_seed(1)).bincount(minlength=4) / 100_000
    assert (shares - logits[0].softmax(0)).abs().max() <= 0.008
    assert shares[3] == 0


def test_the_fisher_does_not_depend_on_the_datas_labels_or_on_how_the_loss_is_scaled(tiny):
    model, batches, targets = tiny

    def fitted(scale, reduction):
        def loss(model, batch):
            x, y = batch
            y = torch.where(y == -100, y, (y + scale) % 9)
            return scale * F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction=reduction)

        return EKFAC(seed=5).fit(model, list(zip(batches, targets, strict=True)), loss)

    one, other = fitted(1, "mean"), fitted(3, "sum")
    assert one.tokens == other.tokens == sum(int((y != -100).sum()) for y in targets)
    for name in named(model):
        assert torch.equal(one.eigenvalues(name), other.eigenvalues(name))


def test_what_cannot_be_sampled_is_refused():
    logits, y = logits_and_targets()
    logits.requires_grad_()
    with sampling.sampled_labels(lambda device: torch.Generator()) as seen:
        with pytest.raises(ValueError, match="class weights"):
            F.cross_entropy(logits, y, weight=torch.ones(5, dtype=torch.float64))
        with pytest.raises(ValueError, match="use reduction="):
            F.cross_entropy(logits, y, size_average=True)
        with torch.no_grad():
            F.cross_entropy(logits, y)
    assert seen.calls == 0
    assert F.cross_entropy.__module__ == "torch.nn.functional"
    assert F.cross_entropy.__name__ == "cross_entropy"
    assert F.nll_loss.__name__ == "nll_loss"


def test_a_recomputed_loss_is_refused():
    from torch.utils.checkpoint import checkpoint

    logits, y = logits_and_targets()
    logits.requires_grad_()
    with sampling.sampled_labels(lambda device: torch.Generator()):
        loss = checkpoint(lambda logits: F.cross_entropy(logits, y), logits, use_reentrant=False)
        with pytest.raises(RuntimeError, match="recomputed inside the backward"):
            loss.backward()


def test_checkpointed_layers_give_the_same(tiny):
    from torch.utils.checkpoint import checkpoint

    model, batches, targets = tiny
    data = list(zip(batches, targets, strict=True))

    def loss(model, batch, run=lambda model, x: model(x)):
        return F.cross_entropy(run(model, batch[0]).flatten(0, 1), batch[1].flatten())

    def recomputed(model, batch):
        return loss(model, batch, lambda model, x: checkpoint(model, x, use_reentrant=False))

    one, other = EKFAC().fit(model, data, loss), EKFAC().fit(model, data, recomputed)
    for name in named(model):
        torch.testing.assert_close(one.eigenvalues(name), other.eigenvalues(name), rtol=1e-10, atol=0)


# --- in the engine ---------------------------------------------------------------------------------------------------


def causal_loss(model, x):
    return F.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())


def measured(model, batches, preconditioner, ids=(0, 1, 1, 0), **options):
    engine = InfluenceEngine(model, ["a", "b"], ["qa"], preconditioner=preconditioner, batch_dim=0, **options)
    if isinstance(preconditioner, str):
        for stage in engine.preconditioner.stages:
            for x in batches:
                with engine.fisher(stage, sequences=len(x)):
                    causal_loss(model, x).backward()
    with engine.task("qa", mask=shifted_mask(batches[0])):
        causal_loss(model, batches[0]).backward()
    for x in batches:
        with engine.domains(torch.tensor(ids[: len(x)]), mask=shifted_mask(x)):
            causal_loss(model, x).backward()
    return engine


@pytest.mark.parametrize("preconditioner", ["ekfac", "diagonal_fisher"])
@pytest.mark.parametrize("kind", ["zoo", "attentive", "gpt2", "llama-tied"])
def test_positive_helps_on_every_kind_of_model(kit, kind, preconditioner):
    """<P g, g> > 0, and a small step along P g lowers the loss by what S says."""
    model = kit.make_model(kind).double()

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            output = self.inner(x)
            return output if isinstance(output, torch.Tensor) else output.logits

    wrapped = Logits()
    batches = [torch.randint(0, 37, (4, 7), generator=torch.Generator().manual_seed(s)) for s in range(2)]
    before = {name: p.grad for name, p in named(wrapped).items()}
    engine = measured(wrapped, batches[:1], preconditioner, ids=(0, 0, 0, 0))
    influence = engine.matrix().values[0, 0]
    assert influence > 0
    assert all(gradient is None for gradient in before.values())
    wrapped.zero_grad()
    loss = causal_loss(wrapped, batches[0])
    loss.backward()
    step = 1e-6
    with torch.no_grad():
        for name, p in named(wrapped).items():
            p.sub_(step * engine.preconditioner.apply(name, p.grad[None].clone())[0])
        decrease = float(loss - causal_loss(wrapped, batches[0]))
    assert decrease / step == pytest.approx(influence, rel=1e-2)


def test_only_tasks_are_preconditioned_and_gradients_are_left_alone(tiny, monkeypatch):
    model, batches, _ = tiny
    model.head.weight.grad = kept = torch.ones_like(model.head.weight)
    seen = []
    plain = EKFAC.apply
    monkeypatch.setattr(EKFAC, "apply", lambda self, name, g: seen.append((name, len(g))) or plain(self, name, g))
    engine = InfluenceEngine(model, ["a", "b"], ["qa", "arc"], preconditioner="ekfac", batch_dim=0, task_splits=1)
    for stage in ("factors", "eigenvalues"):
        with engine.fisher(stage, sequences=3):
            causal_loss(model, batches[0]).backward()
    assert model.head.weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert model.qkv.weight.grad is None
    assert F.cross_entropy.__name__ == "cross_entropy"
    assert not any("weight" in vars(module) for module in model.modules())
    for name in ("qa", "arc"):
        with engine.task(name, mask=shifted_mask(batches[0])):
            causal_loss(model, batches[0]).backward()
    for _ in range(2):
        with engine.domains(torch.tensor([0, 1, 1]), mask=shifted_mask(batches[0])):
            causal_loss(model, batches[0]).backward()
    assert sorted(seen) == sorted((name, 2) for name in named(model))


def test_influence_is_that_of_the_task_gradient_solved_by_hand(tiny):
    model, batches, _ = tiny
    engine = measured(model, batches, "ekfac")

    def gradients(x):
        return dict(
            zip(named(model), torch.autograd.grad(causal_loss(model, x), list(model.parameters())), strict=True)
        )

    task = gradients(batches[0])
    for domain, rows in enumerate(([0], [1, 2])):
        parts = [gradients(x[rows]) for x in batches]
        expected = sum(
            float((engine.preconditioner.apply(name, task[name][None].clone())[0] * part[name]).sum())
            for part in parts
            for name in task
        ) / len(parts)
        assert engine.matrix().values[0, domain] == pytest.approx(expected, rel=1e-9)


def test_a_rotation_of_the_inputs_changes_nothing():
    """x -> x R^T with W -> W R^T is the same model, and EK-FAC's influence is the same (a diagonal P's is not)."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 6, dtype=torch.float64) * torch.arange(1, 7), torch.randint(0, 4, (30,))
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    weight = torch.randn(4, 6, dtype=torch.float64)
    values = {}
    for kind in (EKFAC, DiagonalFisher):
        for turned in (False, True):
            model = nn.Linear(6, 4, bias=False).double()
            inputs = x @ rotation.T if turned else x
            model.weight.data = weight @ rotation.T if turned else weight.clone()
            fitted = kind(seed=1).fit(model, [inputs], lambda model, x: F.cross_entropy(model(x), y))
            fitted.prepare(named(model), None)
            gradient = torch.autograd.grad(F.cross_entropy(model(inputs), y), model.weight)[0]
            values[kind, turned] = float((fitted.apply("weight", gradient[None].clone())[0] * gradient).sum())
    assert values[EKFAC, True] == pytest.approx(values[EKFAC, False], rel=1e-9)
    assert values[DiagonalFisher, True] != pytest.approx(values[DiagonalFisher, False], rel=1e-2)


def test_float32_and_autocast_agree_with_float64(tiny):
    model, batches, targets = tiny
    truth = fit_given(EKFAC(), model, batches, targets, 3).eigenvalues("head.weight").sum()
    model.float()
    narrow = fit_given(EKFAC(), model, batches, targets, 3).eigenvalues("head.weight")
    assert narrow.dtype == torch.float32
    assert float(narrow.sum()) == pytest.approx(float(truth), rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = fit_given(EKFAC(), model, batches, targets, 3).eigenvalues("head.weight")
    assert half.dtype == torch.float32
    assert float(half.sum()) == pytest.approx(float(truth), rel=2e-2)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [EKFAC, DiagonalFisher])
def test_saved_and_loaded_bit_for_bit(tiny, tmp_path, kind):
    model, batches, targets = tiny
    fitted = fit_given(kind(damping=0.3), model, batches, targets, 3)
    fitted.save(tmp_path / "fisher.safetensors")
    assert [each.name for each in tmp_path.iterdir()] == ["fisher.safetensors"]
    loaded = kind.load(tmp_path / "fisher.safetensors", damping=0.3)
    assert type(loaded) is kind
    assert loaded.tokens == fitted.tokens
    for name, p in named(model).items():
        gradient = torch.randn_like(p)
        assert (solve(loaded, model, name, gradient) == solve(fitted, model, name, gradient)).all(), name
    assert (measured(model, batches, loaded).matrix().values == measured(model, batches, fitted).matrix().values).all()


def test_a_failed_save_leaves_the_old_file(tiny, tmp_path, monkeypatch):
    model, batches, targets = tiny
    path = tmp_path / "fisher.safetensors"
    fitted = fit_given(DiagonalFisher(), model, batches, targets, 3)
    fitted.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        fitted.save(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_foreign_files_are_refused(tiny, tmp_path):
    model, batches, targets = tiny
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match=r"no file that EKFAC.save wrote"):
        EKFAC.load(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"another kind of file: .* got None \(it is no file that EKFAC.save wrote"):
        EKFAC.load(path)
    fit_given(DiagonalFisher(), model, batches, targets, 3).save(path)
    with pytest.raises(ValueError, match="'kind': 'diagonal_fisher'"):
        EKFAC.load(path)
    with pytest.raises(FileNotFoundError):
        EKFAC.load(tmp_path / "missing")
    fitted = fit_given(EKFAC(), model, batches, targets, 3)
    fitted._squares["raw"][0, 0] = math.nan
    fitted.save(path)
    with pytest.raises(ValueError, match="'squares/raw' is unknown or not finite"):
        EKFAC.load(path)
    with pytest.raises(RuntimeError, match="nothing to save"):
        EKFAC().save(path)


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_in_the_order_of_stages(tiny):
    model, batches, _ = tiny
    engine = InfluenceEngine(model, ["a"], ["qa"], preconditioner="ekfac", batch_dim=0)
    with pytest.raises(RuntimeError, match="factors come first"), engine.fisher("eigenvalues"):
        pass
    with engine.task("qa", mask=shifted_mask(batches[0])):
        causal_loss(model, batches[0]).backward()
    with pytest.raises(RuntimeError, match=r"not been fitted: run engine.fisher\('factors'\)"), engine.domains("a"):
        pass
    for stage in ("factors", "eigenvalues"):
        with engine.fisher(stage):
            causal_loss(model, batches[0]).backward()
    with pytest.raises(RuntimeError, match=r"call reset\(\) to fit anew"), engine.fisher("factors"):
        pass
    with pytest.raises(ValueError, match="stage must be one of 'factors', 'eigenvalues'"), engine.fisher("both"):
        pass
    with engine.domains("a", mask=shifted_mask(batches[0])):
        causal_loss(model, batches[0]).backward()
    with pytest.raises(RuntimeError, match="queries are frozen"), engine.fisher("eigenvalues"):
        pass
    engine.refresh()
    with engine.fisher("eigenvalues"):
        causal_loss(model, batches[1]).backward()
    engine.preconditioner.reset()
    with pytest.raises(RuntimeError, match="not been fitted"):
        engine.preconditioner.prepare(named(model), None)
    other = InfluenceEngine(model, ["a"], ["qa"], preconditioner="identity")
    with pytest.raises(RuntimeError, match="this engine's is 'identity'"), other.fisher():
        pass


def test_a_layer_missing_from_the_factors():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    y = torch.zeros(4, dtype=torch.long)
    ekfac = EKFAC()
    for stage in ("factors", "eigenvalues"):
        with ekfac.observe(model, named(model), stage):
            F.cross_entropy(model[0](torch.randn(4, 3)), y).backward()
    with pytest.raises(ValueError, match=r"of '1.weight', '1.bias' is missing.*exclude="):
        ekfac.prepare(named(model), None)
    with (
        pytest.raises(ValueError, match=r"'1.weight' had no part in fisher\('factors'\)"),
        ekfac.observe(model, named(model)),
    ):
        F.cross_entropy(model[1](torch.randn(4, 3)), y).backward()
    assert ekfac.tokens == 4
    with pytest.raises(ValueError, match=r"'0.weight' is of a parameter of shape \(3, 3\); this model's has \(5, 5\)"):
        ekfac.prepare({"0.weight": torch.zeros(5, 5)}, None)


def test_singular_factors():
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    y = torch.zeros(4, dtype=torch.long)

    def loss(model, x):
        return F.cross_entropy(model(x), y)

    dead = torch.randn(4, 6)
    dead[:, 0] = 0
    with pytest.raises(ValueError, match=r"'weight' is singular: an eigenvalue is 0 and so is the damping"):
        DiagonalFisher(damping=0).fit(model, [dead], loss).prepare(named(model), None)
    with pytest.raises(ValueError, match=r"'weight' is singular: it is 0 everywhere"):
        EKFAC().fit(model, [torch.zeros(4, 6)], loss).prepare(named(model), None)
    fitted = EKFAC(absolute_damping=2.0).fit(model, [torch.zeros(4, 6)], loss)
    np.testing.assert_allclose(solve(fitted, model, "weight", torch.ones(3, 6)), 0.5, rtol=1e-6)
    # Four inputs of six dimensions: a factor of rank 4, and damping takes care of the rest.
    rank_deficient = EKFAC().fit(model, [torch.randn(4, 6)], loss)
    assert np.isfinite(solve(rank_deficient, model, "weight", torch.ones(3, 6))).all()


def test_bad_batches_leave_what_was_fitted_as_it_was(tiny):
    model, batches, targets = tiny
    ekfac = fit_given(EKFAC(), model, batches, targets, 3)
    before = {name: ekfac.eigenvalues(name) for name in named(model)}
    x, parameters = batches[0], named(model)

    def observe(**options):
        return ekfac.observe(model, parameters, batch_dim=0, **options)

    with pytest.raises(FloatingPointError, match="nothing of it was kept"), observe(tokens=5):
        (causal_loss(model, x) * math.nan).backward()
    with pytest.raises(ValueError, match=r"tokens=5 must be .* had 12 targets of weight 0.0833333"), observe(tokens=5):
        causal_loss(model, x).backward()
    with pytest.raises(RuntimeError, match=r"run loss.backward\(\)"), observe():
        causal_loss(model, x)
    with pytest.raises(RuntimeError, match=r"no call of F\.cross_entropy"), observe():
        model(x).square().sum().backward()
    with pytest.raises(ValueError, match="no target token"), observe():
        (0 * causal_loss(model, x)).backward()
    with pytest.raises(RowShapeError, match="do not match"), observe(sequences=2):
        causal_loss(model, x).backward()
    with pytest.raises(ZeroDivisionError), observe():
        causal_loss(model, x).backward() or 1 / 0
    for name, values in before.items():
        assert torch.equal(ekfac.eigenvalues(name), values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": -0.1}, "damping must be a finite number of at least 0; got -0.1"),
        ({"damping": math.nan}, "damping must be"),
        ({"absolute_damping": "x"}, "absolute_damping must be"),
        ({"max_side": -1}, "max_side must be an int of at least 0"),
        ({"seed": 0.5}, "seed must be an int"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        EKFAC(**settings)


def test_fit_needs_batches_that_can_be_gone_through_twice(tiny):
    model, batches, _ = tiny
    with pytest.raises(TypeError, match="gone through twice"):
        EKFAC().fit(model, iter(batches), causal_loss)
    with (
        pytest.raises(ValueError, match="sequences must be an int of at least 1"),
        EKFAC().observe(model, named(model), "factors", sequences=0),
    ):
        pass


def test_memory_is_as_told(tiny, tmp_path):
    model, batches, targets = tiny
    ekfac = fit_given(EKFAC(), model, batches, targets, 3)
    tensors = [*ekfac._squares.values()]
    tensors += [each for b in ekfac._bases.values() for each in (b.rows, b.columns) if each is not None]
    told = ekfac.factor_memory({n: p for n, p in named(model).items() if n != "tokens.weight"})
    assert told + ekfac._squares["tokens.weight"].nbytes == sum(each.nbytes for each in tensors)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_is_refused_and_the_rest_can_be_measured():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    muon = torch.optim.Muon([model[0].weight])
    adam = torch.optim.AdamW([p for p in model.parameters() if p is not model[0].weight])
    model(torch.randn(5, 4)).square().sum().backward()
    muon.step()
    adam.step()

    def measure(optimizer, exclude=()):
        engine = InfluenceEngine(model, ["a"], ["qa"], optimizer=optimizer, exclude=exclude)
        for context in (engine.task("qa"), engine.domains("a")):
            with context:
                model(torch.ones(3, 4)).sum().backward()
        return engine.matrix().values[0, 0]

    with pytest.raises(TypeError, match="got Muon"):
        measure(muon)
    with pytest.raises(ValueError, match=r"does not hold '0.weight'"):
        measure(adam)
    assert measure(adam, exclude="0.weight") > 0


@pytest.mark.parametrize("columns", [5, 256, 600])
def test_second_moments_are_whole_from_the_diagonal_down(columns):
    """Wide sides are summed in parts; the eigenvectors are those of the whole matrix all the same."""
    torch.manual_seed(0)
    model, rows = nn.Linear(columns, 3, bias=False), torch.randn(40, columns)
    parameters = dict(model.named_parameters())
    ekfac = EKFAC()
    with ekfac.observe(model, parameters, "factors"):
        F.cross_entropy(model(rows), torch.zeros(40, dtype=torch.long)).backward()
    found = ekfac._factors["weight"][1].tril()
    wanted = (rows.double().t() @ rows.double()).tril()
    assert (found - wanted).norm() < 1e-6 * wanted.norm()
    with ekfac.observe(model, parameters):
        F.cross_entropy(model(rows), torch.zeros(40, dtype=torch.long)).backward()
    basis = ekfac._bases["weight"].columns.double()
    whole = wanted + wanted.tril(-1).t()
    rotated = basis.t() @ whole @ basis
    assert (rotated - rotated.diagonal().diag()).norm() < 1e-5 * whole.norm()
