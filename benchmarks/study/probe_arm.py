"""Probe labels for an arm of the demonstration."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from tikmix_fast.demo.arm import Arm
from tikmix_fast.demo.corpora import Sequences
from tikmix_fast.demo.demonstration import task_losses
from tikmix_fast.mixture.inputs import Array
from tikmix_fast.probes.probe import ProbeLabels, probe

__all__ = ["probe_arm"]


def probe_arm(
    arm: Arm,
    tasks: Mapping[str, Sequences],
    mixtures: Sequence[Any] | Any,
    *,
    steps: int,
    repeats: int = 1,
    rows: int | None = None,
) -> ProbeLabels:
    """Label mixtures [N, m] by ``steps`` real steps of an arm on each. The arm stays as it was, bit by bit.

    The first repeat trains on what the arm would draw next. Each further repeat trains on the draws after that.

    Parameters
    ----------
    arm : Arm
    tasks : mapping from name to Sequences
        Text for the losses; use text that is not reported.
    mixtures : array_like [N, m]
        Domains in the arm's order.
    steps, repeats : int
        See `probe`.
    rows : int, optional
        Evaluated sequences per task; None: all.
    """
    start = arm.step

    def prepare(mixture: Array, repeat: int) -> None:
        # With the arm's own weights, every domain is at the same place for all mixtures.
        deque(islice(arm.sampler, repeat * steps * arm.settings.batch), maxlen=0)
        arm.sampler.set_weights(mixture)

    def train_step(mixture: Array, step: int) -> None:
        arm.step = start + step
        arm.train_step()

    def evaluate() -> list[float]:
        return list(task_losses(arm.model, tasks, rows).values())

    try:
        owners = (arm.model, arm.optimizer, arm.sampler)
        return probe(owners, train_step, evaluate, mixtures, steps=steps, repeats=repeats, prepare=prepare)
    finally:
        arm.step = start
