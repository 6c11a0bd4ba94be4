"""Measured influence against plain autograd, one domain and one task at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tikmix_fast.demo.arm import Arm
from tikmix_fast.demo.corpora import Corpora, Sequences
from tikmix_fast.demo.measuring import measure, rows_measured
from tikmix_fast.demo.settings import DemoSettings


def gradient(model: torch.nn.Module, sequences: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(model.loss(sequences), list(model.parameters()))
    return {name: each.double() for (name, _), each in zip(model.named_parameters(), gradients, strict=True)}


@pytest.mark.parametrize("preconditioner", ["adam", "identity"])
def test_the_matrix_is_that_of_plain_autograd(
    settings: DemoSettings, corpora: Corpora, preconditioner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    object.__setattr__(settings, "preconditioner", preconditioner)
    length = settings.model.length
    domains = {name: Sequences(text, length) for name, text in corpora.domains.items()}
    tasks = {name: Sequences(task.measure, length) for name, task in corpora.tasks.items()}
    arm = Arm(settings, domains)
    for _ in range(6):
        arm.train_step()
    before = {name: value.clone() for name, value in arm.model.state_dict().items()}

    batches: list[Tensor] = []
    ordinary = type(arm.model).loss

    def watched(model: torch.nn.Module, sequences: Tensor) -> Tensor:
        batches.append(sequences)
        return ordinary(model, sequences)

    with monkeypatch.context() as patch:
        patch.setattr(type(arm.model), "loss", watched)
        matrix = measure(arm.model, arm.optimizer, domains, tasks, settings, np.random.default_rng(0))
    assert all(torch.equal(value, before[name]) for name, value in arm.model.state_dict().items())
    assert sum(map(len, batches)) == rows_measured(settings, len(domains), len(tasks))

    per_task = settings.task_batches
    task_rows = [torch.cat(batches[i * per_task : (i + 1) * per_task]) for i in range(len(tasks))]
    domain_rows = [
        torch.cat([rows.split(settings.domain_rows)[j] for rows in batches[len(tasks) * per_task :]])
        for j in range(len(domains))
    ]
    for rows, text in zip(task_rows + domain_rows, [*tasks.values(), *domains.values()], strict=True):
        known = {tuple(item.tolist()) for item in text.all()}
        assert {tuple(row.tolist()) for row in rows} <= known

    scale = {}
    for name, parameter in arm.model.named_parameters():
        state = arm.optimizer.state[parameter]
        second = state["exp_avg_sq"].double() / (1 - 0.99 ** float(state["step"]))
        scale[name] = 1 / (second.sqrt() + 1e-8) if preconditioner == "adam" else torch.ones_like(second)
    queries = [gradient(arm.model, rows) for rows in task_rows]
    columns = [gradient(arm.model, rows) for rows in domain_rows]
    for i, query in enumerate(queries):
        for j, column in enumerate(columns):
            expected = sum(float((query[name] * scale[name] * column[name]).sum()) for name in scale)
            lengths = [
                sum(float((each**2).sum()) for each in vector.values()) ** 0.5
                for vector in ({name: query[name] * scale[name] for name in scale}, column)
            ]
            assert abs(matrix.values[i, j] - expected) < 1e-5 * lengths[0] * lengths[1]
    assert np.isfinite(matrix.stderr).all()


def test_a_text_shorter_than_what_is_measured_is_drawn_from_again(settings: DemoSettings, corpora: Corpora) -> None:
    length = settings.model.length
    domains = {name: Sequences(text[: 3 * length + 1], length) for name, text in corpora.domains.items()}
    tasks = {"prose": Sequences(corpora.tasks["prose"].measure, length)}
    arm = Arm(settings, domains)
    arm.train_step()
    matrix = measure(arm.model, arm.optimizer, domains, tasks, settings, np.random.default_rng(0))
    assert np.isfinite(matrix.values).all()
    assert matrix.tokens.tolist() == [12 * length] * 3
