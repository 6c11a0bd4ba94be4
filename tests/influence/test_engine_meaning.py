"""The same data in other batches is the same influence; and S is what a small step does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from tikmix_fast import InfluenceEngine, shifted_mask

DOMAINS = ["x", "y", "z"]


@pytest.fixture(scope="module")
def rows(kit):
    """Sequences of different lengths, with their domains."""
    generator = torch.Generator().manual_seed(5)
    lengths = [9, 4, 7, 7, 12, 3, 8, 5]
    return [torch.randint(4, 30, (length,), generator=generator) for length in lengths], [0, 1, 2, 0, 1, 1, 2, 0]


def padded(kit, sequences, ids=None):
    x = pad_sequence(sequences, batch_first=True)
    labels = pad_sequence(sequences, batch_first=True, padding_value=-100)
    return kit.Batch(x, labels, None if ids is None else torch.tensor(ids))


def sum_loss(kit, model, batch):
    return kit.token_losses(model, batch.x, batch.labels).sum()


def engine_with_tasks(kit, model, task_rows, **options):
    engine = InfluenceEngine(
        model, domains=DOMAINS, tasks=["t"], **{"preconditioner": "identity", "check_every": 1, **options}
    )
    batch = padded(kit, task_rows)
    with engine.task("t", mask=shifted_mask(batch.labels)):
        kit.mean_loss(model, batch).backward()
    return engine


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_one_meaning_for_every_way_of_batching(kit, rows, kind):
    sequences, ids = rows
    found = {}

    def run(name, groups, loss_of, **options):
        model = kit.make_model(kind)
        reduction = options.pop("reduction", "mean")
        engine = InfluenceEngine(model, DOMAINS, ["t"], preconditioner="identity", reduction=reduction, check_every=1)
        batch = padded(kit, sequences[:3])
        with engine.task("t", mask=shifted_mask(batch.labels)):
            (sum_loss(kit, model, batch) if reduction == "sum" else kit.mean_loss(model, batch)).backward()
        for group in groups:
            batch = padded(kit, [sequences[r] for r in group], [ids[r] for r in group])
            mask = shifted_mask(batch.labels)
            with engine.domains(batch.ids, mask=mask, **{k: v(mask) for k, v in options.items()}):
                loss_of(model, batch).backward()
        found[name] = torch.as_tensor(engine.matrix().values)

    everything, pieces = [range(8)], [[0, 3], [1, 4, 5], [2], [6, 7]]
    mean = kit.mean_loss
    run("one padded batch", everything, mean)
    run("one sequence at a time", [[r] for r in range(8)], mean)
    run("micro-batches of different sizes", pieces, mean)
    run("another order", [[7, 2, 5], [1, 0], [6, 4, 3]], mean)
    run("reduction sum", pieces, lambda m, b: sum_loss(kit, m, b), reduction="sum")
    run(
        "mean over the accumulation, told by the normalizer",
        pieces,
        lambda m, b: mean(m, b) / 4,
        normalizer=lambda mask: 4.0 * int(mask.sum()),
    )
    run(
        "divided by the tokens of all micro-batches",
        pieces,
        lambda m, b: sum_loss(kit, m, b) / 47.0,
        normalizer=lambda mask: 47.0,
    )
    reference = found.pop("one sequence at a time")
    for name, values in found.items():
        torch.testing.assert_close(values, reference, rtol=2e-5, atol=2e-5 * float(reference.abs().max()), msg=name)


def test_grad_scaler(kit, rows):
    sequences, ids = rows
    batch = padded(kit, sequences, ids)
    plain, scaled = kit.make_model("gpt2"), kit.make_model("gpt2")
    engine = engine_with_tasks(kit, plain, sequences[:3])
    with engine.domains(batch.ids, mask=shifted_mask(batch.labels)):
        kit.mean_loss(plain, batch).backward()

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    other = InfluenceEngine(scaled, domains=DOMAINS, tasks=["t"], preconditioner="identity", check_every=1)
    task = padded(kit, sequences[:3])
    with other.task("t", mask=shifted_mask(task.labels), scaler=scaler):
        scaler.scale(kit.mean_loss(scaled, task)).backward()
    half = batch.labels.shape[0] // 2
    for part in (slice(0, half), slice(half, None)):
        piece = kit.Batch(batch.x[part], batch.labels[part], batch.ids[part])
        mask = shifted_mask(piece.labels)
        with other.domains(piece.ids, mask=mask, normalizer=2.0 * int(mask.sum()), scaler=scaler):
            scaler.scale(kit.mean_loss(scaled, piece) / 2).backward()
    values = torch.as_tensor(engine.matrix().values)
    torch.testing.assert_close(
        torch.as_tensor(other.matrix().values), values, rtol=1e-4, atol=1e-4 * float(values.abs().max())
    )


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_splits_of_a_task_do_not_change_its_influence(kit, rows, splits):
    sequences, ids = rows
    model = kit.make_model("gpt2")
    engine = InfluenceEngine(model, DOMAINS, ["t"], preconditioner="identity", task_splits=splits)
    for sequence in sequences[:5]:
        batch = padded(kit, [sequence])
        with engine.task("t", mask=shifted_mask(batch.labels)):
            kit.mean_loss(model, batch).backward()
    whole = engine_with_tasks(kit, model, sequences[:5])
    batch = padded(kit, sequences, ids)
    for each in (engine, whole):
        with each.domains(batch.ids, mask=shifted_mask(batch.labels)):
            kit.mean_loss(model, batch).backward()
    torch.testing.assert_close(
        torch.as_tensor(engine.matrix().values), torch.as_tensor(whole.matrix().values), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("preconditioner", ["identity", "adam"])
def test_a_small_step_lowers_the_loss_by_what_s_says(kit, preconditioner):
    """theta - lr P g_j, v frozen, every group with its own lr: task i's loss falls by lr S_ij, as lr shrinks."""
    model = kit.make_model("gpt2").double()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "lr": 2e-3}, {"params": vectors, "lr": 1e-3}], eps=1e-4)
    for seed in range(4):
        kit.mean_loss(model, kit.make_batch(seed, 32, 20)).backward()
        optimizer.step()
        optimizer.zero_grad()
    tasks = {name: [kit.make_batch(seed, 4, 12)] for name, seed in (("a", 31), ("b", 32))}
    batch = kit.make_batch(40, 6, 10, ids=[0, 1, 0, 1, 1, 1])
    # A learnable link between task and domain, so that the slope is far from zero.
    batch.x[0] = tasks["a"][0].x[0, :10]
    batch.labels[0] = batch.x[0]
    given = optimizer if preconditioner == "adam" else None
    engine = kit.measure(model, tasks, [batch], 2, preconditioner=preconditioner, optimizer=given)
    values = engine.matrix().values

    rates = {id(p): 2e-3 if p.ndim > 1 else 1e-3 for p in model.parameters()}
    for j in range(2):
        domain = kit.Batch(batch.x[batch.ids == j], batch.labels[batch.ids == j])
        gradients = torch.autograd.grad(kit.mean_loss(model, domain), list(model.parameters()))
        for i, task in enumerate(tasks.values()):
            errors = []
            for size in (1e-4, 1e-5, 1e-6):
                moved = copy.deepcopy(model)
                lr = size / max(float(torch.cat([g.flatten() for g in gradients]).norm()), 1e-9)
                if preconditioner == "adam":
                    lr *= 1e-3
                with torch.no_grad():
                    for old, new, gradient in zip(model.parameters(), moved.parameters(), gradients, strict=True):
                        if preconditioner == "adam":
                            state = optimizer.state[old]
                            v = state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))
                            gradient = rates[id(old)] / 2e-3 * gradient / (v.sqrt() + 1e-4)
                        new -= lr * gradient
                    fall = float(kit.mean_loss(model, task[0]) - kit.mean_loss(moved, task[0]))
                errors.append(abs(fall / lr - values[i, j]) / abs(values[i, j]))
            assert min(errors) < 0.05, (i, j, errors)
            assert errors[1] < errors[0] * 1.5 or errors[1] < 1e-3


def test_helpful_is_positive(kit):
    model = kit.make_model("gpt2")
    batch = kit.make_batch(3, 4, 10)
    engine = kit.measure(
        model, {"same": [batch]}, [batch._replace(ids=torch.zeros(4, dtype=torch.int64))], 1, preconditioner="identity"
    )
    gradients = torch.autograd.grad(kit.mean_loss(model, batch), list(model.parameters()))
    squared = sum(float(g.double().square().sum()) for g in gradients)
    assert engine.matrix().values[0, 0] == pytest.approx(squared, rel=1e-5)
