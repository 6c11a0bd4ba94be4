"""``engine.verify`` recomputes cells without the capture, and would notice if the capture were wrong."""

from __future__ import annotations

import pytest
import torch

from tikmix_fast import shifted_mask
from tikmix_fast.influence.passes.influence_sink import InfluenceSink


def per_row(kit):
    return lambda model, batch: kit.token_losses(model, *batch).sum(1)


def engine_for(kit, kind, **options):
    model = kit.make_model(kind)
    tasks = {"a": [kit.make_batch(1, 3, 8)], "b": [kit.make_batch(2, 3, 8), kit.make_batch(3, 2, 8)]}
    return kit.measure(
        model, tasks, [kit.make_batch(4, 4, 9, ids=[0, 1, 2, 0])], 4, preconditioner="identity", **options
    )


@pytest.mark.parametrize("grad", ["fused", "ordinary"])
@pytest.mark.parametrize("kind", ["gpt2", "llama-tied", "attentive"])
def test_agrees_in_float32(kit, kind, grad):
    engine = engine_for(kit, kind, grad=grad)
    batch = kit.make_batch(5, 5, 9, masked=0.2)
    before = engine.state_dict()
    gradients = [p.grad for p in engine.model.parameters()]
    report = engine.verify(per_row(kit), (batch.x, batch.labels), torch.tensor([0, 1, 1, 3, 0]), cells=6)
    assert len(report.cells) == 6
    assert len({(c.task, c.domain) for c in report.cells}) == 6
    assert {c.domain for c in report.cells} <= {"d0", "d1", "d3"}
    assert report.max_error < 1e-6
    assert "6 cells" in str(report)
    assert engine.state_dict() == before
    assert all(p.grad is g for p, g in zip(engine.model.parameters(), gradients, strict=True))


def test_agrees_to_the_last_digits_in_float64(kit):
    model = kit.make_model("gpt2").double()
    engine = kit.measure(
        model, {"a": [kit.make_batch(1, 3, 8)]}, [kit.make_batch(4, 2, 9, ids=[0, 1])], 2, preconditioner="identity"
    )
    batch = kit.make_batch(5, 4, 9)
    report = engine.verify(per_row(kit), (batch.x, batch.labels), [0, 1, 1, 0])
    assert report.max_error < 1e-14


def test_per_position(kit):
    import torch.nn as nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(37, 8), nn.LayerNorm(8), nn.Linear(8, 37))
    engine = kit.measure(
        model, {"a": [kit.make_batch(1, 3, 8)]}, [kit.make_batch(4, 2, 9, ids=[0, 1])], 3, preconditioner="identity"
    )
    batch = kit.make_batch(5, 4, 9)
    ids = torch.arange(36).reshape(4, 9) % 3
    losses = lambda model, given: kit.token_losses(model, *given)  # noqa: E731
    assert engine.verify(losses, (batch.x, batch.labels), ids, cells=3).max_error < 1e-6


def test_notices_a_wrong_capture(kit, monkeypatch):
    engine = engine_for(kit, "gpt2")
    batch = kit.make_batch(5, 5, 9)
    original = InfluenceSink.features
    monkeypatch.setattr(InfluenceSink, "features", lambda self, view, rows: original(self, view, 1.5 * rows))
    report = engine.verify(per_row(kit), (batch.x, batch.labels), torch.tensor([0, 1, 1, 3, 0]))
    assert report.max_error > 1e-4


def test_bad_use(kit):
    engine = engine_for(kit, "attentive")
    batch = kit.make_batch(5, 4, 9)
    given = (batch.x, batch.labels)
    with pytest.raises(ValueError, match="domain of every row"):
        engine.verify(per_row(kit), given, "d0")
    with pytest.raises(ValueError, match="loss_per_row must return losses of shape"):
        engine.verify(lambda m, b: kit.token_losses(m, *b), given, [0, 1, 1, 0])
    with pytest.raises(ValueError, match="cells"):
        engine.verify(per_row(kit), given, [0, 1, 1, 0], cells=0)
    engine.refresh()
    with pytest.raises(RuntimeError, match="frozen queries"):
        engine.verify(per_row(kit), given, [0, 1, 1, 0])
    with engine.task("a", mask=shifted_mask(batch.labels)):
        kit.mean_loss(engine.model, batch).backward()
