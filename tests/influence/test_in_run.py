"""Measured steps in a training loop, against engines run by hand on the same batches."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch

from tikmix_fast import InfluenceEngine, shifted_mask

TASKS = ("a", "b")
DOMAINS = ("x", "y", "z")


class Training:
    """A loop with gradient accumulation, whose batches depend on the step alone."""

    def __init__(self, kit, *, kind="attentive", wrap=True, adam=False, **options):
        self.kit, self.model = kit, kit.make_model(kind)
        self.optimizer = (
            torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=True)
            if adam
            else torch.optim.SGD(self.model.parameters(), lr=0.05)
        )
        self.engine = InfluenceEngine(
            self.model,
            DOMAINS,
            TASKS,
            preconditioner="adam" if adam else "identity",
            optimizer=self.optimizer if adam else None,
            batch_dim=0,
            check_every=1,
        )
        self.asked: list[int] = []
        self.run = self.engine.in_run(**{"every": 3, "tasks": self.measure_tasks, "near_every": 0, **options})
        self.wrap = wrap

    def task_batch(self, step, task, split):
        return self.kit.make_batch(1000 * step + 10 * task + split, 2, 8)

    def micro_batches(self, step):
        return [self.kit.make_batch(50_000 + 10 * step + part, 4, 8, ids=[part, 0, 1, 2]) for part in range(2)]

    def measure_tasks(self, step):
        self.asked.append(step)
        for task, name in enumerate(TASKS):
            for split in range(2):
                batch = self.task_batch(step, task, split)
                with self.engine.task(name, mask=shifted_mask(batch.labels)):
                    self.kit.mean_loss(self.model, batch).backward()

    def accumulate(self, batch):
        mask = shifted_mask(batch.labels)
        with self.run.micro_batch(batch.ids, mask=mask, normalizer=2 * int(mask.sum())):
            (self.kit.mean_loss(self.model, batch) / 2).backward()

    def train(self, steps):
        for _ in range(steps):
            for batch in self.micro_batches(self.run.steps):
                self.accumulate(batch)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.run.step()
        return self


def by_hand(kit, steps, factor):
    """Train alike; measure steps 2, 5, 8, ... with an engine's own contexts, and average with weights ``factor``."""
    training = Training(kit)
    engine, model = training.engine, training.model
    of_steps = []
    for step in range(steps):
        if step % 3 == 2:
            engine.reset()
            training.measure_tasks(step)
        for batch in training.micro_batches(step):
            mask = shifted_mask(batch.labels)
            if step % 3 == 2:
                with engine.domains(batch.ids, mask=mask, normalizer=2 * int(mask.sum())):
                    (kit.mean_loss(model, batch) / 2).backward()
            else:
                (kit.mean_loss(model, batch) / 2).backward()
        if step % 3 == 2:
            of_steps.append(engine.matrix())
        training.optimizer.step()
        training.optimizer.zero_grad()
    weights = [factor ** (len(of_steps) - 1 - at) for at in range(len(of_steps))]
    tokens = sum(w * each.tokens for w, each in zip(weights, of_steps, strict=True))
    return sum(w * each.tokens * each.values for w, each in zip(weights, of_steps, strict=True)) / tokens, tokens


@pytest.mark.parametrize("time_constant", [math.inf, 5.0])
def test_weighted_mean_over_measured_steps(kit, time_constant):
    training = Training(kit, time_constant=time_constant).train(11)
    values, tokens = by_hand(kit, 11, math.exp(-3 / time_constant))
    matrix = training.run.matrix()
    np.testing.assert_allclose(matrix.values, values, rtol=1e-9)
    np.testing.assert_allclose(matrix.tokens, tokens)
    assert training.asked == [2, 5, 8]
    assert (training.run.steps, training.run.measured) == (11, 3)
    assert matrix.microbatches.tolist() == [6, 6, 6]
    assert np.isfinite(matrix.stderr).all()
    told = matrix.settings["in_run"]
    assert told["time_constant"] == (None if math.isinf(time_constant) else 5.0)
    assert json.dumps(told)


def test_without_a_time_constant_it_is_the_engine_with_a_refresh_a_step(kit):
    training = Training(kit).train(9)
    other = Training(kit)
    for step in range(9):
        if step % 3 == 2:
            other.engine.refresh()
            other.measure_tasks(step)
        for batch in other.micro_batches(step):
            mask = shifted_mask(batch.labels)
            if step % 3 == 2:
                with other.engine.domains(batch.ids, mask=mask, normalizer=2 * int(mask.sum())):
                    (kit.mean_loss(other.model, batch) / 2).backward()
            else:
                (kit.mean_loss(other.model, batch) / 2).backward()
        other.optimizer.step()
        other.optimizer.zero_grad()
    ours, theirs = training.run.matrix(), other.engine.matrix()
    for name in ("values", "stderr", "stderr_task", "dof", "tokens"):
        assert (getattr(ours, name) == getattr(theirs, name)).all(), name


def test_training_is_what_it_would_be_without(kit):
    measured = Training(kit)
    plain = Training(kit)
    for step in range(4):
        for batch in measured.micro_batches(step):
            measured.accumulate(batch)
            (kit.mean_loss(plain.model, batch) / 2).backward()
        for (name, ours), theirs in zip(measured.model.named_parameters(), plain.model.parameters(), strict=True):
            if step < 2:
                assert (ours.grad == theirs.grad).all(), "a step that is not measured is not touched"
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
        for training in (measured, plain):
            training.optimizer.step()
            training.optimizer.zero_grad()
        measured.run.step()
    assert measured.run.measured == 1


def test_nothing_is_captured_between_measured_steps(kit, monkeypatch):
    training = Training(kit)
    monkeypatch.setattr(training.engine._session, "domains", lambda *_, **__: pytest.fail("no measured step"))
    training.train(2)
    with pytest.raises(pytest.fail.Exception):
        training.train(1)


def test_near_steps_and_their_share(kit):
    training = Training(kit, every=5, near_every=2, time_constant=50.0).train(80)
    regular = [step for step in training.asked if step % 5 == 4]
    near = [step for step in training.asked if step % 5 != 4]
    assert regular == list(range(4, 80, 5))
    assert near == [10, 21, 33, 40, 51, 63, 70]  # 1, 2 and 4 steps after every second one, in turn
    found = training.run.staleness()
    assert {1, 2, 4, 5, 10} <= {lag.steps for lag in found.queries}


@pytest.mark.parametrize("where", ["tasks", "before forward", "in backward"])
def test_a_body_that_raises_leaves_everything_clean(kit, where):
    training, undisturbed = Training(kit).train(2), Training(kit).train(3)
    keys = list(training.model.state_dict())
    first, _ = training.micro_batches(2)
    if where == "tasks":
        good = training.run.tasks
        training.run.tasks = lambda step: (training.measure_tasks(step), {}["mine"])
        with pytest.raises(KeyError, match="mine"):
            training.accumulate(first)
        training.run.tasks = good
    else:

        def body():
            if where == "before forward":
                raise KeyError("mine")
            loss = kit.mean_loss(training.model, first)
            loss.register_hook(lambda _: {}["mine"])
            loss.backward()

        with pytest.raises(KeyError, match="mine"), training.run.micro_batch(first.ids):
            body()
    assert list(training.model.state_dict()) == keys
    assert all("forward" not in vars(module) for module in training.model.modules())
    training.optimizer.zero_grad()
    training.train(1)
    assert (training.run.matrix().values == undisturbed.run.matrix().values).all()
    assert training.run.measured == 1


def test_an_optimizer_step_within_a_step_is_refused(kit):
    training = Training(kit).train(2)
    first, second = training.micro_batches(2)
    training.accumulate(first)
    training.optimizer.step()
    with pytest.raises(RuntimeError, match=r"weights changed.*run\.step\(\)"):
        training.accumulate(second)


@pytest.mark.parametrize("interrupted_at", [1, 6, 7])
def test_a_resumed_run_gives_the_same_bits(kit, interrupted_at):
    options = {"adam": True, "time_constant": 8.0, "near_every": 1}
    whole = Training(kit, **options).train(14)
    first = Training(kit, **options).train(interrupted_at)
    saved = json.dumps(first.run.state_dict())
    second = Training(kit, **options)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.run.load_state_dict(json.loads(saved))
    second.train(14 - interrupted_at)
    ours, theirs = whole.run.matrix(), second.run.matrix()
    for name in ("values", "stderr", "dof", "tokens"):
        assert (getattr(ours, name) == getattr(theirs, name)).all(), name
    assert whole.run.staleness() == second.run.staleness()
    assert whole.run.state_dict() == second.run.state_dict()


def test_states_that_do_not_fit(kit):
    training = Training(kit).train(3)
    state = training.run.state_dict()
    values = training.run.matrix().values
    for name, value in (("format", "x"), ("every", 7), ("steps", -1), ("staleness", {}), ("due", None)):
        with pytest.raises(ValueError, match=name):
            training.run.load_state_dict({**state, name: value})
    with pytest.raises(ValueError, match=r"time_constant.*must be .*; got 7.0"):
        training.run.load_state_dict({**state, "time_constant": 7.0})
    assert training.run.steps == 3
    assert (training.run.matrix().values == values).all()
    earlier = {name: value for name, value in state.items() if name != "time_constant"}
    training.run.load_state_dict(earlier)
    assert (training.run.matrix().values == values).all()
    training.train(2)
    training.accumulate(training.micro_batches(5)[0])
    with pytest.raises(RuntimeError, match="under way"):
        training.run.state_dict()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"every": 0}, ValueError, "every"),
        ({"near_every": -1}, ValueError, "near_every"),
        ({"time_constant": 0.0}, ValueError, "time_constant"),
        ({"tasks": "a"}, TypeError, "tasks"),
    ],
)
def test_bad_arguments(kit, options, error, words):
    with pytest.raises(error, match=words):
        Training(kit, **options)


class Scaler:
    def __init__(self, scale):
        self.scale = scale

    def get_scale(self):
        return self.scale


def test_a_scaler_drops_a_micro_batch_of_a_measured_step(kit):
    training = Training(kit, every=1)
    good, bad = training.micro_batches(0)
    scaler = Scaler(4.0)
    for batch, factor in ((good, 1.0), (bad, math.inf)):
        mask = shifted_mask(batch.labels)
        with training.run.micro_batch(batch.ids, mask, 2 * int(mask.sum()), scaler=scaler):
            (factor * scaler.scale * kit.mean_loss(training.model, batch) / 2).backward()
    training.run.step()
    matrix = training.run.matrix()
    assert (matrix.dropped, training.run.measured, matrix.microbatches.max()) == (1, 1, 1)
    assert np.isfinite(matrix.values).all()


def test_a_scaler_that_leaves_a_task_without_its_error_skips_the_step(kit):
    training = Training(kit, every=1)
    measure = training.run.tasks

    def overflow(step):  # the second of two splits of task "a" is lost, and all of "b" is there
        if step > 0:
            measure(step)
            return
        for task, split, factor in ((0, 0, 1.0), (0, 1, math.inf), (1, 0, 1.0), (1, 1, 1.0)):
            batch = training.task_batch(step, task, split)
            with training.engine.task("ab"[task], shifted_mask(batch.labels), scaler=Scaler(1.0)):
                (factor * kit.mean_loss(training.model, batch)).backward()

    training.run.tasks = overflow
    training.train(1)
    assert (training.run.measured, training.run.skipped) == (0, 1)
    training.train(2)
    assert (training.run.measured, training.run.skipped) == (2, 1)
    assert np.isfinite(training.run.matrix().stderr).all()


def test_a_scaler_that_drops_the_tasks_skips_the_step(kit):
    training = Training(kit, every=1)
    good = training.run.tasks

    def overflow(step):
        batch = training.task_batch(step, 0, 0)
        with training.engine.task("a", shifted_mask(batch.labels), scaler=Scaler(1.0)):
            (math.inf * kit.mean_loss(training.model, batch)).backward()

    training.run.tasks = overflow
    training.train(1)
    assert (training.run.measured, training.run.skipped) == (0, 1)
    training.run.tasks = good
    training.train(1)
    assert training.run.measured == 1

    training.run.tasks = lambda step: None
    with pytest.raises(RuntimeError, match=r"tasks come first.*'a', 'b'"):
        training.train(1)
